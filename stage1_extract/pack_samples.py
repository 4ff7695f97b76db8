"""What a data set looks like as WebDataset samples: their keys, and what is said of their clips."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath

from vivit.pipeline.datasets.tree import VIDEO_SUFFIXES
from vivit.pipeline.manifest import UNKNOWN, Clip, Manifest
from vivit.pipeline.video_location import split_video

LONGEST_KEY = 80


@dataclass(frozen=True)
class PackSample:
    """One video of a split and its clips."""

    key: str
    video: str
    clips: list[Clip]
    about: bytes
    """Its json."""
    cls: bytes | None
    """Its class id, where there is just one clip and one head."""

    @property
    def extension(self) -> str:
        suffix = PurePosixPath(self.video).suffix.lower()
        return suffix[1:] if suffix in VIDEO_SUFFIXES else "mp4"


def samples_of(manifest: Manifest, split: str) -> list[PackSample]:
    """The samples of a split: one for each video, in the order of the manifest."""
    groups = [
        (video, list(clips)) for video, clips in groupby(manifest.of_split(split), key=lambda c: c.video)
    ]
    names = [clips[0].clip_id if len(clips) == 1 else _stem(video) for video, clips in groups]
    return [
        PackSample(key, video, clips, _about(video, clips, manifest.heads), _cls(clips, manifest.heads))
        for key, (video, clips) in zip(keys_of(names), groups, strict=True)
    ]


def _stem(video: str) -> str:
    name, member = split_video(video)
    return str(PurePosixPath(member or name).with_suffix(""))


def keys_of(names: Sequence[str]) -> list[str]:
    """A key for each name: without dots, which end a key, and with a digest of the name where it would not be unique."""
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "video" for name in names]
    uses = Counter(key.lower() for key in plain)
    return [
        key if uses[key.lower()] == 1 and len(key) <= LONGEST_KEY
        else f"{key[:LONGEST_KEY - 9]}-{hashlib.sha256(f'{at} {name}'.encode()).hexdigest()[:8]}"
        for at, (key, name) in enumerate(zip(plain, names, strict=True))
    ]  # fmt: skip


def _about(video: str, clips: Sequence[Clip], heads: Mapping[str, Sequence[str]]) -> bytes:
    """The json of a sample."""
    described = [
        {
            "clip_id": clip.clip_id,
            "start_sec": clip.start_sec,
            "end_sec": clip.end_sec,
            "labels": {
                head: {"id": label, "name": heads[head][label]}
                for head, label in clip.labels.items()
                if label != UNKNOWN
            },
            "source": dict(clip.source),
        }
        for clip in clips
    ]
    text = json.dumps({"video": video, "clips": described}, ensure_ascii=False, sort_keys=True, default=str)
    return text.encode()


def _cls(clips: Sequence[Clip], heads: Mapping[str, Sequence[str]]) -> bytes | None:
    if len(clips) != 1 or len(heads) != 1:
        return None
    label = clips[0].labels.get(next(iter(heads)), UNKNOWN)
    return None if label == UNKNOWN else str(label).encode()
