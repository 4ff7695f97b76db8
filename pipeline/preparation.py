"""What is found out about a copy of a data set before GPU time is spent on it: the report of `vivit prepare`."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivit.pipeline.datasets import LoadedDataset
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import SPLITS, UNKNOWN, Clip, Manifest
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.parallel import in_parallel
from vivit.pipeline.progress import Progress
from vivit.pipeline.storage import Location
from vivit.pipeline.video import ClipSpan, read_clips
from vivit.pipeline.video_clip import END_SLACK_SEC
from vivit.pipeline.video_header import VideoHeader, read_header
from vivit.pipeline.video_location import video_at
from vivit.pipeline.video_source import Failure
from vivit.pipeline.views import ViewSpec, span

PROBED_CLIPS = 32
"""Clips that are decoded, of each data set."""
_HEADER_THREADS = 16
_DECODE_THREADS = 4
_DECODED_FRAMES = 8
_TIMEOUT_SEC = 60.0
_SEED = 0


@dataclass(frozen=True)
class SplitReport:
    """One split of the manifest."""

    clips: int
    videos: int
    official: int | None
    """Rows in the official files, where it is known."""
    missing: int
    """Clips whose video is not there."""
    unlabelled: int
    per_class: dict[str, dict[str, int]]
    """Head -> class name -> clips, in id order."""


@dataclass(frozen=True)
class Unreadable:
    """A video or clip that cannot be read, or not whole."""

    name: str
    """The video, or the clip's id."""
    outcome: str
    message: str


@dataclass(frozen=True)
class HeaderReport:
    """What the headers of all videos say."""

    videos: int
    unreadable: list[Unreadable]
    containers: dict[str, int]
    frame_rates: dict[str, int]
    """Videos by frames a second, to two digits."""
    sizes: dict[str, int]
    """Videos by width x height."""
    view_frames: int
    """Frames that a view of the data set's recipe reaches over."""
    short: dict[str, int]
    """Clips of each split that have fewer: their views start over."""
    beyond: dict[str, int]
    """Clips of each split that end after their video does."""


@dataclass(frozen=True)
class SampleReport:
    """What came of decoding some clips."""

    clips: int
    seed: int
    outcomes: dict[str, int]
    failed: list[Unreadable]


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """All that `vivit prepare` found out."""

    dataset: str
    title: str
    data_root: str
    taken: dict[str, str]
    """Annotation files, and whatever else was chosen, with its place."""
    notes: list[str]
    heads: dict[str, int]
    """Number of classes."""
    splits: dict[str, SplitReport]
    missing: list[str]
    """Videos that are not there."""
    repeated_clips: list[list[str]]
    """Clips that are the same part of the same video, as `split/id`."""
    repeated_files: dict[str, list[str]]
    """Videos that are there more than once: the one that is used, and the others."""
    headers: HeaderReport | None = None
    sample: SampleReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether all videos are there, and none was found that cannot be read."""
        unreadable = [*(self.headers.unreadable if self.headers else ())]
        unreadable += self.sample.failed if self.sample else []
        return not (self.missing or unreadable)

    def to_json(self) -> bytes:
        """The report as a JSON file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode() + b"\n"


def examine(loaded: LoadedDataset, views: ViewSpec, *, probe: int | None = PROBED_CLIPS) -> DatasetReport:
    """The report on a data set. `probe` clips are decoded after the headers of all videos were read; None: neither.

    DataError where no video at all is there, unless they are not to be read.
    """
    began = time.monotonic()
    manifest, root = loaded.manifest, loaded.files.data_root
    missing = manifest.missing_videos(root)
    if probe is not None:
        _refuse_wrong_folder(loaded, missing)
    gone = set(missing)
    seconds = {"files": time.monotonic() - began}
    there = [clip for clip in manifest.clips if clip.video not in gone]
    headers = sample = None
    if probe is not None:
        began = time.monotonic()
        headers = _headers(there, root, views)
        seconds["headers"] = time.monotonic() - began
        began = time.monotonic()
        bad = {entry.name for entry in headers.unreadable}
        sample = _sample([clip for clip in there if clip.video not in bad], root, probe)
        seconds["sample"] = time.monotonic() - began
    return DatasetReport(
        dataset=manifest.dataset,
        title=loaded.dataset.title or loaded.dataset.name,
        data_root=str(root),
        taken=dict(loaded.files.taken),
        notes=list(loaded.files.notes),
        heads={head: len(names) for head, names in manifest.heads.items()},
        splits={
            split: _split_report(manifest, split, loaded.official.get(split), gone)
            for split in SPLITS
            if split in manifest.splits or split in loaded.official
        },
        missing=missing,
        repeated_clips=_repeated(manifest.clips),
        repeated_files=loaded.files.repeated_videos,
        headers=headers,
        sample=sample,
        seconds=seconds,
    )


def _refuse_wrong_folder(loaded: LoadedDataset, missing: Sequence[str]) -> None:
    videos = len({clip.video for clip in loaded.manifest.clips})
    if len(missing) < videos:
        return
    looked = ", ".join(missing[:3])
    raise DataError(
        f"none of the {videos} videos of {loaded.manifest.dataset} is below {loaded.files.data_root}: looked for {looked}"
        f"{', ...' if videos > 3 else ''}, and for files of these names in any folder below it. Pass the folder of the "
        "videos with --data-root (--no-probe makes the manifest without them)"
    )


