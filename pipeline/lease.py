"""One writer at a time on an object store: a lease is an object that its holder writes anew every few seconds.

A killed process cannot delete its lease, so that it holds for up to `LEASE_SEC` more; on the same machine its death is seen
at once. Times are those of the machines' clocks, which must not be apart by more than some seconds.
"""

import json
import logging
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from vivit.pipeline.errors import StorageError, VivitError
from vivit.pipeline.storage import Url, Version

logger = logging.getLogger(__name__)

LEASE_SEC = 60.0
"""How long a lease holds after it was written last."""
RENEW_SEC = 15.0
_WHOLE = ".lock"
_PART = re.compile(r"\.lock-(\d+)-of-(\d+)")
_RELEASE_SEC = 5.0
_ATTEMPTS = 5
_HIDDEN = "hidden"
"""What is known of a process of another user where /proc does not show it."""
_held: "set[_Lease]" = set()
"""The leases of folders that this process holds."""


@contextmanager
def folder_lease(
    folder: Url, part: tuple[int, int] | None, error: type[VivitError], remedy: str
) -> Iterator[None]:
    """Hold all objects below `folder`, or part i of n of them beside the holders of the other parts, for writing.

    `error` with the `remedy` where another process holds what is asked for, or a part of another number of parts.
    """
    name = _WHOLE if part is None else ".lock-{}-of-{}".format(*part)
    with lease(folder / name, folder, error, remedy) as held:
        # Own lease first, then a look at the others: of two that come at once at least one sees the other.
        for other in folder.names():
            if _excludes(other, name, part):
                _refuse_if_held(folder / other, folder, error, remedy)
        _held.add(held)
        try:
            yield
        finally:
            _held.discard(held)


def check_held(folder: Url, error: type[VivitError]) -> None:
    """`error` where this process held `folder` and lost it: it was stopped, or cut off, for longer than a lease holds."""
    mine = [held for held in list(_held) if held.folder == folder]
    for held in mine:
        held.renew_if_late()
    if any(held.is_lost for held in mine):
        raise error(
            f"{folder} was taken over by another process while this one did not renew its lease: "
            "what is committed stays; run the same command again when the other has ended"
        )


