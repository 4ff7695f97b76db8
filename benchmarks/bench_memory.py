"""Peak memory of extracting one clip from a 1-minute and from a 30-minute video, each in a process of its own."""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import machine, print_table, write_video

from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.views import ViewSpec


def extract_one(video: Path) -> None:
    """Extract the whole file as one clip, test views over all of its length, and print the peak memory in MiB."""
    from vivit.stage1_extract.config import ExtractConfig
    from vivit.stage1_extract.extract import extract

    config = ExtractConfig(
        cache=video.with_suffix(".zarr"), data_root=video.parent, backbone="vit_ti16", weights="random", device="cpu",
        views=ViewSpec(num_frames=8, stride=2, crop_size=64, resize=72),
    )  # fmt: skip
    extract(config, Manifest("bench", [Clip(clip_id="a", split="test", video=video.name)]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, nargs=2, default=[60, 1800])
    parser.add_argument("--video", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.video:
        extract_one(options.video)
        return
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for seconds in options.seconds:
            video = write_video(Path(folder) / f"{seconds}.mp4", num_frames=30 * seconds, size=(120, 160))
            command = [sys.executable, __file__, "--video", str(video)]
            peaks.append(
                float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
            )
    print(machine())
    print_table(
        ["length of the video, s", "peak memory, MiB"],
        [[str(seconds), f"{peak:.0f}"] for seconds, peak in zip(options.seconds, peaks, strict=True)],
    )
    print(f"ratio: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
