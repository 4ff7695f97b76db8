"""All rows of the paper's Table 1 (arXiv 2306.04822) on the demo's generated videos, and what more frames cost.

Each row runs in a process of its own with one thread, --jobs of them at a time; what a row found is kept in --folder, so
that the same command goes on after an interruption. Nothing here was chosen by looking at the rows: data, encoder and
views are the demo's, epochs and optimizer the same for all rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from masked_pretraining import pretrain_masked
from measure import machine, print_table

from vivit.end_to_end.config import PretrainConfig
from vivit.end_to_end.demo import VIEWS
from vivit.end_to_end.demo_data import MANIFEST, DemoSpec, make_demo
from vivit.end_to_end.demo_encoder import BACKBONE, make_encoder_weights
from vivit.end_to_end.pretrain import pretrain
from vivit.end_to_end.video_batches import VideoBatches
from vivit.pipeline.backbones import load_backbone
from vivit.pipeline.manifest import Manifest
from vivit.stage1_extract.clip_reader import CropSettings
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.encoder import Normalise
from vivit.stage1_extract.extract import extract
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.evaluate import EvaluateConfig, evaluate
from vivit.stage2_temporal.temporal import default_num_heads
from vivit.stage2_temporal.train import train

TIME_SPAN = replace(VIEWS, fps=16.0, train_views=1)
FRAMES = {8: replace(TIME_SPAN, num_frames=8, stride=4), 16: replace(TIME_SPAN, num_frames=16, stride=2)}
"""Both look at the same 2 seconds."""
CACHED_VIEWS = 4
RATE = 1e-3
DEPTH = 2
ROWS = {
    "pool": "average pooling of frozen image features",
    "-": "nothing frozen, no adapter, scratch",
    "I": "spatial frozen, no adapter, scratch",
    "II": "temporal frozen, no adapter, scratch",
    "III": "spatial frozen, adapter, scratch",
    "IV": "spatial frozen, adapter, VideoMAE",
    "V": "spatial frozen, adapter, ViViT-8f",
    "V+": "as V, four times the epochs",
    "8f": "the warm-up of V itself: nothing frozen, 8 frames",
}


class Work:
    """One seed's files and rows."""

    def __init__(self, folder: Path, seed: int, epochs: int) -> None:
        self.seed, self.epochs, self.videos = seed, epochs, folder / "videos"
        self.folder = folder / f"seed-{seed}"
        self.encoder = folder / "encoder.safetensors"

    def end_to_end(self, name: str, frames: int, **changes: Any) -> dict[str, Any]:
        config = PretrainConfig(
            manifest=self.videos / MANIFEST, data_root=self.videos, run=self.folder / name, backbone=BACKBONE,
            weights=str(self.encoder), views=FRAMES[frames], epochs=self.epochs, learning_rate=RATE, depth=DEPTH,
            seed=self.seed, device="cpu", decode_threads=1, validate_every=self.epochs, **changes,
        )  # fmt: skip
        reset_peak()
        started = time.perf_counter()
        result = pretrain(config)
        return found(result.best["top1/action"], time.perf_counter() - started, result.trained_parameters)

    def cache(self, name: str, backbone: str, weights: str) -> tuple[Path, float]:
        """The cache at 16 frames of an encoder, and the seconds that it took."""
        path = self.folder / f"{name}.zarr"
        config = ExtractConfig(
            cache=path, data_root=self.videos, backbone=backbone, weights=weights, seed=self.seed, batch_size=64,
            views=replace(FRAMES[16], train_views=CACHED_VIEWS), device="cpu", decode_threads=1,
        )  # fmt: skip
        started = time.perf_counter()
        extract(config, Manifest.read(self.videos / MANIFEST))
        return path, time.perf_counter() - started

    def cached(self, name: str, cache: Path, extraction: float = 0.0, **changes: Any) -> dict[str, Any]:
        settings = {"depth": DEPTH, "epochs": self.epochs} | changes
        config = TrainConfig(
            cache=cache, run=self.folder / name, learning_rate=RATE, drop_path=0.0, seed=self.seed, device="cpu",
            validate_every=settings["epochs"], **settings,
        )  # fmt: skip
        reset_peak()
        started = time.perf_counter()
        train(config)
        seconds = time.perf_counter() - started
        score = evaluate(EvaluateConfig(run=config.run, cache=cache, device="cpu")).scores["action"]
        tensors = safetensors_count(config.run / "model.safetensors")
        return found(score.top1, seconds, tensors) | {"extraction": extraction}

    def image_rows(self) -> dict[str, Any]:
        cache, extraction = self.cache("image", BACKBONE, str(self.encoder))
        return {
            "pool": self.cached("pool", cache, extraction, temporal="mean", adapter="none"),
            "I": self.cached("I", cache, extraction, adapter="none"),
            "III": self.cached("III", cache, extraction),
        }

    def masked_row(self) -> dict[str, Any]:
        cache, _ = self.cache("image-iv", BACKBONE, str(self.encoder))
        loaded = load_backbone(BACKBONE, weights=str(self.encoder), crop_size=VIEWS.crop_size)
        manifest = Manifest.read(self.videos / MANIFEST)
        batches = VideoBatches(
            manifest.of_split("train"),
            manifest.labels("train"),
            self.videos,
            CropSettings(views=FRAMES[16], seed=self.seed, interpolation=loaded.config.interpolation),
            batch_size=64,
            normalise=Normalise(loaded.config.mean, loaded.config.std, torch.device("cpu")),
            device=torch.device("cpu"),
            threads=1,
            budget_bytes=1 << 30,
        )
        path = self.folder / "videomae.safetensors"
        # blocks of the shape that the temporal transformer has by default
        heads = default_num_heads(loaded.model.num_features)
        shape = replace(loaded.config, options={"num_heads": heads, "mlp_ratio": 4.0})
        started = time.perf_counter()
        loss = pretrain_masked(path, shape, batches, num_frames=16, epochs=self.epochs, seed=self.seed)
        seconds = time.perf_counter() - started
        row = self.cached("IV", cache, init=str(path))
        return {"IV": row | {"warm_up": seconds, "masked_loss": loss}}

    def warm_rows(self) -> dict[str, Any]:
        warm = self.end_to_end("8f", 8)
        run = self.folder / "8f"
        cache, extraction = self.cache("warm", str(run.resolve()), "pretrained")
        also = {"warm_up": warm["seconds"]}
        return {
            "8f": warm,
            "V": self.cached("V", cache, extraction, init=str(run)) | also,
            "V+": self.cached("V+", cache, extraction, init=str(run), epochs=4 * self.epochs) | also,
        }


