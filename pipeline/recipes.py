"""Defaults per data set: how its clips are looked at, with the source of each choice."""

from dataclasses import dataclass, field

from vivit.pipeline.views import ViewSpec


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Defaults of a data set, overridable one by one."""

    views: ViewSpec = field(default_factory=ViewSpec)
    source: str
    """Where the values come from."""


_GENERIC = Recipe(source="ViViT's Kinetics configuration (google-research/scenic, projects/vivit)")
RECIPES = {
    "ek100": Recipe(
        views=ViewSpec(stride=1, test_clips=4, test_crops=1),
        source="ViViT's EPIC-KITCHENS-100 configuration; 4x1 views as in its model zoo's 43.6 % action top-1",
    ),
}


def recipe_of(dataset: str) -> Recipe:
    """The recipe of a data set; the generic one where it has none of its own."""
    return RECIPES.get(dataset, _GENERIC)
