"""Clips of a cache, decoded and encoded once more, and compared with the features that are stored."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vivit.pipeline.backbones import PRETRAINED, RANDOM
from vivit.pipeline.checkpoint import is_checkpoint, model_file
from vivit.pipeline.errors import WeightsError
from vivit.pipeline.feature_cache import WEIGHTS_FILE, FeatureCache, library_versions
from vivit.pipeline.local_copy import local_copy
from vivit.pipeline.progress import Progress
from vivit.pipeline.storage import Location, location
from vivit.stage1_extract.augment import Augmenter
from vivit.stage1_extract.blocks import encode_clip, machine, torch_threads
from vivit.stage1_extract.clip_reader import ClipCrops, CropSettings, CropStream, default_decode_threads
from vivit.stage1_extract.encoder import SpatialEncoder

LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99, "float16": 0.999}
"""Per precision, how much alike each token must be that another machine computes."""
_DECODE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One clip: what is stored against what comes out now."""

    split: str
    row: int
    clip_id: str
    must_be_equal: bool = False
    """Whether machine, threads and versions are those that the ledger records, so that every bit has to be equal."""
    is_equal: bool = False
    cosine: float = 0.0
    """Least cosine similarity of a token."""
    max_error: float = 0.0
    """Largest absolute difference of a number."""
    problem: str = ""
    """What is wrong; empty where nothing is."""
    unread: str = ""
    """Why the video cannot be read now; empty where it can."""


def compare_sample(
    cache: FeatureCache,
    count: int,
    *,
    data_root: Location,
    weights: str | None = None,
    device: str = "auto",
    seed: int = 0,
    leave_out: Collection[tuple[str, int | None]] = (),
    is_shown: bool = True,
) -> list[Comparison]:
    """Compare `count` clips with features, chosen by the seed, of all splits together but the (split, block)s of `leave_out`."""
    chosen = choose(cache, count, seed=seed, leave_out=leave_out)
    if not chosen:
        return []
    encoder = encoder_of(cache, weights=weights, device=device)
    settings = CropSettings(
        views=cache.settings.views, seed=cache.settings.seed, interpolation=encoder.backbone.interpolation
    )
    clips = [cache.manifest.of_split(split)[row] for split, row in chosen]
    threads = default_decode_threads(encoder.device.type)
    with (
        CropStream(data_root, settings, threads=threads, budget_bytes=_DECODE_BYTES) as stream,
        Progress("sample", len(chosen), "clips", is_shown=is_shown) as progress,
    ):
        found = []
        for (split, row), item in zip(chosen, stream.read([clip] for clip in clips), strict=True):
            found.append(_compare(cache, encoder, split, row, item))
            progress.advance()
    return found


