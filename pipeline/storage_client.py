"""Requests to object stores: one client per bucket and process, retries with back-off, and errors with a remedy.

obstore's own retries are switched off: they leave out listings whose answer breaks off and conditional puts, and take an
endpoint that does not exist for one that is down for a moment. All objects that are written here are written whole, so
that every request may be made twice.
"""

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import GCSStore, MemoryStore, ObjectStore, S3Store

from vivit.pipeline.errors import ConfigError, StorageError
from vivit.pipeline.parallel import interruptible, wait_or_stopped

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TIMEOUT_VARIABLE, TRIES_VARIABLE = "VIVIT_STORAGE_TIMEOUT", "VIVIT_STORAGE_TRIES"
_TIMEOUT_SEC, _TRIES = 30.0, 10
_LONGEST_SEC = 180.0
"""After this time a request that goes on failing is given up, however often it was made."""
_UNREACHED_SEC = 5.0
"""The same for a store that has never answered this process: a wrong endpoint should not take minutes."""
_WARN_AFTER = 3
_FIRST_WAIT_SEC, _LONGEST_WAIT_SEC = 0.1, 10.0
_SLOWEST_BYTES_PER_SEC = 1 << 20
_PASSING_STATUS = (408, 409, 425, 429)
_PASSING_CODES = (
    "RequestTimeout",
    "SlowDown",
    "InternalError",
    "OperationAborted",
    "ConditionalRequestConflict",
)
_ANSWERS = (AlreadyExistsError, PreconditionError, NotSupportedError)
"""Errors that are the answer to a conditional put."""
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a public bucket)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}
_MACHINE_CREDENTIALS = (
    "/latest/api/token",
    "/latest/meta-data",
    "/computeMetadata/",
    "metadata.google.internal",
)
"""What stands in the addresses that a cloud's machines get their own credentials from."""
_ENDPOINTS = {"s3": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"), "gs": ("GOOGLE_BASE_URL",)}

_reached: set[tuple[str, str]] = set()
"""Buckets whose store has answered this process."""
_clients_lock = threading.Lock()


def ask(
    scheme: str, bucket: str, key: str, verb: str, request: Callable[[ObjectStore], Result], size: int = 0
) -> Result:
    """The answer to a request about `size` bytes of an object.

    FileNotFoundError where there is no such object, EOFError for a range behind its end, obstore's own errors for a
    condition that is not met, StorageError or ConfigError with the remedy for everything else.
    """
    what = f"{scheme}://{bucket}/{key}"
    started, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            client = _client(scheme, bucket, _patience(size))
            answer = interruptible(lambda: request(client))  # noqa: B023 (called before the next round)
        except _ANSWERS:
            raise
        except (BaseError, FileNotFoundError, ValueError) as error:
            failure = _Failure.of(error)
            if failure.status or failure.is_missing:
                _reached.add((scheme, bucket))
            longest = _LONGEST_SEC if (scheme, bucket) in _reached else _UNREACHED_SEC
            wait = _wait_sec(tries)
            if failure.is_definite or tries >= _most_tries() or time.monotonic() + wait > started + longest:
                raise _explained(failure, scheme, bucket, what, verb, tries) from None
            level = logging.WARNING if tries == _WARN_AFTER else logging.DEBUG
            logger.log(level, "%s: %s; trying again (%d tries so far)", what, failure.reason, tries)
        else:
            _reached.add((scheme, bucket))
            return answer
        if wait_or_stopped(wait):
            raise _explained(failure, scheme, bucket, what, verb, tries)


def stall_timeout_sec() -> float:
    """Seconds after which a request that does not move is given up; ConfigError where the environment has no number."""
    return _positive(TIMEOUT_VARIABLE, _TIMEOUT_SEC)


def _most_tries() -> int:
    return max(1, int(_positive(TRIES_VARIABLE, _TRIES)))


def _positive(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{variable} must be a number above 0, got {text!r}")
    return value


def _wait_sec(tries: int) -> float:
    """Exponential back-off with jitter, so that many workers do not come back at once."""
    return min(_LONGEST_WAIT_SEC, _FIRST_WAIT_SEC * 2.0 ** (tries - 1)) * random.uniform(0.5, 1.0)


def _patience(size: int) -> float:
    """Seconds that a request about so many bytes may go without an answer.

    Doubled rather than exact, so that few clients are made: the limit belongs to a client.
    """
    limit = stall_timeout_sec()
    while size > limit * _SLOWEST_BYTES_PER_SEC:
        limit *= 2
    return limit


def _client(scheme: str, bucket: str, timeout_sec: float) -> ObjectStore:
    with _clients_lock:
        if scheme == "memory":
            return _memory(bucket)
        return _remote(scheme, bucket, timeout_sec, _environment())


@cache
def _memory(bucket: str) -> ObjectStore:
    return MemoryStore()


def _environment() -> tuple[tuple[str, str], ...]:
    """What clients read from the environment: a client is made again where it has changed."""
    return tuple(
        sorted((name, value) for name, value in os.environ.items() if name.startswith(("AWS_", "GOOGLE_")))
    )


@cache
def _remote(
    scheme: str, bucket: str, timeout_sec: float, environment: tuple[tuple[str, str], ...]
) -> ObjectStore:
    client: Any = {
        "connect_timeout": timedelta(seconds=min(5.0, timeout_sec)),
        "read_timeout": timedelta(seconds=timeout_sec),
        "timeout": timedelta(seconds=10 * timeout_sec),
        "allow_http": _endpoint(scheme).startswith("http://"),
        "user_agent": "vivit",
    }
    once: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_sec)}
    try:
        if scheme == "gs":
            return GCSStore(bucket, client_options=client, retry_config=once)
        return S3Store(bucket, client_options=client, retry_config=once, disable_bulk_delete=True)
    except (BaseError, ValueError) as error:
        reason = _scrubbed(str(error).strip().partition("\n")[0][:200])
        raise ConfigError(
            f"{scheme}://{bucket} cannot be reached as the environment says ({reason}): check {_CREDENTIALS[scheme]}"
        ) from None


