"""`dstrain train`: from a config to a trained model, on one process or many.

    connect -> run directory -> data -> model and engine -> resume -> steps, records, checkpoints

Whatever can go wrong through no fault of the program raises the same UserError on every rank.
"""

import shlex
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import torch
from torch import Tensor

from dstrain.checkpoint.save import Checkpointer
from dstrain.comm.agreement import on_first, together
from dstrain.comm.failure import blaming, unless_broken
from dstrain.config import load
from dstrain.config.schema import Config
from dstrain.data.loader import Loader
from dstrain.data.tokenizer import embedding_rows
from dstrain.dispatch.choose import Choice, choose
from dstrain.engine.choose import make_engine
from dstrain.engine.loop import StepReport, Trainer, rest_of_run
from dstrain.engine.state import Progress
from dstrain.errors import SharedError, UserError
from dstrain.mesh.groups import Groups, Place, connect, disconnect, mesh_of
from dstrain.metrics.console import Console
from dstrain.metrics.observer import Observer
from dstrain.metrics.planned import Comparison, promise
from dstrain.metrics.record import step_record
from dstrain.metrics.run_directory import RunDirectory
from dstrain.metrics.sinks import JsonlSink, Sink
from dstrain.metrics.wandb import WandbSink
from dstrain.parallel.apply import build_model
from dstrain.plan.count import parameters
from dstrain.precision.backends.choose import choose as choose_backend

AnyConfig = TypeVar("AnyConfig", bound=Config)

# What a process that saved and stopped on request leaves with (EX_TEMPFAIL): "start me again".
STOPPED = 75


def run(config: Config) -> None:
    """Trains to train.steps. Raises UserError for what a user can mend, SystemExit(75) after a requested stop."""
    place = Place.from_environment()
    groups = connect(mesh_of(config), place, config.mesh.timeout_s)
    with ExitStack() as stack:
        stack.push(unless_broken(disconnect))
        with blaming(place.rank, place.world, groups.trace):
            run_dir = on_first(lambda: config.run.dir or load.default_run_dir(datetime.now()), groups.background)
            directory = RunDirectory(run_dir)
            on_first(lambda: claim(directory, config), groups.background)
            stack.callback(directory.unlock)
            _train(config, groups, directory, stack)


def claim(directory: RunDirectory, config: Config) -> None:
    """Creates and locks the run directory; refuses to mix a new run with an earlier one."""
    directory.create()
    directory.lock()
    if config.train.resume == "never" and directory.holds_run():
        raise UserError(
            f"run.dir={directory.path} holds an earlier run, and train.resume is never. "
            "Go on with train.resume=auto, or choose another run.dir."
        )


def _train(config: Config, groups: Groups, directory: RunDirectory, stack: ExitStack) -> None:
    is_first, group = groups.place.rank == 0, groups.background
    loader = together(lambda: open_loader(config), group)
    config = with_vocabulary(config, loader)
    config = replace(config, run=replace(config.run, dir=str(directory.path)))
    choice = choose(config, groups)
    trainer = make_trainer(choice.settle(config), groups)
    trainer.corpus_tokens = loader.num_tokens
    checkpoints = Checkpointer(
        directory.checkpoints,
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps,
        group=group,
    )
    stack.push(unless_broken(checkpoints.finish))
    restore(trainer, checkpoints, config)
    console = Console(config.train.steps, trainer.progress.step, config.metrics.console_every_steps)
    on_first(lambda: describe(config, directory, groups.place.world), group)
    sinks = together(lambda: open_sinks(config, directory, trainer.progress.step, console) if is_first else (), group)
    for sink in sinks:
        stack.callback(sink.close)
    if is_first:
        for line in (headline(config, groups, trainer, loader, choice), promise(trainer.config)):
            if line:
                console.say(line)
    batches = stack.enter_context(PrefetchedBatches(loader, config, groups, trainer.progress))
    trainer.batches = batches
    comparison = Comparison()
    sinks = (*sinks, comparison) if is_first else sinks
    run_steps(trainer, checkpoints, sinks, Observer(config, groups, directory, console.say))
    if is_first:
        console.close()
        for line in (comparison.line(), ending(trainer, directory)):
            if line:
                console.say(line)
    if trainer.progress.step < config.train.steps:
        raise SystemExit(STOPPED)


