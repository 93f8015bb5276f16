"""Rules that types can't express, checked before any process group exists.

Every rule is a pure function of the config and the number of processes. Each breach raises a ConfigError that names the
field, its value, the rule and the cure; the first one found is the one reported.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from operator import attrgetter
from typing import Any

from dstrain.config.bench import CalibrateRoot, CommRoot, check_comm, check_fabric, check_measuring
from dstrain.config.commands import (
    DryrunRoot,
    ExportRoot,
    GenerateRoot,
    ImportRoot,
    ShowRoot,
    SplitRoot,
    TokenizeRoot,
    VerifyRoot,
)
from dstrain.config.keys import keys
from dstrain.config.machine import check_hardware
from dstrain.config.model import check_model
from dstrain.config.pipeline import (
    check_batches,
    check_micro_batches,
    check_part_costs,
    check_schedule,
    check_stages,
    check_table,
)
from dstrain.config.precision import DTYPES, check_precision
from dstrain.config.rules import above_zero, at_least, listed, near, need, need_text, one_of
from dstrain.config.schema import Config
from dstrain.errors import ConfigError

RECOMPUTE = ("norm", "mla_up", "swiglu", "attend", "experts", "layer")

# Keys (or their beginnings) that make a run what it is: with another value, a resumed run would be a different one.
IDENTITY = (
    "model.",
    "train.seed",
    "train.seq_len",
    "data.path",
    "data.blend",
    "data.tokenizer",
    "data.text_key",
    "data.fim_rate",
)


def check(config: Config, world_size: int | None = None) -> None:
    """All rules for a model on a mesh. `world_size` None: as many processes as the mesh asks for (dp defaults to 1)."""
    check_mesh(config, world_size)
    check_dispatch(config)
    check_model(config.model)
    check_batch(config, world_size)
    check_recipe(config)
    check_machine(config)
    check_data(config)
    check_schedule(resolve(config, world_size))


def check_training(config: Config, world_size: int) -> None:
    """`check`, and what a training run needs besides."""
    check(config, world_size)
    if config.data.path is None and not config.data.blend:
        cure = "Give data.path=<text, a directory, .jsonl, .parquet or token files> or data.blend."
        raise ConfigError("data.path", None, "training needs text", cure)
    if config.train.resume != "never" and not config.run.dir:
        raise ConfigError("train.resume", config.train.resume, "it needs the run to go on with", "Give run.dir.")


def check_bench_comm(config: CommRoot, world_size: int) -> None:
    check_comm(config, world_size)
    check(config, world_size)


def check_calibrate(config: CalibrateRoot, world_size: int) -> None:
    check_measuring(config, "calibrate.out", "calibrate.rounds")
    check(config, world_size)


def resolve(config: Config, world_size: int | None = None) -> Config:
    """The config with mesh.dp filled in. `config` has passed `check` with the same world size."""
    mesh = config.mesh
    dp = mesh.dp or (world_size or mesh.pp * mesh.ep) // (mesh.pp * mesh.ep)
    return replace(config, mesh=replace(mesh, dp=dp))


def check_mesh(config: Config, world_size: int | None) -> None:
    mesh, experts = config.mesh, config.model.num_experts
    at_least(config, 1, "mesh.pp", "mesh.ep")
    if mesh.dp is not None:
        at_least(config, 1, "mesh.dp")
    if experts % mesh.ep:
        sizes = [size for size in range(1, experts + 1) if experts % size == 0]
        cure = f"Set mesh.ep to one of {listed(sizes)}."
        raise ConfigError("mesh.ep", mesh.ep, f"it must divide model.num_experts={experts}", cure)
    above_zero(config, "mesh.timeout_s")
    if world_size is not None:
        _check_world(config, world_size)


def check_dispatch(config: Config) -> None:
    """How tokens travel."""
    dispatch = config.dispatch
    one_of(config, "dispatch.kind", "auto", "local", "alltoall", "rank", "hierarchical", "deepep")
    if dispatch.kind == "local" and config.mesh.ep > 1:
        cure = f"Set dispatch.kind=alltoall (or auto), or mesh.ep=1 instead of {config.mesh.ep}."
        raise ConfigError("dispatch.kind", "local", "it can't reach experts on other ranks", cure)
    wires = ("auto", "float32", "bfloat16", "fp8", "mxfp8", "fp4", "logfmt8", "logfmt10")
    one_of(config, "dispatch.wire", *wires)
    if dispatch.expert_chunk_rows is not None:
        at_least(config, 0, "dispatch.expert_chunk_rows")
    at_least(config, 0, "dispatch.placement.every_steps", "dispatch.placement.min_gain")


def check_batch(config: Config, world_size: int | None) -> None:
    train = config.train
    # No steps at all: the initial or imported weights, saved.
    at_least(config, 0, "train.steps")
    at_least(config, 1, "train.seq_len", "train.micro_batch")
    if (train.sequences is None) == (train.batch_tokens is None):
        rule = "exactly one of train.sequences and train.batch_tokens says how large the global batch is"
        cure = "Give one of them and set the other to null."
        raise ConfigError("train.sequences", train.sequences, f"{rule} (batch_tokens={train.batch_tokens})", cure)
    name = "train.sequences" if train.batch_tokens is None else "train.batch_tokens"
    at_least(config, 1, name)
    unit = 1 if train.batch_tokens is None else train.seq_len
    value = attrgetter(name)(config)
    if value % unit:
        cure = f"Set it to {near(value, unit)}."
        raise ConfigError(name, value, f"it must be a multiple of train.seq_len={train.seq_len}", cure)
    mesh = resolve(config, world_size).mesh
    share = (mesh.dp or 1) * mesh.ep * train.micro_batch
    rule = f"every one of dp*ep={(mesh.dp or 1) * mesh.ep} ranks takes whole micro-batches of {train.micro_batch}"
    if value // unit % share:
        cure = f"Set it to {near(value, unit * share)}, or change train.micro_batch."
        raise ConfigError(name, value, f"{rule}, so it must be a multiple of {unit * share}", cure)
    _check_ramp(config, value // unit, share, rule)


def check_recipe(config: Config) -> None:
    """Optimiser, learning rate, changes on the way, recomputation, resuming."""
    one_of(config, "train.resume", "never", "auto", "must")
    for name in config.train.recompute:
        if name not in RECOMPUTE:
            raise ConfigError(
                "train.recompute", name, "there is no such part of a layer", f"Use any of {', '.join(RECOMPUTE)}."
            )
    tokens = [change.at_tokens for change in config.train.changes]
    if tokens != sorted(set(tokens)) or any(token < 0 for token in tokens):
        rule = "at_tokens must grow from change to change"
        raise ConfigError("train.changes", tokens, rule, "Put them in order, one change a point.")
    above_zero(config, "optim.lr", "optim.eps")
    at_least(config, 0, "optim.warmup_steps", "optim.weight_decay", "optim.clip_norm")
    for name in ("optim.beta1", "optim.beta2"):
        value = attrgetter(name)(config)
        need(0 <= value < 1, (name, value), "it must be at least 0 and below 1", "0.9 and 0.95 are usual.")
    for index, phase in enumerate(config.optim.phases):
        _check_phase(config, index, phase.shape, phase.tokens, phase.lr_end)
    for step in config.metrics.trace_steps:
        steps = config.train.steps
        cure = "Name steps that the run makes, counted from 1."
        need(1 <= step <= steps, ("metrics.trace_steps", step), f"the run has the steps 1 to {steps}", cure)


def check_machine(config: Config) -> None:
    """Precision, engine, checkpoints, metrics, hardware."""
    one_of(config, "engine.name", "torch", "deepspeed")
    check_precision(config)
    engine, stages = config.engine, {"torch": (1,), "deepspeed": (1, 2)}[config.engine.name]
    need(
        engine.zero_stage in stages,
        ("engine.zero_stage", engine.zero_stage),
        f"engine.name={engine.name} offers {' and '.join(map(str, stages))}",
        "Choose one of these, or the other engine.",
    )
    need(
        engine.name == "deepspeed" or not engine.offload_optimizer,
        ("engine.offload_optimizer", "true"),
        "only the deepspeed engine can offload",
        "Add engine=deepspeed.",
    )
    one_of(config, "metrics.wandb", "disabled", "offline", "online")
    at_least(config, 1, "engine.bucket_mib", "checkpoint.keep_last", "metrics.console_every_steps")
    at_least(config, 1, "metrics.moe_every_steps")
    at_least(config, 0, "checkpoint.every_steps", "checkpoint.keep_every_steps")
    check_hardware(config.hardware)


def check_data(config: Config | TokenizeRoot) -> None:
    data = config.data
    need(
        data.path is None or not data.blend,
        ("data.path", data.path),
        "a corpus is given by data.path or data.blend, not both",
        "Put the path into data.blend, or empty it with data.blend=[].",
    )
    for index, corpus in enumerate(data.blend):
        name = f"data.blend[{index}]"
        need(bool(corpus.path), (f"{name}.path", '""'), "every part of a blend has a path", "Give it.")
        need(corpus.weight > 0, (f"{name}.weight", corpus.weight), "it must be above 0", "Leave the part out instead.")
    need(
        0 <= data.fim_rate <= 1,
        ("data.fim_rate", data.fim_rate),
        "it is a share of the documents",
        "Set it between 0 and 1.",
    )
    at_least(config, 0, "data.prefetch_batches")


def check_same_run(saved: Config, config: Config) -> None:
    """Refuses to resume under a config that would make it another run; a vocabulary yet to be derived is no change."""
    differing = []
    # An imported model has seen no data yet.
    trained = saved.data.path is not None or saved.data.blend
    for name in keys(Config):
        before, now = attrgetter(name)(saved), attrgetter(name)(config)
        derived = name == "model.vocab_size" and None in (before, now)
        if name.startswith(IDENTITY if trained else "model.") and before != now and not derived:
            differing.append(f"{name}={before}, not {now}")
    if differing:
        cure = "Drop what changes it, or start a new run in another run.dir (train.init_from takes the weights along)."
        rest = f" and {len(differing) - 5} other differences" if len(differing) > 5 else ""
        rule = f"the run there has {'; '.join(differing[:5])}{rest}"
        raise ConfigError("run.dir", config.run.dir, rule, cure)


def check_verify(config: VerifyRoot) -> None:
    check(config)
    at_least(config, 1, "verify.steps", "verify.timeout_s")
    if config.verify.tolerance is not None:
        above_zero(config, "verify.tolerance")
    if config.verify.ranks_per_node is not None:
        at_least(config, 1, "verify.ranks_per_node")


def check_dryrun(config: DryrunRoot) -> None:
    check_mesh(config, None)
    unit, ranks = config.mesh.pp * config.mesh.ep * (config.mesh.dp or 1), config.ranks
    if ranks is not None:
        name = "mesh.pp*mesh.ep" if config.mesh.dp is None else "mesh.pp*mesh.ep*mesh.dp"
        fits = ranks > 0 and (ranks % unit == 0 if config.mesh.dp is None else ranks == unit)
        rule = f"it must be {'a multiple of ' if config.mesh.dp is None else ''}{name}={unit}"
        need(fits, ("ranks", ranks), rule, f"Set ranks={unit}, or change the mesh.")
    check(config, ranks)
    name, kind = config.engine.name, config.dispatch.kind
    need(name == "torch", ("engine.name", name), "only the shares of engine=torch are known", "Set engine=torch.")
    field = ("dispatch.kind", kind)
    need(kind != "deepep", field, "the bytes that its kernels send are not known", "Set dispatch=auto.")


def check_generate(config: GenerateRoot) -> None:
    need_text(config, "run.dir", "the run whose model speaks")
    at_least(config, 1, "max_tokens")
    at_least(config, 0, "seed", "temperature")
    need(config.seed < 2**63, ("seed", config.seed), "it must be below 2^63", "Lower it.")
    need(0 < config.top_p <= 1, ("top_p", config.top_p), "it is a probability above 0", "Set it up to 1 (all tokens).")


def check_export(config: ExportRoot) -> None:
    need_text(config, "run.dir", "the run to export")
    need_text(config, "out", "the directory to write")
    products, rule = config.precision.products, "Hugging Face files hold FP8 weights in blocks of 128x128"
    need(products != "mxfp8", ("precision.products", products), rule, "Set precision=fp8, bf16 or fp32.")
    one_of(config, "precision.products", "compute", "fp8")
    one_of(config, "precision.compute_dtype", *DTYPES)
    above_zero(config, "shard_gib")


def check_import(config: ImportRoot) -> None:
    need_text(config, "path", "the Hugging Face model directory to read")
    need_text(config, "run.dir", "the new run")


def check_tokenize(config: TokenizeRoot) -> None:
    need(config.data.path is not None, ("data.path", None), "it names the text to tokenise", "Give data.path=<text>.")
    need_text(config, "out", "the prefix of the token files")
    check_data(config)
    if config.workers is not None:
        at_least(config, 1, "workers")


def check_show(config: ShowRoot) -> None:
    check_mesh(config, None)
    need(config.mesh.pp > 1, ("mesh.pp", config.mesh.pp), "a pipeline has several ranks", "Set mesh.pp=4, say.")
    check_table(config)
    if config.micro_batches is None:
        check_batch(config, None)
        check_batches(resolve(config))
    else:
        at_least(config, 1, "micro_batches")
        check_micro_batches(config, config.micro_batches, ("micro_batches", config.micro_batches))
    rule = "it has three times: of a forward pass, of input gradients and of weight gradients"
    need(len(config.times) == 3, ("times", list(config.times)), rule, "times='[1,1,1]' is usual.")
    legal = all(0 < time < inf for time in config.times)
    need(legal, ("times", list(config.times)), "a time is above 0, and finite", "times='[1,1,1]' is usual.")
    above_zero(config, "pair")


def check_split(config: SplitRoot) -> None:
    check_mesh(config, None)
    check_model(config.model)
    need(config.mesh.pp > 1, ("mesh.pp", config.mesh.pp), "one rank holds all layers", "Set mesh.pp=4, say.")
    check_table(config)
    check_part_costs(config)
    check_stages(config)
    at_least(config, 1, "train.seq_len", "train.micro_batch", "rounds")
    one_of(config, "precision.compute_dtype", *DTYPES)


# By command; `train` takes the world size as well.
# Of commands that run on a mesh of processes and need no text.
MEASURING: dict[str, Callable[[Any, int], None]] = {"bench_comm": check_bench_comm, "calibrate": check_calibrate}

CHECKS: dict[str, Callable[[Any], None]] = {
    "verify": check_verify,
    "dryrun": check_dryrun,
    "generate": check_generate,
    "export": check_export,
    "import": check_import,
    "tokenize": check_tokenize,
    "bench_fabric": check_fabric,
    "schedule_show": check_show,
    "schedule_split": check_split,
}


def _check_world(config: Config, world_size: int) -> None:
    mesh = config.mesh
    unit = mesh.pp * mesh.ep * (mesh.dp or 1)
    if mesh.dp is not None and unit != world_size:
        value = f"{{pp: {mesh.pp}, ep: {mesh.ep}, dp: {mesh.dp}}}"
        cure = f"Start {unit} processes (torchrun --nproc-per-node), or set mesh.dp=null to derive it."
        raise ConfigError("mesh", value, f"pp*ep*dp={unit} is not the number of processes, {world_size}", cure)
    if world_size % unit:
        value = f"{{pp: {mesh.pp}, ep: {mesh.ep}}}"
        sizes = f"{unit}, {2 * unit}, {3 * unit}, ..."
        cure = f"Start {sizes} processes (torchrun --nproc-per-node), or change mesh.pp or mesh.ep."
        raise ConfigError("mesh", value, f"pp*ep={unit} does not divide the number of processes, {world_size}", cure)


def _check_ramp(config: Config, sequences: int, share: int, rule: str) -> None:
    ramp = config.train.ramp
    at_least(config, 0, "train.ramp.tokens")
    if ramp.tokens == 0:
        return
    for name in ("start_sequences", "increment_sequences"):
        value = getattr(ramp, name)
        fits = value > 0 and value % share == 0
        field = (f"train.ramp.{name}", value)
        need(fits, field, f"{rule}, so it must be a multiple of {share}", f"Set it to {near(value, share)}.")
    need(
        ramp.start_sequences <= sequences and (sequences - ramp.start_sequences) % ramp.increment_sequences == 0,
        ("train.ramp.increment_sequences", ramp.increment_sequences),
        f"whole increments must lead from {ramp.start_sequences} to {sequences} sequences",
        "Choose an increment that divides the difference.",
    )


def _check_phase(config: Config, index: int, shape: str, tokens: int, lr_end: float) -> None:
    name, last = f"optim.phases[{index}]", index == len(config.optim.phases) - 1
    shapes = ("constant", "linear", "cosine")
    need(shape in shapes, (f"{name}.shape", shape), "there is no such shape", f"Choose one of {', '.join(shapes)}.")
    need(lr_end >= 0, (f"{name}.lr_end", lr_end), "a learning rate can't be negative", "Set it to 0 or more.")
    need(
        tokens > 0 or (tokens == 0 and last),
        (f"{name}.tokens", tokens),
        "only the last phase may be 0 long (the rest of the run)",
        "Give its length in tokens.",
    )
