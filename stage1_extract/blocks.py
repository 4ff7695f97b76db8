"""One block of clips: through the frozen encoder to features and records, and into the cache.

Knows nothing of where it runs or of who watches: the engines drive it.
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from vivit.pipeline.feature_cache import FeatureCache, library_versions
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.views import ViewSpec
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

    def __str__(self) -> str:
        shares = self.shares
        limit = max(shares, key=lambda name: shares[name])
        return f"limited by {limit} ({shares[limit]:.0%} of the time)"


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

    def shape(self, cache: FeatureCache) -> tuple[int, int, int, int]:
        """(row, view, time, dim) of its features."""
        _, _, times, dim = cache.shape(self.split)
        return len(self.rows), len(self.views), times, dim


def missing_work(cache: FeatureCache, *, part: tuple[int, int] | None, retry_failed: bool) -> Iterator[Work]:
    """The blocks that are not committed, in order; with `retry_failed` also those with clips without features.

    `part` (i, n) leaves every n-th block, from the i-th on, with all its views. A clip without features in the first views
    is not read for appended ones.
    """
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
    """One for each row of the work."""
    seconds: Seconds
    crops: int
    """Frame crops that were encoded."""


@dataclass(frozen=True)
class ComputedBlock(BlockReport):
    """The features of the rows of a work, not committed yet."""

    features: npt.NDArray[np.float16]
    """[row of the work, view, time, dim]; zeros for clips without features."""
    about: dict[str, Any]
    """What is worth knowing about the making of a block: recorded, never compared."""

    @property
    def report(self) -> BlockReport:
        """All but the features."""
        return BlockReport(self.work, self.records, self.seconds, self.crops)


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
    """Computes and commits blocks of one cache with one encoder."""

    def __init__(self, encoder: SpatialEncoder, cache: FeatureCache, config: ExtractConfig) -> None:
        self._encoder, self._cache, self._config = encoder, cache, config
        self._clips = {split: cache.manifest.of_split(split) for split in cache.splits}

    def clips(self, work: Work) -> list[Clip]:
        """The clips of a work, in the order of its rows, with the views that are wanted."""
        return [ClipViews.of(self._clips[work.split][row], work.views) for row in work.rows]

    def stream(self) -> CropStream:
        """Decodes ahead of `compute`, as long as it is entered."""
        config = self._config
        settings = CropSettings(
            views=self._widest_views(),
            seed=config.seed,
            interpolation=self._encoder.backbone.interpolation,
            timeout_sec=config.clip_timeout_sec,
        )
        threads = config.decode_threads or default_decode_threads(self._encoder.device.type)
        budget = config.decode_memory_mb << 20
        return CropStream(config.data_root, settings, threads=threads, budget_bytes=budget)

    def _widest_views(self) -> ViewSpec:
        """The views, with as many training views as are ever read together: memory for crops is shared out by it."""
        most = max((len(views) for views in self._cache.view_ranges("train")), default=1)
        return replace(self._config.views, train_views=most)

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
        vectors = _Vectors(self._encoder, work.split, work.shape(self._cache))
        records: list[ClipRecord] = []
        encoded = 0
        for at in range(len(work.rows)):
            with total.of("decode"):
                item = next(crops)
            with total.of("encode"):
                if item.crops is not None:
                    vectors.add(at, item.crops)
            count = 0 if item.crops is None else item.crops.shape[0] * item.crops.shape[1]
            records.append(item.record)
            encoded += count
            on_clip(item.record, count)
        with total.of("encode"):
            features = vectors.features()
        with total.of("write"):
            halves = _to_float16(features, records)
        spent = Seconds(**{name: value - getattr(before, name) for name, value in vars(total).items()})
        return ComputedBlock(work, records, spent, encoded, halves, self._about(spent))

    def commit(self, computed: ComputedBlock) -> None:
        """Write a computed block into the cache."""
        commit(self._cache, computed)

    def _about(self, spent: Seconds) -> dict[str, Any]:
        device = self._encoder.device
        return {
            "decode_sec": round(spent.decode, 3),
            "encode_sec": round(spent.encode, 3),
            "torch_threads": torch.get_num_threads(),
            "versions": library_versions(),
        } | machine(device)


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


def commit(cache: FeatureCache, computed: ComputedBlock) -> None:
    """Write a computed block; rows of a committed block that were not tried again stay as they are."""
    work, features, records = computed.work, computed.features, computed.records
    if len(work.rows) < len(range(*cache.rows(work.split, work.block))):
        features, records = _with_the_others(cache, computed)
    cache.commit(work.split, work.block, features, records, computed.about, views=work.views)


def without_rows(cache: FeatureCache, work: Work) -> ComputedBlock:
    """The outcome of a work that has nothing to read."""
    return ComputedBlock(work, [], Seconds(), 0, np.zeros(work.shape(cache), np.float16), {})


def joined(work: Work, parts: Sequence[ComputedBlock]) -> ComputedBlock:
    """One block of its rows, which were computed in parts."""
    seconds = Seconds()
    for part in parts:
        seconds.add(part.seconds)
    sums = {f"{name}_sec": round(value, 3) for name, value in asdict(seconds).items() if name != "write"}
    return ComputedBlock(
        work=work,
        records=[record for part in parts for record in part.records],
        seconds=seconds,
        crops=sum(part.crops for part in parts),
        features=np.concatenate([part.features for part in parts]),
        about={name: value for part in parts for name, value in part.about.items()} | sums,
    )


def _with_the_others(
    cache: FeatureCache, computed: ComputedBlock
) -> tuple[npt.NDArray[np.float16], list[ClipRecord]]:
    """Features and records of a whole block, some rows of which were computed.

    The others are as committed or, of views that are new, those of clips without features in the first views.
    """
    work = computed.work
    start, stop = cache.rows(work.split, work.block)
    before = cache.records(work.split, work.views if work.is_retry else None)[start:stop]
    records = dict(enumerate(before)) | {
        row - start: record for row, record in zip(work.rows, computed.records, strict=True)
    }
    features = np.zeros((stop - start, *computed.features.shape[1:]), np.float16)
    features[np.array(work.rows, np.int64) - start] = computed.features
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


def encode_clip(encoder: SpatialEncoder, split: str, crops: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Vectors [view, time, dim] of the crops [view, frame, height, width, channel] of one clip.

    Training views go through the encoder one at a time: how many of them there are, and which were appended later, then
    changes no bit of any. The grid of the other splits, whose size is fixed, goes through together.
    """
    if split != "train":
        return encoder.encode(crops)
    return torch.cat([encoder.encode(view[None]) for view in crops])


class _Vectors:
    """The encoder's output for one block, left on the device until all of it has been asked for."""

    def __init__(self, encoder: SpatialEncoder, split: str, shape: tuple[int, int, int, int]) -> None:
        """`shape`: (clip, view, time, dim)."""
        self._encoder, self._split, self._shape = encoder, split, shape
        self._vectors: dict[int, torch.Tensor] = {}

    def add(self, row: int, crops: npt.NDArray[np.uint8]) -> None:
        """Encode the crops [view, frame, height, width, channel] of one clip."""
        self._vectors[row] = encode_clip(self._encoder, self._split, crops)

    def features(self) -> npt.NDArray[np.float32]:
        """Features [clip, view, time, dim]; zeros for clips that were not added."""
        features = np.zeros(self._shape, np.float32)
        for row, vectors in self._vectors.items():
            features[row] = vectors.cpu().numpy()
        return features


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
