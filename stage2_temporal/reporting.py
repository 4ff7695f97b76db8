"""From the logits of a split's clips to scores, and to the files that hold them."""

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet

from vivit.pipeline.datasets.ek100_official import is_ek100
from vivit.pipeline.errors import ConfigError, DataError
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.workspace import storage_errors, write_atomically
from vivit.stage2_temporal.challenge_files import log_probabilities, write_results, write_submission
from vivit.stage2_temporal.ek100_metrics import OfficialNumber, official_numbers
from vivit.stage2_temporal.evaluation import Evaluation, Labels, Logits, coverage_of, scores_of
from vivit.stage2_temporal.joint_head import FUSION, Pairs
from vivit.stage2_temporal.loader import Rows
from vivit.stage2_temporal.official_ids import check_ids, clip_subsets
from vivit.stage2_temporal.report_options import ReportOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoredSplit:
    """Logits of the clips of a split that could be evaluated."""

    manifest: Manifest
    split: str
    rows: Rows
    """The evaluated clips, as rows of the split."""
    logits: Logits
    """Per head [evaluated clip, class]."""
    records: Sequence[ClipRecord | None]
    """What became of each clip of the split."""
    num_views: int
    pairs: Pairs | None = None
    """Classes of the joint head, where there is one."""

    @property
    def clips(self) -> list[Clip]:
        """The evaluated clips."""
        clips = self.manifest.of_split(self.split)
        return [clips[row] for row in self.rows]

    @property
    def labels(self) -> Labels:
        """Class ids of the evaluated clips, per head."""
        return {head: values[self.rows] for head, values in self.manifest.labels(self.split).items()}


def check_options(options: ReportOptions, manifest: Manifest, pairs: Pairs | None) -> None:
    """ConfigError where an option asks for what the heads do not give."""
    options.check_heads(manifest.heads)
    if options.fusion is not None and pairs is None:
        raise ConfigError(
            "--fusion is for a model with a joint head (train-temporal --joint-head), and this one has none: leave it out"
        )


def check_clips(options: ReportOptions, manifest: Manifest, split: str, rows: Rows) -> list[str]:
    """What is missing or extra among the rows to evaluate, in sentences.

    DataError where files of them are to be written, unless `allow_partial`.
    """
    clips = [clip.clip_id for clip in manifest.of_split(split)]
    found = check_ids(
        split,
        clips,
        [clips[row] for row in rows],
        annotations=options.annotations,
        official=is_ek100(manifest.heads),
    )
    if found.problems and options.writes_files and not options.allow_partial:
        raise DataError(
            "a submission or results file must have every clip of the split:\n  "
            + "\n  ".join(found.problems)
            + "\npass --allow-partial to write it all the same"
        )
    return found.problems


def report(scored: ScoredSplit, options: ReportOptions, folder: Path, **about: Any) -> Evaluation:
    """Score the split, and write <split>.json and .parquet into `folder` and the files that `options` ask for.

    `about` are the fields of Evaluation that say what was evaluated.
    """
    split, manifest = scored.split, scored.manifest
    ids = [clip.clip_id for clip in scored.clips]
    notes = check_clips(options, manifest, split, scored.rows)
    official, left_out = _official(scored, options)
    fusion = FUSION if options.fusion is None else options.fusion
    evaluation = Evaluation(
        **about,
        split=split,
        num_views=scored.num_views,
        scores=scores_of(
            scored.logits, manifest.labels(split), scored.rows, pairs=scored.pairs, fusion=fusion
        ),
        coverage=coverage_of(list(scored.records)),
        clips_sha256=hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        official=official,
        notes=notes + left_out,
        fusion=None if scored.pairs is None else fusion,
    )
    write_evaluation(folder, evaluation, clip_table(ids, scored.labels, scored.logits, scored.num_views))
    _write_files(scored, options, ids)
    return evaluation


def _official(scored: ScoredSplit, options: ReportOptions) -> tuple[dict[str, OfficialNumber], list[str]]:
    if not is_ek100(scored.manifest.heads):
        return {}, []
    labels = scored.labels
    subsets = clip_subsets(scored.clips, options.annotations)
    return official_numbers(scored.logits, labels["verb"], labels["noun"], subsets)


def _write_files(scored: ScoredSplit, options: ReportOptions, ids: Sequence[str]) -> None:
    if not options.writes_files:
        return
    scores = log_probabilities(scored.logits, ids)
    if options.submission is not None:
        write_submission(options.submission, ids, scores, options.supervision_levels)
        levels = options.supervision_levels
        logger.info(
            "wrote the submission of %d clips of %s, %s, which declares %s",
            len(ids),
            scored.split,
            options.submission,
            ", ".join(f"{name} {level}" for name, level in levels.items()),
        )
        if scored.split != "test":
            logger.warning("the challenge is about the test split: pass --split test for a file to submit")
    if options.results is not None:
        write_results(options.results, ids, scores)
        logger.info("wrote the results of %d clips of %s, %s", len(ids), scored.split, options.results)


def clip_table(clip_ids: list[str], labels: Labels, logits: Logits, num_views: int) -> pa.Table:
    """One row per evaluated clip: id, labels, logits [class] of each head, and the views that were averaged."""
    columns = {"clip_id": pa.array(clip_ids, pa.string())}
    columns |= {f"label/{head}": pa.array(values, pa.int32()) for head, values in labels.items()}
    for head, values in logits.items():
        flat = pa.array(values.reshape(-1), pa.float32())
        columns[f"logits/{head}"] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    columns["num_views"] = pa.array(np.full(len(clip_ids), num_views), pa.int32())
    return pa.table(columns)


def write_evaluation(folder: Path, evaluation: Evaluation, table: pa.Table) -> None:
    """Write <split>.parquet and <split>.json into `folder`."""
    buffer = io.BytesIO()
    pa_parquet.write_table(table, buffer)
    text = json.dumps(evaluation.to_dict(), indent=1, allow_nan=False)
    with storage_errors(folder):
        write_atomically(folder / f"{evaluation.split}.parquet", buffer.getvalue())
        write_atomically(folder / f"{evaluation.split}.json", text.encode())
