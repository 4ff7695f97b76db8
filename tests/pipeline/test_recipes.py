"""The recipes against the table of the reference's public configurations, and how they are overridden."""

import dataclasses
from typing import Any

import pytest

from vivit.end_to_end.config import PretrainConfig
from vivit.pipeline.recipes import RECIPES, recipe_of
from vivit.pipeline.views import ViewSpec

BENCHMARKS = [
    "ek100",
    "k400",
    "k600",
    "k700",
    "ssv2",
    "mit",
    "something-else",
    "ucf101",
    "hmdb51",
    "diving48",
]

COMMON = {
    "num_frames": 32, "scale_min": 0.9, "scale_max": 1.33, "flip": 0.5, "resize": 256, "crop_size": 224, "stride": 2,
    "test_clips": 4, "test_crops": 3, "augment": "reference-colour", "batch_size": 64, "optimizer": "sgd",
    "weight_decay": 0.0, "clip_grad": 1.0, "warmup_epochs": 2.5, "epochs": 30, "mixup": 0.0, "label_smoothing": 0.0,
    "drop_path": 0.0,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "k400": COMMON | {"learning_rate": 0.05},
    "k600": COMMON | {"learning_rate": 0.1},
    "ssv2": COMMON
    | {
        "stride": 1, "resize": 288, "crop_size": 256, "augment": "reference-randaugment-n2-m20", "mixup": 0.3,
        "label_smoothing": 0.3, "drop_path": 0.3, "learning_rate": 0.4, "epochs": 35, "flip": 0.0,
    },
    "ek100": COMMON
    | {
        "stride": 1, "augment": "reference-randaugment-n2-m15", "mixup": 0.1, "label_smoothing": 0.2, "drop_path": 0.2,
        "learning_rate": 0.5, "epochs": 50, "test_crops": 1,
    },
}  # fmt: skip
NEAREST = {
    "k700": "k600", "mit": "k400", "something-else": "ssv2", "ucf101": "k400", "hmdb51": "k400", "diving48": "k400",
}  # fmt: skip


def test_every_benchmark_has_a_recipe() -> None:
    assert sorted(RECIPES) == sorted(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_recipe_has_a_source_and_the_values_that_it_states(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.name == name
    assert "google-research/scenic" in recipe.source
    assert recipe.source.startswith("no public configuration") == (name in NEAREST)
    values = vars(recipe.views) | recipe.training
    assert values == values | PUBLISHED[NEAREST.get(name, name)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_recipe_sets_fields_that_exist(name: str) -> None:
    known = {field.name for field in dataclasses.fields(PretrainConfig)}
    assert set(recipe_of(name).training) <= known


def test_labels_that_say_left_and_right_are_not_mirrored_and_the_recipe_says_so() -> None:
    for name in ("ssv2", "something-else"):
        assert recipe_of(name).views.flip == 0
        assert any("the source mirrors half" in note for note in recipe_of(name).notes)


@pytest.mark.parametrize("name", ["folder", "webdataset", "demo", "mine"])
def test_other_data_sets_have_the_defaults_of_the_classes(name: str) -> None:
    recipe = recipe_of(name)
    assert (recipe.name, recipe.views, dict(recipe.training)) == ("generic", ViewSpec(), {})


def test_a_variant_has_the_recipe_of_its_data_set() -> None:
    assert recipe_of("ucf101:split2") is recipe_of("ucf101")


def test_what_was_overridden_is_said() -> None:
    recipe = recipe_of("ssv2")
    views = vars(recipe.views)
    assert recipe.summary(views, views).startswith(
        f"recipe ssv2 ({recipe.source})\n  the source mirrors half"
    )
    said = recipe.summary(views, views | {"stride": 2, "augment": "none"})
    wanted = "; overridden: stride 1 -> 2, augment reference-randaugment-n2-m20 -> none\n"
    assert wanted in said


def test_values_that_belong_to_another_value_go_with_it() -> None:
    recipe = recipe_of("ek100")
    assert recipe.training_with({}) == recipe.training
    adamw = recipe.training_with({"optimizer": "adamw"})
    assert not {"learning_rate", "weight_decay"} & set(adamw)
    assert adamw["mixup"] == 0.1
    assert recipe.training_with({"optimizer": "sgd"}) == recipe.training
    assert recipe.training_with({"optimizer": "adamw", "learning_rate": 1e-3})["learning_rate"] == 1e-3
    assert "warmup_epochs" not in recipe.training_with({"epochs": 2})
