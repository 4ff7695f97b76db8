"""What runs in a Ray worker: the encoder, and blocks that are computed and committed with it."""

import faulthandler
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vivit.pipeline.cache_settings import Backbone
from vivit.pipeline.errors import CacheError, DataError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.storage import Location
from vivit.stage1_extract.blocks import (
    BlockExtractor,
    BlockReport,
    ComputedBlock,
    Target,
    Work,
    create_encoder,
)
from vivit.stage1_extract.clip_reader import HANG_FACTOR, CropStream
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.encoder import SpatialEncoder
from vivit.stage1_extract.ray_decode import RayCropStream, check_node
from vivit.stage1_extract.tally import InWork

_BEAT_SEC = 5.0
_STDERR = 2
"""The descriptor: in a worker `sys.stderr` may be no file."""
_STUCK_SEC = 20.0
"""A worker is never given up sooner."""

BlockKey = tuple[str, int]
"""Split and number of a block."""


@dataclass(frozen=True)
class Loaded:
    """What a worker says of itself."""

    name: str
    """Node and process."""
    encoders: list[tuple[Backbone, Location | None]]
    """Each encoder, and the file of its weights."""


@dataclass(frozen=True)
class Mark:
    """A file of this run in its caches: a worker that does not see it would write elsewhere."""

    name: str
    token: str
    video: Path | None
    """A video that the driver sees."""


class Worker:
    """What runs in a process of its own: encoders, and from `open` on their caches.

    Calls come in several threads; the encoders work for one at a time.
    """

    def __init__(self) -> None:
        self._encoding = threading.Lock()
        self._in_work: dict[BlockKey, InWork] = {}

    def load(self, configs: Sequence[ExtractConfig]) -> Loaded:
        """Load the encoders."""
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        self._config = configs[0]
        torch.set_num_threads(self._config.torch_threads)
        self._loaded = [(create_encoder(config), config) for config in configs]
        _die_when_stuck(max(_STUCK_SEC, HANG_FACTOR * self._config.clip_timeout_sec))
        encoders = [(encoder.backbone, encoder.weights_file) for encoder, _ in self._loaded]
        return Loaded(f"{platform.node()}:{os.getpid()}", encoders)

    def open(self, mark: Mark, extractor: type[BlockExtractor]) -> None:
        """Open the caches to write; an error where they are others than the driver's."""
        self._witness = mark.video
        self._extractor = extractor([_target(encoder, config, mark) for encoder, config in self._loaded])

    def block(self, work: Work) -> BlockReport:
        """Compute and commit a block; it is decoded while the encoder works for another one."""
        with self._stream() as stream:
            crops = stream.read([self._extractor.clips(work)])
            with self._encoding, self._counted(work) as done:

                def on_clip(_record: object, count: int) -> None:
                    done.clips += 1
                    done.crops += count

                computed = self._extractor.compute(work, crops, seconds=done.seconds, on_clip=on_clip)
                check_node(computed.records, self._witness)
                with computed.seconds.of("write"):
                    self._extractor.commit(computed)
        return computed.report

    def rows(self, work: Work) -> ComputedBlock:
        """Compute some rows of a block, and do not commit them."""
        with self._stream() as stream, self._encoding:
            computed = self._extractor.compute(work, stream.read([self._extractor.clips(work)]))
            check_node(computed.records, self._witness)
            return computed

    def pulse(self) -> dict[BlockKey, InWork]:
        """What is done of the blocks in work; answered beside the work."""
        return dict(self._in_work)

    def _stream(self) -> CropStream | RayCropStream:
        torch.set_num_threads(self._config.torch_threads)  # holds for a thread
        if not self._config.decode_workers:
            return self._extractor.stream()
        return RayCropStream(
            self._config.data_root,
            self._extractor.crop_settings,
            processes=self._config.decode_workers,
            budget_bytes=self._config.decode_memory_mb << 20,
            witness=self._witness,
        )

    @contextmanager
    def _counted(self, work: Work) -> Iterator[InWork]:
        key = work.split, work.block
        self._in_work[key] = InWork()
        try:
            yield self._in_work[key]
        finally:
            del self._in_work[key]


def _target(encoder: SpatialEncoder, config: ExtractConfig, mark: Mark) -> Target:
    """The cache of a configuration, opened to write; an error where it is another one than the driver's."""
    node = platform.node()
    shared = f"worker on {node}: the cache and the videos must be on a file system that all workers share"
    try:
        token = (config.cache / mark.name).read_text()
    except OSError:
        token = ""
    if token != mark.token:
        raise CacheError(f"{config.cache} is another folder for a {shared}")
    if mark.video is not None and not mark.video.is_file():
        raise DataError(f"{mark.video} does not exist for a {shared}")
    cache = FeatureCache.open(config.cache, allow_partial=True)
    mine = config.settings(cache.settings.dataset, cache.settings.manifest_sha256, encoder.backbone)
    if differences := mine.differences(cache.settings):
        raise CacheError(
            f"a worker on {node} would write other features than the cache holds: " + "; ".join(differences)
        )
    return Target(encoder, cache, config)


def _die_when_stuck(limit_sec: float) -> None:
    """End the process when no Python code has run for this long, which is when native code hangs and keeps the lock.

    The clock is C code that needs no lock. A death is what the driver knows how to handle.
    """

    def beat() -> None:
        while True:
            faulthandler.dump_traceback_later(limit_sec, exit=True, file=_STDERR)
            time.sleep(_BEAT_SEC)

    threading.Thread(target=beat, name="beat", daemon=True).start()
