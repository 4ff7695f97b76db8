"""The readers of data sets by files in the documented layouts: every trap of them, and what is found where."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vivit.pipeline.datasets import load_dataset, read_dataset
from vivit.pipeline.errors import ConfigError, DataError
from vivit.pipeline.manifest import Clip, Manifest


def put(root: Path, files: dict[str, str]) -> Path:
    """Files with these texts below a folder, line ends as given."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


def by_id(manifest: Manifest) -> dict[str, Clip]:
    return {clip.clip_id: clip for clip in manifest.clips}


def class_of(manifest: Manifest, clip_id: str) -> str:
    return manifest.heads["action"][by_id(manifest)[clip_id].labels["action"]]


# Kinetics

TRAIN = (
    "label,youtube_id,time_start,time_end,split,is_cc\n"
    '"passing American football (in game)",-3caPS4FHFF,36,46,train,0\n'
    "massaging person's head,_-wR5jVB-WP,417.0,427.0,train,1\n"
    "abseiling,0wR5jVB-WPk,000005,000015,train,0\n"
)
VAL = (
    "label,youtube_id,time_start,time_end,split\n"
    "abseiling,xnC3nngvLCo,7,17,validate\n"
    "massaging person's head,xnC3nngvLCo,83,93,validate\n"
)


def test_kinetics_ids_may_begin_with_a_dash_and_stand_for_several_clips(tmp_path: Path) -> None:
    videos = [
        "train/passing American football (in game)/-3caPS4FHFF_000036_000046.mp4",
        "train/massaging_person's_head/_-wR5jVB-WP_000417_000427.mkv",
        "val/xnC3nngvLCo_000007_000017.mp4",
        "val/xnC3nngvLCo_000083_000093.webm",
    ]
    put(
        tmp_path,
        dict.fromkeys(videos, "") | {"k/kinetics600/train.csv": TRAIN, "k/kinetics600/validate.csv": VAL},
    )
    manifest, _ = read_dataset("k600", tmp_path)
    assert manifest.heads["action"] == [
        "abseiling",
        "massaging person's head",
        "passing American football (in game)",
    ]
    clips = by_id(manifest)
    assert set(videos) == {c.video for c in manifest.clips if c.clip_id != "0wR5jVB-WPk_000005_000015"}
    assert clips["-3caPS4FHFF_000036_000046"].video == videos[0]
    assert class_of(manifest, "xnC3nngvLCo_000007_000017") == "abseiling"
    assert class_of(manifest, "xnC3nngvLCo_000083_000093") == "massaging person's head"
    assert clips["_-wR5jVB-WP_000417_000427"].source["time_start"] == 417
    assert clips["0wR5jVB-WPk_000005_000015"].video == "train/abseiling/0wR5jVB-WPk_000005_000015.mp4"
    assert all(clip.start_sec is None and clip.end_sec is None for clip in manifest.clips)


def test_kinetics_takes_replacements_before_the_broken_files_and_class_links_before_flat_ones(
    tmp_path: Path,
) -> None:
    name = "0wR5jVB-WPk_000005_000015.mp4"
    put(tmp_path, {"train.csv": TRAIN, f"k400/train/{name}": "", f"k400/val/abseiling/{name}": ""})
    assert by_id(read_dataset("k400", tmp_path)[0])[Path(name).stem].video == f"k400/val/abseiling/{name}"
    put(tmp_path, {f"k400/replacement/replacement_for_corrupted_k400/{name}": ""})
    read = load_dataset("k400", tmp_path)
    assert "replacement_for_corrupted" in by_id(read.manifest)[Path(name).stem].video
    assert len(read.files.repeated_videos) == 1


def test_kinetics_videos_named_by_id_alone_serve_ids_with_one_clip_only(tmp_path: Path) -> None:
    put(tmp_path, {"train.csv": TRAIN, "val.csv": VAL, "xnC3nngvLCo.mp4": "", "-3caPS4FHFF.mp4": ""})
    read = load_dataset("k700", tmp_path)
    clips = by_id(read.manifest)
    assert clips["-3caPS4FHFF_000036_000046"].video == "-3caPS4FHFF.mp4"
    assert clips["xnC3nngvLCo_000007_000017"].video == "val/abseiling/xnC3nngvLCo_000007_000017.mp4"
    assert any("2 clips have only a video named by its YouTube id" in note for note in read.files.notes)


