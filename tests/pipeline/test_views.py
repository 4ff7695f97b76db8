import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.views import Box, GridView, TrainView, ViewSpec, span, views_of

REFERENCE = ViewSpec()

specs = st.builds(
    lambda num_frames, stride, fps, crop, clips, crops: ViewSpec(
        num_frames=num_frames,
        stride=stride,
        fps=fps,
        resize=crop + crop // 4 + 2,
        crop_size=crop,
        test_clips=clips,
        test_crops=crops,
        train_views=2,
    ),
    st.integers(1, 40),
    st.integers(1, 8),
    st.none() | st.floats(1, 60),
    st.integers(16, 224),
    st.integers(1, 5),
    st.sampled_from([1, 3]),
)


def times(num_frames: int, fps: float = 25.0) -> np.ndarray:
    return np.arange(num_frames) / fps


@pytest.mark.parametrize(
    ("num_frames", "starts"),
    [(250, [0, 62, 124, 186]), (300, [0, 78, 157, 236]), (64, [0, 0, 0, 0]), (3, [0, 0, 0, 0])],
)
def test_test_clips_start_where_the_reference_starts_them(num_frames: int, starts: list[int]) -> None:
    assert [int(GridView(REFERENCE, view=view).frames(times(num_frames))[0]) for view in range(4)] == starts


@pytest.mark.parametrize(("num_frames", "start"), [(250, 93), (251, 93), (64, 0), (10, 0)])
def test_a_single_test_clip_lies_in_the_middle(num_frames: int, start: int) -> None:
    view = GridView(ViewSpec(test_clips=1, test_crops=1), view=0)
    assert view.frames(times(num_frames))[0] == start


def test_a_short_clip_starts_over() -> None:
    assert GridView(ViewSpec(num_frames=6, stride=2), view=0).frames(times(5)).tolist() == [0, 2, 4, 1, 3, 0]


@pytest.mark.parametrize(
    ("height", "width", "offsets"),
    [
        pytest.param(256, 340, [(16, 0), (16, 58), (16, 116)], id="wide"),
        pytest.param(340, 256, [(0, 16), (58, 16), (116, 16)], id="tall"),
        pytest.param(512, 512, [(16, 0), (16, 16), (16, 32)], id="square-runs-left-to-right"),
        pytest.param(256, 341, [(16, 0), (16, 59), (16, 117)], id="odd-difference-rounds-up"),
    ],
)
def test_three_crops_run_along_the_longer_side(
    height: int, width: int, offsets: list[tuple[int, int]]
) -> None:
    boxes = [GridView(REFERENCE, view=4 * crop).box(height, width) for crop in range(3)]
    assert [(box.top, box.left) for box in boxes] == offsets


def test_the_centre_crop_rounds_down() -> None:
    box = GridView(ViewSpec(test_crops=1), view=0).box(256, 341)
    assert (box.top, box.left) == (16, 58)


def test_views_are_ordered_crop_by_crop() -> None:
    views = views_of(REFERENCE, split="validation", seed=0, clip_id="a")
    starts = [int(view.frames(times(250))[0]) for view in views]
    lefts = [view.box(256, 340).left for view in views]
    assert starts == [0, 62, 124, 186] * 3
    assert lefts == [0] * 4 + [58] * 4 + [116] * 4


def test_training_starts_cover_the_reference_range() -> None:
    spec = ViewSpec(num_frames=4, stride=3)
    starts = {int(TrainView(spec, seed=0, clip_id=str(i), view=0).frames(times(14))[0]) for i in range(300)}
    assert starts == set(range(14 - 3 * 3))


def test_a_view_draws_the_same_numbers_in_any_order() -> None:
    def draw(clip: str, view: int) -> tuple[object, ...]:
        drawn = TrainView(REFERENCE, seed=7, clip_id=clip, view=view)
        return (*drawn.frames(times(300)).tolist(), drawn.box(240, 320))

    forwards = {(clip, view): draw(clip, view) for clip in "abc" for view in range(3)}
    backwards = {(clip, view): draw(clip, view) for view in (2, 1, 0) for clip in "cba"}
    assert forwards == backwards
    assert len(set(forwards.values())) == 9


