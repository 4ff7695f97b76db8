"""Videos in tars and stores: found, opened, and told apart from a store that does not answer."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vivit.pipeline.errors import DataError, StorageError
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.tar_writer import TarWriter
from vivit.pipeline.video import ClipSpan, probe, read_clips, read_frames
from vivit.pipeline.video_location import (
    TarVideo,
    VideoSource,
    first_local,
    is_video_file,
    missing_videos,
    split_video,
    video_at,
)

BAD = [
    "zero_byte.mp4",
    "text_renamed.mp4",
    "ffconcat_script.mp4",
    "moov_at_end_cut60.mp4",
    "faststart_cut60.mp4",
]


class Sink:
    """Wants every frame."""

    def plan(self, times_sec: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        return np.arange(len(times_sec))

    def add(self, index: int, picture: npt.NDArray[np.uint8]) -> None:
        pass


def outcome(source: VideoSource) -> tuple[Outcome, str, int]:
    ((_, result),) = read_clips(source, [ClipSpan()], [Sink()])
    return result.outcome, result.message, result.num_frames


def write_tar(path: Path, files: dict[str, Path]) -> Path:
    with TarWriter(path) as tar:
        for name, file in files.items():
            data = file.read_bytes()
            tar.add(name, len(data), [data])
        tar.finish()
    return path


@pytest.mark.parametrize(
    ("video", "parts"),
    [
        ("a/b.mp4", ("a/b.mp4", None)),
        ("a/s.tar::b/c.mp4", ("a/s.tar", "b/c.mp4")),
        ("s3://bucket/s.tar::c.mp4", ("s3://bucket/s.tar", "c.mp4")),
        ("odd::name.mp4", ("odd::name.mp4", None)),
    ],
)
def test_a_member_of_a_tar_is_told_from_a_file(video: str, parts: tuple[str, str | None]) -> None:
    assert split_video(video) == parts


def test_a_video_lies_below_the_data_root_or_where_its_url_says() -> None:
    store = Url("s3", "bucket", "videos")
    assert video_at(Path("root"), "a.mp4") == Path("root/a.mp4")
    assert video_at(store, "a/b.mp4") == store / "a/b.mp4"
    assert video_at(store, "x.tar::a.mp4") == TarVideo(store / "x.tar", "a.mp4")
    assert video_at(Path("root"), "s3://bucket/videos") == store
    assert video_at(Path("root"), "s3://bucket/videos/x.tar::a") == TarVideo(store / "x.tar", "a")


@pytest.fixture(params=["file", "url", "tar", "tar by url"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], VideoSource]:
    """A function that puts a video somewhere, behind another one where it is a tar, and gives the source."""

    def put(video: Path) -> VideoSource:
        store = Url("memory", "videos", f"{request.node.name}/{video.name}")
        if request.param == "file":
            return video
        if request.param == "url":
            store.write_bytes(video.read_bytes())
            return store
        tar = write_tar(
            tmp_path / "x.tar", {"before.txt": Path(__file__), "v.mp4": video, "after.txt": Path(__file__)}
        )
        if request.param == "tar":
            return TarVideo(tar, "v.mp4")
        store.with_name("x.tar").write_bytes(tar.read_bytes())
        return TarVideo(store.with_name("x.tar"), "v.mp4")

    return put


def test_frames_are_the_same_wherever_the_video_lies(
    place: Callable[[Path], VideoSource], video_folder: Path
) -> None:
    video = video_folder / "train/a/clip0.mp4"
    times = np.arange(20) / 25
    np.testing.assert_array_equal(read_frames(place(video), times), read_frames(video, times))
    assert probe(place(video)) == probe(video)


def test_bad_videos_have_the_same_outcome_wherever_they_lie(
    place: Callable[[Path], VideoSource], shared: Callable[[str], Path]
) -> None:
    for name in BAD:
        video = shared(f"bad_videos/{name}")
        assert outcome(place(video)) == outcome(video)


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.mp4": Path(__file__)})
    (tmp_path / "text.tar").write_text("no tar" * 200)
    os.mkfifo(tmp_path / "fifo.tar")
    store = Url("memory", "videos", "nothing")
    expected: dict[VideoSource, Outcome] = {
        store / "gone.mp4": Outcome.MISSING,
        TarVideo(tar, "gone.mp4"): Outcome.MISSING,
        TarVideo(tmp_path / "gone.tar", "a.mp4"): Outcome.MISSING,
        TarVideo(store / "gone.tar", "a.mp4"): Outcome.MISSING,
        TarVideo(tmp_path / "text.tar", "a.mp4"): Outcome.UNREADABLE_CONTAINER,
        TarVideo(tmp_path / "fifo.tar", "a.mp4"): Outcome.NOT_A_VIDEO,
        TarVideo(tar, "a.mp4"): Outcome.NOT_A_VIDEO,
    }
    assert {source: outcome(source)[0] for source in expected} == expected


def test_a_member_that_is_cut_or_unsafe_says_why(shared: Callable[[str], Path]) -> None:
    cut = outcome(TarVideo(shared("bad_videos/wds_truncated.tar"), "000001.mp4"))
    assert cut[0] == Outcome.UNREADABLE
    assert "the tar ends inside it: 000001.mp4" in cut[1]
    traversal = shared("bad_videos/wds_path_traversal.tar")
    assert "path leaves the folder" in outcome(TarVideo(traversal, "../../evil.mp4"))[1]
    assert outcome(TarVideo(traversal, "000001.mp4"))[0] == Outcome.OK
    with pytest.raises(DataError, match=r"wds_gzipped.tar is compressed .*gunzip"):
        probe(TarVideo(shared("bad_videos/wds_gzipped.tar"), "000000.mp4"))


@pytest.fixture
def failing_store(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that lets every read fail behind the first `count`, and objects be read in small pieces."""
    from vivit.pipeline import storage

    monkeypatch.setattr(storage, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 256)
    read = Url.read_range

    def fail_after(count: int) -> None:
        left = iter(range(count))

        def read_range(url: Url, offset: int, size: int) -> bytes:
            if next(left, None) is None:
                raise StorageError(f"cannot read {url}")
            return read(url, offset, size)

        monkeypatch.setattr(Url, "read_range", read_range)

    return fail_after


