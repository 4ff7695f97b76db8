import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vivit.pipeline.backbones import LoadedBackbone, load_backbone, weights_sha256
from vivit.pipeline.cache_settings import CacheSettings
from vivit.pipeline.checkpoint import Checkpoint, SpatialConfig
from vivit.pipeline.errors import CheckpointError, ConfigError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.spatial_vit import create_spatial_vit
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.init_source import read_source
from vivit.stage2_temporal.initialisation import initialise, interpolated, origins_in_words
from vivit.stage2_temporal.model import ModelConfig, TemporalModel
from vivit.stage2_temporal.run_folder import RunFolder, default_run_name
from vivit.stage2_temporal.train import train
from vivit.stage2_temporal.vit_blocks import BlockSource

DIM, TIME, CLASSES = 16, 4, {"label": ["label 0", "label 1", "label 2"]}
Module = TypeVar("Module", bound=nn.Module)
SPATIAL = SpatialConfig(
    name="vit_tiny_patch16_224",
    options={"embed_dim": DIM, "depth": 3, "num_heads": 2, "act_layer": "gelu_tanh"},
    image_size=(32, 32),
)


def _half(**changes: Any) -> Any:
    """A `TemporalModel` with random values everywhere."""
    settings: dict[str, Any] = {"dim": DIM, "time": TIME, "heads": {"label": 3}, "depth": 2, "num_heads": 2}
    return _random(TemporalModel(ModelConfig(**(settings | changes))), seed=1)


def _random(module: Module, seed: int) -> Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def _encoder(path: Path, half: TemporalModel, classes: dict[str, list[str]] | None = None) -> str:
    """A model file with a factorised encoder whose temporal half is `half`."""
    tensors = half.state_dict() | {"spatial.cls_token": torch.zeros(1, 1, DIM)}
    config = half.config.to_dict()
    Checkpoint(
        model="fe", spatial=SPATIAL, rest=config, classes=classes or {}, source="test", tensors=tensors
    ).write(path)
    return str(path)


def _vit(path: Path, model: str, *, spatial: SpatialConfig = SPATIAL) -> tuple[str, dict[str, Tensor]]:
    """A model file with the blocks of a small ViT, and these."""
    blocks = _random(create_spatial_vit(spatial), seed=2).state_dict()
    prefix = "spatial." if model == "image" else ""
    tensors = {prefix + name: value for name, value in blocks.items()}
    Checkpoint(model=model, spatial=spatial, source="test", tensors=tensors).write(path)
    return str(path), blocks


@pytest.fixture
def config(tmp_path: Path, toy_cache: FeatureCache) -> Callable[..., TrainConfig]:
    def make(init: str, run: str = "run", **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "device": "cpu"}
        return TrainConfig(cache=toy_cache.path, run=tmp_path / run, init=init, **(settings | changes))

    return make


def _started(
    config: TrainConfig, cache: FeatureCache, *, time: int = TIME, dim: int = DIM, heads: Any = None
) -> tuple[Any, Any, dict[str, str]]:
    """A `TemporalModel` that starts from `init`, the fresh one that it was made of, and the origins."""
    heads = heads or {"label": 3}
    made = config.temporal_model(dim=dim, time=time, heads=heads)
    torch.manual_seed(0)
    fresh = TemporalModel(made)
    model = TemporalModel(made)
    model.load_state_dict(fresh.state_dict())
    origins = initialise(model, read_source(config.init, cache.settings), CLASSES)
    assert list(origins) == list(model.state_dict())
    return model, fresh, origins


def _same(a: nn.Module, b: nn.Module) -> bool:
    there = b.state_dict()
    return all(torch.equal(value, there[name]) for name, value in a.state_dict().items())


# --- from a temporal half ---


def test_scratch_leaves_every_tensor_as_it_is(config: Any, toy_cache: FeatureCache) -> None:
    model, fresh, origins = _started(config("scratch"), toy_cache)
    assert _same(model, fresh)
    assert set(origins.values()) == {"fresh"}
    assert model.config.depth == 4


def test_a_temporal_half_of_the_same_sizes_is_copied(
    config: Any, toy_cache: FeatureCache, tmp_path: Path
) -> None:
    half = _half()
    (tmp_path / "warmup").mkdir()
    model, _, origins = _started(config(_encoder(tmp_path / "warmup" / "model.safetensors", half)), toy_cache)
    assert _same(model, half)
    assert (model.config.depth, model.config.num_heads) == (2, 2)
    assert origins == {name: f"warmup/model.safetensors: {name}" for name in half.state_dict()}
    tokens = torch.randn(2, TIME, DIM)
    assert torch.equal(model.eval()(tokens)["label"], half(tokens)["label"])


