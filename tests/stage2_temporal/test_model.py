import math
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vivit.pipeline.errors import ConfigError
from vivit.stage2_temporal.adapter import (
    ADAPTERS,
    BottleneckAdapter,
    LinearAdapter,
    TemporalConvAdapter,
    create_adapter,
)
from vivit.stage2_temporal.model import ModelConfig, TemporalModel, parameter_counts, parameters_in_words
from vivit.stage2_temporal.temporal import TemporalTransformer, default_num_heads, drop_path_rates

Module = TypeVar("Module", bound=nn.Module)


def _model(**changes: object) -> TemporalModel:
    values = {"dim": 24, "time": 5, "heads": {"verb": 3, "noun": 4}, "num_heads": 2, "depth": 2} | changes
    return TemporalModel(ModelConfig(**values)).eval()  # type: ignore[arg-type]


def _randomised(module: Module) -> Module:
    """Every parameter away from zero and one, so that a forgotten one shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_changes_no_bit(name: str, time: int) -> None:
    tokens = torch.randn(2, time, 24)
    with_adapter, without = _model(adapter=name, time=time), _model(adapter="none", time=time)
    for model in (with_adapter, without):
        _randomised(model.temporal)
        _randomised(model.heads)
    missing = without.load_state_dict(with_adapter.state_dict(), strict=False).missing_keys
    assert missing == []
    for head, logits in with_adapter(tokens).items():
        assert torch.equal(logits, without(tokens)[head])


def test_the_adapter_is_a_residual_bottleneck() -> None:
    adapter = _randomised(BottleneckAdapter(dim=6, width=2))
    tokens = torch.randn(3, 4, 6)
    hidden = F.gelu(tokens @ adapter.down.weight.T + adapter.down.bias, approximate="tanh")
    expected = tokens + hidden @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(adapter(tokens), expected)
    assert adapter.down.weight.shape == (2, 6)


def test_the_linear_adapter_is_a_residual_map() -> None:
    adapter = _randomised(LinearAdapter(dim=6))
    tokens = torch.randn(3, 4, 6)
    expected = tokens + tokens @ adapter.change.weight.T + adapter.change.bias
    torch.testing.assert_close(adapter(tokens), expected)


@pytest.mark.parametrize("time", [1, 2, 3, 7])
def test_the_temporal_convolution_sees_one_neighbour_on_each_side(time: int) -> None:
    adapter = _randomised(TemporalConvAdapter(dim=6, width=2))
    assert adapter.conv.bias is not None
    tokens = torch.randn(3, time, 6)
    down = tokens @ adapter.down.weight.T + adapter.down.bias
    before, behind = F.pad(down, (0, 0, 1, 0))[:, :-1], F.pad(down, (0, 0, 0, 1))[:, 1:]
    kernel = adapter.conv.weight[:, 0]
    mixed = before * kernel[:, 0] + down * kernel[:, 1] + behind * kernel[:, 2] + adapter.conv.bias
    hidden = F.gelu(mixed, approximate="tanh")
    expected = tokens + hidden @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(adapter(tokens), expected)


def test_a_fresh_temporal_convolution_passes_on_what_it_gets() -> None:
    fresh, values = TemporalConvAdapter(dim=6, width=4).conv, torch.randn(2, 4, 5)
    assert torch.equal(fresh(values), values)


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"none"}))
def test_an_adapter_learns_from_the_first_step(name: str) -> None:
    model = _model(adapter=name)
    _randomised(model.heads)
    model(torch.randn(4, 5, 24))["verb"][:, 0].sum().backward()
    assert any(parameter.grad.any() for parameter in model.adapter.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ("bottleneck", 24 * 6 * 2 + 6 + 24),
        ("linear", 24 * 25),
        ("temporal-conv", 24 * 6 * 2 + 30 + 24),
        ("none", 0),
    ],
)
def test_parameters_are_counted_by_part(adapter: str, expected: int) -> None:
    model = _model(adapter=adapter)
    counts = parameter_counts(model)
    block = 24 * 24 * 4 + 24 * 4 + 2 * 24 * 96 + 96 + 24 + 4 * 24
    assert counts["adapter"] == expected
    assert counts["temporal"] == 2 * block + 24 + 6 * 24 + 2 * 24
    assert counts["heads"] == 25 * 7
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert parameters_in_words(model) == (
        f"parameters: adapter {expected}, temporal {counts['temporal']:,}, heads 175, in all {counts['total']:,}"
    )
    model.heads.requires_grad_(False)
    assert parameter_counts(model)["heads"] == 0


def test_a_registered_adapter_is_used_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, "scale", lambda dim, width: nn.Linear(dim, dim, bias=False))
    assert isinstance(_model(adapter="scale").adapter, nn.Linear)
    with pytest.raises(ConfigError, match="unknown adapter 'bottelneck': did you mean bottleneck"):
        create_adapter("bottelneck", 8, 2)


def _reference_forward(model: TemporalTransformer, tokens: Tensor, num_heads: int) -> Tensor:
    """The reference's temporal encoder, written out."""
    p = dict(model.named_parameters())
    batch, _, dim = tokens.shape
    x = torch.cat([p["cls_token"].expand(batch, 1, dim), tokens], dim=1) + p["pos_embed"]
    for i in range(len(model.blocks)):
        b = f"blocks.{i}."
        y = _layer_norm(x, p[b + "norm1.weight"], p[b + "norm1.bias"])
        q, k, v = (y @ p[b + "attn.qkv.weight"].T + p[b + "attn.qkv.bias"]).chunk(3, dim=-1)
        heads = []
        for q_h, k_h, v_h in zip(*(z.chunk(num_heads, dim=-1) for z in (q, k, v)), strict=True):
            scores = q_h @ k_h.transpose(1, 2) / math.sqrt(dim / num_heads)
            heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v_h)
        x = x + torch.cat(heads, -1) @ p[b + "attn.proj.weight"].T + p[b + "attn.proj.bias"]
        y = _layer_norm(x, p[b + "norm2.weight"], p[b + "norm2.bias"])
        y = y @ p[b + "mlp.fc1.weight"].T + p[b + "mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ p[b + "mlp.fc2.weight"].T + p[b + "mlp.fc2.bias"]
    return _layer_norm(x, p["norm.weight"], p["norm.bias"])[:, 0]


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * weight + bias


@pytest.mark.parametrize(
    "scale", [1.0, 1e-3], ids=["tokens", "tokens so small that the norm's epsilon shows"]
)
def test_the_temporal_transformer_is_the_reference(scale: float) -> None:
    model = _randomised(TemporalTransformer(dim=12, time=4, depth=3, num_heads=3).double().eval())
    with torch.no_grad():
        model.cls_token.mul_(scale)
        model.pos_embed.mul_(scale)
    tokens = torch.randn(2, 4, 12, dtype=torch.float64) * scale
    expected = _reference_forward(model, tokens, num_heads=3)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)


