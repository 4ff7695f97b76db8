"""What the manifest or the official annotation files say of the evaluated clips: subsets, and ids that are missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vivit.pipeline.datasets.ek100_official import (
    NUM_CLIPS,
    SPLIT_FILES,
    TAIL_NOUN,
    TAIL_VERB,
    UNSEEN,
    Subsets,
    official_ids,
)
from vivit.pipeline.errors import ConfigError
from vivit.pipeline.manifest import UNKNOWN, Clip
from vivit.stage2_temporal.ek100_metrics import ClipSubsets, Flags

_MOST_NAMED = 10


def clip_subsets(clips: Sequence[Clip], annotations: Path | None = None) -> ClipSubsets:
    """Membership of `clips` by the lists in the folder `annotations`, else by the columns of the manifest."""
    lists = None if annotations is None else Subsets.read(annotations)
    if lists is not None and not lists.files:
        raise ConfigError(
            f"--annotations {annotations} has none of EPIC-KITCHENS-100's lists of unseen participants and tail "
            "classes: pass a checkout of the data set's annotation repository"
        )
    rows: list[Mapping[str, Any]] = [
        clip.source
        if lists is None
        else lists.columns(clip.split, clip.source.get("participant_id"), clip.labels)
        for clip in clips
    ]
    return ClipSubsets(
        unseen=_flags([row.get(UNSEEN) for row in rows]),
        tail_verb=_flags([row.get(TAIL_VERB) for row in rows], _labels(clips, "verb")),
        tail_noun=_flags([row.get(TAIL_NOUN) for row in rows], _labels(clips, "noun")),
    )


def _labels(clips: Sequence[Clip], head: str) -> list[int]:
    return [clip.labels.get(head, UNKNOWN) for clip in clips]


def _flags(values: Sequence[Any], labels: Sequence[int] | None = None) -> Flags | None:
    """A column [clip]; None where a clip has no value, other than one without a label, which is in no subset."""
    known = [isinstance(value, bool) for value in values]
    if labels is not None:
        known = [is_known or label == UNKNOWN for is_known, label in zip(known, labels, strict=True)]
    return np.array([value is True for value in values], bool) if all(known) else None


@dataclass(frozen=True, kw_only=True)
class IdCheck:
    """The ids of a split, held against what they should be."""

    missing: list[str]
    """Ids that should have been evaluated and were not."""
    extra: list[str]
    """Evaluated ids that do not belong to the split; none where there is no official list."""
    problems: list[str]
    """The same in sentences, with ids; empty where all is as it should be."""


def check_ids(
    split: str,
    in_manifest: Sequence[str],
    evaluated: Sequence[str],
    *,
    annotations: Path | None,
    official: bool,
) -> IdCheck:
    """Hold the evaluated ids against those of the manifest, and an `official` data set's against its own list.

    That list is in the folder `annotations`; without one, only the number of clips is compared.
    """
    listed = official_ids(annotations, split) if official and annotations is not None else None
    wanted = in_manifest if listed is None else listed
    have, belongs = set(evaluated), set(wanted)
    missing = [clip for clip in wanted if clip not in have]
    extra = [] if listed is None else [clip for clip in evaluated if clip not in belongs]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} clips of {split} are missing: {named(missing)}")
    if extra:
        problems.append(f"{len(extra)} clips are not in {SPLIT_FILES[split]}: {named(extra)}")
    if official and listed is None and len(in_manifest) != NUM_CLIPS[split]:
        problems.append(
            f"the manifest has {len(in_manifest)} clips of {split}, and the official list {NUM_CLIPS[split]}: "
            f"pass --annotations FOLDER with {SPLIT_FILES[split]} to see which differ"
        )
    return IdCheck(missing=missing, extra=extra, problems=problems)


def named(ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
    return ", ".join(ids[:_MOST_NAMED]) + more
