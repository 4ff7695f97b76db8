"""Features for training and evaluation: kept on the device or in RAM where they fit, else read ahead of the step."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vivit.pipeline.feature_cache import FeatureCache
from vivit.stage2_temporal.objective import mix
from vivit.stage2_temporal.time_sampling import TimeSampling

Rows = npt.NDArray[np.int64]
Residency = Literal["device", "memory", "disk"]
Item = TypeVar("Item")
Made = TypeVar("Made")

_FREE_SHARE = 0.6
"""Part of the free memory that features may take."""
_READ_BYTES = 2**26
"""Bytes per read while features are brought into memory."""
_READ_AHEAD = 4
"""Batches that are ready or being read while a step runs."""
_ORDER_STREAM, _VIEW_STREAM, _START_STREAM = 0, 1, 2


class Features:
    """Features of `rows` of a split, addressed by their position among these rows."""

    def __init__(
        self,
        cache: FeatureCache,
        split: str,
        rows: Rows,
        *,
        device: torch.device,
        budget_bytes: int | None = None,
        sampling: TimeSampling | None = None,
    ) -> None:
        """`sampling` says which of the stored time steps are given out; None gives out all.

        All are kept, whatever it says: training draws others for each epoch.
        """
        self._cache, self._split, self._rows, self._device = cache, split, rows, device
        _, self.num_views, self._time, self._dim = cache.shape(split)
        self.view_counts = cache.usable_views(split)[rows]
        """Views with features of each of the rows, the first ones [clip]: fewer than others where later ones failed."""
        self.sampling = sampling or TimeSampling(num_times=self._time)
        self.size_bytes = len(rows) * self.num_views * self._time * self._dim * 2
        self.residency = _residency(self.size_bytes, device, budget_bytes)
        self._resident = None if self.residency == "disk" else self._load()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_common_views(self) -> int:
        """Views that all of the rows have."""
        return int(self.view_counts.min(initial=self.num_views))

    @property
    def is_ready(self) -> bool:
        """Whether a batch takes no reading or copying between memories, so that nothing is gained by reading ahead."""
        return self._resident is not None and self._resident.device.type == self._device.type

    def one_view(self, positions: Rows, views: Rows, starts: Rows) -> Tensor:
        """Float16 tokens [clip, time, dim] on the device: of each clip the view, and the time steps from the start, beside it."""
        times = None if self.sampling.is_whole else torch.from_numpy(self.sampling.indices(starts))
        if self._resident is not None:
            place = self._resident.device
            index = torch.from_numpy(views * len(self) + positions).to(place)
            kept = self._resident.flatten(0, 1)
            return self._to_device(
                kept.index_select(0, index) if times is None else kept[index[:, None], times.to(place)]
            )
        tokens = np.empty((len(positions), self._time, self._dim), np.float16)
        by_row = np.argsort(positions)  # rows of one block, side by side, are read from one file
        for view in np.unique(views):
            chosen = by_row[views[by_row] == view]
            tokens[chosen] = self._cache.read(self._split, self._rows[positions[chosen]], [int(view)])[:, 0]
        read = torch.from_numpy(tokens)
        return self._to_device(read if times is None else read[torch.arange(len(read))[:, None], times])

    def first_views(self, positions: Rows, num_views: int) -> Tensor:
        """Float16 tokens [clip, view, time, dim] on the device, of the first `num_views` views: time steps from the middle start."""
        times = self.sampling.of_middle
        if self._resident is not None:
            index = torch.from_numpy(positions).to(self._resident.device)
            # In this order: choosing clips out of a tensor with steps would copy all of it first.
            chosen = self._resident[:num_views].index_select(1, index)[:, :, times]
            return self._to_device(chosen).transpose(0, 1)
        read = self._cache.read(self._split, self._rows[positions], range(num_views))[:, :, times]
        return self._to_device(torch.from_numpy(np.ascontiguousarray(read)))

    def _load(self) -> Tensor:
        """All features, [view, clip, time, dim] as they lie on disk; zeros for views that a clip lacks."""
        device = self._device if self.residency == "device" else "cpu"
        shape = (self.num_views, len(self), self._time, self._dim)
        make = torch.empty if self.num_common_views == self.num_views else torch.zeros
        tensor = make(shape, dtype=torch.float16, device=device)
        chunk = max(1, _READ_BYTES // (self._time * self._dim * 2))
        for view in range(self.num_views):
            having = np.flatnonzero(self.view_counts > view)
            for start in range(0, len(having), chunk):
                part = having[start : start + chunk]
                read = self._cache.read(self._split, self._rows[part], [view])
                values = torch.from_numpy(np.ascontiguousarray(read[:, 0])).to(device)
                is_run = part[-1] - part[0] == len(part) - 1
                tensor[view, slice(part[0], part[-1] + 1) if is_run else torch.from_numpy(part)] = values
        return tensor

    def _to_device(self, tokens: Tensor) -> Tensor:
        if tokens.device.type == self._device.type:
            return tokens
        if self._device.type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self._device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """What one training step sees, on the device."""

    tokens: Tensor
    """Float16 [batch, time, dim]."""
    labels: dict[str, Tensor]
    """Class ids [batch] per head, -1 where unknown."""

    def inputs(self, part: slice, share: float) -> Tensor:
        """Tokens [part, time, dim] in float32, each clip mixed with its partner in the reversed batch."""
        return mix(self.tokens.float(), share)[part]


class TrainingBatches:
    """The batches of each epoch: every clip once, in one of its views, from one of its starts.

    A function of (seed, epoch) only.
    """

    def __init__(
        self,
        features: Features,
        rows: Rows,
        labels: Mapping[str, npt.NDArray[np.int32]],
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """`rows` are the rows that `features` holds; `labels` [clip] are of the whole split."""
        self._features, self._rows = features, rows
        self._batch_size, self._seed, self._device = batch_size, seed, device
        self._num_rows = max(len(values) for values in labels.values())
        self._labels = {
            head: torch.from_numpy(values[rows].astype(np.int64)).to(device)
            for head, values in labels.items()
        }

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from number `first` on."""
        order = epoch_order(self._seed, epoch, self._rows, self._num_rows)
        views = epoch_views(self._seed, epoch, self._rows, self._num_rows, self._features.view_counts)
        num_starts = self._features.sampling.num_starts
        begin = epoch_starts(self._seed, epoch, self._rows, self._num_rows, num_starts)
        starts = range(first * self._batch_size, len(order), self._batch_size)
        batches = [order[start : start + self._batch_size] for start in starts]

        def make(positions: Rows) -> Batch:
            index = torch.from_numpy(positions).to(self._device)
            labels = {head: values[index] for head, values in self._labels.items()}
            return Batch(self._features.one_view(positions, views[positions], begin[positions]), labels)

        return map(make, batches) if self._features.is_ready else read_ahead(make, batches)


