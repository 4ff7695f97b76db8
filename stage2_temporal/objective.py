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
    """Tokens [batch, ...], each clip mixed with its partner in the reversed batch."""
    return tokens if share == 1 else tokens.flip(0).lerp(tokens, share)


def known_clips(labels: Tensor, share: float) -> Tensor:
    """Which clips [batch] count: those with a known label, and a known one of the partner where clips are mixed."""
    known = labels != UNKNOWN
    return known if share == 1 else known & known.flip(0)


def mean_head_loss(
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    *,
    share: float = 1.0,
    smoothing: float = 0.0,
    part: slice = slice(None),
    counts: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Mean over heads of the loss of logits [batch, class] and labels [batch] of tokens that `mix` mixed.

    Logits may be of a `part` of the batch only: the losses of all parts add up to that of the batch. `counts` are the
    clips that count per head, where a batch is more than these labels.
    """
    losses = [
        head_loss(
            values,
            labels[head],
            share=share,
            smoothing=smoothing,
            part=part,
            count=None if counts is None else counts[head],
        )
        for head, values in logits.items()
    ]
    return sum(losses[1:], losses[0]) / len(losses)


def head_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    share: float,
    smoothing: float,
    part: slice = slice(None),
    count: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over the clips that count; 0 where there is none.

    The target is (1 - e) * y + e / classes. The loss is linear in it, so the losses are mixed, not the targets.
    """
    known = known_clips(labels, share)
    loss = share * _cross_entropy(logits, labels[part], smoothing)
    if share != 1:
        loss = loss + (1 - share) * _cross_entropy(logits, labels.flip(0)[part], smoothing)
    return (loss * known[part]).sum() / (known.sum() if count is None else count).clamp(min=1)


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(
        logits.float(), labels, ignore_index=UNKNOWN, label_smoothing=smoothing, reduction="none"
    )
