"""The proof itself is put to the test: it passes what is right, fails what is wrong, and never hangs."""

import os
import re
import signal
import time
from dataclasses import replace
from itertools import product
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dstrain.config import load
from dstrain.config.commands import VerifyConfig, VerifyRoot
from dstrain.config.schema import DispatchConfig, MeshConfig
from dstrain.errors import UserError
from dstrain.mesh.axes import Mesh
from dstrain.tasks import verify
from dstrain.tasks.verify import Difference, assemble, compare, print_table, run_processes
from tests.gloo.spawn import spawn

LIMITED = VerifyRoot(verify=VerifyConfig(timeout_s=60))


def figures(**changed: Any) -> dict[str, Any]:
    made = {
        "losses": [5.0, 4.0],
        "norms": [1.0, 1.0],
        "grads": {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.0, 4.0])},
        "parameters": {"a": torch.tensor([3.0]), "b": torch.tensor([0.0])},
        "how": "",
    }
    return made | changed


# -- comparison -------------------------------------------------------------------------------------------------------


def test_equal_figures_do_not_differ():
    assert [row.error for row in compare(figures(), figures())] == [0.0] * 6


def test_errors_are_relative_to_the_largest_value_and_worst_first():
    layout = figures(losses=[5.0, 4.5], grads={"a": torch.tensor([1.0, -2.002]), "b": torch.tensor([0.4, 4.0])})
    found = compare(figures(), layout)
    assert [(row.what, row.name) for row in found[2:4]] == [("gradient", "b"), ("gradient", "a")]
    assert [row.error for row in found[:4]] == pytest.approx([0.1, 0, 0.1, 0.001], rel=1e-4)


@pytest.mark.parametrize(
    "grads",
    [
        {"a": torch.tensor([1.0, -2.0])},
        {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.0, 4.0, 0.0])},
        {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([nan, 4.0])},
    ],
    ids=["missing", "misshapen", "not a number"],
)
def test_what_cannot_be_compared_is_infinitely_off(grads: dict[str, torch.Tensor]):
    worst = compare(figures(), figures(grads=grads))[2]
    assert (worst.name, worst.error) == ("b", inf)


def test_errors_of_the_norm_leave_out_what_moves_by_signs():
    changed = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([3.0, 0.0])}
    biased = figures(parameters={"a": torch.tensor([3.0]), "layers.1.moe.router.bias": torch.tensor([0.001])})
    found = compare(biased, biased | {"grads": changed}, by_norm=True)
    assert found[2] == Difference("gradient", "b", 1.25)
    assert [row.name for row in found if row.what == "parameter"] == ["a"]


def test_a_gradient_where_there_is_none_is_infinitely_off():
    layout = figures(parameters={"a": torch.tensor([3.0]), "b": torch.tensor([1e-9])})
    assert compare(figures(), layout)[4] == Difference("parameter", "b", inf)


def test_a_range_that_no_rank_holds_is_seen():
    part = {"a": ((4,), 0, torch.ones(3))}
    joined = assemble([{"losses": [1.0], "norms": [1.0], "grads": part, "parameters": {}, "how": ""}])
    whole = joined | {"grads": {"a": torch.ones(4)}}
    assert compare(whole, joined)[2].error == inf


# -- the table --------------------------------------------------------------------------------------------------------


def table(capsys: pytest.CaptureFixture, *rows: Difference) -> tuple[bool, str]:
    failed = print_table(list(rows), VerifyRoot(), Mesh(1, 2, 4), "dispatch rank")
    return failed, capsys.readouterr().out


def test_a_table_without_a_mismatch(capsys: pytest.CaptureFixture):
    failed, out = table(capsys, Difference("loss", "of any step", 0.0), Difference("gradient", "a", 9e-6))
    assert not failed
    said = " ".join(out.split())
    assert "pp=1 ep=4 dp=2 (8 processes), engine torch, dispatch rank: computes the same as one process" in said


@pytest.mark.parametrize("error", [1.1e-5, inf, nan])
def test_a_mismatch_is_marked(capsys: pytest.CaptureFixture, error: float):
    failed, out = table(capsys, Difference("loss", "of any step", 0.0), Difference("gradient", "a", error))
    assert failed
    assert "DIFFERS in 1 of 2 figures" in out
    (row,) = [line for line in out.splitlines() if "TOO FAR" in line]
    assert "gradient" in row


