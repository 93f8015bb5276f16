"""The closed form: its parts, its bubbles by published formulas, and the step that the simulation plays."""

from dataclasses import replace

import pytest

from dstrain.config.hardware import HardwareConfig
from dstrain.hardware import named
from dstrain.plan.architecture import Architecture
from dstrain.plan.job import Job
from dstrain.plan.simulation import simulate
from dstrain.plan.stages import Stages
from dstrain.plan.step import Prediction, predict, slowdown
from dstrain.schedule.pipeline import Kind
from dstrain.schedule.pipelines.choose import make

# No cost of a message or of the host, all devices alike.
MACHINE = HardwareConfig(
    peak_bf16_tflops=100.0,
    multiprocessors=100,
    memory_gbytes_per_s=1000.0,
    host_us=0.0,
    device_spread=0.0,
    devices_per_node=8,
    intra_node_gbytes_per_s=1e6,
    inter_node_gbytes_per_s=1e6,
    intra_node_latency_us=1e-6,
    inter_node_latency_us=1e-6,
)
# A vocabulary of nothing, so that the first and the last stage take as long as others.
DENSE = Architecture("dense", 1, 1024, 16, 16, 16, 16, 64, 64, 0, 0, 64, 4096, True)
V3 = Architecture("v3", 32000, 7168, 32, 0, 128, 128, 192, 128, 1536, 512, 64, 18432, True, 256, 8, 2048, 2048, 8, 4)
H800 = named("h800_sxm")


def spread(pipeline: str, micro_batches: int, **changes: object) -> Job:
    """DeepSeek-V3's layers on 8 stages of 32 devices."""
    chunks = 2 if pipeline == "interleaved" else 1
    job = Job(V3, 256, 4096, 32 * micro_batches, pp=8, ep=32, pipeline=pipeline, chunks=chunks)
    return replace(job, **{"products": "fp8_block", "wire": "fp8", "dispatcher": "deepep", **changes})


def parts(found: Prediction) -> float:
    return found.compute_s + found.bubble_s + found.exposed_s + found.reduce_s + found.update_s


