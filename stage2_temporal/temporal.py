"""From the tokens of a view's time steps to one vector: a transformer with a class token, or their mean.

Numerics and initialisation follow the reference's factorised encoder (google-research/scenic, projects/vivit);
parameter names follow timm's VisionTransformer, so that published weights fit.
"""

from functools import partial

import torch
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

NORM_EPS = 1e-6


class TemporalTransformer(nn.Module):
    """Pre-norm transformer over time; its output is the class token after the final norm."""

    def __init__(
        self,
        dim: int,
        time: int,
        *,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + time, dim))
        self.blocks = nn.Sequential(
            *(_block(dim, num_heads, mlp_ratio, rate) for rate in drop_path_rates(drop_path, depth))
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self._initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors [batch, dim] of tokens [batch, time, dim]."""
        cls = self.cls_token.expand(len(tokens), -1, -1)
        x: Tensor = self.blocks(torch.cat([cls, tokens], dim=1) + self.pos_embed)
        # The norm works on each token by itself, and only the class token leaves.
        output: Tensor = self.norm(x[:, 0])
        return output

    def _initialise(self) -> None:
        nn.init.normal_(self.pos_embed, std=0.02)
        for name, parameter in self.blocks.named_parameters():
            if "norm" in name:
                continue  # already one and zero
            if name.endswith("attn.qkv.weight"):
                for kernel in parameter.chunk(3):
                    nn.init.xavier_uniform_(kernel)
            elif name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            elif "mlp" in name:
                nn.init.normal_(parameter, std=1e-6)
            else:
                nn.init.zeros_(parameter)


class TemporalMean(nn.Module):
    """Mean over time: what is known without the order of the time steps."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors [batch, dim] of tokens [batch, time, dim]."""
        return tokens.mean(dim=1)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth of each block, rising linearly from 0 to `rate`."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def default_num_heads(dim: int) -> int:
    """Heads of 64 channels each; of somewhat more where 64 does not divide `dim`."""
    return max(heads for heads in range(1, max(1, dim // 64) + 1) if dim % heads == 0)


def _block(dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> Block:
    block = Block(
        dim,
        num_heads,
        mlp_ratio=mlp_ratio,
        qkv_bias=True,
        drop_path=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),  # type: ignore[arg-type]
        act_layer=partial(nn.GELU, approximate="tanh"),  # type: ignore[arg-type]
    )
    for module in block.modules():
        if isinstance(module, DropPath):
            module.scale_by_keep = False  # the reference drops branches without rescaling those that stay
    return block
