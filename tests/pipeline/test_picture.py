"""Pictures are upright, and their colours those of exact arithmetic."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from vivit.pipeline.video import probe, read_frames


def test_rotated_videos_are_shown_upright(shared: Callable[[str], Path]) -> None:
    stored: dict[int, NDArray[np.uint8]] = {}
    for angle in (90, 180, 270):
        path = shared(f"bad_videos/rotate{angle}.mp4")
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
        assert (frame.width, frame.height) == (160, 96)
        shown = read_frames(path, [0.0])[0]
        info = probe(path)
        assert shown.shape[:2] == (info.height, info.width)
        stored[angle] = np.rot90(shown, -(angle // 90))
        # picture 0 has a black bar across its top quarter
        assert stored[angle][:20].mean() < 30 < stored[angle][28:].mean()
    np.testing.assert_array_equal(stored[90], stored[180])
    np.testing.assert_array_equal(stored[90], stored[270])


def write_colours(path: Path, *, matrix: int, color_range: int) -> NDArray[np.uint8]:
    """A lossless video of one frame with random YUV blocks of 16x16; gives their YUV [48, 64, 3]."""
    blocks = np.random.default_rng(0).integers(60, 190, (3, 4, 3)).astype(np.uint8)
    yuv = blocks.repeat(16, 0).repeat(16, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = color_range
        planes = [yuv[:, :, 0], yuv[::2, ::2, 1], yuv[::2, ::2, 2]]
        packed = np.concatenate([plane.reshape(-1, 64) for plane in planes])
        frame = av.VideoFrame.from_ndarray(packed, "yuv420p")
        frame.colorspace, frame.color_range = matrix, color_range
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return yuv


@pytest.mark.parametrize(
    ("matrix", "color_range", "red", "blue"),
    [
        pytest.param(2, 0, 0.299, 0.114, id="untagged is BT.601, limited"),
        pytest.param(1, 1, 0.2126, 0.0722, id="BT.709"),
        pytest.param(1, 2, 0.2126, 0.0722, id="BT.709, full range"),
        pytest.param(6, 1, 0.299, 0.114, id="SMPTE 170M"),
        pytest.param(9, 1, 0.2627, 0.0593, id="BT.2020"),
    ],
)
def test_colours_are_those_of_exact_arithmetic(
    tmp_path: Path, matrix: int, color_range: int, red: float, blue: float
) -> None:
    yuv = write_colours(tmp_path / "colours.mp4", matrix=matrix, color_range=color_range).astype(float)
    y, u, v = (yuv - [0 if color_range == 2 else 16, 128, 128]).transpose(2, 0, 1)
    y, u, v = (y / 255, u / 255, v / 255) if color_range == 2 else (y / 219, u / 224, v / 224)
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    exact = np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], axis=-1) * 255
    inner = (np.arange(64) % 16 > 3) & (np.arange(64) % 16 < 12)  # away from where chroma is interpolated
    difference = (read_frames(tmp_path / "colours.mp4", [0.0])[0] - exact.clip(0, 255))[inner[:48]][:, inner]
    assert np.abs(difference).max() < 1.5
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.3


def test_gray_and_ten_bit_pictures_have_no_tint(shared: Callable[[str], Path]) -> None:
    for name in (
        "hevc_gray.mp4",
        "h264_monochrome.mp4",
        "hevc_10bit.mp4",
        "h264_10bit_422.mp4",
        "yuv444p.mp4",
    ):
        frames = read_frames(shared(f"bad_videos/{name}"), [0.0]).astype(int)
        assert np.ptp(frames, axis=-1).max() <= 2, name
        assert 70 < frames.mean() < 82, name
