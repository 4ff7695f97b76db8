import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vivit.pipeline.augmentation import RANDAUGMENT, REFERENCE_RANDAUGMENT, Augmentation
from vivit.pipeline.cache_settings import Backbone, CacheSettings
from vivit.pipeline.errors import ConfigError
from vivit.pipeline.views import ViewSpec, view_draws


@given(st.sampled_from([RANDAUGMENT, REFERENCE_RANDAUGMENT]), st.integers(1, 16), st.integers(0, 20))
def test_a_name_in_full_gives_the_same_augmentation_back(kind: str, layers: int, magnitude: int) -> None:
    augmentation = Augmentation(kind=kind, layers=layers, magnitude=magnitude)
    assert Augmentation.parse(str(augmentation)) == augmentation


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("none", "none"),
        ("reference-colour", "reference-colour"),
        ("reference-randaugment", "reference-randaugment-n2-m15"),
        ("randaugment", "randaugment-n2-m9"),
        ("randaugment-m17", "randaugment-n2-m17"),
        ("reference-randaugment-n3", "reference-randaugment-n3-m15"),
    ],
)
def test_a_spec_holds_the_name_in_full(short: str, full: str) -> None:
    assert ViewSpec(augment=short) == ViewSpec(augment=full)
    assert ViewSpec(augment=short).augment == full


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reference-color", "did you mean reference-colour?"),
        ("", "unknown augmentation ''"),
        ("none-m3", "none has neither layers nor a magnitude"),
        ("randaugment-n0", "layers must be 1 to 16, got 0"),
        ("randaugment-m31", "the magnitude must be 0 to 30, got 31"),
        ("reference-randaugment-m21", "the magnitude must be 0 to 20, got 21"),
        ("randaugment-m9-n2", "unknown augmentation 'randaugment-m9'"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViewSpec(augment=name)


def settings(**views: str) -> CacheSettings:
    backbone = Backbone(name="vit", weights="random:0", weights_sha256="0", embed_dim=8)
    return CacheSettings(dataset="d", manifest_sha256="0", backbone=backbone, views=ViewSpec(**views))  # type: ignore[arg-type]


def test_settings_from_before_augmentation_have_none_and_keep_their_digest() -> None:
    old = json.loads(json.dumps(settings().to_dict()))
    assert "augment" not in old["views"]
    assert CacheSettings.from_dict(old) == settings()
    assert CacheSettings.from_dict(old).differences(settings(augment="none")) == []


def test_settings_with_another_augmentation_differ_both_ways() -> None:
    plain, changed = settings(), settings(augment="randaugment")
    assert CacheSettings.from_dict(changed.to_dict()) == changed
    assert plain.differences(changed) == ["views.augment: none here, randaugment-n2-m9 there"]
    assert changed.differences(plain) == ["views.augment: randaugment-n2-m9 here, none there"]


def test_each_stream_of_a_view_has_draws_of_its_own() -> None:
    view = {"seed": 3, "clip_id": "a", "view": 1}
    first, second = view_draws(6, **view), view_draws(6, **view, stream=1)  # type: ignore[arg-type]
    assert not set(first) & set(second)
    assert view_draws(9, **view)[:6] == first  # type: ignore[arg-type]
    assert all(0 <= draw < 1 for draw in first + second)
