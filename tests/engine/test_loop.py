"""The training step: shares of the batch, sums over micro-batches and ranks, and what a step leaves behind."""

from dataclasses import replace
from math import log

import pytest
import torch
from torch import Tensor

from dstrain.comm.trace import Trace
from dstrain.config.schema import Config, MeshConfig, MtpConfig, RampConfig, RecipeChange, RouterConfig
from dstrain.engine.loop import StepReport, Trainer, after_step, rank_share, rest_of_run
from dstrain.engine.sharding import ShardedEngine
from dstrain.engine.state import Progress
from dstrain.errors import SharedError
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect, mesh_of
from dstrain.parallel.apply import build_model
from tests.gloo.spawn import spawn
from tests.tiny import CPU, TINY, alone, samples, tiny_config, whole, worst

# Batches of 4, 8, 12, then 16 sequences of 12 tokens.
RAMPED = tiny_config(train={"steps": 11, "sequences": 16, "micro_batch": 2, "ramp": RampConfig(12 * 60, 4, 4)})


def trainer_of(config: Config, groups: Groups) -> Trainer:
    mesh = groups.mesh
    config = replace(config, mesh=MeshConfig(mesh.pp, mesh.ep, mesh.dp))
    model = build_model(config, groups)
    engine = ShardedEngine(model, config, groups)
    return Trainer(config, groups, model, engine, lambda first, count: samples(config, first, count), Progress())


def counting(mesh: Mesh, rank: int) -> Groups:
    """Without processes: enough to divide a batch."""
    return Groups(mesh, Place(rank, mesh.world, CPU), mesh.coordinate(rank), Trace(CPU), None, None, None, None, None)


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=2), Mesh(ep=2)], ids=str)
def test_the_shares_of_all_ranks_are_the_batch(mesh: Mesh):
    progress, sizes = Progress(), []
    while progress.step < RAMPED.train.steps:
        shares = [rank_share(RAMPED, counting(mesh, rank), progress) for rank in range(mesh.world)]
        rows = [row for share in shares for first, count in share for row in range(first, first + count)]
        before, progress = progress, after_step(RAMPED, progress)
        assert rows == list(range(before.samples, progress.samples))
        assert {count for share in shares for _, count in share} == {2}
        assert progress.tokens - before.tokens == 12 * len(rows)
        sizes.append(len(rows))
    assert sizes == [4] * 5 + [8] * 3 + [12] * 2 + [16] * 1


def test_the_rest_of_the_run_is_what_the_steps_ask_for():
    asked: list[tuple[int, int]] = []
    trainer = trainer_of(RAMPED, alone())
    batches = trainer.batches

    def recorded(first: int, count: int) -> Tensor:
        asked.append((first, count))
        return batches(first, count)

    trainer.batches = recorded
    expected = list(rest_of_run(RAMPED, trainer.groups, Progress()))
    trainer.step()
    later = list(rest_of_run(RAMPED, trainer.groups, trainer.progress))
    assert asked + later == expected
    while trainer.progress.step < RAMPED.train.steps:
        trainer.step()
    assert asked == expected
    assert list(rest_of_run(RAMPED, trainer.groups, trainer.progress)) == []


def gradients(micro_batch: int, sequences: int = 8) -> tuple[dict[str, Tensor], list[float]]:
    config = tiny_config(train={"micro_batch": micro_batch, "sequences": sequences}, model={"router": Z_LOSS})
    trainer = trainer_of(config, alone())
    sums = trainer.accumulate()
    trainer.engine.reduce()
    sums.wait()
    return whole(dict(trainer.engine.gradients())), sums.parts_5.tolist()


Z_LOSS = RouterConfig(balance_loss_weight=0.01, z_loss_weight=0.01)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_small_micro_batches_add_up_to_the_whole_batch(micro_batch: int):
    (found, parts), (expected, whole_parts) = gradients(micro_batch), gradients(8)
    assert parts == pytest.approx(whole_parts, rel=1e-6)
    assert worst(found, expected) < 1e-5


def first_steps(rank: int, world: int, mesh: Mesh) -> list[StepReport]:
    trainer = trainer_of(REPORTED, connect(mesh, Place(rank, world, CPU)))
    return [trainer.step(stop=rank == 1 and step == 1) for step in range(2)]


REPORTED = tiny_config(
    model={"router": replace(Z_LOSS, bias_update_rate=0.02), "mtp": MtpConfig(1, 0.4)},
    train={"changes": (RecipeChange(8 * 12, mtp_loss_weight=0.2),)},
    optim={"warmup_steps": 4},
)


@pytest.fixture(scope="module")
def reports() -> list[list[StepReport]]:
    """Of one process, then of the four ranks of ep=2 dp=2."""
    return [first_steps(0, 1, Mesh()), *spawn(first_steps, 4, Mesh(dp=2, ep=2))]


