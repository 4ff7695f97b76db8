"""What is found below a folder."""

import os
from pathlib import Path

import pytest

from vivit.pipeline.datasets import load_dataset
from vivit.pipeline.datasets.tree import FileTree, VideoFinder
from vivit.pipeline.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_folders_of_frames_are_known_but_their_pictures_are_not_kept(tmp_path: Path) -> None:
    touch(
        tmp_path, "P01/rgb_frames/P01_01/frame_1.jpg", "P01/rgb_frames/P01_02.tar", "other/x/1.PNG", "a.csv"
    )
    tree = FileTree(tmp_path)
    assert tree.files == ["a.csv", "P01/rgb_frames/P01_02.tar"]
    assert tree.frame_folders == ["P01/rgb_frames/P01_01", "other/x"]


def test_folders_below_frames_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "rgb_frames/P01_01/frame_1.jpg", "videos/P01_01.MP4")
    listed: list[str] = []
    scandir = os.scandir

    def record(path: str) -> object:
        listed.append(Path(path).name)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", record)
    FileTree(tmp_path)
    assert listed == [tmp_path.name, "rgb_frames", "videos"]


def test_the_file_nearest_to_the_top_counts(tmp_path: Path) -> None:
    touch(tmp_path, "a/b/train.csv", "b/train.csv", "b/c/labels.json", "c/labels.json/x")
    tree = FileTree(tmp_path)
    assert tree.nearest("train.csv") == "b/train.csv"
    assert tree.nearest("a/b/train.csv") == "a/b/train.csv"
    assert tree.nearest("c/labels.json") == "b/c/labels.json"
    assert tree.nearest("val.csv") is None


def test_of_several_videos_the_first_folder_decides_then_the_depth(tmp_path: Path) -> None:
    files = ["deep/down/x.mp4", "val/x.webm", "y/x.avi", "y/x.txt", "val/z.MP4"]
    repeated: dict[str, list[str]] = {}
    finder = VideoFinder(files, repeated=repeated)
    assert finder.find("x", folders=("down", "val")) == "deep/down/x.mp4"
    assert finder.find("x", folders=("none", "val")) == "val/x.webm"
    assert finder.find("x", parent="y") == "y/x.avi"
    assert finder.find("x", parent="none") is None
    assert finder.find("z") == "val/z.MP4"
    assert repeated["val/x.webm"] == ["y/x.avi", "deep/down/x.mp4"]


def test_annotations_may_be_a_file_or_must_exist(tmp_path: Path) -> None:
    rows = "label,youtube_id,time_start,time_end,split\nrun,abcdefghijk,1,11,train\n"
    (tmp_path / "train.csv").write_text(rows)
    (tmp_path / "videos").mkdir()
    assert len(load_dataset("k400", tmp_path / "videos", tmp_path / "train.csv").manifest) == 1
    with pytest.raises(DataError, match=r"none does not exist: pass the folder of the annotation files"):
        load_dataset("k400", tmp_path, tmp_path / "none")
