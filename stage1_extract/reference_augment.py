"""The reference's colour augmentation and RandAugment for videos (google-research/scenic, projects/vivit).

Videos are uint8 RGB [frame, channel, height, width] throughout. As in the reference, RandAugment looks at all frames of a
view stacked into one tall picture. What it computes in floats is truncated to uint8 after each operation; the colours of
the colour augmentation stay floats there, and are rounded to uint8 once here.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

COLOUR_DRAWS = 6
LAYER_DRAWS = 3
"""Numbers in [0, 1) for the colour augmentation, and for each layer of RandAugment."""
COLOUR_PROBABILITY, GREY_PROBABILITY = 0.8, 0.1
_MOST_BRIGHTNESS, _MOST_HUE = 32 / 255, 0.2
_LEAST_FACTOR, _MOST_FACTOR = 0.6, 1.4
_LUMA = (0.2989, 0.587, 0.114)


# --- colour ---


def reference_colour(video: Tensor, draws: Sequence[float]) -> Tensor:
    """Colour jitter with a probability of 0.8; then, independently, grey with a probability of 0.1."""
    jitters, brightness, saturation, contrast, hue, greys = draws
    is_jittered, is_grey = jitters < COLOUR_PROBABILITY, greys < GREY_PROBABILITY
    if not (is_jittered or is_grey):
        return video
    colours = video.float() / 255
    if is_jittered:
        colours = jitter(
            colours,
            brightness=_MOST_BRIGHTNESS * (2 * brightness - 1),
            saturation=_between(_LEAST_FACTOR, _MOST_FACTOR, saturation),
            contrast=_between(_LEAST_FACTOR, _MOST_FACTOR, contrast),
            hue=_MOST_HUE * (2 * hue - 1),
        )
    if is_grey:
        colours = _luma(colours).expand_as(colours)
    return (colours * 255).round().to(torch.uint8)


def jitter(colours: Tensor, *, brightness: float, saturation: float, contrast: float, hue: float) -> Tensor:
    """Colours [frame, channel, height, width] in [0, 1], changed in this order and clipped.

    `brightness` is added, `hue` too, in turns; `saturation` and `contrast` are factors, `contrast` about the mean of each
    channel of each frame.
    """
    colours = with_hue(
        with_contrast(with_saturation(colours + brightness, saturation), contrast),
        hue,
    )
    return colours.clamp(0, 1)


def with_saturation(colours: Tensor, factor: float) -> Tensor:
    """The saturation of HSV times `factor`, at most 1: the brightest channel stays, the others move away from it."""
    high, low = colours.amax(1, keepdim=True), colours.amin(1, keepdim=True)
    most = high / (high - low)  # to a saturation of 1; infinite for grey, where nothing moves
    moved = torch.where(high > 0, most.clamp(max=factor), 0)
    return high - (high - colours) * moved


def with_contrast(colours: Tensor, factor: float) -> Tensor:
    """Distances from the mean of each channel of each frame times `factor`."""
    # float64: a float32 mean would depend on how the sum is split over threads
    mean = colours.mean((2, 3), keepdim=True, dtype=torch.float64).float()
    return (colours - mean) * factor + mean


def with_hue(colours: Tensor, turns: float) -> Tensor:
    """The hue of HSV plus `turns`, with the same value and range of the channels."""
    high, low = colours.amax(1, keepdim=True), colours.amin(1, keepdim=True)
    spread = high - low
    red, green, blue = _channels(colours)
    sixths = torch.where(
        red == high,
        (green - blue) / spread,
        torch.where(green == high, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )
    sixths = torch.where(spread > 0, sixths, 0) + 6 * turns
    places = [(offset + sixths) % 6 for offset in (5, 3, 1)]
    return torch.cat([high - spread * torch.minimum(at, 4 - at).clamp(0, 1) for at in places], dim=1)


def _luma(colours: Tensor) -> Tensor:
    red, green, blue = _channels(colours)
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def _channels(colours: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Red, green and blue [frame, 1, height, width]."""
    return colours[:, :1], colours[:, 1:2], colours[:, 2:]


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw


# --- RandAugment ---


def reference_randaugment(video: Tensor, draws: Sequence[float], *, magnitude: int) -> Tensor:
    """One operation for each `LAYER_DRAWS` of the draws, any of 12 with equal probability."""
    for start in range(0, len(draws), LAYER_DRAWS):
        which, *place = draws[start : start + LAYER_DRAWS]
        video = OPERATIONS[int(which * len(OPERATIONS))](video, magnitude, place)
    return video


def identity(video: Tensor, _magnitude: int, _place: Sequence[float]) -> Tensor:
    return video


