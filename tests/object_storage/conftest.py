"""A real S3 server on loopback, a bucket of it for each test, and a proxy before it that spoils requests."""

import logging
import os
import re
import urllib.request
from collections.abc import Iterator

import pytest
from faulty_proxy import FaultyProxy

from vivit.pipeline.storage import Url

SECRET = "hush-" + "x0Y1z2" * 5
KEY_ID = "AKIAVIVITTESTKEYID00"


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of the server; it knows no users unless told to."""
    server_module = pytest.importorskip("moto.server", reason='needs moto: pip install "moto[server]"')
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3_environment(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint, with the environment that leads to it and impatience that suits a server on this machine."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    endpoint = f"http://127.0.0.1:{s3_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    return endpoint


@pytest.fixture
def bucket(s3_environment: str, request: pytest.FixtureRequest) -> Url:
    """An empty bucket."""
    digits = re.sub(r"[^a-z0-9]+", "-", f"{request.node.nodeid}".lower())
    name = f"t{abs(hash(request.node.nodeid)) % 10**8}-{digits[-40:].strip('-')}"
    put(f"{s3_environment}/{name}")
    return Url("s3", name, "")


@pytest.fixture
def proxy(s3_port: int, bucket: Url, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy that the environment leads to, with a short timeout; it spoils nothing until told to."""
    with FaultyProxy(s3_port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("VIVIT_STORAGE_TIMEOUT", "0.3")
        yield proxy


def put(url: str, data: bytes = b"") -> None:
    with urllib.request.urlopen(urllib.request.Request(url, data=data, method="PUT")) as answer:
        assert answer.status == 200


@pytest.fixture
def secrets() -> list[str]:
    """What must not be found in any object, file or message."""
    return [SECRET, KEY_ID]
