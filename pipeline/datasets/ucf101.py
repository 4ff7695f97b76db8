"""UCF101 from its three official splits. Class ids are those of classInd.txt, whose order is not that of sorted names."""

from collections.abc import Iterator
from pathlib import Path

from vivit.pipeline.datasets.annotation_files import in_id_order, read_lines
from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.folder import HEAD
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest

_LISTS = {"train": "trainlist0{}.txt", "test": "testlist0{}.txt"}


def read_ucf101(files: DatasetFiles) -> Manifest:
    """Manifest of one split, with one head; the clip id is the name in the lists."""
    path = files.need("classInd.txt", what="class list of UCF101")
    names = _classes(path)
    lists = {
        split: files.need(name.format(files.variant), what="UCF101 list") for split, name in _LISTS.items()
    }
    clips = [clip for split, file in lists.items() for clip in _clips(files, file, split, names)]
    return files.manifest(clips, {HEAD: names})


def _classes(path: Path) -> list[str]:
    """Names by the numbers before them, which begin at 1."""
    lines = read_lines(path)
    try:
        names = {int(number) - 1: name.strip() for number, _, name in (line.partition(" ") for line in lines)}
    except ValueError as error:
        raise DataError(f"{path}: a line is not `number name` ({error})") from error
    return in_id_order(names, path, len(lines))


def _clips(files: DatasetFiles, path: Path, split: str, names: list[str]) -> Iterator[Clip]:
    ids = {name: index for index, name in enumerate(names)}
    for at, line in enumerate(read_lines(path)):
        name, _, number = line.partition(" ")
        folder, _, file = name.rpartition("/")
        if folder not in ids:
            raise DataError(f"{path}, line {at + 1}: {line!r} does not begin with one of the classes and `/`")
        if number and number.strip() != str(ids[folder] + 1):
            raise DataError(
                f"{path}, line {at + 1}: {line!r} has another class number than classInd.txt, {ids[folder] + 1}"
            )
        # some copies write v_HandstandPushups_* for v_HandStandPushups_*
        stem = files.videos.spelling_of(file.rpartition(".")[0])
        found = files.videos.find(stem, folders=(folder,))
        yield Clip(clip_id=name, split=split, video=found or f"UCF-101/{name}", labels={HEAD: ids[folder]})


UCF101 = Dataset(
    name="ucf101",
    title="UCF101",
    read=read_ucf101,
    variants={"1": "official split 1", "2": "official split 2", "3": "official split 3"},
    official={
        "1": {"train": 9_537, "test": 3_783},
        "2": {"train": 9_586, "test": 3_734},
        "3": {"train": 9_624, "test": 3_696},
    },
)
