"""The keys of `dstrain plan`, the rules that span them, and the layout that a machine has room for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstrain.config.check import check, check_mesh
from dstrain.config.machine import check_hardware, check_predictable
from dstrain.config.rules import at_least, listed, need, need_text
from dstrain.config.schema import Config
from dstrain.errors import ConfigError

# Of `dstrain plan trace out=`.
SUFFIXES = {".json": "a timeline for Perfetto", ".png": "a picture", ".html": "the report"}

# What `dstrain plan search` may vary beside the layout.
VARIABLE = ("precision", "node_limit")


@dataclass(frozen=True)
class PlanRoot(Config):
    """`dstrain plan`: what a training run will need, how long it takes and what it costs, on one page."""


@dataclass(frozen=True)
class SearchRoot(Config):
    """`dstrain plan search`: the best layouts for a model and a machine."""

    # How many are shown.
    top: int = 20
    # What besides the layout may differ from the config: precision (of products), node_limit (nodes of a token).
    vary: tuple[str, ...] = ()


@dataclass(frozen=True)
class TraceRoot(Config):
    """`dstrain plan trace`: a planned step as a timeline, a picture or a report."""

    # <name>.json (a timeline for Perfetto), <name>.png (a picture) or <name>.html (the report of a plan).
    out: str = ""


@dataclass(frozen=True)
class ValidateRoot:
    """`dstrain plan validate [runs.json]`: predictions against what was measured."""

    # A JSON file of measured runs, in the form of dstrain/plan/data/published_runs.json; "": those.
    runs: str = ""
    # A new JSON file with id, predicted, measured and error_pct of each; "": none is written.
    out: str = ""


def devices(config: Config) -> int:
    """Of the machine; without hardware.nodes, as many as the mesh has ranks."""
    mesh, hardware = config.mesh, config.hardware
    unit = mesh.pp * mesh.ep
    if hardware.nodes:
        return hardware.nodes * hardware.devices_per_node
    return unit * (mesh.dp or max(1, hardware.devices_per_node // unit))


def fitted(config: Config) -> Config:
    """The config with a mesh of as many ranks as the machine has devices: mesh.dp takes what is left, and where
    experts are spread over more devices than there are, mesh.ep shrinks. Raises ConfigError if mesh.pp does not fit."""
    mesh, count = config.mesh, devices(config)
    if count % mesh.pp:
        sizes = [pp for pp in range(1, min(count, config.model.num_layers) + 1) if count % pp == 0]
        cure = f"Set mesh.pp to one of {listed(sizes)}, or let `dstrain plan search` find a layout."
        raise ConfigError("mesh.pp", mesh.pp, f"it must divide the {count} devices of hardware.nodes", cure)
    rest, experts = count // mesh.pp, config.model.num_experts
    ep = next(ep for ep in range(mesh.ep, 0, -1) if rest % ep == 0 and (experts % ep == 0 or ep == mesh.ep))
    return replace(config, mesh=replace(mesh, ep=ep, dp=rest // ep))


def changes(config: Config, fit: Config) -> str:
    """The keys that `fitted` has given other numbers, as they are typed; "" where only mesh.dp=null was filled in."""
    before, after = config.mesh, fit.mesh
    keys = [name for name in ("ep", "dp") if getattr(before, name) not in (None, getattr(after, name))]
    return " ".join(f"mesh.{name}={getattr(after, name)}" for name in keys)


def check_plan(config: Config) -> None:
    """What `dstrain train` checks, for as many processes as the machine has devices."""
    check_hardware(config.hardware)
    check_mesh(config, None)
    fit = fitted(config)
    check(fit, devices(fit))
    check_predictable(config.hardware, devices(fit))


def check_search(config: SearchRoot) -> None:
    """The layout of the config need not fit: it is what is looked for."""
    at_least(config, 1, "top")
    for name in config.vary:
        cure = f"Choose any of {', '.join(VARIABLE)}."
        need(name in VARIABLE, ("vary", name), "a search can't vary this", cure)
    check(unspread(config), 1)
    check_predictable(config.hardware, devices(config))


def unspread(config: Config) -> Config:
    """The config without a layout: everything on one device."""
    schedule = replace(config.schedule, split=(), in_flight=None)
    dispatch = replace(config.dispatch, kind="auto")
    return replace(
        config,
        mesh=replace(config.mesh, pp=1, ep=1, dp=1),
        train=replace(config.train, micro_batch=1),
        schedule=schedule,
        dispatch=dispatch,
    )


def check_trace(config: TraceRoot) -> None:
    check_plan(config)
    need_text(config, "out", "the file to write")
    kinds = ", ".join(f"<name>{suffix} ({what})" for suffix, what in SUFFIXES.items())
    need(Path(config.out).suffix in SUFFIXES, ("out", config.out), "its ending says what is written", f"Give {kinds}.")


def check_validate(config: ValidateRoot) -> None:
    cure = "Give it the ending .json, or choose another file."
    need(not config.out or config.out.endswith(".json"), ("out", config.out), "errors are written as JSON", cure)


# By command.
ROOTS: dict[str, type] = {
    "plan": PlanRoot,
    "plan_search": SearchRoot,
    "plan_trace": TraceRoot,
    "plan_validate": ValidateRoot,
}
CHECKS: dict[str, Callable[[Any], None]] = {
    "plan": check_plan,
    "plan_search": check_search,
    "plan_trace": check_trace,
    "plan_validate": check_validate,
}
