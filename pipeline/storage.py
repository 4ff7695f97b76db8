"""Where files are: a path on this machine, or the URL of an object in a store (`s3://`, `gs://`, `memory://`).

A `Url` is text that behaves like a `Path` in what the pipeline does with one. Its requests go through obstore, whose
clients live once per process; a request that fails for a reason that may pass is made again.
Credentials come from the environment that the stores' own tools read, and from nowhere else.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast
from urllib.parse import unquote

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.positioned_file import PositionedFile

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutMode, PutResult
    from obstore.store import ObjectStore

Result = TypeVar("Result")
Version = dict[str, str]
"""What a store calls one version of an object."""

SCHEMES = ("s3", "gs", "memory")
"""Kinds of object stores; `file` is a path."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BLOCK_BYTES = 4 << 20
"""Unit in which a large object is read ahead."""
_BLOCKS_KEPT = 4
_WHOLE_BYTES = 32 << 20
"""Objects up to this size are fetched in one request when they are opened as a file."""


@dataclass(frozen=True, order=True)
class Url:
    """An object, or all objects below a prefix, in a store. Holds text only, so it may go to other processes."""

    scheme: str
    bucket: str
    key: str
    """Name of the object in the bucket, without a slash at either end; empty for the bucket itself."""

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root

    @property
    def root(self) -> str:
        """The bucket, as a URL."""
        return f"{self.scheme}://{self.bucket}"

    # --- what a Path says of itself ---

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "Url":
        return Url(self.scheme, self.bucket, self.key.rpartition("/")[0])

    def __truediv__(self, name: str) -> "Url":
        key = _checked_key(name)
        return Url(self.scheme, self.bucket, f"{self.key}/{key}" if self.key and key else self.key + key)

    def with_name(self, name: str) -> "Url":
        return self.parent / name

    def absolute(self) -> "Url":
        return self

    def resolve(self) -> "Url":
        return self

    # --- looking ---

    def exists(self) -> bool:
        """Whether there is an object of this name, or any below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there is an object below this name."""

        def any_below(store: "ObjectStore") -> bool:
            return any(bool(chunk) for chunk in store.list(self.key or None, chunk_size=1))

        return self._ask("list", any_below)

    def size(self) -> int:
        """Bytes of the object; FileNotFoundError where there is none."""
        return self.state()[0]

    def state(self) -> tuple[int, str | None]:
        """Bytes of the object, and the store's name of this version of it; FileNotFoundError where there is none."""

        def state(store: "ObjectStore") -> tuple[int, str | None]:
            found = store.head(self.key)
            return int(found["size"]), found["e_tag"]

        try:
            return self._ask("read", state)
        except FileNotFoundError:
            # The answer to HEAD has no words: those to a GET tell a missing bucket from a missing object.
            self._ask("read", lambda store: store.get(self.key))
            raise

    def version(self) -> str:
        """Changes when the object is written anew; FileNotFoundError where there is none."""

        def asked(store: "ObjectStore") -> str:
            meta = store.head(self.key)
            return f"{meta['e_tag']} {meta['last_modified'].isoformat()}"

        return self._ask("read", asked)

    def sizes_below(self, suffix: str = "") -> dict[str, int]:
        """Bytes of every object below this name whose own name ends so, by its path from here, sorted."""
        start = len(self.key) + 1 if self.key else 0

        def listed(store: "ObjectStore") -> dict[str, int]:
            found = (meta for chunk in store.list(self.key or None, chunk_size=1000) for meta in chunk)
            return {
                meta["path"][start:]: int(meta["size"]) for meta in found if meta["path"].endswith(suffix)
            }

        return dict(sorted(self._ask("list", listed).items()))

    def names(self) -> list[str]:
        """Names of the objects directly below, without those deeper down."""

        def listed(store: "ObjectStore") -> list[str]:
            found = store.list_with_delimiter(self.key or None)["objects"]
            return sorted(meta["path"].rpartition("/")[2] for meta in found)

        return self._ask("list", listed)

    # --- reading ---

    def read_bytes(self) -> bytes:
        """The whole object; FileNotFoundError where there is none."""
        return self._ask("read", lambda store: store.get(self.key).bytes().to_bytes())

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def read_range(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on: `size` of them, or fewer where the object ends earlier."""
        if size <= 0:
            return b""

        def read(store: "ObjectStore") -> bytes:
            return store.get_range(self.key, start=offset, length=size).to_bytes()

        try:
            return self._ask("read", read, size)
        except EOFError:
            return b""

    def read_end(self, size: int) -> bytes:
        """The last `size` bytes, or all of a smaller object."""
        return self._ask(
            "read",
            lambda store: store.get(self.key, options={"range": {"suffix": size}}).bytes().to_bytes(),
            size,
        )

    def read_versioned(self) -> tuple[bytes, Version]:
        """The whole object, and the store's name of this version of it."""

        def read(store: "ObjectStore") -> tuple[bytes, Version]:
            found = store.get(self.key)
            return found.bytes().to_bytes(), _version(found.meta)

        return self._ask("read", read)

    def open_binary(self, start: int = 0, size: int | None = None) -> BinaryIO:
        """A seekable file to read, which fetches what is asked for in large pieces; FileNotFoundError.

        Of the whole object, or of `size` bytes of it from `start` on: then nothing is fetched before it is read.
        """
        return cast(BinaryIO, _ObjectFile(self, start, size))

    # --- writing ---

    def write_bytes(self, data: bytes) -> None:
        """Put the object, whole or not at all, in one request."""
        self._ask("write", lambda store: store.put(self.key, data, use_multipart=False), len(data))

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def create(self, data: bytes) -> Version:
        """Put the object where there is none, and give its version; FileExistsError where there is one.

        NotImplementedError where the store does not know such a request. One that was made twice because its answer
        was lost may find its own object: compare what is there.
        """
        return self._put_if(data, "create")

    def replace(self, data: bytes, version: Version) -> Version:
        """Put the object in the place of this version of it, and give the new one; FileExistsError where it is another.

        NotImplementedError as of `create`.
        """
        return self._put_if(data, cast("PutMode", version))

    def _put_if(self, data: bytes, mode: "PutMode") -> Version:
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        def put(store: "ObjectStore") -> Version:
            return _version(store.put(self.key, data, mode=mode))

        try:
            return self._ask("write", put, len(data))
        except (AlreadyExistsError, PreconditionError):
            raise FileExistsError(f"{self} was written by another process") from None
        except NotSupportedError:
            raise NotImplementedError(f"{self.root} has no conditional put") from None

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        if not missing_ok:
            self.size()
        try:
            self._ask("delete", lambda store: store.delete(self.key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _ask(self, verb: str, request: "Callable[[ObjectStore], Result]", size: int = 0) -> Result:
        """The answer to a request about `size` bytes, made again while that may help; StorageError otherwise."""
        from vivit.pipeline.storage_client import ask

        return ask(self.scheme, self.bucket, self.key, verb, request, size)


Location = Path | Url


def location(text: str | Location) -> Location:
    """What a text names: a path, or the URL of an object; ConfigError for another scheme or a secret in the URL."""
    if not isinstance(text, str):
        return text
    found = _SCHEME.match(text)
    if found is None:
        return Path(text)
    scheme, rest = found[1].lower(), text[found.end() :]
    if scheme == "file":
        return _file_path(text)
    if scheme not in SCHEMES:  # without the rest of the text, which may hold a password
        raise ConfigError(
            f"{scheme}:// is not a kind of storage: pass a path, or a URL of one of "
            + ", ".join(f"{known}://" for known in ("file", *SCHEMES))
        )
    bucket, _, key = rest.partition("/")
    if "?" in rest or "@" in bucket or ":" in bucket:
        raise ConfigError(
            f"a {scheme}:// URL must not hold a user, a password, keys or a query: give those by the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS), and the URL as "
            f"{scheme}://bucket/name"
        )
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"a {scheme}:// URL needs the name of a bucket: {scheme}://bucket/name")
    return Url(scheme, bucket, _checked_key(key))


def is_url(text: str) -> bool:
    """Whether a text has a scheme, and so is not the name or path of something on this machine."""
    return _SCHEME.match(text) is not None


def _version(about: "ObjectMeta | PutResult") -> Version:
    found = {"e_tag": about["e_tag"], "version": about["version"]}
    return {name: value for name, value in found.items() if value is not None}


def _checked_key(text: str) -> str:
    parts = [part for part in str(text).split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ConfigError(
            f"{'/'.join(parts)} has a part `..`, which names of objects cannot have: spell it out"
        )
    return "/".join(parts)


def _file_path(text: str) -> Path:
    host, slash, path = text.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise ConfigError("a file:// URL needs three slashes and an absolute path: file:///folder/name")
    return Path(unquote(f"/{path}"))  # `#` and `?` are letters like others in the name of a file


class _ObjectFile(PositionedFile):
    """An object as a file: fetched whole where it is small, else in blocks, the last few of which are kept."""

    def __init__(self, url: Url, start: int, size: int | None) -> None:
        super().__init__(url.size() if size is None else size)
        self._url, self._offset, self._whole = url, start, self._size
        self._block_bytes = _WHOLE_BYTES if self._size <= _WHOLE_BYTES else _BLOCK_BYTES
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return str(self._url)

    def _read_at(self, at: int, count: int) -> bytes:
        return b"".join(self._pieces(at, count))

    def _pieces(self, at: int, size: int) -> Iterator[memoryview]:
        """`size` bytes from `at` on, block by block."""
        end = at + size
        while at < end:
            number, start = divmod(at, self._block_bytes)
            piece = memoryview(self._block(number))[start : start + end - at]
            if not piece:
                raise OSError(5, f"{self._url} became shorter while it was read")
            yield piece
            at += len(piece)

    def _block(self, number: int) -> bytes:
        with self._lock:
            block = self._blocks.pop(number, None)
            if block is None:
                offset = number * self._block_bytes
                size = min(self._block_bytes, self._whole - offset)
                block = self._url.read_range(self._offset + offset, size)
            self._blocks[number] = block
            if len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
            return block