def test_a_report_covers_the_global_batch(reports: list[list[StepReport]]):
    for first, second in reports:
        assert (first.progress, second.progress) == (Progress(1, 8, 96), Progress(2, 16, 192))
        assert first.tokens == second.tokens == 96
        for report, expected in ((first, reports[0][0]), (second, reports[0][1])):
            for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "loss_z", "grad_norm", "lr"):
                assert getattr(report, name) == pytest.approx(getattr(expected, name), rel=1e-5)
            for layer, reference in zip(report.layers, expected.layers, strict=True):
                assert layer.name == reference.name
                assert torch.equal(layer.load_E, reference.load_E)
                assert layer.entropy == pytest.approx(reference.entropy, rel=1e-5)
                assert layer.bias_range == reference.bias_range


def test_the_loss_is_the_weighted_sum_of_its_parts(reports: list[list[StepReport]]):
    """Two routers report to the balance and z losses; the recipe changes the weight of MTP after the first step."""
    for report, mtp_weight in zip(reports[1], (0.4, 0.2), strict=True):
        others = mtp_weight * report.loss_mtp + 0.01 * report.loss_balance + 0.01 * report.loss_z
        assert report.loss == pytest.approx(report.loss_main + others, rel=1e-6)
        assert report.loss_balance == pytest.approx(2, rel=0.2)
        assert report.loss_z > 1


def test_per_layer_figures(reports: list[list[StepReport]]):
    for report in reports[1]:
        assert [layer.name for layer in report.layers] == ["layers.1.moe.router", "mtp.0.layer.moe.router"]
        for layer in report.layers:
            assert layer.load_E.sum() == 96 * 2
            assert 0.5 * log(4) < layer.entropy <= log(4)
            assert layer.bias_range == pytest.approx(0.04 * report.progress.step, abs=0.041)
    assert max(layer.bias_range for layer in reports[1][0].layers) == pytest.approx(0.04)


def test_what_ranks_know_together(reports: list[list[StepReport]]):
    ranks = reports[1:]
    assert [[report.stop for report in rank] for rank in ranks] == [[False, True]] * 4
    assert len({rank[0].memory_gib for rank in ranks}) == 1
    assert reports[0][1].stop is False
    for rank in ranks:
        # The parameters of a step may leave within it, or under the next one.
        sent = rank[0].comm.sent_bytes.keys() | rank[1].comm.sent_bytes.keys()
        assert {"dispatch", "combine", "grad", "param", "reduce"} <= sent
        assert 0 < rank[0].comm.exposed_ms < 1e3 * rank[0].seconds
    assert reports[0][0].comm.sent_bytes == {}


def test_the_rate_warms_up(reports: list[list[StepReport]]):
    assert [report.lr for report in reports[0]] == pytest.approx([0.0025, 0.005])


def test_sums_travel_under_the_backward_pass(reports: list[list[StepReport]]):
    """They set out in the last stretch of the last forward pass."""
    for rank in reports[1:]:
        labels = [transfer.label for transfer in rank[0].comm.transfers if transfer.kind == "reduce"]
        assert [(label.block, label.direction) for label in labels] == [(2, "forward"), (None, None), (None, None)]


def in_orders(rank: int, world: int) -> list[tuple[str, list[float], dict[str, Tensor]]]:
    """What two steps compute in several orders of phases: reasons, losses and norms, the weights after them."""
    groups, found = connect(Mesh(ep=world), Place(rank, world, CPU)), []
    for in_flight in (1, 2, 4):
        trainer = trainer_of(tiny_config(train={"micro_batch": 1}, schedule={"in_flight": in_flight}), groups)
        reports = [trainer.step() for _ in range(2)]
        figures = [figure for report in reports for figure in (report.loss, report.grad_norm)]
        found.append((reports[-1].order, figures, {n: t.clone() for n, t in whole(trainer.state()).items()}))
    return found


def test_the_order_of_phases_changes_no_bit():
    (first, *others), _ = spawn(in_orders, 2)
    assert first[0] == "1 of 4 micro-batches in flight"
    for (reason, figures, weights), count in zip(others, (2, 4), strict=True):
        assert reason.startswith(f"{count} of 4 micro-batches in flight, planned")
        assert figures == first[1]
        assert all(torch.equal(weights[name], first[2][name]) for name in first[2])


def broken(rank: int, world: int, where: str) -> tuple[str, bool, Progress]:
    """One rank meets a NaN. The message, whether anything but the poison changed, and where the run stands."""
    trainer = trainer_of(TINY, connect(Mesh(ep=world), Place(rank, world, CPU)))
    trainer.step()
    trainer.engine.settle()
    if where == "loss" and rank == 1:
        trainer.model.norm.weight.data[0] = torch.nan
    if where == "gradient" and rank == 1:
        trainer.model.norm.weight.register_hook(lambda grad: grad * torch.nan)
    before = {name: shard.local.clone() for name, shard in trainer.state().items()}
    with pytest.raises(SharedError) as raised:
        trainer.step()
    after = trainer.state()
    untouched = all(torch.equal(after[name].local.nan_to_num(), before[name].nan_to_num()) for name in before)
    return str(raised.value), untouched, trainer.progress


