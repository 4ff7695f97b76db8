"""What a run says: the table of workers, JSON lines, and the table of outcomes."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pa_parquet
import pytest
from rich.console import Console

from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.errors import DataError
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.blocks import BlockReport, Seconds, Work
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.event_log import event_log
from vivit.stage1_extract.extract import extract
from vivit.stage1_extract.tally import InWork, Tally


def report(*outcomes: str, seconds: Seconds) -> BlockReport:
    records = [
        ClipRecord(clip_id=str(i), outcome=outcome, message="why") for i, outcome in enumerate(outcomes)
    ]
    work = Work("train", 0, tuple(range(len(records))), range(1))
    return BlockReport(work, records, seconds, 8 * len(records))


def test_the_table_shows_every_worker_the_limit_and_the_failures() -> None:
    tally = Tally(failed=[], max_failures=None)
    for name in ("node-1:7", "node-2:9"):
        tally.block(tally.worker(name), report("ok", "corrupt", seconds=Seconds(3.0, 1.0, 0.0)))
    tally.worker("node-2:9").in_work = InWork(3, 24, Seconds(0.0, 2.0, 0.0))
    console = Console(width=150, record=True)
    console.print(tally.board())
    text = console.export_text()
    rows = [line.split() for line in text.splitlines()]
    assert [row[:4] for row in rows[1:3]] == [
        ["node-1:7", "starts", "1", "2"],
        ["node-2:9", "starts", "1", "5"],
    ]
    assert rows[1][-3:] == ["75%", "25%", "0%"]
    assert rows[2][-3:] == ["50%", "50%", "0%"]
    assert "limited by decode (60% of the time): more --decode-threads or --decode-workers" in text
    assert "clips not complete: 2 corrupt" in text
    assert (tally.clips, tally.crops, tally.blocks, tally.failed) == (7, 56, 2, 0)


def test_too_many_failures_end_the_run_after_the_block_that_has_them() -> None:
    tally = Tally(failed=[("train", 7)], max_failures=2)
    tally.block(tally.worker("a"), report("ok", "missing", seconds=Seconds()))
    with pytest.raises(DataError, match=r"more than 2 clips have no features \(the last: 0, timeout: why\)"):
        tally.block(
            tally.worker("a"), report("timeout", seconds=Seconds())
        )  # row 0; the one before was row 1
    assert tally.blocks == 2


def test_json_lines_and_outcomes_tell_what_happened(video_folder: Path, tmp_path: Path) -> None:
    views = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, test_clips=1, test_crops=1)
    plain = read_dataset("folder", video_folder)[0]
    gone = Clip(clip_id="gone", split="validation", video="gone.mp4", start_sec=1.5)
    manifest = Manifest("some", [*plain.clips, gone], heads=plain.heads)
    log = tmp_path / "logs/run.jsonl"
    config = ExtractConfig(
        cache=tmp_path / "c.zarr", data_root=video_folder, backbone="vit_ti16", weights="random", views=views,
        device="cpu", block_size=4, log_json=str(log),
    )  # fmt: skip
    extract(config, manifest)
    extract(replace(config, retry_failed=True), manifest)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events] == [
        "begin", "block", "block", "block", "clip", "block", "progress", "end",
        "begin", "block", "clip", "progress", "end",
    ]  # fmt: skip
    begin, block, clip, progress, end = (events[at] for at in (0, 1, 4, 6, 7))
    assert (begin["blocks"], begin["clips"], begin["config"]["backbone"]) == (4, 12, "vit_ti16")
    assert (block["split"], block["block"], block["clips"], block["crops"]) == ("train", 0, 4, 16)
    assert set(block["seconds"]) == {"decode", "encode", "write"}
    assert (clip["split"], clip["clip_id"], clip["outcome"]) == ("validation", "gone", "missing")
    assert (progress["clips"], progress["of"], progress["failures"]) == (12, 12, {"missing": 1})
    assert [worker["blocks"] for worker in progress["workers"]] == [4]
    assert end["outcomes"] == {"ok": 10, "short": 1, "missing": 1}

    rows = pa_parquet.read_table(config.cache / "outcomes.parquet").to_pylist()
    assert [(row["split"], row["row"], row["clip_id"]) for row in rows] == [
        (split, row, clip.clip_id)
        for split in ("train", "validation")
        for row, clip in enumerate(manifest.of_split(split))
    ]
    (lost,) = [row for row in rows if row["clip_id"] == "gone"]
    assert (lost["outcome"], lost["usable"], lost["usable_views"], lost["start_sec"]) == (
        "missing",
        False,
        0,
        1.5,
    )
    assert sum(row["usable_views"] for row in rows) == 7 * 1 + 4 * 1


def test_a_log_on_standard_error_takes_the_place_of_the_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with event_log("-") as log:
        tally = Tally(failed=[], max_failures=None, log=log)
        with tally.shown(2):
            tally.block(tally.worker("a"), report("ok", "ok", seconds=Seconds(1.0, 2.0, 3.0)))
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["block", "progress"]
