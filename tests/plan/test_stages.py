"""Layers as phases against the published trace of DeepSeek-V3, and what stages make of them."""

import json
from dataclasses import replace
from importlib import resources

import pytest

from dstrain.config.hardware import HardwareConfig
from dstrain.errors import ConfigError
from dstrain.hardware import named
from dstrain.plan.architecture import Architecture
from dstrain.plan.job import Job
from dstrain.plan.network import Group, Network
from dstrain.plan.stages import Layer, Layers, Shape, Stages, step_times
from dstrain.schedule.action import Pass, Phase

MACHINE = HardwareConfig(
    peak_bf16_tflops=100.0,
    multiprocessors=100,
    memory_gbytes_per_s=1000.0,
    host_us=0.0,
    devices_per_node=8,
    intra_node_gbytes_per_s=200.0,
    inter_node_gbytes_per_s=50.0,
)
V3 = Architecture("v3", 129280, 7168, 61, 3, 128, 128, 192, 128, 1536, 512, 64, 18432, True, 256, 8, 2048, 2048, 8, 4)
TRACED = Job(V3, 64, 4096, 64, ep=64, overlap=True, in_flight=2, products="fp8_block", dispatcher="deepep", wire="fp8")
MOE = Architecture("moe", 32000, 1024, 16, 2, 16, 16, 96, 64, 256, 128, 32, 4096, True, 64, 4, 512, 1024)
DENSE = replace(MOE, name="dense", dense_layers=16, experts=0)
JOB = Job(MOE, 32, 2048, 32 * 4, pp=4, ep=8)


# -- the trace --------------------------------------------------------------------------------------------------------


def traced() -> dict[str, dict]:
    text = (resources.files("dstrain.plan") / "data" / "deepseek_train_trace.json").read_text()
    return json.loads(text)["phase_mean_us_per_layer"]


def phases(layer: Layer) -> dict[str, float]:
    """Milliseconds by the trace's names; its mlp is shared and routed experts."""
    found = {}
    for n, name in enumerate("FBW"):
        found[f"attn({name})"] = layer.attend[n]
        found[f"mlp({name})"] = layer.shared[n] + layer.experts[n]
    return found


def test_compute_of_the_published_trace():
    """All of a layer within 5 %. Weight gradients, whose kernels scale both operands in tiles and add to FP32 sums, are
    counted up to 30 % too short, and copies of rows too long by as much."""
    known, got = traced(), phases(Layers(TRACED, named("h800_sxm")).moe)
    for name, ms in got.items():
        close = 0.12 if name in ("attn(F)", "attn(B)") else 0.3
        assert ms == pytest.approx(known[name]["busy_union_mean"] / 1e3, rel=close), name
    total_ms = sum(known[name]["busy_union_mean"] for name in got) / 1e3
    assert sum(got.values()) == pytest.approx(total_ms, rel=0.05)


def test_what_is_neither_product_nor_attention_in_the_trace():
    """A quarter of the compute, which is what casts, norms, copies and the like take here."""
    kinds = Layers(TRACED, named("h800_sxm")).moe.kinds
    products = ("gemm", "mla up", "grouped gemm", "routing", "attention", "shared with transfers")
    classes: dict[str, float] = {}
    for name, phase in traced().items():
        if name.startswith(("attn", "mlp")):
            for kind, us in phase["by_class_sum_mean"].items():
                classes[kind] = classes.get(kind, 0.0) + us / 1e3
    other_ms = sum(ms for kind, ms in classes.items() if kind not in ("gemm", "attention_core"))
    assert other_ms > 0.2 * sum(classes.values())
    assert sum(ms for kind, ms in kinds.items() if kind not in products) == pytest.approx(other_ms, rel=0.3)
    assert kinds["attention"] == pytest.approx(classes["attention_core"], rel=0.05)
    gemm_ms = sum(kinds[kind] for kind in ("gemm", "mla up", "grouped gemm", "routing"))
    # Those of weight gradients run beside each other there, and are counted twice.
    assert gemm_ms * (1 + 20 / 132) == pytest.approx(classes["gemm"], rel=0.25)