JOBS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "baseline": lambda work: {"-": work.end_to_end("baseline", 16)},
    "ii": lambda work: {"II": work.end_to_end("II", 16, freeze="temporal")},
    "warm": Work.warm_rows,
    "image": Work.image_rows,
    "masked": Work.masked_row,
}
"""Jobs by name, the longest first; each gives rows."""


def found(top1: float, seconds: float, parameters: int) -> dict[str, Any]:
    return {
        "top1": top1,
        "seconds": seconds,
        "parameters": parameters,
        "peak_mib": peak_mib(),
    }


def reset_peak() -> None:
    """Let the peak of this process's memory begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Most memory that this process held since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def safetensors_count(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (not a mapping)


def prepare(folder: Path, spec: DemoSpec) -> None:
    """Videos, and the encoder that stands for the image checkpoint: it learned to sketch frames, without labels."""
    manifest = make_demo(folder / "videos", spec)
    views = replace(VIEWS, train_views=CACHED_VIEWS)
    make_encoder_weights(folder / "encoder.safetensors", manifest, folder / "videos", views, seed=spec.seed)


def run_job(folder: Path, job: str, seed: int, epochs: int) -> None:
    """One job in this process; its rows go to a file."""
    torch.set_num_threads(1)
    rows = JOBS[job](Work(folder, seed, epochs))
    (folder / f"seed-{seed}" / f"{job}.json").write_text(json.dumps(rows, indent=1))


def run_all(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What each row found, seed by seed."""

    def start(job: str, seed: int) -> None:
        if (options.folder / f"seed-{seed}" / f"{job}.json").exists():
            return
        log = options.folder / f"{job}-{seed}.log"
        command = [sys.executable, __file__, "--folder", str(options.folder), "--epochs", str(options.epochs)]
        with log.open("w") as file:
            done = subprocess.run(
                [*command, "--job", job, "--seeds", str(seed)], stdout=file, stderr=file, check=False,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{job} of seed {seed} failed: see {log}")
        print(f"{time.strftime('%H:%M:%S')} {job}, seed {seed}: done", file=sys.stderr)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(start, *zip(*((job, seed) for job in JOBS for seed in options.seeds), strict=True)))
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for job in JOBS:
            for row, value in json.loads(
                (options.folder / f"seed-{seed}" / f"{job}.json").read_text()
            ).items():
                rows.setdefault(row, []).append(value)
    return rows


