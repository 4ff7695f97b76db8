"""Lists of clips as other tool boxes write them: mmaction2, SlowFast, VideoMAE, V-JEPA 2, PyTorchVideo, DMVR.

What a file cannot say itself (whether two numbers behind a name are a length and a class, or two classes; the rate of
frames in a folder) is asked for as a variant, `list:frames@30`. A line of another form than the first is refused.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vivit.pipeline.datasets.annotation_files import read_text
from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.folder import HEAD, SPLIT_NAMES, hashed_split
from vivit.pipeline.datasets.tree import VIDEO_SUFFIXES
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import UNKNOWN, Clip, Manifest
from vivit.pipeline.video_location import frames_name

_COLUMNS = {
    "video": ("path", "video", "video_path", "filename", "file", "file_name"),
    "label": ("label", "labels", "class", "class_name", "action"),
    "start": ("start", "start_sec", "start_time"),
    "end": ("end", "end_sec", "end_time"),
    "split": ("split", "subset"),
    "id": ("id", "clip_id", "video_id", "vid_name"),
}
"""What a column is, by the names that are in use."""
_FRAME_LIST = ("original_vido_id", "video_id", "frame_id", "path", "labels")
"""SlowFast's header of lists with one line for each frame, in its spelling."""
_NUMBER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class _Line:
    """A clip as one line gives it."""

    video: str
    labels: tuple[str, ...] = ()
    """Class ids, or one class name."""
    start_sec: float | None = None
    end_sec: float | None = None
    split: str | None = None
    clip_id: str | None = None


def read_lists(files: DatasetFiles) -> Manifest:
    """Manifest of all given lists, with one head where they have labels.

    The split is a column, or a word of the file's name (train, val, test); without either a hash of each clip's id puts
    about a fifth of the clips into validation. Numbers are class ids from 0, names are sorted into ids.
    """
    if not files.annotations:
        raise DataError("list needs the lists: pass --annotations FILE, once for each")
    paths = [
        path
        for given in files.annotations
        for path in (sorted(given.iterdir()) if given.is_dir() else [given])
    ]
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(f"{missing[0]} does not exist: pass the lists with --annotations FILE")
    files.take(paths)
    splits = _splits_of_names(paths)
    lines = [(line, splits.get(path)) for path in paths for line in _lines(files, path)]
    return _manifest(files, lines)


def _splits_of_names(paths: Iterable[Path]) -> dict[Path, str]:
    found: dict[Path, str] = {}
    for path in paths:
        words = re.split(r"[^a-z]+", path.stem.lower())
        if split := next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None):
            found[path] = split
    return found


def _lines(files: DatasetFiles, path: Path) -> Iterator[_Line]:
    text = read_text(path)
    rows = [(at, line) for at, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} has no lines")
    header = _header(rows[0][1])
    if header is None:
        return _plain_lines(files, path, rows)
    separator, names = header
    if set(_FRAME_LIST) <= set(names):
        return _frame_lines(files, path, separator, names)
    return _table_lines(path, separator, names)


# Lists with a header


def _header(line: str) -> tuple[str, list[str]] | None:
    """Separator and names of a line that names columns; None for one that holds values."""
    for separator in (",", "\t", ";", " "):
        names = [name.strip().strip('"').lower() for name in line.strip().split(separator) if name.strip()]
        if sum(name in _COLUMNS["video"] for name in names) and len(names) > 1:
            return separator, names
    return None


