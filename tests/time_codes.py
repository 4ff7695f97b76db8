"""Pictures that carry a time, so that a test can tell which moment of a video a crop shows."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_ROWS = 4
"""Fields in a row and in a column: 16 bits of milliseconds."""
SIDE = 64
"""Height and width of a picture in pixels."""
RESOLUTION_SEC = 0.001


def picture_of(time_sec: float) -> NDArray[np.uint8]:
    """A square picture [height, width, 3]: milliseconds as black and white fields, the highest bit first."""
    code = round(time_sec / RESOLUTION_SEC)
    bits = [code >> (_ROWS**2 - 1 - at) & 1 for at in range(_ROWS**2)]
    fields = (np.array(bits).reshape(_ROWS, _ROWS) * 215 + 20).astype(np.uint8)
    grey = fields.repeat(SIDE // _ROWS, axis=0).repeat(SIDE // _ROWS, axis=1)
    return np.repeat(grey[:, :, None], 3, axis=2)


def time_of(crop: NDArray[np.uint8]) -> float:
    """The time in a crop [height, width, 3] of the whole picture, in seconds."""
    side = crop.shape[0] // _ROWS
    fields = crop.mean(axis=2).reshape(_ROWS, side, _ROWS, side)
    middle = fields[:, side // 4 : -(side // 4), :, side // 4 : -(side // 4)].mean(axis=(1, 3))
    bits = (middle > 127).ravel().tolist()
    return sum(bit << (_ROWS**2 - 1 - at) for at, bit in enumerate(bits)) * RESOLUTION_SEC


def write_timed_video(path: Path, *, rate: Fraction, num_frames: int) -> Path:
    """An H.264 MP4 in which frame `n` shows the time `n / rate`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture_of(float(index / rate)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_timed_frames(folder: Path, *, rate: int, num_frames: int) -> Path:
    """JPEGs as released: number 1 shows the beginning of the video, whose frames were resampled to `rate`."""
    folder.mkdir(parents=True)
    for index in range(num_frames):
        Image.fromarray(picture_of(index / rate)).save(folder / f"frame_{index + 1:010}.jpg", quality=90)
    return folder
