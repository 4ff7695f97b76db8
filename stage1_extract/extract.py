"""Stage 1 in this process: blocks of clips through the frozen encoder into the feature cache."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vivit.pipeline.backbones import PRETRAINED
from vivit.pipeline.cache_settings import CacheSettings
from vivit.pipeline.errors import ConfigError, DataError, InterruptedRunError
from vivit.pipeline.feature_cache import WEIGHTS_FILE, FeatureCache, library_versions
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.progress import Progress
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.clip_reader import ClipCrops, CropSettings, CropStream
from vivit.stage1_extract.encoder import SpatialEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to extract, and how to go about it."""

    cache: Path
    """Folder of the feature cache, `<name>.zarr`."""
    data_root: Path
    """Folder that the manifest's video paths start from."""
    backbone: str = "vit_b16"
    """Short name or timm id of the frozen encoder, or a model file or run folder that holds one."""
    weights: str = PRETRAINED
    """`pretrained`, `random`, or a file."""
    views: ViewSpec = field(default_factory=ViewSpec)
    seed: int = 0
    """Seed of the training views."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """Arithmetic of the encoder: auto, float32, bfloat16 or float16."""
    batch_size: int = 32
    """Most frame crops (with a tubelet above 1: tubelets) in one forward pass."""
    block_size: int = 64
    """Clips that are computed, committed and lost together."""
    codec: str = "none"
    """Compression in the cache: none or zstd."""
    decode_threads: int = 0
    """Threads that decode ahead of the encoder; 0 chooses for this machine."""
    decode_memory_mb: int = 1024
    """Memory for decoded crops that wait for the encoder, in MiB."""
    clip_timeout_sec: float = 120.0
    """Longest time that one clip may take to decode, in seconds."""
    max_failures: int | None = None
    """Stop when more clips than this have no features; None never stops."""
    retry_failed: bool = False
    """Try the clips without features again; those that have them keep theirs."""
    part: tuple[int, int] | None = None
    """(i, n): only every n-th block, from the i-th (1 to n) on, beside processes that do the others; None is all."""

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("block_size", 1),
            ("decode_threads", 0),
            ("decode_memory_mb", 0),
        ):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if self.clip_timeout_sec <= 0:
            raise ConfigError(f"clip_timeout_sec must be above 0, got {self.clip_timeout_sec}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ConfigError(f"part must be i/n with i from 1 to n, got {self.part[0]}/{self.part[1]}")
        if self.max_failures is not None and self.max_failures < 0:
            raise ConfigError(f"max_failures must be at least 0, got {self.max_failures}")


@dataclass(frozen=True)
class ExtractSummary:
    """What a run did, and what the cache holds after it."""

    cache: Path
    clips: dict[str, int]
    """Clips per split."""
    outcomes: Counter[str]
    """Clips of the whole cache by outcome."""
    failures: list[tuple[str, ClipRecord]]
    """(split, record) of every clip that is not complete."""
    blocks_done: int
    """Blocks that this run computed."""
    blocks_kept: int
    """Blocks that were there already."""
    seconds: float
    crops: int
    """Frame crops that this run encoded."""
    limits: dict[str, float]
    """Share of this run's time that was spent waiting for decode, in encode, and in write."""
    size_bytes: int
    """Size of the cache's shards."""
    missing: str = ""
    """What other parts have not done yet, in words; empty for a complete cache."""


def extract(config: ExtractConfig, manifest: Manifest) -> ExtractSummary:
    """Bring the cache to completion; the same call after an interruption goes on where it stopped.

    Raises DataError where no clip has features or more than `max_failures` have none, StaleCacheError where the cache
    has other settings, InterruptedRunError on Ctrl-C.
    """
    check_videos(manifest, config.data_root)
    try:
        encoder = SpatialEncoder(
            config.backbone,
            weights=config.weights,
            crop_size=config.views.crop_size,
            device=config.device,
            precision=config.precision,
            batch_size=config.batch_size,
        )
        return extract_with(encoder, config, manifest)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted: what was committed to {config.cache} stays, the block in work was dropped. "
            "Run the same command again to go on"
        ) from None


def extract_with(encoder: SpatialEncoder, config: ExtractConfig, manifest: Manifest) -> ExtractSummary:
    """`extract` with an encoder that is loaded already."""
    file = encoder.weights_file
    made_with = {} if file is None else {WEIGHTS_FILE: str(file.resolve())}
    cache = FeatureCache.create_or_open(
        config.cache, manifest, settings_of(config, manifest, encoder), made_with=made_with
    )
    with cache.lock(config.part):
        # Opened again: another process may have committed blocks before this one got the lock.
        cache = FeatureCache.open(config.cache, allow_partial=True)
        if cache.take_labels_of(manifest):
            logger.info(
                "%s: the clips are the same, their labels or other columns are new and were taken over",
                cache.path,
            )
        run = _Run(config, cache, encoder)
        run.work()
        return run.summary()