def ending(trainer: Trainer, directory: RunDirectory) -> str:
    """Where the run is, and how it goes on if it was stopped before its last step."""
    step, steps, mesh = trainer.progress.step, trainer.config.train.steps, trainer.config.mesh
    if step < steps:
        program = "dstrain" if mesh.pp * mesh.ep == 1 else "torchrun ... -m dstrain"
        again = f"{program} train {shlex.quote(f'run.dir={directory.path}')} train.resume=auto"
        return f"stopped and saved after step {step} of {steps}; go on with: {again}"
    return f"{step} steps done; everything is in {directory.path}"


def open_loader(config: Config) -> Loader:
    train, model = config.train, config.model
    lookahead = 1 + model.mtp.depth
    return Loader(config.data, seq_len=train.seq_len, lookahead=lookahead, seed=train.seed, vocab_size=model.vocab_size)


def with_vocabulary(config: AnyConfig, loader: Loader) -> AnyConfig:
    """model.vocab_size=None becomes the tokenizer's, rounded up to a multiple of 64."""
    if config.model.vocab_size is not None:
        return config
    return replace(config, model=replace(config.model, vocab_size=embedding_rows(loader.tokenizer)))


def _no_batches(first: int, count: int) -> Tensor:
    raise RuntimeError("the trainer was given no batches")


def make_trainer(config: Config, groups: Groups) -> Trainer:
    """A trainer at step 0 with initial weights; `batches` is still to be set."""
    model = build_model(config, groups)
    engine = make_engine(model, config, groups)
    return Trainer(config, groups, model, engine, _no_batches, Progress())


def restore(trainer: Trainer, checkpoints: Checkpointer, config: Config) -> None:
    """Continues from the newest checkpoint where train.resume asks for it, or takes weights from train.init_from."""
    steps = on_first(checkpoints.steps, checkpoints.group)
    if config.train.resume != "never" and steps:
        # What `dstrain import` wrote has no moments yet.
        optional = ("exp_avg/", "exp_avg_sq/") if steps[-1] == 0 else ()
        extra = checkpoints.load(steps[-1], trainer.state(), optional)
        _check_corpus(extra, trainer, steps[-1])
        trainer.progress = Progress(**extra["progress"])
        trainer.placer.restore(extra.get("placement"))
    elif config.train.resume == "must":
        raise SharedError(
            f"train.resume=must: {checkpoints.directory.path} holds no complete checkpoint. "
            "Check run.dir, or start with train.resume=auto."
        )
    elif config.train.init_from is not None:
        _initialise(trainer, Path(config.train.init_from) / "checkpoints", checkpoints)
    trainer.engine.loaded(trainer.progress.step)


def _check_corpus(extra: dict[str, Any], trainer: Trainer, step: int) -> None:
    """A corpus that has grown or shrunk would give its samples in another order, some of them twice."""
    before = extra.get("corpus_tokens", trainer.corpus_tokens)
    if before != trainer.corpus_tokens:
        raise SharedError(
            f"data.path: the corpus holds {trainer.corpus_tokens:,} tokens, but {before:,} when step {step} was saved. "
            "Bring the old text back, or start a new run on the new one with train.init_from=<this run>."
        )


def _initialise(trainer: Trainer, path: Path, checkpoints: Checkpointer) -> None:
    source = Checkpointer(path, keep_last=1, keep_every_steps=0, group=checkpoints.group)
    steps = on_first(source.steps, source.group)
    if not steps:
        rule = f"train.init_from={path.parent}: there is no complete checkpoint in {path}."
        raise SharedError(f"{rule} Name a run directory that has one.")
    weights = {name: shard for name, shard in trainer.state().items() if not name.startswith("exp_avg")}
    source.load(steps[-1], weights)


@dataclass
class PrefetchedBatches:
    """`Trainer.batches` with the loader working ahead along the run's own order."""

    loader: Loader
    config: Config
    groups: Groups
    progress: Progress

    def __enter__(self) -> "PrefetchedBatches":
        self._expected = rest_of_run(self.config, self.groups, self.progress)
        plan = rest_of_run(self.config, self.groups, self.progress)
        self._ready: Iterator[Tensor] = self.loader.prefetch(plan)
        return self

    def __call__(self, first: int, count: int) -> Tensor:
        expected = next(self._expected)
        if expected != (first, count):
            raise RuntimeError(f"asked for samples {(first, count)}, but the order of the run has {expected} next")
        return next(self._ready)

    def __exit__(self, *error: Any) -> None:
        self._ready.close()  # type: ignore[attr-defined]


