"""Every real annotation file is read, with the counts that its source states."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vivit.pipeline.datasets import load_dataset, read_dataset
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Manifest

Shared = Callable[[str], Path]


def copied(source: Path, target: Path) -> Path:
    """A file under the name that it has in its data set; the samples have others."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    return target


def counts(manifest: Manifest) -> dict[str, int]:
    return {split: len(manifest.of_split(split)) for split in manifest.splits}


def test_ek100_validation(tmp_path: Path, shared: Shared) -> None:
    read = load_dataset("ek100", tmp_path, shared("annotations/epic-kitchens-100"))
    clips = read.manifest.of_split("validation")
    labels = read.manifest.labels("validation")
    actions = set(zip(labels["verb"].tolist(), labels["noun"].tolist(), strict=True))
    assert (len(clips), len(set(labels["verb"].tolist())), len(set(labels["noun"].tolist()))) == (
        9668,
        78,
        211,
    )
    assert len(actions) == 1352
    assert sum(clip.source["participant_id"] in ("P18", "P32") for clip in clips) == 1065
    assert read.official["validation"] == len(clips)
    assert [len(names) for names in read.manifest.heads.values()] == [97, 300]


@pytest.mark.parametrize(
    ("sample", "name", "split", "first"),
    [
        ("EPIC_100_test_timestamps.head200.csv", "EPIC_100_test_timestamps.csv", "test", (2.86, {})),
        (
            "EPIC_100_uda_source_train.head200.csv",
            "EPIC_100_train.csv",
            "train",
            (0.14, {"verb": 3, "noun": 3}),
        ),
        (
            "EPIC_100_uda_target_val.head200.csv",
            "EPIC_100_validation.csv",
            "validation",
            (2.6, {"verb": 6, "noun": 0}),
        ),
    ],
)
def test_ek100_samples(
    tmp_path: Path, shared: Shared, sample: str, name: str, split: str, first: tuple[float, dict[str, int]]
) -> None:
    folder = shared("annotations/epic-kitchens-100")
    for file in ("EPIC_100_verb_classes.csv", "EPIC_100_noun_classes.csv"):
        copied(folder / file, tmp_path / file)
    copied(folder / sample, tmp_path / name)
    manifest, _ = read_dataset("ek100", tmp_path)
    assert counts(manifest) == {split: 200}
    clip = min(manifest.of_split(split), key=lambda clip: (clip.video, int(clip.clip_id.rpartition("_")[2])))
    assert (clip.start_sec, dict(clip.labels)) == first


@pytest.mark.parametrize("number", [400, 600])
def test_kinetics_samples(tmp_path: Path, shared: Shared, number: int) -> None:
    folder = shared(f"annotations/kinetics-{number}")
    copied(folder / f"kinetics-{number}_val.sample.csv", tmp_path / f"annotations/kinetics-{number}_val.csv")
    copied(
        folder / f"kinetics-{number}_test.head100.csv", tmp_path / f"annotations/kinetics-{number}_test.csv"
    )
    manifest, _ = read_dataset(f"k{number}", tmp_path)
    official = (folder / f"label_map_k{number}.txt").read_text().splitlines()
    assert manifest.heads == {"action": official}  # the sorted labels
    assert counts(manifest) == {"validation": {400: 449, 600: 649}[number], "test": 100}
    assert len(set(manifest.labels("validation")["action"].tolist())) == number
    assert set(manifest.labels("test")["action"].tolist()) == {-1}


def test_kinetics_700_with_its_class_list(tmp_path: Path, shared: Shared) -> None:
    folder = shared("annotations/kinetics-700")
    copied(folder / "kinetics-700_val.first3.csv", tmp_path / "kinetics-700_val.csv")
    copied(folder / "label_map_k700.txt", tmp_path / "label_map_k700.txt")
    manifest, _ = read_dataset("k700", tmp_path)
    assert counts(manifest) == {"validation": 3}
    assert len(manifest.heads["action"]) == 700
    names = {clip.clip_id: manifest.heads["action"][clip.labels["action"]] for clip in manifest.clips}
    assert names["---QUuC4vJs_000084_000094"] == "testifying"


