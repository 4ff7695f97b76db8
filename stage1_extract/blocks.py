"""One block of clips: through the frozen encoder to features and records, and into the cache.

Knows nothing of where it runs or of who watches: the engines drive it.
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from vivit.pipeline.feature_cache import FeatureCache, library_versions
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip
from vivit.pipeline.outcome import Outcome
from vivit.stage1_extract.augment import Augmenter
from vivit.stage1_extract.clip_reader import (
    ClipCrops,
    ClipViews,
    CropSettings,
    CropStream,
    default_decode_threads,
)
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.encoder import SpatialEncoder

OnClip = Callable[[ClipRecord, int], None]
"""Told of each clip: its record, and the number of its frame crops."""


@dataclass
class Seconds:
    """Where the time of the thread that encodes went."""

    decode: float = 0.0
    """Waiting for crops."""
    encode: float = 0.0
    write: float = 0.0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time of a `with` block to one of the three."""
        started = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    def add(self, other: Self) -> None:
        """Add the time of another thread or block."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def shares(self) -> dict[str, float]:
        total = self.decode + self.encode + self.write
        return {name: value / total if total else 0.0 for name, value in vars(self).items()}

    @property
    def limit(self) -> tuple[str, float]:
        """What took most of the time, and its share."""
        return max(self.shares.items(), key=lambda item: item[1])


@dataclass(frozen=True)
class Work:
    """Some views of one block to compute, and the rows of the split that have to be read for it."""

    split: str
    block: int
    rows: tuple[int, ...]
    views: range
    """Numbers of the views, which are committed together."""
    is_retry: bool = False
    """Whether the block is committed, and only its clips without features are tried again."""
    targets: tuple[int, ...] = (0,)
    """The caches of the run that need it, by number."""

    def shape(self, cache: FeatureCache) -> tuple[int, int, int, int]:
        """(row, view, time, dim) of its features."""
        _, _, times, dim = cache.shape(self.split)
        return len(self.rows), len(self.views), times, dim


def missing_work(
    caches: Sequence[FeatureCache], *, part: tuple[int, int] | None, retry_failed: bool
) -> list[Work]:
    """The blocks that are not committed, in order, each once for all caches that need the same of it.

    With `retry_failed` also those with clips without features. `part` (i, n) leaves every n-th block, from the i-th on,
    with all its views. A clip without features in the first views is not read for appended ones.
    """
    needed: dict[Work, list[int]] = {}
    for target, cache in enumerate(caches):
        for work in _missing_in(cache, part=part, retry_failed=retry_failed):
            needed.setdefault(work, []).append(target)
    order = {split: at for at, split in enumerate(caches[0].splits)}
    works = [replace(work, targets=tuple(targets)) for work, targets in needed.items()]
    return sorted(works, key=lambda work: (order[work.split], work.views.start, work.block))


def _missing_in(cache: FeatureCache, *, part: tuple[int, int] | None, retry_failed: bool) -> Iterator[Work]:
    before = 0
    for split in cache.splits:
        blocks = range(cache.num_blocks(split))
        mine = [
            block for block in blocks if part is None or (before + block + 1) % part[1] == part[0] % part[1]
        ]
        before += len(blocks)
        first = cache.records(split)
        for views in cache.view_ranges(split):
            missing, records = set(cache.missing_blocks(split, views)), cache.records(split, views)
            for block in mine:
                rows = range(*cache.rows(split, block))
                if block in missing:
                    is_first = views.start == 0
                    wanted = (row for row in rows if is_first or retry_failed or not _failed(first[row]))
                    yield Work(split, block, tuple(wanted), views)
                elif retry_failed and (failed := tuple(row for row in rows if _failed(records[row]))):
                    yield Work(split, block, failed, views, is_retry=True)


def _failed(record: ClipRecord | None) -> bool:
    return record is not None and not record.usable


@dataclass(frozen=True)
class BlockReport:
    """What became of the rows of a work."""

    work: Work
    records: list[ClipRecord]
    """One for each row of the work; where several caches get it, features that any of them lacks are lost."""
    seconds: Seconds
    crops: int
    """Frame crops that were encoded, by each encoder."""


@dataclass(frozen=True)
class BlockFeatures:
    """What one cache gets of a work."""

    target: int
    """Number of the cache."""
    records: list[ClipRecord]
    """One for each row of the work."""
    features: npt.NDArray[np.float16]
    """[row of the work, view, time, dim]; zeros for clips without features."""
    about: dict[str, Any]
    """What is worth knowing about the making of a block: recorded, never compared."""


@dataclass(frozen=True)
class ComputedBlock(BlockReport):
    """The features of the rows of a work, not committed yet."""

    parts: list[BlockFeatures]
    """For each cache that needs it."""

    @property
    def report(self) -> BlockReport:
        """All but the features."""
        return BlockReport(self.work, self.records, self.seconds, self.crops)


@dataclass(frozen=True)
class Target:
    """A cache, and the encoder that fills it."""

    encoder: SpatialEncoder
    cache: FeatureCache
    config: ExtractConfig

    @property
    def augmenter(self) -> Augmenter | None:
        """What changes the pixels of training views."""
        return Augmenter.of(self.config.views, seed=self.config.seed, device=self.encoder.device)

    @property
    def train_views(self) -> list[range]:
        """Training views that are read together."""
        return self.cache.view_ranges("train") if "train" in self.cache.splits else [range(1)]

    def crop_settings(self, train_views: int) -> CropSettings:
        """What decides the crops that the encoder gets, at most so many views of a training clip at a time."""
        return CropSettings(
            views=replace(self.config.views, train_views=train_views),
            seed=self.config.seed,
            interpolation=self.encoder.backbone.interpolation,
            timeout_sec=self.config.clip_timeout_sec,
        )


def create_encoder(config: ExtractConfig) -> SpatialEncoder:
    """The encoder that a configuration asks for."""
    return SpatialEncoder(
        config.backbone,
        weights=config.weights,
        crop_size=config.views.crop_size,
        device=config.device,
        precision=config.precision,
        batch_size=config.batch_size,
    )


class BlockExtractor:
    """Computes and commits blocks of one cache with one encoder, or of several caches from the same decoded clips."""

    def __init__(self, targets: Sequence[Target]) -> None:
        """The targets differ in their encoders, their caches, and at most in the size of their crops."""
        self._targets = targets
        self._config, self._manifest = targets[0].config, targets[0].cache.manifest
        self._clips = {split: self._manifest.of_split(split) for split in self._manifest.splits}
        # Memory for crops is shared out by the most training views that are ever read together.
        most = max(len(views) for target in targets for views in target.train_views)
        of_targets = [target.crop_settings(most) for target in targets]
        self.crop_settings = list(dict.fromkeys(of_targets))
        """What decides the crops that the encoders get, each once."""
        self._setting_of = [self.crop_settings.index(settings) for settings in of_targets]

    def clips(self, work: Work) -> list[Clip]:
        """The clips of a work, in the order of its rows, with the views that are wanted."""
        return [ClipViews.of(self._clips[work.split][row], work.views) for row in work.rows]

    def stream(self) -> CropStream:
        """Decodes ahead of `compute`, as long as it is entered."""
        config = self._config
        threads = config.decode_threads or default_decode_threads(self._targets[0].encoder.device.type)
        budget = config.decode_memory_mb << 20
        return CropStream(config.data_root, self.crop_settings, threads=threads, budget_bytes=budget)

    def compute(
        self,
        work: Work,
        crops: Iterator[ClipCrops],
        *,
        seconds: Seconds | None = None,
        on_clip: OnClip = lambda _record, _crops: None,
    ) -> ComputedBlock:
        """Features of the next clips of `crops`, which are those of the work; time is added to `seconds` as it passes."""
        total, before = seconds or Seconds(), replace(seconds or Seconds())
        blocks = [_BlockInWork(number, self._targets[number], work) for number in work.targets]
        settings = [self._setting_of[number] for number in work.targets]
        encoded = 0
        for _ in work.rows:
            with total.of("decode"):
                item = next(crops)
            with total.of("encode"):
                counts = [block.add(item, setting) for block, setting in zip(blocks, settings, strict=True)]
            encoded += sum(counts)
            on_clip(item.record, sum(counts))
        with total.of("encode"):
            features = [block.features() for block in blocks]
        spent = Seconds(**{name: value - getattr(before, name) for name, value in vars(total).items()})
        with total.of("write"):
            parts = [block.finished(f, spent) for block, f in zip(blocks, features, strict=True)]
        return ComputedBlock(work, _worst([part.records for part in parts]), spent, encoded, parts)

    def commit(self, computed: ComputedBlock) -> None:
        """Write a computed block into the caches."""
        commit([target.cache for target in self._targets], computed)


def machine(device: torch.device) -> dict[str, str]:
    """What arithmetic may differ by: the GPU, or the processor and the instructions that torch uses of it."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": "cpu", "processor": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"}