def test_parameters_are_called_as_in_timm() -> None:
    names = set(TemporalTransformer(dim=8, time=2, depth=1, num_heads=1).state_dict())
    block = {f"blocks.0.{part}.{kind}" for part in BLOCK for kind in ("weight", "bias")}
    assert names == block | {"cls_token", "pos_embed", "norm.weight", "norm.bias"}


BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def test_initialisation_is_the_reference() -> None:
    torch.manual_seed(0)
    dim, model = 256, _model(dim=256, time=99, num_heads=4, depth=1)
    p = dict(model.named_parameters())
    block = "temporal.blocks.0."
    bounds = {"attn.qkv": dim + dim, "attn.proj": dim + dim, "mlp.fc1": 5 * dim, "mlp.fc2": 5 * dim}
    for name, fans in bounds.items():
        largest = p[f"{block}{name}.weight"].abs().max().item()
        assert largest == pytest.approx(math.sqrt(6 / fans), rel=0.01)
    assert not p[block + "attn.qkv.bias"].any()
    assert not p[block + "attn.proj.bias"].any()
    assert p[block + "mlp.fc1.bias"].std().item() == pytest.approx(1e-6, rel=0.1)
    assert p["temporal.pos_embed"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not p["temporal.cls_token"].any()
    assert not any(
        p[f"heads.{head}.{kind}"].any() for head in ("verb", "noun") for kind in ("weight", "bias")
    )


def test_stochastic_depth_rises_linearly_and_keeps_the_scale() -> None:
    model = TemporalTransformer(dim=8, time=2, depth=4, num_heads=1, drop_path=0.2)
    assert drop_path_rates(0.2, 4) == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])
    drops = [module for module in model.modules() if isinstance(module, DropPath)]
    assert [drop.drop_prob for drop in drops] == pytest.approx([0.2 / 3] * 2 + [0.4 / 3] * 2 + [0.2] * 2)
    kept = drops[-1].train()(torch.ones(400, 3, 8))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert kept[:, 0, 0].mean().item() == pytest.approx(0.8, abs=0.08)
    assert (kept == kept[:, :1, :1]).all()


def test_the_mean_does_not_see_the_order_and_the_transformer_does() -> None:
    tokens = torch.randn(2, 5, 24)
    for temporal, sees_order in (("mean", False), ("transformer", True)):
        model = _randomised(_model(temporal=temporal))
        same = torch.allclose(model(tokens)["verb"], model(tokens.flip(1))["verb"], atol=1e-5)
        assert same is not sees_order


@pytest.mark.parametrize(
    ("dim", "heads"), [(16, 1), (64, 1), (192, 3), (768, 12), (1024, 16), (200, 2), (1408, 22)]
)
def test_heads_have_64_channels_where_that_divides(dim: int, heads: int) -> None:
    assert default_num_heads(dim) == heads


def test_a_model_config_is_equal_after_json() -> None:
    config = ModelConfig(dim=24, time=5, heads={"verb": 3}, num_heads=2)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads 5 does not divide the 24 channels"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"drop_path": 1.0}, "drop_path must be in"),
        ({"temporal": "meen"}, "unknown temporal model 'meen': did you mean mean"),
        ({"heads": {}}, "at least one head"),
        ({"heads": {"type": 3}}, "cannot be called 'type'.*rename label/type"),
        ({"heads": {"verb": 0}}, "head verb has no classes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_model_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _model(**changes)
