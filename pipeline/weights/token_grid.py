"""From the number of tokens to the size of a crop, and the other way."""

import math
from pathlib import Path
from typing import Any

from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights.request import by

DEFAULT_IMAGE_SIZE = (224, 224)
"""Crop of every public ViViT but that for Something-Something."""


def image_size_of(
    path: Path, tokens: int, patch: tuple[int, int], asked: tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width of a crop that is cut into `tokens` patches: `asked`, or a square grid of patches."""
    if asked is not None:
        if _patches(path, asked, patch) != tokens:
            raise WeightsError(
                f"{path} has {tokens} tokens per frame, but {by(asked)} pixels are "
                f"{_patches(path, asked, patch)} patches of {by(patch)}: pass the --image-size that it was trained with"
            )
        return asked
    side = math.isqrt(tokens)
    if tokens < 1 or side * side != tokens:
        raise WeightsError(f"{path} has {tokens} tokens per frame, which is not a square: pass --image-size")
    return side * patch[0], side * patch[1]


def time_of(path: Path, tokens: int, patch: tuple[int, int], image_size: tuple[int, int]) -> int:
    """Number of times of a model with `tokens` over space and time."""
    patches = _patches(path, image_size, patch)
    if tokens < 1 or tokens % patches:
        raise WeightsError(
            f"{path} has {tokens} tokens, which are not a whole number of frames of {by(image_size)} pixels "
            f"({patches} patches of {by(patch)}): pass the --image-size that it was trained with"
        )
    return tokens // patches


def patch_option(patch: tuple[int, int]) -> Any:
    """timm's `patch_size`, as a JSON value."""
    return patch[0] if patch[0] == patch[1] else list(patch)


def _patches(path: Path, image_size: tuple[int, int], patch: tuple[int, int]) -> int:
    if any(size % part for size, part in zip(image_size, patch, strict=True)):
        raise WeightsError(
            f"{path} has patches of {by(patch)} pixels, which {by(image_size)} pixels are no multiple of: "
            "pass another --image-size"
        )
    return math.prod(size // part for size, part in zip(image_size, patch, strict=True))
