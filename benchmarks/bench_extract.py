"""Extraction from mp4 files against a bare timm forward loop on ready tensors: same batch, type, threads and run.

The two alternate round by round, so that what else the machine does hits both; the ratio of each round is quoted.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import machine, print_table, spread, write_video

from vivit.pipeline.backbones import load_backbone
from vivit.pipeline.device import autocast
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.encoder import SpatialEncoder
from vivit.stage1_extract.extract import extract_with

BATCH = 32


def bare_rate(
    model: torch.nn.Module, device: torch.device, precision: str, crop_size: int, passes: int
) -> float:
    """Frames per second of `model(images)` on a tensor that is ready in the model's own layout."""
    images = torch.randn(BATCH, 3, crop_size, crop_size, device=device)
    with (
        torch.inference_mode(),
        autocast(device, precision),
    ):
        model(images)
        _wait(device)
        started = time.perf_counter()
        for _ in range(passes):
            model(images)
        _wait(device)
    return passes * BATCH / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench(backbone: str, precision: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """One row of the table."""
    views = ViewSpec(num_frames=32, stride=2, crop_size=options.crop_size, resize=options.crop_size * 8 // 7)
    encoder = SpatialEncoder(
        backbone,
        weights="random",
        crop_size=options.crop_size,
        device=options.device,
        precision=precision,
        batch_size=BATCH,
    )
    model = load_backbone(backbone, weights="random", crop_size=options.crop_size).model.to(encoder.device)
    clips = [Clip(clip_id=str(i), split="train", video=f"{i}.mp4") for i in range(options.clips)]
    manifest = Manifest("bench", clips)
    bare, ours, limits = [], [], []
    for number in range(options.rounds):
        bare.append(
            bare_rate(model, encoder.device, encoder.backbone.precision, options.crop_size, options.clips)
        )
        config = ExtractConfig(
            cache=folder / f"{backbone}-{precision}-{number}.zarr", data_root=folder, views=views,
            decode_threads=options.decode_threads,
        )  # fmt: skip
        (summary,) = extract_with([encoder], [config], manifest)
        ours.append(summary.crops / summary.seconds)
        limits.append(summary.limits["decode"])
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    return [
        backbone,
        encoder.backbone.precision,
        spread(bare, 1),
        spread(ours, 1),
        spread(ratios, 3),
        f"{statistics.median(limits):.1%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbones", nargs="+", default=["vit_s16", "vit_b16"])
    parser.add_argument(
        "--precisions", nargs="+", default=["auto"], help="auto is bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--clips", type=int, default=4, help="clips of 32 frames per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crop-size", type=int, default=224)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--decode-threads", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(options.clips):
            write_video(folder / f"{index}.mp4", num_frames=300, size=(256, 336), seed=index)
        rows = [bench(b, p, options, folder) for b in options.backbones for p in options.precisions]
    print(machine())
    header = [
        "backbone",
        "precision",
        "bare forward, frames/s",
        "extract from mp4, frames/s",
        "ratio",
        "waiting for decode",
    ]
    print_table(header, rows)


if __name__ == "__main__":
    main()
