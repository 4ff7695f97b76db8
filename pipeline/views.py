"""Views: which frames of a clip, and which box of each frame. Pure functions of (spec, seed, clip, view).

Formulas: the reference's training pipeline and its multi-crop test (google-research/scenic, projects/vivit).
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from vivit.pipeline.augmentation import NONE, Augmentation
from vivit.pipeline.errors import ConfigError

Times = npt.NDArray[np.float64]
Frames = npt.NDArray[np.int64]

Interpolation = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""Resampling filters, always with antialiasing, by the names that timm uses."""


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """How frames and crops are taken from a clip."""

    num_frames: int = 32
    """Frames per view."""
    stride: int = 2
    """Frames of the source from one frame of the view to the next (of `fps`, where that is given)."""
    fps: float | None = None
    """Resample the source to this rate first; None takes the source's own frames."""
    resize: int = 256
    """Short side in pixels that a frame is brought to before it is cropped."""
    crop_size: int = 224
    """Side of the square crop in pixels."""
    scale_min: float = 0.9
    """Smallest factor of the random scale of a training view, for height and width independently."""
    scale_max: float = 1.33
    """Largest such factor."""
    flip: float = 0.5
    """Probability that a training view is mirrored."""
    augment: str = NONE
    """What is done to the pixels of a training view (`Augmentation`, by its name)."""
    train_views: int = 1
    """Random views per clip of the training split."""
    test_clips: int = 4
    """Temporal clips per clip of the other splits."""
    test_crops: int = 3
    """Spatial crops per temporal clip: 1 (centre) or 3."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "stride", "resize", "crop_size", "train_views", "test_clips"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.test_crops not in (1, 3):
            raise ConfigError(f"test_crops must be 1 or 3, got {self.test_crops}")
        if self.fps is not None and not 0 < self.fps < 1000:
            raise ConfigError(f"fps must be between 0 and 1000, got {self.fps}")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip is a probability, got {self.flip}")
        if not 0 < self.scale_min <= self.scale_max:
            raise ConfigError(f"scale_min {self.scale_min} and scale_max {self.scale_max} are not a range")
        if self.crop_size > self.resize:
            raise ConfigError(f"crop_size {self.crop_size} does not fit in resize {self.resize}")
        if int(self.scale_min * self.resize) < self.crop_size:
            raise ConfigError(
                f"scale_min {self.scale_min} shrinks the short side of {self.resize} below crop_size {self.crop_size}: "
                f"use a scale_min of at least {math.ceil(1000 * self.crop_size / self.resize) / 1000}"
            )

        object.__setattr__(self, "augment", str(Augmentation.parse(self.augment)))  # as the name in full

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON values; `from_dict` gives an equal one back.

        `augment` stands in it only where there is any: specs from before it existed keep their digests.
        """
        values = asdict(self)
        return {name: value for name, value in values.items() if (name, value) != ("augment", NONE)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**values)

    def num_views(self, split: str) -> int:
        """Views of each clip of `split`: random ones for training, the fixed grid elsewhere."""
        return self.train_views if split == "train" else self.test_clips * self.test_crops


@dataclass(frozen=True)
class Box:
    """The crop of a view in frames of one size."""

    height: int
    """Height in pixels that the whole frame would be resized to."""
    width: int
    """Width likewise."""
    top: int
    """First row of the crop in the resized frame."""
    left: int
    """First column of the crop."""
    mirrored: bool = False

    def crop(self, picture: Image.Image, size: int, interpolation: str) -> npt.NDArray[np.uint8]:
        """The crop [size, size, channel], uint8 RGB.

        Crop and resize are one step: only the pixels of the crop are computed, with the antialiasing filter reaching
        over the edge of the box as if the whole frame had been resized.
        """
        x, y = picture.width / self.width, picture.height / self.height
        right, bottom = (self.left + size) * x, (self.top + size) * y
        box = (self.left * x, self.top * y, min(right, picture.width), min(bottom, picture.height))
        resized = picture.resize((size, size), Interpolation[interpolation], box=box)
        if self.mirrored:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(resized)


class View(Protocol):
    """One way of looking at a clip: a choice of frames, and of a box that all of them share."""

    def frames(self, times_sec: Times) -> Frames:
        """Indices [time] into the clip's frames, which are shown at `times_sec` [frame]."""
        ...

    def box(self, height: int, width: int) -> Box:
        """The crop in frames of height x width pixels."""
        ...