def test_kinetics_700_2020_is_another_data_set(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"a/kinetics700_2020/train.csv": TRAIN, "b/kinetics700/train.csv": TRAIN.replace("417.0", "7")},
    )
    manifest, _ = read_dataset("k700:2020", tmp_path)
    assert manifest.dataset == "k700:2020"
    assert "_-wR5jVB-WP_000417_000427" in by_id(manifest)
    assert "_-wR5jVB-WP_000007_000427" in by_id(read_dataset("k700", tmp_path)[0])


def test_kinetics_json_twins(tmp_path: Path) -> None:
    about = {"annotations": {"label": "abseiling", "segment": [5.0, 15.0]}, "subset": "training"}
    put(tmp_path, {"kinetics-400_train.json": json.dumps({"-bcdefghijk": about})})
    assert class_of(read_dataset("k400", tmp_path)[0], "-bcdefghijk_000005_000015") == "abseiling"


def test_kinetics_does_not_number_classes_by_a_part_of_them(tmp_path: Path) -> None:
    put(tmp_path, {"val.csv": VAL})
    with pytest.raises(
        DataError, match=r"the class ids are not known: .* all 400 labels .* has 2\. Put the training"
    ):
        read_dataset("k400", tmp_path)


def test_rows_that_stand_twice_count_once(tmp_path: Path) -> None:
    put(tmp_path, {"train.csv": TRAIN + TRAIN.splitlines()[3] + "\n"})
    read = load_dataset("k400", tmp_path)
    assert len(read.manifest) == 3
    assert "1 rows stand in the files more than once, for example 0wR5jVB-WPk" in " ".join(read.files.notes)


def test_two_annotation_files_of_one_name_are_refused(tmp_path: Path) -> None:
    put(tmp_path, {"a/train.csv": TRAIN, "b/train.csv": TRAIN})
    with pytest.raises(DataError, match=r"train.csv is there more than once .*a/train.csv and b/train.csv"):
        read_dataset("k400", tmp_path)
    assert len(read_dataset("k400", tmp_path, tmp_path / "b")[0]) == 3


# Something-Something v2 and Something-Else

LABELS = '{\r\n "Moving something, up":"0",\r\n "Something (part) falling":"1",\r\n "Showing it\'s something":"2"\r\n}'
SSV2 = [
    {"id": "74225", "label": "moving cup up", "template": "Moving [something], up", "placeholders": ["cup"]},
    {"id": "5", "label": "x", "template": "[Something] [(part)] falling", "placeholders": []},
    {"id": "6", "label": "y", "template": "Showing it's [something]", "placeholders": []},
]


@pytest.mark.parametrize("name", ["something-something-v2-{}.json", "labels/{}.json"])
def test_ssv2_templates_lose_only_their_brackets(tmp_path: Path, name: str) -> None:
    crlf = json.dumps(SSV2, indent=0).replace("\n", "\r\n")
    answers = "8;Moving something, up\r\n"
    folder = name.rpartition("/")[0] + "/" if "/" in name else ""
    prefix = name.rpartition("/")[2].partition("{")[0]
    put(
        tmp_path,
        {
            name.format("labels"): LABELS,
            name.format("train"): crlf,
            name.format("test"): '[{"id":"8"},{"id":"9"}]',
            f"{folder}{prefix}test-answers.csv": answers,
            "20bn-something-something-v2/5.webm": "",
            "mp4/6.mp4": "",
        },
    )
    manifest, _ = read_dataset("ssv2", tmp_path)
    clips = by_id(manifest)
    assert [clips[i].labels.get("action", -1) for i in ("74225", "5", "6", "8", "9")] == [0, 1, 2, 0, -1]
    assert clips["5"].video == "20bn-something-something-v2/5.webm"
    assert clips["6"].video == "mp4/6.mp4"
    assert clips["74225"].source["caption"] == "moving cup up"


def test_an_unknown_ssv2_template_is_named(tmp_path: Path) -> None:
    put(tmp_path, {"labels.json": LABELS, "train.json": '[{"id": "1", "template": "Eating [something]"}]'})
    with pytest.raises(DataError, match=r"train.json: clip 1 has the template 'Eating something'"):
        read_dataset("ssv2", tmp_path)


