"""WebDataset tars as a data set: samples, labels, splits, and what is left out and why."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.datasets.webdataset import read_tars
from vivit.pipeline.errors import DataError
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.tar_index import read_member, tar_index


def write_tar(path: Location, files: Mapping[str, bytes | str]) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, text in files.items():
            content = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())


def labels(root: Location) -> dict[str, int | None]:
    manifest, _ = read_tars(root)
    return {clip.clip_id: clip.labels.get("action") for clip in manifest.clips}


@pytest.mark.parametrize(
    ("samples", "expected", "names"),
    [
        pytest.param([{"cls": "2"}, {"cls": "0\n"}, {}], [2, 0, None], ["0", "1", "2"], id="cls"),
        pytest.param(
            [{"json": '{"label": 1}'}, {"json": '{"cls": 0}'}], [1, 0], ["0", "1"], id="json numbers"
        ),
        pytest.param(
            [{"json": '{"class": "run"}'}, {"json": '{"label": "eat"}'}],
            [1, 0],
            ["eat", "run"],
            id="json names",
        ),
        pytest.param([{"txt": "run"}, {"txt": "eat"}, {"txt": "run"}], [1, 0, 1], ["eat", "run"], id="texts"),
        pytest.param(
            [{"cls": "1", "txt": "a caption"}, {"cls": "0"}], [1, 0], ["0", "1"], id="cls beside text"
        ),
        pytest.param([{"cls": "1", "json": '{"label": 0}'}], [1], ["0", "1"], id="cls beside json"),
        pytest.param([{"cls": "-1"}, {"cls": "0"}], [-1, 0], ["0"], id="unknown"),
        pytest.param([{"json": '{"label": true}'}, {"json": "[1]"}], [None, None], None, id="no label"),
    ],
)
def test_the_class_of_a_sample_is_found(
    tmp_path: Path, samples: list[dict[str, str]], expected: list[int | None], names: list[str] | None
) -> None:
    files = {
        f"{number}.{name}": text
        for number, sample in enumerate(samples)
        for name, text in ({"mp4": "video"} | sample).items()
    }
    write_tar(tmp_path / "train.tar", files)
    assert list(labels(tmp_path).values()) == expected
    assert read_tars(tmp_path)[0].heads.get("action") == names


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        (b"\xff", "its json cannot be read"),
        (b"{", "its json does not parse"),
        (b"[" * 100_000, "its json does not parse"),
        (b'{"clips": [{"clip_id": "a"}]}', "the clips in its json are not as packed"),
        (b'{"clips": [1]}', "the clips in its json are not as packed"),
    ],
)
def test_a_broken_json_costs_the_label_only(tmp_path: Path, about: bytes, reason: str) -> None:
    write_tar(tmp_path / "x.tar", {"0.mp4": "", "0.json": about, "1.mp4": "", "1.cls": "0"})
    assert labels(tmp_path) == {"0": None, "1": 0}
    (problem,) = read_tars(tmp_path)[1]
    assert (problem.name, problem.reason.startswith(reason)) == ("0", True)


def test_captions_are_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "x.tar", {f"{n // 2}.{'mp4' if n % 2 else 'txt'}": f"text {n}" for n in range(80)})
    assert set(labels(tmp_path).values()) == {None}
    assert "captions rather than classes" in caplog.text


def test_numbers_and_names_of_classes_do_not_mix(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"0.mp4": "", "0.cls": "1", "1.mp4": "", "1.cls": "run"})
    with pytest.raises(
        DataError, match=r"numbers in some samples \(x.tar::0.mp4: 1\) and names in others .*'run'"
    ):
        read_tars(tmp_path)


@pytest.mark.parametrize(
    ("tars", "splits"),
    [
        pytest.param(["train-000.tar", "val-000.tar"], ["train", "validation"], id="names"),
        pytest.param(["k400_valid_12.tar", "k400_test_1.tar"], ["validation", "test"], id="words in names"),
        pytest.param(["Train/0.tar", "a/validation/0.tar"], ["train", "validation"], id="folders"),
    ],
)
def test_the_split_is_in_the_name(tmp_path: Path, tars: list[str], splits: list[str]) -> None:
    for tar in tars:
        write_tar(tmp_path / tar, {"0.mp4": ""})
    manifest, _ = read_tars(tmp_path)
    assert {clip.video.partition("::")[0]: clip.split for clip in manifest.clips} == dict(
        zip(tars, splits, strict=True)
    )


def test_tars_of_which_only_some_have_a_split_are_refused(tmp_path: Path) -> None:
    for name in ("train-0.tar", "more.tar"):
        write_tar(tmp_path / name, {"0.mp4": ""})
    with pytest.raises(DataError, match=r"train-0.tar.*others have none \(more.tar\)"):
        read_tars(tmp_path)


def test_without_splits_a_fifth_of_the_clips_is_for_validation(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{n:03}.mp4": "" for n in range(200)})
    manifest, _ = read_tars(tmp_path)
    assert 20 < len(manifest.of_split("validation")) < 60
    assert len(manifest.of_split("train")) == 200 - len(manifest.of_split("validation"))


def test_the_same_key_in_two_tars_is_two_clips(tmp_path: Path) -> None:
    for name in ("train-0.tar", "train-1.tar"):
        write_tar(tmp_path / name, {"0.mp4": "", "x.mp4" if name == "train-0.tar" else "y.mp4": ""})
    assert sorted(labels(tmp_path)) == ["train-0/0", "train-1/0", "x", "y"]


def test_tars_in_a_store_are_read_alike(tmp_path: Path) -> None:
    root = Url("memory", "webdataset", "tars")
    for place in (tmp_path, root):
        write_tar(place / "train/0.tar", {"a.mp4": b"1", "a.cls": "1", "b.webm": b"2", "b.cls": "0"})
        write_tar(place / "val/0.tar", {"c.mp4": b"1", "c.cls": "1"})
    local, remote = read_dataset("webdataset", tmp_path)[0], read_dataset("webdataset", root)[0]
    assert local.clips == remote.clips
    assert len(local) == 3


EXPECTED: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "wds_good.tar": (["000000", "000001"], [], {}),
    "wds_mixed.tar": (
        ["000000", "000002", "000005", "sub/dir/000009"],
        ["000001", "000004"],
        {
            "000000": "the name stands twice: the first one counts",
            "000001": "no json, cls or txt: its label is unknown",
            "000003": "no video among its fields (json)",
            "000004": "its json does not parse",
            "000006": "its members are not neighbours in the tar",
            "000007": "its members are not neighbours in the tar",
            "clip": "no video among its fields (v2.mp4, v2.json)",
        },
    ),
    "wds_truncated.tar": (["000000"], [], {"": "cut short", "000001": "the tar ends inside it"}),
    "wds_cut_at_member_boundary.tar": (
        ["000000"],
        ["000001"],
        {"000001": "no json, cls or txt: its label is unknown"},
    ),
    "wds_no_end_blocks.tar": (["000000"], [], {}),
    "wds_path_traversal.tar": (
        ["000000", "000001"],
        [],
        {
            "../../evil": "path leaves the folder",
            "/tmp/vivit_abs_evil": "absolute path",
            "link": "symlink",
            "link/evil2": "through a symlink",
            "hard": "hard link",
            "fifo": "FIFO",
        },
    ),
}
"""Of each tar: the labelled clips, the clips without a label, and the reason of everything that is left out or lacks it."""


@pytest.mark.parametrize("name", EXPECTED)
def test_bad_tars_behave_as_stated(shared: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(shared(f"bad_videos/{name}").read_bytes())
    labelled, unlabelled, reasons = EXPECTED[name]
    manifest, problems = read_tars(tmp_path)
    assert sorted(clip.clip_id for clip in manifest.clips if clip.labels) == labelled
    assert sorted(clip.clip_id for clip in manifest.clips if not clip.labels) == unlabelled
    assert {problem.name for problem in problems} == set(reasons)
    assert len(problems) == len(reasons)
    assert all(problem.reason.startswith(reasons[problem.name]) for problem in problems)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wds_empty.tar", "no samples with a video in the 1 tars of .*\n.*wds_empty.tar: the tar is empty"),
        ("wds_gzipped.tar", "compressed .gzip., so no member can be read by its offset: mv .* && gunzip "),
    ],
)
def test_tars_without_samples_say_why(
    shared: Callable[[str], Path], tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / name).write_bytes(shared(f"bad_videos/{name}").read_bytes())
    with pytest.raises(DataError, match=reason):
        read_tars(tmp_path)


def test_a_bad_tar_does_not_stop_the_others(shared: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("wds_gzipped.tar", "wds_empty.tar", "wds_good.tar"):
        (tmp_path / name).write_bytes(shared(f"bad_videos/{name}").read_bytes())
    manifest, problems = read_tars(tmp_path)
    assert len(manifest) == 2
    assert {problem.tar for problem in problems} == {"wds_gzipped.tar", "wds_empty.tar"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves its files open
def test_the_samples_are_those_of_the_webdataset_library(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    import webdataset

    path = tmp_path / "x.tar"
    path.write_bytes(shared("bad_videos/wds_good.tar").read_bytes())
    theirs = {
        sample["__key__"]: (sample["mp4"], int(sample["cls"]), json.loads(sample["json"]))
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    assert theirs.keys() == labels(tmp_path).keys()
    for key, (video, label, about) in theirs.items():
        assert read_member(path, f"{key}.mp4") == video
        assert json.loads(read_member(path, f"{key}.json")) == about
        assert labels(tmp_path)[key] == label
    assert len(tar_index(path).members) == 6
