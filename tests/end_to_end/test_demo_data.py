"""The demo's videos: reproducible, balanced, and told apart by the order of their frames only."""

import hashlib
import io
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from vivit.end_to_end.demo_data import (
    CLASSES,
    HEAD,
    MANIFEST,
    PAIRS,
    DemoSpec,
    Draws,
    Frames,
    demo_manifest,
    encode,
    make_demo,
    render,
)
from vivit.pipeline.errors import ConfigError, StorageError
from vivit.pipeline.manifest import Manifest

SPEC = DemoSpec(train_clips=2, validation_clips=1, num_frames=5, size=32)


def decode(video: bytes) -> Frames:
    """Frames [time, height, width, channel], uint8 RGB."""
    with av.open(io.BytesIO(video), "r") as container:
        return np.stack(
            [np.asarray(f.to_ndarray(format="rgb24"), np.uint8) for f in container.decode(video=0)]
        )


def digests(folder: Path) -> dict[str, str]:
    """Sha256 of each video by its path."""
    videos = sorted(folder.glob("*/*.mp4"))
    return {str(v.relative_to(folder)): hashlib.sha256(v.read_bytes()).hexdigest() for v in videos}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    make_demo(path, SPEC)
    return path


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_the_classes_of_a_pair_show_the_same_frames_in_opposite_order(pair: tuple[str, str]) -> None:
    forward, backward = (render(name, "clip", SPEC) for name in pair)
    assert np.array_equal(forward[::-1], backward)
    assert not np.array_equal(forward, backward)


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_compression_does_not_give_the_order_away(pair: tuple[str, str]) -> None:
    forward, backward = (decode(encode(render(name, "clip", SPEC), SPEC.fps)) for name in pair)
    assert np.array_equal(forward[::-1], backward)


def test_two_runs_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    make_demo(tmp_path, SPEC)
    assert digests(tmp_path) == digests(folder)


def test_a_clip_made_alone_equals_the_clip_of_the_set(folder: Path) -> None:
    clip = demo_manifest(SPEC).clips[-1]
    alone = encode(render(CLASSES[clip.labels[HEAD]], clip.clip_id, SPEC), SPEC.fps)
    assert alone == (folder / clip.video).read_bytes()


def test_clips_differ_from_one_another_and_with_the_seed(folder: Path, tmp_path: Path) -> None:
    assert len(set(digests(folder).values())) == 3 * len(CLASSES)
    make_demo(tmp_path, DemoSpec(train_clips=1, validation_clips=1, num_frames=5, size=32, seed=1))
    assert not set(digests(tmp_path).values()) & set(digests(folder).values())


def test_the_classes_are_balanced_and_every_video_is_there(folder: Path) -> None:
    manifest = Manifest.read(folder / MANIFEST)
    assert manifest.heads == {HEAD: CLASSES}
    assert manifest.missing_videos(folder) == []
    assert manifest.sha256 == demo_manifest(SPEC).sha256
    for split, count in (("train", 2), ("validation", 1)):
        assert Counter(manifest.labels(split)[HEAD].tolist()) == dict.fromkeys(range(len(CLASSES)), count)


def test_a_video_lies_in_the_folder_of_its_class() -> None:
    for clip in demo_manifest(SPEC).clips:
        assert clip.video == f"{CLASSES[clip.labels[HEAD]]}/{clip.clip_id}.mp4"


def test_a_video_decodes_to_the_frames_that_were_rendered(folder: Path) -> None:
    for clip in demo_manifest(SPEC).clips:
        shown = decode((folder / clip.video).read_bytes())
        rendered = render(CLASSES[clip.labels[HEAD]], clip.clip_id, SPEC)
        assert shown.shape == rendered.shape == (5, 32, 32, 3)
        # Chroma at half the resolution and the quantiser cost about 10 grey levels at 32 pixels.
        assert abs(shown.astype(float) - rendered).mean() < 12


def test_a_video_has_the_frame_rate_of_the_spec(folder: Path) -> None:
    with av.open(folder / demo_manifest(SPEC).clips[0].video, "r") as container:
        assert container.streams.video[0].average_rate == SPEC.fps


def test_a_second_run_keeps_what_is_there_and_makes_what_is_missing(tmp_path: Path) -> None:
    first, second, *_ = (tmp_path / clip.video for clip in make_demo(tmp_path, SPEC).clips)
    whole, written = digests(tmp_path), first.stat().st_mtime_ns
    second.unlink()
    make_demo(tmp_path, SPEC)
    assert digests(tmp_path) == whole
    assert first.stat().st_mtime_ns == written


def test_videos_of_another_spec_are_replaced(folder: Path, tmp_path: Path) -> None:
    make_demo(tmp_path, DemoSpec(train_clips=3, validation_clips=1, num_frames=4, size=32))
    make_demo(tmp_path, SPEC)
    assert digests(tmp_path) == digests(folder)


def test_an_interrupted_run_leaves_whole_videos_and_no_manifest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = demo_manifest(SPEC).clips[-1].clip_id

    def interrupted(name: str, clip_id: str, spec: DemoSpec) -> Frames:
        if clip_id == last:
            raise KeyboardInterrupt
        return render(name, clip_id, spec)

    monkeypatch.setattr("vivit.end_to_end.demo_data.render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path, SPEC)
    assert digests(tmp_path).items() < digests(folder).items()
    assert not (tmp_path / MANIFEST).exists()
    monkeypatch.undo()
    make_demo(tmp_path, SPEC)
    assert digests(tmp_path) == digests(folder)


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="below a file"):
        make_demo(tmp_path / "file" / "demo", SPEC)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_clips": 0}, "train_clips must be at least 1, got 0"),
        ({"num_frames": 1}, "num_frames must be at least 2, got 1"),
        ({"size": 33}, "size must be even"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DemoSpec(**settings)


def test_draws_are_spread_over_their_range() -> None:
    draws = Draws(0, "clip")
    numbers = [draws.uniform(2, 4) for _ in range(1000)]
    assert 2 <= min(numbers) < 2.1
    assert 3.9 < max(numbers) < 4
    noise = draws.noise(10, 20, 30)
    assert noise.shape == (10, 20, 30)
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(6**-0.5, abs=0.01)
