"""Requests to a store that works, that fails for a while, and that will never answer."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from faulty_proxy import FAULTS, FaultyProxy

from vivit.pipeline.errors import ConfigError, StorageError
from vivit.pipeline.storage import Url, location


def test_objects_are_written_listed_read_and_deleted_over_http(bucket: Url) -> None:
    folder = bucket / "a folder/é"
    (folder / "two").write_bytes(b"0123456789")
    (folder / "b/empty").write_bytes(b"")
    assert folder.sizes_below() == {"b/empty": 0, "two": 10}
    assert folder.names() == ["two"]
    two = folder / "two"
    assert (two.size(), two.exists(), folder.is_dir(), folder.is_file()) == (10, True, True, False)
    assert (two.read_range(3, 4), two.read_range(8, 9), two.read_range(10, 1)) == (b"3456", b"89", b"")
    assert (two.read_end(3), (folder / "b/empty").read_bytes()) == (b"789", b"")
    with two.open_binary() as file:
        file.seek(-2, 2)
        assert file.read() == b"89"
    two.unlink()
    with pytest.raises(FileNotFoundError):
        two.read_bytes()


@pytest.mark.slow
def test_more_objects_than_a_page_of_the_listing_are_listed(bucket: Url) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: (bucket / f"x/{i}").write_bytes(b"1"), range(1005)))
    assert len((bucket / "x").sizes_below()) == 1005


def test_an_object_is_created_once_and_replaced_in_the_version_that_was_read(bucket: Url) -> None:
    mark = bucket / "mark"
    first = mark.create(b"1")
    with pytest.raises(FileExistsError):
        mark.create(b"2")
    second = mark.replace(b"3", first)
    with pytest.raises(FileExistsError):
        mark.replace(b"4", first)
    assert mark.read_versioned() == (b"3", second)


def test_a_store_without_conditional_put_says_so(bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    with pytest.raises(NotImplementedError):
        (bucket / "mark").create(b"1")


@pytest.mark.faults
@pytest.mark.parametrize("kind", FAULTS)
def test_a_request_that_fails_a_few_times_is_made_again(proxy: FaultyProxy, bucket: Url, kind: str) -> None:
    data = bytes(range(256)) * 64
    proxy.kinds, proxy.rate = [kind], 0.4
    for name in ("a", "b", "c"):
        (bucket / name).write_bytes(data)
        assert (bucket / name).read_bytes() == data
        assert (bucket / name).read_range(100, 5000) == data[100:5100]
    assert bucket.sizes_below() == dict.fromkeys("abc", len(data))
    assert proxy.faults[kind] > 0


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["refuse", "cut", pytest.param("stall", marks=pytest.mark.slow)])
def test_a_request_that_goes_on_failing_is_one_clear_error(
    proxy: FaultyProxy, bucket: Url, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bucket / "x").write_bytes(b"1234")
    monkeypatch.setenv("VIVIT_STORAGE_TRIES", "3")
    proxy.kinds, proxy.rate = [kind], 1.0
    with pytest.raises(
        StorageError, match=rf"cannot read {bucket}/x after 3 tries \(.+\): .* same command again"
    ):
        (bucket / "x").read_bytes()
    assert proxy.faults[kind] == 3


def test_a_missing_bucket_is_named_at_once(bucket: Url) -> None:
    nowhere = Url("s3", "no-such-bucket", "x")
    for ask in (nowhere.exists, nowhere.read_bytes, lambda: nowhere.write_bytes(b""), nowhere.sizes_below):
        with pytest.raises(StorageError, match="there is no bucket s3://no-such-bucket: make it first"):
            ask()


def test_refused_credentials_are_one_clear_error_without_them(bucket: Url, s3_environment: str) -> None:
    (bucket / "x").write_bytes(b"1")
    _ask_for_users(s3_environment, after=0)
    try:
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"refuses to read .*AWS_ACCESS_KEY_ID") as caught:
            (bucket / "x").read_bytes()
        assert time.monotonic() - started < 5
    finally:
        _ask_for_users(s3_environment, after=10**9)
    assert "hush" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def _ask_for_users(endpoint: str, *, after: int) -> None:
    url, text = f"{endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, data=str(after).encode(), headers=text, method="POST")
    with urllib.request.urlopen(request):
        pass


def test_missing_credentials_are_one_clear_error(bucket: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("VIVIT_STORAGE_TRIES", "3")
    with socket.socket() as nobody:  # in the place of a cloud machine's own source of credentials
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(
            StorageError, match=r"no credentials .* set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ):
            Url("s3", "never-seen", "x").read_bytes()


def test_an_endpoint_that_is_not_there_is_one_clear_error_within_seconds(
    bucket: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIVIT_STORAGE_TRIES", "4")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:hush@127.0.0.1:{nobody.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(
            StorageError, match=r"\(127.0.0.1:\d+\) cannot be reached: check AWS_ENDPOINT_URL"
        ):
            Url("s3", "never-reached", "x").read_bytes()
    assert time.monotonic() - started < 8


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf"])
def test_a_timeout_that_is_no_time_is_refused(
    bucket: Url, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIVIT_STORAGE_TIMEOUT", text)
    with pytest.raises(ConfigError, match="VIVIT_STORAGE_TIMEOUT must be a number above 0"):
        location(f"{bucket}/x").exists()


def put(url: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, data=b"", method="PUT")):
        pass


def test_a_gs_url_is_read_and_written_at_the_endpoint_of_the_environment(
    proxy: FaultyProxy, s3_environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Google's store speaks as S3 does, but for the names of its users and the conditions of puts."""
    put(f"{s3_environment}/gsbucket")
    proxy.authorization = (
        "AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    )
    monkeypatch.setenv("GOOGLE_BASE_URL", proxy.url)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "hush")
    there = location("gs://gsbucket/folder")
    (there / "a/x").write_bytes(b"0123")
    assert Url("s3", "gsbucket", "folder/a/x").read_bytes() == b"0123"
    assert ((there / "a/x").read_range(1, 2), (there / "a/x").size()) == (b"12", 4)
    assert there.sizes_below() == {"a/x": 4}
    (there / "a/x").unlink()
    assert not there.exists()


def test_a_gs_url_without_credentials_is_one_clear_error(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"gs://bucket.*GOOGLE_APPLICATION_CREDENTIALS"):
        location("gs://bucket/x").read_bytes()


@pytest.mark.faults
@pytest.mark.parametrize("many", [False, True])
def test_ctrl_c_does_not_wait_for_a_store_that_stalls(
    proxy: FaultyProxy, bucket: Url, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    monkeypatch.setenv("VIVIT_STORAGE_TIMEOUT", "20")
    code = (
        "import sys; from vivit.pipeline.parallel import in_parallel; from vivit.pipeline.storage import location\n"
        "ask = location(sys.argv[1]).read_bytes\n"
        f"in_parallel(lambda _: ask(), range(5), 3) if {many} else ask()"
    )
    proxy.kinds, proxy.rate = ["stall"], 1.0
    process = subprocess.Popen([sys.executable, "-c", code, f"{bucket}/x"], stderr=subprocess.DEVNULL)
    while not proxy.faults.total():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)  # until it waits for the answer
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == -signal.SIGINT
    assert time.monotonic() - started < 5
