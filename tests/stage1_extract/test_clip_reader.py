"""Decoders that hang: found, given up, and named."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vivit.pipeline.manifest import Clip
from vivit.pipeline.video import read_clips
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract import clip_reader
from vivit.stage1_extract.clip_reader import CropSettings, CropStream, crop_clips

VIDEO, OTHER = "train/a/clip0.mp4", "train/b/clip1.mp4"
SETTINGS = CropSettings(
    views=ViewSpec(num_frames=4, stride=1, resize=40, crop_size=32, test_clips=1, test_crops=1),
    seed=0,
    interpolation="bilinear",
    timeout_sec=0.3,
)


def clips_of(video: str) -> list[Clip]:
    return [
        Clip(clip_id=f"{video} {i}", split="test", video=video, start_sec=i / 5, end_sec=(i + 1) / 5)
        for i in range(3)
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_clip_whose_decoder_hangs_has_timed_out_and_its_neighbours_have_crops(
    video_folder: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """With a room of one clip, so that the threads of the later video wait until it is asked for."""
    clips = [*clips_of(VIDEO), *clips_of(OTHER)]
    expected = [
        item
        for video in (VIDEO, OTHER)
        for item in crop_clips(video_folder / video, clips_of(video), SETTINGS)
    ]

    def hanging(source: Path, spans: Any, *args: Any, **options: Any) -> Iterator[Any]:
        results = read_clips(source, spans, *args, **options)
        for at, result in results:
            if source.name == "clip0.mp4" and spans[at].start_sec == 0.2:
                time.sleep(3600)
            yield at, result

    monkeypatch.setattr(clip_reader, "read_clips", hanging)
    began = time.monotonic()
    with CropStream(video_folder, SETTINGS, threads=threads, budget_bytes=0) as stream:
        items = list(stream.read([clips]))
    assert time.monotonic() - began < 60
    assert [item.clip.clip_id for item in items] == [clip.clip_id for clip in clips]
    assert [item.result.outcome for item in items] == ["ok", "timeout", "ok", "ok", "ok", "ok"]
    assert items[1].crops is None
    assert items[1].result.message == "the decoder hung: no sign of life for 0.45 s"
    for at in (0, 2, 3, 4, 5):
        np.testing.assert_array_equal(items[at].crops, expected[at].crops)


def test_a_decoder_that_hangs_after_its_last_clip_costs_its_thread_only(
    video_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hanging(source: Path, *args: Any, **options: Any) -> Iterator[Any]:
        yield from read_clips(source, *args, **options)
        if source.name == "clip0.mp4":
            time.sleep(3600)

    monkeypatch.setattr(clip_reader, "read_clips", hanging)
    with CropStream(video_folder, SETTINGS, threads=1, budget_bytes=0) as stream:
        items = list(stream.read([[*clips_of(VIDEO), *clips_of(OTHER)]]))
    assert [item.result.outcome for item in items] == ["ok"] * 6


def test_an_encoder_that_takes_its_time_is_no_hang(video_folder: Path) -> None:
    with CropStream(video_folder, SETTINGS, threads=1, budget_bytes=0) as stream:
        items = []
        for item in stream.read([clips_of(VIDEO)]):
            time.sleep(0.7)
            items.append(item)
    assert [item.result.outcome for item in items] == ["ok", "ok", "ok"]


def test_several_settings_get_their_own_crops_from_one_pass(video_folder: Path) -> None:
    """Also where they choose other frames: the training views of another seed."""
    clips = [replace(clip, split="train") for clip in clips_of(VIDEO)]
    views = replace(SETTINGS.views, train_views=2, num_frames=2)
    one = replace(SETTINGS, views=views, timeout_sec=60)
    other = replace(one, seed=1, views=replace(views, crop_size=24, resize=30), interpolation="bicubic")
    both = list(crop_clips(video_folder / VIDEO, clips, [one, other]))
    for number, settings in enumerate((one, other)):
        for item, alone in zip(both, crop_clips(video_folder / VIDEO, clips, settings), strict=True):
            assert item.crops_of is not None
            np.testing.assert_array_equal(item.crops_of[number], alone.crops)
            assert item.result == alone.result
