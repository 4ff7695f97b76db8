import json
import logging
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from conftest import write_video

from vivit import cli

SMALL = [
    "--backbone", "vit_ti16", "--weights", "random", "--num-frames", "4", "--stride", "3", "--resize", "40",
    "--crop-size", "32", "--test-clips", "2", "--test-crops", "1", "--device", "cpu", "--block-size", "4",
]  # fmt: skip

Vivit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vivit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Vivit]:
    """`vivit(*args)` as on the command line, with a fresh work folder: (exit code, stdout, stderr)."""
    monkeypatch.setenv("VIVIT_WORKDIR", str(tmp_path / "work"))
    monkeypatch.setenv("COLUMNS", "120")
    handler = signal.getsignal(signal.SIGTERM)
    level = logging.getLogger("vivit").level

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vivit", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger("vivit").setLevel(level)


def commands() -> list[str]:
    return sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_help_loads_nothing_heavy() -> None:
    heavy = {"torch", "timm", "numpy", "ray", "zarr", "pyarrow", "av", "PIL"}
    code = f"import sys, vivit.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help_with_an_example(vivit: Vivit, command: str) -> None:
    code, out, _ = vivit(command, "--help")
    assert code == 0
    assert "Example" in out
    assert f"vivit {command}" in out


RENAMED = {"heads": "num_heads", "clip_timeout": "clip_timeout_sec"}


NO_CONSTANTS = (
    "one per",
    "off",
    "never",
    "VIVIT",
    "all",
    "those of",
    "a quarter",
    "the backbone's",
    "as trained",
    "the newest",
    "spans",
    "256 of a cache",
    "one per GPU",
)


@pytest.mark.parametrize("command", ["extract", "pretrain", "train-temporal", "evaluate"])
def test_the_defaults_in_the_help_are_those_of_the_classes(command: str) -> None:
    from vivit.end_to_end.config import WARM_UP_FRAMES, PretrainConfig
    from vivit.pipeline.views import ViewSpec
    from vivit.stage1_extract.config import ExtractConfig
    from vivit.stage2_temporal.config import TrainConfig
    from vivit.stage2_temporal.evaluate import EvaluateConfig

    class WarmUp:
        num_frames = WARM_UP_FRAMES

    classes = {
        "extract": [ExtractConfig, ViewSpec],
        "pretrain": [PretrainConfig, WarmUp, ViewSpec],
        "train-temporal": [TrainConfig],
        "evaluate": [EvaluateConfig],
    }[command]
    checked = 0
    for option in typer.main.get_command(cli.app).commands[command].params:  # type: ignore[attr-defined]
        stated = re.search(r"Default: (.+?)\.\[/\]", getattr(option, "help", "") or "")
        name = RENAMED.get(option.name, option.name)
        owner = next((c for c in classes if hasattr(c, name)), None)
        if stated and owner is not None and not stated[1].startswith(NO_CONSTANTS):
            default = getattr(owner, name)
            assert stated[1] == (f"{default:g}" if isinstance(default, float) else str(default)), option.name
            checked += 1
    assert checked >= 2


def test_the_whole_job_from_videos_to_accuracy(vivit: Vivit, video_folder: Path, tmp_path: Path) -> None:
    code, out, err = vivit("extract", "--dataset", "folder", "--data-root", video_folder, *SMALL)
    assert (code, err.count("Traceback")) == (0, 0)
    assert "11 clips" in out
    code, out, _ = vivit("train-temporal", "--epochs", "3", "--depth", "1", "--batch-size", "4")
    assert code == 0
    assert f"newest cache: {tmp_path / 'work/caches/folder-vit_ti16.zarr'}" in out
    code, out, _ = vivit("evaluate")
    assert code == 0
    assert f"newest run: {tmp_path / 'work/runs'}" in out
    assert "validation: 4 of 4 clips, 2 views (logits averaged)" in out
    (written,) = (tmp_path / "work/runs").glob("*/evaluation/validation.json")
    assert json.loads(written.read_text())["coverage"]["num_evaluated"] == 4


