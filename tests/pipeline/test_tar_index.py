"""Indexes of tars: what they say, when they are made again, and what is read by them."""

import io
import json
import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vivit.pipeline import tar_index as module
from vivit.pipeline.errors import ConfigError, DataError
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.tar_index import NotInTarError, TarIndex, index_path, read_member, split_name, tar_index
from vivit.pipeline.tar_walk import TarMember, walk

FILES = {"a.mp4": b"first", "a.json": b"{}", "folder/b.mp4": b"x" * 700, "empty.mp4": b""}


def tar_bytes(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


@pytest.fixture(params=["path", "url"])
def tar(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A tar on this machine, or in the store in memory."""
    place: Location = tmp_path / "x.tar"
    if request.param == "url":
        place = Url("memory", "tars", f"{request.node.name}/x.tar")
    place.write_bytes(tar_bytes(FILES))
    return place


def read_all(tar: Location) -> dict[str, bytes]:
    return {name: read_member(tar, name) for name in tar_index(tar).members}


def forget() -> None:
    """As in a new process."""
    module._INDEXES = module._Indexes()


def test_members_are_read_by_their_offset(tar: Location) -> None:
    assert read_all(tar) == FILES
    assert tar_index(tar).content.damage == ""


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_script_are_read(tmp_path: Path, form: int) -> None:
    files = {f"{'folder/' * 12}{'n' * 60}.mp4": b"long", "plain.mp4": b"plain"}
    if form != tarfile.USTAR_FORMAT:
        files |= {f"{'n' * 300}.mp4": b"longer", "动作 ü.mp4": "动".encode()}
    (tmp_path / "x.tar").write_bytes(tar_bytes(files, form))
    assert read_all(tmp_path / "x.tar") == files
    forget()  # from the stored index, which is checked against the headers
    assert tar_index(tmp_path / "x.tar").is_stored
    assert read_all(tmp_path / "x.tar") == files


def test_an_index_is_equal_after_the_trip_through_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes(FILES) + b"junk behind the end")
    index = tar_index(tmp_path / "x.tar")
    again = TarIndex.from_json(index.to_json("x.tar"))
    assert (again.content, again.size_bytes, again.version) == (
        index.content,
        index.size_bytes,
        index.version,
    )
    stored = json.loads(index.to_json("x.tar"))
    assert dict(zip(stored["columns"], stored["members"][2], strict=True)) == {
        "name": "folder/b.mp4",
        "key": "folder/b",
        "extension": "mp4",
        "offset": 2560,
        "size_bytes": 700,
        "sha256": None,
    }


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format": 2}', b'{"format": 1}', b"\xff"])
def test_a_damaged_index_is_not_used(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(tar_bytes(FILES))
    index_path(tar).write_bytes(data)
    assert read_all(tar) == FILES
    assert "x.tar.index.json is not used" in caplog.text


def test_an_index_of_another_state_is_made_again(tar: Location, caplog: pytest.LogCaptureFixture) -> None:
    before = tar_index(tar)
    index_path(tar).write_bytes(before.to_json(tar.name))
    tar.write_bytes(tar_bytes({"c.mp4": b"another"} | FILES))
    forget()
    with caplog.at_level(logging.INFO, "vivit"):
        assert read_all(tar) == {"c.mp4": b"another"} | FILES
    assert "is out of date" in caplog.text


def test_an_index_of_another_tar_of_the_same_size_is_noticed_by_the_headers(
    tar: Location, caplog: pytest.LogCaptureFixture
) -> None:
    copied = TarIndex(tar_index(tar).content, tar_index(tar).size_bytes)  # as beside a tar that was copied
    index_path(tar).write_bytes(copied.to_json(tar.name))
    tar.write_bytes(tar_bytes(dict(reversed(FILES.items()))))
    forget()
    assert tar_index(tar).is_stored
    with caplog.at_level(logging.INFO, "vivit"):
        assert read_member(tar, "folder/b.mp4") == FILES["folder/b.mp4"]
    assert "its headers are read again" in caplog.text
    assert read_all(tar) == FILES


def test_a_local_tar_that_changes_is_seen_by_the_same_process(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    for files in (FILES, {"z.mp4": b"1"}):
        tar.write_bytes(tar_bytes(files))
        assert read_all(tar) == files


def test_what_is_not_in_a_tar_says_why(tar: Location) -> None:
    with pytest.raises(NotInTarError, match=r"no such member: gone.mp4 in .*x.tar") as caught:
        read_member(tar, "gone.mp4")
    assert not caught.value.is_there
    with pytest.raises(FileNotFoundError):
        tar_index(tar.with_name("gone.tar"))


@pytest.mark.parametrize(
    ("cut", "names", "damage"),
    [
        pytest.param(512 + 100, [], "unexpected end", id="in the first member"),
        pytest.param(3 * 512 + 1, ["a.mp4", "a.json"], "unexpected end", id="in padding"),
        pytest.param(2 * 512 + 100, ["a.mp4"], "header at byte 1024 is not whole", id="in a header"),
        pytest.param(4 * 512, ["a.mp4", "a.json"], "", id="between members"),
    ],
)
def test_a_tar_that_was_cut_short_keeps_what_is_whole(
    tmp_path: Path, cut: int, names: list[str], damage: str
) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(tar_bytes({"a.mp4": b"x" * 200, "a.json": b"{", "b.mp4": b""})[:cut])
    index = tar_index(tar)
    assert list(index.members) == names
    assert damage in index.content.damage
    assert bool(damage) == bool(index.content.damage)


def test_a_damaged_header_ends_the_tar_with_a_reason(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(FILES))
    data[1024:1030] = b"\xff" * 6
    (tmp_path / "x.tar").write_bytes(data)
    index = tar_index(tmp_path / "x.tar")
    assert list(index.members) == ["a.mp4"]
    assert "byte 1024 is no header, so members after it are lost" in index.content.damage


def test_a_header_that_leads_back_ends_the_tar(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(FILES))
    header = tarfile.TarInfo.frombuf(bytes(data[1024:1536]), "utf-8", "strict")
    header.size = -1024
    data[1024:1536] = header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar").write_bytes(data)
    index = tar_index(tmp_path / "x.tar")
    assert list(index.members) == ["a.mp4"]
    assert index.content.damage


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        pytest.param(b"", "is an empty file", id="empty"),
        pytest.param(b"\x1f\x8b" + bytes(600), r"mv .*x.tar .*x.tar.gz && gunzip .*x.tar.gz", id="gzip"),
        pytest.param(b"\x28\xb5\x2f\xfd" + bytes(600), "unzstd", id="zstd"),
        pytest.param(b"hello" * 300, "cannot be read as a tar", id="text"),
        pytest.param(b"hello", "cannot be read as a tar", id="short text"),
    ],
)
def test_what_is_no_tar_is_refused_with_the_remedy(tmp_path: Path, data: bytes, remedy: str) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match=remedy):
        tar_index(tmp_path / "x.tar")


def test_a_folder_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(module.FOLDER_VARIABLE, str(tmp_path / "file/below"))
    (tmp_path / "x.tar").write_bytes(tar_bytes(FILES))
    assert read_all(tmp_path / "x.tar") == FILES


@pytest.mark.parametrize(
    "name",
    ["a.mp4", "a.b.mp4", "x/y.z/a.b.json", "._a.mp4", "no extension", ".hidden", "a.", "x.y/z", "./a.cls"],
)
def test_keys_are_cut_as_the_webdataset_library_does(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    assert split_name(name) == base_plus_ext(name)


def test_a_member_knows_its_place(tar: Location) -> None:
    data = tar.read_bytes()
    members = tar_index(tar).members.values()
    assert [data[m.offset : m.offset + m.size_bytes] for m in members] == list(FILES.values())
    assert TarMember("a.mp4", 512, 5) in members


def test_nothing_of_a_hostile_tar_is_read_or_written(shared: Callable[[str], Path], tmp_path: Path) -> None:
    tar = tmp_path / "data" / "x.tar"
    tar.parent.mkdir()
    tar.write_bytes(shared("bad_videos/wds_path_traversal.tar").read_bytes())
    before = set(os.listdir("/tmp"))
    index = tar_index(tar)
    for name in index.refused:
        with pytest.raises(NotInTarError):
            read_member(tar, name)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "x.tar"]
    assert not any("vivit_abs_evil" in name for name in set(os.listdir("/tmp")) - before)


def test_a_tar_whose_short_names_stand_in_other_headers_is_read(tmp_path: Path) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("other.mp4")
        info.size, info.pax_headers = 5, {"path": "a.mp4"}
        tar.addfile(info, io.BytesIO(b"bytes"))
    (tmp_path / "x.tar").write_bytes(data.getvalue())
    assert read_all(tmp_path / "x.tar") == {"a.mp4": b"bytes"}
    assert read_all(tmp_path / "x.tar") == {"a.mp4": b"bytes"}


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_promises_endless_bytes_takes_no_memory(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 1 << 62
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({"a.mp4": b"video"})[:1024] + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    content = tar_index(path).content
    assert [member.name for member in content.members] == ["a.mp4"]
    assert content.damage


def test_an_index_beside_a_tar_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("VIVIT_TAR_INDEXES", raising=False)
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({"a.mp4": b"video"}))
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        tar_index(path)
    data = path.read_bytes()
    index_path(path).write_bytes(TarIndex(walk(io.BytesIO(data), len(data), "a"), len(data)).to_json("a"))
    assert read_member(path, "a.mp4") == b"video"