def test_something_something_v2(tmp_path: Path, shared: Shared) -> None:
    folder = shared("annotations/something-something-v2")
    name = "something-something-v2-{}.json"
    copied(folder / name.format("labels"), tmp_path / name.format("labels"))
    copied(folder / name.format("validation.sample"), tmp_path / name.format("validation"))
    copied(folder / name.format("test.head200"), tmp_path / name.format("test"))
    manifest, _ = read_dataset("ssv2", tmp_path)
    assert counts(manifest) == {"validation": 276, "test": 200}
    assert len(set(manifest.labels("validation")["action"].tolist())) == 174
    assert manifest.heads["action"] == sorted(manifest.heads["action"])
    clip = next(clip for clip in manifest.clips if clip.clip_id == "74225")
    assert manifest.heads["action"][clip.labels["action"]] == "Spinning something that quickly stops spinning"
    assert clip.video == "20bn-something-something-v2/74225.webm"


def test_something_else_few_shot(tmp_path: Path, shared: Shared) -> None:
    manifest, _ = read_dataset("something-else:5shot", tmp_path, shared("annotations/something-else"))
    assert (counts(manifest), len(manifest.heads["action"])) == ({"train": 430}, 86)
    assert len(set(manifest.labels("train")["action"].tolist())) == 86
    labels = shared("annotations/something-else/fewshot/base_labels.json")
    assert len(json.loads(labels.read_text())) == 88


def test_something_else_one_object(tmp_path: Path, shared: Shared) -> None:
    folder = shared("annotations/something-else/compositional_oneobject")
    copied(folder / "labels.json", tmp_path / "compositional_oneobject/labels.json")
    copied(folder / "train.head200.json", tmp_path / "compositional_oneobject/train.json")
    manifest, _ = read_dataset("something-else:oneobject", tmp_path)
    assert (counts(manifest), len(manifest.heads["action"])) == ({"train": 200}, 166)


def test_something_else_numbers_its_classes_by_sorted_names(tmp_path: Path, shared: Shared) -> None:
    """Not by the numbers in its labels file, and so like Something-Something v2."""
    labels = shared("annotations/something-else/compositional/labels.json")
    copied(labels, tmp_path / "compositional/labels.json")
    stored = json.loads(labels.read_text())
    entries = [
        {"id": str(at), "template": name.replace("something", "[something]")}
        for at, name in enumerate(stored)
    ]
    (tmp_path / "compositional/train.json").write_text(json.dumps(entries))
    manifest, _ = read_dataset("something-else", tmp_path)
    ssv2 = json.loads(
        shared("annotations/something-something-v2/something-something-v2-labels.json").read_text()
    )
    found = {manifest.heads["action"][c.labels["action"]]: c.labels["action"] for c in manifest.clips}
    assert found == {name: int(number) for name, number in ssv2.items()}
    assert found != stored


@pytest.mark.parametrize(("version", "number"), [("v1", 339), ("v2", 305)])
def test_moments_in_time_classes_and_names(tmp_path: Path, shared: Shared, version: str, number: int) -> None:
    """Real file names and labels, put into the official layout."""
    folder = shared("annotations/moments-in-time")
    copied(folder / f"category_moments{version}.txt", tmp_path / f"category_moments{version}.txt")
    rows = [
        line.split(",")
        for line in (folder / "avmit_MIT16_validation.head100.csv").read_text().splitlines()[1:]
    ]
    known = (folder / f"category_moments{version}.txt").read_text().splitlines()
    kept = [row for row in rows if row[2] in known]
    (tmp_path / "validationSet.csv").write_text("".join(f"{row[1]},{row[2]},3,0\n" for row in kept))
    manifest, _ = read_dataset(f"mit:{version}", tmp_path)
    assert (len(manifest.heads["action"]), len(manifest)) == (number, len(kept))
    names = {clip.clip_id: manifest.heads["action"][clip.labels["action"]] for clip in manifest.clips}
    assert names == {row[1]: row[2] for row in kept}


