"""Training batches straight from videos: decoded ahead in threads, uint8 to the device, augmented, normalised and
mixed there."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vivit.pipeline.manifest import UNKNOWN, Clip
from vivit.pipeline.storage import Location
from vivit.stage1_extract.augment import Augmenter
from vivit.stage1_extract.clip_reader import ClipCrops, CropSettings, CropStream
from vivit.stage1_extract.encoder import Normalise
from vivit.stage2_temporal.loader import Rows, epoch_order, read_ahead
from vivit.stage2_temporal.parallel import rank, world_size

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 2
"""Batches whose clips are decoded while a step runs."""


@dataclass(frozen=True)
class VideoBatch:
    """Clips of one training step, on the device."""

    pixels: Tensor
    """uint8 RGB [batch, frame, height, width, channel]."""
    labels: Mapping[str, Tensor]
    """Class ids [batch] per head, -1 where unknown or where the clip could not be read."""
    normalise: Normalise

    def inputs(self, part: slice, share: float) -> Tensor:
        """Videos [part, channel, frame, height, width], each mixed with its partner in the reversed batch."""
        video = self.normalise(self.pixels[part])
        return video if share == 1 else self.normalise(self.pixels.flip(0)[part]).lerp(video, share)


class VideoBatches:
    """The batches of each epoch: every clip once, in a view that no other epoch has. A function of (seed, epoch) only.

    Of several processes, each reads its share of every batch.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        labels: Mapping[str, npt.NDArray[np.int32]],
        data_root: Location,
        settings: CropSettings,
        *,
        batch_size: int,
        normalise: Normalise,
        device: torch.device,
        threads: int,
        budget_bytes: int,
    ) -> None:
        """`labels` [clip] are of `clips`; `settings.seed` also decides the order."""
        # of whatever split they are, they are looked at in random views
        self._clips = [replace(clip, split="train") for clip in clips]
        self._labels, self._data_root = labels, data_root
        self._settings = replace(settings, views=replace(settings.views, train_views=1))
        self._batch_size, self._normalise, self._device = batch_size, normalise, device
        self._augmenter = Augmenter.of(settings.views, seed=settings.seed, device=device)
        self._threads, self._budget_bytes = threads, budget_bytes
        self.outcomes: Counter[str] = Counter()
        """What became of the clips that were read by this process, epoch after epoch."""
        self._reported: set[str] = set()

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; of a last one with too few clips for all processes the rest is left out."""
        whole, rest = divmod(len(self._clips), self._batch_size)
        return whole + (rest >= world_size())

    def epoch(self, epoch: int, first: int = 0) -> Iterator[VideoBatch]:
        """The batches of an epoch, from number `first` on."""
        rows = np.arange(len(self._clips))
        order = epoch_order(self._settings.seed, epoch, rows, len(rows))
        starts = [number * self._batch_size for number in range(first, self.steps_per_epoch)]
        batches = [order[start : start + self._batch_size][rank() :: world_size()] for start in starts]
        settings = replace(self._settings, first_view=epoch)
        ahead = _BATCHES_AHEAD * -(-self._batch_size // world_size())
        stream = CropStream(
            self._data_root,
            settings,
            threads=self._threads,
            budget_bytes=self._budget_bytes,
            jobs_ahead=min(ahead, self._budget_bytes // self._clip_bytes),
        )
        with stream:
            crops = stream.read([self._clips[row] for row in batch] for batch in batches)
            yield from read_ahead(lambda batch: self._batch(batch, crops, epoch), batches, depth=1)

    @property
    def _clip_bytes(self) -> int:
        views = self._settings.views
        return views.num_frames * views.crop_size**2 * 3

    def _batch(self, rows: Rows, crops: Iterator[ClipCrops], view: int) -> VideoBatch:
        views = self._settings.views
        shape = (len(rows), views.num_frames, views.crop_size, views.crop_size, 3)
        if self._device.type == "cuda" and self._device.index is not None:
            torch.cuda.set_device(self._device)  # this thread's: pinned memory belongs to it
        pixels = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        counts = np.ones(len(rows), dtype=np.bool_)
        for place in range(len(rows)):
            item = next(crops)
            self._count(item)
            if item.crops is None:
                counts[place] = False
            else:
                pixels[place] = torch.from_numpy(item.crops[0])
        on_device = pixels.to(self._device, non_blocking=True)
        if self._augmenter is not None:
            for place in np.flatnonzero(counts).tolist():
                clip_id = self._clips[rows[place]].clip_id
                on_device[place] = self._augmenter.view(on_device[place], clip_id=clip_id, number=view)
        labels = {
            head: torch.from_numpy(np.where(counts, values[rows], UNKNOWN).astype(np.int64))
            for head, values in self._labels.items()
        }
        return VideoBatch(
            on_device,
            {head: values.to(self._device) for head, values in labels.items()},
            self._normalise,
        )

    def _count(self, item: ClipCrops) -> None:
        self.outcomes[item.record.outcome] += 1
        if item.crops is None and item.clip.clip_id not in self._reported:
            self._reported.add(item.clip.clip_id)
            logger.warning(
                "%s is left out: %s, %s", item.clip.clip_id, item.record.outcome, item.record.message
            )
