"""EPIC-KITCHENS-100 action recognition from its annotation CSVs and MP4 files.

Clips are cut by seconds: the frame numbers in the CSVs belong to the released JPEG frames, not to the videos.
"""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vivit.pipeline.datasets.ek100_official import SPLIT_FILES, Subsets
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest

_CLASS_FILES = {"verb": "EPIC_100_verb_classes.csv", "noun": "EPIC_100_noun_classes.csv"}
_ANNOTATION_FOLDERS = (".", "annotations", "epic-kitchens-100-annotations")
_VIDEO_FOLDERS = (
    "{participant}/videos",
    "{participant}",
    "videos/train/{participant}",
    "videos/test/{participant}",
    "video_ht256px/{participant}",
    "videos",
)
_KEPT = ("participant_id", "video_id", "start_frame", "stop_frame", "narration", "all_noun_classes")
_NEEDED = ("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp")


def read_ek100(data_root: Path, annotations: Path | None = None) -> Manifest:
    """Manifest with heads verb (97) and noun (300), for those of train, validation and test whose CSV is there."""
    folder = _annotation_folder(data_root, annotations)
    heads = {head: _classes(folder / name) for head, name in _CLASS_FILES.items()}
    files = {split: folder / name for split, name in SPLIT_FILES.items() if (folder / name).is_file()}
    if not files:
        raise DataError(f"{folder} has none of {', '.join(SPLIT_FILES.values())}")
    videos, subsets = _VideoFinder(data_root), Subsets.read(folder)
    clips = [
        _clip(row, split, videos, subsets) for split, path in files.items() for row in _rows(path, _NEEDED)
    ]
    used = [*files.values(), *(folder / name for name in _CLASS_FILES.values()), *subsets.files]
    sources = {path.name: _sha256(path) for path in used}
    return Manifest("ek100", clips, heads=heads, sources=sources)


def _annotation_folder(data_root: Path, annotations: Path | None) -> Path:
    folders = [annotations] if annotations else [data_root / name for name in _ANNOTATION_FOLDERS]
    for folder in folders:
        if (folder / _CLASS_FILES["verb"]).is_file():
            return folder
    looked = ", ".join(str(folder) for folder in folders)
    raise DataError(
        f"no EPIC-KITCHENS-100 annotations: {_CLASS_FILES['verb']} is not in {looked}. Pass --annotations FOLDER, "
        "a checkout of the data set's annotation repository"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV that has at least `columns`; a cell that a short row lacks is empty."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            found, rows = list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    missing = [column for column in columns if column not in found]
    if missing:
        raise DataError(f"{path} lacks the column {missing[0]}: it has {', '.join(found) or 'none'}")
    return rows


def _classes(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path} is missing: it holds the names of the classes")
    rows = _rows(path, ("id", "key"))
    try:
        names = {int(row["id"]): row["key"] for row in rows}
    except ValueError as error:
        raise DataError(f"{path}: a class id is not a whole number ({error})") from error
    if not rows or sorted(names) != list(range(len(rows))):
        raise DataError(f"{path}: the class ids must be 0, 1, 2, ..., each once")
    return [names[index] for index in range(len(names))]


def _clip(row: dict[str, str], split: str, videos: "_VideoFinder", subsets: Subsets) -> Clip:
    try:
        labels = {head: int(row[f"{head}_class"]) for head in _CLASS_FILES if row.get(f"{head}_class")}
        source: dict[str, Any] = {name: row.get(name) for name in _KEPT}
        source |= subsets.columns(split, row["participant_id"], labels)
        return Clip(
            clip_id=row["narration_id"],
            split=split,
            video=videos.find(row["participant_id"], row["video_id"]),
            start_sec=seconds(row["start_timestamp"]),
            end_sec=seconds(row["stop_timestamp"]),
            labels=labels,
            source=source,
        )
    except ValueError as error:
        raise DataError(f"{SPLIT_FILES[split]}, row {row['narration_id'] or '?'}: {error}") from error


def seconds(timestamp: str) -> float:
    """`HH:MM:SS.fraction` in seconds."""
    hours, minutes, rest = timestamp.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


class _VideoFinder:
    """Finds each video once, in the layouts that people have; the official one where it is missing."""

    def __init__(self, data_root: Path) -> None:
        self._bases = [base for base in (data_root, data_root / "EPIC-KITCHENS") if base.is_dir()]
        self._data_root = data_root
        self._found: dict[str, str] = {}

    def find(self, participant: str, video: str) -> str:
        """Path of the video below the data root."""
        if video not in self._found:
            self._found[video] = self._look(participant, video)
        return self._found[video]

    def _look(self, participant: str, video: str) -> str:
        for base in self._bases:
            for folder in _VIDEO_FOLDERS:
                for suffix in (".MP4", ".mp4"):
                    path = base / folder.format(participant=participant) / (video + suffix)
                    if path.is_file():
                        return path.relative_to(self._data_root).as_posix()
        return f"{participant}/videos/{video}.MP4"
