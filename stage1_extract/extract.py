"""Stage 1: blocks of clips through the frozen encoder into the feature cache, by one of the engines."""

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vivit.pipeline.cache_settings import Backbone
from vivit.pipeline.errors import BlockError, CacheError, ConfigError, DataError, InterruptedRunError
from vivit.pipeline.feature_cache import WEIGHTS_FILE, FeatureCache
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.outcomes_table import outcomes_table, write_outcomes
from vivit.pipeline.storage import Location
from vivit.pipeline.video_location import video_at
from vivit.stage1_extract.blocks import (
    BlockExtractor,
    Target,
    Work,
    commit,
    create_encoder,
    missing_work,
    torch_threads,
    without_rows,
)
from vivit.stage1_extract.config import ExtractConfig, describe
from vivit.stage1_extract.encoder import SpatialEncoder
from vivit.stage1_extract.event_log import event_log
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
    workers: list[dict[str, Any]]
    """Counts, rates and shares of time of each worker (`WorkerTally.summary`)."""
    advice: str
    """What limited this run, and what to turn to go faster."""
    size_bytes: int
    """Size of the cache's shards."""
    missing: str = ""
    """What other parts have not done yet, in words; empty for a complete cache."""


def extract(config: ExtractConfig, manifest: Manifest) -> ExtractSummary:
    """Bring the cache to completion; the same call after an interruption goes on where it stopped.

    Raises DataError where no clip has features or more than `max_failures` have none, StaleCacheError where the cache
    has other settings, BlockError where workers failed on some blocks, InterruptedRunError on Ctrl-C.
    """
    (summary,) = extract_all([config], manifest)
    return summary


def extract_all(configs: Sequence[ExtractConfig], manifest: Manifest) -> list[ExtractSummary]:
    """`extract` for several encoders at once, which share what is decoded.

    The configurations differ in backbone, weights, cache, and at most in the size of their crops.
    """
    first = configs[0]
    _check_common(configs)
    check_videos(manifest, first.data_root)
    for config in configs:
        if config.more_views:
            _check_exists(config)
    try:
        if first.address is not None or default_workers(first):
            return extract_on_ray(configs, manifest)
        return extract_with([create_encoder(config) for config in configs], configs, manifest)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted: what was committed to {first.cache} stays, blocks that were not finished are dropped. "
            "Run the same command again to go on"
        ) from None


def _check_common(configs: Sequence[ExtractConfig]) -> None:
    """ConfigError where encoders cannot share what is decoded, or two would write the same cache."""
    first = configs[0]
    for config in configs[1:]:
        theirs = replace(config.views, resize=first.views.resize, crop_size=first.views.crop_size)
        if theirs != first.views:
            raise ConfigError(
                f"{config.backbone} has other views than {first.backbone}, and clips are decoded once for both: "
                "extract them one after the other, or pass the views"
            )
    if len({config.cache for config in configs}) < len(configs):
        raise ConfigError("the same backbone is given twice: give each once")


def _check_exists(config: ExtractConfig) -> None:
    """CacheError where there is no cache that views could be appended to."""
    if not (config.cache / "zarr.json").is_file():
        raise CacheError(
            f"{config.cache} does not exist, and --views +{config.more_views} appends to a cache that does: "
            f"--train-views {config.views.train_views + config.more_views} makes one with as many views"
        )


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


def extract_with(
    encoders: Sequence[SpatialEncoder], configs: Sequence[ExtractConfig], manifest: Manifest
) -> list[ExtractSummary]:
    """`extract_all` in this process, with encoders that are loaded already."""
    loaded = [(encoder.backbone, encoder.weights_file) for encoder in encoders]
    with _held_caches(configs, manifest, loaded) as caches, torch_threads(configs[0].torch_threads):
        targets = [Target(*each) for each in zip(encoders, caches, configs, strict=True)]
        return _complete(configs, caches, partial(run_inline, BlockExtractor(targets)))


def extract_on_ray(
    configs: Sequence[ExtractConfig],
    manifest: Manifest,
    *,
    extractor: type[BlockExtractor] = BlockExtractor,
) -> list[ExtractSummary]:
    """`extract_all` in Ray workers; `extractor` is what computes and commits blocks in them."""
    from vivit.stage1_extract.ray_engine import ray_workers

    first = configs[0]
    if first.address is None:
        # of a cluster in the environment only where workers were asked for
        address = os.environ.get("RAY_ADDRESS") if first.workers else None
        workers = default_workers(first)
        configs = [replace(config, workers=workers, address=address or None) for config in configs]
    with (
        ray_workers(configs, extractor) as engine,
        _held_caches(configs, manifest, engine.encoders()) as caches,
    ):
        return _complete(configs, caches, partial(engine.run, caches))


@contextmanager
def _held_caches(
    configs: Sequence[ExtractConfig], manifest: Manifest, loaded: Sequence[tuple[Backbone, Location | None]]
) -> Iterator[list[FeatureCache]]:
    """The caches of these configurations, for these encoders and the files of their weights."""
    with ExitStack() as held:
        yield [
            held.enter_context(_held_cache(config, manifest, *encoder))
            for config, encoder in zip(configs, loaded, strict=True)
        ]


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
        if config.more_views:
            cache = _with_more_views(config, cache)
        if unpublished := cache.unpublished_views:
            logger.info(
                "%s: training views %d to %d are being appended; they count when all clips have them",
                cache.path,
                unpublished.start,
                unpublished.stop - 1,
            )
        yield cache