def test_ucf101_split_1(tmp_path: Path, shared: Shared) -> None:
    read = load_dataset("ucf101", tmp_path, shared("annotations/ucf101"))
    assert counts(read.manifest) == {"train": 9537, "test": 3783} == read.official
    names = read.manifest.heads["action"]
    assert len(names) == 101
    # the order of classInd.txt is not that of sorted names
    assert [names.index(name) for name in ("Hammering", "HammerThrow", "JumpingJack", "JumpRope")] == [
        34,
        35,
        46,
        47,
    ]
    assert names != sorted(names)
    clip = next(
        c for c in read.manifest.clips if c.clip_id == "HandstandPushups/v_HandStandPushups_g01_c01.avi"
    )
    assert names[clip.labels["action"]] == "HandstandPushups"


def test_hmdb51_splits(tmp_path: Path, shared: Shared) -> None:
    folder = shared("annotations/hmdb51")
    read = load_dataset("hmdb51", tmp_path, folder)
    assert counts(read.manifest) == {"train": 3570, "test": 1530} == read.official
    names = read.manifest.heads["action"]
    assert len(names) == 51
    assert names.index("kick") + 1 == names.index("kick_ball")
    assert {"climb_stairs", "shake_hands"} <= set(names)
    assert sum("[" in clip.video for clip in read.manifest.clips) > 10
    second = load_dataset("hmdb51:2", tmp_path, folder)  # only two of its lists are there
    assert (second.manifest.dataset, counts(second.manifest)) == ("hmdb51:2", {"train": 140, "test": 60})
    assert second.manifest.heads == read.manifest.heads
    assert "lists of 2 classes" in second.files.notes[0]


def test_diving48_vocabulary(tmp_path: Path, shared: Shared) -> None:
    copied(shared("annotations/diving48/Diving48_vocab.json"), tmp_path / "Diving48_vocab.json")
    rows = [
        {"vid_name": f"_8Vy3dlHg2w_{i:05}", "label": i, "start_frame": 0, "end_frame": 149} for i in range(48)
    ]
    (tmp_path / "Diving48_V2_train.json").write_text(json.dumps(rows))
    (tmp_path / "Diving48_V2_test.json").write_text(json.dumps(rows[:1]))
    manifest, _ = read_dataset("diving48", tmp_path)
    assert counts(manifest) == {"train": 48, "test": 1}
    assert manifest.heads["action"][0] == "Back+15som+05Twis+FREE"
    clip = manifest.of_split("test")[0]
    assert (clip.video, clip.start_sec) == ("rgb/_8Vy3dlHg2w_00000.mp4", None)


@pytest.mark.parametrize(
    ("name", "variant", "rows", "labels", "videos"),
    [
        ("mmaction2_video_test_list.txt", "", 2, [0, 0], {"test.mp4"}),
        ("mmaction2_video_test_list_multi_label.txt", ":multi-label", 2, [0, 0], {"test.mp4"}),
        ("mmaction2_rawframe_test_list.txt", ":frames@30", 2, [127, 127], {"imgs::frames@30"}),
        ("mmaction2_rawframe_test_list_with_offset.txt", ":offset@25", 2, [127, 127], {"imgs::frames@25"}),
        ("mmaction2_rawframe_test_list_multi_label.txt", ":frames@30", 2, [1, 3], {"imgs::frames@30"}),
    ],
)
def test_lists_of_mmaction2(
    tmp_path: Path, shared: Shared, name: str, variant: str, rows: int, labels: list[int], videos: set[str]
) -> None:
    path = shared(f"annotations/list-formats/{name}")
    manifest, _ = read_dataset(f"list{variant}", tmp_path, path)
    clips = manifest.clips
    assert (len(clips), [c.labels["action"] for c in clips], {c.video for c in clips}) == (
        rows,
        labels,
        videos,
    )
    assert {clip.split for clip in clips} == {"test"}
    if "frames" in variant:
        assert {(clip.start_sec, clip.end_sec) for clip in clips} == {(0.0, 5 / 30)}
    if "offset" in variant:
        assert {(clip.start_sec, clip.end_sec) for clip in clips} == {(2 / 25, 7 / 25)}


def test_numbers_that_may_mean_two_things_are_asked_for(tmp_path: Path, shared: Shared) -> None:
    path = shared("annotations/list-formats/mmaction2_rawframe_test_list.txt")
    with pytest.raises(
        DataError, match=r"line 1: 2 numbers stand behind 'imgs'\. Say what they are: list:multi-label"
    ):
        read_dataset("list", tmp_path, path)
