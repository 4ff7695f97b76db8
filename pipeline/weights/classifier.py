"""One classifier, stored as the heads that share it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from vivit.pipeline.errors import WeightsError

DEFAULT_HEAD = "action"


@dataclass(frozen=True)
class Classifier:
    """The heads of a model; none at all for a model without a classifier."""

    counts: dict[str, int] = field(default_factory=dict)
    """Classes of each head."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Names of the classes of each head in id order, empty where they are not known."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """`heads.<head>.weight` [class, dim] and `heads.<head>.bias` [class]."""


def split_classifier(
    path: Path,
    weight: Tensor,
    bias: Tensor,
    heads: Mapping[str, int] | None,
    names: Sequence[str] = (),
) -> Classifier:
    """The classifier `weight` [class, dim] and `bias` [class], cut into `heads` in their order.

    `names`: of the classes, or empty. WeightsError where the heads do not have as many classes as the file.
    """
    counts = {DEFAULT_HEAD: len(bias)} if heads is None else dict(heads)
    if sum(counts.values()) != len(bias):
        asked = " + ".join(f"{head} {classes}" for head, classes in counts.items())
        raise WeightsError(
            f"{path} has a classifier of {len(bias)} classes, but the heads {asked} make {sum(counts.values())}: "
            f"pass --heads with {len(bias)} classes in all"
        )
    tensors: dict[str, Tensor] = {}
    texts: dict[str, list[str]] = {}
    start = 0
    for head, classes in counts.items():
        part = slice(start, start + classes)
        tensors[f"heads.{head}.weight"], tensors[f"heads.{head}.bias"] = weight[part], bias[part]
        texts[head] = list(names[part])
        start += classes
    return Classifier(counts, texts, tensors)
