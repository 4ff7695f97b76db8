"""The report of `vivit prepare`: every kind of trouble of a copy is counted and named."""

import json
import os
from pathlib import Path

import pytest
from conftest import write_video

from vivit.pipeline.datasets import LoadedDataset, load_dataset
from vivit.pipeline.errors import DataError
from vivit.pipeline.preparation import DatasetReport, examine
from vivit.pipeline.report_text import full_text
from vivit.pipeline.views import ViewSpec

VIEWS = ViewSpec(num_frames=4, stride=8)  # 25 frames
CLASSES = {1: "Jump", 2: "HandstandPushups"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of UCF101's second split with something wrong in each of its videos but the first."""
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Jump\n2 HandstandPushups\n")
    names = ["good", "short", "cut", "text", "gone", "link"]
    (lists / "trainlist02.txt").write_text("".join(f"Jump/v_Jump_{name}.avi 1\n" for name in names))
    (lists / "testlist02.txt").write_text("Jump/v_Jump_other.avi\n")
    videos = tmp_path / "UCF-101/Jump"
    write_video(videos / "v_Jump_good.mp4", num_frames=50)
    write_video(tmp_path / "old/Jump/v_Jump_good.mp4", num_frames=40)
    write_video(videos / "v_Jump_short.mp4", num_frames=10)
    data = write_video(videos / "v_Jump_cut.mp4", num_frames=50, size=(96, 128)).read_bytes()
    (videos / "v_Jump_cut.mp4").write_bytes(data[: len(data) // 2])
    (videos / "v_Jump_text.mp4").write_text("this is no video")
    write_video(videos / "v_Jump_other.mkv", num_frames=30)
    os.symlink(tmp_path / "nowhere", videos / "v_Jump_link.mp4")
    return tmp_path


def examined(root: Path, probe: int | None = 8) -> tuple[LoadedDataset, DatasetReport]:
    loaded = load_dataset("ucf101:2", root)
    return loaded, examine(loaded, VIEWS, probe=probe)


def test_what_is_wrong_with_a_copy_is_counted_and_named(copy: Path) -> None:
    _, report = examined(copy)
    train, test = report.splits["train"], report.splits["test"]
    assert (train.clips, train.official, train.missing, train.unlabelled) == (6, 9586, 2, 0)
    assert (test.clips, test.official, test.missing) == (1, 3734, 0)
    assert train.per_class["action"] == {"Jump": 6, "HandstandPushups": 0}
    assert sorted(report.missing) == ["UCF-101/Jump/v_Jump_gone.avi", "UCF-101/Jump/v_Jump_link.mp4"]
    assert report.repeated_files == {"UCF-101/Jump/v_Jump_good.mp4": ["old/Jump/v_Jump_good.mp4"]}
    assert report.headers is not None
    assert {each.name.rpartition("_")[2]: each.outcome for each in report.headers.unreadable} == {
        "cut.mp4": "unreadable_container",
        "text.mp4": "not_a_video",
    }
    assert report.headers.videos == 5
    assert report.headers.frame_rates == {"25.00": 3}
    assert (report.headers.view_frames, report.headers.short) == (25, {"train": 1, "test": 0})
    assert report.sample is not None
    assert report.sample.outcomes == {"ok": 3}
    assert not report.is_whole


def test_the_report_is_saved_as_text_and_json(copy: Path) -> None:
    _, report = examined(copy)
    text = full_text(report)
    for wanted in (
        "UCF101: ucf101:2 in", "-9,580", "2 videos are missing:", "UCF-101/Jump/v_Jump_gone.avi",
        "1 videos are there more than once:", "2 videos cannot be read whole:", "not_a_video: ", "25.00",
        "have fewer than the 25 frames of a view, which then starts over: 1 in train", "0 Jump", "3 ok",
        str(copy / "ucfTrainTestlist/classInd.txt"),
    ):  # fmt: skip
        assert wanted in text
    assert json.loads(report.to_json())["splits"]["train"]["clips"] == 6


def test_no_video_is_opened_where_they_are_not_to_be(copy: Path) -> None:
    for video in copy.rglob("*.mp4"):
        video.unlink()
    _, report = examined(copy, probe=None)
    assert (report.headers, report.sample, len(report.missing)) == (None, None, 6)


def test_a_folder_without_any_of_the_videos_is_refused(copy: Path) -> None:
    (copy / "lists").mkdir()
    (copy / "ucfTrainTestlist").rename(copy / "lists/l")
    with pytest.raises(
        DataError, match=r"none of the 7 videos of ucf101:2 is below .*: looked for UCF-101/Jump/"
    ):
        examine(load_dataset("ucf101:2", copy / "lists"), VIEWS)


def test_a_clip_that_stands_in_two_splits_is_named(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    (tmp_path / "train.txt").write_text("a.mp4 0\n")
    (tmp_path / "val.txt").write_text("a.mp4 0\n")
    loaded = load_dataset("list", tmp_path, [tmp_path / "train.txt", tmp_path / "val.txt"])
    report = examine(loaded, VIEWS)
    assert report.repeated_clips == [["train/a", "validation/a"]]
    assert report.is_whole


def test_the_sample_is_the_same_each_time(copy: Path) -> None:
    first, second = examined(copy, probe=2)[1].sample, examined(copy, probe=2)[1].sample
    assert first == second
    assert first is not None
    assert first.clips == 2


def test_ends_after_the_video_are_counted(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", num_frames=50)
    rows = "video_path,start,end,label\na.mp4,0,1.9,run\na.mp4,1,2.4,run\na.mp4,1,2.6,walk\n"
    (tmp_path / "train.csv").write_text(rows)
    report = examine(load_dataset("list", tmp_path, tmp_path / "train.csv"), VIEWS, probe=3)
    assert report.headers is not None
    assert report.headers.beyond == {"train": 1}
    assert report.sample is not None
    assert report.sample.outcomes == {"ok": 2, "partial": 1}
    assert not report.is_whole
