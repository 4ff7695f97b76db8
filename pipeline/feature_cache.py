"""The feature cache: a Zarr v3 group of CLS tokens, with provenance, and a ledger that says which blocks count.

`docs/cache-format.md` describes what lies on disk.
"""

import hashlib
import itertools
import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from vivit.pipeline.cache_settings import CacheSettings
from vivit.pipeline.cache_store import Shards, cache_store, ledger_name
from vivit.pipeline.errors import CacheError, IncompleteCacheError, StaleCacheError
from vivit.pipeline.ledger import ClipRecord, LedgerEntry
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.shard_reader import aligned_empty, shard_reader
from vivit.pipeline.storage import Location
from vivit.pipeline.views import ViewSpec
from vivit.pipeline.workspace import storage_errors

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
WEIGHTS_FILE = "weights_file"
"""Name under which a cache records the path of the file that its encoder's weights came from."""
_MANIFEST = "manifest.parquet"
_GROUP = "zarr.json"
_VIEW_STEPS = "train_views"
"""Name under which a cache records that views were appended."""
_LIBRARIES = ("vivit", "av", "numpy", "pillow", "timm", "torch", "zarr")


class FeatureCache:
    """Features of all splits, float16 [clip, view, time, dim], and the record of what is in them."""

    def __init__(
        self, path: Location, settings: CacheSettings, manifest: Manifest, view_steps: Sequence[int] = ()
    ) -> None:
        """Use `create`, `open` or `create_or_open`.

        `view_steps`: numbers of training views that the cache was begun with, and that it was to have each time that views
        were appended; empty where they never were.
        """
        self.path, self.settings, self.manifest = path, settings, manifest
        self._view_steps = tuple(view_steps) or (settings.views.train_views,)
        self._files = cache_store(path)
        self._entries = {split: self._read_ledger(split) for split in manifest.splits}
        self._readers = {
            split: shard_reader(
                path / split / "features", block_size=settings.block_size, codec=settings.codec
            )
            for split in manifest.splits
        }

    # --- making and opening ---

    @classmethod
    def create(
        cls,
        path: Location,
        manifest: Manifest,
        settings: CacheSettings,
        *,
        made_with: Mapping[str, str] | None = None,
    ) -> Self:
        """Make an empty cache, which appears whole or not at all.

        `made_with` is recorded beside the versions of libraries, and never compared.
        """
        if not path.name:
            raise CacheError(f"{path} is no name for a cache: pass --cache NAME")
        about = {
            "format_version": FORMAT_VERSION,
            "settings": settings.to_dict(),
            "made_with": library_versions() | dict(made_with or {}),
        }
        documents = _documents(manifest, settings, about)
        with storage_errors(path):
            cache_store(path).make(documents | {_MANIFEST: manifest.to_parquet()})
        return cls(path, settings, manifest)

    @classmethod
    def create_or_open(
        cls,
        path: Location,
        manifest: Manifest,
        settings: CacheSettings,
        *,
        made_with: Mapping[str, str] | None = None,
    ) -> Self:
        """The cache at `path`; StaleCacheError where it was made with other settings."""
        if not (path / "zarr.json").exists():
            try:
                return cls.create(path, manifest, settings, made_with=made_with)
            except CacheError:
                if not (path / "zarr.json").exists():  # else another part of the same job was first
                    raise
        cache = cls.open(path, allow_partial=True)
        if differences := [*settings.differences(cache.settings), *cache._views_differ(settings.views)]:
            listed = (
                "\n  ".join(differences).replace(" here", " asked for").replace(" there", " in the cache")
            )
            raise StaleCacheError(
                f"{path} was made with other settings:\n  {listed}\n"
                "pass the cache's settings to go on with it, or --cache NAME to make another"
            )
        return cache

    def _views_differ(self, asked: ViewSpec) -> list[str]:
        """What is wrong with a number of training views that the cache never was to have."""
        first, now = self._view_steps[0], self.settings.views.train_views
        if asked.train_views in self._view_steps:
            return []
        more = asked.train_views - first
        remedy = (
            f" (to append views: --train-views {first} --views +{more})" if asked.train_views > now else ""
        )
        return [f"views.train_views: {asked.train_views} here, {now} there{remedy}"]

    def take_labels_of(self, manifest: Manifest) -> bool:
        """Store `manifest`, which has the same clips, if its labels or other columns differ; whether they do."""
        if manifest.to_table().equals(self.manifest.to_table(), check_metadata=True):
            return False
        manifest.write(self.path / _MANIFEST)
        self.manifest = manifest
        return True

    @classmethod
    def open(cls, path: Location, *, allow_partial: bool = False) -> Self:
        """Open for reading; IncompleteCacheError where blocks are missing, unless `allow_partial`."""
        about = _read_attributes(path)
        manifest_path = path / _MANIFEST
        if not manifest_path.is_file():
            raise CacheError(f"{path} has lost its {_MANIFEST}: extract again with another --cache")
        manifest = Manifest.read(manifest_path)
        settings = _parse_settings(path, about["settings"])
        if manifest.sha256 != settings.manifest_sha256:
            raise CacheError(
                f"{manifest_path} does not hold the clips that the cache was made of: put the right one back"
            )
        cache = cls(path, settings, manifest, _parse_view_steps(path, about, settings))
        if not allow_partial and (missing := cache.missing()):
            raise IncompleteCacheError(
                f"{path} is incomplete: {missing}. Run the same `vivit extract` command again to finish it, "
                "or pass --allow-partial to use what is there"
            )
        return cache

    @contextmanager
    def lock(self, part: tuple[int, int] | None = None) -> Iterator[None]:
        """Hold the cache, or part i of n of it, for writing; CacheError where another process does.

        A killed process holds nothing, or in an object store for a minute at most.
        """
        with self._files.lock(part):
            yield

    def check_held(self) -> None:
        """CacheError where this process has lost the lease of a cache in an object store to another one."""
        self._files.check_held()

    # --- what is in it ---

    @property
    def identity(self) -> str:
        """Digest of the settings."""
        return hashlib.sha256(json.dumps(self.settings.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def made_with(self) -> dict[str, str]:
        """Versions of libraries, and the file of the encoder's weights, as they were when the cache was begun."""
        return dict(_read_attributes(self.path)["made_with"])

    @property
    def splits(self) -> list[str]:
        return self.manifest.splits

    @cached_property
    def _num_clips(self) -> dict[str, int]:
        return {split: len(self.manifest.of_split(split)) for split in self.splits}

    def shape(self, split: str) -> tuple[int, int, int, int]:
        """(clips, views, times, dim) of a split."""
        if split not in self._num_clips:
            raise CacheError(f"{self.path} has no split {split!r}: it has {', '.join(self.splits)}")
        settings = self.settings
        views = settings.views.num_views(split)
        return self._num_clips[split], views, settings.num_times, settings.backbone.embed_dim

    def num_blocks(self, split: str) -> int:
        return -(-self.shape(split)[0] // self.settings.block_size)

    def rows(self, split: str, block: int) -> tuple[int, int]:
        """First row of a block, and the one behind its last."""
        start = block * self.settings.block_size
        return start, min(start + self.settings.block_size, self.shape(split)[0])

    def view_ranges(self, split: str) -> list[range]:
        """The views that are committed together: those that the cache was begun with, then those of each time that some
        were appended, also where they are not published yet."""
        if split != "train":
            return [range(self.shape(split)[1])]
        return list(itertools.starmap(range, itertools.pairwise((0, *self._view_steps))))

    def _published(self, split: str) -> list[range]:
        return [views for views in self.view_ranges(split) if views.stop <= self.shape(split)[1]]

    @property
    def unpublished_views(self) -> range | None:
        """Training views that are being appended: no reader sees them before every clip has them."""
        now, wanted = self.settings.views.train_views, self._view_steps[-1]
        return range(now, wanted) if wanted > now else None

    def append_views(self, total: int) -> None:
        """Let the training clips have `total` views, or as many as they have or are to have already; the caller holds the
        lock, and opens the cache again to write them."""
        if "train" not in self.splits:
            raise CacheError(f"{self.path} has no training clips: only these get more views")
        with self._changing_settings():
            about = _read_attributes(self.path)
            settings = _parse_settings(self.path, about["settings"])
            steps = about.get(_VIEW_STEPS, [settings.views.train_views])
            if total > steps[-1]:
                self._write_documents(settings, about | {_VIEW_STEPS: [*steps, total]}, [_GROUP])

    def publish_views(self) -> bool:
        """Let readers see appended views that all clips have; whether there were any. The caller holds the lock.

        The array's own description grows first: what plain Zarr readers see then is all there.
        """
        if self.unpublished_views is None:
            return False
        whole = itertools.takewhile(lambda v: not self.missing_blocks("train", v), self.view_ranges("train"))
        reached = max((views.stop for views in whole), default=0)
        if reached <= self.unpublished_views.start:
            return False
        settings = replace(self.settings, views=replace(self.settings.views, train_views=reached))
        with self._changing_settings():
            about = _read_attributes(self.path)
            if _parse_settings(self.path, about["settings"]).views.train_views < reached:
                about |= {"settings": settings.to_dict()}
                self._write_documents(settings, about, ["train/features/zarr.json", _GROUP])
        return True  # by this process, or by that of another part

    @contextmanager
    def _changing_settings(self) -> Iterator[None]:
        """Between reading and writing the settings no process of another part changes them."""
        with storage_errors(self.path), self._files.settings_lock():
            yield

    def _write_documents(
        self, settings: CacheSettings, about: Mapping[str, Any], names: Sequence[str]
    ) -> None:
        documents = _documents(self.manifest, settings, about)
        with storage_errors(self.path):
            self._files.check_held()
            for name in names:
                self._files.write(name, documents[name])

    def missing_blocks(self, split: str, views: range | None = None) -> list[int]:
        """Blocks some of whose views (None: of all that readers see) are not in the ledger, or whose shards are not there
        in full size."""
        ranges = self._published(split) if views is None else [views]
        missing = (self._missing_blocks(split, views) for views in ranges)
        return sorted(set(itertools.chain.from_iterable(missing)))

    def _missing_blocks(self, split: str, views: range) -> list[int]:
        entries = self._entries[split][views]
        wanted = {name: shard["bytes"] for entry in entries.values() for name, shard in entry.shards.items()}
        sizes = self._files.sizes(split, wanted)
        whole = {
            block
            for block, entry in entries.items()
            if all(sizes.get(name) == shard["bytes"] for name, shard in entry.shards.items())
        }
        return [block for block in range(self.num_blocks(split)) if block not in whole]

    def missing(self, *, unpublished: bool = False) -> str:
        """What is missing, in words, also of views that are being appended if asked; empty for a complete cache."""
        parts = []
        for split in self.splits:
            if blocks := self.missing_blocks(split):
                clips = sum(stop - start for start, stop in (self.rows(split, block) for block in blocks))
                parts.append(
                    f"{split} lacks {len(blocks)} of {self.num_blocks(split)} blocks "
                    f"({clips} of {self.shape(split)[0]} clips)"
                )
            for views in self.view_ranges(split) if unpublished else ():
                if views not in self._published(split) and (blocks := self.missing_blocks(split, views)):
                    parts.append(
                        f"{split} lacks the appended views {views.start} to {views.stop - 1} of {len(blocks)} of "
                        f"{self.num_blocks(split)} blocks"
                    )
        return ", ".join(parts)

    def records(self, split: str, views: range | None = None) -> list[ClipRecord | None]:
        """What became of each clip, in row order; None where its block is not committed.

        `views` (None: those that the cache was begun with): a clip that has features there may have failed when others
        were appended (see `usable_views`).
        """
        records: list[ClipRecord | None] = [None] * self.shape(split)[0]
        for block, entry in self._entries[split][views or self.view_ranges(split)[0]].items():
            start, stop = self.rows(split, block)
            # else the entry is of another block, which `verify` says
            if tuple(entry.rows) == (start, stop) and len(entry.records) == stop - start:
                records[start:stop] = entry.records
        return records

    def usable_rows(self, split: str) -> npt.NDArray[np.int64]:
        """Rows that are committed and have features, in the first view at least."""
        records = self.records(split)
        return np.array([row for row, r in enumerate(records) if r is not None and r.usable], dtype=np.int64)

    def usable_views(self, split: str) -> npt.NDArray[np.int64]:
        """How many views of each clip have features [clip], counted up to the first that has none."""
        counts = np.zeros(self.shape(split)[0], np.int64)
        usable = np.ones(len(counts), np.bool_)
        for views in self._published(split):
            usable &= [record is not None and record.usable for record in self.records(split, views)]
            counts[usable] = views.stop
        return counts

    def entries(self, split: str, views: range) -> Mapping[int, LedgerEntry]:
        """The ledger of some views (see `view_ranges`) by block; damaged entries are not in it."""
        return self._entries[split][views]

    def withdraw(self, name: str) -> None:
        """Remove a ledger entry, so that its block counts as missing and is computed anew; the caller holds the lock."""
        with storage_errors(self.path):
            self._files.check_held()
            self._files.discard(name)

    def size_bytes(self) -> int:
        """Size of all committed shards."""
        ledgers = [ledger for split in self.splits for ledger in self._entries[split].values()]
        return sum(
            shard["bytes"]
            for ledger in ledgers
            for entry in ledger.values()
            for shard in entry.shards.values()
        )

    # --- reading and writing ---

    def read(
        self, split: str, rows: npt.ArrayLike | None = None, views: Sequence[int] | None = None
    ) -> npt.NDArray[np.float16]:
        """Features [row, view, time, dim] of the given rows and views (None: all published), in the order given.

        The array is a transposed view of [view, row, time, dim], which is how the features lie on disk.
        """
        clips, num_views, times, dim = self.shape(split)
        wanted = np.arange(clips) if rows is None else np.asarray(rows, dtype=np.int64).reshape(-1)
        chosen = list(range(num_views) if views is None else views)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < clips):
            raise IndexError(
                f"rows {wanted.min()}..{wanted.max()} of split {split!r}, which has {clips} clips"
            )
        touched = [views for views in self._entries[split] if any(view in views for view in chosen)]
        if not all(any(view in views for views in touched) for view in chosen):
            raise IndexError(f"views {chosen} of split {split!r}, which has {num_views} views")
        blocks = set((wanted // self.settings.block_size).tolist())
        if unwritten := sorted(
            block for views in touched for block in blocks - set(self._entries[split][views])
        ):
            raise IncompleteCacheError(
                f"blocks {unwritten[:5]} of {self.path}, split {split!r}, are not committed"
            )
        out = aligned_empty((len(chosen), len(wanted), times, dim))
        self._readers[split].read(wanted, chosen, out)
        return out.transpose(1, 0, 2, 3)

    def commit(
        self,
        split: str,
        block: int,
        features: npt.NDArray[np.float16],
        records: Sequence[ClipRecord],
        about: Mapping[str, Any] | None = None,
        *,
        views: range | None = None,
    ) -> None:
        """Write views (None: those that the cache was begun with) of one block, features [clip, view, time, dim], and enter
        them in the ledger when they are durable."""
        views = views or self.view_ranges(split)[0]
        start, stop = self.rows(split, block)
        expected = (stop - start, len(views), *self.shape(split)[2:])
        if features.shape != expected or features.dtype != np.float16 or len(records) != stop - start:
            raise ValueError(
                f"block {block} of {split}: {features.shape = }, {features.dtype}, {len(records)} records; "
                f"expected float16 {expected}"
            )
        if not np.isfinite(features).all():
            raise ValueError(f"block {block} of {split} has values that are not finite")
        name, entries = ledger_name(split, block, views), self._entries[split][views]
        with storage_errors(self.path):
            entries.pop(block, None)
            # A block that is written anew must not count while it is half old and half new.
            self._files.discard(name)
            shards = self._write_shards(split, block, views, features)
            entry = LedgerEntry((start, stop), shards, list(records), dict(about or {}))
            self._files.check_held()
            self._files.write(name, entry.to_json(split, block, views))
        entries[block] = entry

    def _write_shards(
        self, split: str, block: int, views: range, features: npt.NDArray[np.float16]
    ) -> Shards:
        rows = slice(*self.rows(split, block))
        shards = self._files.write_shards(split, block, rows, views, features, self._array_documents[split])
        self._readers[split].forget(block)
        return shards

    @cached_property
    def _array_documents(self) -> dict[str, bytes]:
        """The zarr.json of the array of each split, with all views that are to be written."""
        views = replace(self.settings.views, train_views=self._view_steps[-1])
        documents = _documents(self.manifest, replace(self.settings, views=views), {})
        return {split: documents[f"{split}/features/zarr.json"] for split in self.splits}

    def _read_ledger(self, split: str) -> dict[range, dict[int, LedgerEntry]]:
        """Entries by the views that are committed together, then by block; files of no block are passed over."""
        files = self._files.ledger(split)
        entries: dict[range, dict[int, LedgerEntry]] = {}
        for views in self.view_ranges(split):
            entries[views] = {}
            for block in range(self.num_blocks(split)):
                name = ledger_name(split, block, views)
                data = files.get(name.rpartition("/")[2])
                try:
                    if data is not None:
                        entries[views][block] = LedgerEntry.from_json(data)
                except (ValueError, KeyError, TypeError) as error:
                    logger.warning("%s is damaged (%s): its block counts as missing", self.path / name, error)
        return entries


def _documents(manifest: Manifest, settings: CacheSettings, about: Mapping[str, Any]) -> dict[str, bytes]:
    """The zarr.json of the group, with `about` in its attributes, and of all below it, by their names."""
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes={"vivit": dict(about)})
    for split in manifest.splits:
        _create_array(group, split, len(manifest.of_split(split)), settings)
    return {name: data.to_bytes() for name, data in files.items()}


def _create_array(group: zarr.Group, split: str, clips: int, settings: CacheSettings) -> None:
    times, dim = settings.num_times, settings.backbone.embed_dim
    group.create_array(
        f"{split}/features",
        shape=(clips, settings.views.num_views(split), times, dim),
        dtype=settings.dtype,
        shards=(settings.block_size, 1, times, dim),
        chunks=(1, 1, times, dim),
        compressors=None if settings.codec == "none" else ZstdCodec(level=1),
        filters=None,
        fill_value=0.0,
        dimension_names=("clip", "view", "time", "dim"),
    )


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide bytes."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


def _parse_settings(path: Location, values: Mapping[str, Any]) -> CacheSettings:
    try:
        return CacheSettings.from_dict(values)
    except (TypeError, KeyError, AttributeError) as error:
        raise CacheError(f"{path} was made by another version of vivit ({error}): extract again") from None


def _parse_view_steps(path: Location, about: Mapping[str, Any], settings: CacheSettings) -> list[int]:
    """Numbers of training views that a cache was to have; CacheError where they are none."""
    now = settings.views.train_views
    steps = about.get(_VIEW_STEPS, [now])
    if not (
        isinstance(steps, list)
        and all(isinstance(step, int) for step in steps)
        and all(a < b for a, b in itertools.pairwise((0, *steps)))
        and now in steps
    ):
        raise CacheError(
            f"{path}/zarr.json is damaged: {_VIEW_STEPS} {steps!r} are not growing numbers with {now} among them"
        )
    return steps


def _read_attributes(path: Location) -> dict[str, Any]:
    try:
        data = (path / "zarr.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(f"{path} is not a feature cache: it has no zarr.json") from None
    except OSError as error:
        raise CacheError(f"{path}/zarr.json cannot be read: {error}") from None
    try:
        about: dict[str, Any] = json.loads(data)["attributes"]["vivit"]
        found = about["format_version"]
        known = {f.name for f in fields(CacheSettings)}
        if found == FORMAT_VERSION and set(about["settings"]) == known:
            return about
    except (ValueError, KeyError, TypeError):
        raise CacheError(f"{path}/zarr.json does not describe a feature cache of vivit") from None
    raise CacheError(
        f"{path} has format version {found}; this vivit reads version {FORMAT_VERSION}: extract again"
    )
