"""The manifest: one row per clip, sorted, with its labels, its sources and its class names."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from vivit.pipeline.errors import DataError
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.video_location import missing_videos
from vivit.pipeline.workspace import storage_errors, write_atomically

SPLITS = ("train", "validation", "test")
UNKNOWN = -1
"""Label of a clip whose class is not known."""

_METADATA_KEY = b"vivit"
_CORE = ("clip_id", "split", "video", "start_sec", "end_sec")
_LABEL = "label/"
_MAX_ROWS_NAMED = 20
_MAX_UNNAMED_ID = 1_000_000
"""Where no class list says how many classes there are, a larger id is a mistake, not a class."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One labelled segment of one video."""

    clip_id: str
    """The data set's own id, unique within the split."""
    split: str
    """`train`, `validation` or `test`."""
    video: str
    """Path below the data root, or a URL; of a member of a tar, `shard.tar::member`."""
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
        self._by_split: dict[str, list[Clip]] = {split: [] for split in SPLITS}
        for clip in self.clips:
            self._by_split[clip.split].append(clip)

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def splits(self) -> list[str]:
        """Splits that have clips, in the order train, validation, test."""
        return [split for split, clips in self._by_split.items() if clips]

    def of_split(self, split: str) -> list[Clip]:
        """The clips of `split`, in row order."""
        return list(self._by_split.get(split, ()))

    def labels(self, split: str) -> dict[str, npt.NDArray[np.int32]]:
        """Class ids [clip] per head, -1 where unknown."""
        clips = self.of_split(split)
        return {
            head: np.array([clip.labels.get(head, UNKNOWN) for clip in clips], dtype=np.int32)
            for head in self.heads
        }

    @cached_property
    def sha256(self) -> str:
        """Digest of what decides the features of a split: ids, videos and times (not the labels)."""
        digest = hashlib.sha256()
        for clip in self.clips:
            row = [clip.split, clip.clip_id, clip.video, clip.start_sec, clip.end_sec]
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def missing_videos(self, data_root: Location) -> list[str]:
        """Videos that are not below `data_root`, each once, in row order."""
        return missing_videos(data_root, (clip.video for clip in self.clips))

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

    def to_parquet(self) -> bytes:
        """The manifest as a Parquet file."""
        parquet = io.BytesIO()
        pa_parquet.write_table(self.to_table(), parquet)
        return parquet.getvalue()

    def write(self, path: Location) -> None:
        """Write Parquet, whole or not at all."""
        with storage_errors(path):
            write_atomically(path, self.to_parquet())

    @classmethod
    def read(cls, path: Location) -> "Manifest":
        """Read a manifest from Parquet, or from CSV with the same columns.

        A CSV has no room for class names: a `label/<head>` column may hold class names instead of ids; the names
        are then sorted, and their order gives the ids.
        """
        if not path.is_file():
            raise DataError(f"{path} does not exist: pass the path of a manifest (.parquet or .csv)")
        try:
            file = io.BytesIO(path.read_bytes()) if isinstance(path, Url) else path
            table = _read_csv(file, path) if path.suffix.lower() == ".csv" else pa_parquet.read_table(file)
            return cls.from_table(table, name=path.name, default_dataset=path.stem)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
        except (pa.ArrowException, KeyError, OSError) as error:
            raise DataError(f"{path} cannot be read as a manifest: {error}") from error

    @classmethod
    def from_table(cls, table: pa.Table, *, name: str, default_dataset: str) -> "Manifest":
        """The manifest in an Arrow table; `name` is used in error messages."""
        _check_columns(table.column_names, name)
        about = _about(table, name)
        heads: dict[str, list[str]] = about.get("heads", {})
        labels = {
            column.removeprefix(_LABEL): _label_ids(table[column], column.removeprefix(_LABEL), heads, name)
            for column in table.column_names
            if column.startswith(_LABEL)
        }
        extra = [c for c in table.column_names if c not in _CORE and not c.startswith(_LABEL)]
        rows = table.select([c for c in _CORE if c in table.column_names] + extra).to_pylist()
        clips: list[Clip] = []
        problems: list[str] = []
        for at, row in enumerate(rows):
            try:
                clip = Clip(
                    clip_id=_text(row, "clip_id"),
                    split=_text(row, "split"),
                    video=_text(row, "video"),
                    start_sec=_seconds(row, "start_sec"),
                    end_sec=_seconds(row, "end_sec"),
                    labels={head: _known(ids[at], head, heads) for head, ids in labels.items()},
                    source={column: row[column] for column in extra},
                )
                clips.append(clip)
            except DataError as error:
                problems.append(f"row {at + 1}: {error}")
        if problems:
            raise DataError(f"{name} has {_listed(problems + _problems(clips, heads), 'bad row')}")
        return cls(about.get("dataset", default_dataset), clips, heads=heads, sources=about.get("sources"))


