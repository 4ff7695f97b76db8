"""A run on disk: its configuration, the weights to use, the state to go on from, and the metrics of each epoch.

config.json          everything needed to rebuild the model, and what it was trained on
model.safetensors    the weights that evaluation uses: best validation, else the last epoch
last/state.safetensors   model, optimizer, average, step and metrics so far: what a run goes on from
metrics.jsonl        one line per epoch
tensorboard/         the same as curves
evaluation/          scores and per-clip logits of each evaluated split
.lock                held while a training writes here
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vivit.pipeline.cache_settings import flattened
from vivit.pipeline.device import resolve_device, resolve_precision
from vivit.pipeline.errors import CheckpointError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.folder_lock import folder_lock
from vivit.pipeline.storage import Location, location
from vivit.pipeline.tensor_file import read_tensors, write_tensors
from vivit.pipeline.workspace import storage_errors, write_atomically
from vivit.stage2_temporal.config import TrainConfig

logger = logging.getLogger(__name__)

RUN_FORMAT = 1
TEMPORAL, PRETRAIN = "temporal", "pretrain"
"""Kinds of runs: a temporal half on a cache, and an end-to-end training on videos."""
_COMPARED = ("kind", "training", "model", "heads", "data", "cache.settings")
"""Parts of the configuration that must be equal for a run to go on."""
_REQUIRED: dict[str, dict[str, type]] = {
    TEMPORAL: {
        "training": dict,
        "model": dict,
        "heads": dict,
        "data": dict,
        "cache": dict,
        "cache.path": str,
        "cache.identity": str,
        "cache.settings": dict,
    },
    PRETRAIN: {
        "training": dict,
        "model": dict,
        "heads": dict,
        "data": dict,
        "manifest": str,
        "data_root": str,
    },
}
"""Parts of the configuration that are read again, each after the one that holds it."""
_MAX_VALUE_LENGTH = 80


@dataclass
class TrainingState:
    """Where a training is; with the tensors, all that it needs to go on."""

    step: int = 0
    """Steps done."""
    loss_sum: float = 0.0
    """Sum of the losses of this epoch's steps."""
    seconds: float = 0.0
    """Time spent in this epoch."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of the epochs that are done."""


def default_run_name(config: TrainConfig) -> str:
    """A name that the same command on the same cache gets again, so that it goes on where it stopped."""
    cache = FeatureCache.open(config.cache, allow_partial=True)
    precision = resolve_precision(config.precision, resolve_device(config.device))
    # The cache's identity is about features; its labels may be exchanged, and then the run is another one.
    identity = [cache.identity, _labels_digest(cache, config), config.identity(), precision]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{config.cache.stem}-{digest[:8]}"


def _labels_digest(cache: FeatureCache, config: TrainConfig) -> str:
    """Digest of the class names and of the labels of the splits that a training uses."""
    digest = hashlib.sha256(json.dumps(cache.manifest.heads, sort_keys=True).encode())
    for split in (config.train_split, config.validation_split):
        for head, values in sorted(cache.manifest.labels(split).items() if split else ()):
            digest.update(f"{split} {head}".encode() + values.astype("<i4").tobytes())
    return digest.hexdigest()


