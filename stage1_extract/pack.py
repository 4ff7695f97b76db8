"""A data set as WebDataset tars: shards of one split each, their indexes, and a manifest that points into them."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from vivit.pipeline.errors import DataError, InterruptedRunError
from vivit.pipeline.folder_lock import folder_lock
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.progress import Progress
from vivit.pipeline.storage import Location
from vivit.pipeline.workspace import storage_errors
from vivit.stage1_extract.pack_samples import PackSample, samples_of
from vivit.stage1_extract.shard_packer import PackConfig, Shard, SplitPacker

__all__ = ["FailedVideo", "PackConfig", "PackSummary", "pack"]

MANIFEST_FILE = "manifest.parquet"


@dataclass(frozen=True)
class FailedVideo:
    """A video that is in no shard."""

    video: str
    num_clips: int
    outcome: str
    reason: str


@dataclass(frozen=True)
class PackSummary:
    """What lies in the output folder now."""

    out: Location
    manifest: Location
    shards: dict[str, int]
    """Shards per split."""
    shards_kept: int
    """Shards that were there already."""
    num_videos: int
    num_clips: int
    size_bytes: int
    failed: list[FailedVideo]


def pack(config: PackConfig, manifest: Manifest) -> PackSummary:
    """Pack all videos of a manifest; the same call after an interruption goes on, and ends with the same bytes.

    A video that several clips of a split share is one sample. Videos that cannot be read are in no shard; their clips
    stay in the manifest, so that they are counted. DataError where no video can be read, or the folder holds other shards.
    """
    if not len(manifest):
        raise DataError("the manifest has no clips")
    with ExitStack() as stack:
        work = stack.enter_context(_work_folder(config.out))
        samples = {split: samples_of(manifest, split) for split in manifest.splits}
        progress = stack.enter_context(Progress("pack", sum(map(len, samples.values())), "videos"))
        try:
            packed = {
                split: list(SplitPacker(config, split, samples[split], work, progress).shards())
                for split in samples
            }
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted: the finished shards in {config.out} stay. Run the same command again to go on"
            ) from None
        return _finish(config, manifest, samples, packed)


def _finish(
    config: PackConfig,
    manifest: Manifest,
    samples: Mapping[str, list[PackSample]],
    packed: Mapping[str, list[Shard]],
) -> PackSummary:
    """Write the manifest, and say what was done."""
    clips: list[Clip] = []
    failed: list[FailedVideo] = []
    for split, shards in packed.items():
        for shard in shards:
            for number in range(shard.first, shard.stop):
                sample = samples[split][number]
                name = shard.members.get(number, f"{sample.key}.{sample.extension}")
                clips += [replace(clip, video=f"{shard.name}::{name}") for clip in sample.clips]
                if number in shard.failed:
                    failed.append(FailedVideo(sample.video, len(sample.clips), *shard.failed[number]))
    num_videos = sum(map(len, samples.values()))
    if len(failed) == num_videos:
        raise DataError(
            f"none of the {num_videos} videos can be packed, the first is {failed[0].video}: {failed[0].reason}"
        )
    path = config.out / MANIFEST_FILE
    Manifest(manifest.dataset, clips, heads=manifest.heads, sources=manifest.sources).write(path)
    written = {split: [shard for shard in found if shard.members] for split, found in packed.items()}
    shards = [shard for found in written.values() for shard in found]
    return PackSummary(
        out=config.out,
        manifest=path,
        shards={split: len(found) for split, found in written.items()},
        shards_kept=sum(not shard.is_new for shard in shards),
        num_videos=num_videos - len(failed),
        num_clips=len(clips) - sum(video.num_clips for video in failed),
        size_bytes=sum(shard.size_bytes for shard in shards),
        failed=failed,
    )


@contextmanager
def _work_folder(out: Location) -> Iterator[Path]:
    """A folder for what is not finished: in the output folder, which no other process writes to meanwhile."""
    if not isinstance(out, Path):
        with tempfile.TemporaryDirectory(prefix="vivit-pack-") as name:
            yield Path(name)
        return
    work = out / ".partial"
    with folder_lock(out, DataError, "wait for it to end, or choose another --out"):
        shutil.rmtree(work, ignore_errors=True)  # what a killed process left
        with storage_errors(work):
            work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
