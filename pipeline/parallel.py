"""Calls that wait for another machine, so that Ctrl-C does not wait with them.

Python hands a signal to the main thread only between two of its instructions, and joins the threads of an executor before
it ends. Here the calls run in daemon threads: the caller can always be interrupted, and what is left behind is told to stop.
"""

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_local = threading.local()


def in_parallel(call: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """`[call(item) for item in items]` in so many threads; the first error ends it."""
    todo = list(enumerate(items))
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    waiting, taking, stop = iter(todo), threading.Lock(), threading.Event()

    def work() -> None:
        _local.stop = stop
        while not stop.is_set():
            with taking:
                at, item = next(waiting, (None, None))
            if at is None:
                return
            try:
                results[at] = call(item)  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
                errors.append(error)
                stop.set()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(todo)))]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except BaseException:
        stop.set()
        raise
    if errors:
        raise errors[0]
    return [results[at] for at, _ in todo]


def interruptible(call: Callable[[], Result]) -> Result:
    """`call()`, in another thread where this is the main one."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    return in_parallel(lambda _: call(), [None], 1)[0]


def wait_or_stopped(seconds: float) -> bool:
    """Wait; whether the caller's work is not wanted any more."""
    stop: threading.Event = getattr(_local, "stop", None) or threading.Event()
    return stop.wait(seconds)
