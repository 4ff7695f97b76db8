"""What became of every clip of a cache, as one table for people and their tools."""

import io

import pyarrow as pa
import pyarrow.parquet as pa_parquet

from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.storage import Location
from vivit.pipeline.workspace import storage_errors, write_atomically

OUTCOMES = "outcomes.parquet"


def outcomes_table(cache: FeatureCache) -> pa.Table:
    """One row per clip, in the order of the manifest: split, row in the split, clip_id, video, start_sec, end_sec, outcome
    (null where its block is not committed), usable, usable_views, message, num_frames."""
    rows = [
        {
            "split": split,
            "row": row,
            "clip_id": clip.clip_id,
            "video": clip.video,
            "start_sec": clip.start_sec,
            "end_sec": clip.end_sec,
            "outcome": None if record is None else record.outcome,
            "usable": None if record is None else record.usable,
            "usable_views": None if record is None else views,
            "message": None if record is None else record.message,
            "num_frames": None if record is None else record.num_frames,
        }
        for split in cache.splits
        for row, (clip, record, views) in enumerate(
            zip(
                cache.manifest.of_split(split),
                cache.records(split),
                cache.usable_views(split).tolist(),
                strict=True,
            )
        )
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def write_outcomes(cache: FeatureCache) -> Location:
    """Write the table into the cache; it is for reading only, the ledger is what counts."""
    parquet = io.BytesIO()
    pa_parquet.write_table(outcomes_table(cache), parquet)
    path = cache.path / OUTCOMES
    with storage_errors(path):
        write_atomically(path, parquet.getvalue())
    return path


_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("row", pa.int64()),
        ("clip_id", pa.string()),
        ("video", pa.string()),
        ("start_sec", pa.float64()),
        ("end_sec", pa.float64()),
        ("outcome", pa.string()),
        ("usable", pa.bool_()),
        ("usable_views", pa.int64()),
        ("message", pa.string()),
        ("num_frames", pa.int64()),
    ]
)
