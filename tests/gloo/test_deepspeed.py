"""DeepSpeed's ZeRO computes what one process computes, and what `engine=torch` computes.

AdamW hides the scale of gradients; here eps is so large that an update is nearly proportional to the gradient, and the
reduced gradients themselves are compared.
"""

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.config.schema import (
    Config,
    EngineConfig,
    ModelConfig,
    MtpConfig,
    OptimConfig,
    PrecisionConfig,
    RouterConfig,
    TrainConfig,
)
from dstrain.engine.choose import make_engine
from dstrain.engine.contract import Engine
from dstrain.engine.loop import Trainer
from dstrain.engine.plain import PlainEngine
from dstrain.engine.state import FlatShard, Progress
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.parallel.apply import build_model
from tests.gloo.spawn import spawn

Tensors = dict[str, Tensor]

CONFIG = Config(
    model=ModelConfig(
        vocab_size=320,
        hidden_size=32,
        num_layers=2,
        num_experts=4,
        experts_per_token=2,
        kv_lora_rank=16,
        intermediate_size=64,
        moe_intermediate_size=16,
        init_std=0.05,
        mtp=MtpConfig(depth=1),
        router=RouterConfig(z_loss_weight=1e-3),
    ),
    train=TrainConfig(seq_len=16, sequences=4, micro_batch=1),
    precision=PrecisionConfig("float32", "float32", "float32"),
    engine=EngineConfig("deepspeed", zero_stage=1, bucket_mib=1),
    optim=OptimConfig(lr=0.1, warmup_steps=0, eps=1.0, clip_norm=0.3),
)
UNCLIPPED = replace(CONFIG, optim=replace(CONFIG.optim, clip_norm=0.0))
# Its embedding is larger than a bucket.
WIDE = replace(
    CONFIG,
    model=replace(CONFIG.model, vocab_size=8320),
    train=replace(CONFIG.train, sequences=8),
)
STEPS = 3


@dataclass
class Run:
    """What a run of STEPS steps computed; tensors are whole and flat, by logical name."""

    losses: list[float]
    norms: list[float]
    # Of the first step: there both sides hold equal weights.
    gradients: Tensors
    master: Tensors
    sent_bytes: dict[str, int]


def with_engine(config: Config, name: str, stage: int = 1, *, offload: bool = False) -> Config:
    engine = replace(config.engine, name=name, zero_stage=stage, offload_optimizer=offload)
    return replace(config, engine=engine)


def in_bf16(config: Config) -> Config:
    return replace(config, precision=PrecisionConfig("bfloat16", "bfloat16", "float32"))


def batch(first: int, count: int) -> Tensor:
    """Different samples have different lengths of repetition, so that ranks' gradients differ in size."""
    samples = range(first, first + count)
    return torch.stack([torch.randint(2 + 40 * (s % 8), (18,), generator=_seeded(s)) for s in samples])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(pieces: dict[str, FlatShard]) -> Tensors:
    """Puts the ranks' ranges together; raises if anything is missing."""
    own = [(name, x.shape, offset, part.cpu()) for name, x in pieces.items() for offset, part in x.ranges()]
    everyone: list = [None] * dist.get_world_size() if dist.is_initialized() else [own]
    if dist.is_initialized():
        dist.all_gather_object(everyone, own)
    tensors: Tensors = {}
    for name, shape, offset, local in (piece for pieces_of_rank in everyone for piece in pieces_of_rank):
        flat = tensors.setdefault(name, torch.full((prod(shape),), torch.nan))
        flat[offset : offset + len(local)] = local.float()
    incomplete = [name for name, flat in tensors.items() if flat.isnan().any()]
    if incomplete:
        raise AssertionError(f"no rank has all of {incomplete}")
    return tensors


