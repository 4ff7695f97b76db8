"""The training loss: cross-entropy per head with smoothed and mixed labels, and the mixing itself."""

from collections.abc import Mapping

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from vivit.pipeline.manifest import UNKNOWN

_MIXUP_STREAM = 2


def mixup_share(alpha: float, seed: int, step: int) -> float:
    """The share of the first clip in a mixed pair, drawn from (seed, step); 1 where alpha is 0."""
    if alpha == 0:
        return 1.0
    stream = np.random.Philox(np.random.SeedSequence([seed, step, _MIXUP_STREAM]))
    return float(np.random.Generator(stream).beta(alpha, alpha))


def mix(tokens: Tensor, share: float) -> Tensor:
    """Tokens [batch, time, dim], each clip mixed with its partner in the reversed batch."""
    return tokens if share == 1 else tokens.flip(0).lerp(tokens, share)


def mean_head_loss(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], *, share: float = 1.0, smoothing: float = 0.0
) -> Tensor:
    """Mean over heads of the loss of logits [batch, class] and labels [batch] of tokens that `mix` mixed."""
    losses = [head_loss(logits[head], labels[head], share=share, smoothing=smoothing) for head in logits]
    return sum(losses[1:], losses[0]) / len(losses)


def head_loss(logits: Tensor, labels: Tensor, *, share: float, smoothing: float) -> Tensor:
    """Mean cross-entropy over the clips with a known label (both of a mixed pair); 0 where there is none.

    The target is (1 - e) * y + e / classes. The loss is linear in it, so the losses are mixed, not the targets.
    """
    known = labels != UNKNOWN
    loss = share * _cross_entropy(logits, labels, smoothing)
    if share != 1:
        known = known & known.flip(0)
        loss = loss + (1 - share) * _cross_entropy(logits, labels.flip(0), smoothing)
    return (loss * known).sum() / known.sum().clamp(min=1)


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(
        logits.float(), labels, ignore_index=UNKNOWN, label_smoothing=smoothing, reduction="none"
    )
