"""The tensors of a file, each taken once and with its shape checked, and the sizes that they tell."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vivit.pipeline.errors import WeightsError
from vivit.pipeline.weights.request import by

ANY = -1
"""A size that the file decides."""
ARCHITECTURE = "vit_base_patch16_224"
"""timm's plain ViT, which every size that a file tells is an option of."""


class Arrays:
    """Tensors by name. What is taken is gone, so that what is left was not understood."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self.remedy = "fetch the file again"
        """What to do about a tensor that is missing or has another shape."""
        self._left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def __iter__(self) -> Iterator[str]:
        return iter(self._left)

    def ndim(self, name: str) -> int:
        """Number of dimensions of a tensor; 0 where there is none of that name."""
        return self._left[name].ndim if name in self._left else 0

    def shape(self, name: str, *expected: int) -> tuple[int, ...]:
        """Shape of a tensor, which must be `expected`, ANY for a size that may be anything; WeightsError otherwise."""
        if name not in self._left:
            raise WeightsError(f"{self.path} lacks the tensor {name}: {self.remedy}")
        shape = tuple(self._left[name].shape)
        if len(shape) != len(expected) or any(
            size == 0 or want not in (ANY, size) for want, size in zip(expected, shape, strict=True)
        ):
            wanted = by(expected).replace(str(ANY), "any")
            raise WeightsError(
                f"{self.path} does not fit together: {name} is {by(shape) or 'a scalar'}, not {wanted}: "
                f"{self.remedy}"
            )
        return shape

    def take(self, name: str, *expected: int) -> Tensor:
        """The tensor, checked as by `shape`, and gone from here."""
        self.shape(name, *expected)
        return self._left.pop(name)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what was made of tensors that were taken."""
        self._left |= tensors

    def drop(self, *prefixes: str) -> None:
        """Leave out, on purpose, everything whose name begins with one of `prefixes`."""
        self._left = {name: value for name, value in self._left.items() if not name.startswith(prefixes)}

    def finish(self, what: str, remedy: str) -> None:
        """WeightsError where anything is left: a tensor that is not understood may change what the model computes."""
        if self._left:
            raise WeightsError(
                f"{self.path} holds {len(self._left)} tensors that {what} does not have "
                f"({', '.join(list(self._left)[:3])}): {remedy}"
            )


@dataclass(frozen=True, kw_only=True)
class EncoderSize:
    """Size of a stack of transformer blocks."""

    dim: int
    depth: int
    num_heads: int
    hidden: int
    """Channels inside a block's MLP."""

    @property
    def mlp_ratio(self) -> float:
        """`hidden / dim`, such that timm's `int(dim * mlp_ratio)` is `hidden` whatever the rounding."""
        ratio = self.hidden / self.dim
        return ratio if int(self.dim * ratio) == self.hidden else math.nextafter(ratio, math.inf)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `timm.create_model`."""
        return {
            "embed_dim": self.dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
        }


def depth(arrays: Arrays, prefix: str) -> int:
    """Number of blocks, whose names are `<prefix><index>` and then `.` or `/`; WeightsError where one is missing."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)[./]")
    found = sorted({int(match[1]) for name in arrays if (match := pattern.match(name))})
    if not found:
        raise WeightsError(f"{arrays.path} has no transformer blocks {prefix}0, ...: fetch the file again")
    if found != list(range(len(found))):
        missing = next(index for index in range(len(found)) if index not in found)
        raise WeightsError(
            f"{arrays.path} lacks the block {prefix}{missing} (it has {prefix}{found[-1]}): fetch the file again"
        )
    return len(found)