class Watched:
    """An engine whose gradients of the first step are kept."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.gradients: Tensors = {}

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def reduce(self) -> float:
        norm = self.engine.reduce()
        if not self.gradients:
            self.gradients = whole(dict(self.engine.gradients()))
        return norm


def make_trainer(config: Config, groups: Groups) -> Trainer:
    model = build_model(config, groups)
    engine = PlainEngine(model, config.optim) if config.engine.name == "plain" else make_engine(model, config, groups)
    return Trainer(config, groups, model, engine, batch, Progress())


def run(config: Config, groups: Groups) -> Run:
    trainer = make_trainer(config, groups)
    trainer.engine = Watched(trainer.engine)
    reports = [trainer.step() for _ in range(STEPS)]
    master = {name: shard for name, shard in trainer.engine.state().items() if name.startswith("master/")}
    # The last gather goes on after the last step.
    trainer.engine.settle()
    sent: Counter[str] = Counter(groups.trace.take().sent_bytes)
    for report in reports:
        sent.update(report.comm.sent_bytes)
    losses, norms = [r.loss for r in reports], [r.grad_norm for r in reports]
    return Run(losses, norms, trainer.engine.gradients, whole(master), sent)


def run_all(groups: Groups, cases: dict[str, Config]) -> dict[str, Run]:
    return {name: run(config, groups) for name, config in cases.items()}


def plain(config: Config) -> Run:
    return run(with_engine(config, "plain"), connect(Mesh(), Place(0, 1, torch.device("cpu"))))


def worst(found: Tensors, expected: Tensors) -> float:
    assert found.keys() == expected.keys()
    return max(((found[n] - expected[n]).abs().max() / expected[n].abs().max()).item() for n in found)


def assert_same(found: Run, expected: Run, tolerance: float) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=tolerance)
    assert worst(found.gradients, expected.gradients) < tolerance
    assert worst(found.master, expected.master) < tolerance


FP32_CASES = {
    "stage 1": with_engine(CONFIG, "deepspeed", 1),
    "stage 2": with_engine(CONFIG, "deepspeed", 2),
    "stage 1, unclipped": with_engine(UNCLIPPED, "deepspeed", 1),
    "stage 2, unclipped": with_engine(UNCLIPPED, "deepspeed", 2),
    "stage 1, offload": with_engine(CONFIG, "deepspeed", 1, offload=True),
    "stage 2, offload": with_engine(CONFIG, "deepspeed", 2, offload=True),
}
BF16_CASES = {
    "stage 1": with_engine(in_bf16(CONFIG), "deepspeed", 1),
    "stage 2": with_engine(in_bf16(CONFIG), "deepspeed", 2),
    "stage 1, offload": with_engine(in_bf16(CONFIG), "deepspeed", 1, offload=True),
    "stage 2, offload": with_engine(in_bf16(CONFIG), "deepspeed", 2, offload=True),
}
WIDE_CASES = {f"stage {stage}": with_engine(WIDE, "deepspeed", stage) for stage in (1, 2)}


# With an ordinary eps, so that moments and the step count matter.
MOVING = replace(CONFIG, optim=OptimConfig(lr=3e-3, warmup_steps=0))
MOVED = {
    "torch": with_engine(MOVING, "torch"),
    "stage 1": with_engine(MOVING, "deepspeed", 1),
    "stage 2": with_engine(MOVING, "deepspeed", 2),
    "offload": with_engine(MOVING, "deepspeed", 1, offload=True),
}
MOVES = [("stage 1", "torch"), ("torch", "stage 1"), ("torch", "stage 2"), ("stage 2", "offload"), ("offload", "torch")]


def move(groups: Groups, source: Config, target: Config) -> tuple[list[float], list[float]]:
    """Losses of two further steps of `source` after two, and of `target` from the state after two."""
    first, second = make_trainer(source, groups), make_trainer(target, groups)
    for _ in range(2):
        first.step()
    saved = whole(first.state())
    # Something to overwrite; a gather under way would write into it after us.
    second.step()
    second.engine.settle()
    for name, shard in second.state().items():
        shard.local.copy_(saved[name][shard.offset : shard.offset + len(shard.local)])
    second.engine.loaded(2)
    second.progress = first.progress
    return [first.step().loss for _ in range(2)], [second.step().loss for _ in range(2)]


def dtypes(groups: Groups, config: Config) -> dict[str, torch.dtype]:
    trainer = make_trainer(config, groups)
    found = {name: p.dtype for name, p in trainer.model.named_parameters()}
    return found | {name: shard.local.dtype for name, shard in trainer.engine.state().items()}


@dataclass
class Found:
    """All that two ranks with ep=2 found out, in one start of the processes."""

    runs: dict[str, Run]
    moves: dict[str, tuple[list[float], list[float]]]
    dtypes: dict[str, torch.dtype]


def two_ranks(rank: int, world: int) -> Found:
    groups = connect(Mesh(ep=2), Place(rank, world, torch.device("cpu")))
    cases = {f"fp32, {name}": config for name, config in FP32_CASES.items()}
    cases |= {f"bf16, {name}": config for name, config in BF16_CASES.items()}
    cases |= {"fp32, torch": with_engine(CONFIG, "torch"), "bf16, torch": with_engine(in_bf16(CONFIG), "torch")}
    runs = run_all(groups, cases)
    moves = {f"{source} -> {target}": move(groups, MOVED[source], MOVED[target]) for source, target in MOVES}
    return Found(runs, moves, dtypes(groups, in_bf16(CONFIG)))


def four_ranks(rank: int, world: int) -> dict[str, Run]:
    return run_all(connect(Mesh(dp=2, ep=2), Place(rank, world, torch.device("cpu"))), WIDE_CASES)


@pytest.fixture(scope="module")
def ep2() -> Found:
    return spawn(two_ranks, 2, timeout_s=150)[0]


@pytest.fixture(scope="module")
def ep2_dp2() -> dict[str, Run]:
    return spawn(four_ranks, 4, timeout_s=150)[0]


@pytest.mark.parametrize("case", FP32_CASES)
def test_ep2_is_exact(ep2: Found, case: str):
    expected = plain(UNCLIPPED if "unclipped" in case else CONFIG)
    clip = CONFIG.optim.clip_norm
    assert all(norm > 1.5 * clip for norm in expected.norms), "the clipped cases must clip"
    assert_same(ep2.runs[f"fp32, {case}"], expected, 1e-5)


@pytest.mark.parametrize("case", WIDE_CASES)
def test_ep2_dp2_is_exact_with_a_tensor_larger_than_a_bucket(ep2_dp2: dict[str, Run], case: str):
    assert_same(ep2_dp2[case], plain(WIDE), 1e-5)


@pytest.mark.parametrize("case", BF16_CASES)
def test_bf16_is_that_of_the_torch_engine(ep2: Found, case: str):
    """Gradients added in BF16, or master weights taken from rounded ones, would be off by 1e-3."""
    found, expected = ep2.runs[f"bf16, {case}"], ep2.runs["bf16, torch"]
    assert worst(found.gradients, expected.gradients) < 1e-5
    assert worst(found.master, expected.master) < 1e-4
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)


def test_sends_twice_the_gradient_bytes_of_the_torch_engine(ep2: Found):
    found, expected = ep2.runs["fp32, stage 1"].sent_bytes, ep2.runs["fp32, torch"].sent_bytes
    assert found["grad"] == pytest.approx(2 * expected["grad"], rel=0.01)
    assert found["param"] == pytest.approx(expected["param"], rel=0.01)


@pytest.mark.parametrize("case", [f"{source} -> {target}" for source, target in MOVES])
def test_state_moves_between_engines(ep2: Found, case: str):
    went_on, moved = ep2.moves[case]
    assert moved == pytest.approx(went_on, rel=1e-6)


def test_dtypes_are_as_configured(ep2: Found):
    found = ep2.dtypes
    weights = {name: dtype for name, dtype in found.items() if "/" not in name}
    assert {n for n, d in weights.items() if d == torch.float32} == {n for n in weights if "router" in n} != set()
    assert {d for n, d in found.items() if n.startswith("master/")} == {torch.float32}
    assert {d for n, d in found.items() if n.startswith("exp_avg")} == {torch.bfloat16}
