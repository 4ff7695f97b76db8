"""A miniature of every benchmark, in the layout people download, through all four commands."""

import json
from pathlib import Path

import pyarrow.parquet as pa_parquet
import pytest
from conftest import write_video
from test_cli import Vivit, vivit

__all__ = ["vivit"]  # the fixture

KINETICS = "label,youtube_id,time_start,time_end,split\n"
SOMETHING = [
    {"id": str(i), "label": "x", "template": template}
    for i, template in enumerate(["Moving [something], up", "[Something] falling"] * 3)
]
EK100 = (
    "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,start_frame,stop_frame,verb_class,noun_class,"
    "all_noun_classes\n"
)


def kinetics(name: str) -> tuple[dict[str, str], list[str]]:
    ids = ["-3caPS4FHFF", "_-wR5jVB-WP", "0wR5jVB-WPk", "xnC3nngvLCo"]
    rows = [f"{'ab'[i % 2]},{youtube},5,15," for i, youtube in enumerate(ids)]
    files = {
        f"{name}/train.csv": KINETICS + "".join(f"{row}train\n" for row in rows[:2]),
        f"{name}/val.csv": KINETICS + "".join(f"{row}validate\n" for row in rows[2:]),
    }
    folders = ["train"] * 2 + ["val"] * 2
    return files, [f"{f}/{'ab'[i % 2]}/{ids[i]}_000005_000015.mp4" for i, f in enumerate(folders)]


CASES: dict[str, tuple[dict[str, str], list[str]]] = {
    "ek100": (
        {
            "EPIC_100_verb_classes.csv": "id,key\n0,take\n1,put\n",
            "EPIC_100_noun_classes.csv": "id,key\n0,tap\n1,cup\n",
            "EPIC_100_train.csv": EK100
            + 'P01_01_0,P01,P01_01,00:00:00.00,00:00:00.40,1,24,1,1,"[1, 0]"\n'
            + "P01_01_1,P01,P01_01,00:00:00.30,00:00:00.80,18,48,0,0,[0]\n",
            "EPIC_100_validation.csv": EK100 + "P01_102_0,P01,P01_102,00:00:00.10,00:00:00.70,5,35,0,1,[1]\n",
        },
        ["P01/videos/P01_01.MP4", "P01/videos/P01_102.MP4"],
    ),
    "k400": kinetics("kinetics400"),
    "k600": kinetics("kinetics600"),
    "k700": kinetics("kinetics700"),
    "ssv2": (
        {
            "labels/labels.json": '{"Moving something, up": "0", "Something falling": "1"}',
            "labels/train.json": json.dumps(SOMETHING[:4]),
            "labels/validation.json": json.dumps(SOMETHING[4:]),
        },
        [f"20bn-something-something-v2/{i}.webm" for i in range(6)],
    ),
    "something-else": (
        {
            "dataset_splits/compositional/labels.json": '{"Moving something, up": 7, "Something falling": 3}',
            "dataset_splits/compositional/train.json": json.dumps(SOMETHING[:4]),
            "dataset_splits/compositional/validation.json": json.dumps(SOMETHING[4:]),
        },
        [f"20bn-something-something-v2/{i}.webm" for i in range(6)],
    ),
    "mit": (
        {
            "moments_categories.txt": "clapping,0\nadult+female+singing,1\n",
            "trainingSet.csv": "clapping/a.mp4,clapping,3,0\nadult+female+singing/b.mp4,adult+female+singing,3,1\n",
            "validationSet.csv": "clapping/c.mp4,clapping,3,0\n",
        },
        ["training/clapping/a.mp4", "training/adult+female+singing/b.mp4", "validation/clapping/c.mp4"],
    ),
    "ucf101": (
        {
            "ucfTrainTestlist/classInd.txt": "1 Hammering\r\n2 HammerThrow\r\n",
            "ucfTrainTestlist/trainlist01.txt": "Hammering/v_Hammering_g08_c01.avi 1\r\n"
            "HammerThrow/v_HammerThrow_g08_c01.avi 2\r\n",
            "ucfTrainTestlist/testlist01.txt": "HammerThrow/v_HammerThrow_g01_c01.avi\r\n",
        },
        [
            "UCF-101/Hammering/v_Hammering_g08_c01.avi",
            "UCF-101/HammerThrow/v_HammerThrow_g08_c01.avi",
            "UCF-101/HammerThrow/v_HammerThrow_g01_c01.avi",
        ],
    ),
    "hmdb51": (
        {
            "splits/brush_hair_test_split1.txt": "a_[_NEW_]_#1.avi 1 \nb.avi 2 \n",
            "splits/kick_test_split1.txt": "c.avi 1 \nd.avi 0 \n",
        },
        ["hmdb51/brush_hair/a_[_NEW_]_#1.avi", "hmdb51/brush_hair/b.avi", "hmdb51/kick/c.avi"],
    ),
    "diving48": (
        {
            "Diving48_vocab.json": json.dumps(
                [["Back", "15som", "05Twis", "FREE"], ["Back", "15som", "15Twis", "FREE"]]
            ),
            "Diving48_V2_train.json": json.dumps(
                [
                    {"vid_name": f"_8Vy3dlHg2w_0000{i}", "label": i % 2, "start_frame": 0, "end_frame": 19}
                    for i in range(2)
                ]
            ),
            "Diving48_V2_test.json": json.dumps(
                [{"vid_name": "0aJWzOGRVcA_00002", "label": 1, "start_frame": 0, "end_frame": 19}]
            ),
        },
        [f"rgb/{name}.mp4" for name in ("_8Vy3dlHg2w_00000", "_8Vy3dlHg2w_00001", "0aJWzOGRVcA_00002")],
    ),
}
SMALL = [
    "--backbone", "test_vit", "--weights", "random", "--num-frames", "4", "--resize", "40", "--crop-size", "32",
    "--test-clips", "1", "--test-crops", "1", "--device", "cpu",
]  # fmt: skip