@pytest.mark.parametrize("to", [1, 3, 16, 32, 64, 128])
def test_positions_are_interpolated_over_time(
    config: Any, toy_cache: FeatureCache, tmp_path: Path, to: int
) -> None:
    half = _half(time=8)
    model, _, origins = _started(config(_encoder(tmp_path / "a.safetensors", half)), toy_cache, time=to)
    there, here = half.temporal.pos_embed[0].detach().numpy(), model.temporal.pos_embed[0].detach().numpy()
    places = np.linspace(0, 7, to)
    expected = np.stack([np.interp(places, np.arange(8), there[1:, i]) for i in range(DIM)], axis=1)
    np.testing.assert_array_equal(here[0], there[0])
    np.testing.assert_allclose(here[1:], expected, atol=1e-5)
    assert origins["temporal.pos_embed"].endswith(
        f"a.safetensors: temporal.pos_embed, interpolated from 8 to {to} time steps"
    )
    assert _same(model.temporal.blocks, half.temporal.blocks)


def test_positions_of_one_time_step_are_repeated() -> None:
    positions = torch.randn(1, 2, 3)
    assert torch.equal(interpolated(positions, 3), positions[:, [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter": "linear"}, "has the adapter bottleneck"),
        ({"adapter_width": 3}, "has another width"),
    ],
    ids=["kind", "width"],
)
def test_another_adapter_is_fresh(
    config: Any, toy_cache: FeatureCache, tmp_path: Path, changes: Any, reason: str
) -> None:
    half = _half()
    init = _encoder(tmp_path / "a.safetensors", half)
    model, fresh, origins = _started(config(init, **changes), toy_cache)
    assert _same(model.adapter, fresh.adapter)
    assert _same(model.temporal, half.temporal)
    assert all(
        origin.startswith("fresh: ") and reason in origin
        for name, origin in origins.items()
        if name.startswith("adapter")
    )


@pytest.mark.parametrize(
    ("there", "classes", "reason"),
    [
        ({"verb": 3}, {}, "has no head label"),
        ({"label": 5}, {}, "head label has 3 classes, and 5 in"),
        ({"label": 3}, {"label": ["label 0", "label 2", "label 1"]}, "has classes of other names"),
    ],
    ids=["name", "number", "class names"],
)
def test_a_head_for_other_classes_is_fresh(
    config: Any, toy_cache: FeatureCache, tmp_path: Path, there: Any, classes: Any, reason: str
) -> None:
    init = _encoder(tmp_path / "a.safetensors", _half(heads=there), classes)
    model, _, origins = _started(config(init), toy_cache)
    assert not any(parameter.any() for parameter in model.heads.parameters())
    assert reason in origins["heads.label.weight"]


@pytest.mark.parametrize("classes", [{}, {"label": []}, CLASSES], ids=["unknown", "empty", "the same"])
def test_each_head_is_copied_by_itself(
    config: Any, toy_cache: FeatureCache, tmp_path: Path, classes: Any
) -> None:
    half = _half(heads={"verb": 2, "label": 3})
    init = _encoder(tmp_path / "a.safetensors", half, classes)
    model, _, _ = _started(config(init), toy_cache, heads={"label": 3, "tool": 2})
    assert torch.equal(model.heads["label"].weight, half.heads["label"].weight)
    assert not model.heads["tool"].weight.any()


def test_a_spatial_half_beside_the_temporal_one_is_left_alone(
    config: Any, toy_cache: FeatureCache, tmp_path: Path
) -> None:
    init = _encoder(tmp_path / "a.safetensors", _half())
    model = _half()
    model.spatial = nn.Linear(2, 2)
    before = model.spatial.weight.clone()
    origins = initialise(model, read_source(init, toy_cache.settings), CLASSES)
    assert not any(name.startswith("spatial") for name in origins)
    assert torch.equal(model.spatial.weight, before)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"depth": 3}, {}, r"the depth of .*a\.safetensors is 2, and here it is 3: pass --depth 2"),
        ({"depth": 1}, {}, r"is 2, and here it is 1: pass --depth 2"),
        ({"num_heads": 4}, {}, r"number of heads of .* is 2, and here it is 4: pass --heads 2"),
        ({"mlp_ratio": 2.0}, {}, r"MLP ratio of .* is 4, and here it is 2: pass --mlp-ratio 4"),
        ({"temporal": "mean"}, {}, r"has the temporal model transformer, .* pass --temporal transformer"),
        ({}, {"dim": 7}, r"is for tokens of 16 channels, and here they have 7"),
    ],
    ids=["more blocks", "fewer blocks", "heads", "MLP", "kind", "width"],
)
def test_a_temporal_half_of_another_size_is_refused(
    config: Any, toy_cache: FeatureCache, tmp_path: Path, changes: Any, shape: Any, message: str
) -> None:
    init = _encoder(tmp_path / "a.safetensors", _half())
    with pytest.raises(CheckpointError, match=message):
        _started(config(init, **changes), toy_cache, **shape)