def cache_of(run: Path) -> Location:
    """The cache that a run was trained on; CheckpointError where it is gone, or was none."""
    config = RunFolder(run).read_config()
    if "cache" not in config:
        raise CheckpointError(f"{run} was trained on videos, not on a cache: pass --cache")
    path = location(config["cache"]["path"])
    if not path.exists():
        raise CheckpointError(f"the cache that {run} was trained on, {path}, is not there: pass --cache")
    return path


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.json"
        self.model_path = path / "model.safetensors"
        self.state_path = path / "last" / "state.safetensors"
        self.metrics_path = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.evaluation = path / "evaluation"

    def read_config(self) -> dict[str, Any]:
        """The run's configuration; CheckpointError where there is none."""
        if not self.config_path.is_file():
            raise CheckpointError(
                f"{self.path} is not a run: it has no config.json; pass a run folder with --run"
            )
        try:
            config: dict[str, Any] = json.loads(self.config_path.read_bytes())
            found = config["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.config_path} is damaged ({error}): restore it, or train again with another --run"
            ) from error
        if found != RUN_FORMAT:
            raise CheckpointError(
                f"{self.config_path} has format {found}; this vivit reads format {RUN_FORMAT}: train again"
            )
        for part, wanted in _REQUIRED.get(config.get("kind", TEMPORAL), {"kind": int}).items():
            value: Any = config
            for name in part.split("."):
                value = value.get(name)
            if not isinstance(value, wanted):
                raise CheckpointError(
                    f"{self.config_path} is damaged (it has no {part}): restore it, or train again with another --run"
                )
        return config

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one training; CheckpointError where another does. A killed process holds nothing."""
        remedy = "wait for it, or pass --run NAME to start another"
        with folder_lock(self.path, CheckpointError, remedy) as is_held:
            if is_held:
                self._clean()
            yield

    def _clean(self) -> None:
        """Remove what a killed training had begun to write; an evaluation may be writing in its folder now."""
        for folder in (self.path, self.state_path.parent):
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)

    def claim(self, config: Mapping[str, Any]) -> None:
        """Make the folder for `config`, or go on in one that was made for an equal one; else CheckpointError."""
        config = json.loads(json.dumps(config))
        if self.config_path.exists():
            if differences := config_differences(self.read_config(), config):
                raise CheckpointError(
                    f"{self.path} was trained with other settings:\n  " + "\n  ".join(differences) + "\n"
                    "pass the run's settings to go on with it, or --run NAME to start another"
                )
            return
        if self.state_path.exists() or self.model_path.exists():
            raise CheckpointError(
                f"{self.path} has weights but no config.json: restore that file, or pass --run NAME to start another"
            )
        with storage_errors(self.path):
            write_atomically(self.config_path, json.dumps(config, indent=1, allow_nan=False).encode())

    def save_state(self, tensors: Mapping[str, Tensor], state: TrainingState) -> None:
        """Write the state, then the metrics, which follow from it."""
        write_tensors(self.state_path, tensors, vars(state))
        self.write_metrics(state.history)

    def load_state(self) -> tuple[dict[str, Tensor], TrainingState] | None:
        """What to go on from; None for a run that has saved nothing yet."""
        if not self.state_path.exists():
            return None
        remedy = f"delete {self.state_path.parent} to train again from the start"
        tensors, about = read_tensors(self.state_path, remedy=remedy)
        try:
            return tensors, TrainingState(**about)
        except TypeError as error:
            raise CheckpointError(
                f"{self.state_path} is not a training's state ({error}): {remedy}"
            ) from error

    def save_model(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        write_tensors(self.model_path, tensors, about)

    def load_model(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights that evaluation uses, and the metrics of their epoch."""
        remedy = "run the command that trained it again"
        if self.model_path.exists():
            remedy = f"delete {self.state_path.parent} and run the command that trained it again"
        return read_tensors(self.model_path, remedy=remedy)

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """The file is written whole, so that an epoch that was run twice stands in it once."""
        lines = "".join(json.dumps(epoch, allow_nan=False) + "\n" for epoch in history)
        with storage_errors(self.metrics_path):
            write_atomically(self.metrics_path, lines.encode())


def config_differences(run: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """`training.epochs: 30 in the run, 50 asked for`, one entry for each value that decides the weights."""
    there, here = flattened(run), flattened(asked)
    compared = [key for key in there | here if f"{key}.".startswith(tuple(f"{part}." for part in _COMPARED))]
    return [
        f"{key}: {_short(there.get(key))} in the run, {_short(here.get(key))} asked for"
        for key in compared
        if there.get(key) != here.get(key)
    ]


def _short(value: Any) -> str:
    text = f"{len(value)} values {value}" if isinstance(value, list) and len(value) > 4 else f"{value}"
    return text if len(text) <= _MAX_VALUE_LENGTH else text[: _MAX_VALUE_LENGTH - 3] + "..."
