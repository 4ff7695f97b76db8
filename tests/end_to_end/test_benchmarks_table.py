"""A miniature of every benchmark, in the layout that people download, through prepare, extract, train and evaluate."""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import write_video

from vivit import cli

SMALL = [
    "--backbone", "test_vit", "--weights", "random", "--num-frames", "4", "--stride", "2", "--resize", "40",
    "--crop-size", "32", "--train-views", "1", "--test-clips", "2", "--test-crops", "1", "--device", "cpu",
]  # fmt: skip
SHORT = ["--epochs", "1", "--depth", "1", "--batch-size", "4", "--device", "cpu"]


@dataclass(frozen=True)
class Miniature:
    """Annotation files by name, and the videos that they speak of."""

    texts: dict[str, str]
    videos: list[str] = field(default_factory=list)
    split: str = "validation"
    """The one that is scored."""
    heads: tuple[str, ...] = ("action",)


def kinetics(number: int) -> Miniature:
    rows = [("abseiling", "-aaaaaaaaaa"), ("air drumming", "_bbbbbbbbbb")]
    lines = [f"{label},{name},5,15," for label, name in rows]
    return Miniature(
        texts={
            f"annotations/kinetics-{number}_{word}.csv": "label,youtube_id,time_start,time_end,split\n"
            + "".join(f"{line}{word}\n" for line in lines)
            for word in ("train", "val")
        },
        videos=[
            f"{word}/{label}/{name}_000005_000015.mp4" for word in ("train", "val") for label, name in rows
        ],
    )


def something(prefix: str, labels: str) -> Miniature:
    names = ["Moving something up", "Spinning something"]
    entries = [
        {"id": str(at), "template": name.replace("something", "[something]")} for at, name in enumerate(names)
    ]
    return Miniature(
        texts={
            labels: json.dumps({name: str(at) for at, name in enumerate(names)}),
            f"{prefix}train.json": json.dumps(entries),
            f"{prefix}validation.json": json.dumps([{**entry, "id": "1" + entry["id"]} for entry in entries]),
        },
        videos=[f"20bn-something-something-v2/{name}.mp4" for name in ("0", "1", "10", "11")],
    )


EK100 = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,start_frame,stop_frame,verb_class,noun_class\n"
DIVES = [{"vid_name": "a_00000", "label": 0}, {"vid_name": "b_00000", "label": 1}]
MINIATURES = {
    "ek100": Miniature(
        texts={
            "EPIC_100_verb_classes.csv": "id,key\n0,take\n1,put\n",
            "EPIC_100_noun_classes.csv": "id,key\n0,tap\n1,cup\n",
            "EPIC_100_train.csv": EK100 + "P01_01_0,P01,P01_01,00:00:00.00,00:00:00.50,1,30,1,0\n"
            "P01_01_1,P01,P01_01,00:00:00.40,00:00:00.90,24,54,0,1\n",
            "EPIC_100_validation.csv": EK100 + "P01_02_0,P01,P01_02,00:00:00.10,00:00:00.80,6,48,1,0\n",
        },
        videos=["P01/videos/P01_01.MP4", "P01/videos/P01_02.MP4"],
        heads=("verb", "noun"),
    ),
    "k400": kinetics(400),
    "k600": kinetics(600),
    "k700": kinetics(700),
    "ssv2": something("something-something-v2-", "something-something-v2-labels.json"),
    "something-else": something("compositional/", "compositional/labels.json"),
    "mit": Miniature(
        texts={
            "moments_categories.txt": "clapping,0\nadult+male+singing,1\n",
            "trainingSet.csv": "clapping/a.mp4,clapping,3,0\nadult+male+singing/a.mp4,adult+male+singing,3,1\n",
            "validationSet.csv": "clapping/b.mp4,clapping,3,0\n",
        },
        videos=["training/clapping/a.mp4", "training/adult+male+singing/a.mp4", "validation/clapping/b.mp4"],
    ),
    "ucf101:2": Miniature(
        texts={
            "classInd.txt": "1 Hammering\r\n2 HammerThrow\r\n",
            "trainlist02.txt": "Hammering/v_Hammering_g01_c01.avi 1\r\nHammerThrow/v_HammerThrow_g01_c01.avi 2\r\n",
            "testlist02.txt": "HammerThrow/v_HammerThrow_g02_c01.avi\r\n",
        },
        videos=[
            "UCF-101/Hammering/v_Hammering_g01_c01.mp4",
            "UCF-101/HammerThrow/v_HammerThrow_g01_c01.mp4",
            "UCF-101/HammerThrow/v_HammerThrow_g02_c01.mp4",
        ],
        split="test",
    ),
    "hmdb51": Miniature(
        texts={
            "kick_test_split1.txt": "[a]!.avi 1 \nb.avi 2 \n",
            "kick_ball_test_split1.txt": "c (#&).avi 1 \n",
        },
        videos=["kick/[a]!.mp4", "kick/b.mp4", "kick_ball/c (#&).mp4"],
        split="test",
    ),
    "diving48": Miniature(
        texts={
            "Diving48_vocab.json": '[["Back", "15som", "05Twis", "FREE"], ["Back", "15som", "15Twis", "FREE"]]',
            "Diving48_V2_train.json": json.dumps(DIVES),
            "Diving48_V2_test.json": json.dumps([{"vid_name": "c_00000", "label": 1}]),
        },
        videos=["rgb/a_00000.mp4", "rgb/b_00000.mp4", "rgb/c_00000.mp4"],
        split="test",
    ),
}


@pytest.fixture
def _process_as_before() -> Iterator[None]:
    """What the command line changes for the whole process is put back."""
    handler, level = signal.getsignal(signal.SIGTERM), logging.getLogger("vivit").level
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger("vivit").setLevel(level)


def vivit(*args: object) -> int:
    """The exit code of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vivit", *map(str, args)])
        try:
            cli.main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0


@pytest.mark.usefixtures("_process_as_before")
@pytest.mark.parametrize("name", MINIATURES)
def test_every_benchmark_goes_from_its_official_files_to_a_score(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    miniature, root = MINIATURES[name], tmp_path / "data"
    for file, text in miniature.texts.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(text.encode())
    video = write_video(tmp_path / "video.mp4", num_frames=25)
    for file in miniature.videos:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        os.link(video, root / file)
    monkeypatch.setenv("VIVIT_WORKDIR", str(tmp_path / "work"))
    assert vivit("prepare", name, "--data-root", root) == 0
    assert vivit("extract", "--dataset", name, "--data-root", root, *SMALL) == 0
    assert vivit("train-temporal", *SHORT) == 0
    assert vivit("evaluate", "--split", miniature.split, "--device", "cpu") == 0
    assert "error" not in capsys.readouterr().err
    (scores,) = (tmp_path / "work/runs").glob(f"*/evaluation/{miniature.split}.json")
    found = json.loads(scores.read_text())
    assert set(miniature.heads) <= set(found["scores"])
