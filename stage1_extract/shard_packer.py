"""The shards of one split: those that are there are kept, the others are written, each whole or not at all."""

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Self

from vivit.pipeline.byte_file import StoreFile
from vivit.pipeline.errors import ConfigError, DataError
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.progress import Progress
from vivit.pipeline.storage import Location
from vivit.pipeline.tar_index import TarIndex, index_path
from vivit.pipeline.tar_walk import TarContent, walk
from vivit.pipeline.tar_writer import END_BYTES, TarWriter, WrongSizeError, space_of
from vivit.pipeline.video_location import video_at
from vivit.pipeline.video_source import Failure, check_file, first_video_stream, open_container, open_source
from vivit.pipeline.workspace import storage_errors, sync_folder, write_atomically
from vivit.stage1_extract.pack_samples import PackSample
from vivit.stage1_extract.resized_video import write_resized

_VERSION = 1
"""Of the layout of samples: shards of another one are not gone on with."""
_MIB = 1 << 20
_PIECE_BYTES = 1 << 20
_LARGEST_URL_SHARD_MB = 5120
"""What S3 takes in one request."""


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What to pack, and where."""

    data_root: Location
    """Folder or URL that the manifest's video paths start from."""
    out: Location
    """Folder or URL of the shards."""
    shard_size_mb: int = 1024
    """Size that a shard does not exceed, in MiB, unless a single video does."""
    max_count: int | None = None
    """Most samples in a shard; None does not limit them."""
    resize: int | None = None
    """Short side in pixels to which larger videos are encoded anew; None copies all bytes as they are."""
    threads: int = 0
    """Threads that encode; 0 is one per core."""

    def __post_init__(self) -> None:
        for name in ("shard_size_mb", "max_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not isinstance(self.out, Path) and self.shard_size_mb > _LARGEST_URL_SHARD_MB:
            raise ConfigError(f"shard_size_mb must be at most {_LARGEST_URL_SHARD_MB} for {self.out}")
        if self.resize is not None and (self.resize < 16 or self.resize % 2):
            raise ConfigError(f"resize must be an even number of pixels from 16 on, got {self.resize}")


@dataclass
class Shard:
    """A shard that is complete."""

    name: str
    first: int
    """Number in the split of its first sample."""
    stop: int
    members: dict[int, str]
    """Name of the video's member by number of the sample."""
    failed: dict[int, tuple[str, str]]
    """Outcome and reason of the samples that are not in it, by number."""
    size_bytes: int
    is_new: bool


@dataclass
class _Ready:
    """A sample that can be written: its video as a file."""

    file: BinaryIO
    size_bytes: int
    extension: str
    cleanup: ExitStack = field(default_factory=ExitStack)


class SplitPacker:
    """Packs one split."""

    def __init__(
        self, config: PackConfig, split: str, samples: Sequence[PackSample], work: Path, progress: Progress
    ) -> None:
        self._config, self._split, self._samples = config, split, samples
        self._work, self._progress = work, progress
        self._stop = threading.Event()
        self._numbers = itertools.count()
        digest = hashlib.sha256()
        options = [_VERSION, config.shard_size_mb, config.max_count, config.resize]
        digest.update(json.dumps(options).encode())
        for sample in samples:
            digest.update(b"\n".join([b"", sample.key.encode(), sample.about, sample.cls or b""]))
        self._settings = digest.hexdigest()
        """Of all that decides the bytes of the shards, but for those of the videos."""

    def shards(self) -> Iterator[Shard]:
        """The shards in order: where one is there already it is kept."""
        at = number = 0
        with _Ahead(self._prepare, len(self._samples), self._threads) as ahead, self._stopping():
            while at < len(self._samples):
                shard = self._kept(number, at)
                if shard is None:
                    shard = self._write(number, at, ahead)
                else:
                    self._progress.advance(shard.stop - shard.first)
                yield shard
                at, number = shard.stop, number + 1
        self._remove_from(number)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Let threads that encode end early when the `with` block is left."""
        try:
            yield
        finally:
            self._stop.set()

    @property
    def _threads(self) -> int:
        return (self._config.threads or os.cpu_count() or 1) if self._config.resize else 2

    def _tar(self, number: int) -> Location:
        return self._config.out / f"{self._split}-{number:06d}.tar"

    # --- what is there already ---

    def _kept(self, number: int, first: int) -> Shard | None:
        """The shard of this number where it is there, whole, and would come out the same again; otherwise None.

        DataError where something else has its name.
        """
        tar = self._tar(number)
        index, size_bytes = _stored_index(tar), _size(tar)
        if index is None and size_bytes is None:
            return None
        made = {} if index is None else index.about.get("pack", {})
        if index is None or made.get("settings") != self._settings:
            raise DataError(
                f"{tar} was not packed from these clips with these options: choose another --out, or remove it"
            )
        failed = {int(at): (outcome, reason) for at, outcome, reason in made["failed"]}
        if (
            made["first"] != first
            or size_bytes != index.size_bytes
            or not _has_members(tar, index)
            or any(self._can_be_read(at) for at in failed)
        ):
            return None
        members = {int(at): name for at, name in made["videos"]}
        return Shard(tar.name, first, made["stop"], members, failed, index.size_bytes, is_new=False)

    def _can_be_read(self, at: int) -> bool:
        try:
            self._prepare(at).cleanup.close()
        except Failure:
            return False
        return True

    def _remove_from(self, number: int) -> None:
        """Remove shards behind the last one: of a time when fewer videos could be read."""
        while (index := _stored_index(self._tar(number))) is not None:
            if index.about.get("pack", {}).get("settings") != self._settings:
                return
            self._tar(number).unlink(missing_ok=True)
            index_path(self._tar(number)).unlink(missing_ok=True)
            number += 1

    # --- what is new ---

    def _write(self, number: int, first: int, ahead: "_Ahead") -> Shard:
        """Write the shard that begins with sample `first`; one without any video is not written."""
        tar = self._tar(number)
        shard = Shard(tar.name, first, first, {}, {}, 0, is_new=True)
        partial = self._work / tar.name
        with storage_errors(partial), TarWriter(partial) as writer:
            while shard.stop < len(self._samples) and self._add_next(shard, writer, ahead):
                ahead.done(shard.stop)
                shard.stop += 1
                self._progress.advance()
            shard.size_bytes = writer.finish()
        if not shard.members:
            partial.unlink()
            return replace(shard, size_bytes=0)
        about = {
            "settings": self._settings,
            "first": first,
            "stop": shard.stop,
            "videos": list(shard.members.items()),
            "failed": [[at, *why] for at, why in shard.failed.items()],
        }
        _publish(partial, tar, TarIndex(TarContent(writer.members), shard.size_bytes, about={"pack": about}))
        return shard

    def _add_next(self, shard: Shard, writer: TarWriter, ahead: "_Ahead") -> bool:
        """Write the next sample, or note why it cannot be read; False where it does not fit into the shard."""
        if self._config.max_count is not None and len(shard.members) >= self._config.max_count:
            return False
        before, most = writer.size_bytes, self._config.shard_size_mb * _MIB
        try:
            ready = ahead.get(shard.stop)
            if shard.members and before + self._space(shard.stop, ready) > most:
                return False
            shard.members[shard.stop] = self._add(writer, self._samples[shard.stop], ready)
        except Failure as failure:
            writer.cut_back(before)
            shard.failed[shard.stop] = (failure.outcome.value, failure.message)
        return True

    def _space(self, at: int, ready: "_Ready") -> int:
        """Bytes that a sample takes up, and the end of the tar."""
        sample = self._samples[at]
        texts = [len(text) for text in (sample.about, sample.cls) if text is not None]
        return sum(map(space_of, [*texts, ready.size_bytes])) + len(END_BYTES)

    def _add(self, writer: TarWriter, sample: PackSample, ready: "_Ready") -> str:
        """Write the members of a sample; the name of its video's."""
        name = f"{sample.key}.{ready.extension}"
        if sample.cls is not None:
            writer.add(f"{sample.key}.cls", len(sample.cls), [sample.cls])
        writer.add(f"{sample.key}.json", len(sample.about), [sample.about])
        try:
            writer.add(name, ready.size_bytes, _pieces(ready.file))
        except WrongSizeError as error:
            raise Failure(
                Outcome.UNREADABLE, f"the file was written to while it was packed: {error}"
            ) from error
        return name

    def _prepare(self, at: int) -> "_Ready":
        """The video of a sample as it goes into the shard; Failure where it cannot be read."""
        sample = self._samples[at]
        source = video_at(self._config.data_root, sample.video)
        with ExitStack() as cleanup:
            if self._config.resize is not None:
                target = self._work / f"{self._split}-{at}-{next(self._numbers)}.mp4"
                cleanup.callback(target.unlink, missing_ok=True)
                if write_resized(source, self._config.resize, target, self._stop):
                    smaller = cleanup.enter_context(target.open("rb"))
                    return _Ready(smaller, target.stat().st_size, "mp4", cleanup.pop_all())
            file = cleanup.enter_context(open_source(source))
            _check_video(file)
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            return _Ready(file, size_bytes, sample.extension, cleanup.pop_all())
        raise AssertionError


class _Ahead:
    """Prepares samples in threads, ahead of the one that writes them."""

    def __init__(self, prepare: Callable[[int], "_Ready"], count: int, threads: int) -> None:
        self._prepare, self._count, self._threads = prepare, count, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pack")
        self._begun: dict[int, Future[_Ready]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for at in list(self._begun):
            self.done(at)

    def get(self, at: int) -> "_Ready":
        """A sample, which stays until it is done; Failure where it cannot be read."""
        for number in range(at, min(at + 2 * self._threads, self._count)):
            if number not in self._begun:
                self._begun[number] = self._pool.submit(self._prepare, number)
        return self._begun[at].result()

    def done(self, at: int) -> None:
        """Let go of a sample."""
        future = self._begun.pop(at)
        if not future.cancelled() and future.exception() is None:
            future.result().cleanup.close()


def _check_video(file: BinaryIO) -> None:
    """Failure where a file is no video that can be opened; damage behind its header is left to those who read it."""
    try:
        is_known, _ = check_file(file)
        container = open_container(file, is_known=is_known)
        try:
            first_video_stream(container)
        finally:
            container.close()
    finally:
        if isinstance(file, StoreFile):
            file.check()


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """The bytes of a file."""
    while True:
        try:
            piece = file.read(_PIECE_BYTES)
        except OSError as error:
            raise Failure(Outcome.UNREADABLE, str(error)) from error
        if not piece:
            return
        yield piece


def _publish(partial: Path, tar: Location, index: TarIndex) -> None:
    """Put a finished shard in its place. Its index comes first: a shard with an index is whole."""
    if isinstance(tar, Path):
        with storage_errors(tar):
            write_atomically(index_path(tar), index.to_json(tar.name))
            partial.replace(tar)
            sync_folder(tar.parent)
        return
    index_path(tar).write_bytes(index.to_json(tar.name))
    tar.write_bytes(partial.read_bytes())
    partial.unlink()


def _stored_index(tar: Location) -> TarIndex | None:
    """The index beside a shard; None where there is none."""
    try:
        return TarIndex.from_json(index_path(tar).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{index_path(tar)} is damaged ({error}): remove it and its tar") from error


def _size(tar: Location) -> int | None:
    try:
        return tar.stat().st_size if isinstance(tar, Path) else tar.size()
    except FileNotFoundError:
        return None


def _has_members(tar: Location, index: TarIndex) -> bool:
    """Whether the headers of a shard are those that its index says; in a store its size has to do."""
    if not isinstance(tar, Path):
        return True
    try:
        with tar.open("rb", buffering=0) as file:
            found = walk(file, index.size_bytes, str(tar))
    except DataError:
        return False
    bare = [replace(member, sha256=None) for member in index.content.members]
    return not found.damage and found.members == bare
