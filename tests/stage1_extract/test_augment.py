"""Each operation against a plain computation of another kind: Pillow, colorsys, torchvision's own class, NumPy."""

import colorsys
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from vivit.pipeline.augmentation import Augmentation
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract import reference_augment as reference
from vivit.stage1_extract import torchvision_augment
from vivit.stage1_extract.augment import Augmenter
from vivit.stage1_extract.blocks import torch_threads

FRAMES, SIZE = 5, 12
NAMES = [
    "reference-colour",
    "reference-randaugment-n2-m15",
    "reference-randaugment-n3-m20",
    "randaugment-n2-m9",
]
Pixels = npt.NDArray[np.uint8]


def some_video(seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    """uint8 [frame, channel, height, width]."""
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.integers(low, high, (FRAMES, 3, SIZE, SIZE), np.uint8))


def tall(video: Tensor) -> Image.Image:
    """The frames, one below the other."""
    return Image.fromarray(video.permute(0, 2, 3, 1).reshape(FRAMES * SIZE, SIZE, 3).numpy())


def as_video(picture: Image.Image | Pixels) -> Tensor:
    return torch.from_numpy(np.array(picture)).reshape(FRAMES, SIZE, SIZE, 3).permute(0, 3, 1, 2)


def operation(name: str, video: Tensor, magnitude: int, place: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    (found,) = [each for each in reference.OPERATIONS if each.__name__ == name]
    return found(video, magnitude, place)


@pytest.mark.parametrize("magnitude", [9, 15, 20])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identity", lambda picture, _: picture),
        ("equalize", lambda picture, _: ImageOps.equalize(picture)),
        ("invert", lambda picture, _: ImageOps.invert(picture)),
        ("posterize", lambda picture, m: ImageOps.posterize(picture, int(0.4 * m))),
        ("solarize", lambda picture, m: ImageOps.solarize(picture, int(25.6 * m) % 256)),
    ],
)
def test_what_pillow_has_is_what_it_computes_of_the_whole_clip(
    name: str, expected: Any, magnitude: int
) -> None:
    for seed, (low, high) in enumerate([(0, 256), (40, 200), (77, 78)]):
        video = some_video(seed, low, high)
        torch.testing.assert_close(
            operation(name, video, magnitude), as_video(expected(tall(video), magnitude)), rtol=0, atol=0
        )


def test_auto_contrast_stretches_each_channel_of_the_whole_clip() -> None:
    video = some_video(low=40, high=200)
    values = video.numpy().astype(np.float32)
    low, high = values.min((0, 2, 3), keepdims=True), values.max((0, 2, 3), keepdims=True)
    scale = np.float32(255) / (high - low)
    wanted = torch.from_numpy(np.clip(values * scale - low * scale, 0, 255).astype(np.uint8))
    made = operation("auto_contrast", video, 15)
    assert torch.equal(made, wanted)
    # Pillow computes in double precision
    torch.testing.assert_close(made, as_video(ImageOps.autocontrast(tall(video))), rtol=0, atol=1)
    flat = torch.full_like(video, 77)
    assert torch.equal(operation("auto_contrast", flat, 15), flat)


def blended(degenerate: npt.NDArray[Any], video: Tensor, magnitude: int) -> Tensor:
    factor = np.float32(0.18 * magnitude + 0.1)
    values = video.numpy().astype(np.float32)
    mixed = degenerate.astype(np.float32) + factor * (values - degenerate.astype(np.float32))
    return torch.from_numpy(np.clip(mixed, 0, 255).astype(np.uint8))


def smooth(video: Tensor) -> Pixels:
    """The 3 x 3 filter on the stack of frames, pixel by pixel."""
    stack = np.asarray(tall(video)).astype(int)
    made = stack.copy()
    for y in range(1, len(stack) - 1):
        for x in range(1, SIZE - 1):
            made[y, x] = (stack[y - 1 : y + 2, x - 1 : x + 2].sum((0, 1)) + 4 * stack[y, x]) // 13
    return as_video(made.astype(np.uint8)).numpy()


