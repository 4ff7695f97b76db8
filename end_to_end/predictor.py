"""A whole trained model, from pixels to class scores, however it was trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vivit.end_to_end.factorised_encoder import FactorisedEncoder
from vivit.end_to_end.video_logits import Reading
from vivit.end_to_end.video_models import load_video_model
from vivit.pipeline.backbones import LoadedBackbone, load_backbone, weights_sha256
from vivit.pipeline.cache_settings import CacheSettings
from vivit.pipeline.checkpoint import Checkpoint, SpatialConfig, is_checkpoint, model_file, resize_for
from vivit.pipeline.device import resolve_device, resolve_precision
from vivit.pipeline.errors import CheckpointError, ConfigError
from vivit.pipeline.local_copy import local_copy
from vivit.pipeline.storage import Location, location
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.clip_reader import CropSettings, default_decode_threads
from vivit.stage1_extract.encoder import Normalise
from vivit.stage2_temporal.evaluate import is_model, known_classes, load_model
from vivit.stage2_temporal.joint_head import JOINT_HEAD, Pairs, pairs_of
from vivit.stage2_temporal.run_folder import RunFolder
from vivit.stage2_temporal.time_sampling import TimeSampling


@dataclass(frozen=True)
class Predictor:
    """A model in evaluation mode, and how it wants its videos."""

    path: Path
    """Run folder or model file."""
    model: nn.Module
    """Maps a video [batch, channel, frame, height, width] to logits [batch, class] per head."""
    spatial: SpatialConfig
    views: ViewSpec
    """Frames and crops that it was trained on; test views are those of `views.test_clips` and `test_crops`."""
    classes: Mapping[str, list[str] | int]
    """Names of the classes of each head in id order, or their number where they have no names."""
    epoch: int
    """Epoch of the weights; 0 where it is not known."""
    pairs: Pairs | None = None
    """Classes of the joint head, where there is one; it is not among `classes`."""

    def names(self, head: str) -> list[str]:
        """Names of the classes of a head; made up where they are not known."""
        if self.pairs is not None and head == JOINT_HEAD:
            verbs, nouns = self.names("verb"), self.names("noun")
            return [f"{verbs[verb]} {nouns[noun]}" for verb, noun in self.pairs.split()]
        classes = self.classes[head]
        return [f"{head} {i}" for i in range(classes)] if isinstance(classes, int) else classes

    def reading(
        self, data_root: Location, *, device: str = "auto", precision: str = "auto", threads: int = 0
    ) -> Reading:
        """How videos below `data_root` are read for the model, which is brought to the device."""
        place = resolve_device(device)
        self.model.to(place)
        return Reading(
            data_root=data_root,
            settings=CropSettings(views=self.views, seed=0, interpolation=self.spatial.interpolation),
            normalise=Normalise(self.spatial.mean, self.spatial.std, place),
            device=place,
            precision=resolve_precision(precision, place),
            threads=threads or default_decode_threads(place.type),
        )


def load_predictor(
    path: Path, *, backbone: str | None = None, default: ViewSpec | None = None, **views: Any
) -> Predictor:
    """The model of a run folder or a model file.

    `backbone`: file of the frozen spatial encoder of a stage-2 run, where that moved. `default`: views for a model that
    does not know those of its training (imported weights). `views`: fields of ViewSpec to use in place of those of the
    training. CheckpointError where parts are missing.
    """
    if not is_model(path):
        return _of_stage2(path, backbone, views)
    stored = Checkpoint.read(path)
    if not stored.rest.get("heads"):
        raise CheckpointError(
            f"{path} has no classifier, so it can label nothing: use it as a start of training"
        )
    model = load_video_model(stored)
    return Predictor(
        path=path,
        model=model,
        spatial=stored.spatial,
        views=_views_of(stored, default or ViewSpec(), views),
        classes=known_classes(stored),
        epoch=int(stored.metrics.get("epoch", 0)),
        pairs=pairs_of(stored.rest),
    )


def _views_of(stored: Checkpoint, default: ViewSpec, given: Mapping[str, Any]) -> ViewSpec:
    """The views of a model file, and what it does not say from `default`."""
    if stored.views:
        known = ViewSpec.from_dict(dict(stored.views))
    else:
        size = stored.spatial.crop_size
        num_frames = stored.rest["time"] * stored.spatial.tubelet
        resize = default.resize if default.crop_size == size else resize_for(size)
        known = replace(default, num_frames=num_frames, resize=resize, crop_size=size)
    views = replace(known, **given)
    if views.num_frames != known.num_frames or views.crop_size != known.crop_size:
        raise ConfigError(
            f"{stored.source} looks at {known.num_frames} frames of {known.crop_size} pixels, "
            f"not at {views.num_frames} of {views.crop_size}"
        )
    return views


def _of_stage2(path: Path, backbone: str | None, given: Mapping[str, Any]) -> Predictor:
    """Both halves of a stage-2 run: its own, and the frozen encoder that made its cache."""
    run = RunFolder(path)
    config = run.read_config()
    settings = CacheSettings.from_dict(config["cache"]["settings"])
    views = replace(settings.views, **given)
    if (views.num_frames, views.crop_size) != (settings.views.num_frames, settings.views.crop_size):
        raise ConfigError(
            f"{path} was trained on views of {settings.views.num_frames} frames of {settings.views.crop_size} pixels"
        )
    frozen = _frozen_backbone(path, settings, backbone, config["cache"].get("weights_file"))
    half, epoch = load_model(run)
    # stochastic depth is for training, and asks for a ViT
    config_here = replace(half.config, drop_path=0.0)
    model = FactorisedEncoder(frozen.model, settings.backbone.tubelet, config_here)
    missing = model.load_state_dict(half.state_dict(), strict=False).missing_keys
    assert all(name.startswith("spatial.") for name in missing)
    training = config["training"]
    if training.get("num_frames") is not None:
        sampling = TimeSampling.of(settings.num_times, half.config.time, training["frame_sampling"])
        model.used_times = sampling.of_middle
    pairs = pairs_of(half.config.to_dict())
    return Predictor(path, model.eval(), frozen.config, views, config["heads"], epoch, pairs)


def _frozen_backbone(
    path: Path, settings: CacheSettings, given: str | None, recorded: str | None
) -> LoadedBackbone:
    """The encoder that made the run's cache; CheckpointError where it is another or cannot be found."""
    made_of, crop_size = settings.backbone, settings.views.crop_size
    source, _, name = made_of.weights.partition(":")
    file = location(given if given is not None else recorded or name)
    if given is None and source != "file":
        loaded = load_backbone(made_of.name, weights=source, crop_size=crop_size)
    elif not file.exists():
        raise CheckpointError(
            f"{file} is not there, and the spatial encoder of {path} came from {recorded or made_of.weights}: "
            "pass its file with --backbone FILE"
        )
    elif is_checkpoint(model_file(local_copy(file))):
        loaded = load_backbone(str(file.resolve()), crop_size=crop_size)
    else:
        loaded = load_backbone(made_of.name, weights=str(file), crop_size=crop_size)
    if weights_sha256(loaded.model) != made_of.weights_sha256 or not made_of.computes_like(loaded.config):
        raise CheckpointError(
            f"{file if source == 'file' or given else made_of.name} is not the encoder that {path} was trained on: "
            f"pass the --backbone that made its cache ({made_of.name}, {made_of.weights})"
        )
    return loaded