def _endpoint(scheme: str) -> str:
    """The address of the store where it is not the usual one."""
    return next((os.environ[name] for name in _ENDPOINTS[scheme] if os.environ.get(name)), "")


@dataclass(frozen=True)
class _Failure:
    """What an error of obstore says, in parts."""

    status: int
    """HTTP status; 0 where there was no answer."""
    code: str
    """S3's word for it."""
    reason: str
    """One line without secrets."""
    is_missing: bool
    is_behind_end: bool
    """A range was asked for that the object does not reach."""
    is_refused: bool
    is_unconnected: bool
    """No connection was made."""
    lacks_credentials: bool
    is_definite: bool
    """Asking again will not help."""

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        text = str(error)
        status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else 0
        code = found[1] if (found := re.search(r"<Code>(\w+)</Code>", text)) else ""
        lacks = _asked_for_credentials(text) or (not status and "credential" in text.lower())
        missing = isinstance(error, FileNotFoundError) and code != "NoSuchBucket"
        refused = isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403)
        passing = not status or status >= 500 or status in _PASSING_STATUS or code in _PASSING_CODES
        behind = status == 416 or "Invalid range: Wanted" in text
        return cls(
            status=status,
            code=code,
            reason=_scrubbed(_reason(text, status, code)),
            is_missing=missing,
            is_behind_end=behind,
            is_refused=refused,
            is_unconnected=not status and "kind: Connect," in text,
            lacks_credentials=lacks,
            is_definite=missing or refused or behind or isinstance(error, ValueError) or not passing,
        )


def _asked_for_credentials(text: str) -> bool:
    """Whether it was a machine's own source of credentials that did not answer, and not the store."""
    return any(mark in text for mark in _MACHINE_CREDENTIALS)


def _reason(text: str, status: int, code: str) -> str:
    message = found[1] if (found := re.search(r"<Message>([^<]*)</Message>", text)) else ""
    if status:
        return ", ".join(part for part in (f"HTTP {status}", code, message) if part)
    if "TimedOut" in text or "kind: Timeout" in text or "timed out" in text:
        return "no answer in time"
    if "kind: Connect," in text:
        return "no connection"
    if "ConnectionReset" in text or "kind: Interrupted" in text or "IncompleteMessage" in text:
        return "the connection broke off"
    return text.strip().partition("\n")[0][:200]


def _scrubbed(text: str) -> str:
    """`text` without users and queries in addresses, which may be signatures or tokens, and without any value that the
    environment keeps under the name of a secret."""
    text = re.sub(r"//[^/@\s]*@", "//", text)
    text = re.sub(r"(https?://[^\s?\"']*)\?[^\s\"')]*", r"\1?***", text)
    for name, value in os.environ.items():
        if len(value) >= 4 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text


def _explained(failure: _Failure, scheme: str, bucket: str, what: str, verb: str, tries: int) -> Exception:
    """The error to raise: what was tried, what came back, what to do."""
    credentials = _CREDENTIALS.get(scheme, "credentials")
    if failure.is_behind_end:
        return EOFError(what)
    if failure.is_missing:
        return FileNotFoundError(2, "no such object", what)
    if failure.code == "NoSuchBucket":
        return StorageError(f"there is no bucket {scheme}://{bucket}: make it first, or correct the URL")
    if failure.lacks_credentials:
        return StorageError(
            f"no credentials for {scheme}://{bucket}: set {credentials} in the environment (here and on workers)"
        )
    if failure.is_refused:
        return StorageError(
            f"{scheme}://{bucket} refuses to {verb} {what} ({failure.reason}): check {credentials} in the environment, "
            f"and that they may {verb} there"
        )
    if failure.status in (301, 307) or failure.code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return StorageError(f"{scheme}://{bucket} is in another region ({failure.reason}): set AWS_REGION")
    if failure.is_unconnected:
        host = urlsplit(_endpoint(scheme)).netloc.rpartition("@")[2] or "the store's usual one"
        return StorageError(
            f"the endpoint of {scheme}://{bucket} ({host}) cannot be reached: check {_ENDPOINTS[scheme][0]} "
            "and the network, then run the same command again"
        )
    again = f" after {tries} tries" if tries > 1 else ""
    return StorageError(
        f"cannot {verb} {what}{again} ({failure.reason}): check the store, then run the same command again"
    )
