"""Kinetics-400, -600, -700 and -700-2020 from the CSV (or JSON) files of their authors, and trimmed videos.

The stored file of a clip starts at 0: the times are only part of its name. A YouTube id may begin with `-`, and may
stand for more than one clip.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from vivit.pipeline.datasets.annotation_files import read_csv, read_json, read_lines
from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.folder import HEAD
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest

_SPLIT_NAMES = {"train": ("train",), "validation": ("val", "validate", "validation"), "test": ("test",)}
_JSON_SUBSETS = {"training": "train", "validation": "validation", "testing": "test"}
_REPLACEMENTS = "replacement_for_corrupted_k400"
_ID_LENGTH = 11
_NEEDED = ("youtube_id", "time_start", "time_end")


@dataclass(frozen=True)
class _Row:
    """One line of an annotation file."""

    youtube_id: str
    start: int
    end: int
    split: str
    label: str
    is_cc: str | None

    @property
    def clip_id(self) -> str:
        return f"{self.youtube_id}_{self.start:06d}_{self.end:06d}"


def read_kinetics(files: DatasetFiles, *, number: int) -> Manifest:
    """Manifest with one head of `number` classes, for those of train, validation and test whose file is there."""
    edition = f"{number}_2020" if files.variant == "2020" else str(number)
    found = {split: path for split in _SPLIT_NAMES if (path := files.find(*_names(edition, split)))}
    if not found:
        names = [name for split in ("train", "validation") for name in _names(edition, split)[:2]]
        raise files.not_found([*names, "train.csv", "val.csv"], f"Kinetics-{edition} annotations")
    rows = [row for split, path in found.items() for row in _rows(path, split)]
    classes = _classes(files, number, rows, found)
    ids = {_key(name): index for index, name in enumerate(classes)}
    videos = _KineticsVideos(files, rows)
    clips = [_clip(row, ids, videos.find(row), found[row.split]) for row in rows]
    if videos.shared_ids:
        files.notes.append(
            f"{videos.shared_ids} clips have only a video named by its YouTube id, which stands for several clips: "
            "these count as missing"
        )
    return files.manifest(clips, {HEAD: classes})


def _names(edition: str, split: str) -> list[str]:
    """File names of a split, those that say the edition first."""
    bases = [f"kinetics-{edition}", f"kinetics_{edition}", f"kinetics{edition}", f"k{edition}"]
    if "_" in edition:
        bases += [base.replace("_2020", "-2020") for base in bases]
    words = _SPLIT_NAMES[split]
    named = [f"{base}{mark}{word}" for word in words for base in bases for mark in ("_", "/")]
    if split == "test":
        named += [f"{base}_holdout_test" for base in bases]
    plain = [f"kinetics_{word}" for word in words] + list(words)
    return [f"{name}.{suffix}" for suffix in ("csv", "json") for name in [*named, *plain]]


def _rows(path: Path, split: str) -> Iterator[_Row]:
    """The rows of one file, by the names of its columns: their order differs."""
    if path.suffix == ".json":
        yield from _json_rows(path, split)
        return
    for at, row in enumerate(read_csv(path, _NEEDED)):
        try:
            start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
        except (ValueError, OverflowError) as error:
            raise DataError(f"{path}, row {at + 2}: a time is not a number ({error})") from error
        yield _Row(row["youtube_id"], start, end, split, (row.get("label") or "").strip(), row.get("is_cc"))


def _json_rows(path: Path, split: str) -> Iterator[_Row]:
    try:
        for youtube_id, about in read_json(path).items():
            if _JSON_SUBSETS.get(about.get("subset"), split) == split:
                start, end = (int(float(time)) for time in about["annotations"]["segment"])
                yield _Row(youtube_id, start, end, split, about["annotations"].get("label", "").strip(), None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not the JSON form of Kinetics' annotations ({error!r})") from error


def _classes(files: DatasetFiles, number: int, rows: list[_Row], found: Mapping[str, Path]) -> list[str]:
    """Class names in id order: of the class list, else the sorted labels of the training file."""
    listed = files.find(f"label_map_k{number}.txt", f"kinetics_{number}_labels.txt", f"k{number}_labels.txt")
    if listed is not None:
        return read_lines(listed)
    source = "train" if "train" in found else "validation"
    labels = sorted({row.label for row in rows if row.split == source and row.label})
    if len(labels) == number:
        return labels
    if source == "train" and labels:
        files.notes.append(f"{found['train']} has {len(labels)} classes, Kinetics-{number} has {number}")
        return labels
    raise DataError(
        f"the class ids are not known: without the training file they need all {number} labels of Kinetics-{number}, "
        f"and {', '.join(str(path) for path in found.values())} has {len(labels)}. Put the training file or "
        f"label_map_k{number}.txt (one class a line, sorted) beside it"
    )


def _key(label: str) -> str:
    """Some tools write `_` for a space."""
    return label.replace("_", " ")


def _clip(row: _Row, ids: Mapping[str, int], video: str, path: Path) -> Clip:
    labels = {}
    if row.label:
        if _key(row.label) not in ids:
            raise DataError(
                f"{path}: {row.clip_id} has the label {row.label!r}, which is not in the class list"
            )
        labels[HEAD] = ids[_key(row.label)]
    source: dict[str, object] = {"youtube_id": row.youtube_id, "time_start": row.start, "time_end": row.end}
    if row.is_cc is not None:
        source["is_cc"] = row.is_cc
    return Clip(clip_id=row.clip_id, split=row.split, video=video, labels=labels, source=source)


class _KineticsVideos:
    """Finds the video of a clip by its full name, else by its YouTube id where only one clip has it."""

    def __init__(self, files: DatasetFiles, rows: list[_Row]) -> None:
        self._videos = files.videos
        uses = Counter(row.youtube_id for row in rows)
        self._is_used_once = {youtube_id for youtube_id, count in uses.items() if count == 1}
        self.shared_ids = 0
        """Clips whose only candidate may be another clip."""

    @cached_property
    def _by_id(self) -> dict[str, list[str]]:
        """Names of videos by what may be their YouTube id."""
        stems: dict[str, list[str]] = {}
        for stem in self._videos.stems:
            stems.setdefault(stem[:_ID_LENGTH], []).append(stem)
        return stems

    def find(self, row: _Row) -> str:
        """Path of the video below the data root; where it would be if it is missing."""
        words = _SPLIT_NAMES[row.split]
        folders = (_REPLACEMENTS, row.label, row.label.replace(" ", "_"), *words)
        if found := self._videos.find(row.clip_id, folders=folders):
            return found
        # last resort: named by the id alone, or with times written otherwise
        candidates = self._by_id.get(row.youtube_id, [])
        if row.youtube_id in candidates or len(candidates) == 1:
            stem = row.youtube_id if row.youtube_id in candidates else candidates[0]
            if row.youtube_id in self._is_used_once:
                found = self._videos.find(stem, folders=folders)
                assert found is not None
                return found
            self.shared_ids += 1
        return "/".join(part for part in (words[0], row.label, f"{row.clip_id}.mp4") if part)


K400 = Dataset(
    name="k400",
    title="Kinetics-400",
    read=partial(read_kinetics, number=400),
    official={"": {"train": 246_534, "validation": 19_906, "test": 39_805}},
)
K600 = Dataset(
    name="k600",
    title="Kinetics-600",
    read=partial(read_kinetics, number=600),
    official={"": {"validation": 30_000, "test": 72_924}},
)
K700 = Dataset(
    name="k700",
    title="Kinetics-700",
    read=partial(read_kinetics, number=700),
    variants={"2019": "Kinetics-700", "2020": "Kinetics-700-2020"},
)
