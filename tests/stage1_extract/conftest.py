from pathlib import Path

import pytest

from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.manifest import Manifest


@pytest.fixture(scope="session")
def manifest(video_folder: Path) -> Manifest:
    """The clips of `video_folder`."""
    return read_dataset("folder", video_folder)[0]
