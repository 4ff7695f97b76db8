"""Stage 1 in this process: one block after the other, decoded ahead in threads."""

from collections.abc import Sequence

from vivit.pipeline.ledger import ClipRecord
from vivit.stage1_extract.blocks import BlockExtractor, Work
from vivit.stage1_extract.tally import InWork, Tally


def run_inline(extractor: BlockExtractor, todo: Sequence[Work], tally: Tally) -> None:
    """Compute and commit the blocks in order."""
    worker = tally.worker("this process")
    worker.state = "works"

    def on_clip(_record: ClipRecord, crops: int) -> None:
        worker.in_work.clips += 1
        worker.in_work.crops += crops
        tally.changed()

    with extractor.stream() as stream, tally.shown(sum(len(work.rows) for work in todo)):
        crops = stream.read(extractor.clips(work) for work in todo)
        for work in todo:
            computed = extractor.compute(work, crops, seconds=worker.in_work.seconds, on_clip=on_clip)
            with computed.seconds.of("write"):
                extractor.commit(computed)
            worker.in_work = InWork()
            tally.block(worker, computed.report)