def _with_more_views(config: ExtractConfig, cache: FeatureCache) -> FeatureCache:
    """The cache, told to get the views that are appended: counted from --train-views, so that the same command again
    never appends them twice."""
    wanted = config.views.train_views + config.more_views
    before = cache.view_ranges("train")[-1].stop
    if wanted <= before:
        logger.info(
            "%s has or is getting %d training views, at least the %d + %d asked for: none are added (--views +%d "
            "would append one more)",
            cache.path, before, config.views.train_views, config.more_views, before + 1 - config.views.train_views,
        )  # fmt: skip
        return cache
    cache.append_views(wanted)
    return FeatureCache.open(cache.path, allow_partial=True)


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


def _complete(
    configs: Sequence[ExtractConfig], caches: Sequence[FeatureCache], engine: Engine
) -> list[ExtractSummary]:
    """Let an engine do what is missing in caches that are held; `outcomes.parquet` is written whatever comes."""
    config = configs[0]
    todo = missing_work(caches, part=config.part, retry_failed=config.retry_failed)
    failed = set[tuple[str, int]]().union(*map(_failed_rows, caches))
    again = {(work.split, row) for work in todo if work.is_retry for row in work.rows}
    with event_log(config.log_json) as log:
        tally = Tally(failed=failed - again, max_failures=config.max_failures, log=log)
        log.write(
            "begin", caches=[cache.path for cache in caches], blocks=len(todo),
            clips=sum(len(work.rows) for work in todo), config=describe(config),
        )  # fmt: skip
        for work in todo:
            if not work.rows:
                commit(caches, without_rows(caches, work))
        try:
            engine([work for work in todo if work.rows], tally)
        except BaseException as error:
            log.write("stop", cause=f"{type(error).__name__}: {error}")
            raise
        finally:
            caches = [_published(cache) for cache in caches]
            for cache in caches:
                write_outcomes(cache)
                if config.part is not None:
                    _complete_outcomes(cache)
        for cache in caches:
            if config.part is None and (missing := cache.missing(unpublished=True)):
                raise BlockError(
                    f"{cache.path}: {missing}, though the run committed all: another process wrote there, or files were "
                    "removed. Run the same command again"
                )
        done = Counter(target for work in todo for target in work.targets)
        summaries = [_summary(cache, tally, done[target]) for target, cache in enumerate(caches)]
        for summary in summaries:
            log.write(
                "end", cache=summary.cache, clips=summary.clips, outcomes=summary.outcomes,
                blocks_done=summary.blocks_done, blocks_kept=summary.blocks_kept, crops=summary.crops,
                seconds=round(summary.seconds, 3), shares=summary.limits, size_bytes=summary.size_bytes,
                missing=summary.missing,
            )  # fmt: skip
    return summaries


def _published(cache: FeatureCache) -> FeatureCache:
    """The cache as it is now, appended views shown where every clip has them."""
    # opened again: workers and other parts have committed blocks
    cache = FeatureCache.open(cache.path, allow_partial=True)
    if cache.publish_views():
        cache = FeatureCache.open(cache.path, allow_partial=True)
        logger.info("%s: training clips have %d views now", cache.path, cache.settings.views.train_views)
    return cache


def _complete_outcomes(cache: FeatureCache) -> None:
    """Write `outcomes.parquet` again where another part finished the cache meanwhile: its table may have been replaced by
    the older one of this process. While blocks are missing, those who commit them write it later."""
    now = FeatureCache.open(cache.path, allow_partial=True)
    table = outcomes_table(now)
    if table["outcome"].null_count == 0 and not table.equals(outcomes_table(cache)):
        write_outcomes(now)


def _failed_rows(cache: FeatureCache) -> set[tuple[str, int]]:
    """(split, row) of the clips that lack features in some committed view."""
    return {
        (split, row)
        for split in cache.splits
        for views in cache.view_ranges(split)
        for row, record in enumerate(cache.records(split, views))
        if record is not None and not record.usable
    }


def _failures(cache: FeatureCache) -> list[tuple[str, ClipRecord]]:
    """(split, record) of every clip that is not complete, and of those that have features in the first views only."""
    found = []
    for split in cache.splits:
        first = cache.records(split)
        found += [(split, r) for r in first if r is not None and not r.complete]
        for views in cache.view_ranges(split)[1:]:
            for before, record in zip(first, cache.records(split, views), strict=True):
                if record is not None and not record.usable and before is not None and before.usable:
                    which = f"in views {views.start} to {views.stop - 1}: {record.message}"
                    found.append((split, replace(record, message=which)))
    return found


def _summary(cache: FeatureCache, tally: Tally, blocks_done: int) -> ExtractSummary:
    """What was done; DataError where a finished cache holds no features at all."""
    records = [(split, r) for split in cache.splits for r in cache.records(split) if r is not None]
    missing = cache.missing(unpublished=True)
    if not missing and not any(record.usable for _, record in records):
        split, first = records[0]
        raise DataError(
            f"no clip could be read: all {len(records)} failed, the first is {first.clip_id} ({split}): "
            f"{first.outcome}, {first.message}"
        )
    whole = sum(
        cache.num_blocks(split) - len(cache.missing_blocks(split, views))
        for split in cache.splits
        for views in cache.view_ranges(split)
    )
    return ExtractSummary(
        cache=cache.path,
        clips={split: cache.shape(split)[0] for split in cache.splits},
        outcomes=Counter(record.outcome for _, record in records),
        failures=_failures(cache),
        blocks_done=blocks_done,
        blocks_kept=whole - blocks_done,
        seconds=tally.elapsed,
        crops=tally.crops,
        limits=tally.seconds.shares,
        workers=[worker.summary() for worker in tally.workers.values()],
        advice=tally.advice,
        size_bytes=cache.size_bytes(),
        missing=missing,
    )
