"""Scores of a run on a split of a cache: all views averaged, and what was left out said beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vivit.pipeline.backbones import tensors_sha256
from vivit.pipeline.checkpoint import FACTORISED_ENCODER, Checkpoint
from vivit.pipeline.device import resolve_device, resolve_precision
from vivit.pipeline.errors import CheckpointError, ConfigError, DataError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.storage import Location
from vivit.pipeline.workspace import nearest
from vivit.stage2_temporal.evaluation import Evaluation, Logits
from vivit.stage2_temporal.joint_head import JOINT_HEAD, Pairs, pairs_of
from vivit.stage2_temporal.loader import Features, Rows
from vivit.stage2_temporal.model import ModelConfig, TemporalModel
from vivit.stage2_temporal.report_options import ReportOptions
from vivit.stage2_temporal.reporting import ScoredSplit, check_clips, check_options, report
from vivit.stage2_temporal.run_folder import PRETRAIN, RunFolder, config_differences
from vivit.stage2_temporal.scoring import AVERAGES, Average, clip_logits
from vivit.stage2_temporal.time_sampling import TimeSampling, time_sampling

_MATCHED = (
    "backbone.weights_sha256",
    "backbone.options",
    "backbone.embed_dim",
    "backbone.tubelet",
    "backbone.pooling",
    "backbone.mean",
    "backbone.std",
    "backbone.interpolation",
    "views.num_frames",
    "views.stride",
    "views.fps",
    "views.resize",
    "views.crop_size",
)
"""Settings of a cache that decide what a feature means; the number of test views is free."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ReportOptions):
    """What is evaluated, and how."""

    run: Path
    """Run folder whose weights are used, or a model file."""
    cache: Location
    """Feature cache with the split."""
    split: str = "validation"
    """Split to evaluate."""
    average: Average = "logits"
    """What is averaged over views: `logits`, as the reference does, or `softmax` (probabilities)."""
    max_views: int | None = None
    """Use the first views only; None uses all that are stored."""
    batch_size: int = 256
    """Views per forward pass."""
    device: str = "auto"
    """`auto` (a GPU if there is one), or a device as PyTorch names it."""
    precision: str = "auto"
    """`float32`, `bfloat16` (autocast), or `auto`: bfloat16 on a GPU, else float32."""
    memory_budget_bytes: int | None = 0
    """Bytes of features that may stay in memory; each is used once, so they are read as they are needed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average not in AVERAGES:
            raise nearest(self.average, list(AVERAGES), "average")
        for name in ("max_views", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class _Trained:
    """A temporal model that fits a cache."""

    model: TemporalModel
    epoch: int
    sampling: TimeSampling
    output: Path
    """Folder for its scores."""

    @property
    def pairs(self) -> Pairs | None:
        """Classes of the joint head, where there is one."""
        return pairs_of(self.model.config.to_dict())


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate the weights of a run or model file on a cache, and write the scores and the logits of each clip."""
    cache = FeatureCache.open(config.cache, allow_partial=config.allow_partial)
    trained = _of_model_file(config.run, cache) if is_model(config.run) else _of_run(config.run, cache)
    if config.split not in cache.splits:
        raise DataError(
            f"{cache.path} has no split {config.split!r}: it has {', '.join(cache.splits)}: pass --split"
        )
    rows = cache.usable_rows(config.split)
    if not len(rows):
        raise DataError(
            f"split {config.split!r} of {cache.path} has no usable clip; the outcomes stand in its ledger"
        )
    check_options(config, cache.manifest, trained.pairs)
    check_clips(config, cache.manifest, config.split, rows)
    logits, num_views = _logits(config, cache, rows, trained.model, trained.sampling)
    scored = ScoredSplit(
        manifest=cache.manifest,
        split=config.split,
        rows=rows,
        logits=logits,
        records=cache.records(config.split),
        num_views=num_views,
        pairs=trained.pairs,
    )
    return report(
        scored,
        config,
        trained.output,
        run=str(config.run),
        cache=str(config.cache),
        cache_identity=cache.identity,
        average=config.average,
        epoch=trained.epoch,
    )


def is_model(path: Path) -> bool:
    """Whether `path` is a whole model, a file or the run of an end-to-end training, and not a stage-2 run."""
    return path.is_file() or RunFolder(path).read_config().get("kind") == PRETRAIN


def output_folder(path: Path) -> Path:
    """Folder for the scores of a run, or of a model file (beside it)."""
    return RunFolder(path).evaluation if path.is_dir() else path.with_name(f"{path.stem}-evaluation")


def _of_run(path: Path, cache: FeatureCache) -> _Trained:
    run = RunFolder(path)
    about = run.read_config()
    check_fit(about, cache, run=path)
    model, epoch = load_model(run)
    return _Trained(model, epoch, run_sampling(about, cache), output_folder(path))