@pytest.mark.parametrize("magnitude", [0, 3, 5, 15, 20])
def test_blends_are_those_of_the_reference(magnitude: int) -> None:
    video = some_video()
    red, green, blue = np.moveaxis(video.numpy().astype(np.float32) / 255, 1, 0)
    grey = ((0.2989 * red + 0.587 * green + 0.114 * blue) * 255.5).astype(np.uint8)[:, None]
    pixels = np.full((), FRAMES * SIZE * SIZE // 256)
    for name, degenerate in {
        "colour": np.broadcast_to(grey, video.shape),
        "brightness": np.zeros(()),
        "contrast": pixels,
        "sharpness": smooth(video),
    }.items():
        made = operation(name, video, magnitude)
        assert torch.equal(made, blended(degenerate, video, magnitude)), name


def test_contrast_of_a_real_clip_is_away_from_white() -> None:
    video = torch.randint(0, 256, (8, 3, 112, 112), dtype=torch.uint8)
    assert torch.equal(operation("contrast", video, 15), blended(np.full((), 255), video, 15))


@pytest.mark.parametrize(("magnitude", "added"), [(0, 0), (9, 99), (15, 165), (20, 220)])
def test_solarize_add_lightens_the_dark_half(magnitude: int, added: int) -> None:
    video = some_video()
    values = video.numpy().astype(int)
    wanted = np.where(values < 128, np.minimum(values + added, 255), values).astype(np.uint8)
    assert torch.equal(operation("solarize_add", video, magnitude), torch.from_numpy(wanted))


@pytest.mark.parametrize(
    ("place", "rows", "columns"), [((0.5, 0.5), (2, 10), (2, 10)), ((0, 0.99), (0, 4), (7, 12))]
)
def test_cutout_is_a_black_square_that_may_reach_over_the_border(
    place: tuple[float, float], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    video = some_video(low=1)
    made = operation("cutout", video, 1, place)
    is_black = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    is_black[slice(*rows), slice(*columns)] = True
    assert torch.equal(made, torch.where(is_black, 0, video))
    assert video.min() > 0


@pytest.mark.parametrize(
    ("name", "magnitude"),
    [
        ("colour", 5), ("brightness", 5), ("contrast", 5), ("sharpness", 5), ("posterize", 20), ("solarize_add", 0),
        ("cutout", 0), ("identity", 15),
    ],
)  # fmt: skip
def test_the_magnitude_of_no_change_changes_nothing(name: str, magnitude: int) -> None:
    assert torch.equal(operation(name, some_video(), magnitude), some_video())


def test_the_thresholds_of_the_reference_wrap() -> None:
    assert torch.equal(operation("solarize", some_video(), 20), 255 - some_video())
    assert torch.equal(operation("solarize", some_video(), 10), 255 - some_video())


# --- colour ---


def with_hsv(colours: npt.NDArray[np.float64], saturation: float = 1.0, hue: float = 0.0) -> Tensor:
    """Saturation and hue of [frame, channel, height, width] changed with colorsys, colour by colour."""
    changed = np.empty_like(colours)
    for at in np.ndindex(colours.shape[0], *colours.shape[2:]):
        here = (at[0], slice(None), *at[1:])
        h, s, v = colorsys.rgb_to_hsv(*colours[here])
        s = min(1.0, s * saturation) if saturation != 1 else s
        changed[here] = colorsys.hsv_to_rgb((h + hue) % 1, s, v)
    return torch.from_numpy(changed)


@pytest.mark.parametrize("amount", [-0.2, -0.07, 0.0, 0.11, 0.2])
def test_hue_and_saturation_are_those_of_hsv(amount: float) -> None:
    colours = some_video().double() / 255
    colours[0] = colours[0, :1]  # a grey frame
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(
        reference.with_hue(colours.float(), amount).double(), with_hsv(colours.numpy(), hue=amount), **close
    )
    torch.testing.assert_close(
        reference.with_saturation(colours.float(), 1 + 2 * amount).double(),
        with_hsv(colours.numpy(), saturation=1 + 2 * amount),
        **close,
    )


def test_contrast_is_about_the_mean_of_each_channel_of_each_frame() -> None:
    colours = some_video().float() / 255
    mean = colours.numpy().mean((2, 3), keepdims=True)
    wanted = torch.from_numpy((colours.numpy() - mean) * 1.3 + mean)
    torch.testing.assert_close(reference.with_contrast(colours, 1.3), wanted, rtol=0, atol=1e-6)


def test_the_jitter_goes_through_its_steps_in_order_and_clips() -> None:
    colours = some_video().double().numpy() / 255 * 0.8 + 0.15
    brighter = with_hsv(colours + 0.1, saturation=1.2).numpy()
    mean = brighter.mean((2, 3), keepdims=True)
    wanted = with_hsv((brighter - mean) * 0.7 + mean, hue=0.1).clamp(0, 1)
    made = reference.jitter(
        torch.from_numpy(colours).float(), brightness=0.1, saturation=1.2, contrast=0.7, hue=0.1
    )
    torch.testing.assert_close(made.double(), wanted, rtol=0, atol=1e-5)


def test_a_jitter_of_nothing_changes_nothing_and_the_chances_are_those_of_the_reference() -> None:
    video = some_video()
    half = [0.5] * 4
    assert torch.equal(reference.reference_colour(video, [0.79, *half, 0.1]), video)
    assert torch.equal(reference.reference_colour(video, [0.8, 0, 0, 0, 0, 0.1]), video)
    assert not torch.equal(reference.reference_colour(video, [0.79, 0, *half[1:], 0.1]), video)
    grey = reference.reference_colour(video, [0.8, *half, 0.09])
    red, green, blue = video.numpy().astype(float).transpose(1, 0, 2, 3)
    luma = (0.2989 * red + 0.587 * green + 0.114 * blue).round().astype(np.uint8)
    assert all(np.array_equal(channel, luma) for channel in grey.numpy().transpose(1, 0, 2, 3))


# --- torchvision ---


@pytest.mark.parametrize("at", range(14), ids=list(v2.RandAugment._AUGMENTATION_SPACE))
def test_torchvisions_operations_are_those_of_its_class(at: int) -> None:
    theirs, ours = v2.RandAugment(), torchvision_augment.OPERATIONS[at]
    name, (levels, is_signed) = list(theirs._AUGMENTATION_SPACE.items())[at]
    video = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8))
    amounts = levels(31, 32, 32)
    for magnitude in range(31):
        for sign in (-1.0, 1.0):
            amount = 0.0 if amounts is None else float(amounts[magnitude]) * (sign if is_signed else 1)
            wanted = theirs._apply_image_or_video_transform(video, name, amount, "nearest", {})
            assert torch.equal(ours(video, magnitude, sign), wanted), (magnitude, sign)