@contextmanager
def lease(url: Url, folder: Url, error: type[VivitError], remedy: str) -> Iterator["_Lease"]:
    """Hold the lease `url`, which stands for `folder`; `error` where another process does."""
    held = _Lease(url, folder, error, remedy)
    held.take()
    try:
        yield held
    finally:
        held.release()


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The content of a lease."""

    holder: str
    """Who, in words."""
    machine: str
    """The machine, since it was started, and the process namespace."""
    process: int
    process_started: str
    token: str
    """Random, and another for each lease."""
    renewed: float
    """Unix time in seconds of the last renewal."""
    lease_sec: float

    @classmethod
    def new(cls) -> Self:
        process = os.getpid()
        return cls(
            holder=f"process {process} on {platform.node()}",
            machine=_machine(),
            process=process,
            process_started=_started(process),
            token=secrets.token_hex(16),
            renewed=time.time(),
            lease_sec=LEASE_SEC,
        )

    @classmethod
    def from_json(cls, data: bytes) -> Self | None:
        """None where the object is no lease."""
        try:
            record = cls(**json.loads(data))
        except (ValueError, TypeError):
            return None
        return record if isinstance(record.renewed, float) and isinstance(record.lease_sec, float) else None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @property
    def until(self) -> float:
        return self.renewed + self.lease_sec

    @property
    def is_live(self) -> bool:
        is_here = self.machine != "" and self.machine == _machine()
        if is_here and _started(self.process) not in (self.process_started, _HIDDEN):
            return False
        return time.time() < self.until


class _Lease:
    """A lease that this process takes, renews and gives back."""

    def __init__(self, url: Url, folder: Url, error: type[VivitError], remedy: str) -> None:
        self._url, self.folder, self._error, self._remedy = url, folder, error, remedy
        self._record = _Record.new()
        self._version: Version | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._renewing = threading.Lock()
        self._safe_until = 0.0
        """Unix time in seconds until which nobody else can have taken the lease."""
        self.is_lost = False

    def take(self) -> None:
        for _ in range(_ATTEMPTS):
            with suppress(FileExistsError, FileNotFoundError):
                self._version = self._created()
                self._safe_until = self._record.until
                self._thread.start()
                return
        raise self._error(f"{self.folder} is being written by other processes: {self._remedy}")

    def _created(self) -> Version:
        """Take the lease where nobody holds it; FileExistsError where another process was faster."""
        try:
            return self._put(None)
        except FileExistsError:
            data, version = self._url.read_versioned()
        found = _Record.from_json(data)
        if found is not None and found.token == self._record.token:
            return version  # ours: the answer to the first try was lost
        if found is not None and found.is_live:
            raise _is_held(found, self.folder, self._error, self._remedy)
        logger.info("%s: the lease of a process that is gone is taken over", self.folder)
        return self._put(version)

    def _put(self, version: Version | None) -> Version:
        """Write the record in the place of this version, None for no object."""
        data = self._record.to_json()
        try:
            return self._url.create(data) if version is None else self._url.replace(data, version)
        except NotImplementedError:
            if version is None and self._url.is_file():
                raise FileExistsError(str(self._url)) from None
            if self._version is not None and not self._is_mine():
                raise FileExistsError(str(self._url)) from None
            if self._version is None:
                logger.warning(
                    "%s has no conditional put, so that two processes that begin in the same moment do not see each other: "
                    "let one process at a time write %s",
                    self._url.root,
                    self.folder,
                )
            self._url.write_bytes(data)
            return self._url.read_versioned()[1]

    def _is_mine(self) -> bool:
        found = _Record.from_json(self._url.read_bytes())
        return found is not None and found.token == self._record.token

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_SEC):
            try:
                with self._renewing:
                    self._renew()
            except VivitError as error:
                logger.warning("the lease of %s was not renewed: %s", self.folder, error)
            if self.is_lost:
                logger.error("%s was taken over by another process", self.folder)
                return

    def renew_if_late(self) -> None:
        """Ask the store whether the lease is lost, where it was not renewed in time; StorageError where it does not answer.

        A process that was stopped goes on with its work before the thread that renews has had an answer.
        """
        with self._renewing:
            for _ in range(2):  # a lease that was removed is made again by the second
                if time.time() >= self._safe_until:
                    self._renew()

    def _renew(self) -> None:
        if self.is_lost:
            return
        self._record = replace(self._record, renewed=time.time())
        try:
            self._version = self._put(self._version)
        except (FileExistsError, FileNotFoundError):
            try:
                data, version = self._url.read_versioned()
            except FileNotFoundError:
                self._version = None  # somebody removed it: it is made again with the next renewal
                return
            found = _Record.from_json(data)
            self.is_lost = found is None or found.token != self._record.token
            self._version = version
            if found is not None and not self.is_lost:  # the answer to an earlier renewal was lost
                self._safe_until = found.until
        else:
            self._safe_until = self._record.until

    def release(self) -> None:
        self._stop.set()
        self._thread.join(_RELEASE_SEC)
        if self._thread.is_alive():  # the store does not answer
            logger.warning("the lease of %s could not be removed, and ends by itself", self.folder)
            return
        try:
            found = _Record.from_json(self._url.read_bytes())
            if found is not None and found.token == self._record.token:
                self._url.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except StorageError as error:  # must not hide what ended the work
            logger.warning("the lease of %s could not be removed, and ends by itself: %s", self.folder, error)


def _excludes(other: str, own: str, part: tuple[int, int] | None) -> bool:
    """Whether the lease `other` may not be held beside `own`."""
    found = _PART.fullmatch(other)
    if other == own or (found is None and other != _WHOLE):
        return False
    return part is None or found is None or int(found[2]) != part[1]


def _refuse_if_held(url: Url, folder: Url, error: type[VivitError], remedy: str) -> None:
    try:
        found = _Record.from_json(url.read_bytes())
    except FileNotFoundError:
        return
    if found is not None and found.is_live:
        raise _is_held(found, folder, error, remedy)


def _is_held(found: _Record, folder: Url, error: type[VivitError], remedy: str) -> VivitError:
    until = time.strftime("%H:%M:%S", time.localtime(found.until))
    return error(
        f"{folder} is being written by another process ({found.holder}, until {until} if it does not renew that): {remedy}"
    )


def _machine() -> str:
    """What is the same for two processes that see each other's process numbers; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process of this machine was started, in ticks; empty where there is none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return "" if _is_gone(process) else _HIDDEN
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


def _is_gone(process: int) -> bool:
    """Whether there is no process of this number, also where those of other users are hidden."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
