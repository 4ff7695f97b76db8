import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.datasets.ek100 import seconds
from vivit.pipeline.errors import ConfigError, DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_folders_named_like_splits_are_splits(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/run/1.mp4",
        "train/walk/2.AVI",
        "val/walk/3.mkv",
        "Test/run/4.webm",
        "train/run/notes.txt",
    )
    manifest, root = read_dataset("folder", tmp_path)
    assert root == tmp_path
    assert manifest.heads == {"action": ["run", "walk"]}
    rows = {clip.clip_id: (clip.split, clip.labels["action"], clip.video) for clip in manifest.clips}
    assert rows == {
        "train/run/1": ("train", 0, "train/run/1.mp4"),
        "train/walk/2": ("train", 1, "train/walk/2.AVI"),
        "val/walk/3": ("validation", 1, "val/walk/3.mkv"),
        "Test/run/4": ("test", 0, "Test/run/4.webm"),
    }


def test_without_splits_a_hash_of_the_id_makes_them(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{'ab'[i % 2]}/{i}.mp4" for i in range(200)))
    before = {c.clip_id: c.split for c in read_dataset("folder", tmp_path)[0].clips}
    share = sum(split == "validation" for split in before.values()) / 200
    assert 0.12 < share < 0.28
    touch(tmp_path, *(f"c/{i}.mp4" for i in range(50)))
    after = {c.clip_id: c.split for c in read_dataset("folder", tmp_path)[0].clips}
    assert {clip: after[clip] for clip in before} == before


def test_videos_outside_class_folders_are_an_unlabelled_test_split(tmp_path: Path) -> None:
    manifest, _ = read_dataset("folder", touch(tmp_path, "x y.mp4", "-b#.mp4", ".hidden.mp4"))
    assert [(c.clip_id, c.split) for c in manifest.clips] == [("-b#", "test"), ("x y", "test")]
    assert manifest.heads == {}


def test_videos_beside_split_folders_are_unlabelled_test_clips(tmp_path: Path) -> None:
    manifest, _ = read_dataset("folder", touch(tmp_path, "train/run/1.mp4", "train/2.mp4", "3.mp4"))
    rows = {clip.clip_id: (clip.split, dict(clip.labels)) for clip in manifest.clips}
    assert rows == {"train/run/1": ("train", {"action": 0}), "train/2": ("train", {}), "3": ("test", {})}


def test_linked_class_folders_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "pool/walk/1.mp4", "root/run/2.mp4")
    links = {
        "walk": tmp_path / "pool/walk",
        "run/up": tmp_path / "root",
        "run/self": tmp_path / "root/run/self",
        "run/away": tmp_path / "pool",
    }
    for name, target in links.items():
        (tmp_path / "root" / name).symlink_to(target)
    (tmp_path / "pool/back").symlink_to(tmp_path / "root/run")
    manifest, _ = read_dataset("folder", tmp_path / "root")
    assert {clip.video for clip in manifest.clips} == {"walk/1.mp4", "run/2.mp4", "run/away/walk/1.mp4"}


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "run/1.mp4", "walk/2.mp4")
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("walk"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, whom no permission stops
    with pytest.raises(DataError, match=r"the folder .*walk cannot be read \(Permission denied\)"):
        read_dataset("folder", tmp_path)


@pytest.mark.parametrize(
    "name", [pytest.param(b"caf\xe9.mp4", id="file"), pytest.param(b"\xe9/1.mp4", id="folder")]
)
def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path, name: bytes) -> None:
    try:
        touch(tmp_path, os.fsdecode(name))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(DataError, match=r"the name of the file b'.*\\xe9.*' is not UTF-8: rename it"):
        read_dataset("folder", tmp_path)


def test_videos_that_differ_only_in_their_suffix_keep_it_in_the_id(tmp_path: Path) -> None:
    manifest, _ = read_dataset("folder", touch(tmp_path, "a/1.mp4", "a/1.mkv", "a/2.mkv"))
    assert {clip.clip_id for clip in manifest.clips} == {"a/1.mp4", "a/1.mkv", "a/2"}


def test_splits_beside_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"both splits \(train\) and other folders with videos \(extra"):
        read_dataset("folder", touch(tmp_path, "train/a/1.mp4", "extra/2.mp4"))


def test_a_folder_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no videos in .*\.mp4"):
        read_dataset("folder", touch(tmp_path, "a/readme.txt"))


def test_an_unknown_data_set_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown data set 'ek10': did you mean ek100\?"):
        read_dataset("ek10")


