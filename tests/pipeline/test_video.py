"""Reading clips of good, odd and broken videos: which frames, which pictures, which outcome."""

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import pytest
from numpy.typing import NDArray

from vivit.pipeline import video_decoder, video_source
from vivit.pipeline.errors import DataError
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.picture import PictureConverter
from vivit.pipeline.video import ClipResult, ClipSpan, probe, read_clips, read_frames
from vivit.pipeline.video_pass import Tracker

Pictures = dict[int, NDArray[np.uint8]]


class Sink:
    """Keeps the pictures of the frames that a function of the number of frames chooses."""

    def __init__(self, choose: Callable[[int], Any] = np.arange) -> None:
        self.choose = choose
        self.times_sec = np.zeros(0)
        self.num_plans = 0
        self.pictures: Pictures = {}

    def plan(self, times_sec: NDArray[np.float64]) -> NDArray[np.int64]:
        self.times_sec, self.pictures = times_sec, {}
        self.num_plans += 1
        return np.asarray(self.choose(len(times_sec)), np.int64)

    def add(self, index: int, picture: NDArray[np.uint8]) -> None:
        assert index not in self.pictures
        assert index > max(self.pictures, default=-1)
        assert picture.dtype == np.uint8
        assert picture.flags.c_contiguous
        self.pictures[index] = picture


def fixed(wanted: Sequence[int], num_frames: int) -> Sequence[int]:
    """The same indices whatever the length of the clip."""
    return wanted


def eight_even(num_frames: int) -> NDArray[np.float64]:
    """Eight indices, evenly over a clip."""
    indices: NDArray[np.float64] = np.linspace(0, num_frames - 1, 8).round()
    return indices


def read_one(source: Path | bytes, span: ClipSpan | None = None, **options: Any) -> tuple[ClipResult, Sink]:
    sink = Sink()
    [(position, result)] = read_clips(source, [span or ClipSpan()], [sink], **options)
    assert position == 0
    return result, sink


def read_many(
    source: Path | bytes, spans: Sequence[ClipSpan], choose: Callable[[int], Any]
) -> list[tuple[ClipResult, list[float], Pictures]]:
    """Result, frame times and pictures of each clip, all read in one pass."""
    sinks = [Sink(choose) for _ in spans]
    results = dict(read_clips(source, spans, sinks))
    assert sorted(results) == list(range(len(spans)))
    return [(results[i], sink.times_sec.tolist(), sink.pictures) for i, sink in enumerate(sinks)]


def num_decodable(path: Path) -> int:
    """Frames of a plain decode that skips the packets which fail."""
    count = 0
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for packet in container.demux(video=0):
            with contextlib.suppress(av.error.InvalidDataError):
                count += len(packet.decode())
    return count


def assert_same_pictures(actual: Pictures, expected: Pictures) -> None:
    assert list(actual) == list(expected)
    for index, picture in expected.items():
        np.testing.assert_array_equal(actual[index], picture)


