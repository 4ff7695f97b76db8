"""Augmentation of one training view, against decoding and cropping it, and encoding it.

Each round does all of them, so that what else the machine does hits all; RandAugment is the mean over draws.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import machine, print_table, spread, write_video

from vivit.pipeline.augmentation import Augmentation
from vivit.pipeline.manifest import Clip
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.augment import Augmenter
from vivit.stage1_extract.clip_reader import ClipCrops, CropSettings, crop_clips
from vivit.stage1_extract.encoder import SpatialEncoder

NAMES = [
    "reference-colour",
    "reference-randaugment-n2-m15",
    "reference-randaugment-n2-m20",
    "randaugment-n2-m9",
]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call, with what it left to do on the device."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbones", nargs="+", default=["vit_s16", "vit_b16"])
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--crop-size", type=int, default=224)
    parser.add_argument("--draws", type=int, default=20, help="views that an augmentation is the mean over")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    size = options.crop_size
    views = ViewSpec(num_frames=options.frames, stride=2, crop_size=size, resize=size * 8 // 7)
    settings = CropSettings(views=views, seed=0, interpolation="bicubic")
    clip = Clip(clip_id="a", split="train", video="a.mp4")
    encoders = [
        SpatialEncoder(name, weights="random", crop_size=size, device=options.device)
        for name in options.backbones
    ]
    device = encoders[0].device
    took: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        video = write_video(
            Path(name) / "a.mp4", num_frames=2 * options.frames + 6, size=(size * 8 // 7, size * 3 // 2)
        )

        def decoded() -> ClipCrops:
            return next(crop_clips(video, [clip], settings))

        crops = decoded().crops
        assert crops is not None
        pixels = torch.from_numpy(crops[0]).to(device)
        augmenters = {each: Augmenter(Augmentation.parse(each), 0, device) for each in NAMES}
        for augmenter in augmenters.values():
            augmenter.view(pixels, clip_id="warm", number=0)
        for _ in range(options.rounds):
            took.setdefault("decode and crop", []).append(seconds(decoded, device))
            for encoder, backbone in zip(encoders, options.backbones, strict=True):
                work = seconds(lambda encoder=encoder: encoder.encode(crops), device)  # type: ignore[misc]
                took.setdefault(f"encode, {backbone}", []).append(work)
            for each, augmenter in augmenters.items():

                def draws(augmenter: Augmenter = augmenter) -> None:
                    for number in range(options.draws):
                        augmenter.view(pixels, clip_id="a", number=number)

                took.setdefault(each, []).append(seconds(draws, device) / options.draws)
    print(machine())
    decode = took["decode and crop"]
    header = [f"one view of {options.frames} x {size} x {size}", "ms"]
    header += [f"of decode and encode, {backbone}" for backbone in options.backbones]
    rows = []
    for what, times in took.items():
        both = [map(sum, zip(decode, took[f"encode, {b}"], strict=True)) for b in options.backbones]
        shares = [[a / b for a, b in zip(times, total, strict=True)] for total in both]
        rows.append(
            [
                what,
                spread([1000 * t for t in times], 1),
                *(f"{statistics.median(share):.3f}" if what in NAMES else "" for share in shares),
            ]
        )
    print_table(header, rows)


if __name__ == "__main__":
    main()
