"""Train a whole video model on videos: the warm-up on few frames whose halves stage 1 and stage 2 start from."""

import hashlib
import json
import logging
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vivit.end_to_end.config import PretrainConfig
from vivit.end_to_end.factorised_encoder import FactorisedEncoder
from vivit.end_to_end.video_batches import VideoBatches
from vivit.end_to_end.video_logits import Reading, video_logits
from vivit.end_to_end.video_models import VideoModel, create_video_model, take_image_weights
from vivit.pipeline.backbones import PRETRAINED, LoadedBackbone, load_backbone, weights_sha256
from vivit.pipeline.checkpoint import FACTORISED_ENCODER, JOINT, Checkpoint, SpatialConfig
from vivit.pipeline.device import resolve_precision
from vivit.pipeline.errors import ConfigError, DataError
from vivit.pipeline.local_copy import local_file
from vivit.pipeline.manifest import UNKNOWN, Clip, Manifest
from vivit.pipeline.outcome import Outcome
from vivit.stage1_extract.clip_reader import CropSettings, default_decode_threads
from vivit.stage1_extract.encoder import Normalise
from vivit.stage1_extract.extract import check_videos
from vivit.stage2_temporal.fit import Report, fit, resume
from vivit.stage2_temporal.init_source import read_source
from vivit.stage2_temporal.initialisation import initialise, write_origins
from vivit.stage2_temporal.interruption import before_first_step
from vivit.stage2_temporal.joint_head import JOINT_HEAD, Pairs, pairs_of, with_joint_head
from vivit.stage2_temporal.learner import Learner, fresh_model
from vivit.stage2_temporal.parallel import (
    gathered,
    local_world_size,
    own_device,
    process_group,
    rank,
    world_size,
)
from vivit.stage2_temporal.run_folder import PRETRAIN, RUN_FORMAT, RunFolder
from vivit.stage2_temporal.train import LIBRARIES
from vivit.stage2_temporal.validation import best_epoch, validation_metrics

logger = logging.getLogger(__name__)

_VALIDATION_VIEWS = 16
"""Views per forward pass of validation."""


@dataclass(frozen=True)
class PretrainResult:
    """What a training came to."""

    run: Path
    steps: int
    """Steps from the first epoch to the last."""
    resumed_from: int
    """Step that this call went on from; 0 for a fresh run."""
    num_clips: int
    """Labelled clips of the training split."""
    left_out: dict[str, int]
    """Of the readings of clips in this process, those that failed, by outcome."""
    trained_parameters: int
    history: list[dict[str, Any]]
    """Metrics of each epoch, as in metrics.jsonl."""
    best: dict[str, Any]
    """Metrics of the epoch whose weights are in model.safetensors."""


@dataclass(frozen=True)
class _Setup:
    """What a training consists of, before its first step."""

    config: PretrainConfig
    manifest: Manifest
    image: LoadedBackbone
    spatial: SpatialConfig
    rest: dict[str, Any]
    device: torch.device
    precision: str

    @property
    def pairs(self) -> Pairs | None:
        """Classes of the joint head, where there is one."""
        return pairs_of(self.rest)

    @property
    def reading(self) -> Reading:
        """How clips are read for validation: one central view."""
        config = self.config
        views = replace(config.views, test_clips=1, test_crops=1)
        return Reading(
            data_root=config.data_root,
            settings=replace(self.crops, views=views),
            normalise=self.normalise,
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            budget_bytes=config.decode_memory_mb << 20,
        )

    @property
    def crops(self) -> CropSettings:
        config = self.config
        return CropSettings(
            views=config.views,
            seed=config.seed,
            interpolation=self.spatial.interpolation,
            timeout_sec=config.clip_timeout_sec,
        )

    @property
    def normalise(self) -> Normalise:
        return Normalise(self.spatial.mean, self.spatial.std, self.device)

    @property
    def threads(self) -> int:
        local = default_decode_threads(self.device.type) // local_world_size()
        return self.config.decode_threads or max(1, local)


