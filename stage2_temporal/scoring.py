"""Class scores of clips: the model's logits, averaged over the views of each clip."""

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vivit.pipeline.device import autocast
from vivit.stage2_temporal.loader import Features, read_ahead
from vivit.stage2_temporal.model import TemporalModel

Average = Literal["logits", "softmax"]
AVERAGES: tuple[str, ...] = get_args(Average)


@torch.inference_mode()
def clip_logits(
    model: TemporalModel,
    features: Features,
    *,
    device: torch.device,
    precision: str = "float32",
    average: Average = "logits",
    num_views: int | None = None,
    batch_size: int = 256,
) -> dict[str, npt.NDArray[np.float32]]:
    """Logits [clip, class] per head, averaged over the first `num_views` views (None: all that every clip has).

    With `softmax`, the views' probabilities are averaged, and their logarithm is given: its softmax is that average.
    `batch_size` counts views.
    """
    views = features.num_common_views if num_views is None else min(num_views, features.num_common_views)
    clips = max(1, batch_size // views)
    positions = np.arange(len(features))
    batches = [positions[start : start + clips] for start in range(0, len(positions), clips)]
    was_training = model.training
    model.eval()
    made: dict[str, list[Tensor]] = {head: [] for head in model.heads}
    for tokens in read_ahead(lambda batch: features.first_views(batch, views), batches):
        with autocast(device, precision):
            logits = model(tokens.flatten(0, 1).float())
        for head, values in logits.items():
            made[head].append(averaged(values.float().unflatten(0, (-1, views)), average).cpu())
    model.train(was_training)
    return {
        head: torch.cat(parts).numpy() if parts else np.zeros((0, model.config.heads[head]), np.float32)
        for head, parts in made.items()
    }


def averaged(logits: Tensor, average: Average) -> Tensor:
    """Logits [clip, class] of logits [clip, view, class]."""
    if average == "logits":
        return logits.mean(dim=1)
    return logits.log_softmax(dim=-1).logsumexp(dim=1).sub(math.log(logits.shape[1]))
