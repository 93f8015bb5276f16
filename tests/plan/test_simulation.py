"""Steps played by slots, against formulas, against every action played, and against sums done by hand."""

from dataclasses import replace

import pytest

from dstrain.config.hardware import HardwareConfig
from dstrain.errors import ConfigError
from dstrain.plan.architecture import Architecture
from dstrain.plan.job import Job
from dstrain.plan.simulation import Played, play_step, simulate
from dstrain.plan.step import predict
from dstrain.plan.times import Reduction, StepTimes
from dstrain.schedule.action import Pass, Phase
from dstrain.schedule.order import fixed
from dstrain.schedule.overlap import expand
from dstrain.schedule.pipelines.choose import NAMES, make
from dstrain.schedule.simulate import Costs, even_costs, simulate_ranks
from dstrain.schedule.simulate import simulate as play_table
from dstrain.schedule.table import sequential
from tests.schedule.pipelines.test_dualpipe import ORACLE, size

SIZES = [(2, 4), (4, 8), (4, 12), (8, 24)]
MODEL = Architecture("test", 32000, 2048, 32, 0, 16, 16, 128, 128, 0, 0, 128, 8192, True)
EXPERTS = replace(MODEL, experts=64, experts_per_token=6, expert_ffn=1024, shared_ffn=1024)
NO_END = Reduction(0.0, 0.0, 0.0)


def job_with(pipeline: str, pp: int, micro_batches: int, **changes: object) -> Job:
    job = Job(MODEL, pp, 4096, micro_batches, pp=pp, pipeline=pipeline, chunks=2 if pipeline == "interleaved" else 1)
    return replace(job, **changes)


def stretch(forward_ms: float, input_ms: float, weight_ms: float) -> Costs:
    """A stage whose tokens don't travel."""
    times = zip(Pass, (forward_ms, input_ms, weight_ms), strict=True)
    return Costs({(work, Phase.ATTEND, 0): ms for work, ms in times}, {})


def played(job: Job, *stages: Costs, send_ms: float = 0.0, end: Reduction = NO_END) -> Played:
    each = stages if len(stages) == job.num_stages else stages * job.num_stages
    return play_step(job, StepTimes(each, send_ms, 0.0, (end,) * job.pp))


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_1f1b(ranks: int, micro_batches: int):
    """(m + p - 1) (F + B), and a message for each step down and up."""
    got = played(job_with("1f1b", ranks, micro_batches), stretch(2, 4, 0))
    assert got.step_ms == got.makespan_ms == (micro_batches + ranks - 1) * 6
    assert [got.bubble_ms(rank) for rank in got.ranks] == [(ranks - 1) * 6] * ranks
    assert [rank.peak_live for rank in got.ranks] == list(range(ranks, 0, -1))
    late = played(job_with("1f1b", ranks, micro_batches), stretch(2, 4, 0), send_ms=0.5)
    assert late.makespan_ms >= got.makespan_ms + 2 * (ranks - 1) * 0.5


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_gradients_leave_before_weight_gradients(ranks: int, micro_batches: int):
    """So only the input gradients of the stages in front of the first one add to its bubble."""
    got = played(job_with("1f1b", ranks, micro_batches), stretch(2, 2, 2))
    assert got.bubble_ms(got.ranks[0]) == (ranks - 1) * (2 + 2)


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_zero_bubble(ranks: int, micro_batches: int):
    assert played(job_with("zb_v", ranks, micro_batches), stretch(1, 1, 1)).makespan_ms == 6 * micro_batches + ranks - 1
    got = played(job_with("zb_1p", ranks, micro_batches), stretch(3, 3, 2))
    assert {got.bubble_ms(rank) for rank in got.ranks} == {(ranks - 1) * (3 + 3 - 2)}


@pytest.mark.parametrize("case", ORACLE)
def test_dualpipe_is_no_longer_than_the_published_order(case: str):
    """Which lets a gradient leave at the end of a slot."""
    name, ranks, micro_batches = size(case)
    got = played(job_with(name, ranks, micro_batches), stretch(1, 1, 1))
    known = ORACLE[case]["sim_F1_B2_W1_FB3"]
    work_ms = 3 * micro_batches * (2 if name == "dualpipev" else 1)
    assert work_ms <= got.makespan_ms <= known["makespan"]
    assert [rank.peak_live for rank in got.ranks] == known["peak_act"]
    assert [rank.peak_pending for rank in got.ranks] == known["peak_pendW"]


@pytest.mark.parametrize("wire", [0.5, 1.5])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_equals_playing_every_action(name: str, overlap: bool, wire: float):
    """The last stage is longer, and has another number of blocks. Of pairs that wait for links, and so may wait for
    inputs inside, a slot says up to a percent too much."""
    job = job_with(name, 4, 16, overlap=overlap)
    stages = [even_costs(3, wire)] * (job.num_stages - 1) + [even_costs(2, wire, last=0.7)]
    got = played(job, *stages, send_ms=0.05)
    table = make(name, 4, 16, job.chunks, overlap)
    tables = [expand(slots, [costs.blocks for costs in stages], overlap=overlap) for slots in table.ranks]
    exact = simulate_ranks(tables, stages, range(4), pipe_ms=0.05)
    close = 0.01 if overlap and wire > 1 else 1e-3
    assert got.makespan_ms == pytest.approx(max(timeline.makespan_ms for timeline in exact), rel=close)
    for rank, timeline in zip(got.ranks, exact, strict=True):
        assert rank.compute_ms == pytest.approx(timeline.compute_ms)
        assert rank.end_ms == pytest.approx(timeline.makespan_ms, rel=0.01)


