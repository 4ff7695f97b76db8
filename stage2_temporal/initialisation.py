"""Where each tensor of a model begins: copied, interpolated over time, or fresh; and a sentence about each.

From a temporal half     class token, blocks and norm are copied; positions are copied, or interpolated to another number of
                         time steps with the class token's slot kept; the adapter is copied where it is of the same kind
                         and width, a head where it has the same classes.
From blocks alone        the last blocks are copied. Class token, positions and norm are fresh: what reaches them here has
                         been through a final norm and other blocks, so that those of an image ViT do not fit.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vivit.pipeline.errors import CheckpointError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.workspace import storage_errors, write_atomically
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.init_source import TEMPORAL_PARTS, Source, TemporalSource, check_width, read_source
from vivit.stage2_temporal.joint_head import JOINT_HEAD
from vivit.stage2_temporal.model import ModelConfig, TemporalModel, parameters_in_words
from vivit.stage2_temporal.run_folder import RunFolder
from vivit.stage2_temporal.vit_blocks import BlockSource

logger = logging.getLogger(__name__)

FILE_NAME = "initialisation.json"
_POSITIONS = "temporal.pos_embed"
_OPTIONS = {"depth": "--depth", "number of heads": "--heads", "MLP ratio": "--mlp-ratio"}
_UNIT = re.compile(r"(\w+\.)?blocks\.\d+|heads\.[^.]+|(temporal|spatial)\.\w+|\w+")
"""What stands on one line of the log: a block, the norm, a head, the adapter."""

Classes = Mapping[str, list[str]]
"""Names of the classes of each head in id order."""
Part = dict[str, tuple[Tensor | None, str]]
"""Tensors of a part of the model by name, None for a fresh one, and where each comes from."""


def start(model: TemporalModel, config: TrainConfig, cache: FeatureCache, run: RunFolder) -> dict[str, str]:
    """Initialise the fresh model of a training on `cache`; where each tensor comes from, nothing for a run that goes on.

    To be called before the folder is claimed, so that an `init` that does not fit leaves nothing behind.
    """
    logger.info("%s", parameters_in_words(model))
    if run.state_path.exists():
        return {}
    return initialise(model, read_source(config.init, cache.settings), cache.manifest.heads)


@torch.no_grad()
def initialise(model: TemporalModel, source: Source | None, classes: Classes) -> dict[str, str]:
    """Give a fresh model what it can start from in `source` (None: nothing); where each of its tensors comes from.

    `classes` are those of the model's heads. A spatial half that the model may have is left as it is. CheckpointError, with the model unchanged, where the source is of another
    size.
    """
    state = {name: value for name, value in model.state_dict().items() if name.startswith(TEMPORAL_PARTS)}
    if source is None:
        return dict.fromkeys(state, "fresh")
    if isinstance(source, TemporalSource):
        found = _of_temporal_half(source, model, classes)
    else:
        found = _of_blocks(source, model)
    for name, (value, _) in found.items():
        if value is not None and value.shape != state[name].shape:
            raise CheckpointError(
                f"{source.name}: the tensor for {name} is {list(value.shape)}, and {list(state[name].shape)} is needed: "
                "the file has blocks of another make, or does not fit its own description; pass another --init"
            )
    for name, (value, _) in found.items():
        if value is not None:
            state[name].copy_(value)
    return {name: found[name][1] for name in state}


def write_origins(origins: Mapping[str, str], run: Path) -> None:
    """Write where each tensor comes from into the run folder, and log it, one line for neighbours of one origin.

    Nothing is written for a run that goes on, which has no origins.
    """
    if not origins:
        return
    path = run / FILE_NAME
    with storage_errors(path):
        write_atomically(path, json.dumps(origins, indent=1).encode())
    for line in origins_in_words(origins):
        logger.info("%s", line)


def origins_in_words(origins: Mapping[str, str]) -> list[str]:
    """`temporal.blocks.0 (12 tensors): a.safetensors: temporal.blocks.0.*`, one line for neighbours of one origin."""
    lines = []
    for origin, group in groupby(origins, key=lambda name: _of_unit(name, origins[name])):
        names = list(group)
        units = [_unit(name) for name in names]
        what = units[0] if units[0] == units[-1] else f"{units[0]} .. {units[-1]}"
        count = f" ({len(names)} tensors)" if len(names) > 1 else ""
        lines.append(f"{what}{count}: {origin}")
    return lines


def interpolated(positions: Tensor, time: int) -> Tensor:
    """Positions [1, 1 + time, dim] for another number of time steps: linear from end to end, the class slot kept."""
    steps = positions[:, 1:].transpose(1, 2)
    resized = F.interpolate(steps, size=time, mode="linear", align_corners=True)
    return torch.cat([positions[:, :1], resized.transpose(1, 2)], dim=1)


def _of_temporal_half(source: TemporalSource, model: TemporalModel, classes: Classes) -> Part:
    there, here = source.model, model.config
    if there.temporal != here.temporal:
        raise CheckpointError(
            f"{source.name} has the temporal model {there.temporal}, and here it is {here.temporal}: "
            f"pass --temporal {there.temporal}, or another --init"
        )
    check_width(source.name, there.dim, here.dim)
    if here.temporal == "transformer":
        _check(source.name, "depth", there.depth, here.depth)
        _check(source.name, "number of heads", there.resolved_num_heads, here.resolved_num_heads)
        _check(source.name, "MLP ratio", there.mlp_ratio, here.mlp_ratio)
    found = _copied(source, _names(model, "temporal.")) | _adapter(source, model)
    for head in here.heads:
        found |= _head(head, source, model, classes)
    value, origin = found.get(_POSITIONS, (None, ""))
    if value is not None and there.time != here.time:
        origin = f"{origin}, interpolated from {there.time} to {here.time} time steps"
        found[_POSITIONS] = interpolated(value, here.time), origin
    return found


def _adapter(source: TemporalSource, model: TemporalModel) -> Part:
    there, here, names = source.model, model.config, _names(model, "adapter.")
    if there.adapter != here.adapter:
        return _fresh(names, f"{source.name} has the adapter {there.adapter}")
    found = _copied(source, names)
    state = model.state_dict()
    if any(value is not None and value.shape != state[name].shape for name, (value, _) in found.items()):
        return _fresh(names, f"the adapter of {source.name} has another width")
    return found


def _head(head: str, source: TemporalSource, model: TemporalModel, classes: Classes) -> Part:
    names = _names(model, f"heads.{head}.")
    there, here = source.model.heads.get(head), model.config.heads[head]
    if there is None:
        return _fresh(names, f"{source.name} has no head {head}")
    if there != here:
        return _fresh(names, f"head {head} has {here} classes, and {there} in {source.name}")
    if head == JOINT_HEAD and source.model.pairs != model.config.pairs:
        return _fresh(names, f"head {head} has other pairs in {source.name}")
    names_there, names_here = source.classes.get(head), classes.get(head)
    if names_there and names_here and list(names_there) != list(names_here):
        return _fresh(names, f"head {head} has classes of other names in {source.name}")
    return _copied(source, names)


def _of_blocks(source: BlockSource, model: TemporalModel) -> Part:
    here = model.config
    _check_blocks(source, here)
    first = source.depth - here.depth
    logger.info(
        "blocks %d..%d of %d in %s become the temporal blocks",
        first,
        source.depth - 1,
        source.depth,
        source.name,
    )
    if source.activation is not None:
        logger.info("their activation is %s; here it is the tanh approximation of GELU", source.activation)
    found: Part = {}
    for index in range(here.depth):
        renamed = {
            f"temporal.{name.replace(f'.{first + index}.', f'.{index}.', 1)}": name
            for name in source.tensors
            if name.startswith(f"blocks.{first + index}.")
        }
        needed = _names(model, f"temporal.blocks.{index}.")
        if different := sorted(renamed.keys() ^ set(needed)):
            raise CheckpointError(
                f"{source.name} has blocks of another make, with or without {different[0].split('.', 3)[3]}: "
                "pass another --init"
            )
        for name, there in renamed.items():
            found[name] = source.tensors[there], f"{source.name}: {source.prefix}{there}"
    others = [name for name in _names(model, TEMPORAL_PARTS) if name not in found]
    return found | _fresh(others, f"{source.name} gives blocks only")


def _check_blocks(source: BlockSource, here: ModelConfig) -> None:
    if here.temporal != "transformer":
        raise CheckpointError(
            f"{source.name} gives blocks only, and the temporal model {here.temporal} has none: "
            "pass --temporal transformer, or --init scratch"
        )
    if here.depth > source.depth:
        raise CheckpointError(
            f"{source.name} has {source.depth} blocks, and {here.depth} were asked for: "
            f"pass --depth {source.depth} or less"
        )
    check_width(source.name, source.dim, here.dim)
    _check(source.name, "number of heads", source.num_heads, here.resolved_num_heads)
    _check(source.name, "MLP ratio", source.mlp_ratio, here.mlp_ratio)


def _check(name: str, what: str, there: float, here: float) -> None:
    if there != here:
        raise CheckpointError(
            f"the {what} of {name} is {there:g}, and here it is {here:g}: pass {_OPTIONS[what]} {there:g}, "
            "or another --init"
        )


def _names(model: TemporalModel, prefix: str | tuple[str, ...]) -> list[str]:
    return [name for name in model.state_dict() if name.startswith(prefix)]


def _copied(source: TemporalSource, names: Iterable[str]) -> Part:
    """`names` from the source, where they are called the same."""
    try:
        return {name: (source.tensors[name], f"{source.name}: {name}") for name in names}
    except KeyError as error:
        raise CheckpointError(
            f"{source.name} does not fit its own description: it has no {error.args[0]}; pass another --init"
        ) from error


def _fresh(names: Iterable[str], reason: str) -> Part:
    return dict.fromkeys(names, (None, f"fresh: {reason}"))


def _unit(name: str) -> str:
    found = _UNIT.match(name)
    assert found is not None
    return found[0]


def _of_unit(name: str, origin: str) -> str:
    """An origin with `*` for what stands behind the unit in both names: the origin of the whole unit."""
    tail = name.removeprefix(_unit(name))
    return f"{origin.removesuffix(tail)}.*" if tail and origin.endswith(tail) else origin