def test_a_store_that_fails_at_any_moment_is_never_the_fault_of_the_video(
    failing_store: Callable[[int], None], video_folder: Path
) -> None:
    video = video_folder / "val/b/clip7.mp4"
    url = Url("memory", "videos", "failing.mp4")
    url.write_bytes(video.read_bytes())
    failed = 0
    for count in range(1000):
        failing_store(count)
        try:
            found = outcome(url)
        except StorageError:
            failed += 1
        else:
            assert found == outcome(video)
            break
    assert failed > 10


def test_time_spent_on_waiting_for_a_store_is_no_time_of_the_clip(
    monkeypatch: pytest.MonkeyPatch, video_folder: Path
) -> None:
    url = Url("memory", "videos", "slow.mp4")
    url.write_bytes((video_folder / "val/b/clip7.mp4").read_bytes())
    read = Url.read_range

    def slow(url: Url, offset: int, size: int) -> bytes:
        threading.Event().wait(1.0)
        return read(url, offset, size)

    monkeypatch.setattr(Url, "read_range", slow)
    began = time.monotonic()
    ((_, result),) = read_clips(url, [ClipSpan()], [Sink()], timeout_sec=0.9)
    assert time.monotonic() - began >= 1.0
    assert result.outcome == Outcome.OK


@pytest.mark.parametrize("is_remote", [False, True])
def test_missing_videos_are_found_in_folders_tars_and_stores(tmp_path: Path, is_remote: bool) -> None:
    root: Location = Url("memory", "videos", "root") if is_remote else tmp_path
    tar = write_tar(tmp_path / "x.tar", {"a.mp4": Path(__file__)})
    names = [f"many/{n}.mp4" for n in range(40)]
    if isinstance(root, Url):
        (root / "x.tar").write_bytes(tar.read_bytes())
    else:
        (tmp_path / "many").mkdir()
    for name in [*names, "one.mp4"]:
        (root / name).write_bytes(b"")
    (root / "no.tar").write_bytes(b"no tar" * 100)
    videos = [
        *names,
        "many/gone.mp4",
        "one.mp4",
        "x.tar::a.mp4",
        "x.tar::b.mp4",
        "no.tar::a.mp4",
        "y.tar::a.mp4",
        "gone.mp4",
    ]
    videos.append(f"file://{tmp_path}/x.tar::a.mp4")
    assert missing_videos(root, [*videos, *videos]) == [
        "many/gone.mp4", "x.tar::b.mp4", "no.tar::a.mp4", "y.tar::a.mp4", "gone.mp4",
    ]  # fmt: skip


def test_the_first_file_of_this_machine_may_be_a_tar(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.mp4": Path(__file__)})
    assert first_local(tmp_path, ["gone.mp4", "memory://videos/x.mp4", "x.tar::a.mp4"]) == tar
    assert first_local(tmp_path, ["gone.mp4"]) is None
    assert is_video_file(tmp_path, "x.tar::a.mp4")
    assert not any(
        is_video_file(tmp_path, name) for name in ("x.tar::b.mp4", ".", "gone.mp4", "y.tar::a.mp4")
    )


def test_many_videos_of_a_store_cost_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Url("memory", "videos", "listed")
    for number in range(100):
        (root / f"{number}.mp4").write_bytes(b"")
    asked: list[str] = []
    ask = Url._ask

    def counted(url: Url, verb: str, *rest: Any) -> Any:
        asked.append(verb)
        return ask(url, verb, *rest)

    monkeypatch.setattr(Url, "_ask", counted)
    assert missing_videos(root, [f"{number}.mp4" for number in range(101)]) == ["100.mp4"]
    assert asked == ["list"]
