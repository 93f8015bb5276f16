"""The rules of schedule.*: which order, which pipeline and which split fit a mesh, a model and a batch."""

from collections.abc import Iterator
from itertools import count

from dstrain.config.rules import at_least, need, one_of
from dstrain.config.schema import Config, PartCosts
from dstrain.errors import ConfigError
from dstrain.schedule.pipelines import choose


def check_schedule(config: Config) -> None:
    """`config` has a number as mesh.dp, and a batch of whole micro-batches for every rank."""
    one_of(config, "schedule.order", "fixed", "measured")
    _check_in_flight(config)
    check_table(config)
    check_part_costs(config)
    if config.mesh.pp > 1:
        check_batches(config)
        check_stages(config)
        _check_engine(config)


def check_table(config: Config) -> None:
    """What a pipeline asks for, the batch and the model apart."""
    one_of(config, "schedule.pipeline", *choose.NAMES)
    at_least(config, 2, "schedule.chunks")
    schedule, ranks = config.schedule, config.mesh.pp
    broken = choose.rule_broken(schedule.pipeline, ranks, 1, schedule.chunks)
    if ranks > 1 and broken and broken.argument == "ranks":
        raise ConfigError("mesh.pp", ranks, broken.rule, f"{broken.cure}.")


def check_part_costs(config: Config) -> None:
    costs, model = config.schedule.part_ms, config.model
    at_least(config, 0, *(f"schedule.part_ms.{name}" for name in ("embedding", "dense", "moe", "mtp", "head")))
    for name, layers in (("dense", model.num_dense_layers), ("moe", model.num_layers - model.num_dense_layers)):
        cure = "Give it, or leave all of schedule.part_ms out; `dstrain schedule split measure=true` measures it."
        field = (f"schedule.part_ms.{name}", 0.0)
        need(costs == PartCosts() or layers == 0 or getattr(costs, name) > 0, field, "the model has such layers", cure)


def check_batches(config: Config) -> None:
    """Every batch of the run, those of the ramp included, gives the ranks as many micro-batches as the table takes."""
    train, mesh = config.train, config.mesh
    name, unit = ("train.sequences", 1) if train.batch_tokens is None else ("train.batch_tokens", train.seq_len)
    value = train.sequences if train.batch_tokens is None else train.batch_tokens
    full, share = (value or 0) // unit, (mesh.dp or 1) * mesh.ep * train.micro_batch
    check_micro_batches(config, full // share, (name, value or 0), unit * share)
    if train.ramp.tokens == 0:
        return
    start, increment = train.ramp.start_sequences, train.ramp.increment_sequences
    check_micro_batches(config, start // share, ("train.ramp.start_sequences", start), share)
    for sequences in range(start, full, increment):
        broken = _broken(config, sequences // share)
        rule = f"the batch of {sequences} sequences has {sequences // share} micro-batches, but "
        cure = "Choose increments that only lead through allowed batches."
        need(broken is None, ("train.ramp.increment_sequences", increment), rule + (broken or ""), cure)


def check_micro_batches(config: Config, micro_batches: int, field: tuple[str, int], unit: int = 1) -> None:
    """`field` gives a rank so many micro-batches; a value larger by `unit` gives it one more."""
    broken = _broken(config, micro_batches)
    if broken:
        allowed = next(near for near in _around(micro_batches) if _broken(config, near) is None)
        rule = f"it gives every rank {micro_batches}, but {broken}" if unit > 1 else broken
        cure = f"Set it to {allowed * unit}, or choose another schedule.pipeline or mesh.pp."
        raise ConfigError(*field, rule, cure)


def check_stages(config: Config) -> None:
    """Every stage has a layer, and a listed split has all of them."""
    schedule, layers, ranks = config.schedule, config.model.num_layers, config.mesh.pp
    stages = choose.layout(schedule.pipeline, ranks, schedule.chunks).num_stages
    need(
        stages <= layers,
        ("mesh.pp", ranks),
        f"pipeline={schedule.pipeline} makes {stages} stages, and model.num_layers={layers}",
        f"Set mesh.pp to at most {layers * ranks // stages} or model.num_layers to at least {stages}, or take a "
        "pipeline with fewer stages.",
    )
    if not schedule.split:
        return
    field = ("schedule.split", list(schedule.split))
    cure = f"Give {stages} numbers of at least 1 with the sum {layers}, or none: then the split is planned."
    rule = f"pipeline={schedule.pipeline} on mesh.pp={ranks} has {stages} stages"
    need(len(schedule.split) == stages, field, rule, cure)
    need(min(schedule.split) >= 1, field, "every stage has at least one layer", cure)
    need(sum(schedule.split) == layers, field, f"the sum is {sum(schedule.split)}, not model.num_layers={layers}", cure)


def _check_in_flight(config: Config) -> None:
    in_flight = config.schedule.in_flight
    if in_flight is None:
        return
    at_least(config, 1, "schedule.in_flight")
    field, cure = ("schedule.in_flight", in_flight), "Set schedule.in_flight=1"
    rule = "engine.zero_stage=2 reduces one micro-batch after the other"
    need(in_flight == 1 or config.engine.zero_stage != 2, field, rule, f"{cure}, or engine.zero_stage=1.")
    rule = f"mesh.pp={config.mesh.pp}, where the pipeline's table says how many are"
    need(in_flight == 1 or config.mesh.pp == 1, field, rule, f"{cure} or null.")


def _check_engine(config: Config) -> None:
    rule = f"gradients of mesh.pp={config.mesh.pp} stages are complete at the end of a step, not after a micro-batch"
    need(config.engine.zero_stage == 1, ("engine.zero_stage", 2), rule, "Set engine.zero_stage=1.")
    rule = f"it plans blocks of one stage; with mesh.pp={config.mesh.pp} the pipeline is the order"
    need(config.schedule.order == "fixed", ("schedule.order", "measured"), rule, "Set schedule.order=fixed.")


def _broken(config: Config, micro_batches: int) -> str | None:
    """The rule that a number of micro-batches breaks."""
    schedule = config.schedule
    broken = choose.rule_broken(schedule.pipeline, config.mesh.pp, micro_batches, schedule.chunks)
    return broken.rule if broken else None


def _around(number: int) -> Iterator[int]:
    """The numbers above 0, the nearest first."""
    yield from (near for step in count() for near in (number - step, number + step) if near > 0)