@pytest.mark.parametrize(("where", "named"), [("loss", "loss nan"), ("gradient", "gradient norm nan")])
def test_nothing_is_updated_when_a_rank_meets_a_nan(where: str, named: str):
    results = spawn(broken, 2, where)
    assert len({message for message, _, _ in results}) == 1
    for message, untouched, progress in results:
        assert message.startswith("step 2: ")
        assert named in message
        assert untouched
        assert progress == Progress(1, 8, 96)


FP8 = {"products": "fp8", "watch_every_steps": 2}
CLASSES = ("activation", "swiglu", "attention", "weight", "gradient")


def watched(rank: int, world: int) -> list[dict[str, float]]:
    trainer = trainer_of(
        tiny_config(precision=FP8, train={"sequences": 4}), connect(Mesh(ep=world), Place(rank, world, CPU))
    )
    return [trainer.step().rounding for _ in range(3)]


def test_what_quantising_did_is_reported_now_and_then_for_all_ranks():
    alone, *ranks = watched(0, 1), *spawn(watched, 2)
    assert ranks[0] == ranks[1]
    for found, expected in zip(ranks[0], alone, strict=True):
        assert found.keys() == expected.keys()
        for name, figure in found.items():
            # All ranks hold the weights of what is no expert, which count once for each of them.
            if not name.startswith("weight"):
                assert figure == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
    assert [bool(figures) for figures in alone] == [False, True, False]
    names = {f"{kind}_{what}" for kind in CLASSES for what in ("amax", "underflow", "overflow")}
    assert alone[1].keys() == names
    assert all(alone[1][f"{kind}_amax"] > 0 for kind in CLASSES)
    assert not any(alone[1][f"{kind}_overflow"] for kind in CLASSES)


def test_nothing_is_watched_unless_asked_for():
    for precision in ({"products": "fp8"}, {"watch_every_steps": 1}):
        assert trainer_of(tiny_config(precision=precision), alone()).step().rounding == {}


def poison(trainer: Trainer, kind: str, name: str) -> None:
    """Makes a NaN of a number of the weight, or of all gradients of what it computes."""
    if kind == "weight":
        trainer.model.get_parameter(name).data.view(-1)[0] = torch.nan
        return
    module = trainer.model.get_submodule(name.rpartition(".")[0])

    def spoil(_: object, __: object, result: Tensor) -> None:
        if result.requires_grad:
            result.register_hook(lambda grad: grad * torch.nan)

    module.register_forward_hook(spoil)


def accused(rank: int, world: int, config: Config, cases: list[tuple[str, str]]) -> list[str]:
    """What is said where the last rank is poisoned, in each case."""
    groups, said = connect(mesh_of(config), Place(rank, world, CPU)), []
    for case in cases:
        trainer = trainer_of(config, groups)
        if rank == world - 1:
            poison(trainer, *case)
        with pytest.raises(SharedError) as raised:
            trainer.step()
        said.append(str(raised.value))
    return said


CULPRITS = [
    ("weight", "layers.0.attn.q_b.weight"),
    ("weight", "layers.1.moe.experts.gate_up"),
    ("gradient", "layers.0.mlp.down.weight"),
    ("gradient", "layers.1.attn.o.weight"),
]


def assert_named(said: list[str], cases: list[tuple[str, str]]) -> None:
    for message, (kind, name) in zip(said, cases, strict=True):
        assert f"was to be quantised is the {kind} of {name}. Nothing was updated" in message


def test_the_first_tensor_that_is_not_finite_is_named():
    assert_named(accused(0, 1, tiny_config(precision=FP8), CULPRITS), CULPRITS)


def test_without_fp8_nobody_is_named():
    assert "must be finite. Nothing was updated" in accused(0, 1, TINY, CULPRITS[:1])[0]


def test_the_culprit_may_be_on_another_rank():
    """What it sends others breaks their tensors, too, only later in the step."""
    config = replace(tiny_config(precision=FP8), mesh=MeshConfig(ep=2))
    for said in spawn(accused, 2, config, CULPRITS[1:]):
        assert_named(said, CULPRITS[1:])


def test_the_culprit_may_be_between_two_stages_of_a_rank():
    """The first and the last stage are on one rank, the two between them on the other."""
    schedule, train = {"pipeline": "zb_v", "chunks": 2}, {"micro_batch": 2}
    config = tiny_config(model={"num_layers": 5}, precision=FP8, schedule=schedule, train=train)
    cases = [("weight", "layers.2.moe.experts.down"), ("gradient", "layers.2.attn.kv_b.weight")]
    for said in spawn(accused, 2, replace(config, mesh=MeshConfig(pp=2)), cases):
        assert_named(said, cases)


def test_a_resumed_run_is_bitwise_the_same():
    straight = trainer_of(RAMPED, alone())
    expected = [straight.step().loss for _ in range(5)]
    first, second = trainer_of(RAMPED, alone()), trainer_of(RAMPED, alone())
    found = [first.step().loss for _ in range(3)]
    saved = first.state()
    for name, shard in second.state().items():
        shard.local.copy_(saved[name].local)
    second.engine.loaded(3)
    second.progress = first.progress
    assert found + [second.step().loss for _ in range(2)] == expected