def test_a_missing_data_root_says_how_to_give_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVIT_DATA_ROOT", str(tmp_path))
    with pytest.raises(DataError, match=r"no data root for ek100: .*ek100 does not exist\. Pass --data-root"):
        read_dataset("ek100")
    with pytest.raises(DataError, match="is not a folder"):
        read_dataset("ek100", tmp_path / "none")


def test_the_environment_names_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIVIT_DATA_ROOT", str(tmp_path))
    touch(tmp_path, "folder/a/1.mp4")
    assert read_dataset("folder")[1] == tmp_path / "folder"


def test_ek100_is_read_from_its_own_files(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    touch(tmp_path, "P01/videos/P01_11.MP4", "EPIC-KITCHENS/P02/P02_15.mp4")
    manifest, _ = read_dataset("ek100", tmp_path, shared("annotations/epic-kitchens-100"))
    clips = manifest.of_split("validation")
    verbs = manifest.labels("validation")["verb"]
    assert (len(clips), len(manifest.heads["verb"]), len(manifest.heads["noun"])) == (9668, 97, 300)
    assert len(set(verbs.tolist())) == 78
    assert manifest.heads["verb"][:2] == ["take", "put"]
    first = next(clip for clip in clips if clip.clip_id == "P01_11_1")
    assert (first.start_sec, first.end_sec, dict(first.labels)) == (1.56, 2.45, {"verb": 1, "noun": 2})
    assert first.video == "P01/videos/P01_11.MP4"
    assert {c.video for c in clips if c.video.endswith("P02_15.mp4")} == {"EPIC-KITCHENS/P02/P02_15.mp4"}
    assert first.source["start_frame"] == "93"


def test_ek100_test_rows_have_no_labels(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    for name in ("EPIC_100_verb_classes.csv", "EPIC_100_noun_classes.csv"):
        (tmp_path / name).write_bytes(shared(f"annotations/epic-kitchens-100/{name}").read_bytes())
    rows = shared("annotations/epic-kitchens-100/EPIC_100_test_timestamps.head200.csv")
    (tmp_path / "EPIC_100_test_timestamps.csv").write_bytes(rows.read_bytes())
    manifest, _ = read_dataset("ek100", tmp_path)
    assert len(manifest.of_split("test")) == 200
    assert set(manifest.labels("test")["verb"].tolist()) == {-1}


def test_ek100_without_annotations_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"EPIC_100_verb_classes.csv is not in .*annotations.*Pass --annotations"
    ):
        read_dataset("ek100", tmp_path)


CLASSES = b"id,key\n0,take\n1,put\n"
TEST_ROWS = b"narration_id,participant_id,video_id,start_timestamp,stop_timestamp\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        pytest.param("verb_classes", b"id,key\n0,caf\xe9\n", "cannot be read as CSV in UTF-8", id="latin-1"),
        pytest.param(
            "verb_classes", b"id,name\n0,take\n", "lacks the column key: it has id, name", id="no-key"
        ),
        pytest.param("verb_classes", b"key\ntake\n", "lacks the column id", id="no-id"),
        pytest.param("verb_classes", b"", "lacks the column id: it has none", id="empty"),
        pytest.param("noun_classes", b"id,key\n0.5,a\n", "a class id is not a whole number", id="fraction"),
        pytest.param("noun_classes", b"id,key\n1,a\n2,b\n", "must be 0, 1, 2, .*each once", id="from-1"),
        pytest.param("noun_classes", b"id,key\n0,a\n0,b\n", "must be 0, 1, 2, .*each once", id="twice"),
        pytest.param("noun_classes", b"id,key\n", "must be 0, 1, 2, .*each once", id="no-classes"),
        pytest.param(
            "test_timestamps", b"narration_id\n1\n", "lacks the column participant_id", id="columns"
        ),
        pytest.param("test_timestamps", TEST_ROWS + b"r1,P01,P01_1\n", "row r1: ", id="short-row"),
        pytest.param("test_timestamps", TEST_ROWS + b"\xff,,,,\n", "CSV in UTF-8", id="rows-latin-1"),
    ],
)
def test_a_bad_ek100_csv_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    files = {"verb_classes": CLASSES, "noun_classes": CLASSES, "test_timestamps": TEST_ROWS, name: data}
    for stem, content in files.items():
        (tmp_path / f"EPIC_100_{stem}.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"EPIC_100_{name}.csv.*{message}"):
        read_dataset("ek100", tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"), [("00:00:01.89", 1.89), ("01:02:03.005", 3723.005), ("00:00:07", 7.0)]
)
def test_timestamps_are_decimal_seconds(text: str, wanted: float) -> None:
    assert seconds(text) == pytest.approx(wanted, abs=1e-9)
