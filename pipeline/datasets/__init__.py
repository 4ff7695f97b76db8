"""Readers of data sets: from the files people download to a manifest."""

import os
from collections.abc import Callable
from pathlib import Path

from vivit.pipeline.datasets.ek100 import read_ek100
from vivit.pipeline.datasets.folder import read_folder
from vivit.pipeline.datasets.webdataset import read_webdataset
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.storage import Location, Url
from vivit.pipeline.workspace import nearest

READERS: dict[str, Callable[[Path, Path | None], Manifest]] = {"ek100": read_ek100, "folder": read_folder}
"""Reader of each data set of files: (data root, folder of the annotation files or None to look for it) -> manifest."""
_NAMES = [*READERS, "webdataset"]


def read_dataset(
    name: str, data_root: Location | None = None, annotations: Path | None = None
) -> tuple[Manifest, Location]:
    """The manifest of data set `name`, and the folder or URL that its video paths start from."""
    if name not in _NAMES:
        raise nearest(name, _NAMES, "data set")
    if name == "webdataset":
        tars = data_root if isinstance(data_root, Url) else find_data_root(name, data_root)
        return read_webdataset(tars, annotations), tars
    if isinstance(data_root, Url):
        raise DataError(
            f"the files of {name} cannot be listed at {data_root}: pass a folder, or a manifest with --manifest"
        )
    root = find_data_root(name, data_root)
    return READERS[name](root, annotations), root


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