def test_something_else_splits_lie_side_by_side(tmp_path: Path) -> None:
    labels = '{"Moving something, up": 7, "Something (part) falling": 3, "Showing it\'s something": 0}'
    folders = "compositional", "compositional_shuffled", "compositional_oneobject"
    for at, folder in enumerate(folders):
        put(tmp_path, {f"code/dataset_splits/{folder}/labels.json": labels})
        put(tmp_path, {f"code/dataset_splits/{folder}/train.json": json.dumps(SSV2[at:])})
    put(tmp_path, {"fewshot/base_labels.json": labels, "fewshot/base_training.json": json.dumps(SSV2[:1])})
    names = ["something-else", "something-else:shuffled", "something-else:oneobject", "something-else:base"]
    manifests = [read_dataset(name, tmp_path)[0] for name in names]
    assert [len(manifest) for manifest in manifests] == [3, 2, 1, 1]
    assert manifests[0].heads["action"] == [
        "Moving something, up",
        "Showing it's something",
        "Something (part) falling",
    ]
    assert class_of(manifests[0], "5") == "Something (part) falling"


# Moments in Time


def test_mit_takes_the_label_column_and_keeps_the_folder_in_the_id(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "moments_categories.txt": "clapping,0\nadult+female+singing,1\n",
            "trainingSet.csv": "clapping/yt-5of6ffo6-Bw_205.mp4,clapping,3,0\n"
            "adult+female+singing/yt-5of6ffo6-Bw_205.mp4,adult+female+singing,3,1\n"
            "clapping/flickr-1_2.mp4,adult+female+singing,2,1\n",
            "training/clapping/yt-5of6ffo6-Bw_205.mp4": "",
            "training/adult+female+singing/yt-5of6ffo6-Bw_205.mp4": "",
        },
    )
    read = load_dataset("mit", tmp_path)
    clips = by_id(read.manifest)
    assert clips["clapping/yt-5of6ffo6-Bw_205.mp4"].video == "training/clapping/yt-5of6ffo6-Bw_205.mp4"
    assert class_of(read.manifest, "clapping/flickr-1_2.mp4") == "adult+female+singing"
    assert clips["clapping/flickr-1_2.mp4"].video == "training/clapping/flickr-1_2.mp4"
    assert any("1 labels differ from their folder" in note for note in read.files.notes)


def test_mit_v2_is_not_read_as_v1(tmp_path: Path) -> None:
    put(tmp_path, {"moments_categories.txt": "".join(f"class{i},{i}\n" for i in range(305))})
    with pytest.raises(DataError, match=r"has 305 categories, so this is v2: ask for mit:v2"):
        read_dataset("mit", tmp_path)


# UCF101, HMDB51, Diving48

UCF = {
    "l/classInd.txt": "1 Hammering\r\n2 HammerThrow\r\n3 HandstandPushups\r\n",
    "l/trainlist02.txt": "Hammering/v_Hammering_g08_c01.avi 1\r\nHammerThrow/v_HammerThrow_g01_c01.avi 2\r\n",
    "l/testlist02.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi\r\n",
}


def test_ucf101_class_order_line_ends_and_spelling(tmp_path: Path) -> None:
    put(tmp_path, UCF | {"UCF-101/HandstandPushups/v_HandstandPushups_g01_c01.avi": ""})
    manifest, _ = read_dataset("ucf101:2", tmp_path)
    assert manifest.dataset == "ucf101:2"
    assert manifest.heads["action"] == ["Hammering", "HammerThrow", "HandstandPushups"]
    assert class_of(manifest, "HammerThrow/v_HammerThrow_g01_c01.avi") == "HammerThrow"
    (test,) = manifest.of_split("test")
    assert test.video == "UCF-101/HandstandPushups/v_HandstandPushups_g01_c01.avi"
    assert test.labels == {"action": 2}


def test_ucf101_lists_that_contradict_the_class_file_are_refused(tmp_path: Path) -> None:
    put(tmp_path, UCF | {"l/trainlist02.txt": "HammerThrow/v_HammerThrow_g01_c01.avi 1\n"})
    with pytest.raises(
        DataError, match=r"trainlist02.txt, line 1: .* has another class number than classInd.txt, 2"
    ):
        read_dataset("ucf101:2", tmp_path)


