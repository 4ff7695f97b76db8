import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vivit.stage2_temporal.objective import head_loss, mean_head_loss, mix, mixup_share

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -2.0], [0.3, 0.2, 0.1], [1.0, 1.0, 4.0]])
LABELS = torch.tensor([0, 1, 2, 2])


def _loss_by_formula(share: float, smoothing: float) -> torch.Tensor:
    one_hot = F.one_hot(LABELS, 3).float()
    mixed = share * one_hot + (1 - share) * one_hot.flip(0)
    target = (1 - smoothing) * mixed + smoothing / 3
    return -(target * LOGITS.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("share", [1.0, 0.8, 0.25])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_formula(share: float, smoothing: float) -> None:
    loss = head_loss(LOGITS, LABELS, share=share, smoothing=smoothing)
    torch.testing.assert_close(loss, _loss_by_formula(share, smoothing))


def test_tokens_are_mixed_with_the_reversed_batch() -> None:
    tokens = torch.randn(3, 4, 5)
    torch.testing.assert_close(mix(tokens, 0.7), 0.7 * tokens + 0.3 * tokens.flip(0))
    assert mix(tokens, 1.0) is tokens


def test_heads_are_averaged_not_added() -> None:
    heads = {"verb": LOGITS, "noun": LOGITS * 2}
    labels = {"verb": LABELS, "noun": LABELS}
    each = [head_loss(heads[head], LABELS, share=1, smoothing=0.1) for head in heads]
    torch.testing.assert_close(mean_head_loss(heads, labels, smoothing=0.1), (each[0] + each[1]) / 2)


def test_unknown_labels_are_left_out_of_their_head() -> None:
    labels = torch.tensor([0, -1, 2, -1])
    loss = head_loss(LOGITS, labels, share=1, smoothing=0)
    torch.testing.assert_close(loss, F.cross_entropy(LOGITS[[0, 2]], LABELS[[0, 2]]))


def test_a_mixed_pair_counts_when_both_labels_are_known() -> None:
    labels = torch.tensor([0, -1, 2, 2])  # pairs (0, 3) and (1, 2)
    logits = LOGITS.clone().requires_grad_()
    loss = head_loss(logits, labels, share=0.6, smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.any(dim=1).tolist() == [True, False, False, True]


def test_a_batch_without_labels_has_loss_zero() -> None:
    assert head_loss(LOGITS, torch.full((4,), -1), share=0.5, smoothing=0.1).item() == 0


def test_the_share_is_a_function_of_seed_and_step() -> None:
    shares = [mixup_share(0.3, 0, step) for step in range(2000)]
    assert shares[7] == mixup_share(0.3, 0, 7)
    assert len(set(shares)) == 2000
    assert mixup_share(0.3, 1, 0) != mixup_share(0.3, 0, 1)
    assert mixup_share(0.0, 0, 7) == 1.0
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(0.25 / 1.6, rel=0.06)  # of Beta(a, a): 1 / (4 (2a + 1))