def written(root: Path, name: str) -> Path:
    """The miniature: its annotation files as they are, and videos of 20 to 25 frames."""
    files, videos = CASES[name]
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(text.encode())
    for at, video in enumerate(videos):
        made = write_video(root / "made.mp4", num_frames=20 + at, seed=at)
        (root / video).parent.mkdir(parents=True, exist_ok=True)
        made.rename(root / video)  # containers are known by their bytes
    return root


@pytest.mark.parametrize("name", CASES)
def test_a_miniature_goes_through_all_commands(vivit: Vivit, tmp_path: Path, name: str) -> None:
    root = written(tmp_path / "data" / name, name)
    prepared = vivit("prepare", name, "--data-root", root)
    assert prepared[0] == 0, prepared[2]
    extracted = vivit(
        "extract", "--dataset", name, "--data-root", root, *SMALL, "--log-json", tmp_path / "log"
    )
    assert extracted[0] == 0, extracted[2]
    begin = json.loads((tmp_path / "log").read_text().splitlines()[0])
    outcomes = pa_parquet.read_table(Path(begin["caches"][0]) / "outcomes.parquet").to_pylist()
    assert {row["outcome"] for row in outcomes} <= {"ok", "short"}
    trained = vivit("train-temporal", "--epochs", 1, "--batch-size", 2, "--device", "cpu")
    assert trained[0] == 0, trained[2]
    splits = {row["split"] for row in outcomes}
    split = "validation" if "validation" in splits else "test"
    scored = vivit("evaluate", "--split", split, "--device", "cpu")
    assert scored[0] == 0, scored[2]
    run = max((tmp_path / "work/runs").glob("*/evaluation"))
    result = json.loads((run / f"{split}.json").read_text())
    heads = {"verb", "noun"} if name == "ek100" else {"action"}
    text = json.dumps(result)
    assert all(head in text for head in heads)
