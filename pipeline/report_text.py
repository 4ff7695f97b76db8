"""The report of `vivit prepare` as tables, for the terminal and for the file beside the manifest."""

import io
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from vivit.pipeline.preparation import DatasetReport, HeaderReport, SampleReport, SplitReport, Unreadable

_LISTED = 20
_FILE_WIDTH = 120
_KINDS_SHOWN = 8


def summary(report: DatasetReport) -> Iterator[RenderableType]:
    """What the terminal shows."""
    yield _splits(report)
    for head, count in report.heads.items():
        yield _classes(head, count, report.splits)
    yield from (escape(f"{name}: {place}") for name, place in report.taken.items())
    yield from (f"note: {escape(note)}" for note in report.notes)
    yield from _listed(f"{len(report.missing)} videos are missing", report.missing)
    repeated = [" = ".join(names) for names in report.repeated_clips]
    yield from _listed(f"{len(repeated)} clips are the same part of the same video", repeated)
    files = [f"{used} (not used: {', '.join(others)})" for used, others in report.repeated_files.items()]
    yield from _listed(f"{len(files)} videos are there more than once", files)
    if report.headers:
        yield from _headers(report.headers)
    if report.sample:
        yield from _sample(report.sample)


def full_text(report: DatasetReport) -> str:
    """The summary, then the clips of each class, as plain text."""
    text = io.StringIO()
    console = Console(file=text, width=_FILE_WIDTH, force_terminal=False, color_system=None)
    for part in (*summary(report), *(_per_class(head, report.splits) for head in report.heads)):
        console.print(part, soft_wrap=True)
    return text.getvalue()


def _splits(report: DatasetReport) -> Table:
    rows = []
    for name, split in report.splits.items():
        differs = "" if split.official in (None, split.clips) else f"{split.clips - (split.official or 0):+,}"
        official = "unknown" if split.official is None else f"{split.official:,}"
        numbers = (split.clips, split.videos, split.missing, split.unlabelled)
        rows.append([name, *(f"{number:,}" for number in numbers), official, differs])
    columns = ["split", "clips", "videos", "no video", "no label", "official", "differs"]
    return _table(f"{report.title}: {report.dataset} in {report.data_root}", columns, rows)


def _classes(head: str, count: int, splits: Mapping[str, SplitReport]) -> Table:
    rows = []
    for name, split in splits.items():
        clips = sorted(number for number in split.per_class.get(head, {}).values() if number)
        middle = clips[len(clips) // 2] if clips else 0
        numbers = (len(clips), min(clips, default=0), middle, max(clips, default=0))
        rows.append([name, *(f"{number:,}" for number in numbers)])
    columns = ["split", f"of {count} classes", "fewest clips", "median", "most clips"]
    return _table(f"head {head}", columns, rows)


def _per_class(head: str, splits: Mapping[str, SplitReport]) -> Table:
    names = list(dict.fromkeys(name for split in splits.values() for name in split.per_class.get(head, {})))
    rows = [
        [f"{at} {name}", *(str(split.per_class.get(head, {}).get(name, 0)) for split in splits.values())]
        for at, name in enumerate(names)
    ]
    return _table(f"clips of each {head}", [head, *splits], rows)


def _headers(headers: HeaderReport) -> Iterator[RenderableType]:
    kinds = {"container": headers.containers, "frames/s": headers.frame_rates, "pixels": headers.sizes}
    rows = [[kind, _shares(counts)] for kind, counts in kinds.items()]
    yield _table(f"headers of {headers.videos:,} videos", ["", "videos"], rows)
    yield from _unreadable(f"{len(headers.unreadable)} videos cannot be read whole", headers.unreadable)
    for what, counts in (
        (
            f"have fewer than the {headers.view_frames} frames of a view, which then starts over",
            headers.short,
        ),
        ("end after their video does", headers.beyond),
    ):
        if sum(counts.values()):
            shown = ", ".join(f"{number:,} in {split}" for split, number in counts.items() if number)
            yield f"clips that {what}: {shown}"


def _sample(sample: SampleReport) -> Iterator[RenderableType]:
    yield f"{sample.clips} clips decoded (seed {sample.seed}): {_shares(sample.outcomes) or 'none'}"
    yield from _unreadable(f"{len(sample.failed)} of them were not read whole", sample.failed)


def _shares(counts: Mapping[str, int]) -> str:
    shown = [f"{number:,} {name}" for name, number in list(counts.items())[:_KINDS_SHOWN]]
    more = len(counts) - len(shown)
    return escape(", ".join(shown) + (f", and {more} others" if more else ""))


def _unreadable(title: str, entries: Sequence[Unreadable]) -> Iterator[str]:
    return _listed(title, [f"{entry.outcome}: {entry.name}: {entry.message}" for entry in entries])


def _listed(title: str, lines: Sequence[str]) -> Iterator[str]:
    if not lines:
        return
    more = [f"  ... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    yield "\n".join([f"{title}:", *(f"  {escape(line)}" for line in lines[:_LISTED]), *more])


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="left" if index == 0 or len(columns) == 2 else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
