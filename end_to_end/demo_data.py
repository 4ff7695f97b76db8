"""The demo's generated videos: actions in pairs, each the other one played backwards.

No picture, and no set of pictures without their order, tells the two members of a pair apart: whoever ignores the
order of frames is right in half of the clips at best. This holds for the decoded files too, since each frame is
compressed by itself, at a fixed quality.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import numpy.typing as npt

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.progress import Progress
from vivit.pipeline.workspace import storage_errors, write_atomically

Floats = npt.NDArray[np.floating[Any]]
Frames = npt.NDArray[np.uint8]
Choice = TypeVar("Choice")

HEAD = "action"
MANIFEST = "manifest.parquet"
"""Name of the manifest in the demo's folder; written last."""

_SPEC = "demo.json"
_VERSION = 1
"""To be raised with every change that changes a pixel: files of another version are made anew."""
_QUANTISER = 22
"""H.264's fixed quality: a moderate loss."""


@dataclass(frozen=True, kw_only=True)
class DemoSpec:
    """How many clips there are, and how they are filmed."""

    train_clips: int = 50
    """Training clips per class."""
    validation_clips: int = 16
    """Validation clips per class."""
    num_frames: int = 24
    """Frames of a clip."""
    size: int = 112
    """Height and width of a frame in pixels."""
    fps: int = 12
    """Frames per second."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        for name, least in (("train_clips", 1), ("validation_clips", 1), ("num_frames", 2), ("fps", 1)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if self.size < 16 or self.size % 2:
            raise ConfigError(f"size must be even and at least 16, got {self.size}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")


class Draws:
    """The random numbers of one clip: they depend on (seed, clip_id) only.

    Raw Philox words are used because NumPy promises that they never change, which it does not for its distributions.
    """

    def __init__(self, seed: int, clip_id: str) -> None:
        clip = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8], "big")
        scene, noise = np.random.SeedSequence([seed, clip]).spawn(2)
        self._scene, self._noise = np.random.Philox(scene), np.random.Philox(noise)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * (self._scene.random_raw() >> 11) * 2.0**-53

    def choice(self, options: Sequence[Choice]) -> Choice:
        """One of `options`, all equally likely."""
        return options[int(self.uniform(0, len(options)))]

    def noise(self, *shape: int) -> Floats:
        """Independent numbers in (-1, 1) with a triangular density, float32 [shape]."""
        count = math.prod(shape)
        words = np.asarray(self._noise.random_raw(-(-count // 4)), dtype="<u8")
        octets: Floats = words.view(np.uint8)[: 2 * count].reshape(2, *shape).astype(np.float32)
        noise: Floats = (octets[0] - octets[1]) / np.float32(256)
        return noise


Shape = Callable[[Floats, Floats], Floats]
SHAPES: dict[str, Shape] = {
    "disk": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.9,
    "diamond": lambda x, y: (abs(x) + abs(y)) * 0.7 - 0.8,
    "triangle": lambda x, y: np.maximum(0.87 * abs(x) - 0.5 * y, y) - 0.6,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.7) - 0.3,
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.35, np.maximum(abs(x), abs(y)) - 1),
}
"""About how far points (x, y) lie outside of the edge, in units of the radius; negative inside."""


@dataclass(frozen=True)
class _Paint:
    """Two colours [channel] in [0, 1] that change along stripes."""

    light: Floats
    dark: Floats
    stripes: float
    """Stripes per radius; 0 is the light colour alone."""
    direction: float
    """Radians."""


@dataclass
class _Sprite:
    """A shape on its way: x, y, radius (in units of the frame's side), angle (radians), opacity, each [time]."""

    shape: Shape
    paint: _Paint
    x: Floats
    y: Floats
    radius: Floats
    angle: Floats
    opacity: Floats


@dataclass
class _Scene:
    """What is filmed."""

    background: Floats
    """[height, width, channel] in [0, 1]."""
    sprites: list[_Sprite]
    light: Floats
    """Brightness of everything [time]."""


def _hue(hue: float, lightness: float, saturation: float) -> Floats:
    """Colour [channel] in [0, 1]."""
    wave = np.cos(2 * np.pi * (hue - np.array([0, 1 / 3, 2 / 3])))
    return np.clip(lightness + 0.5 * saturation * wave, 0, 1).astype(np.float32)


def _grid(size: int) -> tuple[Floats, Floats]:
    """Coordinates x, y [height, width] of the pixels' centres, in units of the frame's side."""
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    return x, y


def _background(draws: Draws, size: int) -> Floats:
    """[height, width, channel]: a mix of two dark or two light colours, in one of four patterns."""
    x, y = _grid(size)
    angle = draws.uniform(0, 2 * np.pi)
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    waves, phase = 2 * np.pi * draws.uniform(2, 6), draws.uniform(0, 2 * np.pi)
    clouds = sum(
        np.sin(draws.uniform(4, 16) * along + draws.uniform(4, 16) * across + draws.uniform(0, 6))
        for _ in range(4)
    )
    patterns = (
        along,
        0.5 + 0.5 * np.sin(waves * along + phase),
        0.5 + 0.5 * np.sin(waves * along) * np.sin(waves * across),
        0.5 + 0.2 * clouds,
    )
    mix = np.clip(draws.choice(patterns), 0, 1)[..., None]
    hue, saturation = draws.uniform(), draws.uniform(0, 0.25)
    low = _hue(hue, draws.uniform(0.15, 0.3), saturation)
    high = _hue(hue + draws.uniform(-0.2, 0.2), draws.uniform(0.3, 0.45), saturation)
    return np.asarray(low + (high - low) * mix, dtype=np.float32)


def _paint(draws: Draws) -> _Paint:
    """Colours that stand out against a background."""
    hue, saturation = draws.uniform(), draws.uniform(0.2, 0.6)
    light = _hue(hue, draws.uniform(0.75, 0.9), saturation)
    dark = _hue(hue + draws.uniform(-0.1, 0.1), draws.uniform(0.55, 0.7), saturation)
    stripes = draws.choice((0.0, 0.0, draws.uniform(0.5, 1.5)))
    return _Paint(light, dark, stripes, draws.uniform(0, np.pi))


def _still(num_frames: int) -> Floats:
    """1 at every time [time]."""
    return np.ones(num_frames, dtype=np.float32)


def _sprite(
    draws: Draws,
    num_frames: int,
    *,
    shape: str | None = None,
    x: Floats | None = None,
    y: Floats | None = None,
    radius: Floats | None = None,
) -> _Sprite:
    """A sprite that keeps, for the whole clip, what is not given."""
    still = _still(num_frames)
    return _Sprite(
        shape=SHAPES[shape or draws.choice(list(SHAPES))],
        paint=_paint(draws),
        x=still * draws.uniform(0.25, 0.75) if x is None else x,
        y=still * draws.uniform(0.25, 0.75) if y is None else y,
        radius=still * draws.uniform(0.12, 0.2) if radius is None else radius,
        angle=still * draws.uniform(-0.5, 0.5),
        opacity=still,
    )


# The actions: each fills a scene with sprites, as the forward member of its pair shows it


def _progress(draws: Draws, num_frames: int) -> Floats:
    """From 0 to 1 over the clip [time], at an even, a rising or a falling speed."""
    time = np.linspace(0, 1, num_frames, dtype=np.float32)
    return time ** np.float32(draws.uniform(0.7, 1.4))


def _path(draws: Draws, progress: Floats) -> Floats:
    """A coordinate [time] that rises across much of the frame."""
    start, end = draws.uniform(0.15, 0.3), draws.uniform(0.7, 0.85)
    return start + (end - start) * progress


def _slide(draws: Draws, num_frames: int, scene: _Scene) -> None:
    x = _path(draws, _progress(draws, num_frames))
    scene.sprites.append(_sprite(draws, num_frames, x=x))


def _drop(draws: Draws, num_frames: int, scene: _Scene) -> None:
    y = _path(draws, _progress(draws, num_frames))
    scene.sprites.append(_sprite(draws, num_frames, y=y))


def _grow(draws: Draws, num_frames: int, scene: _Scene) -> None:
    small, large = draws.uniform(0.07, 0.12), draws.uniform(0.26, 0.36)
    radius = small + (large - small) * _progress(draws, num_frames)
    scene.sprites.append(_sprite(draws, num_frames, radius=radius))


def _light(draws: Draws, num_frames: int, scene: _Scene) -> None:
    dark, bright = draws.uniform(0.3, 0.5), draws.uniform(0.95, 1.1)
    scene.light = dark + (bright - dark) * _progress(draws, num_frames)
    scene.sprites.append(_sprite(draws, num_frames))


def _part(draws: Draws, num_frames: int, scene: _Scene) -> None:
    """Two sprites, on a line through the middle of the frame, move apart."""
    angle = draws.uniform(0, 2 * np.pi)
    distance = draws.uniform(0.0, 0.08) + draws.uniform(0.28, 0.36) * _progress(draws, num_frames)
    for side in (-1, 1):
        x, y = 0.5 + side * math.cos(angle) * distance, 0.5 + side * math.sin(angle) * distance
        radius = _still(num_frames) * draws.uniform(0.1, 0.16)
        scene.sprites.append(_sprite(draws, num_frames, x=x, y=y, radius=radius))


def _swap(draws: Draws, num_frames: int, scene: _Scene) -> None:
    """A disk fades into a cross at the same place."""
    shown = np.clip((np.linspace(0, 1, num_frames) - draws.uniform(0.4, 0.6)) / 0.1 + 0.5, 0, 1)
    first = _sprite(draws, num_frames, shape="disk", radius=_still(num_frames) * draws.uniform(0.16, 0.26))
    second = _sprite(draws, num_frames, shape="cross", x=first.x, y=first.y, radius=first.radius)
    first.opacity, second.opacity = (1 - shown).astype(np.float32), shown.astype(np.float32)
    scene.sprites += [first, second]


Action = Callable[[Draws, int, _Scene], None]
PAIRS: dict[tuple[str, str], Action] = {
    ("move_right", "move_left"): _slide,
    ("move_down", "move_up"): _drop,
    ("grow", "shrink"): _grow,
    ("brighten", "darken"): _light,
    ("part", "meet"): _part,
    ("disk_to_cross", "cross_to_disk"): _swap,
}
"""Action of each pair of classes: the second class is the first one played backwards."""

CLASSES: list[str] = [name for pair in PAIRS for name in pair]
"""Class names in id order."""


def _draw(sprite: _Sprite, picture: Floats) -> Floats:
    """`picture` [time, height, width, channel] with the sprite in front."""
    size = picture.shape[1]
    x, y = _grid(size)

    def track(values: Floats) -> Floats:
        return values.astype(np.float32)[:, None, None]

    radius = track(sprite.radius)
    dx, dy = (x - track(sprite.x)) / radius, (y - track(sprite.y)) / radius
    cos, sin = track(np.cos(sprite.angle)), track(np.sin(sprite.angle))
    dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    # An edge is one pixel wide: the part of each pixel that the shape covers.
    cover = np.clip(0.5 - sprite.shape(dx, dy) * radius * size, 0, 1) * track(sprite.opacity)
    paint = sprite.paint
    along = math.cos(paint.direction) * dx + math.sin(paint.direction) * dy
    mix = (0.5 + 0.5 * np.cos(2 * np.pi * paint.stripes * along))[..., None]
    colour = paint.dark + (paint.light - paint.dark) * mix
    result: Floats = picture + cover[..., None] * (colour - picture)
    return result


def render(name: str, clip_id: str, spec: DemoSpec) -> Frames:
    """The frames [time, height, width, channel] of a clip of class `name`, uint8 RGB.

    With the same clip id, the two classes of a pair give the same frames in opposite order.
    """
    pair = next(pair for pair in PAIRS if name in pair)
    draws = Draws(spec.seed, clip_id)
    light = _still(spec.num_frames) * np.float32(draws.uniform(0.8, 1.1))
    scene = _Scene(_background(draws, spec.size), [], light)
    PAIRS[pair](draws, spec.num_frames, scene)
    picture = np.broadcast_to(scene.background, (spec.num_frames, *scene.background.shape))
    for sprite in scene.sprites:
        picture = _draw(sprite, picture)
    picture = picture * scene.light[:, None, None, None]
    picture = picture + draws.uniform(0.01, 0.06) * draws.noise(*picture.shape)
    frames = (255 * np.clip(picture, 0, 1) + 0.5).astype(np.uint8)
    return frames if name == pair[0] else frames[::-1]


def encode(frames: Frames, fps: int) -> bytes:
    """An mp4 file (H.264) of frames [time, height, width, channel], uint8 RGB; same bytes for the same frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"preset": "veryfast", "qp": str(_QUANTISER), "g": "1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in np.ascontiguousarray(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def demo_manifest(spec: DemoSpec) -> Manifest:
    """The clips of the demo: the same number of each class in each split."""
    counts = {"train": spec.train_clips, "validation": spec.validation_clips}
    clips = [
        Clip(clip_id=clip_id, split=split, video=f"{name}/{clip_id}.mp4", labels={HEAD: label})
        for split, count in counts.items()
        for label, name in enumerate(CLASSES)
        for clip_id in (f"{name}_{split}_{number:04d}" for number in range(count))
    ]
    return Manifest("demo", clips, heads={HEAD: CLASSES})


def make_demo(folder: Path, spec: DemoSpec | None = None, progress: Progress | None = None) -> Manifest:
    """Write the videos `<class>/<clip_id>.mp4` and the manifest below `folder`; what is there already is kept.

    `progress`, if given, is advanced by one for each clip and has as many units as the manifest has clips.
    """
    spec = spec or DemoSpec()
    manifest = demo_manifest(spec)
    with storage_errors(folder):
        _claim(folder, spec)
        _make_missing(folder, manifest.clips, spec, progress)
        manifest.write(folder / MANIFEST)
    return manifest


def _claim(folder: Path, spec: DemoSpec) -> None:
    """Make `folder` hold videos of `spec` alone: those of another one go, and the note of what is there comes last."""
    note, about = folder / _SPEC, json.dumps({"version": _VERSION, **asdict(spec)}, indent=1).encode()
    if note.is_file() and note.read_bytes() == about:
        return
    note.unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in CLASSES:
        for video in folder.glob(f"{name}/{name}_*.mp4"):
            video.unlink()
    write_atomically(note, about)


def _make_missing(folder: Path, clips: Sequence[Clip], spec: DemoSpec, progress: Progress | None) -> None:
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        try:
            for job in as_completed([pool.submit(_make, folder / c.video, c, spec) for c in clips]):
                job.result()
                if progress is not None:
                    progress.advance()
        finally:
            pool.shutdown(cancel_futures=True)  # or an interrupted run would first make all that is left


def _make(path: Path, clip: Clip, spec: DemoSpec) -> None:
    if not path.is_file():
        write_atomically(path, encode(render(CLASSES[clip.labels[HEAD]], clip.clip_id, spec), spec.fps))