def test_transfers_of_the_published_trace():
    """Rows alone: ranks also waited for each other, in a run with a profiler. The way out is slower forward than
    backward there."""
    known, layer = traced(), Layers(TRACED, named("h800_sxm")).moe
    ways = {"dispatch(F)": layer.out_ms, "combine(B)": layer.out_ms}
    ways |= {"combine(F)": layer.home_ms, "dispatch(B)": layer.home_ms}
    for name, ms in ways.items():
        kernels = known[name]["by_class_sum_mean"]
        rows_ms = sum(us for kind, us in kernels.items() if kind in ("dispatch_kernel", "combine_kernel")) / 1e3
        assert ms == pytest.approx(rows_ms, rel=0.25), name
        assert ms < known[name]["busy_union_mean"] / 1e3, name


# -- recomputation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("norm", ["norm"]), ("mla_up", ["mla up", "rope"]), ("core", ["attention"]), ("swiglu", ["activation"])],
)
def test_a_name_adds_the_forward_time_of_its_kernels(name: str, kinds: list[str]):
    base, again = Layers(JOB, MACHINE), Layers(replace(JOB, recompute=frozenset({name})), MACHINE)
    for layer, work in (("moe", base.kernels.moe_layer), ("dense", base.kernels.dense_layer)):
        parts = (work.attend, work.shared, work.experts)
        more_ms = 1e3 * sum(part.forward[kind] for part in parts for kind in kinds)
        plain, repeated = getattr(base, layer).passes, getattr(again, layer).passes
        assert more_ms > 0
        assert repeated == pytest.approx((plain[0], plain[1] + more_ms, plain[2]))


def test_mla_up_of_dstrain_reaches_to_the_output_of_attention():
    """What parallel/recompute.py wraps for it holds the core of attention."""
    job = replace(JOB, recompute=frozenset({"mla_up"}))
    alone, own = Layers(job, MACHINE), Layers(replace(job, repeats_core=True), MACHINE)
    core_ms = 1e3 * alone.kernels.moe_layer.attend.forward["attention"]
    forward, into, weight = alone.moe.passes
    assert own.moe.passes == pytest.approx((forward, into + core_ms, weight))


WHOLE = {
    "layer": ["attend", "shared", "experts"],
    "attend": ["attend"],
    "moe": ["shared", "experts"],
    "experts": ["experts"],
}


@pytest.mark.parametrize(("name", "parts"), WHOLE.items())
def test_a_part_adds_all_of_its_forward_time(name: str, parts: list[str]):
    base, again = Layers(JOB, MACHINE).moe, Layers(replace(JOB, recompute=frozenset({name})), MACHINE).moe
    for part in ("attend", "shared", "experts"):
        forward, into, weight = getattr(base, part)
        assert getattr(again, part) == pytest.approx((forward, into + forward * (part in parts), weight))


def test_selective_recomputation_is_between_none_and_all():
    sums = [sum(Layers(replace(JOB, recompute=frozenset(r)), MACHINE).moe.passes) for r in ((), ("sac",), ("layer",))]
    assert sums[0] < sums[1] < sums[2]


# -- hosts, and what is shared ----------------------------------------------------------------------------------------


def test_a_slow_host():
    """Launches take longer than kernels: the layer takes as long as they do. A graph has none, but for those of each
    expert, whose numbers of rows the host must know."""
    slow = replace(MACHINE, host_us=1000.0)
    job = replace(JOB, seq_len=64)
    work, layer = Layers(job, slow).kernels.moe_layer, Layers(job, slow).moe
    assert layer.passes[0] == pytest.approx(work.launches[0])
    assert layer.passes[1] + layer.passes[2] == pytest.approx(work.launches[1])
    graph = Layers(replace(job, cuda_graph=True), slow).moe
    assert graph.passes == pytest.approx(Layers(job, MACHINE).moe.passes)
    each = Layers(replace(job, cuda_graph=True, launch_per_expert=True), slow)
    awaited = each.kernels.moe_layer.awaited
    assert each.moe.passes[0] == pytest.approx(graph.passes[0] + awaited)