def choose(
    cache: FeatureCache, count: int, *, seed: int, leave_out: Collection[tuple[str, int | None]] = ()
) -> list[tuple[str, int]]:
    """(split, row) of `count` clips with features, in row order; all where there are fewer."""
    size = cache.settings.block_size
    known = [
        (split, int(row))
        for split in cache.splits
        for row in cache.usable_rows(split)
        if (split, row // size) not in leave_out
    ]
    return sorted(random.Random(seed).sample(known, min(count, len(known))))


def encoder_of(cache: FeatureCache, *, weights: str | None = None, device: str = "auto") -> SpatialEncoder:
    """The encoder that made the features; WeightsError where it cannot be found or is another one.

    `weights`: `pretrained`, `random` or a file, in place of what the cache records.
    """
    settings = cache.settings
    name, source = _source(cache, weights)
    encoder = SpatialEncoder(
        name,
        weights=source,
        crop_size=settings.views.crop_size,
        device=device,
        precision=settings.backbone.precision,
        batch_size=settings.backbone.batch_size,
    )
    if differences := replace(settings, backbone=encoder.backbone).differences(settings):
        raise WeightsError(
            f"{name} with weights {source} is not the encoder that made {cache.path}: {'; '.join(differences)}. "
            f"Pass --weights with what it was made of ({settings.backbone.weights})"
        )
    return encoder


def _source(cache: FeatureCache, weights: str | None) -> tuple[str, str]:
    """Name and weights for the encoder: a model file stands for both."""
    made_of = cache.settings.backbone
    source, _, name = made_of.weights.partition(":")
    if weights in (PRETRAINED, RANDOM) or (weights is None and source != "file"):
        return made_of.name, weights or source
    file = location(weights or cache.made_with.get(WEIGHTS_FILE) or name)
    if not file.exists():
        raise WeightsError(
            f"{file} does not exist, and the encoder of {cache.path} came from it: pass --weights FILE"
        )
    if is_checkpoint(model_file(local_copy(file))):
        return str(file.resolve()), PRETRAINED
    return made_of.name, str(file)


def _compare(
    cache: FeatureCache, encoder: SpatialEncoder, split: str, row: int, item: ClipCrops
) -> Comparison:
    """One clip, encoded as its ledger entry says."""
    block, count = row // cache.settings.block_size, int(cache.usable_views(split)[row])
    abouts = [cache.entries(split, v)[block].about for v in cache.view_ranges(split) if v.stop <= count]
    stored_record, record = cache.records(split)[row], item.record
    assert stored_record is not None
    made = Comparison(split=split, row=row, clip_id=record.clip_id)
    if item.crops is None:
        return replace(made, unread=f"{record.outcome}: {record.message}")
    if record.num_frames != stored_record.num_frames:
        problem = (
            f"the video gives {record.num_frames} frames now, the ledger says {stored_record.num_frames}"
        )
        return replace(made, problem=problem)
    with torch_threads(_threads(abouts[0])):
        augmenter = Augmenter.of(cache.settings.views, seed=cache.settings.seed, device=encoder.device)
        vectors = encode_clip(encoder, split, item.crops[:count], augmenter=augmenter, clip_id=record.clip_id)
        now = vectors.cpu().numpy().astype(np.float16)
    stored = cache.read(split, [row], range(count))[0]
    made = replace(
        made,
        must_be_equal=_same_machine(abouts, encoder),
        is_equal=bool(np.array_equal(now, stored)),
        cosine=_least_cosine(now, stored),
        max_error=float(np.abs(now.astype(np.float32) - stored.astype(np.float32)).max()),
    )
    return replace(made, problem=_problem(made, LEAST_COSINE[cache.settings.backbone.precision]))


def _threads(about: Mapping[str, Any]) -> int:
    """Torch threads that a block was made with; 0 where that does not matter or is not known."""
    return int(about.get("torch_threads", 0)) if about.get("device") == "cpu" else 0


def _same_machine(abouts: Sequence[Mapping[str, Any]], encoder: SpatialEncoder) -> bool:
    """Whether all views of a block were made by the same kind of processor or GPU and the same versions as work here."""
    here = machine(encoder.device) | {
        "versions": library_versions(),
        "torch_threads": abouts[0].get("torch_threads"),
    }
    return all(
        value is not None and about.get(name) == value for about in abouts for name, value in here.items()
    )


def _least_cosine(here: npt.NDArray[np.float16], there: npt.NDArray[np.float16]) -> float:
    """Cosine similarity of the two tokens that are least alike, of features [view, time, dim]."""
    a, b = here.astype(np.float64), there.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(axis=-1) / np.maximum(norms, 1e-12)).min())


def _problem(made: Comparison, least_cosine: float) -> str:
    if made.is_equal or (not made.must_be_equal and made.cosine >= least_cosine):
        return ""
    wanted = (
        "the same machine and versions must give the same bits"
        if made.must_be_equal
        else f"at least {least_cosine} is asked for"
    )
    return f"comes out otherwise: cosine {made.cosine:.6f}, largest error {made.max_error:.3g} ({wanted})"
