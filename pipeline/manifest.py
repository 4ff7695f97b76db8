"""The manifest: one row per clip, sorted, with its labels, its sources and its class names."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from vivit.pipeline.errors import DataError
from vivit.pipeline.workspace import storage_errors

SPLITS = ("train", "validation", "test")
UNKNOWN = -1
"""Label of a clip whose class is not known."""

_METADATA_KEY = b"vivit"
_CORE = ("clip_id", "split", "video", "start_sec", "end_sec")
_LABEL = "label/"
_MAX_ROWS_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One labelled segment of one video."""

    clip_id: str
    """The data set's own id, unique within the split."""
    split: str
    """`train`, `validation` or `test`."""
    video: str
    """Path below the data root."""
    start_sec: float | None = None
    """Seconds from the first frame of the video; None means its beginning."""
    end_sec: float | None = None
    """First second that is no longer in the clip; None means the end of the video."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Class id per head, -1 where it is not known."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """The source's own columns (participant, frame numbers, ...)."""

    @property
    def sort_key(self) -> tuple[str, str, float, float, str]:
        """Rows are sorted so that a block opens each of its videos once and reads it forwards."""
        end = float("inf") if self.end_sec is None else self.end_sec
        return (self.split, self.video, self.start_sec or 0.0, end, self.clip_id)


