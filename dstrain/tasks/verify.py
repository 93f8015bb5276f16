"""`dstrain verify`: does a layout compute what one process computes?

The same global batches go through one process, plainly (one graph per micro-batch, whole gradients, torch's own AdamW),
and through the asked layout, engine, dispatcher and order of phases, as real gloo processes on this machine, everything
in FP32. Compared are the loss and the gradient norm of every step, every gradient of the first step, and every
parameter after the last one:

    relative error of a tensor = max |layout - one process| / max |one process|

Gradients are compared before the first update because there both sides hold the same weights bit by bit.

A wire format that rounds can't be exact: single elements may be far off, and a token may even choose another expert.
Then the error of a tensor is that of its norm, |layout - one process| / |one process|, the tolerance is what the format
can do, and router biases, which move by the sign of the load, are left out.

With precision.products=fp8 or mxfp8 the layout runs in that precision and is compared with one process in BF16 and with
one in FP32 (verify_precision.py).
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch import multiprocessing as mp

from dstrain.config.commands import VerifyRoot
from dstrain.config.schema import Config, DispatchConfig, MeshConfig, PrecisionConfig, ScheduleConfig
from dstrain.dispatch.choose import choose
from dstrain.engine.choose import make_engine
from dstrain.engine.loop import Batches, StartWalk, Trainer
from dstrain.engine.plain import PlainEngine
from dstrain.engine.state import FlatShard, Progress
from dstrain.errors import UserError
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect, disconnect, free_port, mesh_of
from dstrain.model.layer import walk_whole
from dstrain.parallel.apply import build_model
from dstrain.precision.backends.choose import choose as choose_backend
from dstrain.schedule.choose import Program
from dstrain.tasks import verify_precision
from dstrain.tasks.pretrain import open_loader, with_vocabulary

# Vocabulary of the random tokens that stand in for text when none is given.
RANDOM_TOKENS = 256
# Rows of the table for gradients and for parameters.
WORST = 8
# Largest relative errors by wire format; those of formats that round are errors of the norm.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.02, "fp8": 0.15, "mxfp8": 0.15, "fp4": 0.5}
TOLERANCES |= {"logfmt8": 0.06, "logfmt10": 0.02}
FP32 = PrecisionConfig("float32", "float32", "float32")
# Where the rank that fails first says why.
PROBLEM = "problem.txt"


@dataclass(frozen=True)
class Difference:
    """How far a tensor, or a list of scalars, is from the reference."""

    what: str
    name: str
    error: float


def run(config: VerifyRoot) -> None:
    """Prints the table; SystemExit(1) on a mismatch, UserError if a run failed or hung."""
    config = prepare(config)
    mesh = mesh_of(config)
    with tempfile.TemporaryDirectory(prefix="dstrain-verify-") as folder:
        plain = replace(config, mesh=MeshConfig(pp=1, ep=1, dp=1), dispatch=DispatchConfig(), schedule=ScheduleConfig())
        reference = run_processes(_reference, replace(plain, precision=FP32), Mesh(), Path(folder, "one"))
        layout = run_processes(_layout, config, mesh, Path(folder, "layout"))
        if config.precision.products != "compute":
            bf16 = run_processes(_layout, replace(plain, precision=PrecisionConfig()), Mesh(), Path(folder, "bf16"))
            failed = print_precision({"FP32": reference, "BF16": bf16, "asked": layout}, config, mesh)
        else:
            failed = print_table(compare(reference, layout, by_norm=rounds(config)), config, mesh, layout["how"])
    if failed:
        raise SystemExit(1)


def print_precision(runs: Mapping[str, dict[str, Any]], config: VerifyRoot, mesh: Mesh) -> bool:
    """How far what was asked for is from BF16 and FP32 in one process; whether that is too far."""
    name, console = config.precision.products.upper(), Console(highlight=False)
    from_bf16 = verify_precision.distance(runs["asked"], runs["BF16"])
    distances = {
        f"{name} from BF16": from_bf16,
        f"{name} from FP32": verify_precision.distance(runs["asked"], runs["FP32"]),
        "BF16 from FP32": verify_precision.distance(runs["BF16"], runs["FP32"]),
    }
    console.print(verify_precision.table(distances))
    breaches = from_bf16.breaches(config.verify.tolerance)
    console.print(f"{_layout_name(config, mesh)}, {runs['asked']['how']}:")
    verdict = f"TOO FAR from BF16: {', '.join(breaches)}" if breaches else "agrees with BF16"
    console.print(f"{verdict} ({config.verify.steps} steps; {verify_precision.limits(config.verify.tolerance)}).")
    return bool(breaches)


def _layout_name(config: VerifyRoot, mesh: Mesh) -> str:
    return f"pp={mesh.pp} ep={mesh.ep} dp={mesh.dp} ({mesh.world} processes), engine {config.engine.name}"


def rounds(config: VerifyRoot) -> bool:
    """Whether rows lose digits on their way."""
    return config.dispatch.wire not in ("auto", "float32")


def tolerance(config: VerifyRoot) -> float:
    wire = config.dispatch.wire if rounds(config) else "float32"
    return TOLERANCES[wire] if config.verify.tolerance is None else config.verify.tolerance


def prepare(config: VerifyRoot) -> VerifyRoot:
    """FP32 throughout, unless the products are to be checked, and a vocabulary, the tokenizer's or one for random
    tokens; the rest is as asked."""
    if config.precision.products == "compute":
        config = replace(config, precision=FP32)
    if has_text(config):
        return with_vocabulary(config, open_loader(config))
    if config.model.vocab_size is None:
        config = replace(config, model=replace(config.model, vocab_size=RANDOM_TOKENS))
    return config


# -- runs -------------------------------------------------------------------------------------------------------------


def run_processes(worker: Callable[..., None], config: VerifyRoot, mesh: Mesh, folder: Path) -> dict[str, Any]:
    """Runs `worker` on every rank of `mesh` and puts together what the ranks wrote.

    UserError if a rank fails, dies, or has not finished in time; no process outlives the call.
    """
    folder.mkdir()
    # Forked from a server that has imported torch once: eight ranks start as fast as one.
    multiprocessing.set_forkserver_preload([__name__])
    arguments = (worker, config, mesh, free_port(), folder)
    context = mp.start_processes(_rank, arguments, nprocs=mesh.world, join=False, start_method="forkserver")
    deadline = time.monotonic() + config.verify.timeout_s
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise UserError(
                    f"verify.timeout_s={config.verify.timeout_s}: {mesh.world} processes have not finished by then. "
                    "Give a smaller model or fewer steps, or raise it if the machine is slow."
                )
    except mp.ProcessRaisedException as error:
        problem = folder / PROBLEM
        raise UserError(problem.read_text() if problem.exists() else str(error)) from error
    except mp.ProcessExitedException as error:
        raise UserError(f"rank {error.error_index} died: {error}. Has the machine run out of memory?") from error
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return assemble([torch.load(path, weights_only=True) for path in sorted(folder.glob("rank-*.pt"))])


def _rank(rank: int, worker: Callable[..., None], config: VerifyRoot, mesh: Mesh, port: int, folder: Path) -> None:
    """Runs `worker`; of several ranks that fail, the first is the cause and gets to say what happened."""
    try:
        worker(rank, config, mesh, port, folder)
    except Exception as error:
        mistake = isinstance(error, UserError)
        where = "" if mistake else f"\n{traceback.format_exc()}"
        said = str(error) if mistake else f"rank {rank} of {mesh.world} failed: {type(error).__name__}: {error}{where}"
        with suppress(FileExistsError), (folder / PROBLEM).open("x") as file:
            file.write(said)
        raise


class PlainTrainer(Trainer):
    """Runs no table: every micro-batch is one graph of the whole model."""

    def forward_and_backward(self, program: Program, starts: Mapping[tuple[int, int], StartWalk]) -> None:
        for course in program.courses:
            torch.stack(walk_whole(starts[course](None)).roots).sum().backward()


def _reference(rank: int, config: VerifyRoot, mesh: Mesh, port: int, folder: Path) -> None:
    groups = _join(rank, mesh, port, None)
    model = build_model(config, groups)
    _steps(PlainTrainer(config, groups, model, PlainEngine(model, config.optim), batches(config), Progress()), folder)


def _layout(rank: int, config: VerifyRoot, mesh: Mesh, port: int, folder: Path) -> None:
    groups = _join(rank, mesh, port, config.verify.ranks_per_node)
    choice = choose(config, groups)
    config = replace(config, dispatch=choice.settle(config).dispatch)
    model = build_model(config, groups)
    trainer = Trainer(config, groups, model, make_engine(model, config, groups), batches(config), Progress())
    how = f"dispatch {choice.kind}, wire {choice.wire}"
    if config.precision.products != "compute":
        how += f", products by {choose_backend(config, groups.place.device).reason}"
    _steps(trainer, folder, how)
    disconnect()


def _join(rank: int, mesh: Mesh, port: int, ranks_per_node: int | None) -> Groups:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // mesh.world))
    return connect(mesh, Place.on_this_machine(rank, mesh.world, port), ranks_per_node=ranks_per_node)


def has_text(config: Config) -> bool:
    return config.data.path is not None or bool(config.data.blend)


def batches(config: Config) -> Batches:
    """The loader's samples, or random tokens that depend on the sample's position only."""
    if has_text(config):
        return open_loader(config).batch

    def random(first: int, count: int) -> Tensor:
        length = config.train.seq_len + 1 + config.model.mtp.depth
        high = min(config.model.vocab_size or RANDOM_TOKENS, RANDOM_TOKENS)
        seeds = [(config.train.seed << 32) + sample for sample in range(first, first + count)]
        return torch.stack([torch.randint(high, (length,), generator=torch.Generator().manual_seed(s)) for s in seeds])

    return random


def _steps(trainer: Trainer, folder: Path, how: str = "") -> None:
    """Runs the steps and writes this rank's losses, first gradients and last parameters, and how they came about."""
    grads: dict[str, tuple[Any, ...]] = {}
    engine, losses, norms = trainer.engine, [], []
    reduce = engine.reduce

    def reduce_and_keep() -> float:
        norm = reduce()
        if not grads:
            grads.update({name: _packed(shard) for name, shard in engine.gradients()})
        return norm

    engine.reduce = reduce_and_keep  # type: ignore[method-assign]
    for _ in range(trainer.config.verify.steps):  # type: ignore[attr-defined]
        report = trainer.step()
        losses.append(report.loss)
        norms.append(report.grad_norm)
    how = ", ".join(filter(None, (how, trainer.orders.reason)))
    state = {name: _packed(shard) for name, shard in trainer.state().items()}
    state = {name.partition("/")[2]: shard for name, shard in state.items() if not name.startswith("exp_avg")}
    result = {"losses": losses, "norms": norms, "grads": grads, "parameters": state, "how": how}
    torch.save(result, folder / f"rank-{trainer.groups.place.rank:05d}.pt")