class TrainView:
    """Training view number `view` of a clip: random start, scale, place and mirroring."""

    def __init__(self, spec: ViewSpec, *, seed: int, clip_id: str, view: int) -> None:
        draws = view_draws(6, seed=seed, clip_id=clip_id, view=view)
        self._start, self._tall, self._wide, self._top, self._left, self._mirror = draws
        self._spec = spec

    def frames(self, times_sec: Times) -> Frames:
        """Start uniform over the integers [0, max(L - (n - 1) * stride, 1)); short clips wrap modulo L."""
        shown = resample(times_sec, self._spec.fps)
        start = _integer(self._start, max(len(shown) - (self._spec.num_frames - 1) * self._spec.stride, 1))
        return shown[_strided(start, self._spec, len(shown))]

    def box(self, height: int, width: int) -> Box:
        """Short side to `resize`, both sides scaled independently, then a crop anywhere in the result."""
        spec = self._spec
        rows, columns = short_side_resized(height, width, spec.resize)
        rows = int((spec.scale_min + (spec.scale_max - spec.scale_min) * self._tall) * rows)
        columns = int((spec.scale_min + (spec.scale_max - spec.scale_min) * self._wide) * columns)
        return Box(
            height=rows,
            width=columns,
            top=_integer(self._top, rows - spec.crop_size + 1),
            left=_integer(self._left, columns - spec.crop_size + 1),
            mirrored=self._mirror < spec.flip,
        )


class GridView:
    """Test view number `view`, crop by crop as in the reference: crop 0 at every start, then crop 1, ..."""

    def __init__(self, spec: ViewSpec, *, view: int) -> None:
        self._spec = spec
        self._crop, self._clip = divmod(view, spec.test_clips)

    def frames(self, times_sec: Times) -> Frames:
        """Starts spread evenly over [0, max(0, L - n * stride)], rounded down; a single one is in the middle."""
        shown = resample(times_sec, self._spec.fps)
        room = max(0, len(shown) - self._spec.num_frames * self._spec.stride)
        clips = self._spec.test_clips
        start = room // 2 if clips == 1 else int(np.linspace(0, room, clips)[self._clip])
        return shown[_strided(start, self._spec, len(shown))]

    def box(self, height: int, width: int) -> Box:
        """First, middle or last square along the longer side (width where they are equal), or the centre."""
        size = self._spec.crop_size
        rows, columns = short_side_resized(height, width, self._spec.resize)
        if self._spec.test_crops == 1:
            return Box(rows, columns, (rows - size) // 2, (columns - size) // 2)
        room = max(rows, columns) - size
        along = (0, math.ceil(room / 2), room)[self._crop]
        across = math.ceil((min(rows, columns) - size) / 2)
        top, left = (along, across) if rows > columns else (across, along)
        return Box(rows, columns, top, left)


def view_draws(count: int, *, seed: int, clip_id: str, view: int, stream: int | None = None) -> list[float]:
    """Numbers in [0, 1) of a training view, a function of these arguments only: not of the worker, the order or what was
    drawn before. Each `stream` has others.

    Raw Philox words are used because NumPy promises that they never change, which it does not for its distributions.
    """
    clip = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8], "big")
    entropy = [seed, clip, view] if stream is None else [seed, clip, view, stream]
    words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
    draws: list[float] = ((words >> np.uint64(11)) * 2.0**-53).tolist()
    return draws


def views_of(spec: ViewSpec, *, split: str, seed: int, clip_id: str, first: int = 0) -> list[View]:
    """All views of a clip: random ones from number `first` on in the training split, the fixed grid elsewhere."""
    if split == "train":
        numbers = range(first, first + spec.train_views)
        return [TrainView(spec, seed=seed, clip_id=clip_id, view=view) for view in numbers]
    return [GridView(spec, view=view) for view in range(spec.num_views(split))]


def span(spec: ViewSpec) -> int:
    """Frames that a view without wrapping reaches over, both ends included."""
    return (spec.num_frames - 1) * spec.stride + 1


def resample(times_sec: Times, fps: float | None) -> Frames:
    """Indices of the frames shown at the ticks of `fps`; all frames where fps is None."""
    if fps is None or len(times_sec) < 2:
        return np.arange(len(times_sec))
    length_sec = times_sec[-1] - times_sec[0] + float(np.median(np.diff(times_sec)))
    ticks = times_sec[0] + np.arange(max(1, round(length_sec * fps))) / fps
    shown: Frames = np.maximum(np.searchsorted(times_sec, ticks + 1e-6, side="right") - 1, 0)
    return shown


def short_side_resized(height: int, width: int, resize: int) -> tuple[int, int]:
    """Height and width of a frame whose short side was brought to `resize` (the long side rounded down)."""
    if height <= width:
        return resize, width * resize // height
    return height * resize // width, resize


def _integer(draw: float, count: int) -> int:
    """An integer in [0, count) from a draw in [0, 1)."""
    return min(int(draw * count), count - 1)


def _strided(start: int, spec: ViewSpec, num_frames: int) -> Frames:
    """start, start + stride, ...; a clip that is too short starts over."""
    frames: Frames = (start + spec.stride * np.arange(spec.num_frames)) % num_frames
    return frames
