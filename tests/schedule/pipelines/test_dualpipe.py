"""DualPipe and DualPipeV against action lists of the published order."""

import json
from pathlib import Path

import pytest

from dstrain.schedule.pipeline import Kind, Pipeline, Slot, check
from dstrain.schedule.pipelines.choose import make

# "F0" forward of phase 0, "B1" full backward of phase 1, "B1z" input gradients only, "W" the oldest weight gradient put
# off, "F0&B1" a pair. Phase 0 is the stream that enters at the nearer end.
ORACLE = json.loads((Path(__file__).parents[1] / "data" / "dualpipe_oracle.json").read_text())


def size(case: str) -> tuple[str, int, int]:
    name, ranks, micro_batches = case.split("_")
    return name, int(ranks[1:]), int(micro_batches[1:])


def translated(pipeline: Pipeline, rank: int) -> list[str]:
    """A rank's slots in the words of the oracle; what those leave out is asserted here."""
    near, _ = sorted(pipeline.layout.held[rank])
    put_off: list[tuple[int, int]] = []
    following: dict[tuple[bool, int], int] = {}
    words = [_word(slot, near, put_off) for slot in pipeline.ranks[rank]]
    for op in (op for slot in pipeline.ranks[rank] for op in slot if op.kind is not Kind.WEIGHT):
        stream = (op.kind is Kind.FORWARD, op.stage)
        assert op.micro_batch == following.get(stream, op.micro_batch)
        following[stream] = op.micro_batch + 1
    assert not put_off
    return words


def _word(slot: Slot, near: int, put_off: list[tuple[int, int]]) -> str:
    words = []
    for op in slot:
        phase = int(op.stage != near)
        if op.kind is Kind.WEIGHT:
            assert put_off.pop(0) == (op.stage, op.micro_batch)
            words.append("W")
        elif op.kind is Kind.INPUT:
            put_off.append((op.stage, op.micro_batch))
            words.append(f"B{phase}z")
        else:
            words.append(f"{op.kind.value}{phase}")
    return "&".join(words)


@pytest.mark.parametrize("case", ORACLE)
def test_equals_oracle(case: str):
    pipeline = make(*size(case))
    check(pipeline)
    assert [translated(pipeline, rank) for rank in range(len(pipeline.ranks))] == ORACLE[case]["actions"]


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 10), (8, 16)])
def test_halves_enter_at_both_ends(ranks: int, micro_batches: int):
    pipeline = make("dualpipe", ranks, micro_batches)
    half = micro_batches // 2
    for stage in range(ranks):
        for i in range(micro_batches):
            assert pipeline.rank_of[stage, i] == (stage if i < half else ranks - 1 - stage)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_dualpipev_is_half_of_dualpipe(ranks: int):
    micro_batches = 2 * ranks + 1
    whole, half = make("dualpipe", 2 * ranks, 2 * micro_batches), make("dualpipev", ranks, micro_batches)
    assert [translated(half, rank) for rank in range(ranks)] == [translated(whole, rank) for rank in range(ranks)]
