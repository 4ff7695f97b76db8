"""Diving48 from its V2 annotations: V1 has many wrong labels. The released videos are cut already."""

from collections.abc import Iterator
from pathlib import Path

from vivit.pipeline.datasets.annotation_files import read_entries, read_json
from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.folder import HEAD
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest

_FILES = {"train": "Diving48_V2_train.json", "test": "Diving48_V2_test.json"}


def read_diving48(files: DatasetFiles) -> Manifest:
    """Manifest with one head of 48 classes: takeoff, somersaults, twists and position, joined by `+`."""
    found = {split: path for split, name in _FILES.items() if (path := files.find(name))}
    if len(found) < len(_FILES):
        old = [files.find(name.replace("_V2", "")) for split, name in _FILES.items() if split not in found]
        if any(old):
            raise DataError(
                f"{next(path for path in old if path)} is version 1 of the labels, many of which are wrong: put "
                f"{' and '.join(_FILES.values())} beside it"
            )
    if not found:
        raise files.not_found(_FILES.values(), "Diving48 annotations")
    names = _classes(files.need("Diving48_vocab.json", what="classes of Diving48"))
    clips = [clip for split, path in found.items() for clip in _clips(files, path, split, len(names))]
    return files.manifest(clips, {HEAD: names})


def _classes(path: Path) -> list[str]:
    """A class id is the position in the list."""
    vocabulary = read_json(path)
    if not isinstance(vocabulary, list) or not all(isinstance(parts, list) for parts in vocabulary):
        raise DataError(f"{path} is not a list of [takeoff, somersaults, twists, position]")
    return ["+".join(map(str, parts)) for parts in vocabulary]


def _clips(files: DatasetFiles, path: Path, split: str, num_classes: int) -> Iterator[Clip]:
    for entry in read_entries(path, ("vid_name", "label")):
        name, label = str(entry["vid_name"]), entry["label"]
        if not isinstance(label, int) or not 0 <= label < num_classes:
            raise DataError(f"{path}: {name} has the label {label!r}, not a class id below {num_classes}")
        yield Clip(
            clip_id=name,
            split=split,
            video=files.videos.find(name, folders=("rgb",)) or f"rgb/{name}.mp4",
            labels={HEAD: label},
            source={key: entry.get(key) for key in ("start_frame", "end_frame")},
        )


DIVING48 = Dataset(
    name="diving48",
    title="Diving48",
    read=read_diving48,
    official={
        "": {"train": 15_027, "test": 1_970}
    },  # the first is widely quoted, and not checked against a file
)
