"""Proof that a feature cache is whole: every ledger entry, every shard, every number in it.

Reads the format as `docs/cache-format.md` describes it, and shares no code with what writes and reads features.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

from vivit.pipeline.cache_store import ledger_name, shard_name
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.ledger import ClipRecord, LedgerEntry
from vivit.pipeline.manifest import Clip
from vivit.pipeline.progress import Progress
from vivit.pipeline.storage import Location, Url

_MAX_CLIPS_NAMED = 3
_INDEX_ENTRY_BYTES, _CRC_BYTES = 16, 4
_EXPONENT, _MAGNITUDE = np.uint16(0x7C00), np.uint16(0x7FFF)
"""Bits of a float16: all of the exponent set is an infinity or NaN, none of the magnitude set is zero."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong with a cache."""

    split: str
    block: int | None = None
    """None where it is not about one block."""
    view: int | None = None
    """None where it is not about one shard."""
    path: str
    """The file, within the cache."""
    problem: str
    ledger: str | None = None
    """The ledger entry that has to go for the block to be computed anew; None where that would not help."""

    def __str__(self) -> str:
        where = [self.split]
        where += [
            f"{name} {value}" for name in ("block", "view") if (value := getattr(self, name)) is not None
        ]
        return f"{' '.join(where)}: {self.path} {self.problem}"


@dataclass
class SplitCount:
    """What was checked of one split."""

    clips: int
    blocks: int
    missing_blocks: int = 0
    """Blocks that the ledger does not have."""
    missing_clips: int = 0
    missing_appended: int = 0
    """Blocks whose appended views are not all there, so that no reader sees these views of any block."""
    without_features: int = 0
    """Clips that the ledger records as failed."""
    shards: int = 0
    size_bytes: int = 0
    """Bytes of shards that were read."""
    findings: int = 0


@dataclass
class CacheCheck:
    """The outcome of a check."""

    splits: dict[str, SplitCount]
    findings: list[Finding] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    """Files that belong to no committed block, and what they are: they change nothing."""
    seconds: float = 0.0

    @property
    def missing(self) -> str:
        """What has not been extracted, in words; empty for a complete cache."""
        parts = []
        for split, count in self.splits.items():
            if count.missing_blocks:
                clips = f"{count.missing_clips} of {count.clips} clips"
                parts.append(f"{split} lacks {count.missing_blocks} of {count.blocks} blocks ({clips})")
            if count.missing_appended:
                parts.append(
                    f"{split} lacks appended views of {count.missing_appended} of {count.blocks} blocks"
                )
        return ", ".join(parts)

    @property
    def is_whole(self) -> bool:
        """Whether all is there and right."""
        return not self.findings and not self.missing

    def add(self, findings: Sequence[Finding]) -> None:
        """Add findings, and count them for their split."""
        self.findings += findings
        for finding in findings:
            self.splits[finding.split].findings += 1


@dataclass(frozen=True)
class _Block:
    """Some views of a block, which are committed."""

    split: str
    block: int
    views: range
    entry: LedgerEntry
    ledger: str

    def finding(self, problem: str, path: str | None = None, view: int | None = None) -> Finding:
        return Finding(
            split=self.split,
            block=self.block,
            view=view,
            path=path or self.ledger,
            problem=problem,
            ledger=self.ledger,
        )


@dataclass(frozen=True)
class _Shard:
    """A shard that a ledger entry lists."""

    block: _Block
    view: int
    name: str


def check_cache(cache: FeatureCache, *, threads: int = 0, is_shown: bool = True) -> CacheCheck:
    """Read all of a cache and compare it with its manifest and ledger; `threads` 0 chooses for this machine."""
    started = time.monotonic()
    check = CacheCheck(
        {split: SplitCount(cache.shape(split)[0], cache.num_blocks(split)) for split in cache.splits}
    )
    shards: list[_Shard] = []
    for split, count in check.splits.items():
        check.add(_array_findings(cache, split))
        for block in _committed(cache, split, count):
            if block.views.start == 0:
                count.without_features += sum(not record.usable for record in block.entry.records)
            check.add(_entry_findings(cache, block))
            shards += _listed_shards(block)
    _check_shards(cache, shards, check, threads or default_threads(), is_shown)
    _check_strays(cache, check)
    check.seconds = time.monotonic() - started
    return check


