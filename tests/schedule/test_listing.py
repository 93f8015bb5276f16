"""A table as text."""

import re

import pytest

from dstrain.schedule import listing
from dstrain.schedule.figures import StageCosts, figures, play
from dstrain.schedule.pipeline import Pipeline
from dstrain.schedule.pipelines.choose import NAMES, make


def played(pipeline: Pipeline, *times: float):
    return play(pipeline, StageCosts.even(pipeline.layout.num_stages, *(times or (1, 1, 1))))


def test_a_small_table():
    (block,) = listing.blocks(played(make("1f1b", 2, 2)))
    assert block == [
        "time    0    1    2    3    4    5    6    7    8",
        "rank 0  F0.0 F0.1      B0.0-----      B0.1-----".replace("F0.1      B0.0", "F0.1           B0.0"),
        "rank 1       F1.0 B1.0----- F1.1 B1.1-----",
    ]


def test_columns_are_times():
    """Where a name stands is when its slot begins, whatever the unit of time."""
    for times in ((1, 1, 1), (100, 200, 100), (0.01, 0.02, 0.01)):
        spans = played(make("dualpipev", 3, 8), *times)
        (header, *rows) = next(listing.blocks(spans))
        columns = {float(found[0]): found.start() for found in re.finditer(r"[\d.]+", header)}
        assert len(columns) > 20
        for row, own in zip(rows, spans, strict=True):
            for span in own:
                if (begin := round(span.start_ms, 4)) in columns:
                    assert row[columns[begin] :].startswith(listing.name_of(span))


def test_slots_of_very_different_lengths():
    """Names of the short ones are cut, times keep their columns."""
    header, _, last = next(listing.blocks(played(make("zb_1p", 2, 4), 1, 50, 20)))
    assert [header.index(f" {time} ") + 1 for time in (4, 100, 200)] == [8 + 4, 8 + 100, 8 + 200]
    assert last.startswith("rank 1    I1.0------")
    assert len(last) <= 8 + 4 * 71 + 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [60, 80, 160])
def test_folds_hold_every_slot_once(name: str, width: int):
    pipeline = make(name, 4, 16)
    spans = played(pipeline)
    blocks = list(listing.blocks(spans, width))
    assert len(blocks) > 1
    assert max(len(line) for block in blocks for line in block) <= width
    for rank, slots in enumerate(pipeline.ranks):
        whole = " ".join(block[rank + 1].removeprefix(f"rank {rank}") for block in blocks)
        assert re.findall(r"[FBIW]\d+\.\d+", whole) == [str(op) for slot in slots for op in slot]


def test_figures_of_every_rank():
    pipeline = make("dualpipe", 4, 10)
    known = figures(pipeline, StageCosts.even(4, 1, 1, 1))
    header, *rows = listing.figures_table(pipeline, known)
    assert header.split() == ["rank", "stages", "idle", "live", "pending", "sent"]
    for rank, row in enumerate(rows):
        shown = row.split()
        assert shown[:3] == [str(rank), *map(str, pipeline.layout.held[rank])]
        assert float(shown[3]) == known.bubble_ms[rank]
        assert [int(word) for word in shown[5:]] == [
            known.peak_live[rank],
            known.peak_pending[rank],
            known.messages[rank],
        ]
    first, *_ = listing.summary(pipeline, known)
    assert f"makespan {known.makespan_ms:g}; " in first
    assert first.endswith("held 2 times")