def _cells(path: Path, separator: str, names: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cell of each column) of the rows below the header."""
    reader = csv.reader(read_text(path).splitlines(), delimiter=separator, skipinitialspace=True)
    next(reader)
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {reader.line_num}: {len(row)} fields, but the header names {len(names)}: "
                f"{', '.join(names)}"
            )
        yield reader.line_num, dict(zip(names, (cell.strip() for cell in row), strict=True))


def _table_lines(path: Path, separator: str, names: list[str]) -> Iterator[_Line]:
    columns = {what: name for what, known in _COLUMNS.items() for name in names if name in known}
    for at, cells in _cells(path, separator, names):
        row = {what: cells[name] for what, name in columns.items()}
        split = row.get("split", "").lower()
        if split and split not in SPLIT_NAMES:
            raise DataError(f"{path}, line {at}: the split {split!r} is not train, val or test")
        try:
            times = [float(row[word]) if row.get(word) else None for word in ("start", "end")]
        except ValueError as error:
            raise DataError(f"{path}, line {at}: a time is not in seconds ({error})") from error
        yield _Line(
            video=row["video"],
            labels=_labels_of_cell(row.get("label", "")),
            start_sec=times[0],
            end_sec=times[1],
            split=SPLIT_NAMES[split] if split else None,
            clip_id=row.get("id"),
        )


def _labels_of_cell(text: str) -> tuple[str, ...]:
    """`3`, `1,2` in quotes, a name, or nothing."""
    parts = [part.strip() for part in text.strip('"').split(",")]
    if all(_NUMBER.fullmatch(part) for part in parts):
        return tuple(parts)
    return (text,) if text.strip('"') else ()


def _frame_lines(files: DatasetFiles, path: Path, separator: str, names: list[str]) -> Iterator[_Line]:
    """One clip for each folder of a list with one line a frame."""
    rate = _rate(_form(files), path)
    found: dict[str, tuple[str, tuple[str, ...], int]] = {}
    for _, cells in _cells(path, separator, names):
        folder = cells["path"].rpartition("/")[0]
        _, _, count = found.get(cells["original_vido_id"], ("", (), 0))
        found[cells["original_vido_id"]] = (folder, _labels_of_cell(cells["labels"]), count + 1)
    for clip_id, (folder, labels, count) in found.items():
        yield _Line(frames_name(folder, rate), labels, 0.0, count / rate, clip_id=clip_id)


# Lists without a header


@dataclass(frozen=True)
class _Form:
    """How the numbers behind a name are meant."""

    kind: str = ""
    """frames (`dir total label`), offset (`dir offset total label`), multi-label, or nothing."""
    rate: float = 0.0
    """Frames a second of frames in folders; 0 where it is not known."""

    @property
    def num_before_labels(self) -> int:
        """Numbers between the name and the labels."""
        return {"frames": 1, "offset": 2}.get(self.kind, 0)

    @property
    def takes_labels(self) -> bool:
        """Whether there may be more than one label, and not the same number in each line."""
        return bool(self.kind)


def _form(files: DatasetFiles) -> _Form:
    kind, _, rate = files.variant.partition("@")
    return _Form(kind, float(rate or 0))


def _rate(form: _Form, path: Path) -> float:
    if not form.rate:
        raise DataError(f"{path}: the rate of the frames is not known: pass list:frames@30 for 30 a second")
    return form.rate


def _plain_lines(files: DatasetFiles, path: Path, rows: list[tuple[int, str]]) -> Iterator[_Line]:
    form = _form(files)
    first_at, first_line = rows[0]
    separator = _separator(first_line)
    has_names = _ends_in_name(first_line, separator)
    first: int | None = None
    for at, line in rows:
        name, values = _split_off(line.strip(), separator, has_names)
        count = min(len(values), form.num_before_labels + 1) if form.takes_labels else len(values)
        first = count if first is None else first
        if count != first:
            raise DataError(
                f"{path}, line {at}: {line.strip()!r} has {_counted(count)} behind the name, line {first_at} has "
                f"{_counted(first)}: all lines of a list must have the same form"
            )
        yield _plain_line(path, at, name, values, form)


def _counted(count: int) -> str:
    return f"{count} value" + ("" if count == 1 else "s")


def _separator(line: str) -> str | None:
    """What stands before the last field: `::` (V-JEPA 2), comma, tab, `;`, or white space (None)."""
    for mark in ("::", ",", "\t", ";"):
        before, last = _from_right(line.strip(), mark)
        if before and (_NUMBER.fullmatch(last) or (_is_video(before) and not _is_video(last))):
            return mark
    return None


def _is_video(text: str) -> bool:
    return PurePosixPath(text.strip().strip('"')).suffix.lower() in VIDEO_SUFFIXES


def _ends_in_name(line: str, separator: str | None) -> bool:
    """Whether the last field is a class name: it is no number and no video, and what is before it is a video."""
    before, last = _from_right(line.strip(), separator)
    return _is_video(before) and not _is_video(last) and not _NUMBER.fullmatch(last)


def _from_right(text: str, separator: str | None) -> tuple[str, str]:
    """What is before the last field, empty where there is but one, and that field."""
    *before, last = text.rsplit(separator, 1)
    return (before[0].rstrip() if before else ""), last.strip()


def _split_off(line: str, separator: str | None, has_names: bool) -> tuple[str, tuple[str, ...]]:
    """The name, which may hold spaces, and the values behind it."""
    if has_names:
        before, last = _from_right(line, separator)
        return (before, (last,)) if before and not _NUMBER.fullmatch(last) else (line, ())
    values: list[str] = []
    while True:
        before, last = _from_right(line, separator)
        if not before or not _NUMBER.fullmatch(last):
            return line.strip().strip('"'), tuple(reversed(values))
        line = before
        values.append(last)


def _plain_line(path: Path, at: int, name: str, values: tuple[str, ...], form: _Form) -> _Line:
    if form.num_before_labels:
        return _rawframes_line(path, at, name, values, form)
    if len(values) > 1 and not form.takes_labels:
        raise DataError(
            f"{path}, line {at}: {len(values)} numbers stand behind {name!r}. Say what they are: "
            "list:multi-label for classes, list:frames@30 for `dir total_frames label` with 30 frames a second, "
            "list:offset@30 for `dir offset total_frames label`"
        )
    return _Line(name, values)


def _rawframes_line(path: Path, at: int, name: str, values: tuple[str, ...], form: _Form) -> _Line:
    """`dir total_frames label ...` or `dir offset total_frames label ...`."""
    rate, before = _rate(form, path), form.num_before_labels
    if len(values) <= before:
        wanted = "dir total_frames label" if before == 1 else "dir offset total_frames label"
        raise DataError(f"{path}, line {at}: {name!r} and {_counted(len(values))} are not `{wanted}`")
    offset, total = int(values[before - 2]) if before == 2 else 0, int(values[before - 1])
    return _Line(frames_name(name, rate), values[before:], offset / rate, (offset + total) / rate)


# The manifest


def _manifest(files: DatasetFiles, lines: list[tuple[_Line, str | None]]) -> Manifest:
    classes = _classes([line for line, _ in lines])
    uses = Counter((line.split or split, line.clip_id or _stem(line.video)) for line, split in lines)
    taken: Counter[tuple[str | None, str]] = Counter()
    clips = []
    for line, file_split in lines:
        split, clip_id = line.split or file_split, line.clip_id or _stem(line.video)
        if uses[split, clip_id] > 1 and line.start_sec is not None:
            clip_id += f"_{line.start_sec:g}_{'' if line.end_sec is None else f'{line.end_sec:g}'}"
        taken[split, clip_id] += 1
        if (count := taken[split, clip_id]) > 1:
            clip_id += f"#{count}"
        clips.append(
            Clip(
                clip_id=clip_id,
                split=split or hashed_split(clip_id),
                video=line.video,
                start_sec=line.start_sec,
                end_sec=line.end_sec,
                labels={HEAD: classes[line.labels[0]]} if line.labels else {},
                source={"labels": " ".join(line.labels)},
            )
        )
    if repeated := taken.total() - len(taken):
        files.notes.append(f"{repeated} lines stand in the lists more than once")
    if several := sum(len(line.labels) > 1 for line, _ in lines):
        files.notes.append(
            f"{several} clips have several labels: the first counts, all of them are in the column labels"
        )
    return files.manifest(clips, {HEAD: _names(classes)} if classes else {})


def _stem(video: str) -> str:
    return str(PurePosixPath(video).with_suffix("")) if _is_video(video) else video.partition("::")[0]


def _classes(lines: list[_Line]) -> dict[str, int]:
    """Id of each label as written: numbers are ids from 0 (-1 for none), names are sorted."""
    labels = {label for line in lines for label in line.labels}
    numbers = {label for label in labels if _NUMBER.fullmatch(label)}
    if names := labels - numbers:
        if numbers:
            raise DataError(
                f"some labels are numbers ({min(numbers)}), others names ({min(names)!r}): use one of them throughout"
            )
        return {name: index for index, name in enumerate(sorted(names))}
    return {label: max(UNKNOWN, int(label)) for label in numbers}


def _names(classes: Mapping[str, int]) -> list[str]:
    """Class names in id order; an id without a name is its number."""
    names = {index: name for name, index in classes.items() if not _NUMBER.fullmatch(name)}
    return [names.get(index, str(index)) for index in range(max(classes.values()) + 1)]


class _Lists(Dataset):
    """Its variants may carry a rate."""

    def variant(self, asked: str) -> str:
        kind, mark, rate = asked.partition("@")
        super().variant(kind)
        if mark and not (re.fullmatch(r"\d+(\.\d+)?", rate) and float(rate) > 0):
            raise DataError(f"list:{asked}: {rate!r} is not a number of frames a second")
        return asked


LISTS = _Lists(
    name="list",
    title="lists of other tool boxes",
    read=read_lists,
    variants={
        "frames": "lines `dir total_frames label`; list:frames@30 for 30 frames a second",
        "offset": "lines `dir offset total_frames label`; list:offset@30",
        "multi-label": "lines `path label label ...`",
    },
)
