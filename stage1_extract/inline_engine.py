"""Stage 1 in this process: one block after the other, decoded ahead in threads."""

from collections.abc import Sequence

from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.progress import Progress
from vivit.stage1_extract.blocks import BlockExtractor, Work
from vivit.stage1_extract.tally import Tally


def run_inline(extractor: BlockExtractor, todo: Sequence[Work], tally: Tally) -> None:
    """Compute and commit the blocks in order."""
    with (
        extractor.stream() as stream,
        Progress("extract", sum(len(work.rows) for work in todo), "clips") as progress,
    ):

        def on_clip(record: ClipRecord, count: int) -> None:
            tally.clip(record, count)
            progress.advance(1, str(tally))

        crops = stream.read(extractor.clips(work) for work in todo)
        for work in todo:
            computed = extractor.compute(work, crops, seconds=tally.seconds, on_clip=on_clip)
            tally.not_finite(computed)
            with tally.seconds.of("write"):
                extractor.commit(computed)
            tally.blocks += 1