def test_seed_clip_and_view_are_kept_apart() -> None:
    boxes = {
        TrainView(REFERENCE, seed=seed, clip_id=clip, view=view).box(240, 320)
        for seed, clip, view in [(0, "a", 1), (1, "a", 0), (0, "b", 0), (0, "a", 0)]
    }
    assert len(boxes) == 4


def test_the_draw_of_a_view_never_changes() -> None:
    view = TrainView(REFERENCE, seed=0, clip_id="P01_01_0", view=0)
    assert view.frames(times(300))[:3].tolist() == [171, 173, 175]
    assert view.box(256, 340) == Box(height=316, width=443, top=32, left=213, mirrored=False)


def test_height_and_width_are_scaled_independently_within_the_range() -> None:
    boxes = [TrainView(REFERENCE, seed=0, clip_id=str(i), view=0).box(256, 256) for i in range(200)]
    factors = np.array([(box.height / 256, box.width / 256) for box in boxes])
    assert factors.min() >= 0.89
    assert factors.max() <= 1.33
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.2
    assert 0.4 < np.mean([box.mirrored for box in boxes]) < 0.6


@given(spec=specs, num_frames=st.integers(1, 400), height=st.integers(1, 700), width=st.integers(1, 700))
def test_every_view_lies_inside_its_clip_and_its_frame(
    spec: ViewSpec, num_frames: int, height: int, width: int
) -> None:
    for split in ("train", "test"):
        for view in views_of(spec, split=split, seed=1, clip_id="c"):
            frames, box = view.frames(times(num_frames)), view.box(height, width)
            assert frames.shape == (spec.num_frames,)
            assert 0 <= frames.min() <= frames.max() < num_frames
            assert 0 <= box.top <= box.height - spec.crop_size
            assert 0 <= box.left <= box.width - spec.crop_size


def test_a_target_rate_takes_the_frame_on_show_at_each_tick() -> None:
    view = GridView(ViewSpec(num_frames=5, stride=1, fps=10, test_clips=1, test_crops=1), view=0)
    uneven = np.array([0.0, 0.05, 0.21, 0.22, 0.4])  # ticks at 0, 0.1, 0.2, 0.3, 0.4
    assert view.frames(uneven).tolist() == [0, 1, 1, 3, 4]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(240, 320), (131, 175), (1080, 1920), (32, 1024), (300, 200)])
def test_a_crop_is_what_pil_gives_for_the_resized_frame(height: int, width: int, interpolation: str) -> None:
    smooth = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    picture = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
    box = TrainView(REFERENCE, seed=0, clip_id="x", view=3).box(height, width)
    whole = picture.resize((box.width, box.height), Image.Resampling[interpolation.upper()])
    wanted = np.asarray(whole.crop((box.left, box.top, box.left + 224, box.top + 224)))
    if box.mirrored:
        wanted = wanted[:, ::-1]
    ours = box.crop(picture, 224, interpolation)
    difference = np.abs(ours.astype(int) - wanted)
    assert ours.shape == (224, 224, 3)
    # PIL rounds to whole levels between its two passes, so last bits differ from the resize of the whole frame
    assert difference.max() <= 2
    assert difference.mean() < 0.2


def test_a_mirrored_crop_is_the_crop_mirrored() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    plain = Box(60, 80, 5, 9).crop(picture, 32, "bilinear")
    assert (Box(60, 80, 5, 9, mirrored=True).crop(picture, 32, "bilinear") == plain[:, ::-1]).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"test_crops": 2}, "test_crops must be 1 or 3, got 2"),
        ({"crop_size": 300}, "crop_size 300 does not fit in resize 256"),
        ({"scale_min": 0.5}, "use a scale_min of at least 0.875"),
        ({"flip": 1.5}, "flip is a probability"),
        ({"fps": 0.0}, "fps must be between"),
    ],
)
def test_bad_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViewSpec(**values)  # type: ignore[arg-type]


@given(specs)
def test_a_spec_comes_back_equal_from_json(spec: ViewSpec) -> None:
    assert ViewSpec.from_dict(spec.to_dict()) == spec


def test_span_counts_both_ends() -> None:
    assert span(ViewSpec(num_frames=4, stride=3)) == 10
