import itertools

import pytest

from dstrain.schedule.pipeline import check
from dstrain.schedule.pipelines.choose import NAMES, layout, make, rule_broken

SIZES = list(itertools.product(range(1, 8), range(1, 20), (1, 2, 3), (False, True)))


@pytest.mark.parametrize("name", NAMES)
def test_what_keeps_the_rules_is_legal(name: str):
    allowed = [size for size in SIZES if rule_broken(name, *size[:3]) is None]
    assert len({ranks for ranks, *_ in allowed}) >= 3
    for ranks, micro_batches, chunks, overlap in allowed:
        pipeline = make(name, ranks, micro_batches, chunks, overlap)
        check(pipeline)
        assert (pipeline.name, pipeline.micro_batches) == (name, micro_batches)
        assert pipeline.layout == layout(name, ranks, chunks)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "dualpipe", "dualpipev"])
def test_overlap_makes_pairs(name: str):
    assert any(len(slot) == 2 for slots in make(name, 4, 16, overlap=True).ranks for slot in slots)


@pytest.mark.parametrize(
    ("size", "argument", "words"),
    [
        (("dualpip", 4, 8), "name", "is no pipeline schedule (1f1b, interleaved, zb_1p, zb_v, dualpipe, dualpipev)"),
        (("dualpipe", 3, 8), "ranks", "an even number of pipeline ranks"),
        (("dualpipe", 4, 7), "micro_batches", "at least 8 micro-batches a step. The nearest number allowed is 8"),
        (("dualpipe", 4, 11), "micro_batches", "a multiple of 2 micro-batches a step"),
        (("dualpipev", 4, 7), "micro_batches", "at least 8 micro-batches a step. The nearest number allowed is 8"),
        (
            ("interleaved", 4, 9),
            "micro_batches",
            "a multiple of 4 micro-batches a step. The nearest number allowed is 8",
        ),
        (("interleaved", 4, 11), "micro_batches", "nearest number allowed is 12"),
        (("interleaved", 4, 1), "micro_batches", "nearest number allowed is 4"),
        (("interleaved", 4, 8, 0), "chunks", "at least one stage. Take 2"),
        (("1f1b", 4, 0), "micro_batches", "at least 1 micro-batches"),
    ],
)
def test_broken_rules_come_with_a_cure(size: tuple, argument: str, words: str):
    broken = rule_broken(*size)
    assert broken is not None
    assert broken.argument == argument
    assert words in f"{broken.rule}. {broken.cure}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_nearest_number_of_micro_batches_is_allowed(name: str, ranks: int):
    for micro_batches in range(30):
        broken = rule_broken(name, ranks, micro_batches)
        if broken is None:
            continue
        nearest = int(broken.cure.split()[-1])
        assert rule_broken(name, ranks, nearest) is None
        allowed = [n for n in range(60) if rule_broken(name, ranks, n) is None]
        assert abs(nearest - micro_batches) == min(abs(n - micro_batches) for n in allowed)