def _packed(shard: FlatShard) -> tuple[Any, ...]:
    return shard.shape, shard.offset, shard.local.detach().float().clone(), shard.jumps


# -- comparison -------------------------------------------------------------------------------------------------------


def assemble(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Whole tensors from the ranges of all ranks, with the scalars of the first."""
    whole = {kind: _joined([rank[kind] for rank in ranks]) for kind in ("grads", "parameters")}
    return {key: ranks[0][key] for key in ("losses", "norms", "how")} | whole


def _joined(ranks: list[dict[str, tuple[Any, ...]]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for rank in ranks:
        for name, packed in rank.items():
            shard = FlatShard(*packed)
            flat = tensors.setdefault(name, torch.full((prod(shard.shape),), torch.nan))
            for offset, part in shard.ranges():
                flat[offset : offset + part.numel()] = part
    return tensors


def compare(reference: dict[str, Any], layout: dict[str, Any], *, by_norm: bool = False) -> list[Difference]:
    """Every difference, worst first within its kind. What one side lacks, if only in part, is infinitely off."""
    error_of = _error_of_norm if by_norm else _error
    found = [
        Difference("loss", "of any step", _error(_scalars(layout["losses"]), _scalars(reference["losses"]))),
        Difference("gradient norm", "of any step", _error(_scalars(layout["norms"]), _scalars(reference["norms"]))),
    ]
    for what, kind in (("gradient", "grads"), ("parameter", "parameters")):
        ours, theirs = layout[kind], reference[kind]
        rows = [
            Difference(what, name, error_of(ours[name], theirs[name]) if name in ours and name in theirs else inf)
            for name in sorted({*ours, *theirs})
            if not (by_norm and name.endswith(".router.bias"))
        ]
        found += sorted(rows, key=lambda row: -row.error)
    return found


def _scalars(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _error(ours: Tensor, reference: Tensor) -> float:
    return _relative(ours, reference, lambda tensor: tensor.abs().max())


def _error_of_norm(ours: Tensor, reference: Tensor) -> float:
    return _relative(ours, reference, lambda tensor: tensor.norm())


def _relative(ours: Tensor, reference: Tensor, size: Callable[[Tensor], Tensor]) -> float:
    if ours.shape != reference.shape:
        return inf
    gap, scale = size(ours.double() - reference.double()).item(), size(reference.double()).item()
    if gap == 0:
        return 0.0
    return gap / scale if gap == gap and scale > 0 else inf


def print_table(differences: list[Difference], config: VerifyRoot, mesh: Mesh, how: str) -> bool:
    """The worst rows of each kind, and a verdict; whether anything was off. `how`: what ran."""
    limit, console = tolerance(config), Console(highlight=False)
    measure = "relative error of the norm" if rounds(config) else "relative error"
    table = Table("", measure, Column("tensor", overflow="fold"))
    for what in ("loss", "gradient norm", "gradient", "parameter"):
        rows = [row for row in differences if row.what == what]
        for row in rows[:WORST]:
            mark = "" if row.error <= limit else " TOO FAR"
            table.add_row(what, f"{row.error:.1e}{mark}", row.name, style="red" if mark else None)
        if len(rows) > WORST:
            table.add_row(what, f"<= {rows[WORST].error:.1e}", f"{len(rows) - WORST} others", end_section=True)
    failed = [row for row in differences if not row.error <= limit]
    console.print(table)
    layout = f"{_layout_name(config, mesh)}, {how}"
    agrees = f"agrees, as closely as {config.dispatch.wire} can, with" if rounds(config) else "computes the same as"
    verdict = f"DIFFERS in {len(failed)} of {len(differences)} figures from" if failed else agrees
    console.print(f"{layout}:")
    console.print(f"{verdict} one process ({config.verify.steps} steps in FP32, tolerance {limit:g}).")
    if "1 of 1 micro-batches" in how and config.schedule.in_flight != 1 and mesh.ep > 1:
        console.print("A rank has one micro-batch, so no transfer was hidden: raise train.sequences to try that, too.")
    return bool(failed)
