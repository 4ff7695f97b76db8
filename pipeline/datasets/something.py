"""Something-Something v2, and the splits of Something-Else on its videos, from their JSON files.

The class of a clip is its `template` without the brackets; `label` is free text.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vivit.pipeline.datasets.annotation_files import in_id_order, read_cells, read_entries, read_json
from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.folder import HEAD
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest

_VIDEOS = "20bn-something-something-v2"
_SSV2_FILES = {
    split: (f"something-something-v2-{split}.json", f"labels/{split}.json", f"{split}.json")
    for split in ("train", "validation", "test")
}
_SSV2_LABELS = ("something-something-v2-labels.json", "labels/labels.json", "labels.json")
_ANSWERS = ("something-something-v2-test-answers.csv", "labels/test-answers.csv", "test-answers.csv")
_ELSE_FOLDERS = {
    "compositional": "compositional",
    "shuffled": "compositional_shuffled",
    "oneobject": "compositional_oneobject",
}
_ELSE_PREFIXES = {"base": "base_", "5shot": "finetune_5shot_", "10shot": "finetune_10shot_"}


def read_ssv2(files: DatasetFiles) -> Manifest:
    """Manifest with one head of 174 classes, for those of train, validation and test whose JSON is there."""
    path = files.need(*_SSV2_LABELS, what="classes of Something-Something v2")
    names = _official_order(path)
    answers = _answers(files)
    found = {split: file for split, names_ in _SSV2_FILES.items() if (file := files.find(*names_))}
    if not found:
        raise files.not_found(
            [names_[0] for names_ in _SSV2_FILES.values()], "Something-Something v2 annotations"
        )
    clips = [clip for split, file in found.items() for clip in _clips(files, file, split, names, answers)]
    return files.manifest(clips, {HEAD: names})


def read_something_else(files: DatasetFiles) -> Manifest:
    """Manifest of one of Something-Else's splits, with classes in the order of their sorted names.

    The numbers in its labels.json are ignored, as in its authors' loader.
    """
    templates = read_json(
        path := files.need(*_else_names(files.variant, "labels"), what="Something-Else classes")
    )
    if not isinstance(templates, dict):
        raise DataError(f"{path} is not a JSON object of templates")
    names = sorted(templates)
    found = {
        split: file
        for split, words in {"train": ("train", "training"), "validation": ("validation", "val")}.items()
        if (file := files.find(*(name for word in words for name in _else_names(files.variant, word))))
    }
    if not found:
        raise files.not_found(_else_names(files.variant, "train"), "Something-Else annotations")
    clips = [clip for split, file in found.items() for clip in _clips(files, file, split, names, {})]
    return files.manifest(clips, {HEAD: names})


def _else_names(variant: str, what: str) -> tuple[str, ...]:
    if variant in _ELSE_FOLDERS:
        return (f"{_ELSE_FOLDERS[variant]}/{what}.json", f"{what}.json")
    if what == "labels" and variant != "base":
        return ("finetune_labels.json",)
    return (f"{_ELSE_PREFIXES[variant]}{what}.json",)


def _official_order(path: Path) -> list[str]:
    """Class names by the numbers in the labels file, which are strings."""
    labels = read_json(path)
    try:
        names = {int(number): name for name, number in labels.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not map each template to its number ({error})") from error
    return in_id_order(names, path, len(labels))


def _answers(files: DatasetFiles) -> dict[str, str]:
    """Template of each test clip, where the answers are there."""
    path = files.find(*_ANSWERS)
    rows = read_cells(path, separator=";") if path else []
    if any(len(row) != 2 for row in rows):
        raise DataError(f"{path}: a line is not `id;template`")
    return {row[0].strip(): row[1].strip() for row in rows}


def _clips(
    files: DatasetFiles, path: Path, split: str, names: list[str], answers: Mapping[str, str]
) -> Iterator[Clip]:
    ids = {name: index for index, name in enumerate(names)}
    for entry in read_entries(path, ("id",) if split == "test" else ("id", "template")):
        clip_id = str(entry["id"])
        template = str(entry.get("template") or answers.get(clip_id, "")).replace("[", "").replace("]", "")
        if template and template not in ids:
            raise DataError(
                f"{path}: clip {clip_id} has the template {template!r}, which is not among the classes"
            )
        source: dict[str, Any] = {"caption": entry.get("label")}
        yield Clip(
            clip_id=clip_id,
            split=split,
            video=files.videos.find(clip_id, folders=(_VIDEOS,)) or f"{_VIDEOS}/{clip_id}.webm",
            labels={HEAD: ids[template]} if template else {},
            source=source,
        )


SSV2 = Dataset(
    name="ssv2",
    title="Something-Something v2",
    read=read_ssv2,
    official={"": {"train": 168_913, "validation": 24_777, "test": 27_157}},
)
SOMETHING_ELSE = Dataset(
    name="something-else",
    title="Something-Else",
    read=read_something_else,
    variants={
        "compositional": "174 classes, other objects in training and validation",
        "shuffled": "the compositional clips, dealt out anew",
        "oneobject": "clips with one object, 166 classes",
        "base": "the base classes of the few-shot task",
        "5shot": "the novel classes, 5 clips each",
        "10shot": "the novel classes, 10 clips each",
    },
    official={
        "compositional": {"train": 54_919, "validation": 57_876},  # widely quoted, not checked against a file
        "base": {"validation": 12_467},
        "5shot": {"train": 430},
        "10shot": {"train": 860},
    },
)
