from pathlib import Path

import numpy as np
import pytest
import torch

from vivit.end_to_end import demo_encoder
from vivit.end_to_end.demo import VIEWS, run_demo
from vivit.end_to_end.demo_data import DemoSpec
from vivit.end_to_end.demo_encoder import create_encoder, pretrain

SMALL = DemoSpec(train_clips=3, validation_clips=2)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_encoder, "STEPS", 3)


def files_of(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*.*")
        if path.suffix in {".mp4", ".safetensors"}
    }


@pytest.mark.usefixtures("few_steps")
def test_the_demo_runs_every_stage_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    result = run_demo(tmp_path, spec=SMALL)
    assert result.num_clips == {"train": 36, "validation": 24}
    assert result.chance == pytest.approx(1 / 12)
    assert result.temporal.coverage.num_evaluated == result.average.coverage.num_evaluated == 24
    assert torch.get_num_threads() == threads
    before = files_of(tmp_path)
    again = run_demo(tmp_path, spec=SMALL)
    assert files_of(tmp_path) == before
    assert again.temporal.scores == result.temporal.scores


@pytest.mark.usefixtures("few_steps")
def test_another_seed_leaves_the_first_alone(tmp_path: Path) -> None:
    run_demo(tmp_path, spec=SMALL)
    before = files_of(tmp_path)
    run_demo(tmp_path, seed=1, spec=DemoSpec(train_clips=1, validation_clips=1, seed=1))
    assert before.items() <= files_of(tmp_path).items()


@pytest.mark.usefixtures("few_steps")
def test_a_fresh_demo_removes_only_what_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0/thesis.txt").touch()
    run_demo(tmp_path, spec=DemoSpec(train_clips=1, validation_clips=1), fresh=True)
    assert (tmp_path / "seed-0/thesis.txt").exists()


def test_pretraining_learns_to_sketch_and_is_the_same_every_time() -> None:
    draw = np.random.default_rng(0)
    frames = draw.integers(0, 256, (64, 3, 3, 3), np.uint8).repeat(32, axis=1).repeat(32, axis=2)
    models = [create_encoder(VIEWS.crop_size) for _ in range(2)]
    losses = [pretrain(model, frames, steps=12) for model in models]
    assert losses[0] == losses[1] < 1.3
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_the_temporal_transformer_beats_average_pooling_clearly(tmp_path: Path) -> None:
    result = run_demo(tmp_path)
    temporal, average = result.temporal.scores["action"].top1, result.average.scores["action"].top1
    assert average < 0.5  # no order, no more than one of two twins
    assert temporal > average + 0.3