def test_transfers_beside_compute_hold_processors():
    alone, beside = (Layers(replace(JOB, overlap=overlap), MACHINE).moe for overlap in (False, True))
    assert alone.kinds["shared with transfers"] == 0
    sent_ms = 2 * (beside.out_ms + beside.home_ms)
    held = 1 + 20 / 100 * min(1, sent_ms / sum(alone.passes))
    assert sum(beside.passes) == pytest.approx(held * sum(alone.passes))


def test_sharded_weights_that_compute_does_not_hide():
    """Links so slow that gathering is all that counts: forward once, backward again with the sums of gradients."""
    job = Job(DENSE, 32, 2048, 32, zero=3)
    slow = replace(MACHINE, inter_node_gbytes_per_s=0.001)
    layers = Layers(job, slow)
    weights = DENSE.attention_weights + DENSE.norm_weights + DENSE.ffn_weights(DENSE.ffn)
    gather_ms, reduce_ms = (
        1e3 * Network(slow).collective_s(weights * each, Group.of(32, 1, 8)) for each in (2, job.grad_wire_bytes)
    )
    forward, into, weight = layers.dense.passes
    assert forward == pytest.approx(gather_ms, rel=0.01)
    assert into + weight == pytest.approx(gather_ms + reduce_ms, rel=0.01)


def test_cores_of_a_cpu_carry_what_travels():
    """A share of each transfer is work of the cores, whatever runs beside it; the rest can be hidden. Launches and
    compute take turns."""
    cpu = replace(MACHINE, multiprocessors=0, host_us=10.0)
    alone, shared = Layers(JOB, cpu), Layers(JOB, replace(cpu, transfer_host_share=0.25))
    work = alone.kernels.moe_layer
    forward, into, weight = alone.moe.passes
    seconds = [sum(each) for each in zip(*(p.seconds for p in (work.attend, work.shared, work.experts)), strict=True)]
    assert forward == pytest.approx(seconds[0] * 1e3 + work.launches[0] * 0.01)
    assert into + weight == pytest.approx((seconds[1] + seconds[2]) * 1e3 + work.launches[1] * 0.01)
    sent_ms = alone.moe.out_ms + alone.moe.home_ms
    assert shared.moe.passes[0] - forward == pytest.approx(0.25 * sent_ms)
    assert sum(shared.moe.passes[1:]) - into - weight == pytest.approx(0.25 * sent_ms)
    assert shared.moe.out_ms + shared.moe.home_ms == pytest.approx(0.75 * sent_ms)


# -- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["1f1b", "zb_v", "dualpipe"])
@pytest.mark.parametrize("splits", [True, False])
def test_phases_add_up_to_passes(pipeline: str, splits: bool):
    """Of every stage; the compute of all stages is that of all layers and of what is before and behind them."""
    job = replace(JOB, pipeline=pipeline, splits_weights=splits)
    stages, times = Stages(job, MACHINE), step_times(job, MACHINE)
    assert len(times.stages) == len(stages.shapes) == job.num_stages
    for shape, costs in zip(stages.shapes, times.stages, strict=True):
        by_pass = [sum(ms for (work, _, _), ms in costs.compute_ms.items() if work is each) for each in Pass]
        forward, into, weight = stages.passes(shape)
        assert by_pass == pytest.approx([forward, into, weight] if splits else [forward, into + weight, 0.0])
        assert costs.blocks == shape.moe + shape.mtp
    layers = stages.layers
    total = 2 * sum(layers.dense.passes) + 14 * sum(layers.moe.passes) + sum(layers.head) + sum(layers.embedding)
    assert sum(sum(costs.compute_ms.values()) for costs in times.stages) == pytest.approx(total)


def test_transfers_of_a_stage():
    """What goes out in one pass comes home in the other."""
    costs, moe = step_times(JOB, MACHINE).stages[-1], Stages(JOB, MACHINE).layers.moe
    for block in range(costs.blocks):
        assert costs.transfer_ms[Pass.FORWARD, "dispatch", block] == moe.out_ms
        assert costs.transfer_ms[Pass.FORWARD, "combine", block] == moe.home_ms
        assert costs.transfer_ms[Pass.BACKWARD, "combine", block] == moe.out_ms
        assert costs.transfer_ms[Pass.BACKWARD, "dispatch", block] == moe.home_ms
    assert len(costs.transfer_ms) == 4 * costs.blocks