def _read_csv(file: Path | io.BytesIO, path: Location) -> pa.Table:
    """The table of a CSV, `path` for messages; only an empty field is null, so that a class may be called NA or nan."""
    text = {column: pa.string() for column in ("clip_id", "split", "video")}
    options = pa_csv.ConvertOptions(column_types=text, strings_can_be_null=True, null_values=[""])
    table = pa_csv.read_csv(file, convert_options=options)
    binary = [field.name for field in table.schema if pa.types.is_binary(field.type)]
    if binary:
        raise DataError(f"{path} is not UTF-8 text (column {binary[0]}): save it as UTF-8")
    return table


def _check_columns(columns: Sequence[str], name: str) -> None:
    missing = [column for column in ("clip_id", "split", "video") if column not in columns]
    if missing:
        raise DataError(f"{name} lacks the column {missing[0]}: it has {', '.join(columns)}")
    repeated = [column for column, n in Counter(columns).items() if n > 1]
    if repeated:
        raise DataError(f"{name} has more than one column {repeated[0]}: rename or drop all but one")


def _about(table: pa.Table, name: str) -> dict[str, Any]:
    """What a manifest's own metadata says of dataset, heads and sources; empty where it has none."""
    stored = (table.schema.metadata or {}).get(_METADATA_KEY, b"{}")
    try:
        about = json.loads(stored)
    except ValueError:
        about = None
    if not (
        isinstance(about, dict)
        and isinstance(about.get("dataset", ""), str)
        and isinstance(about.get("heads", {}), dict)
        and all(_is_texts(names) for names in about.get("heads", {}).values())
        and isinstance(about.get("sources", {}), dict)
        and _is_texts(list(about.get("sources", {}).values()))
    ):
        raise DataError(
            f"{name}: its metadata {_METADATA_KEY.decode()!r} is damaged: make the manifest again"
        )
    return about


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value:
        raise DataError(f"{column} is {value!r}; every row needs one")
    return value


def _seconds(row: Mapping[str, Any], column: str) -> float | None:
    value = row.get(column)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise DataError(f"{column} is {value!r}, not a number of seconds") from None


def _known(label: int | str, head: str, heads: Mapping[str, Sequence[str]]) -> int:
    if isinstance(label, str):
        raise DataError(f"label/{head} is {label!r}, which is not among its {len(heads[head])} classes")
    return label


def _label_ids(
    column: pa.ChunkedArray, head: str, heads: dict[str, list[str]], name: str
) -> Sequence[int | str]:
    """Ids of a label column; names are looked up, and make the class list where there is none yet.

    A name that is not in the class list comes back as it is.
    """
    values = column.to_pylist()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        known = heads.setdefault(head, sorted({value for value in values if value is not None}))
        ids = {label: index for index, label in enumerate(known)}
        return [UNKNOWN if value is None else ids.get(value, value) for value in values]
    if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise DataError(
            f"{name}: label/{head} holds {column.type} values: use class ids (integers) or class names"
        )
    numbers = [UNKNOWN if value is None else int(value) for value in values]
    largest = max(numbers, default=UNKNOWN)
    if head not in heads and largest > _MAX_UNNAMED_ID:
        raise DataError(
            f"{name}: label/{head} holds {largest}, but ids without class names end at {_MAX_UNNAMED_ID}: "
            "number the classes from 0, or use class names"
        )
    heads.setdefault(head, [str(index) for index in range(largest + 1)])
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
