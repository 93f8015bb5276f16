"""What the rules of a config are made of: each raises a ConfigError with field, value, rule and cure."""

from math import inf
from operator import attrgetter
from typing import Any

from dstrain.config.schema import ModelConfig
from dstrain.errors import ConfigError


def need(condition: bool, field: tuple[str, Any], rule: str, cure: str) -> None:
    if not condition:
        raise ConfigError(*field, rule, cure)


def at_least(node: Any, least: int, *names: str) -> None:
    for name in names:
        value = attrgetter(name)(node)
        _need_finite(node, name, value)
        need(value >= least, (_full(node, name), value), f"it must be at least {least}", "Raise it.")


def above_zero(node: Any, *names: str) -> None:
    for name in names:
        value = attrgetter(name)(node)
        _need_finite(node, name, value)
        need(value > 0, (_full(node, name), value), "it must be above 0", "Raise it.")


def _need_finite(node: Any, name: str, value: float) -> None:
    need(value != inf, (_full(node, name), value), "it must be finite", "Lower it.")


def one_of(node: Any, name: str, *options: str) -> None:
    value = attrgetter(name)(node)
    cure = f"Choose one of {', '.join(options)}."
    need(value in options, (_full(node, name), value), "there is no such choice", cure)


def need_text(node: Any, name: str, meaning: str) -> None:
    need(bool(attrgetter(name)(node)), (name, '""'), f"it names {meaning}", f"Give {name}=<path>.")


def _full(node: Any, name: str) -> str:
    return f"model.{name}" if isinstance(node, ModelConfig) else name


def near(value: int, unit: int) -> str:
    """The multiples of `unit` around a value, in words."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below > 0 else str(unit)


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