@pytest.mark.parametrize("job", [replace(JOB, ep=1), replace(JOB, dispatcher="local"), replace(JOB, model=DENSE, ep=1)])
def test_a_stage_without_transfers_is_one_stretch(job: Job):
    for costs in step_times(job, MACHINE).stages:
        assert {(phase, block) for _, phase, block in costs.compute_ms} == {(Phase.ATTEND, 0)}
        assert not costs.transfer_ms


def test_layers_are_spread_evenly():
    """Sixteen alike on four stages are four each but for the head, which counts as the layers it takes as long as."""
    even = Stages(Job(replace(DENSE, vocab=8), 4, 2048, 16, pp=4), MACHINE)
    assert [shape.dense for shape in even.shapes] == [4, 4, 4, 4]
    heavy = Stages(Job(replace(DENSE, vocab=300_000), 4, 2048, 16, pp=4), MACHINE)
    *others, last = [shape.dense for shape in heavy.shapes]
    head, layer = sum(heavy.layers.head), sum(heavy.layers.dense.passes)
    assert 1 <= last < min(others)
    assert max(others) - min(others) <= 1
    assert max(others) * layer < (last + 1) * layer + head
    assert sum(others) + last == 16
    asked = Stages(Job(DENSE, 4, 2048, 16, pp=4, split=(7, 3, 3, 3)), MACHINE)
    assert [shape.dense for shape in asked.shapes] == [7, 3, 3, 3]


def test_dense_layers_come_first():
    model = replace(MOE, dense_layers=5)
    shapes = Stages(replace(JOB, model=model, split=(4, 4, 4, 4)), MACHINE).shapes
    assert [(shape.dense, shape.moe) for shape in shapes] == [(4, 0), (1, 3), (0, 4), (0, 4)]
    assert [shape.is_first for shape in shapes] == [True, False, False, False]
    assert [shape.is_last for shape in shapes] == [False, False, False, True]


def test_mtp_modules_are_with_the_head_or_before_it():
    model = replace(MOE, mtp=2)
    shapes = Stages(replace(JOB, model=model), MACHINE).shapes
    assert [shape.mtp for shape in shapes] == [0, 0, 0, 2]
    free = Stages(replace(JOB, model=model, free_split=True), MACHINE).shapes
    assert [shape.mtp for shape in free] == [0, 0, 2, 0]
    assert [shape.mtp for shape in Stages(replace(JOB, model=model, pp=1, gpus=8), MACHINE).shapes] == [2]
    # Each of them is a layer, a projection, and the head once more.
    stages = Stages(replace(JOB, model=model), MACHINE)
    without = sum(stages.passes(Shape(0, 4, False, True)))
    module_ms = sum(stages.layers.moe.passes) + sum(stages.layers.mtp)
    assert sum(stages.passes(Shape(0, 4, False, True, mtp=2))) == pytest.approx(without + 2 * module_ms)
    assert sum(stages.layers.mtp) > sum(stages.layers.head)


# -- the end of a step ------------------------------------------------------------------------------------------------


def test_parameters_of_all_stages_are_those_of_the_model():
    """But for the final norm; experts over the ranks that share them."""
    stages = Stages(JOB, MACHINE)
    held = [stages.held(shape) for shape in stages.shapes]
    assert sum(experts * JOB.ep + others for experts, others in held) == MOE.total - MOE.hidden
    tied = replace(MOE, tied=True)
    both = Stages(replace(JOB, model=tied), MACHINE)
    # The first and the last stage have it each.
    assert sum(e * 8 + o for e, o in map(both.held, both.shapes)) == tied.total + tied.embedding_weights - MOE.hidden