def test_long_names_are_whole_in_a_narrow_terminal(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "mtp.0.layer.moe.shared.gate_up.weight"
    _, out = table(capsys, Difference("gradient norm", "of any step", 1.0), Difference("gradient", name, 1.0))
    assert name in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_many_rows_are_summed_up(capsys: pytest.CaptureFixture):
    rows = [Difference("gradient", f"layers.{n}", 1e-6 / (1 + n)) for n in range(20)]
    _, out = table(capsys, *rows)
    assert "layers.7" in out
    assert "layers.8" not in out
    assert "12 others" in out


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("mesh.ep=2",),
        ("mesh.dp=2", "model.mtp.depth=0", "train.recompute=[norm,mla_up,swiglu]"),
        ("mesh.ep=2", "mesh.dp=2", "train.recompute=[layer]", "schedule.order=measured", "verify.steps=3"),
        ("mesh.pp=2", "train.recompute=[layer]", "train.micro_batch=1", "schedule.pipeline=zb_1p"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_layouts_compute_the_same(overrides: tuple[str, ...], capsys: pytest.CaptureFixture):
    verify.run(load.compose("verify", ["verify.steps=2", *overrides]))
    assert "computes the same as one process" in " ".join(capsys.readouterr().out.split())


def test_nodes_can_be_played_and_a_wire_format_may_round(capsys: pytest.CaptureFixture):
    overrides = ["mesh.ep=4", "dispatch=hierarchical", "verify.ranks_per_node=2", "dispatch.wire=fp8"]
    verify.run(load.compose("verify", [*overrides, "verify.steps=1"]))
    said = " ".join(capsys.readouterr().out.split())
    assert "dispatch hierarchical, wire fp8, 2 of 2 micro-batches in flight" in said
    assert "agrees, as closely as fp8 can, with one process (1 steps in FP32, tolerance 0.15)" in said
    errors = [float(number) for number in re.findall(r"gradient │ ([\d.e-]+) ", said)]
    assert max(errors) > 1e-2


# A dispatcher, a wire format, and micro-batches in flight.
Case = tuple[str, str, int]
CASES: list[Case] = list(product(("alltoall", "rank", "hierarchical"), ("float32", "bfloat16", "fp8", "fp4"), (1, 2)))


def steps_of(wire: str) -> int:
    """Exact rows also show that the second step has the weights of the first; the others would only round once more."""
    return 2 if wire == "float32" else 1


def of_case(config: VerifyRoot, case: Case, folder: Path) -> tuple[VerifyRoot, Path]:
    """What runs, and where its ranks write."""
    kind, wire, in_flight = case
    made = replace(
        config,
        dispatch=replace(config.dispatch, kind=kind, wire=wire),
        schedule=replace(config.schedule, in_flight=in_flight),
        verify=replace(config.verify, steps=steps_of(wire)),
    )
    return made, folder / f"{kind} {wire} {in_flight}"


def run_every_case(rank: int, world: int, config: VerifyRoot, mesh: Mesh, folder: Path) -> None:
    """The layouts one after the other, in one set of processes and groups: to start them takes longer than to run."""
    groups = verify._join(rank, mesh, 0, config.verify.ranks_per_node)
    verify._join, verify.disconnect = lambda *_: groups, lambda: None
    for case in CASES:
        made, into = of_case(config, case, folder)
        into.mkdir(exist_ok=True)
        verify._layout(rank, made, mesh, 0, into)


def bits(layout: dict[str, Any]) -> list[Any]:
    """Equal if all figures are, to the last bit."""
    tensors = [(kind, sorted(layout[kind].items())) for kind in ("grads", "parameters")]
    named = [(kind, name, tensor.numpy().tobytes()) for kind, items in tensors for name, tensor in items]
    return [layout["losses"], layout["norms"], *named]


@pytest.mark.slow
def test_every_dispatcher_and_wire_format_with_and_without_overlap(tmp_path: Path):
    config = verify.prepare(load.compose("verify", ["mesh.ep=4", "verify.ranks_per_node=2"]))
    # One process has no dispatcher and no wire: what it computes is the reference for all of them.
    alone = replace(config, mesh=MeshConfig(), dispatch=DispatchConfig())
    references = {
        steps: run_processes(
            verify._reference, replace(alone, verify=VerifyConfig(steps=steps)), Mesh(), tmp_path / f"{steps} steps"
        )
        for steps in (1, 2)
    }
    spawn(run_every_case, 4, config, Mesh(1, 1, 4), tmp_path, timeout_s=150)
    layouts = {}
    for case in CASES:
        kind, wire, in_flight = case
        made, folder = of_case(config, case, tmp_path)
        layout = assemble([torch.load(folder / f"rank-{rank:05d}.pt", weights_only=True) for rank in range(4)])
        how, limit = f"dispatch {kind}, wire {wire}, {in_flight} of 2 micro-batches in flight", verify.tolerance(made)
        assert layout["how"].startswith(how)
        found = compare(references[steps_of(wire)], layout, by_norm=verify.rounds(made))
        errors = {(row.what, row.name): row.error for row in found}
        assert not {what: error for what, error in errors.items() if not error <= limit}, how
        # What travels in another format than the one that was asked for would be closer, or farther off.
        assert wire == "float32" or max(errors.values()) > limit / 10, how
        layouts[case] = layout
    for kind, wire, in_flight in CASES:
        assert bits(layouts[kind, wire, in_flight]) == bits(layouts[kind, wire, 1]), f"{kind} {wire}"


@pytest.mark.slow
def test_deepspeed_computes_the_same(capsys: pytest.CaptureFixture):
    pytest.importorskip("deepspeed")
    verify.run(load.compose("verify", ["mesh.ep=2", "engine=deepspeed", "verify.steps=2"]))
    assert "computes the same as one process" in " ".join(capsys.readouterr().out.split())


def test_a_mismatch_exits_with_1(capsys: pytest.CaptureFixture):
    """Rounding alone, under a tolerance that allows for none."""
    with pytest.raises(SystemExit) as left:
        verify.run(load.compose("verify", ["mesh.ep=2", "verify.steps=1", "verify.tolerance=1e-12"]))
    assert left.value.code == 1
    assert "DIFFERS in" in capsys.readouterr().out


def test_a_broken_layout_is_found(tmp_path: Path):
    """An engine that forgets to add up the gradients of the ranks."""
    config = verify.prepare(load.compose("verify", ["mesh.dp=2", "verify.steps=1"]))
    alone = replace(config, mesh=replace(config.mesh, dp=1))
    reference = run_processes(verify._reference, alone, Mesh(), tmp_path / "one")
    layout = run_processes(without_the_sum, config, Mesh(1, 2, 1), tmp_path / "layout")
    errors = {(row.what, row.name): row.error for row in compare(reference, layout)}
    assert errors["loss", "of any step"] < 1e-6
    assert min(error for (what, _), error in errors.items() if what == "gradient") > 1e-3


def without_the_sum(rank: int, config: VerifyRoot, mesh: Mesh, port: int, folder: Path) -> None:
    from dstrain.engine.plain import PlainEngine

    verify.make_engine = lambda model, made, groups: PlainEngine(model, made.optim)
    verify._layout(rank, config, mesh, port, folder)


def test_text_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "corpus.txt").write_text("Is this the same? " * 50)
    text = [f"data.path={tmp_path / 'corpus.txt'}", f"data.cache_dir={tmp_path / 'tokens'}"]
    verify.run(load.compose("verify", ["mesh.ep=2", "verify.steps=1", *text]))
    assert "computes the same as one process" in " ".join(capsys.readouterr().out.split())


def test_text_must_be_there(tmp_path: Path):
    with pytest.raises(UserError) as mistake:
        verify.run(load.compose("verify", ["mesh.ep=2", f"data.path={tmp_path / 'nowhere.txt'}"]))
    assert str(mistake.value).startswith(f"data.path={tmp_path / 'nowhere.txt'} does not exist.")
    assert "\n" not in str(mistake.value)


def fail_on_second(rank: int, config: VerifyRoot, mesh: Mesh, port: int, folder: Path) -> None:
    verify._join(rank, mesh, port, None)
    if rank == 1:
        raise ValueError("no more tokens")
    dist.barrier()


def die_on_second(rank: int, config: VerifyRoot, mesh: Mesh, port: int, folder: Path) -> None:
    verify._join(rank, mesh, port, None)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang(rank: int, config: VerifyRoot, mesh: Mesh, port: int, folder: Path) -> None:
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    time.sleep(600)


def test_a_rank_that_fails_says_why(tmp_path: Path):
    with pytest.raises(UserError, match="^rank 1 of 2 failed: ValueError: no more tokens\n") as mistake:
        run_processes(fail_on_second, LIMITED, Mesh(1, 1, 2), tmp_path / "run")
    assert 'raise ValueError("no more tokens")' in str(mistake.value)


def test_a_rank_that_dies_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="(?s)rank 1.*SIGKILL"):
        run_processes(die_on_second, LIMITED, Mesh(1, 1, 2), tmp_path / "run")


def test_a_hang_is_ended(tmp_path: Path):
    config = VerifyRoot(verify=VerifyConfig(timeout_s=3))
    with pytest.raises(UserError, match="verify.timeout_s=3: 2 processes have not finished by then"):
        run_processes(hang, config, Mesh(1, 1, 2), tmp_path / "run")
    for path in (tmp_path / "run").glob("pid-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