def _split_report(manifest: Manifest, split: str, official: int | None, gone: set[str]) -> SplitReport:
    clips = manifest.of_split(split)
    labels = manifest.labels(split)
    is_known = [values != UNKNOWN for values in labels.values()]
    return SplitReport(
        clips=len(clips),
        videos=len({clip.video for clip in clips}),
        official=official,
        missing=sum(clip.video in gone for clip in clips),
        unlabelled=len(clips) - int(np.any(is_known, axis=0).sum()) if is_known else len(clips),
        per_class={head: _per_class(values, manifest.heads[head]) for head, values in labels.items()},
    )


def _per_class(labels: NDArray[np.int32], names: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(labels[labels != UNKNOWN], minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def _repeated(clips: Sequence[Clip]) -> list[list[str]]:
    uses = Counter(clip.video for clip in clips)
    found: dict[tuple[str, float | None, float | None], list[str]] = {}
    for clip in clips:
        if uses[clip.video] == 1:
            continue
        found.setdefault((clip.video, clip.start_sec, clip.end_sec), []).append(
            f"{clip.split}/{clip.clip_id}"
        )
    return [names for names in found.values() if len(names) > 1]


# Headers


def _headers(clips: Sequence[Clip], root: Location, views: ViewSpec) -> HeaderReport:
    videos = list(dict.fromkeys(clip.video for clip in clips))
    found = _in_threads("headers", lambda video: _header(root, video), videos, "videos", _HEADER_THREADS)
    headers = {
        video: each for video, each in zip(videos, found, strict=True) if isinstance(each, VideoHeader)
    }
    unreadable = [each for each in found if isinstance(each, Unreadable)]
    unreadable += [
        Unreadable(video, Outcome.PARTIAL.value, "the file ends too early")
        for video, header in headers.items()
        if header.is_truncated
    ]
    short: Counter[str] = Counter()
    beyond: Counter[str] = Counter()
    for clip in clips:
        if header := headers.get(clip.video):
            count = _num_frames(clip, header, views)
            short[clip.split] += count is not None and count < span(views)
            beyond[clip.split] += _ends_beyond(clip, header)
    return HeaderReport(
        videos=len(videos),
        unreadable=unreadable,
        containers=_counted(f"{header.container} ({header.codec})" for header in headers.values()),
        frame_rates=_counted(
            "unknown" if header.frame_rate is None else f"{header.frame_rate:.2f}"
            for header in headers.values()
        ),
        sizes=_counted(f"{header.width}x{header.height}" for header in headers.values()),
        view_frames=span(views),
        short=dict(short),
        beyond=dict(beyond),
    )


def _header(root: Location, video: str) -> VideoHeader | Unreadable:
    try:
        return read_header(video_at(root, video))
    except Failure as failure:
        return Unreadable(video, failure.outcome.value, failure.message)


def _num_frames(clip: Clip, header: VideoHeader, views: ViewSpec) -> int | None:
    """Frames that the views of a clip choose from, by its header; None where that does not say."""
    rate = views.fps or header.frame_rate
    end_sec = min((sec for sec in (clip.end_sec, header.duration_sec) if sec is not None), default=None)
    if rate is None or end_sec is None:
        return None
    return round((end_sec - (clip.start_sec or 0.0)) * rate)


def _ends_beyond(clip: Clip, header: VideoHeader) -> bool:
    is_known = clip.end_sec is not None and header.duration_sec is not None
    return is_known and (clip.end_sec or 0.0) - (header.duration_sec or 0.0) > END_SLACK_SEC


def _counted(values: "Any") -> dict[str, int]:
    return dict(Counter(values).most_common())


# The sample


class _SomeFrames:
    """Wants a few frames of a clip, from the first to the last."""

    def plan(self, times_sec: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.unique(np.linspace(0, len(times_sec) - 1, _DECODED_FRAMES).round().astype(np.int64))

    def add(self, index: int, picture: NDArray[np.uint8]) -> None:
        """Decoding it was the point."""


def _sample(clips: Sequence[Clip], root: Location, count: int) -> SampleReport:
    """Decodes some clips, the same ones for the same clips."""
    chosen = random.Random(_SEED).sample(list(clips), min(count, len(clips)))
    results = _in_threads("decoding", lambda clip: _decoded(root, clip), chosen, "clips", _DECODE_THREADS)
    failed = [each for each in results if not Outcome(each.outcome).complete]
    return SampleReport(len(chosen), _SEED, _counted(each.outcome for each in results), failed)


def _decoded(root: Location, clip: Clip) -> Unreadable:
    spans = [ClipSpan(clip.start_sec, clip.end_sec)]
    [(_, result)] = read_clips(video_at(root, clip.video), spans, [_SomeFrames()], timeout_sec=_TIMEOUT_SEC)
    return Unreadable(clip.clip_id, result.outcome.value, result.message)


def _in_threads(
    what: str, call: Callable[[Any], Any], items: Sequence[Any], unit: str, threads: int
) -> list[Any]:
    counting = threading.Lock()
    with Progress(what, len(items), unit) as progress:

        def counted(item: Any) -> Any:
            result = call(item)
            with counting:
                progress.advance()
            return result

        return in_parallel(counted, items, threads)