def pretrain(config: PretrainConfig, report: Report | None = None) -> PretrainResult:
    """Train until the last epoch; the same call goes on where an interrupted one stopped.

    Under torchrun every process calls this, with its own GPU; each reads and learns from its share of every batch.
    Raises InterruptedRunError, with the state saved, after SIGINT or SIGTERM, DataError where nothing can be learnt.
    """
    device = own_device(config.device)
    run = RunFolder(config.run)
    with (
        process_group(device),
        run.lock() if rank() == 0 else nullcontext(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        with before_first_step():
            setup = _set_up(config, device)
            clips, labels = _labelled(setup.manifest, config.train_split)
            if setup.pairs is not None:
                labels[JOINT_HEAD] = setup.pairs.labels(labels["verb"], labels["noun"])
            _check_processes(config, len(clips))
            model = fresh_model(
                lambda: create_video_model(config.model, setup.spatial, setup.rest), config.seed
            )
            origins = _initialise(model, setup)
            if rank() == 0:
                run.claim(_description(setup))
            if isinstance(model, FactorisedEncoder) and config.freeze != "none":
                model.freeze(config.freeze)
            _recompute(model, config.checkpoint_gradients)
            batches = VideoBatches(
                clips,
                labels,
                config.data_root,
                setup.crops,
                batch_size=config.batch_size,
                normalise=setup.normalise,
                device=device,
                threads=setup.threads,
                budget_bytes=config.decode_memory_mb << 20,
            )
            learner = Learner(
                config,
                model,
                device=device,
                precision=setup.precision,
                steps_per_epoch=batches.steps_per_epoch,
            )
            state = resume(run, learner)
        resumed_from = state.step
        if rank() == 0 and not state.step:
            logger.info("%s", _parameters_in_words(model))
            write_origins(origins, run.path)
        if state.step < learner.total_steps:
            validate = partial(_validate, setup) if _can_validate(setup) else None
            fit(
                learner, batches, state, run,
                config=config, validate=validate, keep=partial(_keep, setup, run), report=report,
            )  # fmt: skip
    return PretrainResult(
        run=config.run,
        steps=state.step,
        resumed_from=resumed_from,
        num_clips=len(clips),
        left_out={name: count for name, count in batches.outcomes.items() if not Outcome(name).usable},
        trained_parameters=sum(p.numel() for p in learner.model.parameters() if p.requires_grad),
        history=state.history,
        best=best_epoch(state.history),
    )


def default_run_name(config: PretrainConfig, dataset: str) -> str:
    """A name that the same command on the same data gets again, so that it goes on where it stopped."""
    precision = resolve_precision(config.precision, own_device(config.device))
    identity = json.dumps([config.identity(), precision], sort_keys=True, default=str)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return f"{dataset}-{config.model}-{config.views.num_frames}f-{digest[:8]}"


def _set_up(config: PretrainConfig, device: torch.device) -> _Setup:
    manifest = Manifest.read(config.manifest)
    check_videos(manifest, config.data_root)
    if config.train_split not in manifest.splits:
        raise DataError(
            f"{config.manifest} has no split {config.train_split!r} to train on: it has {', '.join(manifest.splits)}"
        )
    if not manifest.heads:
        raise DataError(f"{config.manifest} has no labels: it needs a column label/<head>")
    image = load_backbone(config.backbone, weights=config.weights, crop_size=_native_size(config))
    tubelet = config.tubelet or image.config.tubelet
    if config.views.num_frames % tubelet:
        raise ConfigError(f"num_frames {config.views.num_frames} is not a multiple of the tubelet {tubelet}")
    size = config.views.crop_size
    spatial = replace(image.config, tubelet=tubelet, image_size=(size, size))
    heads = {head: len(names) for head, names in manifest.heads.items()}
    time = config.views.num_frames // tubelet
    if config.model == FACTORISED_ENCODER:
        dim = int(getattr(image.model, "num_features"))  # noqa: B009 (Module's own type is Tensor)
        pairs = None
        if config.joint_head:
            pairs = Pairs.seen(_labelled(manifest, config.train_split)[1], manifest.heads)
        rest = config.temporal_model(dim=dim, time=time, **with_joint_head(heads, pairs)).to_dict()
    else:
        pooling = "token" if config.model == JOINT else "mean"
        rest = {
            "time": time, "heads": heads, "pooling": pooling, "order": config.order, "drop_path": config.drop_path,
        }  # fmt: skip
    return _Setup(config, manifest, image, spatial, rest, device, resolve_precision(config.precision, device))


def _native_size(config: PretrainConfig) -> int:
    """Crop size that the image ViT is loaded with: its own where it is timm's, so that positions are resized here."""
    if config.weights != PRETRAINED or local_file(config.backbone).exists():
        return config.views.crop_size
    import timm

    from vivit.pipeline.backbones import timm_id

    known = timm.get_pretrained_cfg(timm_id(config.backbone))
    return known.input_size[-1] if known is not None else config.views.crop_size


def _labelled(manifest: Manifest, split: str) -> tuple[list[Clip], dict[str, npt.NDArray[np.int32]]]:
    """Clips with a label in at least one head, and their labels [clip]."""
    labels = manifest.labels(split)
    rows = np.flatnonzero(np.any([values != UNKNOWN for values in labels.values()], axis=0))
    if not len(rows):
        raise DataError(f"split {split!r} has no labelled clip")
    clips = manifest.of_split(split)
    return [clips[row] for row in rows.tolist()], {head: values[rows] for head, values in labels.items()}


def _can_validate(setup: _Setup) -> bool:
    split = setup.config.validation_split
    if split is None or split not in setup.manifest.splits:
        return False
    labels = setup.manifest.labels(split)
    has_labels = any((values != UNKNOWN).any() for values in labels.values())
    if not has_labels:
        logger.warning("split %s has no labelled clips: the last epoch is kept, not the best", split)
    return has_labels


def _check_processes(config: PretrainConfig, num_clips: int) -> None:
    """ConfigError where a process would have nothing to learn from."""
    if config.batch_size < world_size():
        raise ConfigError(
            f"a batch of {config.batch_size} clips is too small for {world_size()} processes: raise --batch-size"
        )
    if num_clips < world_size():
        raise ConfigError(f"{num_clips} clips are too few for {world_size()} processes: start fewer")


def _initialise(model: VideoModel, setup: _Setup) -> dict[str, str]:
    """Where each tensor of the model comes from."""
    origins = take_image_weights(model, setup.image.model, setup.spatial, inflation=setup.config.inflation)
    name = f"{setup.image.config.name} ({setup.image.source})"
    origins = {tensor: origin.replace("the image ViT", name) for tensor, origin in origins.items()}
    if isinstance(model, FactorisedEncoder):
        classes = setup.manifest.heads
        source = read_source(setup.config.init, setup.image)
        return initialise(model, source, classes) | origins
    return dict.fromkeys(model.state_dict(), "fresh") | origins


def _parameters_in_words(model: VideoModel) -> str:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]] += parameter.numel() * parameter.requires_grad
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    return f"trained parameters: {parts}, in all {counts.total():,}"


