"""A short VideoMAE (arXiv 2203.12602) of its own: a ViT over space and time that fills in the tubelets it is not shown.

For row IV of the paper's table where no published VideoMAE fits: its blocks start the temporal transformer.
"""

from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from vivit.end_to_end.video_batches import VideoBatches
from vivit.pipeline.checkpoint import BLOCKS, Checkpoint, SpatialConfig
from vivit.pipeline.progress import Progress
from vivit.pipeline.spatial_vit import TubeletEmbed, create_spatial_vit

TUBELET = 2
HIDDEN = 0.75
"""Part of the places that is hidden, the same at all times (tube masking); the paper hides 0.9 of many more places."""
RATE = 2e-3


class MaskedAutoencoder(nn.Module):
    """An encoder that sees some places, and one block that draws the others from its output."""

    def __init__(self, spatial: SpatialConfig, time: int) -> None:
        super().__init__()
        vit = create_spatial_vit(spatial)
        dim, self.patch = vit.embed_dim, vit.patch_embed.patch_size[0]
        self.side, self.time = spatial.crop_size // self.patch, time
        self.embed = TubeletEmbed(TUBELET, (self.patch, self.patch), dim)
        self.register_buffer("positions", torch.randn(1, time, self.side**2, dim) * 0.5)
        self.blocks, self.norm = vit.blocks, vit.norm
        self.hidden_token = nn.Parameter(torch.zeros(dim))
        self.decoder = Block(dim, vit.blocks[0].attn.num_heads, qkv_bias=True)
        self.pixels = nn.Linear(dim, TUBELET * self.patch**2 * 3)

    def forward(self, video: Tensor, is_shown: Tensor) -> Tensor:
        """Loss of the hidden tubelets of a video [batch, channel, frame, height, width]; `is_shown` is [place]."""
        tokens = self.embed(video).view(len(video), self.time, self.side**2, -1) + self.positions
        seen = tokens[:, :, is_shown].flatten(1, 2)
        for block in self.blocks:
            seen = block(seen)
        whole = (self.hidden_token + self.positions).expand_as(tokens).clone()
        whole[:, :, is_shown] = self.norm(seen).view(len(video), self.time, -1, tokens.shape[-1])
        drawn = self.pixels(self.decoder(whole.flatten(1, 2))).view(*tokens.shape[:3], -1)
        return functional.mse_loss(drawn[:, :, ~is_shown], self._targets(video)[:, :, ~is_shown])

    def _targets(self, video: Tensor) -> Tensor:
        """Pixels of each tubelet [batch, time, place, number], each with mean 0 and variance 1 as in the paper."""
        batch, channels, p, side = len(video), video.shape[1], self.patch, self.side
        parts = video.view(batch, channels, self.time, TUBELET, side, p, side, p)
        flat = parts.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, self.time, side * side, -1)
        return (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True) + 1e-6).sqrt()


def pretrain_masked(
    path: Path, spatial: SpatialConfig, batches: VideoBatches, *, num_frames: int, epochs: int, seed: int
) -> float:
    """Write the encoder's blocks to `path` as a model file; the loss of the last epoch. No label is used."""
    torch.manual_seed(seed)
    model = MaskedAutoencoder(spatial, num_frames // TUBELET)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, fused=True)
    steps = epochs * batches.steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    draw = np.random.default_rng(seed)
    losses: list[float] = []
    with Progress("masked pre-training", steps, "steps") as progress:
        for epoch in range(epochs):
            losses = []
            for batch in batches.epoch(epoch):
                is_shown = torch.from_numpy(draw.permutation(model.side**2) >= HIDDEN * model.side**2)
                loss = model(batch.inputs(slice(None), 1.0), is_shown)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.advance(1, f"loss {losses[-1]:.3f}")
    Checkpoint(
        model=BLOCKS,
        spatial=spatial,
        source=f"masked pre-training of {epochs} epochs, seed {seed}",
        tensors={name: value for name, value in model.state_dict().items() if name.startswith("blocks.")},
    ).write(path)
    return float(np.mean(losses))
