import json
import subprocess
import sys
from pathlib import Path

import pytest

from vivit.pipeline.errors import ConfigError
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.evaluate import EvaluateConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"mixup": -0.1}, "mixup must not be negative"),
        ({"warmup_epochs": 5.0, "epochs": 5}, r"warmup_epochs must be .* less than epochs \(5\), got 5.0"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam': did you mean adamw"),
        ({"precision": "bf16"}, "unknown precision 'bf16': did you mean bfloat16"),
        ({"adapter": "botleneck"}, "unknown adapter 'botleneck': did you mean bottleneck"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be above 0"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"frame_sampling": "windw"}, "unknown frame sampling 'windw': did you mean window"),
        ({"seed": -1}, "seed must be in"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused_when_they_are_made(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(cache=Path("c"), run=Path("r"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("epochs", "warmup"), [(1, 0.1), (2, 0.2), (24, 2.4), (25, 2.5), (30, 2.5), (100, 2.5)]
)
def test_the_default_warm_up_fits_any_number_of_epochs(epochs: int, warmup: float) -> None:
    config = TrainConfig(cache=Path("c"), run=Path("r"), epochs=epochs)
    assert config.resolved_warmup_epochs == config.identity()["warmup_epochs"] == warmup
    explicit = TrainConfig(cache=Path("c"), run=Path("r"), epochs=epochs, warmup_epochs=warmup)
    assert explicit.identity() == config.identity()


def test_bad_evaluation_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown average 'logit': did you mean logits"):
        EvaluateConfig(cache=Path("c"), run=Path("r"), average="logit")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_views must be at least 1"):
        EvaluateConfig(cache=Path("c"), run=Path("r"), max_views=0)


def test_the_identity_is_json_without_places() -> None:
    here = TrainConfig(cache=Path("a"), run=Path("b"), device="cpu", num_heads=3)
    there = TrainConfig(cache=Path("c"), run=Path("d"), memory_budget_bytes=0, num_heads=3)
    assert here.identity() == there.identity() == json.loads(json.dumps(here.identity()))
    assert here.identity() != TrainConfig(cache=Path("a"), run=Path("b"), seed=1, num_heads=3).identity()


def test_reading_the_defaults_does_not_load_torch() -> None:
    code = (
        "import sys, vivit.stage2_temporal.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
