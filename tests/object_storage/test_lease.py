"""One writer at a time below a URL."""

import json
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy

from vivit.pipeline import lease as lease_module
from vivit.pipeline.errors import CacheError
from vivit.pipeline.lease import check_held, folder_lease
from vivit.pipeline.storage import Url

ALL, REMEDY = None, "wait for it"


def hold(folder: Url, part: tuple[int, int] | None = ALL) -> AbstractContextManager[None]:
    return folder_lease(folder, part, CacheError, REMEDY)


def check_until(folder: Url, until: float) -> None:
    while time.monotonic() < until:
        check_held(folder, CacheError)


def forge(url: Url, **changes: object) -> None:
    """The lease of a process of another machine, which was renewed just now but for the changes."""
    record = {
        "holder": "process 7 on elsewhere",
        "machine": "another",
        "process": 7,
        "process_started": "1",
        "token": "00",
        "renewed": time.time(),
        "lease_sec": 60.0,
    }
    url.write_text(json.dumps(record | changes))


def test_a_second_holder_is_refused_until_the_first_gives_back(bucket: Url) -> None:
    holder = rf"being written by another process \(process {os.getpid()} on .*, until \d\d:\d\d:\d\d .*: wait for it"
    with hold(bucket), pytest.raises(CacheError, match=holder), hold(bucket):
        pass
    assert bucket.names() == []
    with hold(bucket):
        pass


def test_parts_are_held_side_by_side_and_exclude_the_whole_and_other_numbers(bucket: Url) -> None:
    with hold(bucket, (1, 2)), hold(bucket, (2, 2)):
        for other in (ALL, (1, 2), (1, 3)):
            with pytest.raises(CacheError, match="being written by another process"), hold(bucket, other):
                pass
        assert bucket.names() == [".lock-1-of-2", ".lock-2-of-2"]
    with hold(bucket), pytest.raises(CacheError), hold(bucket, (1, 2)):
        pass


def test_the_lease_of_another_machine_holds_until_it_is_old(bucket: Url) -> None:
    forge(bucket / ".lock", renewed=time.time() - 30)
    with pytest.raises(CacheError, match="process 7 on elsewhere"), hold(bucket):
        pass
    forge(bucket / ".lock", renewed=time.time() - 61)
    with hold(bucket):
        assert json.loads((bucket / ".lock").read_text())["process"] == os.getpid()
    (bucket / ".lock").write_text("no lease")
    with hold(bucket):
        pass


def test_a_killed_holder_of_this_machine_holds_nothing(bucket: Url) -> None:
    code = (
        "import os, sys; from vivit.pipeline.errors import CacheError; from vivit.pipeline.lease import folder_lease\n"
        "from vivit.pipeline.storage import location\n"
        "with folder_lease(location(sys.argv[1]), None, CacheError, ''): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(bucket)], check=False).returncode == -9
    assert bucket.names() == [".lock"]
    with hold(bucket):
        pass


def test_a_lease_is_renewed_and_a_lost_one_is_noticed(bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SEC", 0.05)
    with hold(bucket):
        first = json.loads((bucket / ".lock").read_text())
        until = time.monotonic() + 5
        while json.loads((bucket / ".lock").read_text())["renewed"] == first["renewed"]:
            assert time.monotonic() < until
        check_held(bucket, CacheError)
        forge(bucket / ".lock")
        with pytest.raises(CacheError, match="was taken over by another process"):
            check_until(bucket, until)
    assert json.loads((bucket / ".lock").read_text())["holder"] == "process 7 on elsewhere"


def test_a_store_without_conditional_put_is_used_after_a_warning(
    bucket: Url, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    with hold(bucket):
        assert "has no conditional put" in caplog.text
        with pytest.raises(CacheError, match="being written by another process"), hold(bucket):
            pass


def test_a_lease_survives_answers_that_are_lost(
    bucket: Url, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SEC", 0.05)
    proxy.kinds, proxy.rate = ["lose", "cut"], 0.5
    with hold(bucket):
        until = time.monotonic() + 10
        while proxy.faults.total() < 4 and time.monotonic() < until:
            time.sleep(0.02)
        check_held(bucket, CacheError)
        with pytest.raises(CacheError, match="being written"), hold(bucket):
            pass
    proxy.rate = 0
    assert bucket.names() == []
    assert proxy.faults.total() >= 4


def test_a_folder_still_has_its_own_lock(tmp_path: Path) -> None:
    from vivit.pipeline.cache_store import cache_store

    with cache_store(tmp_path).lock(None):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_holder_that_was_stopped_asks_before_it_writes(
    bucket: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LEASE_SEC", 0.2)  # and the thread that renews sleeps for 15 s
    with hold(bucket):
        time.sleep(0.3)
        check_held(bucket, CacheError)  # nobody came: it is renewed
        assert json.loads((bucket / ".lock").read_text())["renewed"] > time.time() - 0.2
        forge(bucket / ".lock")
        time.sleep(0.3)
        with pytest.raises(CacheError, match="was taken over by another process"):
            check_held(bucket, CacheError)
    assert json.loads((bucket / ".lock").read_text())["holder"] == "process 7 on elsewhere"