def default_threads() -> int:
    """Two per core: one waits for the disk while another one hashes."""
    return 2 * (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _committed(cache: FeatureCache, split: str, count: SplitCount) -> Iterator[_Block]:
    """What is committed of a split; the blocks that lack views are counted."""
    missing: set[int] = set()
    appended: set[int] = set()
    for views in cache.view_ranges(split):
        entries, is_published = cache.entries(split, views), views.stop <= cache.shape(split)[1]
        for block in range(cache.num_blocks(split)):
            if block in entries:
                yield _Block(split, block, views, entries[block], ledger_name(split, block, views))
            else:
                (missing if is_published else appended).add(block)
    count.missing_blocks, count.missing_appended = len(missing), len(appended)
    count.missing_clips = sum(stop - start for start, stop in (cache.rows(split, block) for block in missing))


# --- metadata and ledger ---


def _array_findings(cache: FeatureCache, split: str) -> list[Finding]:
    """What is wrong with the description that other Zarr readers go by."""
    name = f"{split}/features/zarr.json"
    clips, _, times, dim = cache.shape(split)
    chunks = {"chunk_shape": [cache.settings.block_size, 1, times, dim]}
    # Views that are all there may be published in the array, and not yet in the group.
    shapes = [[clips, views.stop, times, dim] for views in cache.view_ranges(split)]
    wanted: dict[str, list[Any]] = {
        "node_type": ["array"],
        "data_type": [cache.settings.dtype],
        "shape": [shape for shape in shapes if shape[1] >= cache.shape(split)[1]],
        "chunk_grid": [{"name": "regular", "configuration": chunks}],
    }
    try:
        found: dict[str, Any] = json.loads((cache.path / name).read_bytes())
        wrong = [key for key, values in wanted.items() if found.get(key) not in values]
        problem = f"does not describe the features (wrong: {', '.join(wrong)})" if wrong else ""
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except (ValueError, AttributeError) as error:
        problem = f"is damaged ({error})"
    return [Finding(split=split, path=name, problem=problem)] if problem else []


def _entry_findings(cache: FeatureCache, block: _Block) -> list[Finding]:
    """Where a ledger entry disagrees with the manifest, or with the place it lies in."""
    entry = block.entry
    start, stop = cache.rows(block.split, block.block)
    problems = []
    if tuple(entry.rows) != (start, stop):
        problems.append(f"is about rows {entry.rows[0]} to {entry.rows[1]}, not {start} to {stop}")
    clips = cache.manifest.of_split(block.split)[start:stop]
    if problem := _ids_problem(clips, entry.records):
        problems.append(problem)
    wanted = {shard_name(block.split, block.block, view) for view in block.views}
    if missing := sorted(wanted - set(entry.shards)):
        problems.append(f"does not list {_some(missing)}")
    if foreign := sorted(set(entry.shards) - wanted):
        problems.append(f"lists {_some(foreign)}, not of this block")
    return [block.finding(problem) for problem in problems]


def _ids_problem(clips: Sequence[Clip], records: Sequence[ClipRecord]) -> str:
    wanted, found = [clip.clip_id for clip in clips], [record.clip_id for record in records]
    if len(wanted) != len(found):
        return f"has {len(found)} clips, the manifest {len(wanted)}"
    differ = [
        f"{here!r} in place of {there!r}" for there, here in zip(wanted, found, strict=True) if here != there
    ]
    return f"has other clips than the manifest: {_some(differ)}" if differ else ""


def _listed_shards(block: _Block) -> Iterator[_Shard]:
    for view in block.views:
        name = shard_name(block.split, block.block, view)
        if name in block.entry.shards:
            yield _Shard(block, view, name)


# --- shards ---


def _check_shards(
    cache: FeatureCache, shards: Sequence[_Shard], check: CacheCheck, threads: int, is_shown: bool
) -> None:
    started, done = time.monotonic(), 0
    with (
        Progress("verify", len(shards), "shards", is_shown=is_shown) as progress,
        ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool,
    ):
        results = pool.map(lambda shard: _shard_problems(cache, shard), shards)
        for shard, (problems, size) in zip(shards, results, strict=True):
            count = check.splits[shard.block.split]
            count.shards += 1
            count.size_bytes += size
            done += size
            check.add([shard.block.finding(text, shard.name, shard.view) for text in problems])
            rate = done / max(time.monotonic() - started, 1e-9)
            progress.advance(1, f"{rate / 1e6:.0f} MB/s")


def _shard_problems(cache: FeatureCache, shard: _Shard) -> tuple[list[str], int]:
    """What is wrong with a shard, and the bytes that were read of it."""
    recorded = shard.block.entry.shards[shard.name]
    try:
        data = (cache.path / shard.name).read_bytes()
    except FileNotFoundError:
        return ["is missing"], 0
    except OSError as error:
        return [f"cannot be read ({error.strerror})"], 0
    if (more := len(data) - recorded["bytes"]) != 0:
        differ = f"{abs(more)} {'more' if more > 0 else 'fewer'} than the ledger says"
        return [f"has {len(data)} bytes, {differ}"], len(data)
    if hashlib.sha256(data).hexdigest() != recorded["sha256"]:
        return [f"has another sha256 than the ledger says: {_damaged_part(cache, data)}"], len(data)
    records = shard.block.entry.records
    _, _, times, dim = cache.shape(shard.block.split)
    try:
        index = _shard_index(data, cache.settings.block_size)
        features = _shard_features(data, index, (len(records), times, dim), codec=cache.settings.codec)
    except ValueError as error:
        return [str(error)], len(data)
    return _number_problems(features, records), len(data)


def _damaged_part(cache: FeatureCache, data: bytes) -> str:
    try:
        _shard_index(data, cache.settings.block_size)
    except ValueError:
        return "its index is damaged (wrong crc32c)"
    return "the features differ, its index is right"


def _shard_index(data: bytes, block_size: int) -> npt.NDArray[np.uint64]:
    """Offset and size in bytes [clip of the block, 2], from the end of a shard; ValueError where the crc32c is wrong."""
    size = block_size * _INDEX_ENTRY_BYTES
    index, crc = data[-size - _CRC_BYTES : -_CRC_BYTES], data[-_CRC_BYTES:]
    if len(index) != size or google_crc32c.value(index) != int.from_bytes(crc, "little"):
        raise ValueError("has a damaged index (wrong crc32c)")
    return np.frombuffer(index, "<u8").reshape(-1, 2)


def _shard_features(
    data: bytes, index: npt.NDArray[np.uint64], shape: tuple[int, int, int], *, codec: str
) -> npt.NDArray[np.float16]:
    """Features [clip, time, dim] of a shard; ValueError where a clip's bytes are not where the index says."""
    features = np.empty(shape, "<f2")
    if shape[0] > len(index):
        raise ValueError(f"has room for {len(index)} clips, the ledger lists {shape[0]}")
    for row, (offset, size) in enumerate(index[: shape[0]].tolist()):
        chunk = data[offset : offset + size]
        if codec == "zstd":
            try:
                chunk = bytes(Zstd().decode(chunk))
            except RuntimeError as error:
                raise ValueError(f"has clip {row} of the block damaged ({error})") from None
        if len(chunk) != features[row].nbytes:
            raise ValueError(
                f"has {len(chunk)} bytes for clip {row} of the block, not {features[row].nbytes}"
            )
        features[row] = np.frombuffer(chunk, "<f2").reshape(shape[1:])
    return features


def _number_problems(features: npt.NDArray[np.float16], records: Sequence[ClipRecord]) -> list[str]:
    """Clips whose features [clip, time, dim] cannot be what their records say."""
    bits = features.view(np.uint16)
    usable = np.array([record.usable for record in records], dtype=np.bool_)
    endless = ((bits & _EXPONENT) == _EXPONENT).any(axis=(1, 2))
    zero = ~(bits & _MAGNITUDE).any(axis=(1, 2))
    cases = (
        (endless, "has values that are not finite"),
        (usable & zero, "has nothing but zeros for a clip with features"),
        (~usable & ~zero & ~endless, "has features for a clip without"),
    )
    return [
        f"{problem}: {_some([f'{records[row].clip_id} ({records[row].outcome})' for row in np.flatnonzero(rows).tolist()])}"
        for rows, problem in cases
        if rows.any()
    ]


# --- what else lies there ---


def _check_strays(cache: FeatureCache, check: CacheCheck) -> None:
    """Files that no committed block knows: a ledger entry among them is wrong, the rest harmless."""
    known = {"zarr.json", "manifest.parquet", "outcomes.parquet"}
    for split in cache.splits:
        known |= {f"{split}/zarr.json", f"{split}/features/zarr.json"}
        for views in cache.view_ranges(split):
            for block, entry in cache.entries(split, views).items():
                known |= {ledger_name(split, block, views), *entry.shards}
    for name in sorted(set(_files_below(cache.path)) - known):
        folder, _, file = name.rpartition("/")
        parts = folder.split("/")
        if not folder and file.startswith((".lock", ".run", ".making")):
            continue
        if file.startswith(".") and file.endswith(".partial"):
            check.leftovers.append(f"{name}: half of a write that was interrupted")
        elif parts[0] == "ledger" and len(parts) == 2 and parts[1] in cache.splits:
            check.add([_stray_entry(cache, parts[1], name)])
        elif parts[1:3] == ["features", "c"]:
            check.leftovers.append(f"{name}: of no committed block; it is written anew with its block")
        else:
            check.leftovers.append(f"{name}: not of this cache")


def _stray_entry(cache: FeatureCache, split: str, name: str) -> Finding:
    ranges, blocks = cache.view_ranges(split), range(cache.num_blocks(split))
    block = next((b for b in blocks for views in ranges if name == ledger_name(split, b, views)), None)
    problem = f"is of no block: {split} has {len(blocks)}"
    if block is not None:
        problem = "cannot be parsed: its block counts as missing"
    return Finding(split=split, block=block, path=name, problem=problem, ledger=name)


def _files_below(folder: Location) -> Iterator[str]:
    """Paths of all files, from `folder` on."""
    if isinstance(folder, Url):
        yield from folder.sizes_below()
        return
    for parent, _, files in os.walk(folder):
        yield from ((Path(parent) / file).relative_to(folder).as_posix() for file in files)


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _MAX_CLIPS_NAMED
    return ", ".join(names[:_MAX_CLIPS_NAMED]) + (f" and {more} more" if more > 0 else "")
