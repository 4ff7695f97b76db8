"""Moments in Time from its official package: category file, CSVs without a header, and videos in class folders."""

from collections.abc import Iterator
from pathlib import Path

from vivit.pipeline.datasets.annotation_files import in_id_order, read_cells, read_lines
from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.folder import HEAD
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest

_NUM_CATEGORIES = {"v1": 339, "v2": 305}
_SPLITS = {"train": ("trainingSet.csv", "training"), "validation": ("validationSet.csv", "validation")}


def read_mit(files: DatasetFiles) -> Manifest:
    """Manifest with one head, of 339 classes in v1 and 305 in v2: the two number them differently."""
    categories = ("moments_categories.txt", f"category_moments{files.variant}.txt")
    path = files.need(*categories, what="categories of Moments in Time")
    names = _categories(path)
    _check_version(files, path, len(names))
    found = {split: file for split, (name, _) in _SPLITS.items() if (file := files.find(name))}
    if not found:
        raise files.not_found([name for name, _ in _SPLITS.values()], "Moments in Time annotations")
    clips = [clip for split, file in found.items() for clip in _clips(files, file, split, names)]
    return files.manifest(clips, {HEAD: names})


def _check_version(files: DatasetFiles, path: Path, count: int) -> None:
    wanted = _NUM_CATEGORIES[files.variant]
    other = next((v for v, number in _NUM_CATEGORIES.items() if number == count and number != wanted), None)
    if other:
        raise DataError(f"{path} has {count} categories, so this is {other}: ask for mit:{other}")
    if count != wanted:
        files.notes.append(
            f"{path.name} has {count} categories, Moments in Time {files.variant} has {wanted}"
        )


def _categories(path: Path) -> list[str]:
    """Class names in id order: lines `name,index`, or one name a line."""
    lines = read_lines(path)
    if not all("," in line for line in lines):
        return in_id_order(dict(enumerate(lines)), path)
    try:
        names = {int(number): name for name, _, number in (line.rpartition(",") for line in lines)}
    except ValueError as error:
        raise DataError(f"{path}: a line is not `name,index` ({error})") from error
    return in_id_order(names, path, len(lines))


def _clips(files: DatasetFiles, path: Path, split: str, names: list[str]) -> Iterator[Clip]:
    ids = {_key(name): index for index, name in enumerate(names)}
    in_other_folders = 0
    for at, row in enumerate(read_cells(path)):
        if len(row) < 2 or "/" not in row[0]:
            raise DataError(
                f"{path}, row {at + 1}: {','.join(row)!r} does not begin with `class/file.mp4,label`"
            )
        name, label = row[0].strip(), row[1].strip()
        if _key(label) not in ids:
            raise DataError(
                f"{path}, row {at + 1}: the label {label!r} is not among the {len(names)} categories"
            )
        folder, _, file = name.rpartition("/")
        in_other_folders += _key(folder) != _key(label)
        found = files.videos.find(file.rpartition(".")[0], folders=_SPLITS[split][1:], parent=folder)
        yield Clip(
            clip_id=name,
            split=split,
            video=found or f"{_SPLITS[split][1]}/{name}",
            labels={HEAD: ids[_key(label)]},
            source={f"votes_{word}": cell for word, cell in zip(("for", "against"), row[2:4], strict=False)},
        )
    if in_other_folders:
        files.notes.append(
            f"{path.name}: {in_other_folders} labels differ from their folder; the label counts"
        )


def _key(name: str) -> str:
    """`adult+female+singing`, with words joined in any way."""
    return name.replace("+", " ").replace("_", " ")


MIT = Dataset(
    name="mit",
    title="Moments in Time",
    read=read_mit,
    variants={"v1": "339 classes", "v2": "305 classes"},
    official={
        "v1": {"train": 802_264, "validation": 33_900},  # widely quoted, and not checked against a file
        "v2": {"train": 727_305, "validation": 30_500},
    },
)
