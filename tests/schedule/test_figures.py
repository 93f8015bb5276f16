"""Simulated schedules against closed forms and against the figures that DeepSeek's order is known to have."""

from dataclasses import replace

import pytest

from dstrain.schedule.figures import Figures, StageCosts, figures, play
from dstrain.schedule.pipeline import Kind
from dstrain.schedule.pipelines.choose import layout, make
from tests.schedule.pipelines.test_dualpipe import ORACLE, size

SIZES = [(2, 4), (4, 8), (4, 12), (8, 24)]


def figures_of(
    name: str, ranks: int, micro_batches: int, *times: float, chunks: int = 2, overlap: bool = False, pair: float = 1.0
) -> Figures:
    pipeline = make(name, ranks, micro_batches, chunks, overlap)
    return figures(pipeline, StageCosts.even(pipeline.layout.num_stages, *times, pair=pair))


@pytest.mark.parametrize("case", ORACLE)
def test_dualpipe_equals_oracle(case: str):
    known, got = ORACLE[case]["sim_F1_B2_W1_FB3"], figures_of(*size(case), 1, 1, 1)
    assert got.makespan_ms == known["makespan"]
    assert got.bubble_ms == known["bubble"]
    assert got.peak_live == known["peak_act"]
    assert got.peak_pending == known["peak_pendW"]


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (8, 20), (16, 120)])
def test_dualpipe_figures(ranks: int, micro_batches: int):
    """V3 report, table 2: (P/2 - 1) (F&B + B - 3 W) idle, P + 1 activations, 2 copies."""
    got = figures_of("dualpipe", ranks, micro_batches, 1, 1, 1)
    assert got.bubble_ms == [(ranks // 2 - 1) * (3 + 2 - 3)] * ranks
    assert got.peak_live == [ranks + 1] * ranks
    assert got.copies == 2
    # Each micro-batch passes an inner rank twice, to and fro, and leaves an end only once each way.
    ends = [micro_batches]
    assert got.messages == ends + [2 * micro_batches] * (ranks - 2) + ends


def test_published_comparison():
    """16 ranks and 120 micro-batches: 374 for DualPipe, 405 for 1F1B, 360 without any bubble."""
    dualpipe, plain = figures_of("dualpipe", 16, 120, 1, 1, 1), figures_of("1f1b", 16, 120, 1, 1, 1)
    assert (dualpipe.makespan_ms, plain.makespan_ms) == (374, 405)


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_1f1b(ranks: int, micro_batches: int):
    got = figures_of("1f1b", ranks, micro_batches, 2, 3, 1)
    assert got.bubble_ms == [(ranks - 1) * (2 + 3 + 1)] * ranks
    assert got.peak_live == list(range(ranks, 0, -1))
    assert got.peak_pending == [0] * ranks
    assert got.copies == 1
    ends = [micro_batches]
    assert got.messages == ends + [2 * micro_batches] * (ranks - 2) + ends
    assert got.bubble_share == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))


@pytest.mark.parametrize("pair", [1.0, 0.75])
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_overlapped_1f1b(ranks: int, micro_batches: int, pair: float):
    """P forward ops until the first has passed all ranks, a pair for each further micro-batch, P backward ops; as long
    as a pair takes no less time than a backward op alone."""
    got = figures_of("1f1b", ranks, micro_batches, 2, 2, 2, overlap=True, pair=pair)
    assert got.makespan_ms == ranks * 6 + (micro_batches - 1) * 6 * pair
    assert got.peak_live == [min(micro_batches, 2 * (ranks - rank)) for rank in range(ranks)]


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_interleaved(ranks: int, micro_batches: int, chunks: int):
    """With `chunks` stages a rank, stages are as much shorter and so is the bubble."""
    got = figures_of("interleaved", ranks, micro_batches, 2, 3, 1, chunks=chunks)
    assert got.bubble_ms == [(ranks - 1) * 6] * ranks
    # Megatron-LM: one activation more than the warm-up.
    warm_ups = [(chunks - 1) * ranks + 2 * (ranks - 1 - rank) for rank in range(ranks)]
    assert got.peak_live == [min(warm_up + 1, micro_batches * chunks) for warm_up in warm_ups]
    steps = 2 * micro_batches * chunks
    assert got.messages == [steps - micro_batches] + [steps] * (ranks - 2) + [steps - micro_batches]


@pytest.mark.parametrize("times", [(1, 1, 1), (2, 3, 1), (3, 3, 2)])
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_zb_1p(ranks: int, micro_batches: int, times: tuple[int, int, int]):
    """V3 report, table 2: (P - 1) (F + B - 2 W) idle, where B is input and weight gradient; memory as 1F1B."""
    forward, backward_input, weight = times
    got = figures_of("zb_1p", ranks, micro_batches, *times)
    assert got.bubble_ms == [(ranks - 1) * (forward + backward_input - weight)] * ranks
    assert got.peak_live == list(range(ranks, 0, -1))
    assert got.peak_pending == [rank + 1 for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_zb_v(ranks: int, micro_batches: int):
    """No rank waits once it has begun: only the starts are staggered, and the ends."""
    pipeline = make("zb_v", ranks, micro_batches)
    costs = StageCosts.even(2 * ranks, 1, 1, 1)
    got = figures(pipeline, costs)
    assert got.makespan_ms == 6 * micro_batches + ranks - 1
    for rank, spans in enumerate(play(pipeline, costs)):
        assert spans[0].start_ms == rank
        assert spans[-1].end_ms - spans[0].start_ms == 6 * micro_batches
    # Half of the layers of a rank each, so as much as P micro-batches on the first rank of 1F1B.
    assert got.peak_live == [2 * ranks] * ranks


def test_pair_waits_for_both_inputs():
    pipeline = make("1f1b", 2, 4, overlap=True)
    spans = play(pipeline, StageCosts.even(2, 1, 1, 1))
    (first,) = (span for span in spans[0] if len(span.slot) == 2 and span.slot[1].micro_batch == 0)
    (before,) = (span for span in spans[1] if span.slot[-1].kind is Kind.BACKWARD and span.slot[-1].micro_batch == 0)
    assert first.start_ms == before.end_ms > spans[0][2].end_ms


def test_latency_delays_other_ranks_only():
    pipeline = make("zb_v", 2, 4)
    costs = StageCosts.even(4, 1, 1, 1)
    spans = play(pipeline, replace(costs, latency_ms=0.5))
    assert spans[1][0].start_ms == 1.5
    # The V turns on the last rank.
    turn = next(i for i, span in enumerate(spans[1]) if span.slot[0].stage == 2)
    assert spans[1][turn].start_ms == spans[1][turn - 1].end_ms


def test_uneven_stages():
    """The slowest stage sets the pace: every other rank idles for the difference."""
    pipeline = make("1f1b", 2, 50)
    slow = figures(pipeline, StageCosts((1, 2), (1, 2), (1, 2)))
    assert slow.bubble_ms[0] - slow.bubble_ms[1] == 50 * 3
    assert slow.bubble_ms[1] == 3


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb_1p", "zb_v", "dualpipe", "dualpipev"])
def test_copies(name: str):
    held = [stage for stages in layout(name, 4).held for stage in stages]
    pipeline = make(name, 4, 8)
    assert figures(pipeline, StageCosts.even(pipeline.layout.num_stages, 1, 1, 1)).copies == held.count(0)