def _processor() -> str:
    """The processor's own name, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit(caches: Sequence[FeatureCache], computed: ComputedBlock) -> None:
    """Write a computed block; rows of a committed block that were not tried again stay as they are."""
    work = computed.work
    for part in computed.parts:
        cache, features, records, about = caches[part.target], part.features, part.records, part.about
        if len(work.rows) < len(range(*cache.rows(work.split, work.block))):
            features, records = _with_the_others(cache, work, part)
            if work.is_retry:
                about = _common([cache.entries(work.split, work.views)[work.block].about, about])
        cache.commit(work.split, work.block, features, records, about, views=work.views)


def without_rows(caches: Sequence[FeatureCache], work: Work) -> ComputedBlock:
    """The outcome of a work that has nothing to read."""
    parts = [
        BlockFeatures(target, [], np.zeros(work.shape(caches[target]), np.float16), {})
        for target in work.targets
    ]
    return ComputedBlock(work, [], Seconds(), 0, parts)


def joined(work: Work, pieces: Sequence[ComputedBlock]) -> ComputedBlock:
    """One block of its rows, which were computed in pieces."""
    seconds = Seconds()
    for piece in pieces:
        seconds.add(piece.seconds)
    parts = [_joined_parts(parts) for parts in zip(*(piece.parts for piece in pieces), strict=True)]
    return ComputedBlock(
        work=work,
        records=[record for piece in pieces for record in piece.records],
        seconds=seconds,
        crops=sum(piece.crops for piece in pieces),
        parts=parts,
    )


def _joined_parts(parts: Sequence[BlockFeatures]) -> BlockFeatures:
    """What one cache gets, its seconds added up."""
    about = _common([part.about for part in parts])
    times = [name for name in about if name.endswith("_sec")]
    return BlockFeatures(
        target=parts[0].target,
        records=[record for part in parts for record in part.records],
        features=np.concatenate([part.features for part in parts]),
        about=about | {name: round(sum(part.about.get(name, 0.0) for part in parts), 3) for name in times},
    )


def _common(abouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is true of all clips of a block that were made at several times: the machine, say, only where it was the same."""
    *others, last = abouts
    return {
        name: value
        for name, value in last.items()
        if name.endswith("_sec") or all(about.get(name) == value for about in others if about)
    }