def test_an_unknown_variant_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown variant ucf101:4: known are ucf101:1 \(official split 1\)"):
        read_dataset("ucf101:4", tmp_path)


def test_hmdb51_names_hold_brackets_and_class_names_underscores(tmp_path: Path) -> None:
    name = "Brushing__[_NEW_]_UPD!!! (#&+;~@)_brush_hair_h_cm_np1_fr_goo_0.avi"
    put(
        tmp_path,
        {
            "splits/brush_hair_test_split1.txt": f"{name} 1 \nb.avi 2 \nc.avi 0 \n",
            "splits/kick_ball_test_split1.txt": "d.avi 1 \r\n",
            "splits/kick_test_split1.txt": "e.avi 2 \n",
            f"hmdb51/brush_hair/{name}": "",
        },
    )
    manifest, _ = read_dataset("hmdb51", tmp_path)
    assert manifest.heads["action"] == ["brush_hair", "kick", "kick_ball"]
    assert by_id(manifest)[f"brush_hair/{name}"].video == f"hmdb51/brush_hair/{name}"
    assert {
        (c.clip_id, c.split) for c in manifest.clips if "avi" in c.clip_id[-6:] and c.clip_id[-6] == "/"
    } == {
        ("brush_hair/b.avi", "test"),
        ("kick_ball/d.avi", "train"),
        ("kick/e.avi", "test"),
    }


def test_diving48_version_1_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"Diving48_train.json": "[]", "Diving48_vocab.json": "[]"})
    with pytest.raises(DataError, match=r"Diving48_train.json is version 1 .* put Diving48_V2_train.json"):
        read_dataset("diving48", tmp_path)


# EPIC-KITCHENS-100

EK100 = {
    "EPIC_100_verb_classes.csv": "id,key\n0,take\n1,put",
    "EPIC_100_noun_classes.csv": "id,key\n0,tap\n1,cup",
    "EPIC_100_train.csv": "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "verb_class,noun_class,all_noun_classes\r\n"
    'P01_01_0,P01,P01_01,00:00:01.56,00:00:02.45,93,147,1,1,"[1, 0]"\r\n'
    "P01_101_0,P01,P01_101,00:00:00.00,00:00:00.1,1,5,0,0,[0]\r\n",
}


def test_ek100_mp4_is_cut_by_seconds_and_frames_by_numbers(tmp_path: Path) -> None:
    put(tmp_path, EK100 | {"P01/videos/P01_01.MP4": "", "P01/rgb_frames/P01_01.tar": ""})
    put(tmp_path, {"P01/rgb_frames/P01_101/frame_0000000001.jpg": ""})
    read = load_dataset("ek100", tmp_path)
    first = by_id(read.manifest)["P01_01_0"]
    assert (first.video, first.start_sec, first.end_sec) == ("P01/videos/P01_01.MP4", 1.56, 2.45)
    assert first.source["all_noun_classes"] == "[1, 0]"
    assert read.files.taken["videos"] == "1 of 2 as video files, cut by seconds"
    frames = by_id(read_dataset("ek100:frames", tmp_path)[0])
    old, new = frames["P01_01_0"], frames["P01_101_0"]
    assert (old.video, old.start_sec, old.end_sec) == (
        "P01/rgb_frames/P01_01.tar::frames@60",
        92 / 60,
        146 / 60,
    )
    assert (new.video, new.start_sec, new.end_sec) == ("P01/rgb_frames/P01_101::frames@50", 0.0, 4 / 50)


def test_ek100_with_frames_only_uses_them(tmp_path: Path) -> None:
    put(
        tmp_path,
        EK100 | {"frames/P01_01/frame_0000000001.jpg": "", "frames/P01_101/frame_0000000001.jpg": ""},
    )
    assert {c.video for c in read_dataset("ek100", tmp_path)[0].clips} == {
        "frames/P01_01::frames@60",
        "frames/P01_101::frames@50",
    }


def test_annotations_below_the_data_root_are_found_and_named(tmp_path: Path) -> None:
    put(tmp_path, {f"some/where/{name}": text for name, text in EK100.items()})
    read = load_dataset("ek100", tmp_path)
    assert read.files.taken["EPIC_100_train.csv"] == str(tmp_path / "some/where/EPIC_100_train.csv")
    assert set(read.manifest.sources) == set(EK100)


