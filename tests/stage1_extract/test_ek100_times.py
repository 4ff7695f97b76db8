"""Crops of a miniature EPIC-KITCHENS-100 show the moments that its annotations mean: MP4 files, JPEG folders and tars.

Real annotation rows of a video of 2018 (59.94 frames/s, JPEGs at 60) and of one of 2020 (50 and 50).
"""

import csv
import tarfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from time_codes import RESOLUTION_SEC, SIDE, time_of, write_timed_frames, write_timed_video

from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.datasets.ek100 import seconds
from vivit.pipeline.manifest import Clip
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video_location import video_at
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.clip_reader import CropSettings, crop_clips

LENGTH_SEC = 9
RATES = {"P01_11": (Fraction(60000, 1001), 60), "P03_101": (Fraction(50), 50)}
"""Frames a second of the video and of its released frames."""
VIEWS = ViewSpec(
    num_frames=5,
    stride=4,
    resize=SIDE,
    crop_size=SIDE,
    scale_min=1.0,
    scale_max=1.0,
    flip=0,
    test_clips=2,
    test_crops=1,
)
SETTINGS = CropSettings(views=VIEWS, seed=0, interpolation="bilinear")
Shared = Callable[[str], Path]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, shared: Shared) -> Path:
    """Annotations, `PXX/videos/*.MP4`, `PXX/rgb_frames/<video>/`; tars of the frames in `tars/PXX/rgb_frames`."""
    root = tmp_path_factory.mktemp("ek100")
    source = shared("annotations/epic-kitchens-100")
    for name in ("EPIC_100_verb_classes.csv", "EPIC_100_noun_classes.csv"):
        (root / name).write_bytes((source / name).read_bytes())
    samples = ("EPIC_100_validation.csv", "EPIC_100_uda_target_val.head200.csv")
    with (root / "EPIC_100_validation.csv").open("w", newline="") as file:
        for at, sample in enumerate(samples):
            with (source / sample).open(newline="") as lines:
                header, *rows = csv.reader(lines)
            kept = [row for row in rows if row[2] in RATES and seconds(row[5]) < LENGTH_SEC]
            csv.writer(file).writerows([*([header] if at == 0 else []), *kept])
    for video, (rate, frame_rate) in RATES.items():
        person = video.partition("_")[0]
        write_timed_video(root / f"{person}/videos/{video}.MP4", rate=rate, num_frames=int(rate * LENGTH_SEC))
        frames = root / f"frames_only/{person}/rgb_frames/{video}"
        write_timed_frames(frames, rate=frame_rate, num_frames=frame_rate * LENGTH_SEC)
        tar = root / f"tars_only/{person}/rgb_frames/{video}.tar"
        tar.parent.mkdir(parents=True)
        with tarfile.open(tar, "w") as archive:
            for frame in sorted(frames.iterdir()):
                archive.add(frame, frame.name)
    return root


def shown_times(root: Path, clips: Sequence[Clip]) -> dict[str, np.ndarray]:
    """The times [view, frame] that the crops of each clip carry."""
    found = {}
    for video, together in groupby(clips, key=lambda clip: clip.video):
        for crops in crop_clips(video_at(root, video), list(together), SETTINGS):
            assert crops.result.outcome in (Outcome.OK, Outcome.SHORT), crops.result
            assert crops.crops is not None
            found[crops.clip.clip_id] = np.array([[time_of(frame) for frame in view] for view in crops.crops])
    return found


def expected_times(first: int, end: int, rate: float) -> np.ndarray:
    """Times [view, frame] of the test views of the frames `first` to `end - 1` of a video."""
    room = max(0, end - first - VIEWS.num_frames * VIEWS.stride)
    starts = [int(start) for start in np.linspace(0, room, VIEWS.test_clips)]
    return np.array(
        [[(first + (s + VIEWS.stride * k) % (end - first)) / rate for k in range(5)] for s in starts]
    )


def test_mp4_is_cut_by_seconds(tree: Path) -> None:
    clips = read_dataset("ek100", tree)[0].of_split("validation")
    assert {clip.source["video_id"] for clip in clips} == set(RATES)
    assert len(clips) >= 6
    times = shown_times(tree, clips)
    for clip in clips:
        rate = float(RATES[clip.source["video_id"]][0])
        bounds = [seconds(clip.source[f"{word}_timestamp"]) for word in ("start", "stop")]
        first, end = (int(np.ceil(bound * rate - 1e-6)) for bound in bounds)
        error = np.abs(times[clip.clip_id] - expected_times(first, end, rate))
        assert error.max() < 0.5 / rate
        assert bounds[0] - RESOLUTION_SEC <= times[clip.clip_id].min() < bounds[0] + 1 / rate + RESOLUTION_SEC


@pytest.mark.parametrize("place", ["frames_only", "tars_only"])
def test_jpeg_frames_are_cut_by_their_numbers(tree: Path, place: str) -> None:
    manifest, root = read_dataset("ek100", tree / place, tree)
    clips = manifest.of_split("validation")
    assert all(clip.video.endswith(("::frames@60", "::frames@50")) for clip in clips)
    assert all((".tar::" in clip.video) == (place == "tars_only") for clip in clips)
    times = shown_times(Path(str(root)), clips)
    for clip in clips:
        rate = RATES[clip.source["video_id"]][1]
        first, end = (int(clip.source[f"{word}_frame"]) - 1 for word in ("start", "stop"))
        error = np.abs(times[clip.clip_id] - expected_times(first, end, rate))
        assert error.max() < 0.5 / rate
        # the numbers are seconds times rate, rounded down, and number 1 is the first frame
        start = seconds(clip.source["start_timestamp"])
        assert -2.1 / rate <= times[clip.clip_id].min() - start <= RESOLUTION_SEC