def test_a_file_that_lacks_what_it_describes_is_refused_and_nothing_changes(
    toy_cache: FeatureCache, tmp_path: Path
) -> None:
    source = read_source(_encoder(tmp_path / "a.safetensors", _half()), toy_cache.settings)
    assert source is not None
    model, before = _half(time=TIME), _half()
    name = "temporal.blocks.1.mlp.fc2.bias"
    for tensors, message in (
        ({k: v for k, v in source.tensors.items() if k != name}, f"it has no {name}"),
        ({**source.tensors, name: torch.zeros(3)}, rf"the tensor for {name} is \[3\], and \[16\] is needed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            initialise(model, replace(source, tensors=tensors), CLASSES)
        assert _same(model, before)


# --- from blocks ---


@pytest.mark.parametrize("kind", ["image", "joint", "blocks"])
def test_the_last_blocks_of_a_vit_become_the_temporal_blocks(
    config: Any, toy_cache: FeatureCache, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    init, blocks = _vit(tmp_path / "vit.safetensors", kind)
    model, fresh, origins = _started(config(init, depth=2, num_heads=2), toy_cache)
    for name, value in model.temporal.blocks.state_dict().items():
        index, rest = name.split(".", 1)
        assert torch.equal(value, blocks[f"blocks.{int(index) + 1}.{rest}"])
    prefix = "spatial." if kind == "image" else ""
    origin = origins["temporal.blocks.0.attn.qkv.weight"]
    assert origin.endswith(f"vit.safetensors: {prefix}blocks.1.attn.qkv.weight")
    others = {name for name in origins if not name.startswith("temporal.blocks")}
    assert all(torch.equal(model.state_dict()[name], fresh.state_dict()[name]) for name in others)
    assert all(origins[name].endswith("vit.safetensors gives blocks only") for name in others)
    assert "blocks 1..2 of 3 in" in caplog.text
    assert "activation" not in caplog.text


def test_another_activation_is_said(
    config: Any, toy_cache: FeatureCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = {key: value for key, value in SPATIAL.options.items() if key != "act_layer"}
    init, _ = _vit(tmp_path / "vit.safetensors", "image", spatial=replace(SPATIAL, options=options))
    _started(config(init, depth=1, num_heads=2), toy_cache)
    assert "their activation is GELU(approximate='none'); here it is the tanh approximation" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 2}, r"has 3 blocks, and 4 were asked for: pass --depth 3 or less"),
        ({"depth": 2}, r"number of heads of .* is 2, and here it is 1: pass --heads 2"),
        ({"depth": 2, "num_heads": 2, "mlp_ratio": 2.0}, r"MLP ratio of .* is 4, and here it is 2"),
        ({"temporal": "mean"}, r"gives blocks only, and the temporal model mean has none"),
    ],
    ids=["depth", "heads", "MLP", "kind"],
)
def test_blocks_of_another_size_are_refused(
    config: Any, toy_cache: FeatureCache, tmp_path: Path, changes: Any, message: str
) -> None:
    init, _ = _vit(tmp_path / "vit.safetensors", "image")
    with pytest.raises(CheckpointError, match=message):
        _started(config(init, **changes), toy_cache)


def test_blocks_of_another_make_are_refused(config: Any, toy_cache: FeatureCache, tmp_path: Path) -> None:
    spatial = replace(SPATIAL, options={**SPATIAL.options, "qk_norm": True})
    init, _ = _vit(tmp_path / "vit.safetensors", "image", spatial=spatial)
    with pytest.raises(CheckpointError, match=r"blocks of another make, with or without attn\.k_norm"):
        _started(config(init, depth=2, num_heads=2), toy_cache)
    init, _ = _vit(tmp_path / "factorised.safetensors", "factorised-dot-product")
    with pytest.raises(CheckpointError, match="attend over time and space apart"):
        config(init).identity()


