"""WebDataset tars as a data set: every sample with a video is a clip, or holds some."""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.folder import HEAD, SPLIT_NAMES, hashed_split
from vivit.pipeline.datasets.tree import VIDEO_SUFFIXES, files_below
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import UNKNOWN, Clip, Manifest
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.tar_index import read_member, tar_index
from vivit.pipeline.tar_samples import SampleProblem, TarSample, samples_of

logger = logging.getLogger(__name__)

LABEL_FIELDS = ("cls", "label", "class", "class_name", "action")
"""Fields of a sample's json that may hold its class, as a number or a name; the first one counts."""
_PROBLEMS_SHOWN = 50
_LARGEST_ANNOTATION_BYTES = 16 << 20
_MOST_CLASSES = 1_000_000
_LONGEST_CLASS_TEXT = 100
_THREADS = 16


@dataclass(frozen=True)
class TarProblem:
    """Something that was left out of the data set, or lacks its label."""

    tar: str
    name: str
    """Key of the sample, name of a member, or empty for the tar itself."""
    reason: str

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}{': ' if self.name else ''}{self.reason}"


@dataclass(frozen=True)
class _Row:
    """A clip before it is known what other tars hold."""

    tar: str
    video: str
    clip_id: str
    start_sec: float | None = None
    end_sec: float | None = None
    labels: Mapping[str, int | str] = field(default_factory=dict)
    """Class per head, by id or by name."""
    names: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Id and name of its class per head, where both are known."""
    text: str | None = None
    """What its .txt says: a class, if nothing else names classes and it is not a caption."""


def read_webdataset(files: DatasetFiles) -> Manifest:
    """The manifest of all tars below a folder or URL; what is left out is logged with the reason.

    The split is in the name of a tar or of a folder on the way to it (train, val, test); where no tar has one, a hash of
    each clip's id puts about a fifth of the clips into validation. The class comes from `.cls`, a field of the
    `.json` (`LABEL_FIELDS`), or the `.txt`; without one a clip has no label.
    """
    if files.annotations:
        raise DataError("tars hold their own annotations: drop --annotations, or pass --manifest FILE")
    manifest, problems = read_tars(files.data_root)
    for problem in problems[:_PROBLEMS_SHOWN]:
        logger.warning("%s", problem)
    if len(problems) > _PROBLEMS_SHOWN:
        logger.warning("... and %d more samples of this kind", len(problems) - _PROBLEMS_SHOWN)
    return manifest


def read_tars(data_root: Location) -> tuple[Manifest, list[TarProblem]]:
    """The manifest of all tars below a folder or URL, and what is not in it or lacks its label."""
    tars = _tars(data_root)
    if not tars:
        raise DataError(f"no tars in {data_root}: files whose names end in .tar count")
    splits = _splits(tars)
    rows: list[_Row] = []
    problems: list[TarProblem] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        samples_of_tars = pool.map(lambda tar: _samples(data_root / tar), tars)
        for tar, (samples, found) in zip(tars, samples_of_tars, strict=True):
            problems += [TarProblem(tar, problem.name, problem.reason) for problem in found]
            # threads hide how long a store takes to answer; on a file system they only cost
            mapped = pool.map if isinstance(data_root, Url) else map
            made = list(mapped(partial(_rows_of, data_root, tar), samples))
            rows += [row for some, _ in made for row in some]
            problems += [problem for _, some in made for problem in some]
            problems += _without_annotations(tar, samples)
    if not rows:
        raise DataError(
            f"no samples with a video in the {len(tars)} tars of {data_root}"
            + "".join(f"\n  {problem}" for problem in problems[:_PROBLEMS_SHOWN])
        )
    return _manifest(rows, splits), problems


def _without_annotations(tar: str, samples: Sequence[TarSample]) -> list[TarProblem]:
    """The samples that lack what others of their tar have."""
    lacking = [sample.key for sample in samples if not _annotations(sample)]
    if len(lacking) == len(samples):
        return []
    return [TarProblem(tar, key, "no json, cls or txt: its label is unknown") for key in lacking]


def _tars(data_root: Location) -> list[str]:
    """Names of the tars below the root."""
    if isinstance(data_root, Url):
        return list(data_root.sizes_below(".tar"))
    return [str(path) for path in files_below(data_root, {".tar"})]


def _splits(tars: Sequence[str]) -> dict[str, str]:
    """Split of each tar by a word of its path; empty where none has one."""
    named = {tar: split for tar in tars if (split := _named_split(tar))}
    if named and len(named) < len(tars):
        other = next(tar for tar in tars if tar not in named)
        raise DataError(
            f"some tars have a split in their name ({min(named)}), others have none ({other}): put train, val or test "
            "into all names or none"
        )
    return named


def _named_split(tar: str) -> str | None:
    words = re.split(r"[^a-z]+", tar.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def _samples(tar: Location) -> tuple[list[TarSample], list[SampleProblem]]:
    """The samples of one tar; a tar that cannot be read has none, and does not stop the others."""
    try:
        index = tar_index(tar)
    except DataError as error:
        return [], [SampleProblem("", str(error).removeprefix(f"{tar} "))]
    except OSError as error:
        return [], [SampleProblem("", f"cannot be read: {error.strerror or error}")]
    samples, problems = samples_of(index)
    if not index.content.members and not index.content.refused:
        problems.append(SampleProblem("", "the tar is empty"))
    listed = {problem.name for problem in problems}
    for sample in samples:
        if _video(sample) is None and sample.key not in listed:
            fields = ", ".join(sample.fields)
            problems.append(SampleProblem(sample.key, f"no video among its fields ({fields})"))
    return [sample for sample in samples if _video(sample) is not None], problems


def _video(sample: TarSample) -> str | None:
    """Name of the member that is the video."""
    return next((m.name for name, m in sample.fields.items() if f".{name}" in VIDEO_SUFFIXES), None)


def _annotations(sample: TarSample) -> list[str]:
    return [name for name in ("cls", "json", "txt") if name in sample.fields]


def _rows_of(data_root: Location, tar: str, sample: TarSample) -> tuple[list[_Row], list[TarProblem]]:
    """The clips of one sample, and what is wrong with its annotations."""
    texts, problems = _texts(data_root, tar, sample)
    about: Any = None
    video = f"{tar}::{_video(sample)}"
    try:
        about = json.loads(texts["json"]) if "json" in texts else None
        if isinstance(about, dict) and isinstance(about.get("clips"), list) and about["clips"]:
            return [_packed_row(tar, video, clip) for clip in about["clips"]], problems
    except (KeyError, TypeError, AttributeError) as error:
        problems.append(TarProblem(tar, sample.key, f"the clips in its json are not as packed ({error!r})"))
    except (ValueError, RecursionError) as error:
        problems.append(
            TarProblem(tar, sample.key, f"its json does not parse ({error}): its label is unknown")
        )
    label = _label(texts.get("cls"), about)
    labels = {} if label is None else {HEAD: label}
    return [_Row(tar, video, sample.key, labels=labels, text=texts.get("txt"))], problems


def _texts(data_root: Location, tar: str, sample: TarSample) -> tuple[dict[str, str], list[TarProblem]]:
    """What the annotations of a sample say, by extension, and which cannot be read."""
    texts: dict[str, str] = {}
    problems: list[TarProblem] = []
    for name in _annotations(sample):
        member = sample.fields[name]
        try:
            if member.size_bytes > _LARGEST_ANNOTATION_BYTES:
                raise ValueError(f"{member.size_bytes} bytes")
            texts[name] = read_member(data_root / tar, member.name).decode().strip()
        except (ValueError, OSError) as error:
            problems.append(TarProblem(tar, sample.key, f"its {name} cannot be read ({error})"))
    return texts, problems


def _packed_row(tar: str, video: str, clip: Mapping[str, Any]) -> _Row:
    """A clip in the json of a sample that `vivit pack` wrote."""
    labels = {head: int(label["id"]) for head, label in clip["labels"].items()}
    return _Row(
        tar=tar,
        video=video,
        clip_id=str(clip["clip_id"]),
        start_sec=None if clip["start_sec"] is None else float(clip["start_sec"]),
        end_sec=None if clip["end_sec"] is None else float(clip["end_sec"]),
        labels=labels,
        names={head: (labels[head], str(label["name"])) for head, label in clip["labels"].items()},
    )


def _label(cls: str | None, about: Any) -> int | str | None:
    """The class that the .cls or the .json gives."""
    if cls:
        return int(cls) if re.fullmatch(r"[+-]?\d{1,9}", cls) else cls
    if isinstance(about, dict):
        for name in LABEL_FIELDS:
            value = about.get(name)
            if isinstance(value, int | str) and not isinstance(value, bool) and value != "":
                return value
    return None


def _manifest(rows: Sequence[_Row], splits: Mapping[str, str]) -> Manifest:
    if not any(row.labels for row in rows):
        rows = _with_classes_of_texts(rows)
    heads = _heads(rows)
    ids = {head: {name: index for index, name in enumerate(names)} for head, names in heads.items()}
    uses = Counter((splits.get(row.tar), row.clip_id) for row in rows)
    clips = []
    for row in rows:
        is_unique = uses[splits.get(row.tar), row.clip_id] == 1
        clip_id = row.clip_id if is_unique else f"{row.tar.removesuffix('.tar')}/{row.clip_id}"
        labels = {
            head: ids[head][label] if isinstance(label, str) else max(UNKNOWN, label)
            for head, label in row.labels.items()
        }
        split = splits.get(row.tar) or hashed_split(clip_id)
        clips.append(
            Clip(
                clip_id=clip_id, split=split, video=row.video, start_sec=row.start_sec, end_sec=row.end_sec, labels=labels
            )
        )  # fmt: skip
    return Manifest("webdataset", clips, heads=heads)


def _with_classes_of_texts(rows: Sequence[_Row]) -> list[_Row]:
    """The rows labelled by their texts, unless these are captions: long, or hardly ever the same."""
    texts = [row.text for row in rows if row.text]
    is_caption = any(len(text) > _LONGEST_CLASS_TEXT for text in texts) or len(set(texts)) > max(
        20, len(texts) // 2
    )
    if texts and is_caption:
        logger.warning("the .txt of the samples are captions rather than classes: the clips have no labels")
    if is_caption:
        return list(rows)
    return [replace(row, labels={HEAD: row.text}) if row.text else row for row in rows]


def _heads(rows: Sequence[_Row]) -> dict[str, list[str]]:
    """Class names per head, in id order."""
    heads: dict[str, list[str]] = {}
    for head in sorted({head for row in rows for head in row.labels}):
        labels = {row.labels[head]: row for row in rows if head in row.labels}
        numbers = [label for label in labels if isinstance(label, int)]
        words = sorted(label for label in labels if isinstance(label, str))
        if numbers and words:
            one, other = labels[numbers[0]], labels[words[0]]
            raise DataError(
                f"classes are numbers in some samples ({one.video}: {numbers[0]}) and names in others "
                f"({other.video}: {words[0]!r}): label the clips in a manifest, and pass it with --manifest"
            )
        if words:
            heads[head] = words
            continue
        if max(numbers) > _MOST_CLASSES:
            raise DataError(
                f"{labels[max(numbers)].video} has class {max(numbers)}: number the classes from 0"
            )
        names = dict(row.names[head] for row in rows if head in row.names)
        heads[head] = [names.get(index, str(index)) for index in range(max(numbers) + 1)]
    return heads


WEBDATASET = Dataset(name="webdataset", title="WebDataset tars", read=read_webdataset, takes_urls=True)