def _of_model_file(path: Path, cache: FeatureCache) -> _Trained:
    """The temporal half of a Factorised Encoder, on features that its own spatial half made."""
    stored = Checkpoint.read(path)
    if stored.model != FACTORISED_ENCODER:
        raise CheckpointError(
            f"{path} ({stored.model}) has no temporal half that could look at features: leave out --cache, "
            "and pass the videos with --manifest or --dataset"
        )
    if tensors_sha256(stored.part("spatial.")) != cache.settings.backbone.weights_sha256:
        raise CheckpointError(
            f"{cache.path} was not made with the spatial half of {path}: extract with --backbone {path}"
        )
    spatial = stored.spatial
    trained = {
        "backbone": {
            "options": dict(spatial.options),
            "tubelet": spatial.tubelet,
            "mean": list(spatial.mean),
            "std": list(spatial.std),
            "interpolation": spatial.interpolation,
        },
        "views": {**stored.views, "crop_size": spatial.crop_size},
    }
    config = ModelConfig.from_dict(dict(stored.rest))
    if config.time != cache.settings.num_times:
        raise CheckpointError(
            f"{path} looks at {config.time} time steps, {cache.path} has {cache.settings.num_times}: extract with "
            f"--num-frames {config.time * spatial.tubelet}, or train on the cache with --init {path}"
        )
    _check_matched(trained, cache, run=path)
    check_classes(known_classes(stored), cache.manifest.heads, run=path, other=cache.path)
    model = TemporalModel(config)
    model.load_state_dict({k: v for k, v in stored.tensors.items() if not k.startswith("spatial.")})
    return _Trained(
        model, int(stored.metrics.get("epoch", 0)), TimeSampling(num_times=config.time), output_folder(path)
    )


def known_classes(stored: Checkpoint) -> dict[str, list[str] | int]:
    """Per head of a model file the names of its classes, or their number where it has no names.

    A joint head is not among them: its classes are pairs of those of the others.
    """
    own = JOINT_HEAD if stored.rest.get("pairs") is not None else None
    return {
        head: stored.classes.get(head) or number
        for head, number in stored.rest["heads"].items()
        if head != own
    }


def load_model(run: RunFolder) -> tuple[TemporalModel, int]:
    """The model that a run keeps, and the epoch that its weights are of."""
    tensors, metrics = run.load_model()
    try:
        model = TemporalModel(ModelConfig.from_dict(run.read_config()["model"]))
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{run.config_path} does not describe a model ({error}): restore it, or train again with another --run"
        ) from error
    try:
        model.load_state_dict(tensors)
        return model, int(metrics["epoch"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{run.model_path} does not fit {run.config_path} ({error}): restore both, or train again with another --run"
        ) from error


def check_fit(run_config: Mapping[str, Any], cache: FeatureCache, *, run: Path) -> None:
    """CheckpointError where the cache's features or classes are not those that the run was trained on."""
    trained = run_config["cache"]
    if trained["identity"] != cache.identity:
        _check_matched(trained["settings"], cache, run=run)
    check_classes(run_config["heads"], cache.manifest.heads, run=run, other=cache.path)


def _check_matched(trained: Mapping[str, Any], cache: FeatureCache, *, run: Path) -> None:
    """CheckpointError where features of the cache mean something else than those in the settings `trained`.

    Only settings that `trained` has are compared; an encoder without options is one from before they were recorded.
    """
    there, here = _values(trained), _values(cache.settings.to_dict())
    differences = [
        f"{key}: {there[key]} in the run, {here[key]} in the cache"
        for key in _MATCHED
        if key in there and there[key] != here[key]
    ]
    if differences:
        raise CheckpointError(
            f"{cache.path} does not hold the features that {run} was trained on:\n  "
            + "\n  ".join(differences)
            + "\nextract with the run's settings, or pass another --cache"
        )


def _values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names."""
    return {
        f"{part}.{name}": value
        for part in ("backbone", "views")
        for name, value in settings.get(part, {}).items()
    }


def check_classes(
    trained: Mapping[str, list[str] | int], found: Mapping[str, list[str]], *, run: Path, other: Location
) -> None:
    """CheckpointError where the classes of `other` (a cache or manifest) are not those that a run was trained on.

    Of a head whose classes have no names (a number stands for them) only the number is compared.
    """
    known = {
        head: found[head] if head in found and len(found[head]) == names else names
        for head, names in trained.items()
    }
    if differences := config_differences({"heads": known}, {"heads": found}):
        what = "cache" if other.is_dir() else "manifest"
        listed = "\n  ".join(differences).replace(" asked for", f" in the {what}")
        raise CheckpointError(
            f"{other} has other classes than {run} was trained on:\n  {listed}\n"
            f"make its manifest with the run's class lists, or pass another {what}"
        )


def run_sampling(run_config: Mapping[str, Any], cache: FeatureCache) -> TimeSampling:
    """The time steps that a run looks at; all for a run from before it could look at fewer."""
    training = run_config["training"]
    return time_sampling(cache, training.get("num_frames"), training.get("frame_sampling") or "stride")


def _logits(
    config: EvaluateConfig, cache: FeatureCache, rows: Rows, model: TemporalModel, sampling: TimeSampling
) -> tuple[Logits, int]:
    device = resolve_device(config.device)
    budget = config.memory_budget_bytes
    features = Features(cache, config.split, rows, device=device, budget_bytes=budget, sampling=sampling)
    num_views = min(config.max_views or features.num_views, features.num_common_views)
    logits = clip_logits(
        model.to(device),
        features,
        device=device,
        precision=resolve_precision(config.precision, device),
        average=config.average,
        num_views=num_views,
        batch_size=config.batch_size,
    )
    return logits, num_views
