"""The operations of `torchvision.transforms.v2.RandAugment`, with draws that are given instead of taken from torch."""

# mypy: disable-error-code="no-any-return"
# (torchvision has no types)

import math
from collections.abc import Callable, Sequence

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

LAYER_DRAWS = 2
"""Numbers in [0, 1) for each layer: which operation, and its sign."""
_NUM_BINS = 31


def randaugment(video: Tensor, draws: Sequence[float], *, magnitude: int) -> Tensor:
    """uint8 RGB [frame, channel, height, width] after one operation for each `LAYER_DRAWS` of the draws."""
    for start in range(0, len(draws), LAYER_DRAWS):
        which, sign = draws[start : start + LAYER_DRAWS]
        video = OPERATIONS[int(which * len(OPERATIONS))](video, magnitude, -1.0 if sign <= 0.5 else 1.0)
    return video


def identity(video: Tensor, _magnitude: int, _sign: float) -> Tensor:
    return video


def shear_x(video: Tensor, magnitude: int, sign: float) -> Tensor:
    return _affine(
        video, shear=[math.degrees(math.atan(sign * _level(0.3, magnitude))), 0.0], center=[0.0, 0.0]
    )


def shear_y(video: Tensor, magnitude: int, sign: float) -> Tensor:
    return _affine(
        video, shear=[0.0, math.degrees(math.atan(sign * _level(0.3, magnitude)))], center=[0.0, 0.0]
    )


def translate_x(video: Tensor, magnitude: int, sign: float) -> Tensor:
    return _affine(video, translate=[int(sign * _level(150 / 331 * video.shape[3], magnitude)), 0])


def translate_y(video: Tensor, magnitude: int, sign: float) -> Tensor:
    return _affine(video, translate=[0, int(sign * _level(150 / 331 * video.shape[2], magnitude))])


def rotate(video: Tensor, magnitude: int, sign: float) -> Tensor:
    return F.rotate(video, angle=sign * _level(30, magnitude))


def brightness(video: Tensor, magnitude: int, sign: float) -> Tensor:
    return F.adjust_brightness(video, 1 + sign * _level(0.9, magnitude))


def color(video: Tensor, magnitude: int, sign: float) -> Tensor:
    return F.adjust_saturation(video, 1 + sign * _level(0.9, magnitude))


def contrast(video: Tensor, magnitude: int, sign: float) -> Tensor:
    return F.adjust_contrast(video, 1 + sign * _level(0.9, magnitude))


def sharpness(video: Tensor, magnitude: int, sign: float) -> Tensor:
    return F.adjust_sharpness(video, 1 + sign * _level(0.9, magnitude))


def posterize(video: Tensor, magnitude: int, _sign: float) -> Tensor:
    return F.posterize(video, bits=8 - round(4 * magnitude / (_NUM_BINS - 1)))


def solarize(video: Tensor, magnitude: int, _sign: float) -> Tensor:
    return F.solarize(video, threshold=255 * _level(0, magnitude, first=1))


def auto_contrast(video: Tensor, _magnitude: int, _sign: float) -> Tensor:
    return F.autocontrast(video)


def equalize(video: Tensor, _magnitude: int, _sign: float) -> Tensor:
    return F.equalize(video)


def _level(last: float, magnitude: int, first: float = 0) -> float:
    """That of torchvision's evenly spaced bins, whose last bits decide how pixels are rounded."""
    return float(torch.linspace(first, last, _NUM_BINS)[magnitude])


def _affine(
    video: Tensor,
    *,
    translate: Sequence[float] = (0.0, 0.0),
    shear: Sequence[float] = (0.0, 0.0),
    center: list[float] | None = None,
) -> Tensor:
    return F.affine(video, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear), center=center)


OPERATIONS: tuple[Callable[[Tensor, int, float], Tensor], ...] = (
    identity, shear_x, shear_y, translate_x, translate_y, rotate, brightness, color, contrast, sharpness, posterize,
    solarize, auto_contrast, equalize,
)  # fmt: skip
"""Of (video, magnitude from 0 to 30, sign). Their order decides the bytes of caches: append only."""
