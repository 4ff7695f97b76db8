"""End-to-end training from mp4 files against the same steps on batches that are ready: does the video loader keep up?"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import machine, print_table, spread, write_video

from vivit.end_to_end.config import warm_up_views
from vivit.end_to_end.factorised_encoder import FactorisedEncoder
from vivit.end_to_end.video_batches import VideoBatches
from vivit.pipeline.backbones import load_backbone
from vivit.pipeline.device import resolve_device, resolve_precision
from vivit.pipeline.manifest import Clip
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.clip_reader import CropSettings, default_decode_threads
from vivit.stage1_extract.encoder import Normalise
from vivit.stage2_temporal.config import TrainConfig
from vivit.stage2_temporal.learner import Learner
from vivit.stage2_temporal.model import ModelConfig


def bench(options: argparse.Namespace, folder: Path) -> list[str]:
    """One row of the table."""
    device = resolve_device(options.device)
    size = options.crop_size
    views = warm_up_views(ViewSpec(crop_size=size, resize=size * 8 // 7), options.frames)
    loaded = load_backbone(options.backbone, weights="random", crop_size=size)
    config = ModelConfig(
        dim=int(getattr(loaded.model, "num_features")),  # noqa: B009
        time=options.frames,
        heads={"action": 10},
    )
    learner = Learner(
        TrainConfig(cache=Path(), run=Path(), epochs=100),
        FactorisedEncoder(loaded.model, 1, config),
        device=device,
        precision=resolve_precision(options.precision, device),
        steps_per_epoch=1,
    )
    clips = [Clip(clip_id=str(i), split="train", video=f"{i}.mp4") for i in range(options.clips)]
    batches = VideoBatches(
        clips,
        {"action": np.arange(len(clips), dtype=np.int32) % 10},
        folder,
        CropSettings(views=views, seed=0, interpolation=loaded.config.interpolation),
        batch_size=options.batch_size,
        normalise=Normalise(loaded.config.mean, loaded.config.std, device),
        device=device,
        threads=options.decode_threads or default_decode_threads(device.type),
        budget_bytes=2 << 30,
    )
    rates: dict[str, list[float]] = {"loader": [], "steps": [], "both": []}
    for epoch in range(options.rounds + 1):
        started = time.perf_counter()
        ready = list(batches.epoch(epoch))
        rates["loader"].append(len(clips) / (time.perf_counter() - started))
        for name, source in (("steps", iter(ready)), ("both", batches.epoch(epoch))):
            started = time.perf_counter()
            for batch in source:
                learner.step(batch, 50)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rates[name].append(len(clips) / (time.perf_counter() - started))
    warm = {name: values[1:] for name, values in rates.items()}
    ratios = [both / steps for both, steps in zip(warm["both"], warm["steps"], strict=True)]
    return [
        options.backbone,
        learner.precision,
        *(spread(values, 1) for values in warm.values()),
        spread(ratios, 3),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_s16")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--crop-size", type=int, default=224)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--decode-threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.clips):
            write_video(Path(folder) / f"{index}.mp4", num_frames=300, size=(256, 340), seed=index)
        row = bench(options, Path(folder))
    print(machine())
    print_table(
        [
            "backbone",
            "precision",
            "loader alone, clips/s",
            "steps alone, clips/s",
            "training, clips/s",
            "ratio",
        ],
        [row],
    )


if __name__ == "__main__":
    main()
