"""The 12 numbers of EPIC-KITCHENS-100's action recognition challenge, as its official script computes them.

Overall top-1 and top-5, and top-1 of the participants who are not in training and of the rare (tail) classes; each for
verb, noun and action, in percent. An action is right where verb and noun are; it is a tail action where one of both is rare.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vivit.pipeline.manifest import UNKNOWN
from vivit.stage2_temporal.bootstrap import Interval, share_interval
from vivit.stage2_temporal.metrics import Labels, Scores, action_in_top, correct_in_top

Flags = npt.NDArray[np.bool_]
HEADS = ("verb", "noun", "action")


@dataclass(frozen=True, kw_only=True)
class OfficialNumber:
    """One of the 12."""

    percent: float
    num_clips: int
    """Clips that it is about."""
    interval: Interval
    """95 % bootstrap interval over these clips, in percent."""


@dataclass(frozen=True, kw_only=True)
class ClipSubsets:
    """Which clips [clip] the numbers single out; None where that is not known."""

    unseen: Flags | None
    """Participant not in training."""
    tail_verb: Flags | None
    tail_noun: Flags | None

    def of(self, subset: str, head: str) -> Flags | None:
        """The clips of `unseen` or `tail` for a head or the action."""
        if subset == "unseen":
            return self.unseen
        if head != "action":
            return self.tail_verb if head == "verb" else self.tail_noun
        if self.tail_verb is None or self.tail_noun is None:
            return None
        return self.tail_verb | self.tail_noun


def official_numbers(
    logits: Mapping[str, Scores], verbs: Labels, nouns: Labels, subsets: ClipSubsets
) -> tuple[dict[str, OfficialNumber], list[str]]:
    """The numbers by their official names, and a sentence for each group of them that cannot be computed.

    For logits [clip, class] of verb and noun, and labels [clip]; clips without a label do not count.
    """
    verb, noun = logits["verb"], logits["noun"]
    has_verb, has_noun = verbs != UNKNOWN, nouns != UNKNOWN
    labelled = {"verb": has_verb, "noun": has_noun, "action": has_verb & has_noun}
    if not labelled["action"].any():
        return {}, []
    correct = {
        k: {
            "verb": correct_in_top(k, verb, verbs),
            "noun": correct_in_top(k, noun, nouns),
            "action": action_in_top(k, verb, noun, verbs, nouns),
        }
        for k in (1, 5)
    }
    found = {
        f"all_{head}_accuracy_at_{k}": _number(correct[k][head][labelled[head]])
        for head in HEADS
        for k in (1, 5)
    }
    notes = []
    for subset in ("unseen", "tail"):
        for head in HEADS:
            chosen = subsets.of(subset, head)
            if chosen is not None and (clips := labelled[head] & chosen).any():
                found[f"{subset}_{head}_accuracy_at_1"] = _number(correct[1][head][clips])
        if left_out := [head for head in HEADS if f"{subset}_{head}_accuracy_at_1" not in found]:
            notes.append(_reason(subset, left_out, subsets))
    return found, notes


def _number(correct: Flags) -> OfficialNumber:
    return OfficialNumber(
        percent=float(correct.mean() * 100),
        num_clips=len(correct),
        interval=[100 * end for end in share_interval(correct)],
    )


def _reason(subset: str, heads: list[str], subsets: ClipSubsets) -> str:
    what = f"{subset} {', '.join(heads)} accuracy is left out"
    if all(subsets.of(subset, head) is not None for head in heads):
        return f"{what}: no evaluated clip belongs to it"
    clips = "whose participants are not in training" if subset == "unseen" else "whose classes are rare"
    return (
        f"{what}: the manifest does not say of every clip {clips}. Pass --annotations FOLDER with the official files, or "
        "make the manifest again with them there (the same `vivit extract` brings it into a cache)"
    )
