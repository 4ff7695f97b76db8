"""The demo's own spatial encoder: a tiny ViT that learned, without labels, to sketch the frame it sees.

Without a network there are no published weights, and the class token of a ViT with random weights hardly says where
something is: its positions are tiny and it attends to all patches alike.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.progress import Progress
from vivit.pipeline.views import ViewSpec
from vivit.pipeline.workspace import storage_errors, write_atomically
from vivit.stage1_extract.clip_reader import CropSettings, CropStream
from vivit.stage1_extract.encoder import class_tokens

BACKBONE = "test_vit"
"""timm's smallest ViT: 6 layers of 64 channels, patches of 16 pixels."""
SKETCH = 8
"""Side of the sketch in pixels."""
STEPS, BATCH, RATE = 225, 128, 2e-3
_FRAME_STRIDE = 2
_DECODE_THREADS, _DECODE_BYTES = 2, 256 << 20


def make_encoder_weights(
    path: Path, manifest: Manifest, videos: Path, views: ViewSpec, *, seed: int = 0
) -> None:
    """Write the encoder's weights to `path` as safetensors, learnt from the training frames; an old file is kept."""
    if path.exists():
        return
    frames = training_frames(manifest.of_split("train"), videos, views, seed=seed)
    model = create_encoder(views.crop_size, seed=seed)
    pretrain(model, frames, steps=STEPS, seed=seed)
    with storage_errors(path):
        write_atomically(path, safetensors.torch.save(model.state_dict()))


def training_frames(clips: list[Clip], videos: Path, views: ViewSpec, *, seed: int) -> npt.NDArray[np.uint8]:
    """Every second frame of each clip's training views [frame, height, width, channel], uint8 RGB."""
    settings = CropSettings(views=views, seed=seed, interpolation="bicubic")
    with CropStream(videos, settings, threads=_DECODE_THREADS, budget_bytes=_DECODE_BYTES) as stream:
        crops = [item.crops[:, ::_FRAME_STRIDE] for item in stream.read([clips]) if item.crops is not None]
    return np.concatenate([clip.reshape(-1, *clip.shape[2:]) for clip in crops])


def create_encoder(crop_size: int, *, seed: int = 0) -> nn.Module:
    """The backbone with Xavier weights, and positions as large as the embeddings of the patches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(BACKBONE, num_classes=0, img_size=crop_size)
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.weight"):
                for kernel in parameter.data.chunk(3):
                    nn.init.xavier_uniform_(kernel)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter.data)
        nn.init.normal_(model.get_parameter("pos_embed").data, std=0.5)
    return model


def pretrain(model: nn.Module, frames: npt.NDArray[np.uint8], *, steps: int, seed: int = 0) -> float:
    """Train `model` until a linear map of its class token gives a small copy of the frame; the loss of the last steps.

    `frames`: [frame, height, width, channel], uint8 RGB. No label is used. A model that knows only the mean sketch
    has a loss of 1.
    """
    sketches = _sketches(frames)
    draw = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(int(model.get_parameter("norm.weight").numel()), sketches.shape[1])
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    losses = []
    model.train()
    with Progress("make the encoder", steps, "steps") as progress:
        for _ in range(steps):
            rows = draw.integers(0, len(frames), BATCH)
            tokens = class_tokens(model, _pixels(frames[rows]))
            loss = functional.mse_loss(head(tokens), sketches[torch.from_numpy(rows)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.advance(1, f"loss {losses[-1]:.3f}")
    model.eval()
    return float(np.mean(losses[-20:]))


def _sketches(frames: npt.NDArray[np.uint8]) -> Tensor:
    """What is to be learnt [frame, number]: each frame at 8 x 8 pixels, less the mean of all, in units of the spread."""
    parts = [functional.adaptive_avg_pool2d(_pixels(part), SKETCH).flatten(1) for part in _portions(frames)]
    sketches = torch.cat(parts)
    return (sketches - sketches.mean(0)) / sketches.std()


def _portions(frames: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    return np.array_split(frames, max(1, len(frames) // 512))


def _pixels(frames: npt.NDArray[np.uint8]) -> Tensor:
    """Frames [frame, height, width, channel] as the backbone takes them: [frame, channel, height, width] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