def auto_contrast(video: Tensor, _magnitude: int, _place: Sequence[float]) -> Tensor:
    """Each channel stretched to 0 .. 255 over the whole view."""
    low = video.amin((0, 2, 3), keepdim=True).float()
    high = video.amax((0, 2, 3), keepdim=True).float()
    # not `255 / ...`, for which torch multiplies with a rounded reciprocal
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    stretched = (video.float() * scale - low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, video)


def equalize(video: Tensor, _magnitude: int, _place: Sequence[float]) -> Tensor:
    """Each channel with the same number of pixels at all levels, over the whole view."""
    return torch.stack([_equalized(channel) for channel in video.unbind(1)], dim=1)


def _equalized(channel: Tensor) -> Tensor:
    counts = torch.bincount(channel.flatten(), minlength=256).cpu()
    brightest = int(counts[counts > 0][-1])
    step = (channel.numel() - brightest) // 255
    if not step:
        return channel
    before = counts.cumsum(0) - counts
    table = ((before + step // 2) // step).clamp(max=255)
    return table.to(channel.device, torch.uint8)[channel.int()]


def invert(video: Tensor, _magnitude: int, _place: Sequence[float]) -> Tensor:
    return 255 - video


def posterize(video: Tensor, magnitude: int, _place: Sequence[float]) -> Tensor:
    """Keep int(0.4 M) bits of 8, at least one."""
    dropped = 8 - max(1, 2 * magnitude // 5)
    return (video >> dropped) << dropped


def solarize(video: Tensor, magnitude: int, _place: Sequence[float]) -> Tensor:
    """Invert from int(25.6 M) on, a threshold that wraps modulo 256 in the reference."""
    threshold = 128 * magnitude // 5 % 256
    return torch.where(video < threshold, video, 255 - video)


def solarize_add(video: Tensor, magnitude: int, _place: Sequence[float]) -> Tensor:
    """Add int(11 M) to what is below 128."""
    lighter = (video.short() + 11 * magnitude).clamp_(max=255).to(torch.uint8)
    return torch.where(video < 128, lighter, video)


def colour(video: Tensor, magnitude: int, _place: Sequence[float]) -> Tensor:
    """Away from grey."""
    grey = (_luma(video.float() / 255) * 255.5).floor()
    return _blend(grey, video, magnitude)


def contrast(video: Tensor, magnitude: int, _place: Sequence[float]) -> Tensor:
    """Away from a constant: in the reference pixels / 256, at most 255, and not the mean grey; so white for a video."""
    frames, _, height, width = video.shape
    return _blend(min(frames * height * width // 256, 255), video, magnitude)


def brightness(video: Tensor, magnitude: int, _place: Sequence[float]) -> Tensor:
    """Away from black."""
    return _blend(0, video, magnitude)


def sharpness(video: Tensor, magnitude: int, _place: Sequence[float]) -> Tensor:
    """Away from a smooth picture, in which the rows at the edge of a frame reach into its neighbours in the stack."""
    frames, channels, height, width = video.shape
    tall = video.permute(1, 0, 2, 3).reshape(channels, frames * height, width)
    smooth = tall.clone()
    smooth[:, 1:-1, 1:-1] = _smooth(tall)
    of_frames = smooth.view(channels, frames, height, width).permute(1, 0, 2, 3)
    return _blend(of_frames.float(), video, magnitude)


def _smooth(picture: Tensor) -> Tensor:
    """Weights of 1 for the 8 neighbours and 5 for the pixel itself, of all but the outermost pixels; exact."""
    values = picture.short()
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    total = around + 4 * values[:, 1:-1, 1:-1]
    return total.div_(13, rounding_mode="floor").to(torch.uint8)


def cutout(video: Tensor, magnitude: int, place: Sequence[float]) -> Tensor:
    """A black square of 8 M pixels around a random place, the same in all frames."""
    (y, x), half = place, 4 * magnitude
    height, width = video.shape[2:]
    row, column = int(y * height), int(x * width)
    video = video.clone()
    video[:, :, max(0, row - half) : row + half, max(0, column - half) : column + half] = 0
    return video


def _blend(degenerate: Tensor | int, video: Tensor, magnitude: int) -> Tensor:
    """From `degenerate` through the video, which is 1 away, to 0.18 M + 0.1."""
    factor = (18 * magnitude + 10) / 100
    values = video.float()
    return (degenerate + factor * (values - degenerate)).clamp_(0, 255).to(torch.uint8)


OPERATIONS: tuple[Callable[[Tensor, int, Sequence[float]], Tensor], ...] = (
    identity, auto_contrast, equalize, invert, posterize, solarize, solarize_add, colour, contrast, brightness, sharpness,
    cutout,
)  # fmt: skip
"""Of (video, magnitude, two numbers in [0, 1) for a place). Their order decides the bytes of caches: append only."""
