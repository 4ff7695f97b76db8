"""The operations of `torchvision.transforms.v2.RandAugment`, with draws that are given instead of taken from torch."""

import math
from collections.abc import Callable, Sequence

import torchvision.transforms.v2.functional as F
from torch import Tensor

LAYER_DRAWS = 2
"""Numbers in [0, 1) for each layer: which operation, and its sign."""
MOST_MAGNITUDE = 30


def randaugment(video: Tensor, draws: Sequence[float], *, magnitude: int) -> Tensor:
    """uint8 RGB [frame, channel, height, width] after one operation for each `LAYER_DRAWS` of the draws."""
    level = magnitude / MOST_MAGNITUDE
    for start in range(0, len(draws), LAYER_DRAWS):
        which, sign = draws[start : start + LAYER_DRAWS]
        video = OPERATIONS[int(which * len(OPERATIONS))](video, level, -1.0 if sign <= 0.5 else 1.0)
    return video


def identity(video: Tensor, _level: float, _sign: float) -> Tensor:
    return video


def shear_x(video: Tensor, level: float, sign: float) -> Tensor:
    return _affine(video, shear=[math.degrees(math.atan(sign * 0.3 * level)), 0.0], center=[0.0, 0.0])


def shear_y(video: Tensor, level: float, sign: float) -> Tensor:
    return _affine(video, shear=[0.0, math.degrees(math.atan(sign * 0.3 * level))], center=[0.0, 0.0])


def translate_x(video: Tensor, level: float, sign: float) -> Tensor:
    return _affine(video, translate=[_shift(video.shape[3], level, sign), 0])


def translate_y(video: Tensor, level: float, sign: float) -> Tensor:
    return _affine(video, translate=[0, _shift(video.shape[2], level, sign)])


def rotate(video: Tensor, level: float, sign: float) -> Tensor:
    return F.rotate(video, angle=sign * 30 * level)


def brightness(video: Tensor, level: float, sign: float) -> Tensor:
    return F.adjust_brightness(video, 1 + sign * 0.9 * level)


def color(video: Tensor, level: float, sign: float) -> Tensor:
    return F.adjust_saturation(video, 1 + sign * 0.9 * level)


def contrast(video: Tensor, level: float, sign: float) -> Tensor:
    return F.adjust_contrast(video, 1 + sign * 0.9 * level)


def sharpness(video: Tensor, level: float, sign: float) -> Tensor:
    return F.adjust_sharpness(video, 1 + sign * 0.9 * level)


def posterize(video: Tensor, level: float, _sign: float) -> Tensor:
    return F.posterize(video, bits=8 - round(4 * level))


def solarize(video: Tensor, level: float, _sign: float) -> Tensor:
    return F.solarize(video, threshold=255 * (1 - level))


def auto_contrast(video: Tensor, _level: float, _sign: float) -> Tensor:
    return F.autocontrast(video)


def equalize(video: Tensor, _level: float, _sign: float) -> Tensor:
    return F.equalize(video)


def _shift(side: int, level: float, sign: float) -> int:
    return int(sign * 150 / 331 * side * level)


def _affine(
    video: Tensor,
    *,
    translate: Sequence[float] = (0.0, 0.0),
    shear: Sequence[float] = (0.0, 0.0),
    center: list[float] | None = None,
) -> Tensor:
    return F.affine(video, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear), center=center)


OPERATIONS: tuple[Callable[[Tensor, float, float], Tensor], ...] = (
    identity, shear_x, shear_y, translate_x, translate_y, rotate, brightness, color, contrast, sharpness, posterize,
    solarize, auto_contrast, equalize,
)  # fmt: skip
"""Of (video, magnitude from 0 to 1, sign). Their order decides the bytes of caches: append only."""