@pytest.mark.parametrize(
    "name", ["ek100", "k400", "k600", "k700", "ssv2", "mit", "something-else", "ucf101", "hmdb51"]
)
def test_a_folder_without_annotations_says_what_was_looked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        DataError, match=rf"no .*: .* is not in or below {tmp_path}\. Pass --annotations FOLDER"
    ):
        read_dataset(name, tmp_path)


# Lists


LISTS: dict[str, tuple[str, str, list[tuple[str, str, str | None]]]] = {
    "videomae": (
        "train.csv",
        "a b/1.mp4  1\nc.mp4 0\n",
        [("a b/1.mp4", "train", "1"), ("c.mp4", "train", "0")],
    ),
    "slowfast": (
        "val.csv",
        "a/1.mp4,1\nc.mp4,0\n",
        [("a/1.mp4", "validation", "1"), ("c.mp4", "validation", "0")],
    ),
    "v-jepa": ("train_1.csv", "a 1.mp4::1\n", [("a 1.mp4", "train", "1")]),
    "comma in a path": ("train.csv", "a, b.mp4 1\n", [("a, b.mp4", "train", "1")]),
    "path-only": ("test.txt", "a 1.mp4\nb.mp4\n", [("a 1.mp4", "test", None), ("b.mp4", "test", None)]),
    "names": (
        "train.txt",
        "a.mp4 run\nb.mp4 walk\n",
        [("a.mp4", "train", "run"), ("b.mp4", "train", "walk")],
    ),
    "tabs": ("train.tsv", "a b.mp4\t1\r\n", [("a b.mp4", "train", "1")]),
    "dmvr": (
        "test.csv",
        'video_path,start,end,label,caption\n"a,1.mp4",0.5,2.0,run,"x, y"\n',
        [("a,1.mp4", "test", "run")],
    ),
    "own": ("clips.csv", "id,path,label,split\nz,a.mp4,3,val\n", [("a.mp4", "validation", "3")]),
    "no-label": ("train.txt", "a.mp4 -1\n", [("a.mp4", "train", None)]),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_of_other_tool_boxes(tmp_path: Path, case: str) -> None:
    name, text, wanted = LISTS[case]
    put(tmp_path, {name: text})
    manifest, _ = read_dataset("list", tmp_path, tmp_path / name)
    names = manifest.heads.get("action", [])
    found = [
        (c.video, c.split, names[c.labels["action"]] if c.labels.get("action", -1) >= 0 else None)
        for c in manifest.clips
    ]
    assert sorted(found, key=str) == sorted(wanted, key=str)


def test_dmvr_rows_are_cut_by_seconds(tmp_path: Path) -> None:
    put(tmp_path, {"train.csv": "video_path,start,end,label\na.mp4,0.5,2,run\na.mp4,2,3.5,walk\n"})
    clips = read_dataset("list", tmp_path, tmp_path / "train.csv")[0].clips
    assert [(c.clip_id, c.start_sec, c.end_sec) for c in clips] == [
        ("a_0.5_2", 0.5, 2.0),
        ("a_2_3.5", 2.0, 3.5),
    ]


def test_slowfast_frame_lists_are_one_clip_a_folder(tmp_path: Path) -> None:
    rows = "".join(f'7 0 {i} v/7/7_{i + 1:06}.jpg "1,2"\n' for i in range(60))
    put(tmp_path, {"train.csv": "original_vido_id video_id frame_id path labels\n" + rows})
    read = load_dataset("list:frames@30", tmp_path, [tmp_path / "train.csv"])
    (clip,) = read.manifest.clips
    assert (clip.clip_id, clip.video, clip.end_sec) == ("7", "v/7::frames@30", 2.0)
    assert (clip.labels["action"], clip.source["labels"]) == (1, "1 2")
    assert any("1 clips have several labels" in note for note in read.files.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 1\nb.mp4\n", r"line 2: 'b.mp4' has 0 values behind the name, line 1 has 1 value: all lines"),
        ("a.mp4\nb.mp4 1\n", r"line 2: 'b.mp4 1' has 1 value behind the name, line 1 has 0 values"),
        ("a.mp4 run\nb.mp4 2\n", r"line 2: 'b.mp4 2' has 0 values"),
        ("a.mp4 1\nb.mp4 1 2\n", r"line 2: .* has 2 values behind the name"),
        ("d 30 1\n", r"line 1: 2 numbers stand behind 'd'\. Say what they are"),
        ("path,label\na.mp4\n", r"line 2: 1 fields, but the header names 2: path, label"),
        ("path,label\na.mp4,1\nb.mp4,run\n", r"some labels are numbers \(1\), others names \('run'\)"),
        ("path,split\na.mp4,holdout\n", r"line 2: the split 'holdout' is not train, val or test"),
        ("path,start\na.mp4,x\n", r"line 2: a time is not in seconds"),
        ("\n", r"has no lines"),
    ],
)
def test_mixed_lists_are_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path, {"train.txt": text})
    with pytest.raises(DataError, match=message):
        read_dataset("list", tmp_path, tmp_path / "train.txt")