def test_the_same_training_command_goes_on_in_the_same_run(
    vivit: Vivit, video_folder: Path, tmp_path: Path
) -> None:
    vivit("extract", "--dataset", "folder", "--data-root", video_folder, *SMALL)
    for _ in range(2):
        assert vivit("train-temporal", "--epochs", "3", "--depth", "1")[0] == 0
    assert len(list((tmp_path / "work/runs").iterdir())) == 1
    vivit("train-temporal", "--epochs", "3", "--depth", "1", "--seed", "1")
    assert len(list((tmp_path / "work/runs").iterdir())) == 2


def test_videos_are_packed_into_tars_and_extracted_from_them(
    vivit: Vivit, video_folder: Path, tmp_path: Path
) -> None:
    rows = ["clip_id,split,video", "a,test,train/a/clip0.mp4", "b,test,gone.mp4"]
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    packed = tmp_path / "packed"
    code, out, err = vivit(
        "pack", "--manifest", tmp_path / "m.csv", "--data-root", video_folder, "--out", packed
    )
    assert (code, err.count("Traceback")) == (3, 0)
    assert "missing: gone.mp4 (1 clips): no such file" in err
    assert "1 videos with 1 clips" in out
    code, out, err = vivit("extract", "--manifest", packed / "manifest.parquet", *SMALL)
    assert code == 3
    assert "missing: b (test): no such member: b.mp4 in" in err
    code, out, _ = vivit("prepare", "webdataset", "--data-root", packed)
    assert (code, "test" in out) == (0, True)


def test_failed_clips_give_exit_code_3_and_are_listed(
    vivit: Vivit, video_folder: Path, tmp_path: Path
) -> None:
    rows = ["clip_id,split,video", "a,test,train/a/clip0.mp4", "b,test,gone.mp4"]
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    code, out, err = vivit("extract", "--manifest", tmp_path / "m.csv", "--data-root", video_folder, *SMALL)
    assert code == 3
    assert "missing: b (test)" in err
    assert "2 clips" in out


def test_prepare_lists_what_is_missing(vivit: Vivit, tmp_path: Path, shared: Callable[[str], Path]) -> None:
    annotations = shared("annotations/epic-kitchens-100")
    call = ["prepare", "ek100", "--data-root", tmp_path / "data", "--annotations", annotations]
    (tmp_path / "data").mkdir()
    code, _, err = vivit(*call)
    assert (code, "none of the 138 videos of ek100 is below" in err) == (1, True)
    assert "looked for P01/videos/P01_11.MP4" in err
    write_video(tmp_path / "data/P01/videos/P01_11.MP4", num_frames=50)
    code, out, _ = vivit(*call, "--probe", "2")
    assert code == 3
    assert "9,668" in out
    assert "137 videos are missing" in out
    manifests = tmp_path / "work/manifests"
    assert (manifests / "ek100.parquet").exists()
    report = json.loads((manifests / "ek100.report.json").read_text())
    assert report["splits"]["validation"]["official"] == report["splits"]["validation"]["clips"] == 9668
    assert (manifests / "ek100.report.txt").read_text().count("\n") > 400  # the clips of each verb and noun
    assert vivit(*call, "--probe", "2", "--no-probe")[0] == 2


PACK = ["pack", "--dataset", "folder"]


def bad_calls(video_folder: Path) -> dict[str, tuple[list[object], int, str]]:
    """Case -> (arguments, exit code, what the error must say)."""
    folder = ["extract", "--dataset", "folder", "--data-root", video_folder]
    return {
        "no data root": (["extract", "--dataset", "ek100"], 1, "Pass --data-root"),
        "pack into other shards": (
            [*PACK, "--data-root", video_folder, "--out", "memory://x", "--resize", "33"],
            2,
            "resize must be an even",
        ),
        "unknown storage": (
            [*PACK, "--data-root", "ftp://x/y", "--out", "p"],
            2,
            "ftp:// is not a kind of storage",
        ),
        "files by URL": ([*PACK, "--data-root", "memory://x/y", "--out", "p"], 1, "cannot be listed"),
        "no tars": (["prepare", "webdataset", "--data-root", video_folder], 1, "no tars in"),
        "wrong data set": (["extract", "--dataset", "ek10"], 2, "did you mean ek100?"),
        "no data set": (["extract"], 2, "pass either --dataset"),
        "wrong backbone": ([*folder, *SMALL, "--backbone", "vit_s61"], 2, "did you mean vit_s16?"),
        "no weights": ([*folder, *SMALL, "--weights", "none.pth"], 1, "weights none.pth do not exist"),
        "bad view": ([*folder, *SMALL, "--crop-size", "99"], 2, "crop_size 99 does not fit in resize 40"),
        "no cache": (["train-temporal"], 1, "run `vivit extract` first"),
        "no run": (["evaluate"], 1, "run `vivit train-temporal` first"),
        "cache that is none": (["train-temporal", "--cache", video_folder], 1, "not a feature cache"),
        "run that is none": (["evaluate", "--run", video_folder], 1, "is not a run"),
        "Ray": ([*folder, *SMALL, "--workers", "0", "--address", "auto"], 2, "workers 0 is this process"),
        "work folder below a file": (
            [*folder, *SMALL, "--workdir", video_folder / "train/a/clip0.mp4"],
            1,
            "not a folder",
        ),
    }


