"""A played pipeline as a timeline for Perfetto, in the Trace Event Format (JSON): a row for each rank."""

from collections.abc import Iterator, Sequence
from typing import Any

from dstrain.schedule.figures import Span
from dstrain.schedule.pipeline import Kind, Pipeline

# A unit of time is shown as a millisecond.
UNIT_US = 1000.0
CATEGORY = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.INPUT: "input", Kind.WEIGHT: "weight"}

# A JSON object of the format.
Event = dict[str, Any]


def events(pipeline: Pipeline, spans: Sequence[Sequence[Span]]) -> Iterator[Event]:
    """Names of the rows, then the slots of each."""
    yield {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": pipeline.name}}
    for rank, own in enumerate(spans):
        place = {"pid": 0, "tid": rank}
        held = ", ".join(map(str, pipeline.layout.held[rank]))
        yield {"name": "thread_name", "ph": "M", **place, "args": {"name": f"rank {rank} (stages {held})"}}
        yield {"name": "thread_sort_index", "ph": "M", **place, "args": {"sort_index": rank}}
        for span in own:
            yield {
                "name": " & ".join(map(str, span.slot)),
                "cat": " & ".join(CATEGORY[op.kind] for op in span.slot),
                "ph": "X",
                **place,
                "ts": span.start_ms * UNIT_US,
                "dur": (span.end_ms - span.start_ms) * UNIT_US,
                "args": {CATEGORY[op.kind]: f"stage {op.stage}, micro-batch {op.micro_batch}" for op in span.slot},
            }
