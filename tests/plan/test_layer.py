"""Kernels of layers: their operations add up to plan.count's, and a layer of DeepSeek-V3 to its published trace."""

from collections import Counter
from dataclasses import replace

import pytest

from dstrain.config.hardware import HardwareConfig
from dstrain.plan.architecture import Architecture
from dstrain.plan.device import STREAMING, Device
from dstrain.plan.job import Job
from dstrain.plan.layer import Kernels, Work, added

MACHINE = HardwareConfig(
    peak_bf16_tflops=100.0,
    multiprocessors=100,
    memory_gbytes_per_s=1000.0,
    devices_per_node=8,
    intra_node_gbytes_per_s=200.0,
    inter_node_gbytes_per_s=50.0,
)
MLA = Architecture("mla", 32000, 1024, 8, 2, 16, 16, 96, 64, 256, 128, 32, 4096, True, 64, 4, 512, 1024)
NO_LATENT = replace(MLA, name="queries as they are", q_rank=0)
GQA = Architecture("gqa", 32000, 1024, 8, 0, 16, 4, 64, 64, 0, 0, 64, 4096, True, 16, 2, 1024)
UNGATED = replace(GQA, name="ungated", gated=False)
MODELS = [MLA, NO_LATENT, GQA, UNGATED]


class Counted(Device):
    """The device, with the operations of its products written down."""

    def __init__(self, hardware: HardwareConfig):
        super().__init__(hardware)
        object.__setattr__(self, "flops", Counter())

    def product_s(self, m: int, n: int, k: int, products: str, *, groups: int = 1, out_bytes: int = 2) -> float:
        self.flops["products"] += 2 * m * n * k * groups
        return super().product_s(m, n, k, products, groups=groups, out_bytes=out_bytes)

    def attention_s(self, sequences: float, seq_len: int, heads: int, dims: int, *, backward: bool = False) -> float:
        self.flops["attention"] += (2.5 if backward else 1) * sequences * seq_len**2 * heads * dims
        return super().attention_s(sequences, seq_len, heads, dims, backward=backward)