def _worst(records: Sequence[list[ClipRecord]]) -> list[ClipRecord]:
    """Of each clip the record of a cache that has no features of it, where there is one."""
    return [min(of_clip, key=lambda record: record.usable) for of_clip in zip(*records, strict=True)]


def _with_the_others(
    cache: FeatureCache, work: Work, part: BlockFeatures
) -> tuple[npt.NDArray[np.float16], list[ClipRecord]]:
    """Features and records of a whole block, some rows of which were computed.

    The others are as committed or, of views that are new, those of clips without features in the first views.
    """
    start, stop = cache.rows(work.split, work.block)
    before = cache.records(work.split, work.views if work.is_retry else None)[start:stop]
    records = dict(enumerate(before)) | {
        row - start: record for row, record in zip(work.rows, part.records, strict=True)
    }
    features = np.zeros((stop - start, *part.features.shape[1:]), np.float16)
    features[np.array(work.rows, np.int64) - start] = part.features
    if work.is_retry and (kept := sorted(set(range(start, stop)) - set(work.rows))):
        features[np.array(kept) - start] = cache.read(work.split, kept, work.views)
    return features, [record for row in range(stop - start) if (record := records[row]) is not None]


def _to_float16(features: npt.NDArray[np.float32], records: list[ClipRecord]) -> npt.NDArray[np.float16]:
    """The features as they are stored; a clip with values beyond float16 loses them and is not finite."""
    with np.errstate(over="ignore"):
        halves = features.astype(np.float16)
    for row in np.flatnonzero(~np.isfinite(halves).all(axis=(1, 2, 3))).tolist():
        halves[row] = 0
        message = "the encoder gave values that are not finite or beyond float16: try --precision float32"
        records[row] = replace(records[row], outcome=Outcome.NOT_FINITE.value, message=message)
    return halves


