"""HMDB51 from the lists of its three official splits, one per class. Its names hold brackets and much else."""

from collections.abc import Iterator
from pathlib import Path

from vivit.pipeline.datasets.annotation_files import read_lines
from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.folder import HEAD
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest

_NUM_CLASSES = 51
_MARK = "_test_split"
_SPLIT_OF_FLAG = {"1": "train", "2": "test", "0": None}
"""0: the video is in neither part of this split."""


def read_hmdb51(files: DatasetFiles) -> Manifest:
    """Manifest of one split, with one head: classes in the order of their sorted names."""
    lists = [path for number in "123" for path in files.all_named(f"{_MARK}{number}.txt")]
    suffix = f"{_MARK}{files.variant}.txt"
    wanted = [path for path in lists if path.name.endswith(suffix)]
    if not wanted:
        raise files.not_found([f"<class>{suffix}"], "HMDB51 lists (testTrainMulti_7030_splits)")
    files.take(wanted)
    names = sorted({path.name.rpartition(_MARK)[0] for path in lists})
    if len(names) != _NUM_CLASSES or len(wanted) != _NUM_CLASSES:
        files.notes.append(
            f"split {files.variant} has lists of {len(wanted)} classes, all splits of {len(names)}; HMDB51 has "
            f"{_NUM_CLASSES}"
        )
    ids = {name: index for index, name in enumerate(names)}
    clips = [clip for path in wanted for clip in _clips(files, path, ids)]
    return files.manifest(clips, {HEAD: names})


def _clips(files: DatasetFiles, path: Path, ids: dict[str, int]) -> Iterator[Clip]:
    name = path.name.rpartition(_MARK)[0]
    for at, line in enumerate(read_lines(path)):
        file, _, flag = line.rpartition(" ")
        if not file or flag not in _SPLIT_OF_FLAG:
            raise DataError(f"{path}, line {at + 1}: {line!r} is not `name.avi flag` with the flag 0, 1 or 2")
        split = _SPLIT_OF_FLAG[flag]
        if split is None:
            continue
        video = (
            files.videos.find(file.strip().rpartition(".")[0], folders=(name,)) or f"{name}/{file.strip()}"
        )
        yield Clip(clip_id=f"{name}/{file.strip()}", split=split, video=video, labels={HEAD: ids[name]})


HMDB51 = Dataset(
    name="hmdb51",
    title="HMDB51",
    read=read_hmdb51,
    variants={"1": "official split 1", "2": "official split 2", "3": "official split 3"},
    official={number: {"train": 3_570, "test": 1_530} for number in "123"},
)
