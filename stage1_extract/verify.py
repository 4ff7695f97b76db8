"""`vivit verify`: a cache checked in full, a sample of it computed anew, and what is bad taken out of the ledger."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from vivit.pipeline.cache_check import CacheCheck, Finding, check_cache
from vivit.pipeline.cache_store import ledger_name
from vivit.pipeline.datasets import find_data_root
from vivit.pipeline.errors import ConfigError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.storage import Location
from vivit.stage1_extract.extract import check_videos
from vivit.stage1_extract.live_sample import Comparison, compare_sample


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What is checked."""

    cache: Location
    """Folder or URL of the feature cache, `<name>.zarr`."""
    repair: bool = False
    """Take bad blocks out of the ledger, so that `vivit extract` computes them anew."""
    sample: int = 0
    """Clips that are decoded and encoded once more. 0, since a check of what is stored needs neither videos nor weights
    nor a GPU, and can run wherever the cache lies."""
    seed: int = 0
    """Seed of the choice of the sample."""
    data_root: Location | None = None
    """Folder or URL of the videos, for a sample; None looks for the data set's."""
    weights: str | None = None
    """`pretrained`, `random` or a file: the encoder's weights, where those that the cache records moved."""
    device: str = "auto"
    """Of the sample's encoder: auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """Threads that read and hash; 0 is two per core."""
    is_shown: bool = True
    """Whether progress is shown."""

    def __post_init__(self) -> None:
        for name in ("sample", "threads", "seed"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name} must be at least 0, got {value}")


@dataclass
class VerifyReport:
    """What a check found, and what was done about it."""

    cache: Location
    check: CacheCheck
    sample: list[Comparison] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    """Ledger entries that were taken out."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing or wrong."""
        return self.check.is_whole

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "cache": str(self.cache),
            "whole": self.is_whole,
            "missing": self.check.missing,
            "splits": {split: asdict(count) for split, count in self.check.splits.items()},
            "findings": [asdict(finding) for finding in self.check.findings],
            "leftovers": self.check.leftovers,
            "sample": [asdict(comparison) for comparison in self.sample],
            "repaired": self.repaired,
            "seconds": round(self.check.seconds, 3),
        }


def verify(config: VerifyConfig) -> VerifyReport:
    """Check a cache; with `repair` it is held for writing meanwhile, CacheError where another process writes it."""
    cache = FeatureCache.open(config.cache, allow_partial=True)
    with cache.lock() if config.repair else nullcontext():
        cache = FeatureCache.open(config.cache, allow_partial=True)
        report = VerifyReport(
            config.cache, check_cache(cache, threads=config.threads, is_shown=config.is_shown)
        )
        if config.sample:
            report.sample = _sample(config, cache, report.check)
        if config.repair:
            report.repaired = _repair(cache, report.check.findings)
    return report


def _sample(config: VerifyConfig, cache: FeatureCache, check: CacheCheck) -> list[Comparison]:
    """A sample of the clips, with what is wrong in it among the findings of `check`.

    Nothing is drawn from a block that has findings already: its features cannot be trusted, or not even be read.
    """
    data_root = config.data_root or find_data_root(cache.manifest.dataset)
    check_videos(cache.manifest, data_root)
    bad = {(finding.split, finding.block) for finding in check.findings}
    found = compare_sample(
        cache, config.sample, data_root=data_root, weights=config.weights, device=config.device,
        seed=config.seed, leave_out=bad, is_shown=config.is_shown,
    )  # fmt: skip
    for comparison in found:
        if comparison.problem:
            check.add([_sample_finding(cache, comparison)])
    return found


def _sample_finding(cache: FeatureCache, comparison: Comparison) -> Finding:
    block = comparison.row // cache.settings.block_size
    name = ledger_name(comparison.split, block, cache.view_ranges(comparison.split)[0])
    problem = f"has clip {comparison.clip_id}, which {comparison.problem}"
    return Finding(split=comparison.split, block=block, path=name, problem=problem, ledger=name)


def _repair(cache: FeatureCache, findings: list[Finding]) -> list[str]:
    """Take the ledger entries of all findings out, and name them."""
    names = sorted({finding.ledger for finding in findings if finding.ledger is not None})
    for name in names:
        cache.withdraw(name)
    return names