def numbered_picture(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """Gray [height, width]: ten blocks across the top quarter hold the number, the lowest bit at the left."""
    y, x = np.mgrid[:height, :width]
    picture = (96 + 50 * np.sin((x + 3 * number) / 7) + 40 * np.cos((y - 2 * number) / 5)).clip(16, 235)
    for bit in range(10):
        picture[: height // 4, bit * width // 10 : (bit + 1) * width // 10] = 235 if number >> bit & 1 else 16
    return np.asarray(picture, np.uint8)


def picture_number(picture: NDArray[np.uint8]) -> int:
    """The number in a picture [height, width, 3], as `counter` of make_bad_videos.py reads it."""
    height, width = picture.shape[:2]
    luma = picture @ np.array([0.299, 0.587, 0.114])
    number = 0
    for bit in range(10):
        start, end = bit * width // 10, (bit + 1) * width // 10
        margin = max(1, (end - start) // 4)
        rows = slice(height // 16, max(height // 16 + 1, height // 4 - height // 16))
        number |= int(luma[rows, start + margin : end - margin].mean() > 125) << bit
    return number


def write_numbered(
    path: Path, num_frames: int, *, codec: str = "libx264", options: dict[str, str] | None = None
) -> Path:
    """Pictures 0, 1, ... of 96x64 at 25 frames/s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"threads": "1", **(options or {})})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number, 96, 64), "gray").reformat(
                format="yuv420p"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=16:min-keyint=16:scenecut=0:threads=1"}


@pytest.fixture(scope="module", params=["mp4", "mkv"])
def long_video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 frames in open GOPs of 16 with B-frames: 12 s."""
    path = tmp_path_factory.mktemp("long") / f"long.{request.param}"
    return write_numbered(path, 300, options=OPEN_GOP)


@pytest.fixture(scope="module")
def damaged_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 frames in GOPs of 20; packets 105 and 106 of 200, at about 4.2 s, are zeros."""
    path = tmp_path_factory.mktemp("damaged") / "damaged.mp4"
    write_numbered(
        path, 200, options={"x264-params": "keyint=20:min-keyint=20:scenecut=0:bframes=2:threads=1"}
    )
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in packets[105:107]:
        assert position is not None
        data[position : position + size] = bytes(size)
    path.write_bytes(data)
    return path


def entries(name: str) -> list[Any]:
    """The entries of a JSON file in ../shared; where it is not there its own name, so that `shared` skips the test."""
    path = Path(__file__).resolve().parents[3] / "shared" / name
    if not path.exists():
        return [pytest.param({"file": path.name}, id="all")]
    return [pytest.param(entry, id=entry["file"]) for entry in json.loads(path.read_text())["videos"]]


def expected_outcome(policy: dict[str, Any]) -> Outcome:
    match policy["status"], policy["reason"]:
        case "ok", _:
            return Outcome.OK
        case "partial", reason:
            return {"truncated": Outcome.PARTIAL, "corrupt": Outcome.CORRUPT}[reason]
        case _, reason:
            return Outcome(reason)


@pytest.mark.parametrize("entry", entries("bad_videos/expected.json"))
def test_a_bad_or_odd_file_has_the_outcome_and_the_frames_that_it_should(
    shared: Callable[[str], Path], entry: dict[str, Any]
) -> None:
    result, sink = read_one(shared(f"bad_videos/{entry['file']}"))
    assert result.outcome == expected_outcome(entry["policy"]), result
    assert (result.message == "") == result.outcome.complete
    if result.outcome == Outcome.PARTIAL:
        assert "truncated" in result.message
    frames = entry["policy"]["frames"]
    fewest, most = frames if isinstance(frames, list) else (frames, frames)
    assert fewest <= result.num_frames <= most
    assert list(sink.pictures) == list(range(result.num_frames))
    if result.outcome.usable:
        # the stated rule: packets that fail are skipped, and the decoder is flushed at the end
        assert result.num_frames == entry["measured"]["frames_tolerant"]
        assert (np.diff(sink.times_sec) > 0).all()
    if numbers := entry.get("picture_numbers"):
        upright = entry["measured"]["rotation_deg_pyav"] == [0]
        turns = entry["measured"]["rotation_deg_pyav"][0] // 90 % 4
        got = [picture_number(p if upright else np.rot90(p, -turns)) for p in sink.pictures.values()]
        if result.outcome == Outcome.CORRUPT:  # FFmpeg conceals what it cannot decode, the number included
            assert got[:8] == list(range(8))
            return
        assert (got[0], got[-1]) == (numbers["first"], numbers["last"])
        assert (np.diff(got) == 1).all() == numbers["consecutive"]
        assert (np.diff(got) > 0).all()


@pytest.mark.parametrize("entry", entries("videos/index.json"))
def test_a_real_video_gives_the_pictures_of_a_plain_decode(
    shared: Callable[[str], Path], entry: dict[str, Any]
) -> None:
    path = shared(f"videos/{entry['file']}")
    num_frames = entry["frames"]
    wanted = sorted({0, 1, num_frames // 3, num_frames - 1} if num_frames < 400 else {0, 1, num_frames // 3})
    plain: Pictures = {}
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for index, frame in enumerate(itertools.islice(container.decode(video=0), wanted[-1] + 1)):
            if index in wanted:
                plain[index] = PictureConverter().picture(frame)
    for source in (path, path.read_bytes()):
        sink = Sink(functools.partial(fixed, wanted))
        [(_, result)] = read_clips(source, [ClipSpan()], [sink])
        assert result == ClipResult(Outcome.OK, "", num_frames)
        assert sink.num_plans == 1
        assert_same_pictures(sink.pictures, plain)
    if entry["pts"] and not entry["pts_non_increasing"]:
        expected = (np.array(entry["pts"]) - entry["pts"][0]) * float(Fraction(*entry["time_base"]))
        np.testing.assert_allclose(sink.times_sec, expected, atol=1e-9)


def test_frames_come_from_the_right_places_with_and_without_jumps(long_video: Path) -> None:
    every, _ = read_many(long_video, [ClipSpan(), ClipSpan(0, 1)], np.arange)
    assert [picture_number(p) for p in every[2].values()] == list(range(300))
    for wanted in ([299], [37, 38, 39, 40, 41], [0, 150, 151, 298], [31, 32, 33, 47, 48, 240]):
        [(result, _, pictures)] = read_many(long_video, [ClipSpan()], functools.partial(fixed, wanted))
        assert result == ClipResult(Outcome.OK, "", 300)
        assert_same_pictures(pictures, {index: every[2][index] for index in wanted})


def test_a_jump_decodes_only_the_frames_behind_the_key_frame(
    long_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    number = Tracker.number

    def counted(self: Tracker, frame: av.VideoFrame) -> int | None:
        nonlocal decoded
        decoded += 1
        return number(self, frame)

    monkeypatch.setattr(Tracker, "number", counted)
    read_many(long_video, [ClipSpan()], lambda n: [40, 200, 203])
    assert decoded < 40


def test_all_clips_of_a_video_in_one_pass_equal_each_alone(long_video: Path) -> None:
    starts = [0.0, 0.3, 0.31, 2.0, 2.0, 5.5, 5.48, 9.0, 11.2, 11.9]
    spans = [
        ClipSpan(s, s + length) for s, length in zip(starts, [1, 2, 0.5, 3, 3, 0.2, 4, 1, 2, 3], strict=True)
    ]
    spans += [ClipSpan(), ClipSpan(None, 0.5), ClipSpan(11.5, None), ClipSpan(14, 15), ClipSpan(3, 3)]
    together = read_many(long_video, spans, eight_even)
    for span, (result, times_sec, pictures) in zip(spans, together, strict=True):
        [(alone_result, alone_times, alone_pictures)] = read_many(long_video, [span], eight_even)
        assert (result, times_sec) == (alone_result, alone_times)
        assert_same_pictures(pictures, alone_pictures)
        first = round((span.start_sec or 0) * 25 + 0.4999)
        assert [picture_number(p) - i for i, p in pictures.items()] == [first] * len(pictures)
    assert [r.outcome for r, _, _ in together] == [Outcome.OK] * 8 + [
        Outcome.PARTIAL,
        Outcome.PARTIAL,
        Outcome.OK,
        Outcome.OK,
        Outcome.OK,
        Outcome.NO_FRAMES,
        Outcome.NO_FRAMES,
    ]


def test_damage_changes_only_the_clips_that_need_it(damaged_video: Path) -> None:
    spans = [ClipSpan(s, s + 1.2) for s in (0.0, 1.6, 3.0, 3.9, 4.3, 5.0, 6.4)] + [ClipSpan()]
    together = read_many(damaged_video, spans, eight_even)
    for span, (result, times_sec, pictures) in zip(spans, together, strict=True):
        [alone] = read_many(damaged_video, [span], eight_even)
        assert (result, times_sec) == alone[:2]
        assert_same_pictures(pictures, alone[2])
        assert result.num_frames == len(times_sec)
    outcomes = [result.outcome for result, _, _ in together]
    assert outcomes == [
        Outcome.OK,
        Outcome.OK,
        Outcome.CORRUPT,
        Outcome.CORRUPT,
        Outcome.CORRUPT,
        Outcome.OK,
        Outcome.OK,
        Outcome.CORRUPT,
    ]
    assert together[-1][0].num_frames == num_decodable(damaged_video)


def test_concealed_pictures_do_not_depend_on_what_was_decoded_before(long_video: Path) -> None:
    data = bytearray(long_video.read_bytes())
    for position in np.random.default_rng(5).integers(6000, len(data) * 3 // 4, 40).tolist():
        data[position] ^= 0x5A
    spans = [ClipSpan(0, 2), ClipSpan(1.5, 4), ClipSpan(3.2, 4), ClipSpan(6.1, 6.9), ClipSpan()]
    together = read_many(bytes(data), spans, eight_even)
    assert Outcome.CORRUPT in {result.outcome for result, _, _ in together}
    for span, (result, times_sec, pictures) in zip(spans, together, strict=True):
        [alone] = read_many(bytes(data), [span], eight_even)
        assert (result, times_sec) == alone[:2]
        assert_same_pictures(pictures, alone[2])


def test_a_plan_is_made_again_from_the_frames_that_really_come(damaged_video: Path) -> None:
    sink = Sink()
    [(_, result)] = read_clips(damaged_video, [ClipSpan()], [sink])
    assert sink.num_plans == 2
    assert 190 < result.num_frames < 200
    assert len(sink.times_sec) == len(sink.pictures) == result.num_frames
    numbers = [picture_number(p) for p in sink.pictures.values()]
    behind = [number for number, t in zip(numbers, sink.times_sec, strict=True) if t > 5]
    assert behind == [round(t * 25) for t in sink.times_sec if t > 5]


def test_only_wanted_frames_are_converted_and_each_once(
    long_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = []
    picture = PictureConverter.picture

    def counted(self: PictureConverter, frame: av.VideoFrame) -> NDArray[np.uint8]:
        converted.append(frame.pts)
        return picture(self, frame)

    monkeypatch.setattr(PictureConverter, "picture", counted)
    spans = [ClipSpan(0, 4), ClipSpan(0.4, 3), ClipSpan(8, 9)]
    clips = read_many(long_video, spans, lambda n: [0, 10, 20, 10])
    assert [list(pictures) for _, _, pictures in clips] == [[0, 10, 20]] * 3
    assert len(converted) == len(set(converted)) == 4 + 3  # frames 0, 10, 20, 30 and 200, 210, 220


def test_a_plan_outside_the_clip_is_refused(long_video: Path) -> None:
    with pytest.raises(IndexError, match="a clip of 25 frames was asked for frames 0 to 25"):
        read_many(long_video, [ClipSpan(0, 1)], lambda n: np.arange(n + 1))


def test_a_clip_that_wants_nothing_is_counted(long_video: Path) -> None:
    [(result, _, pictures)] = read_many(long_video, [ClipSpan(1, 2)], lambda n: [])
    assert (result, pictures) == (ClipResult(Outcome.OK, "", 25), {})


@pytest.mark.parametrize(
    ("name", "fewest", "most"),
    [
        ("avi_cut60.avi", 93, 93),
        ("faststart_cut60.mp4", 17, 19),
        ("faststart_last_100_bytes_missing.mp4", 47, 49),
        ("fragmented_cut60.mp4", 26, 28),
        ("mkv_cut60.mkv", 25, 26),
    ],
)
def test_a_cut_file_is_counted_whichever_frames_are_wanted(
    shared: Callable[[str], Path], name: str, fewest: int, most: int
) -> None:
    path = shared("bad_videos") / name
    sink = Sink(functools.partial(fixed, [0]))
    [(_, result)] = read_clips(path, [ClipSpan()], [sink])
    assert result.outcome is Outcome.PARTIAL
    assert fewest <= result.num_frames <= most
    assert list(sink.pictures) == [0]


def test_a_truncated_file_is_whole_where_nothing_is_missing(long_video: Path, tmp_path: Path) -> None:
    if long_video.suffix == ".mp4":
        with av.open(str(long_video)) as whole:  # its index lies at the end: move it to the front
            path = tmp_path / "front.mp4"
            with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
                stream = container.add_stream_from_template(whole.streams.video[0])
                for packet in whole.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        container.mux(packet)
    else:
        path = long_video
    data = path.read_bytes()
    data = data[: len(data) * 7 // 10]
    spans = [ClipSpan(0, 2), ClipSpan(4, 5), ClipSpan(7, 12), ClipSpan(11, 12), ClipSpan()]
    clips = read_many(data, spans, lambda n: [0, n // 2, n - 1])
    outcomes = [result.outcome for result, _, _ in clips]
    assert outcomes == [Outcome.OK, Outcome.OK, Outcome.PARTIAL, Outcome.NO_FRAMES, Outcome.PARTIAL]
    assert [picture_number(p) for p in clips[1][2].values()] == [100, 112, 124]


def test_avi_frames_are_counted_in_the_order_of_decoding(tmp_path: Path) -> None:
    path = write_numbered(
        tmp_path / "a.avi", 60, codec="mpeg4", options={"bf": "2", "g": "12", "b": "2000000"}
    )
    spans = [ClipSpan(1, 2), ClipSpan(0.5, 1.5), ClipSpan()]
    clips = read_many(path, spans, np.arange)
    assert [result.outcome for result, _, _ in clips] == [Outcome.OK] * 3
    num_frames = clips[2][0].num_frames
    assert [picture_number(p) for p in clips[2][2].values()] == list(range(num_frames))
    assert [picture_number(p) for p in clips[0][2].values()] == list(range(25, 50))
    assert clips[1][1] == pytest.approx([(13 + i) / 25 for i in range(25)])


def test_read_frames_gives_the_frame_shown_at_a_time(long_video: Path) -> None:
    frames = read_frames(long_video, [0.0, 0.039, 0.04, 3.999, 4.0, 2.0, 99.0, -1.0])
    assert frames.shape == (8, 64, 96, 3)
    assert [picture_number(p) for p in frames] == [0, 0, 1, 99, 100, 50, 299, 0]


def test_probe_says_what_the_packets_promise(long_video: Path) -> None:
    info = probe(long_video)
    assert (info.width, info.height, info.num_frames) == (96, 64, 300)
    assert info.duration_sec == pytest.approx(12, abs=0.01)
    assert info.frame_rate == pytest.approx(25)


def test_pictures_may_change_their_size(shared: Callable[[str], Path]) -> None:
    path = shared("bad_videos/res_change_h264.ts")
    _, sink = read_one(path)
    assert [p.shape for p in sink.pictures.values()] == [(120, 160, 3)] * 20 + [(128, 96, 3)] * 20
    with pytest.raises(DataError, match="changes its picture size"):
        read_frames(path, [0.0, 1.5])


def test_a_read_error_of_the_disk_is_not_taken_for_damage(
    long_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if 15_000 < self.tell() < 20_000:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(1000)

    data = long_video.read_bytes()
    assert len(data) > 20_000
    monkeypatch.setattr(video_decoder, "open_source", lambda source: Failing(data))
    result, _ = read_one(long_video)
    assert result.outcome == Outcome.UNREADABLE
    assert "Input/output error" in result.message


def test_clips_of_a_video_that_cannot_be_opened_all_have_the_reason(tmp_path: Path) -> None:
    results = list(read_clips(tmp_path / "gone.mp4", [ClipSpan(0, 1), ClipSpan(1, 2)], [Sink(), Sink()]))
    assert [(i, r.outcome, r.num_frames) for i, r in results] == [
        (0, Outcome.MISSING, 0),
        (1, Outcome.MISSING, 0),
    ]
    with pytest.raises(DataError, match=r"gone.mp4 cannot be read \(missing\): no such file"):
        read_frames(tmp_path / "gone.mp4", [0.0])
    with pytest.raises(DataError, match="missing"):
        probe(tmp_path / "gone.mp4")


class TickingClock:
    """A clock on which every look takes a millisecond."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def monotonic(self) -> float:
        return next(self._ticks) / 1000


@pytest.fixture
def ticking_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """For our modules only: PyAV looks at the clock as well."""
    monkeypatch.setattr(video_source, "time", TickingClock())


@pytest.mark.usefixtures("ticking_clock")
def test_a_clip_that_takes_too_long_does_not_take_the_others_with_it(shared: Callable[[str], Path]) -> None:
    spans = [ClipSpan(0, 0.4), ClipSpan(23, 23.4), ClipSpan(23.5, 24)]
    sinks = [Sink() for _ in spans]
    path = shared("bad_videos/long_gop_600.mp4")  # one key frame: all that lies before a clip must be decoded
    results = dict(read_clips(path, spans, sinks, timeout_sec=0.3))
    assert [results[i].outcome for i in range(3)] == [Outcome.OK, Outcome.TIMEOUT, Outcome.OK]
    assert "0.3 s" in results[1].message
    assert not sinks[1].pictures


def test_a_file_whose_packets_take_too_long_times_out(long_video: Path) -> None:
    assert read_one(long_video, timeout_sec=-1)[0].outcome == Outcome.TIMEOUT


@pytest.mark.usefixtures("ticking_clock")
def test_a_damaged_file_that_takes_too_long_times_out(damaged_video: Path) -> None:
    assert read_one(damaged_video, timeout_sec=0.3)[0].outcome == Outcome.TIMEOUT
    assert read_one(damaged_video, timeout_sec=1.0)[0].outcome == Outcome.CORRUPT


def test_stop_ends_the_reading_at_once(long_video: Path) -> None:
    stop = threading.Event()

    class Stopping(Sink):
        def add(self, index: int, picture: NDArray[np.uint8]) -> None:
            super().add(index, picture)
            stop.set()

    sinks = [Stopping(), Sink()]
    assert list(read_clips(long_video, [ClipSpan(0, 4), ClipSpan(4, 12)], sinks, stop=stop)) == []
    assert len(sinks[0].pictures) < 20
    assert not sinks[1].pictures


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_a_video_is_closed_even_if_the_reader_is_dropped(long_video: Path, tmp_path: Path) -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = num_open()
    results = read_clips(long_video, [ClipSpan(0, 1), ClipSpan(4, 12)], [Sink(), Sink()])
    next(results)
    assert num_open() == before + 1
    results.close()  # type: ignore[attr-defined]
    assert num_open() == before
    (tmp_path / "text.mp4").write_text("no video")
    read_one(tmp_path / "text.mp4")
    assert num_open() == before
