"""Machines as data: conf/hardware/*.yaml read without Hydra, and how far a prediction may be off because of them."""

import re
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from dstrain.config.directory import conf_dir
from dstrain.config.hardware import HardwareConfig
from dstrain.config.keys import is_node, nearest
from dstrain.config.machine import CONSTANTS, check_hardware, is_share
from dstrain.config.rules import need
from dstrain.errors import ConfigError, UserError

# How far nine of ten constants are off, as a share of their value, by what is known about them. Judged, not fitted to
# whole steps: peaks and links hold to the clock of a board. What a board reached with one version of a library is
# several percent off with the next. A step's constants hold for that step's program, and a guess is one. (The B200s of
# SimuMax differ from others by far more, and so have a file of their own.)
SPREAD = {"specification": 0.02, "calibration": 0.04, "benchmark": 0.07, "trace": 0.1, "assumed": 0.2}

# Of a GPU's name, what tells none from another: "A100-SXM4-80GB", "H100 80GB HBM3".
_NOISE = re.compile(r"sxm\d?|hbm\d?e?|gb$|(?<=\d)gb(?=[a-z]|$)|^rtx")

WORDS = {float: "a number", int: "a whole number", str: "text"}

# What published runs call a GPU, without blanks and dashes -> hardware file.
GPUS = {
    "a100": "a100_80g",
    "a10080": "a100_80g",
    "a10040": "a100_sxm_40g",
    "a100pcie": "a100_pcie_80g",
    "a100pcie80": "a100_pcie_80g",
    "a100pcie40": "a100_pcie_40g",
    "a800": "a800_sxm",
    "h100": "h100_sxm",
    "h100500w": "h100_500w",
    "h800": "h800_sxm",
    "h200": "h200_sxm",
    "h10080": "h100_sxm",
    "4090": "rtx_4090",
}


def names(directory: Path | None = None) -> list[str]:
    """The hardware files of a directory; None: those of this package."""
    return sorted(path.stem for path in _folder(directory).glob("*.yaml"))


@cache
def named(name: str, directory: Path | None = None) -> HardwareConfig:
    """The machine of <directory>/<name>.yaml; None: one of this package's.

    Raises UserError for a name without a file, ConfigError for what a machine can't have.
    """
    path = _folder(directory) / f"{name}.yaml"
    if not path.is_file():
        known = names(directory)
        meant = get_close_matches(name, known, n=1)
        hint = f" Did you mean {meant[0]}?" if meant else ""
        raise ConfigError("hardware", name, f"there is no {path}", f"Choose one of {', '.join(known)}.{hint}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this is not valid YAML: {' '.join(str(error).split())}.") from error
    try:
        hardware = _typed(HardwareConfig, values, "hardware")
        check_hardware(hardware)
    except ConfigError as error:
        raise ConfigError(error.field, error.value, f"{error.rule} (in {path})", error.cure) from None
    return hardware


def of_gpu(gpu: str) -> HardwareConfig:
    """The machine for what published runs call a GPU ("H100", "NVIDIA A100-SXM4-80GB", "B200-box"), or for the name of
    a hardware file. Raises UserError for one that there is no file for."""
    word = _plain(gpu)
    files = {_plain(name): name for name in names()}
    name = GPUS.get(_NOISE.sub("", word)) or files.get(word)
    if name is None:
        raise UserError(f"gpu={gpu}: there is no machine for this GPU. Use one of {', '.join(names())}.")
    return named(name)


def interval(hardware: HardwareConfig, predict: Callable[[HardwareConfig], float]) -> tuple[float, float]:
    """Where nine of ten such machines lie with what `predict` says of this one, in the unit of `predict`.

    Every constant moves by the spread of its evidence, up and down, one at a time; as they err independently, the
    changes are added in squares. Counts are exact, and what is 0 is not known.
    """
    middle, below, above = predict(hardware), 0.0, 0.0
    for name, spread in spreads(hardware).items():
        value = getattr(hardware, name)
        high = min(1.0, value * (1 + spread)) if is_share(name) else value * (1 + spread)
        moved = [predict(replace(hardware, **{name: other})) - middle for other in (value * (1 - spread), high)]
        below += min(0.0, *moved) ** 2
        above += max(0.0, *moved) ** 2
    return middle - sqrt(below), middle + sqrt(above)


def spreads(hardware: HardwareConfig) -> dict[str, float]:
    """Of the constants that are known and no counts; those that no evidence names are assumed."""
    kinds = {name: evidence.kind for evidence in hardware.evidence for name in evidence.of}
    floats = (name for name in CONSTANTS if isinstance(getattr(hardware, name), float) and getattr(hardware, name))
    return {name: SPREAD[kinds.get(name, "assumed")] for name in floats}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|nvidia|geforce", "", name.lower())


def _folder(directory: Path | None) -> Path:
    return directory or conf_dir() / "hardware"


def _typed(kind: Any, value: Any, where: str) -> Any:
    """`value`, as YAML gives it, as what the schema says; mappings become dataclasses, lists tuples."""
    if is_node(kind):
        _need(isinstance(value, dict), where, value, "a mapping of keys to values")
        hints = get_type_hints(kind)
        for name in value:
            if name not in hints:
                meant = nearest(str(name), list(hints))
                hint = f"Did you mean {where}.{meant}?" if meant else f"There are {', '.join(hints)}."
                raise ConfigError(f"{where}.{name}", value[name], "there is no such key", hint)
        return kind(**{name: _typed(hints[name], value[name], f"{where}.{name}") for name in value})
    if get_origin(kind) is tuple:
        _need(isinstance(value, list), where, value, "a list")
        return tuple(_typed(get_args(kind)[0], element, f"{where}[{n}]") for n, element in enumerate(value))
    legal = (int, float) if kind is float else (kind,)
    _need(isinstance(value, legal) and not isinstance(value, bool), where, value, WORDS[kind])
    return kind(value)


def _need(condition: bool, where: str, value: Any, what: str) -> None:
    need(condition, (where, value), f"it must be {what}", "Compare it with another file of this directory.")
