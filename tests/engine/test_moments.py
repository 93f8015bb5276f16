"""Moments in 8 bits: torchao's numbers, which a second rounding leaves alone, and a run that goes on where it was."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchao.optim.quant_utils import quantize_8bit_with_qmap

from dstrain.engine import moments
from dstrain.engine.moments import BLOCK, VERSION, EightBit
from dstrain.engine.optimizer import AdamShard
from dstrain.engine.state import Progress
from dstrain.errors import ConfigError
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from tests.engine.test_loop import trainer_of
from tests.gloo.spawn import spawn
from tests.tiny import CPU, alone, tiny_config, whole


def written(x: Tensor, *, signed: bool) -> EightBit:
    moment = EightBit.zeros_like(x, signed=signed)
    moment.write(slice(0, len(x)), x)
    return moment


def values(*, signed: bool) -> Tensor:
    """Blocks of very different sizes, some of zeros, some whose extreme is negative; the last one is short."""
    x = torch.randn(41 * BLOCK + 17, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-30, 20, 42).repeat_interleave(BLOCK)[: len(x)]
    x[3 * BLOCK : 5 * BLOCK] = 0
    x[7 * BLOCK] = -4 * x[7 * BLOCK : 8 * BLOCK].abs().max()
    return x if signed else x.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_what_was_rounded_changes_nothing(signed: bool):
    first = written(values(signed=signed), signed=signed)
    second = written(first.lend(), signed=signed)
    assert torch.equal(second.state.codes, first.state.codes)
    assert torch.equal(second.state.scale, first.state.scale)
    assert torch.equal(second.lend(), first.lend())
    first.take_back()
    assert first.lent is None
    assert torch.equal(first.lend(), second.lend())


@pytest.mark.parametrize("signed", [True, False])
def test_the_numbers_are_those_of_torchao(signed: bool):
    x = torch.randn(100, BLOCK, generator=torch.Generator().manual_seed(0)) ** 9
    x = x / x.abs().amax(1, keepdim=True) * 0.99
    x = x if signed else x.abs()
    # A block whose largest element is 1 has the scale 1 there and here.
    x[:, 0] = 1.0
    ours = written(x.flatten(), signed=signed).state
    theirs = quantize_8bit_with_qmap(x.flatten(), ours.qmap)
    assert torch.equal(ours.scale, torch.ones(len(x)))
    # Squares that would become 0 don't.
    differing = ours.codes != theirs
    assert ours.codes[differing].unique().tolist() == ([] if signed else [1])
    # Between the halves of the widest step.
    assert (ours.dequantize() - x.flatten()).abs().max() <= 0.5 * (ours.qmap[1:] - ours.qmap[:-1]).max()


def test_a_part_is_read_and_written_alone():
    x = values(signed=True)
    moment = written(x, signed=True)
    part = slice(2 * BLOCK, len(x) + 100)
    assert torch.equal(moment.read(part), moment.lend()[2 * BLOCK :])
    again = EightBit.zeros_like(x, signed=True)
    for begin in range(0, len(x), 2 * BLOCK):
        again.write(slice(begin, begin + 2 * BLOCK), x[begin : begin + 2 * BLOCK])
    assert torch.equal(again.lend(), moment.lend())


def test_what_is_not_finite_shows():
    x = torch.zeros(2 * BLOCK)
    x[5] = torch.nan
    found = written(x, signed=True).lend()
    assert found[:BLOCK].isnan().all()
    assert not found[BLOCK:].any()


def test_both_take_two_bytes_of_a_parameter():
    shard = AdamShard.of(torch.zeros(100 * BLOCK), torch.int8, decays=True)
    assert shard.exp_avg.nbytes + shard.exp_avg_sq.nbytes == 100 * BLOCK * 2 + 100 * 2 * 4


def _absent(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(("version", "reason"), [(_absent, "not installed"), (lambda _: "0.19.0", "0.19.0")])
def test_needs_torchao(monkeypatch: pytest.MonkeyPatch, version, reason: str):
    monkeypatch.setattr(moments, "version", version)
    with pytest.raises(ConfigError, match=reason) as error:
        AdamShard.of(torch.zeros(4), torch.int8, decays=True)
    assert "pip install 'dstrain[int8]'" in error.value.cure
    assert f'"torchao>={VERSION},' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")


# -- runs -------------------------------------------------------------------------------------------------------------

INT8 = tiny_config(precision={"moments_dtype": "int8"}, engine={"bucket_mib": 0.02}, optim={"lr": 3e-3})


def half(rank: int, world: int, mesh: Mesh) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
    """The state after two steps; the losses of the two that follow, and the state behind them."""
    trainer = trainer_of(INT8, connect(mesh, Place(rank, world, CPU)))
    for _ in range(2):
        trainer.step()
    state = {name: x.clone() for name, x in whole(trainer.state()).items()}
    losses = [trainer.step().loss for _ in range(2)]
    return state, losses, whole(trainer.state())


def rest(rank: int, world: int, mesh: Mesh, state: dict[str, Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    trainer = trainer_of(replace(INT8, train=replace(INT8.train, seed=99)), connect(mesh, Place(rank, world, CPU)))
    for name, shard in trainer.state().items():
        for offset, part in shard.ranges():
            part.copy_(state[name][offset : offset + len(part)])
    trainer.engine.loaded(2)
    trainer.progress = Progress(2, 16, 16 * 12)
    losses = [trainer.step().loss for _ in range(2)]
    return losses, whole(trainer.state())


def test_a_run_resumes_as_if_it_had_not_ended():
    state, losses, last = half(0, 1, Mesh())
    assert all(state[f"exp_avg_sq/{name}"].any() for name in ("embed.weight", "layers.1.moe.experts.down"))
    again, found = rest(0, 1, Mesh(), state)
    assert again == losses
    assert all(torch.equal(found[name], last[name]) for name in last)
    # In another layout other neighbours share a scale, so the moments are rounded once more.
    assert spawn(rest, 2, Mesh(ep=2), state)[0][0] == pytest.approx(losses, rel=2e-3)


def test_learns_as_with_wide_moments():
    wide = replace(INT8, precision=replace(INT8.precision, moments_dtype="float32"))
    runs = []
    for config in (INT8, wide):
        trainer = trainer_of(config, alone())
        runs.append([trainer.step().loss for _ in range(8)])
    assert runs[1][-1] < 0.95 * runs[1][0]
    assert runs[0] != runs[1]
    assert runs[0] == pytest.approx(runs[1], rel=5e-3)
