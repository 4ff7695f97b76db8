"""Clips of frames in folders and tars: outcomes, and which frames come."""

import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from time_codes import picture_of, time_of, write_timed_frames

from vivit.pipeline.errors import DataError
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video import ClipResult, ClipSpan, probe, read_clips, read_frames
from vivit.pipeline.video_location import FrameSource, is_video_file, missing_videos, split_frames, video_at
from vivit.pipeline.video_source import Failure, open_source

RATE = 20


class Every:
    """Wants every `step`-th frame of a clip, and keeps the times that the pictures carry."""

    def __init__(self, step: int = 1) -> None:
        self._step = step
        self.times_sec: NDArray[np.float64] = np.zeros(0)
        self.shown: dict[int, float] = {}

    def plan(self, times_sec: NDArray[np.float64]) -> NDArray[np.int64]:
        self.times_sec, self.shown = times_sec, {}
        return np.arange(0, len(times_sec), self._step)

    def add(self, index: int, picture: NDArray[np.uint8]) -> None:
        self.shown[index] = time_of(picture)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """3 seconds of frames."""
    return write_timed_frames(tmp_path / "v", rate=RATE, num_frames=3 * RATE)


def read(
    place: Path, *spans: tuple[float | None, float | None], step: int = 1
) -> list[tuple[ClipResult, Every]]:
    sinks = [Every(step) for _ in spans]
    results = dict(read_clips(FrameSource(place, RATE), [ClipSpan(*span) for span in spans], sinks))
    for sink in sinks:
        for index, time in sink.shown.items():
            assert time == pytest.approx(sink.times_sec[index], abs=0.0011)
    return [(results[at], sink) for at, sink in enumerate(sinks)]


def packed(folder: Path, prefix: str = "") -> Path:
    tar = folder.with_suffix(".tar")
    with tarfile.open(tar, "w") as archive:
        for frame in sorted(folder.iterdir()):
            archive.add(frame, prefix + frame.name)
    return tar


@pytest.mark.parametrize("kind", ["folder", "tar", "tar with ./"])
def test_a_clip_has_the_frames_from_its_start_to_before_its_end(frames: Path, kind: str) -> None:
    place = frames if kind == "folder" else packed(frames, "./" if kind == "tar with ./" else "")
    (whole, every), (part, some), (start, _) = read(place, (None, None), (0.5, 1.0), (0.0, 0.05))
    assert (whole.outcome, whole.num_frames, len(every.shown)) == (Outcome.OK, 60, 60)
    assert (part.outcome, part.num_frames, some.times_sec[0]) == (Outcome.OK, 10, 0.5)
    assert (start.outcome, start.num_frames) == (Outcome.OK, 1)


def test_ends_far_past_the_last_frame_are_partial(frames: Path) -> None:
    (near, _), (far, _), (gone, _) = read(frames, (2.0, 3.4), (2.0, 4.0), (3.5, 4.0))
    assert (near.outcome, near.num_frames) == (Outcome.OK, 20)
    assert (far.outcome, far.num_frames) == (Outcome.PARTIAL, 20)
    assert "the clip ends at 4.000 s, but the frames at 3.000 s" in far.message
    assert gone.outcome is Outcome.NO_FRAMES


def test_missing_frames_are_partial_and_shift_no_others(frames: Path) -> None:
    for number in (11, 12, 25):
        (frames / f"frame_{number:010}.jpg").unlink()
    (first, sink), (second, _), (whole, _) = read(frames, (0.0, 1.0), (1.0, 2.0), (1.5, 2.5))
    assert (first.outcome, first.num_frames, first.message) == (Outcome.PARTIAL, 18, "2 frames are missing")
    assert sink.times_sec[10] == pytest.approx(12 / RATE)
    assert (second.outcome, whole.outcome) == (Outcome.PARTIAL, Outcome.OK)


def test_damaged_frames_are_left_out_and_only_where_they_are_wanted(frames: Path) -> None:
    file = frames / "frame_0000000005.jpg"
    file.write_bytes(file.read_bytes()[:300])
    (frames / "frame_0000000006.jpg").write_bytes(b"")
    (all_, sink), (elsewhere, _) = read(frames, (0.0, 1.0), (1.0, 2.0))
    assert (all_.outcome, all_.num_frames) == (Outcome.CORRUPT, 18)
    assert "2 frames cannot be decoded" in all_.message
    assert sink.times_sec[4] == pytest.approx(6 / RATE)
    assert elsewhere.outcome is Outcome.OK
    [(only, _)] = read(frames, (4 / RATE, 6 / RATE))
    assert (only.outcome, only.message) == (Outcome.NO_FRAMES, "none of 2 frames can be decoded")