def test_a_layer_scale_is_multiplied_into_the_blocks(
    config: Any, toy_cache: FeatureCache, tmp_path: Path
) -> None:
    spatial = replace(SPATIAL, options={**SPATIAL.options, "init_values": 1e-5})
    init, tensors = _vit(tmp_path / "vit.safetensors", "image", spatial=spatial)
    model, _, origins = _started(config(init, depth=1, num_heads=2), toy_cache)
    vit = create_spatial_vit(spatial)
    vit.load_state_dict(tensors)
    last, tokens = vit.blocks[2], torch.randn(2, 5, DIM)
    assert isinstance(last, Block)
    torch.testing.assert_close(model.eval().temporal.blocks[0](tokens), last.eval()(tokens))
    assert "(layer scale multiplied in)" in origins["temporal.blocks.0.attn.proj.weight"]


@pytest.fixture(scope="module")
def backbone() -> LoadedBackbone:
    return load_backbone("vit_ti16", weights="random", crop_size=32)


@pytest.fixture
def of_backbone(toy_cache: FeatureCache, backbone: LoadedBackbone) -> CacheSettings:
    """Settings of a cache that was made by `backbone`."""
    settings = toy_cache.settings
    made_by = replace(
        settings.backbone,
        name=backbone.config.name,
        weights=backbone.source,
        weights_sha256=weights_sha256(backbone.model),
        embed_dim=192,
    )
    return replace(settings, backbone=made_by, views=replace(settings.views, crop_size=32))


def test_spatial_takes_the_last_blocks_of_the_vit_that_made_the_cache(
    of_backbone: CacheSettings, backbone: LoadedBackbone
) -> None:
    there = backbone.model.state_dict()
    for spatial in (of_backbone, backbone):
        source = read_source("spatial", spatial)
        assert isinstance(source, BlockSource)
        assert (source.depth, source.num_heads, source.dim, source.mlp_ratio) == (12, 3, 192, 4)
        model: Any = TemporalModel(ModelConfig(dim=192, time=4, heads={"label": 3}, depth=2))
        origins = initialise(model, source, CLASSES)
        assert torch.equal(model.temporal.blocks[1].mlp.fc1.weight, there["blocks.11.mlp.fc1.weight"])
        assert origins["temporal.blocks.0.norm1.weight"].endswith("(random:0): blocks.10.norm1.weight")


def test_spatial_without_the_very_weights_is_an_error(of_backbone: CacheSettings) -> None:
    def changed(**changes: Any) -> CacheSettings:
        return replace(of_backbone, backbone=replace(of_backbone.backbone, **changes))

    with pytest.raises(CheckpointError, match=r"\(file:vit\.npz\).*pass that file itself, --init FILE"):
        read_source("spatial", changed(weights="file:vit.npz"))
    with pytest.raises(CheckpointError, match="are not those that made the cache"):
        read_source("spatial", changed(weights_sha256="0" * 64))


# --- files ---


@pytest.mark.parametrize("what", ["missing", "folder", "damaged", "truncated", "weights alone"])
def test_a_file_that_cannot_be_read_is_an_error(config: Any, tmp_path: Path, what: str) -> None:
    path = tmp_path / "somewhere" / "model.safetensors"
    path.parent.mkdir()
    _encoder(path, _half())
    data = path.read_bytes()
    init, message = str(path), "is damaged"
    if what == "missing":
        init, message = "spatail", "--init spatail is not scratch, not spatial, and no file or folder"
    elif what == "folder":
        path.unlink()
        init, message = str(path.parent), r"has no model\.safetensors: pass a model file or a run folder"
    elif what == "damaged":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif what == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        RunFolder(path.parent).save_model(_half().state_dict(), {"epoch": 1})
        message = r"is not a run: it has no config\.json"
    with pytest.raises(CheckpointError, match=message):
        config(init).identity()


def test_an_empty_init_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="init is empty: pass scratch, spatial"):
        config("")


