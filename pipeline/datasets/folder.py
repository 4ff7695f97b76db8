"""Videos in folders: `<class>/<video>`, `<split>/<class>/<video>`, or videos without classes."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest

VIDEO_SUFFIXES = frozenset(
    [
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".ts",
        ".mts",
        ".m2ts",
        ".mpg",
        ".mpeg",
        ".flv",
        ".wmv",
        ".asf",
        ".ogv",
        ".gif",
        ".3gp",
    ]
)
"""File names that count as videos; what is in them is checked when they are read."""

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


def read_folder(data_root: Path, annotations: Path | None = None) -> Manifest:
    """The manifest of a folder of videos; the clip id is the path without its suffix where that is unique.

    Where the top folders are called train, val/validation and test, they are the splits. Otherwise a hash of each
    clip's id puts about a fifth of the clips into validation. A video outside class folders has no label; one at the
    top is a test clip.
    """
    if annotations is not None:
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


def files_below(data_root: Path, suffixes: Collection[str]) -> Iterator[PurePosixPath]:
    """Paths below the root of everything whose name ends so, in order; hidden files and folders are left out."""
    for name, folders, files in os.walk(data_root, onerror=_refuse_folder, followlinks=True):
        folder = Path(name)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not _leads_back(folder / n))
        for file in sorted(files):
            if Path(file).suffix.lower() in suffixes and not file.startswith("."):
                yield _utf8((folder / file).relative_to(data_root))


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} cannot be read ({error.strerror}): change its permissions or move it away"
    ) from error


def _leads_back(folder: Path) -> bool:
    """Whether `folder` is a link to one of the folders on the way to it."""
    return folder.is_symlink() and folder.resolve() in {parent.resolve() for parent in folder.parents}


def _utf8(file: Path) -> PurePosixPath:
    try:
        file.as_posix().encode()
    except UnicodeEncodeError:
        raise DataError(f"the name of the file {os.fsencode(file)!r} is not UTF-8: rename it") from None
    return PurePosixPath(file.as_posix())


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
