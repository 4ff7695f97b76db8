import io
import pickle
from pathlib import Path

import pytest

from vivit.pipeline.errors import ConfigError
from vivit.pipeline.storage import Url, location


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Url:
    """A prefix of the store in memory that no other test uses."""
    return Url("memory", "tests", request.node.name)


def test_a_url_is_named_as_a_path_is() -> None:
    video = location("s3://bucket/videos//day one/./clip.mp4/")
    assert isinstance(video, Url)
    assert str(video) == "s3://bucket/videos/day one/clip.mp4"
    assert (video.name, video.stem, video.suffix) == ("clip.mp4", "clip", ".mp4")
    assert video.parent / "clip.mp4" == video
    assert video.with_name("b").parent == video.parent
    assert str(location("s3://bucket")) == "s3://bucket"
    assert pickle.loads(pickle.dumps(video)) == video


def test_what_has_no_scheme_or_is_a_file_is_a_path() -> None:
    assert location("a/b") == Path("a/b")
    assert location(Path("a")) == Path("a")
    assert location("file:///a%20b/c") == Path("/a b/c")


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIAEXAMPLE:hush/hush@bucket/x",
        "s3://hush@bucket/x",
        "s3://bucket/x?X-Amz-Signature=hush",
        "https://user:hush@host/x",
        "s3:///x",
        "s3://bucket/../x",
        "file://host/x",
    ],
)
def test_a_url_with_a_secret_or_of_another_kind_is_refused_without_a_word_of_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        location(text)
    assert "hush" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_objects_are_written_listed_read_and_deleted(url: Url) -> None:
    (url / "b/two").write_bytes(b"0123456789")
    (url / "a.json").write_text("{}")
    assert url.sizes_below() == {"a.json": 2, "b/two": 10}
    assert url.sizes_below(".json") == {"a.json": 2}
    two = url / "b/two"
    assert (two.is_file(), two.is_dir(), two.exists()) == (True, False, True)
    assert ((url / "b").is_file(), (url / "b").is_dir(), (url / "c").exists()) == (False, True, False)
    assert (two.read_range(3, 4), two.read_range(8, 9), two.read_range(10, 1)) == (b"3456", b"89", b"")
    two.unlink()
    two.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        two.unlink()
    with pytest.raises(FileNotFoundError):
        two.read_bytes()


def test_an_object_is_created_once_and_replaced_in_the_version_that_was_read(url: Url) -> None:
    mark = url / "mark"
    first = mark.create(b"1")
    with pytest.raises(FileExistsError):
        mark.create(b"2")
    second = mark.replace(b"3", first)
    with pytest.raises(FileExistsError):
        mark.replace(b"4", first)
    assert mark.read_versioned() == (b"3", second)


@pytest.mark.parametrize("whole_bytes", [1000, 10])
def test_an_object_opens_as_a_file_that_can_be_searched(
    url: Url, whole_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vivit.pipeline import storage

    monkeypatch.setattr(storage, "_WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 7)
    data = bytes(range(100))
    (url / "x").write_bytes(data)
    with (url / "x").open_binary() as file:
        for offset, size in ((0, 5), (3, 30), (95, 20), (100, 1), (6, 1), (0, 100)):
            assert file.seek(offset) == offset
            assert file.read(size) == data[offset : offset + size]
        assert file.seek(-4, io.SEEK_END) == 96
        assert file.read() == data[96:]
        with pytest.raises(OSError, match="before the beginning"):
            file.seek(-1)
    with pytest.raises(FileNotFoundError):
        (url / "y").open_binary()


def test_a_file_url_may_hold_what_else_ends_the_path_of_a_url() -> None:
    assert location("file:///data/clip #3?.mp4") == Path("/data/clip #3?.mp4")
    assert location("file://localhost/data/clip%20%233.mp4") == Path("/data/clip #3.mp4")


def test_no_signature_or_token_of_an_address_is_shown() -> None:
    from vivit.pipeline.storage_client import _scrubbed

    text = "Error performing POST https://sts.example/?Action=Assume&WebIdentityToken=eyJhbG in 2s"
    assert _scrubbed(text) == "Error performing POST https://sts.example/?*** in 2s"