def test_the_rate_of_frames_must_be_said(tmp_path: Path) -> None:
    put(tmp_path, {"train.txt": "d 30 1\n"})
    with pytest.raises(DataError, match=r"the rate of the frames is not known: pass list:frames@30"):
        read_dataset("list:frames", tmp_path, tmp_path / "train.txt")
    with pytest.raises(DataError, match=r"list:frames@x: 'x' is not a number"):
        read_dataset("list:frames@x", tmp_path, tmp_path / "train.txt")


# Data sets of others


def test_another_package_adds_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(
        tmp_path / "site",
        {
            "their_reader.py": "from vivit.pipeline.datasets import Dataset\n"
            "from vivit.pipeline.manifest import Clip\n"
            "def read(files):\n"
            "    path = files.need('clips.txt', what='their clips')\n"
            "    names = path.read_text().split()\n"
            "    return files.manifest([Clip(clip_id=n, split='train', video=files.videos.find(n) or n) for n in names], {})\n"
            "THEIRS = Dataset(name='theirs', read=read, official={'': {'train': 2}})\n"
            "WRONG = 7\n",
            "theirs-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n",
            "theirs-1.0.dist-info/entry_points.txt": "[vivit.datasets]\ntheirs = their_reader:THEIRS\n"
            "wrong = their_reader:WRONG\nbroken = their_reader:NONE\n",
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    root = put(tmp_path / "data", {"clips.txt": "a b", "deep/a.mp4": ""})
    read = load_dataset("theirs", root)
    assert [clip.video for clip in read.manifest.clips] == ["b", "deep/a.mp4"]
    assert read.official == {"train": 2}
    with pytest.raises(DataError, match=r"the data set wrong of theirs .* is a int, not a vivit"):
        load_dataset("wrong", root)
    with pytest.raises(
        DataError, match=r"the data set broken of theirs \(their_reader:NONE\) cannot be loaded"
    ):
        load_dataset("broken", root)
    with pytest.raises(ConfigError, match=r"did you mean theirs\?"):
        load_dataset("their", root)
    sys.modules.pop("their_reader")


@pytest.mark.slow
def test_300_000_rows_are_prepared_in_a_minute_and_two_gigabytes(tmp_path: Path) -> None:
    """As large as Kinetics-700, with all its files; in a process of its own, whose memory is measured."""
    rows = [(f"class {i % 700}", f"{i:011d}", i % 600) for i in range(300_000)]
    header = "label,youtube_id,time_start,time_end,split\n"
    lines = "".join(f"{label},{name},{start},{start + 10},train\n" for label, name, start in rows)
    put(tmp_path, {"kinetics-700_train.csv": header + lines})
    for label, name, start in rows:
        folder = tmp_path / "train" / label
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / f"{name}_{start:06d}_{start + 10:06d}.mp4", os.O_CREAT | os.O_WRONLY))
    code = (
        "import pathlib, time\n"
        "from vivit import cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit as stopped:\n    assert not stopped.code, stopped.code\n"
        # not ru_maxrss, which begins with the memory of the process that started this one
        "[peak] = [l for l in pathlib.Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')]\n"
        "print('measured', time.process_time(), int(peak.split()[1]) / 1e6)\n"
    )
    call = [
        "prepare",
        "k700",
        "--data-root",
        str(tmp_path),
        "--no-probe",
        "--workdir",
        str(tmp_path / "work"),
    ]
    done = subprocess.run([sys.executable, "-c", code, *call], capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, done.stdout.rpartition("measured")[2].split())
    assert seconds < 60
    assert gigabytes < 2