def kernels(job: Job) -> tuple[Kernels, Counter[str]]:
    made = Kernels(job, MACHINE)
    made.device = counted = Counted(MACHINE)
    return made, counted.flops


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("tp", [1, 4])
def test_products_add_up_to_the_count(model: Architecture, tp: int):
    """6 for each weight that a token is multiplied with; tensor parallelism leaves each device its share, but for
    latents of MLA and the router, whose tokens are spread instead."""
    job = Job(model, 8, 2048, 8, tp=tp, ep=8 // tp, dispatcher="local")
    made, flops = kernels(job)
    assert made.moe_layer.attend.seconds[0] > 0
    latent = sum(out * wide for out, wide in model.attention_matrices[:-1] if out < model.hidden and wide == 1024)
    latent = latent if model.is_mla else 0
    cut = model.attention_weights - latent + model.moe_dense_weights
    active = latent + (cut + model.experts_per_token * model.expert_weights) / tp
    assert flops["products"] == pytest.approx(6 * 2048 * active, rel=1e-3)
    # Two products forward, and five backward where plain counting has four.
    assert flops["attention"] == pytest.approx(3.5 * 2048**2 * model.heads * (model.qk_dim + model.v_dim) / tp)


def test_a_dense_layer_and_the_head():
    model = replace(GQA, experts=0, dense_layers=8)
    made, flops = kernels(Job(model, 1, 2048, 1))
    assert made.dense_layer.attend.seconds[0] > 0
    assert flops["products"] == 6 * 2048 * (model.attention_weights + 3 * 1024 * 4096)
    flops.clear()
    assert made.head.seconds[0] > 0
    assert flops["products"] == 6 * 2048 * model.embedding_weights


def test_an_mtp_module():
    """What is no layer: a projection of twice the width, and the head."""
    made, flops = kernels(Job(MLA, 1, 2048, 1))
    assert made.mtp.seconds[0] > 0
    assert flops["products"] == 6 * 2048 * (2 * MLA.hidden**2 + MLA.embedding_weights)


def test_context_parallelism_halves_attention():
    """Each rank has half of the queries, against keys of the whole sequence."""
    whole, half = (Job(GQA, 8, 4096, 8, cp=cp, ep=1, dispatcher="local") for cp in (1, 2))
    (one, flops), (two, shared) = kernels(whole), kernels(half)
    assert one.attention.seconds[0] > two.attention.seconds[0]
    assert shared["attention"] == flops["attention"] / 2
    assert shared["products"] == flops["products"] / 2


def test_scores_in_memory_take_longer():
    job = Job(GQA, 1, 4096, 1, dispatcher="local")
    flash, plain = Kernels(job, MACHINE), Kernels(replace(job, flash=False), MACHINE)
    for quick, slow in zip(flash.attention.passes, plain.attention.passes, strict=True):
        assert slow["attention"] > 1.5 * quick["attention"] or slow["attention"] == quick["attention"] == 0
    scores_s = 16 * 4096**2 * 23 / (1000e9 * MACHINE.memory_efficiency)
    both = plain.attention.forward["attention"] + plain.attention.input["attention"]
    assert both > scores_s


def test_experts_that_are_spread_and_those_that_are_not():
    """As many rows come to a rank as it sends, whatever the number of ranks; each expert gets more of them."""
    rows = {ep: kernels(Job(MLA, ep, 2048, ep, ep=ep)) for ep in (1, 8, 64)}
    flops = set()
    for made, counted in rows.values():
        assert made.experts.seconds[0] > 0
        flops.add(counted["products"])
    assert flops == {6 * 2048 * 4 * MLA.expert_weights}


def test_a_skewed_load():
    """The most loaded rank has more rows in products, activations and copies."""
    job = Job(MLA, 8, 2048, 8, ep=8)
    even, skewed = (kernels(replace(job, skew=skew)) for skew in (1.0, 1.5))
    for slow, quick in zip(skewed[0].experts.seconds, even[0].experts.seconds, strict=True):
        assert 1.2 < slow / quick < 1.6
    assert skewed[1]["products"] == 1.5 * even[1]["products"]


def test_experts_cut_by_tensors():
    """Two ranks have half of each expert and all rows of both: the operations stay, and what they pass comes on top."""
    whole, cut = (kernels(Job(MLA, 8, 2048, 8, ep=4, etp=etp)) for etp in (1, 2))
    assert whole[0].experts.forward["tensor parallel"] == 0
    assert cut[0].experts.forward["tensor parallel"] > 0
    assert whole[1]["products"] == cut[1]["products"]


def test_casts_are_counted_with_fp8_alone():
    job = Job(MLA, 8, 2048, 8, ep=8)
    for products in ("bf16", "float32"):
        assert "cast" not in added(*Kernels(replace(job, products=products), MACHINE).experts.passes)
    for products in ("fp8_tensor", "fp8_block", "mxfp8"):
        work = Kernels(replace(job, products=products), MACHINE).experts
        # Both products read and quantise their input: more than a byte a value in, and one out.
        rows = 2048 * 4
        least_s = rows * (1024 + 512) * 2 / (1000e9 * MACHINE.memory_efficiency)
        assert work.forward["cast"] > least_s
        assert work.input["cast"] > least_s


def test_unfused_kernels_take_longer_where_memory_binds():
    job = Job(MLA, 8, 2048, 8, ep=8)
    fused, apart = Kernels(job, MACHINE).attention, Kernels(replace(job, unfused=2.0), MACHINE).attention
    assert 1.5 < apart.forward["norm"] / fused.forward["norm"] <= 2
    assert apart.forward["gemm"] == fused.forward["gemm"]


def test_tensor_parallel_transfers():
    """Two of all rows, forward; sequence parallelism sends one of the backward pass under products."""
    job = Job(GQA, 4, 2048, 4, tp=4, dispatcher="local")
    both = Kernels(job, MACHINE)
    once_s = both.network.collective_s(2048 * 1024 * 2, both.tensor_group)
    assert both.attention.forward["tensor parallel"] == pytest.approx(2 * once_s)
    assert both.attention.input["tensor parallel"] == pytest.approx(once_s)
    plain = Kernels(replace(job, sequence_parallel=False), MACHINE)
    assert plain.attention.input["tensor parallel"] == pytest.approx(2 * once_s)
    hidden = Kernels(replace(job, tp_overlap=0.75), MACHINE)
    assert hidden.attention.forward["tensor parallel"] == pytest.approx(0.5 * once_s)
    # All tokens are normed where they are not spread.
    assert plain.attention.forward["norm"] > 2.5 * both.attention.forward["norm"]


def test_what_accumulating_gradients_adds():
    """Of more than one micro-batch, sums in FP32 are read and written: 4 bytes a weight more in every one of them."""
    job = Job(GQA, 1, 2048, 1, dispatcher="local")
    once, often = (Kernels(replace(job, sequences=n), MACHINE).dense.weight["gemm"] for n in (1, 2))
    assert often - once == pytest.approx(4 * 3 * 1024 * 4096 / (1000e9 * STREAMING))


def test_launches():
    """Of each expert two products forward and four backward where no kernel takes all of them; FP8 casts besides."""
    job = Job(MLA, 8, 2048, 8, ep=8)
    together = Kernels(job, MACHINE).moe_layer
    each = Kernels(replace(job, launch_per_expert=True), MACHINE).moe_layer
    assert [n - m for n, m in zip(each.launches, together.launches, strict=True)] == [8 * 2, 8 * 4]
    narrow = Kernels(replace(job, launch_per_expert=True, products="fp8_tensor"), MACHINE).moe_layer
    assert narrow.launches[0] - together.launches[0] == 8 * 6
    # The host waits for numbers of rows only where rows travel.
    assert together.awaited > 0
    assert Kernels(replace(job, dispatcher="local"), MACHINE).moe_layer.awaited == 0


def test_sums_of_work():
    part = Work(added({"gemm": 1.0}), added({"gemm": 2.0, "norm": 1.0}), added())
    total = part + part
    assert total.seconds == (2.0, 6.0, 0.0)
    assert dict(total.input) == {"gemm": 4.0, "norm": 2.0}
    assert part.seconds == (1.0, 3.0, 0.0)
