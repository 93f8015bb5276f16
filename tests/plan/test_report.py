"""The page of a plan adds up, and follows from its prediction."""

from dataclasses import replace

import pytest

from dstrain.config import load
from dstrain.hardware import named
from dstrain.plan.job import job_of
from dstrain.plan.report import Range, RankUse, Report, judged, layout_text, make, model_text
from dstrain.plan.simulation import simulate
from dstrain.plan.step import predict

H100 = named("h100_sxm")
JOB = job_of(load.compose("plan", ["+experiment=h100_4x8", "hardware.nodes=4", "model.vocab_size=102400"]))
MEMORY = (RankUse(0, {"weights": 30.0, "activations": 20.0}, 50.0), RankUse(1, {"weights": 40.0}, 40.0))


def page(steps: dict[int, int], price: float = 2.0) -> Report:
    machine = replace(H100, price_per_hour=price)
    played = simulate(JOB, machine).prediction
    return make(JOB, machine, played, MEMORY, judged(MEMORY, 80.0, ()), steps)


@pytest.fixture(scope="module")
def whole() -> Report:
    return page({JOB.sequences: 1000})


def test_parts_add_up_to_the_step(whole: Report):
    assert sum(whole.parts_s.values()) == pytest.approx(whole.step_s.value)
    assert list(whole.kinds_s.values()) == sorted(whole.kinds_s.values(), reverse=True)


def test_the_interval_is_around_the_step(whole: Report):
    step = whole.step_s
    assert 0.5 * step.value < step.low < step.value < step.high < 2 * step.value


def test_the_run_is_its_steps(whole: Report):
    assert (whole.steps, whole.tokens) == (1000, 1000 * JOB.sequences * JOB.seq_len)
    assert whole.hours.value == pytest.approx(1000 * whole.step_s.value / 3600)
    assert whole.gpu_hours.low == pytest.approx(32 * whole.hours.low)
    assert whole.cost is not None
    assert whole.cost.high == pytest.approx(2.0 * whole.gpu_hours.high)
    speed = JOB.sequences * JOB.seq_len / whole.step_s.low / 32
    assert whole.tokens_per_s_per_gpu.high == pytest.approx(speed)


def test_a_smaller_batch_of_a_ramp_takes_its_own_time(whole: Report):
    small = JOB.sequences // 4
    ramped = page({small: 1000, JOB.sequences: 1000})
    share = predict(replace(JOB, sequences=small), H100).step_s / predict(JOB, H100).step_s
    assert 0.25 < share < 0.5
    assert ramped.hours.value == pytest.approx((1 + share) * whole.hours.value)
    assert ramped.tokens == pytest.approx(1.25 * whole.tokens)


def test_without_a_price_there_is_no_cost():
    assert page({JOB.sequences: 1}, price=0.0).cost is None


def test_ranges_follow_functions_up_and_down():
    assert Range(2.0, 1.0, 4.0).through(lambda x: 8 / x) == Range(4.0, 2.0, 8.0)
    assert Range(2.0, 1.0, 4.0).through(lambda x: 3 * x) == Range(6.0, 3.0, 12.0)


def test_verdicts():
    fits = judged(MEMORY, 80.0, ("smaller",))
    assert (fits.fits, fits.lines) == (True, ("Fits: pipeline rank 0 needs 50.0 GiB of 80.0, 30.0 are left.",))
    lacks = judged(MEMORY, 45.0, ("smaller",))
    assert lacks.fits is False
    assert lacks.lines == (
        "Does not fit: pipeline rank 0 needs 50.0 GiB, 5.0 more than the 45.0 that there are.",
        "smaller",
    )
    unknown = judged(MEMORY[:1], 0.0, ())
    assert unknown.fits is None
    assert "a device needs 50.0 GiB" in unknown.lines[0]


def test_texts():
    assert model_text(JOB) == "15.71B parameters in 27 layers, 2.66B used by a token: 6 of 64 experts"
    assert layout_text(JOB).startswith("ep=8, dp=4, tokens travel by ")
    piped = replace(JOB, pp=4, ep=1, pipeline="interleaved", chunks=2, recompute=frozenset())
    assert layout_text(piped) == "pp=4, dp=8, interleaved with 2 stages on a rank, products in bf16, nothing recomputed"
