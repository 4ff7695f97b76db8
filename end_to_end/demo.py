"""The whole method on generated videos: data, extraction, training, evaluation, and a table of what came out."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from vivit.end_to_end.demo_data import DemoSpec, demo_manifest, make_demo
from vivit.end_to_end.demo_encoder import BACKBONE, make_encoder_weights
from vivit.pipeline.progress import Progress
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import extract
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.evaluate import EvaluateConfig, evaluate
from vivit.stage2_temporal.evaluation import Evaluation
from vivit.stage2_temporal.train import train

VIEWS = ViewSpec(
    num_frames=16, stride=1, resize=112, crop_size=96, scale_max=1.1, flip=0.0, train_views=4, test_clips=1, test_crops=1
)  # fmt: skip
"""No mirroring: it would turn left into right."""

Result = TypeVar("Result")


@dataclass
class DemoResult:
    """What the demo found."""

    chance: float
    """Accuracy of guessing."""
    temporal: Evaluation
    average: Evaluation
    num_clips: dict[str, int]
    """Generated clips per split."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds per stage."""


def run_demo(folder: Path, *, seed: int = 0, fresh: bool = False, spec: DemoSpec | None = None) -> DemoResult:
    """Run or finish the demo in `folder`; what an earlier run with this seed left is used unless `fresh`.

    `spec` says how many clips there are (by default enough for a clear answer). Training runs in one thread: the model is so small that a second one costs more than it brings.
    """
    folder = folder / f"seed-{seed}"
    if fresh:
        for part in ("videos", "caches", "runs"):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / "encoder.safetensors").unlink(missing_ok=True)
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = work()
        seconds[stage] = time.perf_counter() - started
        return result

    spec = spec or DemoSpec(seed=seed)
    videos, cache = folder / "videos", folder / "caches" / "demo.zarr"
    with Progress("videos", len(demo_manifest(spec)), "clips") as progress:
        manifest = timed("generate videos", lambda: make_demo(videos, spec, progress))
    weights = folder / "encoder.safetensors"
    timed("make the encoder", lambda: make_encoder_weights(weights, manifest, videos, VIEWS, seed=seed))
    config = ExtractConfig(
        cache=cache, data_root=videos, backbone=BACKBONE, weights=str(weights), views=VIEWS, seed=seed, batch_size=64,
        device="cpu",
    )  # fmt: skip
    timed("extract", lambda: extract(config, manifest))
    evaluations = {}
    for temporal in ("transformer", "mean"):
        training = _training(cache, folder / "runs" / f"{temporal}-{seed}", temporal, seed)
        with one_thread():
            timed(f"train ({temporal})", partial(train, training))
        evaluating = EvaluateConfig(run=training.run, cache=cache, device="cpu")
        evaluations[temporal] = timed(f"evaluate ({temporal})", partial(evaluate, evaluating))
    classes = len(manifest.heads["action"])
    return DemoResult(
        chance=1 / classes,
        temporal=evaluations["transformer"],
        average=evaluations["mean"],
        num_clips={split: len(manifest.of_split(split)) for split in manifest.splits},
        seconds=seconds,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _training(cache: Path, run: Path, temporal: str, seed: int) -> TrainConfig:
    """Both halves of the comparison are trained alike."""
    return TrainConfig(
        cache=cache,
        run=run,
        temporal=temporal,
        depth=2,
        epochs=80,
        learning_rate=1e-3,
        drop_path=0.0,
        validate_every=10,
        seed=seed,
        device="cpu",
    )
