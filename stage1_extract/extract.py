"""Stage 1: blocks of clips through the frozen encoder into the feature cache, by one of the engines."""

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from vivit.pipeline.cache_settings import Backbone
from vivit.pipeline.errors import DataError, InterruptedRunError
from vivit.pipeline.feature_cache import WEIGHTS_FILE, FeatureCache
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.storage import Location
from vivit.pipeline.video_location import video_at
from vivit.stage1_extract.blocks import BlockExtractor, Work, create_encoder, missing_work, torch_threads
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.encoder import SpatialEncoder
from vivit.stage1_extract.inline_engine import run_inline
from vivit.stage1_extract.tally import Tally

logger = logging.getLogger(__name__)

Engine = Callable[[Sequence[Work], Tally], None]
"""Computes and commits blocks of a cache."""


@dataclass(frozen=True)
class ExtractSummary:
    """What a run did, and what the cache holds after it."""

    cache: Location
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
    has other settings, BlockError where workers failed on some blocks, InterruptedRunError on Ctrl-C.
    """
    check_videos(manifest, config.data_root)
    try:
        if config.address is not None or default_workers(config):
            return extract_on_ray(config, manifest)
        return extract_with(create_encoder(config), config, manifest)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted: what was committed to {config.cache} stays, the block in work was dropped. "
            "Run the same command again to go on"
        ) from None


def default_workers(config: ExtractConfig) -> int:
    """The workers asked for; otherwise one per GPU where there are several, and 0, this process, elsewhere."""
    if config.workers is not None:
        return config.workers
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    if gpus < 2:
        return 0
    if importlib.util.find_spec("ray") is None:
        logger.warning("one of %d GPUs is used: for all of them, pip install 'vivit[ray]'", gpus)
        return 0
    return gpus


def extract_with(encoder: SpatialEncoder, config: ExtractConfig, manifest: Manifest) -> ExtractSummary:
    """`extract` in this process, with an encoder that is loaded already."""
    with (
        _held_cache(config, manifest, encoder.backbone, encoder.weights_file) as cache,
        torch_threads(config.torch_threads),
    ):
        return _complete(config, cache, partial(run_inline, BlockExtractor(encoder, cache, config)))


def extract_on_ray(
    config: ExtractConfig, manifest: Manifest, *, extractor: type[BlockExtractor] = BlockExtractor
) -> ExtractSummary:
    """`extract` in Ray workers; `extractor` is what computes and commits blocks in them."""
    from vivit.stage1_extract.ray_engine import ray_workers

    if config.address is None:
        # of a cluster in the environment only where workers were asked for
        address = os.environ.get("RAY_ADDRESS") if config.workers else None
        config = replace(config, workers=default_workers(config), address=address or None)
    with ray_workers(config, extractor) as workers:
        backbone, weights_file = workers.encoder()
        with _held_cache(config, manifest, backbone, weights_file) as cache:
            return _complete(config, cache, partial(workers.run, cache))


@contextmanager
def _held_cache(
    config: ExtractConfig, manifest: Manifest, backbone: Backbone, weights_file: Location | None
) -> Iterator[FeatureCache]:
    """The cache of this configuration, made if need be, and held for writing."""
    made_with = {} if weights_file is None else {WEIGHTS_FILE: str(weights_file.resolve())}
    settings = config.settings(manifest.dataset, manifest.sha256, backbone)
    cache = FeatureCache.create_or_open(config.cache, manifest, settings, made_with=made_with)
    with cache.lock(config.part):
        # Opened again: another process may have committed blocks before this one got the lock.
        cache = FeatureCache.open(config.cache, allow_partial=True)
        if cache.take_labels_of(manifest):
            logger.info(
                "%s: the clips are the same, their labels or other columns are new and were taken over",
                cache.path,
            )
        yield cache


def check_videos(manifest: Manifest, data_root: Location) -> None:
    """Refuse a wrong data root; warn of single missing videos, which are recorded clip by clip."""
    if not len(manifest):
        raise DataError("the manifest has no clips")
    if isinstance(data_root, Path) and not data_root.is_dir():
        raise DataError(f"the data root {data_root} is not a folder: pass --data-root")
    missing = manifest.missing_videos(data_root)
    videos = len({clip.video for clip in manifest.clips})
    if len(missing) == videos:
        raise DataError(
            f"none of the {videos} videos is below {data_root} (looked for {video_at(data_root, missing[0])}): "
            "pass the --data-root that the manifest's paths start from"
        )
    if missing:
        logger.warning("%d of %d videos are missing, for example %s", len(missing), videos, missing[0])


def _complete(config: ExtractConfig, cache: FeatureCache, engine: Engine) -> ExtractSummary:
    """Let an engine do what is missing in a cache that is held."""
    todo = list(missing_work(cache, part=config.part, retry_failed=config.retry_failed))
    failed = sum(r is not None and not r.usable for split in cache.splits for r in cache.records(split))
    again = sum(len(work.rows) for work in todo if work.is_retry)
    tally = Tally(failed=failed - again, max_failures=config.max_failures)
    engine(todo, tally)
    # opened again: workers and other parts have committed blocks
    return _summary(FeatureCache.open(cache.path, allow_partial=True), tally)


def _summary(cache: FeatureCache, tally: Tally) -> ExtractSummary:
    """What was done; DataError where a finished cache holds no features at all."""
    records = [(split, r) for split in cache.splits for r in cache.records(split) if r is not None]
    missing = cache.missing()
    if not missing and not any(record.usable for _, record in records):
        split, first = records[0]
        raise DataError(
            f"no clip could be read: all {len(records)} failed, the first is {first.clip_id} ({split}): "
            f"{first.outcome}, {first.message}"
        )
    whole = sum(cache.num_blocks(split) - len(cache.missing_blocks(split)) for split in cache.splits)
    return ExtractSummary(
        cache=cache.path,
        clips={split: cache.shape(split)[0] for split in cache.splits},
        outcomes=Counter(record.outcome for _, record in records),
        failures=[(split, record) for split, record in records if not Outcome(record.outcome).complete],
        blocks_done=tally.blocks,
        blocks_kept=whole - tally.blocks,
        seconds=tally.elapsed,
        crops=tally.crops,
        limits=tally.seconds.shares,
        size_bytes=cache.size_bytes(),
        missing=missing,
    )
