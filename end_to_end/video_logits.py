"""Class scores of clips straight from their videos, through both halves of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vivit.pipeline.device import autocast
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip
from vivit.pipeline.progress import Progress
from vivit.pipeline.storage import Location
from vivit.stage1_extract.clip_reader import CropSettings, CropStream
from vivit.stage1_extract.encoder import Normalise
from vivit.stage2_temporal.scoring import Average, averaged


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How videos are read for a model."""

    data_root: Location
    settings: CropSettings
    normalise: Normalise
    device: torch.device
    precision: str = "float32"
    threads: int = 2
    budget_bytes: int = 1 << 30


@torch.inference_mode()
def video_logits(
    model: nn.Module,
    clips: Sequence[Clip],
    reading: Reading,
    *,
    average: Average = "logits",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> tuple[dict[str, npt.NDArray[np.float32]], list[ClipRecord]]:
    """Logits [readable clip, class] per head, averaged over the test views of each clip; what became of every clip.

    `batch_size` counts views per forward pass. `clips` are of one split.
    """
    was_training = model.training
    model.eval()
    made: dict[str, list[Tensor]] = {}
    records: list[ClipRecord] = []
    waiting: list[Tensor] = []

    def scores(pixels: Tensor) -> dict[str, Tensor]:
        with autocast(reading.device, reading.precision):
            logits = model(reading.normalise(pixels.to(reading.device)))
        return {head: values.float() for head, values in logits.items()}

    def run() -> None:
        views = len(waiting[0])
        parts = [scores(part) for part in torch.split(torch.cat(waiting), batch_size)]
        for head in parts[0]:
            values = torch.cat([part[head] for part in parts])
            made.setdefault(head, []).append(averaged(values.view(-1, views, values.shape[1]), average).cpu())
        waiting.clear()

    stream = CropStream(
        reading.data_root, reading.settings, threads=reading.threads, budget_bytes=reading.budget_bytes
    )
    with stream:
        for item in stream.read([list(clips)] if clips else []):
            records.append(item.record)
            if item.crops is not None:
                waiting.append(torch.from_numpy(item.crops))
                if (len(waiting) + 1) * len(item.crops) > batch_size:
                    run()
            if progress is not None:
                progress.advance()
        if waiting:
            run()
    model.train(was_training)
    return {head: torch.cat(parts).numpy() for head, parts in made.items()}, records