def encode_clip(
    encoder: SpatialEncoder,
    split: str,
    crops: npt.NDArray[np.uint8],
    *,
    augmenter: Augmenter | None = None,
    clip_id: str = "",
    first_view: int = 0,
) -> torch.Tensor:
    """Vectors [view, time, dim] of the crops [view, frame, height, width, channel] of one clip.

    Training views, numbered from `first_view`, are augmented; test views never are.
    Training views go through the encoder one at a time: how many of them there are, and which were appended later, then
    changes no bit of any. The grid of the other splits, whose size is fixed, goes through together.
    """
    if split != "train":
        return encoder.encode(crops)
    views = crops if augmenter is None else augmenter.clip(crops, clip_id=clip_id, first_view=first_view)
    return torch.cat([encoder.encode(view[None]) for view in views])


class _BlockInWork:
    """The output of one encoder for one block, left on the device until all of it has been asked for."""

    def __init__(self, number: int, target: Target, work: Work) -> None:
        self._number, self._target, self._split = number, target, work.split
        self._first_view, self._augmenter = work.views.start, target.augmenter
        self._shape = work.shape(target.cache)
        self._records: list[ClipRecord] = []
        self._vectors: dict[int, torch.Tensor] = {}
        self._encoding = Seconds()

    def add(self, item: ClipCrops, setting: int) -> int:
        """Encode the next clip from its crops of this number, and give the number of its frame crops."""
        at = len(self._records)
        self._records.append(item.record)
        if item.crops_of is None:
            return 0
        crops = item.crops_of[setting]
        with self._encoding.of("encode"):
            self._vectors[at] = encode_clip(
                self._target.encoder, self._split, crops,
                augmenter=self._augmenter, clip_id=item.clip.clip_id, first_view=self._first_view,
            )  # fmt: skip
        views, frames, *_ = crops.shape
        return int(views * frames)

    def features(self) -> npt.NDArray[np.float32]:
        """Features [clip, view, time, dim]; zeros for clips without crops."""
        features = np.zeros(self._shape, np.float32)
        with self._encoding.of("encode"):
            for at, vectors in self._vectors.items():
                features[at] = vectors.cpu().numpy()
        return features

    def finished(self, features: npt.NDArray[np.float32], spent: Seconds) -> BlockFeatures:
        """What the cache gets; `spent` is the time of all caches together."""
        about = {
            "decode_sec": round(spent.decode, 3),
            "encode_sec": round(self._encoding.encode, 3),
            "torch_threads": torch.get_num_threads(),
            "versions": library_versions(),
        } | machine(self._target.encoder.device)
        records = list(self._records)
        return BlockFeatures(self._number, records, _to_float16(features, records), about)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads in a `with` block; 0 leaves its choice."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)
