import pytest

from dstrain.schedule.pipeline import Kind, Op, Pipeline, Slot
from dstrain.schedule.pipelines.choose import make


def text(pipeline: Pipeline) -> list[str]:
    return [" ".join("&".join(map(str, slot)) for slot in slots) for slots in pipeline.ranks]


def test_1f1b():
    assert text(make("1f1b", 2, 3)) == ["F0.0 F0.1 B0.0 F0.2 B0.1 B0.2", "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2"]


def test_interleaved_goes_in_rounds_of_as_many_micro_batches_as_ranks():
    first, second = text(make("interleaved", 2, 4))
    assert first == "F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 B2.2 B2.3 B0.2 B0.3"
    assert second == "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3"


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 4), (2, 3), (4, 2), (4, 7), (4, 20), (8, 8)])
def test_overlapped_1f1b_runs_in_step(ranks: int, micro_batches: int):
    """In step t, rank p runs forward of micro-batch t - p and backward of micro-batch t - (2 P - 1 - p)."""
    pipeline = make("1f1b", ranks, micro_batches, overlap=True)
    for rank, slots in enumerate(pipeline.ranks):
        steps: list[Slot] = []
        for t in range(micro_batches + 2 * ranks):
            ops = Op(Kind.FORWARD, rank, t - rank), Op(Kind.BACKWARD, rank, t - (2 * ranks - 1 - rank))
            steps.append(tuple(op for op in ops if 0 <= op.micro_batch < micro_batches))
        assert [slot for slot in steps if slot] == list(slots)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 2), (4, 8)])
def test_overlapped_interleaved_runs_in_step(ranks: int, micro_batches: int, chunks: int):
    """Needs of every op are made in an earlier step, if rank p runs forward number n in step n + p and backward number
    n in step n + chunks P + P - 1 - p."""
    pipeline = make("interleaved", ranks, micro_batches, chunks, overlap=True)
    step_of: dict[tuple[Kind, int, int], int] = {}
    for rank, slots in enumerate(pipeline.ranks):
        counts = {Kind.FORWARD: rank, Kind.BACKWARD: (chunks + 1) * ranks - 1 - rank}
        for slot in slots:
            assert len({counts[op.kind] for op in slot}) == 1
            for op in slot:
                step_of[op.kind, op.stage, op.micro_batch] = counts[op.kind]
                counts[op.kind] += 1
    last = pipeline.layout.num_stages - 1
    for (kind, stage, micro_batch), step in step_of.items():
        if kind is Kind.FORWARD and stage:
            assert step_of[kind, stage - 1, micro_batch] < step
        if kind is Kind.BACKWARD:
            before = (Kind.FORWARD, last, micro_batch) if stage == last else (kind, stage + 1, micro_batch)
            assert step_of[before] < step


def test_overlapped_interleaved_with_one_chunk_is_1f1b():
    assert make("interleaved", 4, 8, 1, overlap=True).ranks == make("1f1b", 4, 8, overlap=True).ranks
