"""What is opened as a video, and what is refused before FFmpeg sees it."""

import os
from pathlib import Path

import pytest

from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video import probe
from vivit.pipeline.video_source import Failure, open_source


def refusal(source: Path) -> Outcome:
    with pytest.raises(Failure) as caught:
        open_source(source)
    return caught.value.outcome


def test_what_is_no_file_is_named_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "broken.mp4").symlink_to(tmp_path / "gone.mp4")
    expected = {
        "fifo.mp4": Outcome.NOT_A_VIDEO,
        "folder.mp4": Outcome.NOT_A_VIDEO,
        "loop.mp4": Outcome.UNREADABLE,
        "broken.mp4": Outcome.MISSING,
        "gone.mp4": Outcome.MISSING,
        "gone/a.mp4": Outcome.MISSING,
        "a\0b.mp4": Outcome.MISSING,
    }
    assert {name: refusal(tmp_path / name) for name in expected} == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "secret.mp4"
    path.touch(mode=0)
    assert refusal(path) == Outcome.UNREADABLE


@pytest.mark.parametrize(
    "name", ["-i.mp4", "a%03d.mp4", "concat:a.mp4", "http:a#1?b.mp4", "动作 ü.mp4", b"\xff\xfe.mp4"]
)
def test_a_name_is_never_interpreted(
    video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(name))
    path.write_bytes((video_folder / "train/a/clip0.mp4").read_bytes())
    assert probe(path).num_frames == 20