class Manifest:
    """Clips sorted by (split, video, start), with the data set's name, heads and class names."""

    def __init__(
        self,
        dataset: str,
        clips: Sequence[Clip],
        *,
        heads: Mapping[str, Sequence[str]] | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        """`heads` maps a head to its class names in id order; `sources` maps an annotation file to its sha256."""
        self.dataset = dataset
        self.heads = {head: list(names) for head, names in (heads or {}).items()}
        self.sources = dict(sources or {})
        self.clips = sorted(clips, key=lambda clip: clip.sort_key)
        problems = _problems(self.clips, self.heads)
        if problems:
            raise DataError(f"the manifest of {dataset} has {_listed(problems, 'bad row')}")

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def splits(self) -> list[str]:
        """Splits that have clips, in the order train, validation, test."""
        present = {clip.split for clip in self.clips}
        return [split for split in SPLITS if split in present]

    def of_split(self, split: str) -> list[Clip]:
        """The clips of `split`, in row order."""
        return [clip for clip in self.clips if clip.split == split]

    def labels(self, split: str) -> dict[str, npt.NDArray[np.int32]]:
        """Class ids [clip] per head, -1 where unknown."""
        clips = self.of_split(split)
        return {
            head: np.array([clip.labels.get(head, UNKNOWN) for clip in clips], dtype=np.int32)
            for head in self.heads
        }

    @property
    def sha256(self) -> str:
        """Digest of what decides the features of a split: ids, videos and times (not the labels)."""
        digest = hashlib.sha256()
        for clip in self.clips:
            row = [clip.split, clip.clip_id, clip.video, clip.start_sec, clip.end_sec]
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def missing_videos(self, data_root: Path) -> list[str]:
        """Videos that are not below `data_root`, each once, in row order."""
        videos = dict.fromkeys(clip.video for clip in self.clips)
        return [video for video in videos if not (data_root / video).exists()]

    def to_table(self) -> pa.Table:
        """The manifest as Arrow: core columns, `label/<head>`, then the source's own columns."""
        columns: dict[str, pa.Array] = {
            "clip_id": pa.array([c.clip_id for c in self.clips], pa.string()),
            "split": pa.array([c.split for c in self.clips], pa.string()),
            "video": pa.array([c.video for c in self.clips], pa.string()),
            "start_sec": pa.array([c.start_sec for c in self.clips], pa.float64()),
            "end_sec": pa.array([c.end_sec for c in self.clips], pa.float64()),
        }
        for head in self.heads:
            columns[_LABEL + head] = pa.array([c.labels.get(head, UNKNOWN) for c in self.clips], pa.int32())
        for name in dict.fromkeys(name for clip in self.clips for name in clip.source):
            columns[name] = pa.array([clip.source.get(name) for clip in self.clips])
        about = {"dataset": self.dataset, "heads": self.heads, "sources": self.sources}
        return pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(about).encode()})

    def write(self, path: Path) -> None:
        """Write Parquet, whole or not at all."""
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            pa_parquet.write_table(self.to_table(), partial)
            partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest from Parquet, or from CSV with the same columns.

        A CSV has no room for class names: a `label/<head>` column may hold class names instead of ids; the names
        are then sorted, and their order gives the ids.
        """
        if not path.is_file():
            raise DataError(f"{path} does not exist: pass the path of a manifest (.parquet or .csv)")
        try:
            table = _read_csv(path) if path.suffix.lower() == ".csv" else pa_parquet.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} cannot be read as a manifest: {error}") from error
        return cls.from_table(table, name=path.name, default_dataset=path.stem)

    @classmethod
    def from_table(cls, table: pa.Table, *, name: str, default_dataset: str) -> "Manifest":
        """The manifest in an Arrow table; `name` is used in error messages."""
        missing = [column for column in ("clip_id", "split", "video") if column not in table.column_names]
        if missing:
            raise DataError(f"{name} lacks the column {missing[0]}: it has {', '.join(table.column_names)}")
        about = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
        heads: dict[str, list[str]] = about.get("heads", {})
        labels = {
            column.removeprefix(_LABEL): _label_ids(table[column], column.removeprefix(_LABEL), heads, name)
            for column in table.column_names
            if column.startswith(_LABEL)
        }
        extra = [c for c in table.column_names if c not in _CORE and not c.startswith(_LABEL)]
        rows = table.select([c for c in _CORE if c in table.column_names] + extra).to_pylist()
        clips = [
            Clip(
                clip_id=_text(row, "clip_id", name, at),
                split=_text(row, "split", name, at),
                video=_text(row, "video", name, at),
                start_sec=_seconds(row, "start_sec", name, at),
                end_sec=_seconds(row, "end_sec", name, at),
                labels={head: ids[at] for head, ids in labels.items()},
                source={column: row[column] for column in extra},
            )
            for at, row in enumerate(rows)
        ]
        return cls(about.get("dataset", default_dataset), clips, heads=heads, sources=about.get("sources"))


def _read_csv(path: Path) -> pa.Table:
    text = {column: pa.string() for column in ("clip_id", "split", "video")}
    return pa_csv.read_csv(
        path, convert_options=pa_csv.ConvertOptions(column_types=text, strings_can_be_null=True)
    )


def _text(row: Mapping[str, Any], column: str, name: str, at: int) -> str:
    value = row[column]
    if not isinstance(value, str) or not value:
        raise DataError(f"{name}, row {at + 1}: {column} is {value!r}; every row needs one")
    return value


def _seconds(row: Mapping[str, Any], column: str, name: str, at: int) -> float | None:
    value = row.get(column)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise DataError(f"{name}, row {at + 1}: {column} is {value!r}, not a number of seconds") from None


def _label_ids(column: pa.ChunkedArray, head: str, heads: dict[str, list[str]], name: str) -> list[int]:
    """Ids of a label column; names are looked up, and make the class list where there is none yet."""
    values = column.to_pylist()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        known = heads.setdefault(head, sorted({value for value in values if value is not None}))
        ids = {label: index for index, label in enumerate(known)}
        unknown = sorted({v for v in values if v is not None and v not in ids})
        if unknown:
            raise DataError(
                f"{name}: label/{head} holds {unknown[0]!r}, which is not among its {len(known)} classes"
            )
        return [UNKNOWN if value is None else ids[value] for value in values]
    if not pa.types.is_integer(column.type):
        raise DataError(
            f"{name}: label/{head} holds {column.type} values: use class ids (integers) or class names"
        )
    numbers = [UNKNOWN if value is None else int(value) for value in values]
    heads.setdefault(head, [str(index) for index in range(max(numbers, default=UNKNOWN) + 1)])
    return numbers


def _problems(clips: Sequence[Clip], heads: Mapping[str, Sequence[str]]) -> list[str]:
    """What is wrong, one line for each bad row."""
    problems = []
    seen = Counter((clip.split, clip.clip_id) for clip in clips)
    for clip in clips:
        what = _row_problem(clip, heads)
        if what:
            problems.append(f"{clip.clip_id} ({clip.split}): {what}")
    problems += [
        f"{clip_id} ({split}): the id stands {n} times" for (split, clip_id), n in seen.items() if n > 1
    ]
    return problems


def _row_problem(clip: Clip, heads: Mapping[str, Sequence[str]]) -> str | None:
    if clip.split not in SPLITS:
        return f"split is {clip.split!r}, not one of {', '.join(SPLITS)}"
    start, end = clip.start_sec, clip.end_sec
    if any(value is not None and not np.isfinite(value) for value in (start, end)):
        return f"start_sec {start} and end_sec {end} must be finite"
    if start is not None and start < 0:
        return f"start_sec {start} is negative"
    if end is not None and end <= (start or 0.0):
        return f"end_sec {end} is not after start_sec {start or 0.0}"
    for head, label in clip.labels.items():
        if not UNKNOWN <= label < len(heads.get(head, ())):
            return f"label/{head} is {label}, but there are {len(heads.get(head, ()))} classes (ids from 0)"
    return None


def _listed(problems: Sequence[str], what: str) -> str:
    shown = "\n  ".join(problems[:_MAX_ROWS_NAMED])
    more = f"\n  ... and {len(problems) - _MAX_ROWS_NAMED} more" if len(problems) > _MAX_ROWS_NAMED else ""
    return f"{len(problems)} {what}{'s' if len(problems) != 1 else ''}:\n  {shown}{more}"