@pytest.mark.parametrize(
    "name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color"]
)
def test_torchvisions_magnitude_0_changes_nothing(name: str) -> None:
    assert torch.equal(getattr(torchvision_augment, name)(some_video(), 0, -1.0), some_video())


# --- draws ---


def augmenter(name: str, seed: int = 0) -> Augmenter:
    return Augmenter(Augmentation.parse(name), seed, torch.device("cpu"))


def crops(views: int = 3, seed: int = 0) -> Pixels:
    """[view, frame, height, width, channel]."""
    return np.random.default_rng(seed).integers(0, 256, (views, FRAMES, SIZE, SIZE, 3), np.uint8)


def test_a_spec_without_augmentation_has_no_augmenter() -> None:
    assert Augmenter.of(ViewSpec(), seed=0, device=torch.device("cpu")) is None
    assert Augmenter.of(ViewSpec(augment=NAMES[1]), seed=0, device=torch.device("cpu")) == augmenter(NAMES[1])


@pytest.mark.parametrize("name", NAMES)
def test_all_frames_of_a_view_share_the_draw(name: str) -> None:
    frame = crops(1)[:, :1]
    same = torch.from_numpy(frame.repeat(FRAMES, axis=1)[0])
    for number in range(40):
        made = augmenter(name).view(same, clip_id="a", number=number)
        # the smooth picture of the first and last frame ends at the edge of the stack
        assert all(torch.equal(each, made[2]) for each in made[1:-1]), number


@pytest.mark.parametrize("name", NAMES)
def test_a_draw_depends_on_seed_clip_and_view_only(name: str) -> None:
    pixels = crops()
    together = list(augmenter(name).clip(pixels, clip_id="a"))
    assert [each.dtype for each in together] == [torch.uint8] * 3
    assert [tuple(each.shape) for each in together] == [pixels.shape[1:]] * 3
    list(augmenter(name).clip(crops(seed=5), clip_id="b"))
    for number in (2, 0, 1):
        (alone,) = augmenter(name).clip(pixels[number : number + 1], clip_id="a", first_view=number)
        assert torch.equal(alone, together[number])


@pytest.mark.parametrize("name", NAMES)
def test_the_pixels_do_not_depend_on_the_number_of_threads(name: str) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8))
    made = []
    for threads in (1, 2):
        with torch_threads(threads):
            views = [augmenter(name).view(pixels, clip_id="a", number=number) for number in range(12)]
            made.append(torch.stack(views))
    assert torch.equal(*made)


@pytest.mark.parametrize("name", NAMES)
def test_views_clips_and_seeds_have_different_draws(name: str) -> None:
    pixels = torch.from_numpy(crops(1)[0])
    made = [augmenter(name).view(pixels, clip_id="a", number=number) for number in range(12)]
    made += [augmenter(name).view(pixels, clip_id=f"b{number}", number=0) for number in range(12)]
    made += [augmenter(name, seed).view(pixels, clip_id="a", number=0) for seed in range(1, 12)]
    assert len({each.numpy().tobytes() for each in made}) > 20


def test_every_operation_comes_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[int] = Counter()
    numbered = [lambda video, _m, _p, at=at: counts.update([at]) or video for at in range(12)]
    monkeypatch.setattr(reference, "OPERATIONS", numbered)
    pixels = torch.from_numpy(crops(1)[0])
    for number in range(1200):
        augmenter("reference-randaugment").view(pixels, clip_id="a", number=number)
    assert sum(counts.values()) == 2400
    assert sorted(counts) == list(range(12))
    assert all(150 < count < 250 for count in counts.values())