def check_videos(manifest: Manifest, data_root: Path) -> None:
    """Refuse a wrong data root; warn of single missing videos, which are recorded clip by clip."""
    if not len(manifest):
        raise DataError("the manifest has no clips")
    if not data_root.is_dir():
        raise DataError(f"the data root {data_root} is not a folder: pass --data-root")
    missing = manifest.missing_videos(data_root)
    videos = len({clip.video for clip in manifest.clips})
    if len(missing) == videos:
        raise DataError(
            f"none of the {videos} videos is below {data_root} (looked for {data_root / missing[0]}): "
            "pass the --data-root that the manifest's paths start from"
        )
    if missing:
        logger.warning("%d of %d videos are missing, for example %s", len(missing), videos, missing[0])


def settings_of(config: ExtractConfig, manifest: Manifest, encoder: SpatialEncoder) -> CacheSettings:
    """The identity of the cache that this configuration makes."""
    return CacheSettings(
        dataset=manifest.dataset,
        manifest_sha256=manifest.sha256,
        backbone=encoder.backbone,
        views=config.views,
        seed=config.seed,
        block_size=config.block_size,
        codec=config.codec,
    )


@dataclass
class _Seconds:
    """Where the time of the consuming thread went."""

    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time of a `with` block to one of the three."""
        started = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    @property
    def shares(self) -> dict[str, float]:
        total = self.decode + self.encode + self.write
        return {name: value / total if total else 0.0 for name, value in vars(self).items()}

    def __str__(self) -> str:
        shares = self.shares
        limit = max(shares, key=lambda name: shares[name])
        return f"limited by {limit} ({shares[limit]:.0%} of the time)"


@dataclass(frozen=True)
class _Work:
    """One block to compute, and the rows of the split that have to be read for it."""

    split: str
    block: int
    rows: list[int]
    is_retry: bool
    """Whether the block is committed, and only its clips without features are tried again."""


class _Run:
    """One run over the missing blocks of a cache."""

    def __init__(self, config: ExtractConfig, cache: FeatureCache, encoder: SpatialEncoder) -> None:
        self._config, self._cache, self._encoder = config, cache, encoder
        self._clips = {split: cache.manifest.of_split(split) for split in cache.splits}
        self._todo = list(self._missing())
        failed = sum(r is not None and not r.usable for split in cache.splits for r in cache.records(split))
        self._failed = failed - sum(len(work.rows) for work in self._todo if work.is_retry)
        self._seconds = _Seconds()
        self._started = time.perf_counter()
        self._done = self._crops = 0

    def _missing(self) -> Iterator[_Work]:
        number = 0
        for split in self._cache.splits:
            missing = set(self._cache.missing_blocks(split))
            records = self._cache.records(split)
            for block in range(self._cache.num_blocks(split)):
                number += 1
                if (
                    self._config.part is not None
                    and number % self._config.part[1] != self._config.part[0] % self._config.part[1]
                ):
                    continue
                rows = list(range(*self._cache.rows(split, block)))
                failed = [row for row in rows if (r := records[row]) is not None and not r.usable]
                if block in missing:
                    yield _Work(split, block, rows, is_retry=False)
                elif failed and self._config.retry_failed:
                    yield _Work(split, block, failed, is_retry=True)

    def work(self) -> None:
        """Compute and commit every missing block, in order."""
        settings = CropSettings(
            views=self._config.views,
            seed=self._config.seed,
            interpolation=self._encoder.backbone.interpolation,
            timeout_sec=self._config.clip_timeout_sec,
        )
        threads = self._config.decode_threads or default_decode_threads(self._encoder.device.type)
        budget = self._config.decode_memory_mb << 20
        with (
            CropStream(self._config.data_root, settings, threads=threads, budget_bytes=budget) as stream,
            Progress("extract", sum(len(work.rows) for work in self._todo), "clips") as progress,
        ):
            crops = stream.read([self._clips[work.split][row] for row in work.rows] for work in self._todo)
            for work in self._todo:
                self._block(work, crops, progress)

    def _block(self, work: _Work, crops: Iterator[ClipCrops], progress: Progress) -> None:
        start, stop = self._cache.rows(work.split, work.block)
        vectors = _Vectors(self._encoder, (stop - start, *self._cache.shape(work.split)[1:]))
        records: dict[int, ClipRecord] = {}
        spent = vars(self._seconds).copy()
        for row in work.rows:
            with self._seconds.of("decode"):
                item = next(crops)
            with self._seconds.of("encode"):
                if item.crops is not None:
                    vectors.add(row - start, item.crops)
            records[row - start] = item.record
            self._count(item, progress)
        with self._seconds.of("encode"):
            features = vectors.features()
        with self._seconds.of("write"):
            halves = self._to_float16(features, records)
            if work.is_retry:
                self._keep_the_others(work, halves, records)
            ordered = [records[row] for row in range(stop - start)]
            self._cache.commit(work.split, work.block, halves, ordered, self._about(spent))
        self._done += 1

    def _keep_the_others(
        self, work: _Work, features: npt.NDArray[np.float16], records: dict[int, ClipRecord]
    ) -> None:
        """Fill in the rows of a committed block that are not tried again, as they stand in the cache."""
        start, stop = self._cache.rows(work.split, work.block)
        kept = sorted(set(range(start, stop)) - set(work.rows))
        before = self._cache.records(work.split)
        records |= {row - start: record for row in kept if (record := before[row]) is not None}
        if kept:
            features[np.array(kept) - start] = self._cache.read(work.split, kept)

    def _about(self, spent: dict[str, float]) -> dict[str, Any]:
        """What is worth knowing about the making of a block: recorded, never compared."""
        device = self._encoder.device
        return {
            "decode_sec": round(self._seconds.decode - spent["decode"], 3),
            "encode_sec": round(self._seconds.encode - spent["encode"], 3),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch_threads": torch.get_num_threads(),
            "versions": library_versions(),
        }

    def _count(self, item: ClipCrops, progress: Progress) -> None:
        if item.crops is not None:
            self._crops += item.crops.shape[0] * item.crops.shape[1]
        else:
            self._fail(item.record)
        rate = self._crops / (time.perf_counter() - self._started)
        failed = f", {self._failed} failed" if self._failed else ""
        progress.advance(1, f"{rate:.1f} crops/s, {self._seconds}{failed}")

    def _fail(self, record: ClipRecord) -> None:
        """Count a clip without features; DataError when there are more than there may be."""
        self._failed += 1
        limit = self._config.max_failures
        if limit is not None and self._failed > limit:
            raise DataError(
                f"more than {limit} clips have no features (the last: {record.clip_id}, {record.outcome}: "
                f"{record.message}). Committed blocks stay; raise --max-failures to go on"
            )

    def _to_float16(
        self, features: npt.NDArray[np.float32], records: dict[int, ClipRecord]
    ) -> npt.NDArray[np.float16]:
        """The features as they are stored; a clip with values beyond float16 loses them and is not finite."""
        with np.errstate(over="ignore"):
            halves = features.astype(np.float16)
        for row in np.flatnonzero(~np.isfinite(halves).all(axis=(1, 2, 3))).tolist():
            halves[row] = 0
            message = "the encoder gave values that are not finite or beyond float16: try --precision float32"
            records[row] = replace(records[row], outcome=Outcome.NOT_FINITE.value, message=message)
            self._fail(records[row])
        return halves

    def summary(self) -> ExtractSummary:
        """What was done; DataError where a finished cache holds no features at all."""
        # opened again: other parts may have committed blocks
        cache = (
            self._cache
            if self._config.part is None
            else FeatureCache.open(self._cache.path, allow_partial=True)
        )
        records = [(split, r) for split in cache.splits for r in cache.records(split) if r is not None]
        missing = cache.missing()
        if not missing and not any(record.usable for _, record in records):
            split, first = records[0]
            raise DataError(
                f"no clip could be read: all {len(records)} failed, the first is {first.clip_id} ({split}): "
                f"{first.outcome}, {first.message}"
            )
        return ExtractSummary(
            cache=cache.path,
            clips={split: cache.shape(split)[0] for split in cache.splits},
            outcomes=Counter(record.outcome for _, record in records),
            failures=[(split, record) for split, record in records if not Outcome(record.outcome).complete],
            blocks_done=self._done,
            blocks_kept=sum(
                cache.num_blocks(split) - len(cache.missing_blocks(split)) for split in cache.splits
            )
            - self._done,
            seconds=time.perf_counter() - self._started,
            crops=self._crops,
            limits=self._seconds.shares,
            size_bytes=cache.size_bytes(),
            missing=missing,
        )


class _Vectors:
    """The encoder's output for one block, left on the device until all of it has been asked for."""

    def __init__(self, encoder: SpatialEncoder, shape: tuple[int, int, int, int]) -> None:
        """`shape`: (clip, view, time, dim)."""
        self._encoder, self._shape = encoder, shape
        self._vectors: dict[int, torch.Tensor] = {}

    def add(self, row: int, crops: npt.NDArray[np.uint8]) -> None:
        """Encode the crops [view, frame, height, width, channel] of one clip."""
        self._vectors[row] = self._encoder.encode(crops)

    def features(self) -> npt.NDArray[np.float32]:
        """Features [clip, view, time, dim]; zeros for clips that were not added."""
        features = np.zeros(self._shape, np.float32)
        for row, vectors in self._vectors.items():
            features[row] = vectors.cpu().numpy()
        return features


def default_decode_threads(device: str) -> int:
    """One thread per core beside a GPU; half of them where the encoder needs the cores itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores if device == "cuda" else cores // 2)


def describe(config: ExtractConfig) -> dict[str, Any]:
    """The configuration as `name: value` pairs for printing."""
    values = {name: value for name, value in vars(config).items() if name != "views"}
    return values | {f"views.{name}": value for name, value in config.views.to_dict().items()}
