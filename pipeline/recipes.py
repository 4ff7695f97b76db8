"""Defaults per data set, with the source of each: the reference's published configurations where it has one."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vivit.pipeline.views import ViewSpec

_BELONGS_TO = {"optimizer": ("learning_rate", "weight_decay"), "epochs": ("warmup_epochs",)}
"""Values of a recipe that say nothing where another one is overridden: a learning rate for SGD is none for AdamW."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Defaults of a data set, overridable one by one."""

    name: str
    """The data set, or `generic`."""
    source: str
    """Where the values come from."""
    notes: tuple[str, ...] = ()
    """Where they are not those of the source, and why."""
    views: ViewSpec = field(default_factory=ViewSpec)
    """Sampling, resize, crop, augmentation and test views, of `extract`, `pretrain` and `evaluate` on videos."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `pretrain` in place of those of its class: optimizer, schedule, regularisation."""

    def training_with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of `pretrain`: those given, and of the recipe's those that still have a meaning beside them."""
        values = dict(self.training)
        for name, dependent in _BELONGS_TO.items():
            if name in given and given[name] != values.get(name):
                for other in dependent:
                    values.pop(other, None)
        return values | dict(given)

    def summary(self, defaults: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
        """`recipe ssv2 (source); overridden: stride 1 -> 2`, and the notes on lines of their own."""
        return "\n  ".join(
            [with_overrides(f"recipe {self.name} ({self.source})", defaults, chosen), *self.notes]
        )


def with_overrides(text: str, defaults: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """The text, and `; overridden: stride 1 -> 2, epochs 30 -> 10` for what was chosen in the place of defaults."""
    changed = [
        f"{name} {default} -> {chosen[name]}"
        for name, default in defaults.items()
        if name in chosen and chosen[name] != default
    ]
    return text + ("; overridden: " + ", ".join(changed) if changed else "")


STAGE_2_SOURCE = (
    "vivit's own settings of stage 2 for every data set: the paper on frozen spatial encoders (arXiv 2306.04822) names none "
    "in what is available, and the reference's are for training end to end"
)
"""Where the defaults of `train-temporal` come from."""

_SCENIC = "google-research/scenic, projects/vivit"
_GENERIC = Recipe(
    name="generic", source=f"views of ViViT's Kinetics configuration, {_SCENIC}; no augmentation"
)

_SGD = {
    "optimizer": "sgd", "weight_decay": 0.0, "clip_grad": 1.0, "batch_size": 64, "epochs": 30, "warmup_epochs": 2.5,
    "mixup": 0.0, "label_smoothing": 0.0, "drop_path": 0.0,
}  # fmt: skip
"""What all public configurations say, and those of Kinetics where they differ."""
_NO_FLIP = "the source mirrors half of the training views; here flip is 0, since labels say left and right"

_K400 = Recipe(
    name="k400",
    source=f"ViViT-B Factorised Encoder on Kinetics-400, {_SCENIC}",
    notes=("learning_rate 0.05 is that of ViT-B; the source has 0.1 for ViT-L and for the joint model",),
    views=ViewSpec(augment="reference-colour"),
    training=_SGD | {"learning_rate": 0.05},
)
_K600 = Recipe(
    name="k600",
    source=f"ViViT-L Factorised Encoder on Kinetics-600, {_SCENIC}",
    views=_K400.views,
    training=_SGD | {"learning_rate": 0.1},
)
_SSV2 = Recipe(
    name="ssv2",
    source=f"ViViT-L Factorised Encoder on Something-Something v2, {_SCENIC}",
    notes=(_NO_FLIP,),
    views=ViewSpec(stride=1, resize=288, crop_size=256, flip=0.0, augment="reference-randaugment-n2-m20"),
    training=_SGD
    | {"learning_rate": 0.4, "epochs": 35, "mixup": 0.3, "label_smoothing": 0.3, "drop_path": 0.3},
)
_EK100 = Recipe(
    name="ek100",
    source=f"ViViT-L Factorised Encoder on EPIC-KITCHENS-100, {_SCENIC}",
    notes=("4x1 test views as in the source's table of results (43.6 % action top-1); its file says 4x3",),
    views=ViewSpec(stride=1, test_clips=4, test_crops=1, augment="reference-randaugment-n2-m15"),
    training=_SGD
    | {"learning_rate": 0.5, "epochs": 50, "mixup": 0.1, "label_smoothing": 0.2, "drop_path": 0.2},
)


def _as(name: str, nearest: Recipe, why: str) -> Recipe:
    """The recipe of a data set that the reference has no configuration for."""
    return replace(nearest, name=name, source=f"no public configuration; {why}: {nearest.source}")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _EK100,
        _K400,
        _K600,
        _as("k700", _K600, "the nearest is that of Kinetics-600"),
        _SSV2,
        _as("mit", _K400, "the nearest by kind of video is that of Kinetics-400"),
        _as("something-else", _SSV2, "the same videos are those of Something-Something v2"),
        _as("ucf101", _K400, "the nearest by kind of video is that of Kinetics-400"),
        _as("hmdb51", _K400, "the nearest by kind of video is that of Kinetics-400"),
        _as("diving48", _K400, "the nearest by kind of video is that of Kinetics-400"),
    )
}


def recipe_of(dataset: str) -> Recipe:
    """The recipe of a data set, or of a variant `<data set>:<variant>`; the generic one where it has none of its own."""
    return RECIPES.get(dataset.partition(":")[0], _GENERIC)
