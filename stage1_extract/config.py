"""What `vivit extract` is asked for."""

from dataclasses import dataclass, field
from typing import Any

from vivit.pipeline.backbones import PRETRAINED
from vivit.pipeline.cache_settings import Backbone, CacheSettings
from vivit.pipeline.errors import ConfigError
from vivit.pipeline.storage import Location, is_url
from vivit.pipeline.views import ViewSpec


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to extract, and how to go about it."""

    cache: Location
    """Folder or URL of the feature cache, `<name>.zarr`."""
    data_root: Location
    """Folder or URL that the manifest's video paths start from."""
    backbone: str = "vit_b16"
    """Short name or timm id of the frozen encoder, or a model file or run folder that holds one."""
    weights: str = PRETRAINED
    """`pretrained`, `random`, or a file."""
    views: ViewSpec = field(default_factory=ViewSpec)
    more_views: int = 0
    """Training views to append to a cache that exists: it is to have `views.train_views` and this many more."""
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
    workers: int | None = None
    """Ray workers; 0 is this process; None is 0, or one per GPU on a machine with several or on a cluster."""
    address: str | None = None
    """HOST:PORT of a Ray cluster, or `auto` for the one that runs on this machine."""
    gpus_per_worker: float | None = None
    """GPUs of each Ray worker, below 1 to share one; None is 1 where there are GPUs, 0 elsewhere."""
    torch_threads: int = 0
    """Threads of the encoder on the CPU; 0 is torch's choice, and for Ray workers an equal share of the cores."""
    decode_workers: int = 0
    """Processes that decode for each block that a Ray worker has (two at most), on whatever nodes have cores free; 0
    decodes in the worker's threads."""
    log_json: str | None = None
    """File that gets what happens as JSON lines, `-` for standard error; None is none."""

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("block_size", 1),
            ("decode_threads", 0),
            ("decode_memory_mb", 0),
            ("torch_threads", 0),
            ("decode_workers", 0),
            ("more_views", 0),
        ):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if self.clip_timeout_sec <= 0:
            raise ConfigError(f"clip_timeout_sec must be above 0, got {self.clip_timeout_sec}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ConfigError(f"part must be i/n with i from 1 to n, got {self.part[0]}/{self.part[1]}")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers must be at least 0, got {self.workers}")
        if self.workers == 0 and (self.address is not None or self.gpus_per_worker is not None):
            raise ConfigError(
                "workers 0 is this process: leave out the address and gpus_per_worker, or ask for workers"
            )
        if self.workers == 0 and self.decode_workers:
            raise ConfigError("decode_workers serve Ray workers: leave them out, or ask for workers above 0")
        share = self.gpus_per_worker
        if share is not None and (share < 0 or (share > 1 and share != int(share))):
            raise ConfigError(f"gpus_per_worker must be 0, a fraction of 1 or a whole number, got {share:g}")
        if self.log_json is not None and is_url(self.log_json):
            raise ConfigError(
                "log_json must be a file on this machine, not a URL: copy it when the run has ended"
            )
        if self.max_failures is not None and self.max_failures < 0:
            raise ConfigError(f"max_failures must be at least 0, got {self.max_failures}")

    def settings(self, dataset: str, manifest_sha256: str, backbone: Backbone) -> CacheSettings:
        """The identity of the cache that this configuration makes of a manifest with an encoder."""
        return CacheSettings(
            dataset=dataset,
            manifest_sha256=manifest_sha256,
            backbone=backbone,
            views=self.views,
            seed=self.seed,
            block_size=self.block_size,
            codec=self.codec,
        )


def describe(config: ExtractConfig) -> dict[str, Any]:
    """The configuration as `name: value` pairs for printing."""
    values = {name: value for name, value in vars(config).items() if name != "views"}
    return values | {f"views.{name}": value for name, value in vars(config.views).items()}
