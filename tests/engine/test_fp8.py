"""Weights that are gathered in FP8 are those that one process rounds, whatever the shares cut."""

from dataclasses import replace
from math import ceil, prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import Peers
from dstrain.comm.flat import FlatCollectives, sent_bytes
from dstrain.comm.trace import Trace
from dstrain.config.schema import Config, MeshConfig
from dstrain.engine import fp8
from dstrain.engine.fp8 import WEIGHTS, Fp8Gather, stacks_of
from dstrain.engine.loop import Trainer
from dstrain.engine.sharding import ShardedEngine
from dstrain.engine.state import Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.mesh.topology import Topology
from dstrain.model.moe import Experts
from dstrain.model.transformer import Transformer
from dstrain.parallel.apply import LogicalParameter, build_model, logical_parameters
from dstrain.precision.linear import Linear
from dstrain.precision.quantize import dequantize_blocks, quantize_blocks
from tests.gloo.spawn import spawn
from tests.tiny import CPU, alone, samples, tiny_config, whole

# Sides that are no multiples of 128, matrices of one block, experts; more rows than a piece has.
SHAPES = [(300, 200), (3, 130, 40), (7, 5), (256, 128), (2, 1, 130), (640, 7)]
RANKS = 4
FACTORS = (1.0, 3.0)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Of very different magnitudes, with an outlier in some blocks, denormals of E4M3, and a matrix of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** torch.randint(-7, 4, shape, generator=generator)
    return torch.zeros(shape) if shape == (7, 5) else x


def bucket() -> tuple[list[Tensor], Tensor, list[int], int]:
    """Matrices, the flat bucket that holds them, where they begin in it, and the share of a rank."""
    matrices = [noise(shape, seed) for seed, shape in enumerate(SHAPES)]
    starts = [sum(prod(shape) for shape in SHAPES[:n]) for n in range(len(SHAPES))]
    share = ceil(sum(map(prod, SHAPES)) / (16 * RANKS)) * 16
    flat = torch.zeros(share * RANKS)
    for matrix, start in zip(matrices, starts, strict=True):
        flat[start : start + matrix.numel()] = matrix.flatten()
    return matrices, flat, starts, share


def reference(matrices: list[Tensor], length: int) -> Tensor:
    rounded = [dequantize_blocks(quantize_blocks(matrix, WEIGHTS)).flatten() for matrix in matrices]
    return torch.cat([*rounded, torch.zeros(length - sum(map(len, rounded)))])


def gather_of(ranks: int, length: int, peers: Peers | None, starts: list[int]) -> Fp8Gather:
    share = length // ranks
    shares = [slice(rank * share, (rank + 1) * share) for rank in range(ranks)]
    return Fp8Gather(stacks_of(starts, SHAPES), shares, peers, CPU)


