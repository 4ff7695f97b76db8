"""ViViT's models 1, 3 and 4: one transformer over the tokens of all times and places, and how each attends.

Numerics follow the reference (google-research/scenic, projects/vivit); blocks and names are timm's.
"""

import copy
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vivit.end_to_end.drop_path import set_drop_path
from vivit.pipeline.checkpoint import DOT_PRODUCT, JOINT, ORDERS, SELF_ATTENTION, SpatialConfig
from vivit.pipeline.errors import ConfigError
from vivit.pipeline.spatial_vit import TubeletEmbed, create_spatial_vit
from vivit.pipeline.workspace import nearest
from vivit.stage2_temporal.model import class_heads

Pooling = Literal["token", "mean"]
KINDS = (JOINT, SELF_ATTENTION, DOT_PRODUCT)


@dataclass(frozen=True, kw_only=True)
class SpaceTimeConfig:
    """What turns a spatial ViT into one over space and time."""

    time: int
    """Time steps of a view."""
    heads: dict[str, int]
    """Number of classes per head."""
    pooling: Pooling = "mean"
    """Class token (joint only), or mean over all tokens."""
    order: str = ORDERS[0]
    """Which attention of a factorised-self-attention block comes first."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; factorised-self-attention has none, as in the reference."""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise nearest(self.pooling, list(get_args(Pooling)), "pooling")
        if self.order not in ORDERS:
            raise nearest(self.order, list(ORDERS), "order of attention")
        if self.time < 1:
            raise ConfigError(f"time must be at least 1, got {self.time}")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values; `from_dict` gives an equal one back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


class SpaceTimeTransformer(nn.Module):
    """Class scores of a video from a transformer over its tokens, ordered time, height, width."""

    def __init__(self, model: str, spatial: SpatialConfig, config: SpaceTimeConfig) -> None:
        super().__init__()
        if model not in KINDS:
            raise nearest(model, list(KINDS), "model")
        if model != JOINT and config.pooling == "token":
            raise ConfigError(f"{model} has no class token: its attention needs a grid; use pooling mean")
        vit: Any = create_spatial_vit(spatial)
        self.model, self.config = model, config
        dim, patch = vit.embed_dim, vit.patch_embed.patch_size
        self.num_places = (spatial.image_size[0] // patch[0]) * (spatial.image_size[1] // patch[1])
        self.patch_embed = TubeletEmbed(spatial.tubelet, patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.pooling == "token" else None
        num_tokens = config.time * self.num_places + (config.pooling == "token")
        self.pos_embed = nn.Parameter(torch.randn(1, num_tokens, dim) * 0.02)
        self.blocks = nn.ModuleList(self._block(block, index) for index, block in enumerate(vit.blocks))
        if model != SELF_ATTENTION:
            set_drop_path(self.blocks, config.drop_path)
        self.norm = vit.norm
        self.heads = class_heads(dim, config.heads)
        self.grad_checkpointing = False

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Logits [batch, class] per head of a video [batch, channel, frame, height, width], normalised."""
        tokens = self.encoded_tokens(video)
        vector = tokens.mean(dim=1) if self.cls_token is None else tokens[:, 0]
        return {name: head(vector) for name, head in self.heads.items()}

    def encoded_tokens(self, video: Tensor) -> Tensor:
        """Tokens [batch, [1 +] time * token, dim] after the final norm."""
        tokens = self.patch_embed(video)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.pos_embed
        is_kept = not (self.grad_checkpointing and torch.is_grad_enabled())
        for block in self.blocks:
            tokens = block(tokens) if is_kept else checkpoint(block, tokens, use_reentrant=False)
        encoded: Tensor = self.norm(tokens)
        return encoded

    def _block(self, block: Any, index: int) -> nn.Module:
        """What takes the place of a timm block of the spatial ViT."""
        if self.model == JOINT:
            return block  # type: ignore[no-any-return]
        if self.model == SELF_ATTENTION:
            return FactorisedBlock(block, self.config.time, self.config.order)
        block.attn = DotProductAttention(block.attn, self.config.time)
        return block  # type: ignore[no-any-return]


class FactorisedBlock(nn.Module):
    """Model 3: attention over time at each place, attention over space at each time, then the MLP."""

    def __init__(self, block: Any, time: int, order: str) -> None:
        """`block` is the timm block whose modules are taken, the attention twice."""
        super().__init__()
        self.time, self.order = time, order
        self.norm_time, self.attn_time = copy.deepcopy(block.norm1), copy.deepcopy(block.attn)
        self.norm_space, self.attn_space = block.norm1, block.attn
        self.norm_mlp, self.mlp = block.norm2, block.mlp

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, time * token, dim] in the same shape."""
        for axis in self.order.split("_"):
            tokens = tokens + (self._over_time(tokens) if axis == "time" else self._over_space(tokens))
        output: Tensor = tokens + self.mlp(self.norm_mlp(tokens))
        return output

    def _over_time(self, tokens: Tensor) -> Tensor:
        grid = self.norm_time(tokens).unflatten(1, (self.time, -1)).transpose(1, 2)
        mixed = self.attn_time(grid.flatten(0, 1)).unflatten(0, grid.shape[:2])
        return mixed.transpose(1, 2).flatten(1, 2)  # type: ignore[no-any-return]

    def _over_space(self, tokens: Tensor) -> Tensor:
        grid = self.norm_space(tokens).unflatten(1, (self.time, -1))
        return self.attn_space(grid.flatten(0, 1)).unflatten(0, grid.shape[:2]).flatten(1, 2)  # type: ignore[no-any-return]


class DotProductAttention(nn.Module):
    """Model 4: the first half of the heads attends over time, the second half over space."""

    def __init__(self, attention: Attention, time: int) -> None:
        """`attention` gives the projections, whose names stay."""
        super().__init__()
        if attention.num_heads % 2:
            raise ConfigError(
                f"factorised-dot-product needs an even number of heads, not {attention.num_heads}: "
                "choose another backbone"
            )
        self.time, self.num_heads, self.fused_attn = time, attention.num_heads, attention.fused_attn
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        """Tokens [batch, time * token, dim] in the same shape."""
        # [query/key/value, batch, time, place, head, channel]
        grid = self.qkv(tokens).unflatten(1, (self.time, -1)).unflatten(-1, (3, self.num_heads, -1))
        over_time, over_space = grid.movedim(3, 0).chunk(2, dim=-2)
        times = self._attend(over_time.transpose(2, 3)).transpose(1, 2)
        spaces = self._attend(over_space)
        mixed: Tensor = self.proj(torch.cat([times, spaces], dim=-2).flatten(1, 2).flatten(2))
        return mixed

    def _attend(self, parts: Tensor) -> Tensor:
        """Attention along the fourth axis of [query/key/value, batch, other, along, head, channel]."""
        # one axis in front of the heads: with two, no fused kernel takes it
        query, key, value = parts.transpose(3, 4).flatten(1, 2)
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
            mixed = weights.softmax(dim=-1) @ value
        return mixed.transpose(1, 2).reshape(*parts.shape[1:])
