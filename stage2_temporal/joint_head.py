"""The joint head: a third classifier over the (verb, noun) pairs seen in training, beside those of verb and noun."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.manifest import UNKNOWN
from vivit.stage2_temporal.metrics import Labels, Scores, correct_in_top, log_softmax, pair_ranks

JOINT_HEAD = "joint"
"""Name of the head."""
FUSION = 0.5
"""Share of the joint head in the fused score of a pair."""


@dataclass(frozen=True)
class Pairs:
    """The classes of a joint head."""

    ids: Sequence[int]
    """Id of each pair, verb * nouns + noun, in class order, which is ascending."""
    num_nouns: int

    @classmethod
    def seen(cls, labels: Mapping[str, npt.NDArray[np.int32]], heads: Mapping[str, Sequence[str]]) -> Self:
        """The pairs in the labels [clip] of training; ConfigError where there can be no joint head."""
        if not {"verb", "noun"} <= heads.keys():
            raise ConfigError(
                f"a joint head needs the heads verb and noun, and there are {', '.join(heads)}: leave out --joint-head"
            )
        if JOINT_HEAD in heads:
            raise ConfigError(
                f"the data set has a head called {JOINT_HEAD} of its own: leave out --joint-head"
            )
        num_nouns = len(heads["noun"])
        ids = np.unique(pair_ids(labels["verb"], labels["noun"], num_nouns))
        ids = ids[ids != UNKNOWN]
        if not len(ids):
            raise ConfigError("no training clip has both a verb and a noun: leave out --joint-head")
        return cls(ids.tolist(), num_nouns)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _sorted(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.ids, np.int64)

    def split(self) -> list[tuple[int, int]]:
        """(verb, noun) of each class."""
        return [divmod(pair, self.num_nouns) for pair in self.ids]

    def labels(self, verbs: Labels, nouns: Labels) -> npt.NDArray[np.int32]:
        """Class of each clip's pair [clip]; -1 where verb or noun is unknown, or the pair was never seen in training."""
        pairs = pair_ids(verbs, nouns, self.num_nouns)
        at = np.searchsorted(self._sorted, pairs).clip(max=len(self) - 1)
        return np.where(self._sorted[at] == pairs, at, UNKNOWN).astype(np.int32)

    def correct_in_top(self, k: int, joint: Scores, verbs: Labels, nouns: Labels) -> npt.NDArray[np.bool_]:
        """Whether the true pair is among the best `k` of the joint head's logits [clip, pair]; never one it was not taught."""
        return correct_in_top(k, joint, self.labels(verbs, nouns))

    def fused_ranks(
        self, logits: Mapping[str, Scores], verbs: Labels, nouns: Labels, *, share: float
    ) -> npt.NDArray[np.int64]:
        """How many pairs come before the true one [clip] by the fused score; 0 where verb or noun is unknown.

        The score is (1 - share) * p(verb) * p(noun) + share * p(pair), where p(pair) is the joint head's, and 0 for a
        pair that it was not taught. It is compared as a logarithm, which cannot underflow.
        """
        num_pairs = logits["verb"].shape[1] * logits["noun"].shape[1]
        with np.errstate(divide="ignore"):
            of_product, of_joint = np.log(1 - share), np.log(share)

        def scores(rows: npt.NDArray[np.intp]) -> Scores:
            verb, noun, joint = (log_softmax(logits[head][rows]) for head in ("verb", "noun", JOINT_HEAD))
            fused: npt.NDArray[np.float64] = verb[:, :, None] + noun[:, None, :] + of_product
            flat = fused.reshape(len(rows), -1)
            flat[:, self._sorted] = np.logaddexp(flat[:, self._sorted], joint + of_joint)
            return fused

        return pair_ranks(scores, verbs, nouns, num_pairs=num_pairs)


def pair_ids(verbs: Labels, nouns: Labels, num_nouns: int) -> npt.NDArray[np.int64]:
    """verb * nouns + noun [clip]; -1 where one of both is unknown."""
    known = (verbs != UNKNOWN) & (nouns != UNKNOWN)
    return np.where(known, verbs.astype(np.int64) * num_nouns + nouns, UNKNOWN)


def with_joint_head(heads: Mapping[str, int], pairs: Pairs | None) -> dict[str, Any]:
    """`heads` and `pairs` of the ModelConfig with a joint head over `pairs`, or without one."""
    if pairs is None:
        return {"heads": dict(heads), "pairs": None}
    return {"heads": {**heads, JOINT_HEAD: len(pairs)}, "pairs": list(pairs.ids)}


def pairs_of(model: Mapping[str, Any]) -> Pairs | None:
    """The pairs of a stored ModelConfig; None for one without a joint head."""
    ids = model.get("pairs")
    return None if ids is None else Pairs(ids, model["heads"]["noun"])