def table(rows: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    lines = []
    for name, what in ROWS.items():
        values = rows[name]
        scores = [100 * value["top1"] for value in values]

        def median(key: str, values: list[dict[str, Any]] = values) -> str:
            return f"{statistics.median(value.get(key, 0.0) for value in values):,.0f}"

        lines.append(
            [
                name,
                what,
                f"{statistics.mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})",
                median("warm_up"),
                median("extraction"),
                median("seconds"),
                median("peak_mib"),
                median("parameters"),
            ]
        )
    return lines


def more_frames() -> list[list[str]]:
    """Memory and time of a step at 8 .. 128 frames, end to end and on cached features, each in a fresh process."""
    lines = []
    for frames in (8, 16, 32, 64, 128):
        line = [str(frames)]
        for way in ("end-to-end", "stage 2"):
            command = [sys.executable, __file__, "--step", way, str(frames)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            line += done.stdout.split()
        lines.append(line)
    return lines


def one_step(way: str, frames: int) -> None:
    """Print how much memory three steps add to what is there before [MiB], and the median seconds of a step of 16 clips."""
    from vivit.end_to_end.video_batches import VideoBatch
    from vivit.end_to_end.video_models import create_video_model
    from vivit.pipeline.checkpoint import SpatialConfig
    from vivit.stage2_temporal.learner import Learner
    from vivit.stage2_temporal.loader import Batch
    from vivit.stage2_temporal.model import ModelConfig, TemporalModel

    torch.set_num_threads(1)
    size, clips, cpu = VIEWS.crop_size, 16, torch.device("cpu")
    config = ModelConfig(dim=64, time=frames, heads={"action": 12}, depth=DEPTH, num_heads=1)
    labels = {"action": torch.zeros(clips, dtype=torch.int64)}
    settings = TrainConfig(cache=Path(), run=Path(), epochs=100)
    if way == "stage 2":
        model: Any = TemporalModel(config)
        batch: Any = Batch(torch.randn(clips, frames, 64).half(), labels)
    else:
        model = create_video_model(
            "fe", SpatialConfig(name=BACKBONE, image_size=(size, size)), config.to_dict()
        )
        pixels = torch.randint(0, 255, (clips, frames, size, size, 3), dtype=torch.uint8)
        batch = VideoBatch(pixels, labels, Normalise((0.5,) * 3, (0.5,) * 3, cpu))
    learner = Learner(settings, model, device=cpu, precision="float32", steps_per_epoch=10)
    reset_peak()
    before = peak_mib()
    seconds = []
    for step in range(3):
        started = time.perf_counter()
        learner.step(batch, step)
        seconds.append(time.perf_counter() - started)
    print(f"{peak_mib() - before:.0f} {statistics.median(seconds):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("vivit-work/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--train-clips", type=int, default=DemoSpec.train_clips, help="per class")
    parser.add_argument("--validation-clips", type=int, default=DemoSpec.validation_clips, help="per class")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        one_step(options.step[0], int(options.step[1]))
        return
    if options.job:
        run_job(options.folder, options.job, options.seeds[0], options.epochs)
        return
    prepare(
        options.folder, DemoSpec(train_clips=options.train_clips, validation_clips=options.validation_clips)
    )
    for seed in options.seeds:
        (options.folder / f"seed-{seed}").mkdir(exist_ok=True)
    rows = run_all(options)
    print(machine())
    print_table(
        [
            "row",
            "",
            "top-1, % (seeds)",
            "warm-up s",
            "extract s",
            "train s",
            "peak MiB",
            "trained parameters",
        ],
        table(rows),
    )
    print_table(["frames", "end to end MiB", "s/step", "stage 2 MiB", "s/step"], more_frames())


if __name__ == "__main__":
    main()