def test_one_micro_batch_after_the_other():
    got = played(job_with("1f1b", 1, 5), even_costs(3, last=0.5))
    exact = play_table(sequential(3, 5), even_costs(3, last=0.5))
    assert got.makespan_ms == pytest.approx(exact.makespan_ms)
    assert got.ranks[0].exposed_ms == pytest.approx(exact.exposed_ms)
    assert got.ranks[0].peak_live == 1


def test_micro_batches_in_flight():
    """Eight are played as they are; of forty, those in the middle take as long as others in the middle."""
    job, costs = job_with("1f1b", 1, 8, in_flight=2), even_costs(2)
    eight, exact = played(job, costs), play_table(fixed(2, 8, 2), costs)
    assert eight.makespan_ms == pytest.approx(exact.makespan_ms)
    assert eight.ranks[0].compute_ms == pytest.approx(exact.compute_ms)
    assert eight.ranks[0].peak_live == 2
    forty = played(replace(job, sequences=40), costs)
    ends = [run.end_ms for run in forty.ranks[0].runs]
    assert len(ends) == 20
    assert forty.ranks[0].compute_ms == pytest.approx(5 * exact.compute_ms)
    assert 5 * exact.compute_ms < forty.makespan_ms < 5 * exact.makespan_ms
    assert ends[12] - ends[10] == pytest.approx(ends[14] - ends[12])


def test_in_flight_hides_more_than_one_after_the_other():
    apart, together = (played(job_with("1f1b", 1, 8, in_flight=n), even_costs(2)).makespan_ms for n in (1, 2))
    assert together < 0.8 * apart


def test_gradients_leave_under_the_last_backward_pass():
    """Rank 1 of 2 ends earlier by F + B, so rank 0 decides: 16 layers a stage, and so 16 buckets."""
    job, stage, end = job_with("1f1b", 2, 4), stretch(16, 32, 0), Reduction(8.0, 3.2, 5.0)
    under, after = played(job, stage, end=end), played(replace(job, overlap_dp=False), stage, end=end)
    assert (under.reduce_ms, under.update_ms) == (8.0 / 16, 5.0)
    assert under.ranks[0].reduce_start_ms == under.makespan_ms - 30
    # Only the first bucket of weights is awaited.
    assert under.gather_ms == pytest.approx(0.2)
    assert (after.reduce_ms, after.gather_ms, after.step_ms) == (8.0, 3.2, after.makespan_ms + 16.2)
    slow = played(job, stage, end=Reduction(100.0, 50.0, 0.0))
    assert slow.reduce_ms == 100 - 30
    assert slow.gather_ms == 50 - 15


def test_sends_that_nothing_hides():
    job = job_with("1f1b", 4, 8)
    times = StepTimes((stretch(2, 4, 0),) * 4, 0.5, 0.5, (NO_END,) * 4)
    assert play_step(job, times).ranks[0].exposed_ms == 8 * 2 * 0.5


def test_slower_links_never_help():
    for name in NAMES:
        job = job_with(name, 4, 16, overlap=True)
        steps = [played(job, even_costs(2, wire), send_ms=wire / 10).step_ms for wire in (0.2, 0.6, 1.0, 1.4, 1.8)]
        assert steps == sorted(steps)


def test_number_of_micro_batches_is_checked():
    with pytest.raises(ConfigError, match="at least 16 micro-batches"):
        played(job_with("dualpipe", 8, 4), stretch(1, 1, 1))


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_agrees_with_the_closed_form(name: str):
    """Of pairs over fast links, which both forms find hidden; the single ops at both ends of a step only one counts."""
    machine = HardwareConfig(
        name="test",
        peak_bf16_tflops=500.0,
        multiprocessors=100,
        memory_gbytes_per_s=2000.0,
        memory_gib=80.0,
        devices_per_node=8,
        intra_node_gbytes_per_s=200.0,
        inter_node_gbytes_per_s=50.0,
    )
    job = Job(EXPERTS, 128, 4096, 64 * 16, pp=4, ep=8, pipeline=name, overlap=True)
    got, closed = simulate(job, machine).prediction, predict(job, machine)
    assert got.step_s == pytest.approx(closed.step_s, rel=0.05)
    parts = (got.compute_s, got.bubble_s, got.exposed_s, got.reduce_s, got.update_s)
    assert got.step_s == pytest.approx(sum(parts))
    assert got.tokens_per_s_per_gpu == pytest.approx(closed.tokens_per_s_per_gpu * closed.step_s / got.step_s)
