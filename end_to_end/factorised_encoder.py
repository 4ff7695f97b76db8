"""ViViT's Factorised Encoder (the paper's model 2): stage 1's spatial encoder joined to stage 2's temporal model."""

from typing import Self

from torch import Tensor, nn

from vivit.end_to_end.drop_path import set_drop_path
from vivit.stage1_extract.encoder import class_tokens
from vivit.stage2_temporal.model import ModelConfig, TemporalModel


class FactorisedEncoder(TemporalModel):
    """Class scores of a video: every time step through the spatial ViT, then stage 2's model.

    Parameters are those of `TemporalModel`, and the ViT's below `spatial.`.
    """

    def __init__(self, spatial: nn.Module, tubelet: int, config: ModelConfig) -> None:
        """`spatial` is a timm ViT; anything else that gives one vector for each image will do without stochastic depth."""
        super().__init__(config)
        self.frozen: str | None = None
        """Half that is not trained: `spatial` or `temporal`."""
        self.tubelet, self.spatial = tubelet, spatial
        self.used_times = slice(None)
        """Time steps that the temporal half looks at."""
        if config.drop_path:
            set_drop_path(spatial.get_submodule("blocks"), config.drop_path, rows_per_clip=config.time)

    def freeze(self, half: str) -> None:
        """Leave the `spatial` or the `temporal` half as it is in training; the adapter and the heads learn on."""
        self.frozen = half
        self.get_submodule(half).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """A frozen half stays in evaluation mode, without stochastic depth."""
        super().train(mode)
        if self.frozen is not None:
            self.get_submodule(self.frozen).eval()
        return self

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Logits [batch, class] per head of a video [batch, channel, frame, height, width], normalised."""
        return super().forward(self.spatial_tokens(video)[:, self.used_times])

    def spatial_tokens(self, video: Tensor) -> Tensor:
        """What a feature cache stores, [batch, time, dim], of a video [batch, channel, frame, height, width]."""
        times = video.shape[2] // self.tubelet
        tubelets = video[:, :, : times * self.tubelet].reshape(
            *video.shape[:2], times, self.tubelet, *video.shape[3:]
        )
        images = tubelets.transpose(1, 2).flatten(0, 1)
        if self.tubelet == 1:
            images = images[:, :, 0]
        return class_tokens(self.spatial, images).view(len(video), times, -1)