def test_one_process_rounds_every_block():
    matrices, flat, starts, _ = bucket()
    gather, compute = gather_of(1, len(flat), None, starts), torch.zeros(len(flat), dtype=torch.bfloat16)
    assert gather.start(FlatCollectives(Trace(CPU)), flat, compute) is None
    expected = reference(matrices, len(flat))
    # Nothing is lost in BF16, nor when products round it once more.
    assert torch.equal(compute.float(), expected)
    parts = [
        compute[start : start + m.numel()].view(m.shape).float() for m, start in zip(matrices, starts, strict=True)
    ]
    assert torch.equal(reference(parts, len(flat)), expected)
    assert not torch.equal(expected, flat.bfloat16().float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_block_that_is_not_finite_is_nan_and_no_other(bad: float):
    _, flat, starts, _ = bucket()
    flat[5 * 200 + 130] = bad
    compute = torch.zeros(len(flat))
    gather_of(1, len(flat), None, starts).round(flat, compute)
    first = compute[: 300 * 200].view(300, 200)
    assert first[:128, 128:].isnan().all()
    assert int(compute.isnan().sum()) == 128 * 72


def gathered(rank: int, world: int, per_node: int) -> dict[str, Any]:
    """Twice, the second time of other weights."""
    topology = Topology(tuple(r // per_node for r in range(world)))
    links = tuple(topology.link(rank, r) for r in range(world))
    trace = Trace(CPU)
    peers = Peers(dist.group.WORLD, trace, f"data of {per_node}", tuple(range(world)), links, per_node)
    _, flat, starts, share = bucket()
    gather, collectives = gather_of(world, len(flat), peers, starts), FlatCollectives(trace)
    found = [torch.zeros(len(flat), dtype=torch.bfloat16) for _ in FACTORS]
    own = slice(rank * share, (rank + 1) * share)
    flights = [gather.start(collectives, factor * flat[own], out) for factor, out in zip(FACTORS, found, strict=True)]
    for flight in flights:
        flight.wait()
    sent = [{k.value: n for k, n in t.sent_bytes.items()} for t in trace.take().transfers]
    known = [{k.value: n for k, n in sent_bytes(peers, size).items() if n} for size in gather.sent_sizes]
    return {"found": found, "sent": sent, "known": known, "sizes": gather.sent_sizes}


def on_nodes(rank: int, world: int) -> list[dict[str, Any]]:
    found = [gathered(rank, world, per_node) for per_node in (1, 2, 4)]
    fp8.PIECE_ELEMENTS = 1000
    return [*found, gathered(rank, world, 4)]


def test_ranks_gather_what_one_process_rounds():
    matrices, flat, _, _ = bucket()
    for results in (results for of_rank in spawn(on_nodes, RANKS) for results in of_rank):
        for factor, compute in zip(FACTORS, results["found"], strict=True):
            assert torch.equal(compute.float(), reference([factor * matrix for matrix in matrices], len(flat)))
        # What is sent is known beforehand: a byte for an element, and little for the scales.
        assert results["sent"] == results["known"] * len(FACTORS)
        largest, values = results["sizes"]
        assert values == len(flat)
        assert largest < 0.01 * values


# -- the engine -------------------------------------------------------------------------------------------------------

FP8 = tiny_config(
    model={"hidden_size": 144, "intermediate_size": 136},
    train={"micro_batch": 1},
    engine={"bucket_mib": 0.1},
    precision={"compute_dtype": "bfloat16", "products": "fp8", "gather": "fp8"},
)


def rounded(config: Config, groups: Groups) -> dict[str, bool]:
    """After two steps: whether parameters are what their master weights are rounded to, by name."""
    mesh = groups.mesh
    config = replace(config, mesh=MeshConfig(mesh.pp, mesh.ep, mesh.dp))
    model = build_model(config, groups)
    engine = ShardedEngine(model, config, groups)
    trainer = Trainer(config, groups, model, engine, lambda first, count: samples(config, first, count), Progress())
    for _ in range(2):
        trainer.step()
    engine.settle()
    master = whole({name: x for name, x in engine.state().items() if name.startswith("master/")})
    in_fp8 = products_of(model)
    return {x.name: is_rounded(x, master[f"master/{x.name}"], x.name in in_fp8) for x in logical_parameters(model)}


def products_of(model: Transformer) -> set[str]:
    """The weights of FP8 products, by name."""
    modules = [module for module in model.modules() if isinstance(module, (Linear, Experts))]
    return {products.name for module in modules for products in (module.products or {}).values()}


def is_rounded(x: LogicalParameter, master: Tensor, in_fp8: bool) -> bool:
    wide = master.view(x.shape)
    expected = dequantize_blocks(quantize_blocks(wide, WEIGHTS)) if in_fp8 else wide
    parts = [expected.flatten()[offset : offset + x.part_numel] for offset in x.offsets]
    return torch.equal(x.parameter, torch.cat(parts).view(x.parameter.shape).to(x.parameter.dtype))


def all_rounded(rank: int, world: int, mesh: Mesh) -> dict[str, bool]:
    groups = connect(mesh, Place(rank, world, CPU))
    wide = replace(FP8, precision=replace(FP8.precision, compute_dtype="float32"))
    return {f"{n}: {name}": right for n, c in enumerate((FP8, wide)) for name, right in rounded(c, groups).items()}


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=2, ep=2)], ids=str)
def test_parameters_are_the_rounded_master_weights(mesh: Mesh):
    ranks = [all_rounded(0, 1, mesh)] if mesh.world == 1 else spawn(all_rounded, mesh.world, mesh)
    for found in ranks:
        assert [name for name, right in found.items() if not right] == []


def test_what_multiplies_in_fp8_has_buckets_of_its_own():
    model = build_model(FP8, alone())
    buckets = ShardedEngine(model, FP8, alone()).buckets
    in_fp8 = {slot.logical.name for bucket in buckets if bucket.fp8 for slot in bucket.slots}
    assert in_fp8 == products_of(model)
    assert {"layers.0.attn.o.weight", "layers.1.moe.experts.gate_up"} <= in_fp8
    others = {x.name.split(".")[-2] for x in logical_parameters(model)} - {name.split(".")[-2] for name in in_fp8}
    assert {"embed", "head", "router", "attn_norm"} <= others
    wide = replace(FP8, precision=replace(FP8.precision, gather="compute"))
    assert not any(bucket.fp8 for bucket in ShardedEngine(build_model(wide, alone()), wide, alone()).buckets)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_master_weights_are_not_rounded(dtype: str):
    config = tiny_config(precision={"products": "fp8", "compute_dtype": dtype, "gather": "fp8"})
    model = build_model(config, alone())
    initial = {x.name: x.parameter.detach().clone() for x in logical_parameters(model)}
    state = ShardedEngine(model, config, alone()).state()
    for name, weight in initial.items():
        assert torch.equal(state[f"master/{name}"].local, weight.flatten()), name
    rounded = dict(model.named_parameters())["layers.0.attn.o.weight"]
    assert not torch.equal(rounded.float(), initial["layers.0.attn.o.weight"])
