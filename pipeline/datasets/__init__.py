"""Readers of data sets: from the files people download to a manifest."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from vivit.pipeline.datasets.dataset import Dataset, DatasetFiles
from vivit.pipeline.datasets.diving48 import DIVING48
from vivit.pipeline.datasets.ek100 import EK100
from vivit.pipeline.datasets.folder import FOLDER
from vivit.pipeline.datasets.hmdb51 import HMDB51
from vivit.pipeline.datasets.kinetics import K400, K600, K700
from vivit.pipeline.datasets.lists import LISTS
from vivit.pipeline.datasets.mit import MIT
from vivit.pipeline.datasets.something import SOMETHING_ELSE, SSV2
from vivit.pipeline.datasets.ucf101 import UCF101
from vivit.pipeline.datasets.webdataset import WEBDATASET
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.workspace import nearest

__all__ = [
    "ENTRY_POINTS",
    "Dataset",
    "DatasetFiles",
    "LoadedDataset",
    "dataset_named",
    "prepare",
    "read_dataset",
]

ENTRY_POINTS = "vivit.datasets"
"""Group of the entry points by which other packages add data sets: each is a `Dataset`."""

_DATASETS = {
    dataset.name: dataset
    for dataset in (
        EK100, K400, K600, K700, SSV2, MIT, SOMETHING_ELSE, UCF101, HMDB51, DIVING48, FOLDER, WEBDATASET, LISTS,
    )
}  # fmt: skip

AnnotationPaths = Path | Sequence[Path] | None


@dataclass(frozen=True)
class LoadedDataset:
    """A data set as it was read, with what its reader has to say."""

    dataset: Dataset
    manifest: Manifest
    files: DatasetFiles

    @property
    def official(self) -> dict[str, int]:
        """Rows of the official files per split, where they are known."""
        return dict(self.dataset.official.get(self.files.variant, {}))


def dataset_named(name: str) -> Dataset:
    """The data set of this name, of vivit or of another package; ConfigError for an unknown one."""
    if name in _DATASETS:
        return _DATASETS[name]
    others = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in others:
        raise nearest(name, [*_DATASETS, *others], "data set")
    entry = others[name]
    where = f"the data set {name} of {entry.dist.name if entry.dist else 'another package'} ({entry.value})"
    try:
        found = entry.load()
    except Exception as error:
        raise DataError(f"{where} cannot be loaded: {error!r}") from error
    if not isinstance(found, Dataset):
        raise DataError(f"{where} is a {type(found).__name__}, not a vivit.pipeline.datasets.Dataset")
    return found


def load_dataset(
    name: str, data_root: Location | None = None, annotations: AnnotationPaths = None
) -> LoadedDataset:
    """Read the data set `name`, or `name:variant`, from its files."""
    base, _, asked = name.partition(":")
    dataset = dataset_named(base)
    if isinstance(data_root, Url) and not dataset.takes_urls:
        raise DataError(
            f"the files of {name} cannot be listed at {data_root}: pass a folder, or a manifest with --manifest"
        )
    variant = dataset.variant(asked)
    is_default = variant == dataset.variant("")
    files = DatasetFiles(
        name=base if is_default else f"{base}:{variant}",
        data_root=data_root if isinstance(data_root, Url) else find_data_root(base, data_root),
        annotations=[annotations] if isinstance(annotations, Path) else list(annotations or ()),
        variant=variant,
    )
    return LoadedDataset(dataset, dataset.read(files), files)


def read_dataset(
    name: str, data_root: Location | None = None, annotations: AnnotationPaths = None
) -> tuple[Manifest, Location]:
    """The manifest of data set `name`, and the folder or URL that its video paths start from."""
    loaded = load_dataset(name, data_root, annotations)
    return loaded.manifest, loaded.files.data_root


def find_data_root(name: str, data_root: Path | None = None) -> Path:
    """`data_root` where given, else `<name>` below VIVIT_DATA_ROOT or below `data`; DataError where there is none."""
    if data_root is not None:
        if not data_root.is_dir():
            raise DataError(
                f"the data root {data_root} is not a folder: pass the folder that holds the videos"
            )
        return data_root
    base = Path(os.environ.get("VIVIT_DATA_ROOT", "data"))
    if (base / name).is_dir():
        return base / name
    raise DataError(
        f"no data root for {name}: {base / name} does not exist. Pass --data-root FOLDER, "
        f"or set VIVIT_DATA_ROOT to the folder that holds {name}/"
    )