def describe(config: Config, directory: RunDirectory, world_size: int) -> None:
    """Writes what is run, and on what, beside the results."""
    with directory.writing():
        load.save(config, directory.config_yaml)
    directory.write_environment(world_size)


def open_sinks(config: Config, directory: RunDirectory, step: int, console: Console) -> tuple[Sink, ...]:
    if step == 0 and (aside := directory.set_metrics_aside()):
        console.say(f"no checkpoint to go on from: starting at step 0; the figures so far are kept in {aside}")
    sinks: list[Sink] = [console, JsonlSink(directory.metrics_jsonl, resume_step=step)]
    if config.metrics.wandb != "disabled":
        sinks.append(WandbSink(directory, config.metrics.wandb, config.metrics.wandb_project, asdict(config)))
    return tuple(sinks)


def run_steps(trainer: Trainer, checkpoints: Checkpointer, sinks: tuple[Sink, ...], observer: Observer) -> None:
    """Steps until the last one or a requested stop; either way the state is saved before this returns."""
    every, saved_steps = trainer.config.checkpoint.every_steps, on_first(checkpoints.steps, checkpoints.group)
    stopped, problem = False, None
    with StopRequest() as stop_request:
        while trainer.progress.step < trainer.config.train.steps and not stopped:
            observer.before_step(trainer.progress.step + 1)
            report = trainer.step(stop=stop_request.received or problem is not None)
            problem = problem or log(report, trainer, sinks)
            problem = observer.after_step(report) or problem
            stopped = report.stop
            if every and trainer.progress.step % every == 0:
                saved_steps.append(save(trainer, checkpoints))
        if trainer.progress.step not in saved_steps:
            save(trainer, checkpoints)
        checkpoints.finish()
    together(lambda: _raise(problem), checkpoints.group)


def _raise(problem: UserError | None) -> None:
    if problem is not None:
        raise problem


def log(report: StepReport, trainer: Trainer, sinks: tuple[Sink, ...]) -> UserError | None:
    """Gives a step to the sinks. What fails, fails on the first rank alone: the others learn of it when they stop."""
    try:
        record = step_record(report, trainer.config, trainer.groups.place.world) if sinks else {}
        for sink in sinks:
            sink.log(record)
    except UserError as error:
        return error
    return None


def save(trainer: Trainer, checkpoints: Checkpointer) -> int:
    step = trainer.progress.step
    extra = {
        "progress": asdict(trainer.progress),
        "corpus_tokens": trainer.corpus_tokens,
        "placement": trainer.placer.state(),
    }
    checkpoints.save(step, trainer.state(), extra)
    return step


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR2 (Slurm's warning) ask for a checkpoint and an end; one more, later, ends at once.

    Signals that follow closely are the same request: Ctrl-C reaches every process of a terminal, and torchrun, which
    gets it too, passes it on to the processes it has started.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    SAME_REQUEST_S = 3.0

    def __init__(self) -> None:
        self._first: float | None = None

    @property
    def received(self) -> bool:
        return self._first is not None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def _receive(self, number: int, frame: Any) -> None:
        now = monotonic()
        self._first = now if self._first is None else self._first
        if now - self._first > self.SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *error: Any) -> None:
        self._restore()


def headline(config: Config, groups: Groups, trainer: Trainer, loader: Loader, choice: Choice) -> str:
    """What is about to run, in two lines, how tokens travel, if they do, and who computes in FP8."""
    mesh, total = groups.mesh, parameters(config.model).total
    start = f"resuming after step {trainer.progress.step}" if trainer.progress.step else "starting"
    device = torch.cuda.get_device_name() if groups.place.device.type == "cuda" else "CPU"
    travel = f"\ndispatch {choice.reason}; rows out in {choice.wire}" if groups.ep else ""
    travel += f"\n{choice.limit}" if choice.limit else ""
    if config.precision.products != "compute":
        travel += f"\nproducts in {config.precision.products}, {choose_backend(config, groups.place.device).reason}"
    if mesh.pp > 1:
        layers = ", ".join(str(len(stage.layers)) for stage in trainer.model.stages)
        travel += f"\npipeline {config.schedule.pipeline}: stages of {layers} layers"
    return (
        f"{start}: {total / 1e6:,.1f}M parameters on {mesh.world} x {device} "
        f"(pp {mesh.pp}, dp {mesh.dp}, ep {mesh.ep}), engine {config.engine.name}, {config.precision.compute_dtype}\n"
        f"{loader.num_tokens / 1e6:,.1f}M tokens of text; run directory {config.run.dir}{travel}"
    )
