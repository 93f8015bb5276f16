"""A predicted step as a picture: the slots of every rank, how long links hold it up, and what the step ends with."""

from collections.abc import Iterator
from pathlib import Path

from dstrain.plan.simulation import Played, RankPlay
from dstrain.schedule.draw import GAP, Mark, Style, draw

# Marked at the end of a slot: how long compute stands still somewhere in it.
EXPOSED = Style("waits for a transfer", "#c62828", "/////")
REDUCED = Style("reduce gradients", "#37474f")
UPDATED = Style("update", "#b0413e")
GATHERED = Style("gather weights", "#90a4ae")
# Upper edge of the strip at the foot of a row that shows transfers beside compute.
STRIP = 0.8
# In all panels together: a step has many micro-batches, and its middle repeats itself.
MOST_ROWS = 64


def write(played: Played, title: str, path: Path, software: str) -> None:
    """Writes a PNG that carries `software` in its metadata. OSError where it can't be written."""
    spans = [rank.runs for rank in played.ranks]
    draw(played.layout, spans, title, path, software, list(marks(played)), MOST_ROWS)


def marks(played: Played) -> Iterator[Mark]:
    """What is laid over the slots."""
    reduced_ms = played.makespan_ms + played.reduce_ms
    updated_ms = reduced_ms + played.update_ms
    for number, rank in enumerate(played.ranks):
        yield from _exposed(number, rank)
        if rank.reduce_end_ms > rank.reduce_start_ms:
            yield Mark(number, rank.reduce_start_ms, rank.reduce_end_ms, REDUCED, upper=STRIP)
        if played.update_ms:
            yield Mark(number, reduced_ms, updated_ms, UPDATED)
        if played.gather_ms:
            yield Mark(number, updated_ms, played.step_ms, GATHERED, upper=STRIP, lower=1 - GAP)


def _exposed(number: int, rank: RankPlay) -> Iterator[Mark]:
    for run in rank.runs:
        if run.inside.exposed_ms > 0:
            yield Mark(number, run.end_ms - run.inside.exposed_ms, run.end_ms, EXPOSED)