@pytest.mark.parametrize("pipeline", ["1f1b", "interleaved", "zb_1p", "zb_v", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("overlap", [False, True])
def test_parts_add_up(pipeline: str, overlap: bool):
    found = predict(spread(pipeline, 16, overlap=overlap), H800)
    assert parts(found) == pytest.approx(found.step_s)
    assert min(found.compute_s, found.bubble_s, found.exposed_s, found.reduce_s, found.update_s) >= 0
    assert sum(found.kinds_ms.values()) == pytest.approx(found.compute_s * 1e3, rel=1e-6)
    assert list(found.kinds_ms.values()) == sorted(found.kinds_ms.values(), reverse=True)


@pytest.mark.parametrize(
    ("pipeline", "chunks"),
    [("1f1b", 1), ("interleaved", 2), ("zb_1p", 1), ("zb_v", 1), ("dualpipe", 1), ("dualpipev", 1)],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bubbles_of_published_formulas(pipeline: str, chunks: int, ranks: int):
    """arXiv:2104.04473 and DeepSeek-V3's table 2: F and B of a rank, W the weight gradients within B. A stage of a
    pipeline with two of them on a rank takes half as long."""
    job = Job(DENSE, ranks, 2048, 16, pp=ranks, pipeline=pipeline, chunks=chunks, splits_weights=False)
    stages = Stages(job, MACHINE)
    (shape,) = {replace(each, is_first=False, is_last=False) for each in stages.shapes}
    forward, into, weight = (ms / 1e3 for ms in stages.passes(shape))
    pair = forward + into + weight
    bubble_s = {
        "1f1b": (ranks - 1) * pair,
        "interleaved": (ranks - 1) * pair,
        "zb_1p": (ranks - 1) * (forward + into - weight),
        "zb_v": (ranks - 1) * max(0.0, forward + into - 2 * weight),
        "dualpipe": (ranks / 2 - 1) * (pair + into - 2 * weight),
        "dualpipev": (ranks - 1) * (pair + into - 2 * weight),
    }[pipeline]
    # The embedding and the norm before the head are little, but not nothing.
    assert predict(job, MACHINE).bubble_s == pytest.approx(bubble_s, rel=0.06, abs=2e-5)


@pytest.mark.parametrize("micro_batches", [16, 48])
@pytest.mark.parametrize("dispatcher", ["deepep", "alltoall"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pipeline", ["1f1b", "interleaved", "zb_1p", "zb_v", "dualpipe", "dualpipev"])
def test_agrees_with_the_step_played(pipeline: str, overlap: bool, dispatcher: str, micro_batches: int):
    """With transfers that compute hides (a row for each node), and such that it does not (a row for each expert)."""
    job = spread(pipeline, micro_batches, overlap=overlap, dispatcher=dispatcher)
    closed, played = predict(job, H800), simulate(job, H800).prediction
    # Weight gradients in transfers move what the formula of ZB-V counts as a bubble.
    close = 0.08 if pipeline == "zb_v" and overlap and micro_batches == 16 else 0.05
    assert closed.step_s == pytest.approx(played.step_s, rel=close)
    assert closed.step_s == pytest.approx(played.step_s, rel=0.04) or micro_batches == 16


@pytest.mark.parametrize("pipeline", ["1f1b", "interleaved", "zb_1p", "zb_v"])
def test_agrees_without_transfers(pipeline: str):
    job = spread(pipeline, 32, dispatcher="local")
    assert predict(job, H800).step_s == pytest.approx(simulate(job, H800).prediction.step_s, rel=0.02)


def test_without_a_pipeline():
    """One micro-batch after the other: exactly what is played."""
    job = Job(V3, 32, 4096, 32 * 8, ep=32, products="fp8_block", wire="fp8", dispatcher="deepep")
    closed, played = predict(job, H800), simulate(job, H800).prediction
    assert closed.compute_s == pytest.approx(played.compute_s)
    assert closed.exposed_s == pytest.approx(played.exposed_s, rel=0.01)
    # One device waits for none, and there is no bubble.
    alone = predict(Job(DENSE, 1, 2048, 8), named("h100_sxm"))
    assert (alone.bubble_s, alone.exposed_s, alone.reduce_s) == (0, 0, 0)


@pytest.mark.parametrize("pipeline", ["interleaved", "dualpipe", "dualpipev"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(4, 16), (8, 32)])
def test_passes_without_a_partner(pipeline: str, ranks: int, micro_batches: int):
    """As many as in the table: of the first rank of bidirectional pipelines, otherwise of the last one. What they
    expose alone, over what they expose in pairs, is the difference to a step in which all have a partner."""
    chunks = 3 if pipeline == "interleaved" else 1
    table = make(pipeline, ranks, micro_batches, chunks, True)
    slots = table.ranks[-1 if pipeline == "interleaved" else 0]
    forward = sum(op.kind is Kind.FORWARD for slot in slots for op in slot)
    alone = forward - sum(len(slot) == 2 for slot in slots)
    job = Job(V3, 4 * ranks, 4096, 4 * micro_batches, pp=ranks, ep=4, pipeline=pipeline, chunks=chunks, overlap=True)
    layers = {"interleaved": ranks * chunks, "dualpipev": 2 * ranks}.get(pipeline, ranks)
    job = replace(job, model=replace(V3, layers=layers), dispatcher="deepep")
    machine = replace(H800, devices_per_node=4, intra_node_gbytes_per_s=150.0)
    moe = Stages(job, machine).layers.moe
    # Transfers are short enough to hide in pairs.
    assert moe.out_ms < min(moe.attend[0] + moe.shared[1], moe.shared[0] + moe.experts[1])
    there = max(0.0, moe.out_ms - moe.shared[0]) + moe.home_ms
    back = max(0.0, moe.out_ms - moe.shared[1] - moe.shared[2] - moe.attend[2])
    back += max(0.0, moe.home_ms - moe.experts[2])
    assert predict(job, machine).exposed_s * 1e3 == pytest.approx(alone * (there + back))


def test_gradients_under_the_last_backward_pass():
    job = Job(DENSE, 64, 2048, 64)
    hidden, waited = predict(job, H800), predict(replace(job, overlap_dp=False), H800)
    reduction = Stages(job, H800).reduction(Stages(job, H800).shapes, 1)
    assert waited.reduce_s * 1e3 == pytest.approx(reduction.reduce_ms + reduction.gather_ms)
    forward, into, weight = Stages(job, H800).passes(Stages(job, H800).shapes[0])
    left = max(0.0, reduction.reduce_ms - into - weight) + max(0.0, reduction.gather_ms - forward)
    assert hidden.reduce_s * 1e3 == pytest.approx(left)
    assert waited.step_s > hidden.step_s


def test_tokens_and_mfu():
    """From the step and the count of operations alone."""
    job = spread("dualpipe", 32, overlap=True)
    found = predict(job, H800)
    tokens = 32 * 32 * 4096
    assert found.tokens_per_s_per_gpu == pytest.approx(tokens / 256 / found.step_s)
    assert found.mfu == pytest.approx(V3.flops_per_token(4096) * tokens / 256 / found.step_s / 989.4e12)
    assert 0.2 < found.mfu < 0.6


def test_more_work_takes_longer():
    steps = [predict(spread("dualpipe", n, overlap=True), H800).step_s for n in (16, 32, 64)]
    assert steps == sorted(steps)
    # Without its bubbles, twice the micro-batches take twice as long.
    assert steps[2] - steps[1] == pytest.approx(2 * (steps[1] - steps[0]), rel=1e-6)
    for changes in ({"recompute": frozenset({"layer"})}, {"skew": 1.5}, {"products": "bf16"}):
        assert predict(spread("1f1b", 16, **changes), H800).step_s > predict(spread("1f1b", 16), H800).step_s


def test_blocking_sends():
    """Two of them more for each micro-batch, and on the way in and out."""
    job = spread("1f1b", 16)
    send_s = Stages(job, H800).send_ms / 1e3
    more_s = predict(replace(job, blocking_sends=True), H800).compute_s - predict(job, H800).compute_s
    assert more_s == pytest.approx(16 * 2 * send_s)


def test_the_slowest_of_many_devices():
    assert slowdown(0.01, 1) == 1
    assert slowdown(0.01, 1000) == pytest.approx(1.0372, abs=1e-4)
    job, uneven = Job(DENSE, 64, 2048, 64), replace(MACHINE, device_spread=0.01)
    apart = predict(job, uneven).step_s - predict(job, MACHINE).step_s
    assert apart == pytest.approx((slowdown(0.01, 64) - 1) * predict(job, MACHINE).compute_s)


@pytest.mark.parametrize("per_step", [1, 2])
def test_a_slow_card_carries_everything(per_step: int):
    """Tokens and gradients that leave by one card can't do so at once: a step takes at least as long as their bytes."""
    machine = replace(H800, inter_node_gbytes_per_s=1.0, device_spread=0.0)
    job = Job(V3, 64, 4096, 64 * per_step, ep=16, dispatcher="rank", overlap=per_step > 1, in_flight=per_step)
    stages = Stages(job, machine)
    moe, reduction = stages.layers.moe, stages.reduction(stages.shapes, 1)
    tokens_ms = per_step * job.model.layers * 2 * (moe.out_ms + moe.home_ms)
    assert stages.shares_links
    bytes_s = (tokens_ms + reduction.reduce_ms + reduction.gather_ms) / 1e3
    for found in (predict(job, machine), simulate(job, machine).prediction):
        assert found.step_s > 0.97 * bytes_s
    # Where experts stay within a node, the card has gradients alone.
    assert not Stages(replace(job, ep=8), machine).shares_links
