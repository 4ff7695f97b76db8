"""EPIC-KITCHENS-100 action recognition from its annotation CSVs, and MP4 files or the released JPEG frames.

MP4 files are cut by seconds. The frame numbers in the CSVs belong to the JPEG frames only, which have 60 frames a second
in the videos of 2018 (`PXX_YY`) and 50 in those of 2020 (`PXX_1YY`), whatever the rate of the MP4.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vivit.pipeline.datasets.annotation_files import in_id_order, read_csv
from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.ek100_official import SPLIT_FILES, Subsets
from vivit.pipeline.datasets.tree import VideoFinder
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.video_location import frames_name

_CLASS_FILES = {"verb": "EPIC_100_verb_classes.csv", "noun": "EPIC_100_noun_classes.csv"}
_KEPT = (
    "participant_id", "video_id", "start_timestamp", "stop_timestamp", "start_frame", "stop_frame", "narration",
    "all_noun_classes",
)  # fmt: skip
_NEEDED = ("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp")
_BAD_FRAMES = ("P01_109", "P27_103")
"""Videos whose first released frames had the wrong rate; the errata of 2020-09-26 has good ones."""


def read_ek100(files: DatasetFiles) -> Manifest:
    """Manifest with heads verb (97) and noun (300), for those of train, validation and test whose CSV is there."""
    classes = {
        head: files.need(name, what="EPIC-KITCHENS-100 classes") for head, name in _CLASS_FILES.items()
    }
    heads = {head: _classes(path) for head, path in classes.items()}
    found = {split: path for split, name in SPLIT_FILES.items() if (path := files.find(name))}
    if not found:
        raise files.not_found(SPLIT_FILES.values(), "EPIC-KITCHENS-100 annotations")
    subsets = Subsets.read(classes["verb"].parent)
    files.take(subsets.files)
    rows = {split: read_csv(path, _NEEDED) for split, path in found.items()}
    media = _media(files, {row["video_id"] for some in rows.values() for row in some})
    clips = [_clip(row, split, media, subsets) for split, some in rows.items() for row in some]
    return files.manifest(clips, heads)


def seconds(timestamp: str) -> float:
    """`HH:MM:SS.fraction` in seconds."""
    hours, minutes, rest = timestamp.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def frame_rate(video_id: str) -> int:
    """Frames a second of the released JPEG frames of a video."""
    return 50 if len(video_id.partition("_")[2]) == 3 else 60


def _classes(path: Path) -> list[str]:
    rows = read_csv(path, ("id", "key"))
    try:
        names = {int(row["id"]): row["key"] for row in rows}
    except ValueError as error:
        raise DataError(f"{path}: a class id is not a whole number ({error})") from error
    return in_id_order(names, path, len(rows))


def _clip(row: Mapping[str, str], split: str, media: "_Media", subsets: Subsets) -> Clip:
    try:
        labels = {head: int(row[f"{head}_class"]) for head in _CLASS_FILES if row.get(f"{head}_class")}
        start_sec, end_sec = media.span(row)
        source: dict[str, Any] = {name: row.get(name) for name in _KEPT}
        source |= subsets.columns(split, row["participant_id"], labels)
        return Clip(
            clip_id=row["narration_id"],
            split=split,
            video=media.video(row["participant_id"], row["video_id"]),
            start_sec=start_sec,
            end_sec=end_sec,
            labels=labels,
            source=source,
        )
    except ValueError as error:
        raise DataError(f"{SPLIT_FILES[split]}, row {row['narration_id'] or '?'}: {error}") from error


class _Media(Protocol):
    """Where the pictures of a row come from, and which of them it has."""

    def video(self, participant: str, video_id: str) -> str:
        """The manifest's `video`."""
        ...

    def span(self, row: Mapping[str, str]) -> tuple[float, float]:
        """First second, and first one after the clip, from the first frame of the video."""
        ...


def _media(files: DatasetFiles, video_ids: set[str]) -> "_Media":
    """MP4 files where there are any, or JPEG frames where there are only these, or they were asked for."""
    frames = _Frames(files)
    num_mp4 = sum(files.videos.find(video_id) is not None for video_id in video_ids)
    num_frames = len(video_ids & frames.places.keys())
    if files.variant != "frames" and (num_mp4 or not num_frames):
        files.taken["videos"] = f"{num_mp4} of {len(video_ids)} as video files, cut by seconds"
        if num_frames:
            files.notes.append(
                f"there are also frames of {num_frames} videos: ask for ek100:frames to use them"
            )
        return _Mp4(files.videos)
    files.taken["videos"] = f"{num_frames} of {len(video_ids)} as JPEG frames, cut by frame numbers"
    if bad := [video_id for video_id in _BAD_FRAMES if video_id in video_ids & frames.places.keys()]:
        files.notes.append(
            f"the first released frames of {' and '.join(bad)} have the wrong rate: take those of the errata"
        )
    return frames


class _Mp4:
    """Video files, cut by seconds."""

    def __init__(self, videos: VideoFinder) -> None:
        self._videos = videos

    def video(self, participant: str, video_id: str) -> str:
        return (
            self._videos.find(video_id, folders=(participant, "videos"))
            or f"{participant}/videos/{video_id}.MP4"
        )

    def span(self, row: Mapping[str, str]) -> tuple[float, float]:
        return seconds(row["start_timestamp"]), seconds(row["stop_timestamp"])


class _Frames:
    """JPEG frames in folders or tars, cut by frame numbers: frame 1 is shown at 0."""

    def __init__(self, files: DatasetFiles) -> None:
        tars = VideoFinder(files.tree.files, suffixes=(".tar",))
        self.places = {
            stem: file for stem in tars.stems if (file := tars.find(stem, folders=("rgb_frames",)))
        }
        """Folder or tar of each video; a folder counts more than a tar."""
        self.places |= {
            folder.rpartition("/")[2]: folder
            for folder in files.tree.frame_folders
            if "flow_frames" not in folder.split("/") and "flow" not in folder.split("/")
        }

    def video(self, participant: str, video_id: str) -> str:
        place = self.places.get(video_id, f"{participant}/rgb_frames/{video_id}")
        return frames_name(place, frame_rate(video_id))

    def span(self, row: Mapping[str, str]) -> tuple[float, float]:
        rate = frame_rate(row["video_id"])
        first, end = (self._number(row, word, rate) for word in ("start", "stop"))
        return (first - 1) / rate, (max(end, first + 1) - 1) / rate

    def _number(self, row: Mapping[str, str], word: str, rate: int) -> int:
        """The frame number in the row; by the rule that made these where there is none."""
        text = row.get(f"{word}_frame")
        return max(1, int(text) if text else int(seconds(row[f"{word}_timestamp"]) * rate + 1e-6))


EK100 = Dataset(
    name="ek100",
    title="EPIC-KITCHENS-100",
    read=read_ek100,
    variants={
        "auto": "MP4 files where there are any, else JPEG frames",
        "frames": "the released JPEG frames",
    },
    official={
        variant: {"train": 67_217, "validation": 9_668, "test": 13_092} for variant in ("auto", "frames")
    },
)