def test_what_a_step_ends_with():
    """Dense weights over all ranks of a stage, experts over those that hold the same ones: 64 devices, two stages."""
    job = Job(MOE, 64, 2048, 128, pp=2, ep=8, split=(8, 8))
    stages = Stages(job, MACHINE)
    (shape, _), network = stages.shapes, Network(MACHINE)
    experts, others = stages.held(shape)
    got = stages.reduction([shape], 1)
    groups = ((experts, Group.of(4, 8, 8)), (others, Group.of(32, 1, 8)))
    assert got.reduce_ms == pytest.approx(1e3 * sum(network.collective_s(4 * n, group) for n, group in groups))
    assert got.gather_ms == pytest.approx(1e3 * sum(network.collective_s(2 * n, group) for n, group in groups))
    # Master weights and two moments in FP32 are read and written, gradients and weights come on top.
    each = 2 * 4 + 2 * 2 * 4 + job.update_bytes
    speed = 1000e9 * MACHINE.memory_efficiency
    assert got.update_ms == pytest.approx(1e3 * each * (experts / 4 + others / 32) / speed)
    plain = Stages(replace(job, zero=0), MACHINE).reduction([shape], 1)
    assert plain.reduce_ms == pytest.approx(2 * got.reduce_ms)
    assert plain.gather_ms == 0
    assert plain.update_ms == pytest.approx(1e3 * each * (experts + others) / speed)
    copied = stages.reduction([shape], 2)
    assert copied.update_ms == pytest.approx(got.update_ms / 2)
    sharded = Stages(replace(job, zero=3), MACHINE).reduction([shape], 1)
    assert (sharded.reduce_ms, sharded.gather_ms, sharded.update_ms) == (0, 0, pytest.approx(got.update_ms))


def test_wires_of_gradients_and_weights():
    """Half of the bytes take half of the time, but for latencies."""
    full, half = (
        step_times(replace(JOB, gpus=128, grad_wire_bytes=n, gather_bytes=n), MACHINE).ranks[0] for n in (4, 2)
    )
    assert full.reduce_ms == full.gather_ms
    assert 0.5 < half.reduce_ms / full.reduce_ms < 0.6


def test_sends_between_stages():
    """2048 tokens of 1024 values in BF16 over one card; inside of a node where all of the job is on it."""
    assert step_times(JOB, MACHINE).send_ms == pytest.approx(2048 * 1024 * 2 / (50e9 * 0.85) * 1e3, abs=0.04)
    inside = replace(JOB, gpus=8, ep=2)
    assert step_times(inside, MACHINE).send_ms == pytest.approx(2048 * 1024 * 2 / (200e9 * 0.8) * 1e3, abs=0.04)
    assert step_times(replace(JOB, pp=1, gpus=8), MACHINE).send_ms == 0
    blocking = step_times(replace(JOB, blocking_sends=True), MACHINE)
    assert blocking.send_exposed_ms == blocking.send_ms > 0


def test_jobs_that_differ_in_their_pipeline_share_their_layers():
    """They would cost the same if they did not."""
    one, other = Stages(JOB, MACHINE), Stages(replace(JOB, gpus=64, pp=8, sequences=512, pipeline="zb_v"), MACHINE)
    assert one.layers is other.layers
    assert one.layers.moe.passes == pytest.approx(Layers(JOB, MACHINE).moe.passes)


@pytest.mark.parametrize(
    ("name", "devices_per_node"),
    [
        ("peak_bf16_tflops", 8),
        ("memory_gbytes_per_s", 8),
        ("intra_node_gbytes_per_s", 8),
        ("inter_node_gbytes_per_s", 8),
    ],
)
def test_a_machine_that_does_not_say_enough(name: str, devices_per_node: int):
    with pytest.raises(ConfigError, match=f"hardware.{name}=0"):
        Stages(JOB, replace(MACHINE, **{name: 0.0}))


def test_one_node_needs_no_links_between_nodes():
    alone = replace(MACHINE, inter_node_gbytes_per_s=0.0)
    assert len(Stages(replace(JOB, gpus=8, ep=2), alone).shapes) == 4
    with pytest.raises(ConfigError, match="inter_node"):
        Stages(JOB, alone)
