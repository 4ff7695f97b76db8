"""The two files that EPIC-KITCHENS-100 takes: the challenge submission, and the results of the official script.

Both hold log-probabilities: whoever takes their softmax gets the probabilities back, and cannot underflow on the way.
"""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vivit.pipeline.datasets.ek100_official import EK100_HEADS
from vivit.pipeline.errors import DataError
from vivit.pipeline.workspace import storage_errors, sync_folder, write_atomically
from vivit.stage2_temporal.metrics import log_softmax

Scores = Mapping[str, npt.NDArray[np.float32]]
"""Scores [clip, class] of verb and noun."""

_MEMBER = "test.json"
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)
"""Same scores, same bytes."""


def log_probabilities(logits: Mapping[str, npt.NDArray[np.float32]], ids: Sequence[str]) -> Scores:
    """Of both heads; DataError, with the clip, where one is not a number."""
    scores = {head: log_softmax(logits[head]).astype(np.float32) for head in EK100_HEADS}
    for head, values in scores.items():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise DataError(
                f"the {head} scores of {ids[bad[0]]} (and of {len(bad) - 1} more clips) are not finite: train again"
            )
    return scores


def write_submission(path: Path, ids: Sequence[str], scores: Scores, supervision: Mapping[str, int]) -> None:
    """Write the challenge's zip, clip by clip, whole or not at all."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                _write_zip(file, submission_json(ids, scores, supervision))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)


def submission_json(ids: Sequence[str], scores: Scores, supervision: Mapping[str, int]) -> Iterator[str]:
    """The text of the submission, in one part per clip; `supervision` are its levels by name, sls_pt, sls_tl and sls_td."""
    about = {"version": "0.2", "challenge": "action_recognition"} | dict(supervision)
    yield json.dumps(about)[:-1] + ', "results": {'
    for row, clip_id in enumerate(ids):
        by_class = {head: _by_class(scores[head][row]) for head in EK100_HEADS}
        yield f"{', ' if row else ''}{json.dumps(clip_id)}: {json.dumps(by_class, allow_nan=False)}"
    yield "}}"


def _by_class(values: npt.NDArray[np.float32]) -> dict[str, float]:
    return {str(index): value for index, value in enumerate(values.tolist())}


def _write_zip(file: IO[bytes], parts: Iterator[str]) -> None:
    member = zipfile.ZipInfo(_MEMBER, _FIXED_TIME)
    member.compress_type = zipfile.ZIP_DEFLATED
    member.external_attr = 0o644 << 16
    with zipfile.ZipFile(file, "w") as archive, archive.open(member, "w") as opened:
        for part in parts:
            opened.write(part.encode())


def write_results(path: Path, ids: Sequence[str], scores: Scores) -> None:
    """Write what the official script reads: a pickled dict of verb_output, noun_output [clip, class] and narration_id."""
    values = {f"{head}_output": scores[head] for head in EK100_HEADS} | {"narration_id": np.array(ids, str)}
    buffer = io.BytesIO()
    _PortablePickler(buffer, protocol=4).dump(values)
    with storage_errors(path):
        write_atomically(path, buffer.getvalue())


class _PortablePickler(pickle.Pickler):
    """Pickles arrays as calls of `numpy.ndarray(shape, dtype, buffer)`, which every NumPy can read.

    NumPy's own way names functions of its private modules, which NumPy 2 moved: NumPy 1 cannot load them.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(np.ascontiguousarray(obj).tobytes()))
        return NotImplemented