def test_a_run_is_known_by_the_bytes_that_it_started_from(config: Any, tmp_path: Path) -> None:
    here = _encoder(tmp_path / "a.safetensors", _half())
    (tmp_path / "b").mkdir()
    shutil.copy(here, tmp_path / "b" / "model.safetensors")
    for there in (tmp_path / "b", tmp_path / "b" / "model.safetensors"):
        assert config(here).identity() == config(str(there)).identity()
        assert default_run_name(config(here)) == default_run_name(config(str(there)))
    other = _encoder(tmp_path / "c.safetensors", _half(time=3))
    names = {default_run_name(config(init)) for init in (here, other, "scratch", "spatial")}
    assert len(names) == 4
    assert [config(word).identity()["init"] for word in ("scratch", "spatial")] == ["scratch", "spatial"]
    before = config(other).identity()
    Path(other).write_bytes(Path(other).read_bytes()[:-1] + b"!")  # as long as before
    with pytest.raises(CheckpointError, match="is damaged"):
        config(other).identity()
    _encoder(Path(other), _random(_half(time=3), seed=9))
    assert config(other).identity() != before
    identity = config(here).identity()
    assert (identity["depth"], identity["num_heads"], identity["mlp_ratio"]) == (2, 2, 4.0)
    assert json.loads(json.dumps(identity)) == identity


# --- in a training ---


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_run_starts_from_another_run(
    config: Any, toy_cache: FeatureCache, tmp_path: Path, as_folder: bool
) -> None:
    first = train(config("scratch", "first", depth=1, adapter="temporal-conv")).run
    init = first if as_folder else first / "model.safetensors"
    second = config(str(init), "second", adapter="temporal-conv", num_frames=2)
    model, _, origins = _started(second, toy_cache, time=2)
    stored, _ = RunFolder(first).load_model()
    assert all(
        torch.equal(value, stored[name])
        for name, value in model.state_dict().items()
        if name != "temporal.pos_embed"
    )
    assert origins["adapter.conv.weight"] == "first/model.safetensors: adapter.conv.weight"
    run = RunFolder(train(second).run)
    assert run.read_config()["model"]["depth"] == 1
    assert run.read_config()["training"]["init"].startswith("sha256:")
    assert json.loads((run.path / "initialisation.json").read_text()) == origins


def test_training_begins_at_the_tensors_of_the_file(
    config: Any, toy_cache: FeatureCache, tmp_path: Path
) -> None:
    half = _half()
    init = _encoder(tmp_path / "a.safetensors", half, CLASSES)
    run = train(config(init, learning_rate=1e-12, weight_decay=0.0, ema=0.9)).run
    stored, _ = RunFolder(run).load_model()
    for name, value in half.state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=1e-9)


def test_a_run_that_goes_on_is_not_initialised_again(
    config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    init = _encoder(tmp_path / "a.safetensors", _half())
    run = train(config(init)).run
    lines = [record.getMessage() for record in caplog.records]
    assert "temporal.blocks.1 (12 tensors)" in "\n".join(lines)
    assert any(line.startswith("parameters: adapter ") for line in lines)
    (run / "initialisation.json").unlink()
    caplog.clear()
    train(config(init))
    assert not (run / "initialisation.json").exists()
    assert "tensors)" not in caplog.text
    _encoder(tmp_path / "a.safetensors", _half(time=3))
    with pytest.raises(CheckpointError, match=r"training\.init: sha256:.* in the run, sha256:.* asked for"):
        train(config(init))


def test_an_init_that_does_not_fit_leaves_no_run_behind(config: Any, tmp_path: Path) -> None:
    init = _encoder(tmp_path / "a.safetensors", _half())
    with pytest.raises(CheckpointError, match="pass --depth 2"):
        train(config(init, depth=3))
    assert train(config(init, depth=2)).resumed_from == 0


def test_neighbours_of_one_origin_share_a_line() -> None:
    half = _half(depth=4)
    origins = {name: f"a: {name}" for name in half.state_dict()}
    assert origins_in_words(origins) == [
        "adapter (4 tensors): a: adapter.*",
        "temporal.cls_token: a: temporal.cls_token",
        "temporal.pos_embed: a: temporal.pos_embed",
        *(f"temporal.blocks.{i} (12 tensors): a: temporal.blocks.{i}.*" for i in range(4)),
        "temporal.norm (2 tensors): a: temporal.norm.*",
        "heads.label (2 tensors): a: heads.label.*",
    ]
    assert origins_in_words(dict.fromkeys(origins, "fresh")) == [
        f"adapter .. heads.label ({len(origins)} tensors): fresh"
    ]
    assert origins_in_words(
        {"spatial.blocks.0.a": "x", "spatial.blocks.0.b": "x", "cls_token": "b: cls_token"}
    ) == [
        "spatial.blocks.0 (2 tensors): x",
        "cls_token: b: cls_token",
    ]
