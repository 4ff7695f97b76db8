"""Videos in folders: `<class>/<video>`, `<split>/<class>/<video>`, or videos without classes."""

import hashlib
from collections import Counter
from pathlib import Path, PurePosixPath

from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.tree import VIDEO_SUFFIXES, files_below
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest

HEAD = "action"
VALIDATION_SHARE = 0.2
"""Share of the clips that goes to validation where the folders name no splits."""

SPLIT_NAMES = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


def read_folder(files: DatasetFiles) -> Manifest:
    """The manifest of a folder of videos; the clip id is the path without its suffix where that is unique.

    Where the top folders are called train, val/validation and test, they are the splits. Otherwise a hash of each
    clip's id puts about a fifth of the clips into validation. A video outside class folders has no label; one at the
    top is a test clip.
    """
    data_root = files.root
    if files.annotations:
        raise DataError(
            "a folder of videos has no annotation files: drop --annotations, or pass --manifest FILE"
        )
    videos = list(files_below(data_root, VIDEO_SUFFIXES))
    if not videos:
        raise DataError(
            f"no videos in {data_root}: files whose names end in {', '.join(sorted(VIDEO_SUFFIXES))} count"
        )
    splits = _named_splits(data_root, videos)
    ids = _clip_ids(videos)
    classes = sorted({name for video in videos if (name := _class_of(video, bool(splits)))})
    class_ids = {name: index for index, name in enumerate(classes)}
    clips = []
    for video in videos:
        name = _class_of(video, bool(splits))
        if len(video.parts) == 1:
            split = "test"
        else:
            split = splits[video.parts[0]] if splits else hashed_split(ids[video])
        labels = {HEAD: class_ids[name]} if name else {}
        clips.append(Clip(clip_id=ids[video], split=split, video=str(video), labels=labels))
    return Manifest("folder", clips, heads={HEAD: classes} if classes else {})


def _named_splits(data_root: Path, videos: list[PurePosixPath]) -> dict[str, str]:
    """Top folder -> split, where every folder with videos is named like one; else empty."""
    top = {video.parts[0] for video in videos if len(video.parts) > 1}
    named = {name: SPLIT_NAMES[name.lower()] for name in top if name.lower() in SPLIT_NAMES}
    if named and len(named) < len(top):
        other = min(top - set(named))
        raise DataError(
            f"{data_root} holds both splits ({', '.join(sorted(named))}) and other folders with videos ({other}, ...): "
            "use <split>/<class>/<video> or <class>/<video> throughout"
        )
    return named


def _class_of(video: PurePosixPath, has_splits: bool) -> str | None:
    """The folder that names the class: the first one, or the one below the split."""
    folders = video.parts[1:-1] if has_splits else video.parts[:-1]
    return folders[0] if folders else None


def _clip_ids(videos: list[PurePosixPath]) -> dict[PurePosixPath, str]:
    """Path without suffix, or with it where two videos differ in nothing else."""
    stems = {video: str(video.with_suffix("")) for video in videos}
    uses = Counter(stems.values())
    return {video: stem if uses[stem] == 1 else str(video) for video, stem in stems.items()}


def hashed_split(clip_id: str) -> str:
    """A split that depends on the id alone, so that adding videos moves no others."""
    draw = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:4], "big") / 2**32
    return "validation" if draw < VALIDATION_SHARE else "train"


FOLDER = Dataset(name="folder", title="a folder of videos", read=read_folder)
