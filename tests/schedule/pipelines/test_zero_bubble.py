import pytest

from dstrain.schedule.pipeline import Kind, Slot
from dstrain.schedule.pipelines.choose import make


def peak_held(slots: tuple[Slot, ...]) -> int:
    """Activations and what weight gradients put off need, counted alike."""
    held = peak = 0
    for op in (op for slot in slots for op in slot):
        held += (op.kind is Kind.FORWARD) - (op.kind in (Kind.WEIGHT, Kind.BACKWARD))
        peak = max(peak, held)
    return peak


def text(slots: tuple[Slot, ...]) -> str:
    return " ".join(str(op) for slot in slots for op in slot)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("micro_batches", [1, 3, 8, 20])
def test_memory_is_that_of_1f1b(ranks: int, micro_batches: int):
    """What the first rank of 1F1B holds is the limit of every rank; stages of zb_v have half the layers."""
    limit = peak_held(make("1f1b", ranks, micro_batches).ranks[0])
    for name, share in (("zb_1p", 1), ("zb_v", 2)):
        for slots in make(name, ranks, micro_batches).ranks:
            assert peak_held(slots) <= share * limit


def test_zb_1p():
    (_, last) = make("zb_1p", 2, 3).ranks
    assert text(last) == "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2"


def test_zb_v():
    (first, last) = make("zb_v", 2, 3).ranks
    assert text(first) == ("F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 I3.1 W3.1 I0.0 W0.0 F3.2 I3.2 W3.2 I0.1 W0.1 I0.2 W0.2")
    assert text(last) == ("F1.0 F2.0 F1.1 F2.1 I2.0 W2.0 F1.2 I1.0 W1.0 F2.2 I2.1 W2.1 I1.1 I2.2 I1.2 W1.1 W2.2 W1.2")


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_few_micro_batches_leave_out_the_others(micro_batches: int):
    """The order is that of the least number that fills the V."""
    few, full = make("zb_v", 3, micro_batches), make("zb_v", 3, 5)
    kept = [tuple(slot for slot in slots if slot[0].micro_batch < micro_batches) for slots in full.ranks]
    assert list(few.ranks) == kept