def test_a_tar_that_is_cut_short_is_partial(frames: Path) -> None:
    tar = packed(frames)
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2 + 700])
    (whole, _), (front, _) = read(tar, (None, None), (0.0, 0.5))
    assert whole.outcome is Outcome.PARTIAL
    assert 20 < whole.num_frames < 40
    assert (front.outcome, front.num_frames) == (Outcome.OK, 10)


def test_optical_flow_beside_the_pictures_is_left_alone(tmp_path: Path) -> None:
    folder = write_timed_frames(tmp_path / "v", rate=RATE, num_frames=5)
    for frame in sorted(folder.iterdir()):
        data = frame.read_bytes()
        frame.rename(folder / f"img_{frame.stem[-5:]}.jpg")
        for axis in ("x", "y"):
            (folder / f"flow_{axis}_{frame.stem[-5:]}.jpg").write_bytes(data[:9])
    [(whole, _)] = read(folder, (None, None))
    assert (whole.outcome, whole.num_frames) == (Outcome.OK, 5)


def test_places_without_frames_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").touch()
    (tmp_path / "a.mp4").touch()
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 100)
    expected = {
        "gone": Outcome.MISSING,
        "gone.tar": Outcome.MISSING,
        "a.mp4/x": Outcome.MISSING,
        "empty": Outcome.NO_FRAMES,
        "notes": Outcome.NO_FRAMES,
        "a.mp4": Outcome.NOT_A_VIDEO,
        "bad.tar": Outcome.UNREADABLE_CONTAINER,
    }
    assert {name: read(tmp_path / name, (None, None))[0][0].outcome for name in expected} == expected


def test_a_folder_that_changes_is_listed_again(frames: Path) -> None:
    assert read(frames, (None, None))[0][0].num_frames == 60
    (frames / "frame_0000000060.jpg").unlink()
    os.utime(frames, ns=(1, 1))
    assert read(frames, (None, None))[0][0].num_frames == 59


def test_reading_ends_after_its_time_or_a_stop(frames: Path) -> None:
    source, stop = FrameSource(frames, RATE), threading.Event()
    [(_, late)] = read_clips(source, [ClipSpan()], [Every()], timeout_sec=0.0)
    assert late.outcome is Outcome.TIMEOUT
    stop.set()
    assert list(read_clips(source, [ClipSpan()], [Every()], stop=stop)) == []


def test_frames_are_probed_and_shown_like_a_video(frames: Path) -> None:
    about = probe(FrameSource(packed(frames), RATE))
    assert (about.container, about.codec, about.num_frames, about.frame_rate) == ("frames", "jpg", 60, RATE)
    assert (about.duration_sec, about.width, about.height) == (3.0, 64, 64)
    shown = read_frames(FrameSource(frames, RATE), [0.0, 1.02, 99.0])
    assert [time_of(picture) for picture in shown] == pytest.approx([0.0, 1.0, 2.95], abs=0.0011)
    with pytest.raises(DataError, match=r"none::frames@20 cannot be read \(missing\): no such folder"):
        probe(FrameSource(frames / "none", RATE))


def test_a_manifest_names_frames_and_their_rate(tmp_path: Path, frames: Path) -> None:
    packed(frames)
    assert split_frames("P01/P01_01.tar::frames@59.94") == ("P01/P01_01.tar", 59.94)
    assert split_frames("P01/P01_01.tar::frame_1.jpg") is None
    assert video_at(tmp_path, "v::frames@20") == FrameSource(tmp_path / "v", 20.0)
    assert is_video_file(tmp_path, "v.tar::frames@20")
    names = ["v::frames@20", "v.tar::frames@20", "w::frames@20", "w.tar::frames@20"]
    assert missing_videos(tmp_path, names) == names[2:]
    with pytest.raises(Failure, match="frames, not a video file"):
        open_source(FrameSource(frames, RATE))


def test_time_codes_survive_a_picture() -> None:
    assert [time_of(picture_of(time)) for time in (0.0, 1.234, 59.999)] == pytest.approx([0.0, 1.234, 59.999])