@pytest.mark.parametrize("case", bad_calls(Path()))
def test_a_mistake_is_one_error_with_the_remedy(
    vivit: Vivit, video_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, wanted, text = bad_calls(video_folder)[case]
    code, _, err = vivit(*arguments)
    assert code == wanted, err
    assert text in err
    assert "Traceback" not in err
    assert sum(line.startswith("error:") for line in err.splitlines()) == 1


@pytest.fixture
def extracted(vivit: Vivit, video_folder: Path, tmp_path: Path) -> Path:
    vivit("extract", "--dataset", "folder", "--data-root", video_folder, *SMALL)
    return tmp_path / "work/caches/folder-vit_ti16.zarr"


def test_an_incomplete_cache_is_refused_until_told_otherwise(vivit: Vivit, extracted: Path) -> None:
    (extracted / "ledger/train/000001.json").unlink()
    code, _, err = vivit("train-temporal", "--epochs", "3")
    assert code == 1
    assert "train lacks 1 of 2 blocks" in err
    assert vivit("train-temporal", "--epochs", "3", "--depth", "1", "--allow-partial")[0] == 0


def test_other_settings_are_refused_with_the_difference(
    vivit: Vivit, extracted: Path, video_folder: Path
) -> None:
    code, _, err = vivit("extract", "--dataset", "folder", "--data-root", video_folder, *SMALL, "--seed", "3")
    assert code == 1
    assert "seed: 3 asked for, 0 in the cache" in err


def test_a_damaged_checkpoint_is_refused(vivit: Vivit, extracted: Path, tmp_path: Path) -> None:
    vivit("train-temporal", "--epochs", "3", "--depth", "1")
    (weights,) = (tmp_path / "work/runs").glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-7])
    code, _, err = vivit("evaluate")
    assert code == 1
    assert "model.safetensors" in err
    assert "Traceback" not in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_error(vivit: Vivit, video_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = vivit(
        "extract",
        "--dataset",
        "folder",
        "--data-root",
        video_folder,
        *SMALL,
        "--workdir",
        tmp_path / "locked/w",
    )
    assert code == 1
    assert "no permission to write" in err


WARM_UP = [
    "--backbone", "test_vit", "--weights", "random", "--num-frames", "4", "--stride", "3", "--resize", "40",
    "--crop-size", "32", "--depth", "1", "--epochs", "2", "--batch-size", "4", "--device", "cpu",
]  # fmt: skip


def test_the_papers_method_in_four_commands(
    vivit: Vivit, video_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = ["--dataset", "folder", "--data-root", video_folder]
    code, out, err = vivit("pretrain", *data, *WARM_UP, "--run", "warm-up")
    assert (code, "best epoch: top1/action" in out) == (0, True)
    assert "next: vivit extract --backbone warm-up ..., then vivit train-temporal --init warm-up" in out
    assert "trained parameters: " in caplog.text
    code, out, err = vivit(
        "extract", *data, "--backbone", "warm-up", "--num-frames", "8", "--test-crops", "1", "--device", "cpu"
    )
    assert code == 0, err
    assert "crops as in" in out
    code, _, err = vivit("train-temporal", "--init", "warm-up", "--epochs", "1", "--device", "cpu")
    assert code == 0, err
    assert "interpolated from 4 to 8 time steps" in caplog.text
    code, out, _ = vivit("evaluate", "--device", "cpu")
    assert (code, "validation: 4 of 4 clips, 4 views" in out) == (0, True)
    code, out, _ = vivit("evaluate", "--run", "warm-up", "--test-crops", "1", "--device", "cpu")
    assert (code, "validation: 4 of 4 clips, 4 views" in out) == (0, True)
    code, out, _ = vivit("evaluate", *data, "--test-clips", "1", "--test-crops", "1", "--device", "cpu")
    assert (code, "validation: 4 of 4 clips, 1 views" in out) == (0, True)
    code, out, _ = vivit("predict", video_folder / "val/b/clip7.mp4", "--top", "1", "--json")
    (guess,) = json.loads(out)["guesses"]["action"]
    assert (code, guess["name"] in "ab") == (0, True)
    vivit("pack", *data, "--out", tmp_path / "packed")
    member = f"{tmp_path / 'packed/validation-000000.tar'}::val_b_clip7.mp4"
    code, out, _ = vivit("predict", member, "--top", "1", "--json")
    assert (code, json.loads(out)["guesses"]["action"]) == (0, [guess])


def test_published_weights_serve_every_command(
    vivit: Vivit,
    shared: Callable[[str], Path],
    video_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = shared("golden/scenic_fe_i_checkpoint")
    code, out, _ = vivit(
        "import-weights", file, "--output", tmp_path / "fe.safetensors", "--heads", "noun=7,verb=4"
    )
    assert code == 0
    assert "Scenic checkpoint scenic_fe_i_checkpoint, step 1234" in out
    model = tmp_path / "fe.safetensors"
    code, out, _ = vivit("predict", video_folder / "val/b/clip7.mp4", "--run", model, "--top", "1", "--json")
    assert (code, set(json.loads(out)["guesses"])) == (0, {"noun", "verb", "action"})
    small = ["--test-clips", "1", "--test-crops", "1", "--device", "cpu"]
    code, _, err = vivit(
        "extract",
        "--dataset",
        "folder",
        "--data-root",
        video_folder,
        "--backbone",
        model,
        "--num-frames",
        "8",
        *small,
    )
    assert code == 0, err
    code, _, err = vivit("train-temporal", "--init", model, "--epochs", "1", "--device", "cpu")
    assert code == 0, err
    assert "fe.safetensors: temporal.blocks.0" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(["pretrain", "--model", "fee"], 2, "unknown model 'fee': did you mean fe?", id="model"),
        pytest.param(
            ["pretrain", "--tubelet", "3"], 2, "num_frames 8 is not a multiple of the tubelet 3", id="tubelet"
        ),
        pytest.param(
            ["pretrain", "--model", "joint", "--freeze", "spatial"], 2, "needs the two halves", id="freeze"
        ),
        pytest.param(
            ["pretrain", "--init", "nothing"], 1, "no file or folder of that name exists", id="init"
        ),
        pytest.param(
            ["extract", "--backbone", "./nothing.safetensors"],
            1,
            "nothing.safetensors does not exist",
            id="backbone",
        ),
    ],
)
def test_mistakes_of_the_papers_method_are_one_line(
    vivit: Vivit, video_folder: Path, arguments: list[str], code: int, message: str
) -> None:
    small = ["--weights", "random", "--resize", "40", "--crop-size", "32", "--device", "cpu"]
    backbone = [] if "--backbone" in arguments else ["--backbone", "test_vit", *small]
    found, _, err = vivit(*arguments, "--dataset", "folder", "--data-root", video_folder, *backbone)
    assert (found, err.count("Traceback")) == (code, 0)
    assert message in err


def test_an_import_that_makes_no_sense_is_one_line(vivit: Vivit, tmp_path: Path) -> None:
    text = tmp_path / "weights.pth"
    text.write_text("no weights")
    for arguments in (["import-weights", text], ["import-weights", text, "--heads", "noun"]):
        code, _, err = vivit(*arguments)
        assert (code in (1, 2), err.count("Traceback"), err.startswith("error: ")) == (True, 0, True)


def test_verify_says_whole_or_what_is_wrong_and_how_to_go_on(
    vivit: Vivit, extracted: Path, video_folder: Path
) -> None:
    code, out, err = vivit("verify", "--sample", "2", "--data-root", video_folder, "--device", "cpu")
    assert (code, err.count("findings")) == (0, 0)
    assert "of 2 clips computed anew 2 are equal bit for bit" in out
    assert "the cache is whole" in out
    shard = extracted / "train/features/c/1/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-3])
    code, out, err = vivit("verify")
    assert code == 1
    assert "train block 1 view 0: train/features/c/1/0/0/0 has" in err
    assert "`vivit verify --repair`" in out
    code, out, _ = vivit("verify", "--repair")
    assert code == 1
    assert "repaired: 1 bad entries were taken out of the ledger; run the same `vivit extract`" in out
    code, out, _ = vivit("verify", "--json")
    assert (code, json.loads(out)["missing"]) == (1, "train lacks 1 of 2 blocks (3 of 7 clips)")
    assert vivit("extract", "--dataset", "folder", "--data-root", video_folder, *SMALL)[0] == 0
    code, out, _ = vivit("verify", "--json")
    assert (code, json.loads(out)["whole"], json.loads(out)["findings"]) == (0, True, [])


def test_views_are_appended_once_however_often_the_command_is_given(
    vivit: Vivit, extracted: Path, video_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vivit")
    command = ["extract", "--dataset", "folder", "--data-root", video_folder, *SMALL]
    code, out, err = vivit(*command, "--views", "4")
    assert (code, "error: --views '4' is not of the form +4" in err) == (2, True)
    code, out, _ = vivit(*command, "--views", "+1")
    assert (code, "training clips have 2 views now" in caplog.text) == (0, True)
    code, out, _ = vivit(*command, "--views", "+1")
    assert (code, "nothing to do" in out) == (0, True)
    assert "none are added (--views +2 would append one more)" in caplog.text
    assert vivit("verify")[0] == 0
    code, _, err = vivit(*command, "--cache", "other", "--views", "+1")
    assert (code, "--train-views 2 makes one with as many views" in err) == (1, True)


@pytest.fixture
def kitchen(vivit: Vivit, video_folder: Path, tmp_path: Path) -> list[object]:
    """A manifest with EPIC-KITCHENS-100's heads and subsets for 7 training and 4 validation clips, extracted."""
    lines = ["clip_id,split,video,label/verb,label/noun,unseen_participant,tail_verb,tail_noun"]
    for index, video in enumerate(sorted(video_folder.rglob("*.mp4"))):
        split = "validation" if "val" in video.parts else "train"
        labels = (96, 299) if index % 2 else (3, 7)
        flags = ["true" if index % n == 0 else "false" for n in (2, 2, 3)]
        lines.append(
            f"n{index},{split},{video.relative_to(video_folder)},{labels[0]},{labels[1]},{','.join(flags)}"
        )
    (tmp_path / "kitchen.csv").write_text("\n".join(lines) + "\n")
    data: list[object] = ["--manifest", tmp_path / "kitchen.csv", "--data-root", video_folder]
    assert vivit("extract", *data, *SMALL)[0] == 0
    return data


def test_epic_kitchens_gets_its_official_numbers_and_files(
    vivit: Vivit, kitchen: list[object], tmp_path: Path
) -> None:
    assert vivit("train-temporal", "--joint-head", "--epochs", "2", "--depth", "1", "--run", "k")[0] == 0
    files = ["--submission", tmp_path / "s.zip", "--results", tmp_path / "r.pkl"]
    code, _, err = vivit("evaluate", *files)
    assert (code, "the official list 9668" in err, err.count("error:")) == (1, True, 1)
    code, out, err = vivit("evaluate", *files, "--allow-partial", "--fusion", "0.25")
    assert code == 0, err
    assert all(text in out for text in ("unseen top-1", "tail top-1", "95 % intervals"))
    assert "fused: 0.75 of the product of verb and noun, 0.25 of the joint head" in out
    assert "note: the manifest has 4 clips of validation, and the official list 9668" in out
    stored = json.loads((tmp_path / "work/runs/k/evaluation/validation.json").read_text())
    assert len(stored["official"]) == 12
    assert set(stored["scores"]) == {"verb", "noun", "action", "joint", "fused"}
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert len(json.loads(archive.read("test.json"))["results"]) == 4
    assert (tmp_path / "r.pkl").stat().st_size > 4 * 397 * 4
    small = ["--test-clips", "2", "--test-crops", "1", "--device", "cpu", "--allow-partial"]
    code, out, err = vivit("evaluate", "--run", "k", *kitchen, *small, *files)
    assert (code, "EPIC-KITCHENS-100" in out) == (0, True), err
    code, _, err = vivit("evaluate", *files[:2], "--supervision", "2-3-4")
    assert (code, "three levels from 0 to 5, such as 2,3,4" in err) == (2, True)


def test_several_runs_are_evaluated_and_their_mean_is_given(
    vivit: Vivit, extracted: Path, tmp_path: Path
) -> None:
    runs: list[object] = []
    for seed in ("0", "1", "2"):
        vivit("train-temporal", "--epochs", "2", "--depth", "1", "--seed", seed, "--run", f"seed{seed}")
        runs += ["--run", f"seed{seed}"]
    code, out, _ = vivit("evaluate", *runs)
    assert code == 0
    assert "validation: mean of 3 runs on the same clips" in out
    stored = [
        json.loads((tmp_path / f"work/runs/seed{seed}/evaluation/validation.json").read_text())["scores"]
        for seed in range(3)
    ]
    mean = json.loads((tmp_path / "work/runs/seed0/evaluation/validation-mean.json").read_text())
    each = [scores["action"]["top1"] for scores in stored]
    assert mean["top1_of_runs"]["action"] == each
    assert mean["scores"]["action"]["top1"] == pytest.approx(sum(each) / 3)
    assert mean["scores"]["action"]["mean_class"] == pytest.approx(
        sum(scores["action"]["mean_class"] for scores in stored) / 3
    )
    assert mean["num_clip_sets"] == 1
    code, _, err = vivit("evaluate", *runs, "--results", "r.pkl")
    assert (code, "--submission and --results are of one run" in err) == (2, True)


def test_files_of_epic_kitchens_are_refused_for_other_heads(vivit: Vivit, extracted: Path) -> None:
    vivit("train-temporal", "--epochs", "1", "--depth", "1")
    for options in (["--submission", "s.zip"], ["--results", "r.pkl"]):
        code, _, err = vivit("evaluate", *options)
        assert (code, f"{options[0]} is for EPIC-KITCHENS-100" in err) == (2, True)
    code, _, err = vivit("train-temporal", "--joint-head")
    assert (code, "a joint head needs the heads verb and noun" in err) == (2, True)


def test_a_benchmark_has_its_recipe_and_what_is_overridden_is_said(
    vivit: Vivit, video_folder: Path, tmp_path: Path
) -> None:
    rows = ["clip_id,split,video,label/action"]
    rows += [f"{index},train,train/{'ab'[index % 2]}/clip{index}.mp4,{index % 2}" for index in range(4)]
    (tmp_path / "ssv2.csv").write_text("\n".join(rows) + "\n")
    data = ["--manifest", tmp_path / "ssv2.csv", "--data-root", video_folder]
    code, out, err = vivit("extract", *data, *SMALL)
    assert code == 0, err
    assert "recipe ssv2 (ViViT-L Factorised Encoder on Something-Something v2" in out
    assert "overridden: num_frames 32 -> 4, stride 1 -> 3, resize 288 -> 40, crop_size 256 -> 32" in out
    assert "the source mirrors half of the training views" in out
    assert "views.augment=reference-randaugment-n2-m20" in out
    code, out, _ = vivit("train-temporal", "--epochs", "2", "--depth", "1", "--device", "cpu")
    assert "recipe of stage 2 (vivit's own settings" in out
    assert "; overridden: epochs 30 -> 2, device auto -> cpu, depth None -> 1" in out
    code, out, err = vivit("pretrain", *data, *WARM_UP, "--augment", "randaugment", "--optimizer", "adamw")
    assert code == 0, err
    assert "num_frames 8 -> 4, stride 4 -> 3" in out
    assert "augment reference-randaugment-n2-m20 -> randaugment-n2-m9" in out
    assert "optimizer sgd -> adamw, weight_decay 0.0 -> 0.05" in out
    assert "epochs 35 -> 2, warmup_epochs 2.5 -> 0.2, learning_rate 0.4 -> 0.0001" in out
    assert "mixup=0.3" in out
    code, _, err = vivit("extract", *data, *SMALL, "--augment", "randaug")
    assert (code, "did you mean randaugment?" in err) == (2, True)