def epoch_order(seed: int, epoch: int, rows: Rows, num_rows: int) -> Rows:
    """The positions 0 .. len(rows) - 1 in the order of an epoch."""
    return np.argsort(_words(seed, epoch, _ORDER_STREAM, num_rows)[rows], kind="stable")


def epoch_views(seed: int, epoch: int, rows: Rows, num_rows: int, num_views: int | Rows) -> Rows:
    """The view [clip] of each row, which has `num_views` [clip]; it depends on (seed, epoch, row) and that number only."""
    counts = np.asarray(num_views).astype(np.uint64)
    return (_words(seed, epoch, _VIEW_STREAM, num_rows)[rows] % counts).astype(np.int64)


def epoch_starts(seed: int, epoch: int, rows: Rows, num_rows: int, num_starts: int) -> Rows:
    """The first time step [clip] of each row; it depends on (seed, epoch, row) only."""
    return (_words(seed, epoch, _START_STREAM, num_rows)[rows] % np.uint64(num_starts)).astype(np.int64)


def _words(seed: int, epoch: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """Raw Philox words, which NumPy promises never to change, as it does not for its distributions."""
    return np.asarray(np.random.Philox(np.random.SeedSequence([seed, epoch, stream])).random_raw(count))


def read_ahead(
    make: Callable[[Item], Made], items: list[Item], *, depth: int = _READ_AHEAD
) -> Iterator[Made]:
    """`map(make, items)`, with the next `depth` made in a thread while the caller works."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="features")
    pending: deque[Future[Made]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _residency(size_bytes: int, device: torch.device, budget_bytes: int | None) -> Residency:
    """The nearest place that has room."""

    def fits(free: int) -> bool:
        return size_bytes <= (free * _FREE_SHARE if budget_bytes is None else min(budget_bytes, free))

    if device.type == "cuda" and fits(torch.cuda.mem_get_info(device)[0]):
        return "device"
    return "memory" if fits(available_memory_bytes()) else "disk"


def available_memory_bytes() -> int:
    """RAM that this process can still take, with the limit of its container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))