def _recompute(model: VideoModel, is_wanted: bool) -> None:
    if isinstance(model, FactorisedEncoder):
        vit: Any = model.spatial
        vit.set_grad_checkpointing(is_wanted)
    else:
        model.grad_checkpointing = is_wanted


def _validate(setup: _Setup, model: nn.Module) -> dict[str, float]:
    """Accuracy on one central view of each validation clip; every process reads its share."""
    split = setup.config.validation_split
    assert split is not None
    clips, labels = _labelled(setup.manifest, split)
    rows = np.arange(len(clips))[rank() :: world_size()]
    own = [clips[row] for row in rows]
    logits, records = video_logits(model, own, setup.reading, batch_size=_VALIDATION_VIEWS)
    read = rows[[record.usable for record in records]] if records else rows[:0]
    return _metrics_of(gathered((read, logits)), labels, setup.pairs)


def _metrics_of(
    parts: Sequence[tuple[npt.NDArray[np.int64], Mapping[str, npt.NDArray[np.float32]]]],
    labels: Mapping[str, npt.NDArray[np.int32]],
    pairs: Pairs | None,
) -> dict[str, float]:
    parts = [part for part in parts if len(part[0])]
    if not parts:
        return {}
    rows = np.concatenate([rows for rows, _ in parts])
    logits = {head: np.concatenate([values[head] for _, values in parts]) for head in parts[0][1]}
    return validation_metrics(logits, {head: values[rows] for head, values in labels.items()}, pairs)


def _keep(setup: _Setup, run: RunFolder, model: nn.Module, metrics: Mapping[str, Any]) -> None:
    Checkpoint(
        model=setup.config.model,
        spatial=setup.spatial,
        rest=setup.rest,
        classes=setup.manifest.heads,
        source=f"vivit pretrain, run {run.path.name}",
        views=setup.config.views.to_dict(),
        metrics=metrics,
        tensors=model.state_dict(),
    ).write(run.model_path)


def _description(setup: _Setup) -> dict[str, Any]:
    """config.json: what the run is, as JSON values."""
    config, manifest = setup.config, setup.manifest
    labels = hashlib.sha256()
    for split in manifest.splits:
        for head, values in sorted(manifest.labels(split).items()):
            labels.update(f"{split} {head}".encode() + values.astype("<i4").tobytes())
    return {
        "format": RUN_FORMAT,
        "kind": PRETRAIN,
        "training": config.identity() | {"precision": setup.precision, "processes": world_size()},
        "model": {
            "model": config.model,
            "spatial": setup.spatial.to_dict(),
            "rest": setup.rest,
            "image_weights_sha256": weights_sha256(setup.image.model),
        },
        "heads": manifest.heads,
        "dataset": manifest.dataset,
        "data": {"manifest_sha256": manifest.sha256, "labels_sha256": labels.hexdigest()},
        "manifest": str(config.manifest.resolve()),
        "data_root": str(config.data_root.resolve()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }
