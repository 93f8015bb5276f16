"""The keys of a schema as data: dotted name, type and the comment written above the field in schema.py.

Help texts, the search for the nearest name and the refusal of unknown keys all read this one table.
"""

import inspect
import re
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

_FIELD = re.compile(r"    (\w+): (.+?) = (.+)")


@dataclass(frozen=True)
class Key:
    """A leaf of the tree."""

    name: str
    # As annotated in the schema: "int | None".
    type: str
    default: Any
    comment: str

    @property
    def is_text(self) -> bool:
        return self.type in ("str", "str | None")

    @property
    def rule(self) -> str:
        """What a value must be, in words."""
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}
        if self.type.startswith("tuple"):
            element = words.get(self.type[len("tuple[") :].split(",")[0], "{key: value, ...}")
            return f"must be a list: [{element}, ...]"
        return "must be " + " or ".join(words[part] for part in self.type.split(" | "))


@cache
def keys(schema: type, prefix: str = "") -> dict[str, Key]:
    """All leaves below a dataclass, by dotted name, in the order of the file."""
    comments, hints = _comments(schema), get_type_hints(schema)
    found: dict[str, Key] = {}
    for entry in fields(schema):
        name, hint = prefix + entry.name, hints[entry.name]
        if is_node(hint):
            found |= keys(hint, f"{name}.")
        else:
            found[name] = Key(name, _spell(hint), entry.default, comments.get(entry.name, ""))
    return found


@cache
def sections(schema: type, prefix: str = "") -> dict[str, str]:
    """The first line of the docstring of every inner node, by dotted name."""
    found = {}
    for name, hint in get_type_hints(schema).items():
        if is_node(hint):
            found[prefix + name] = (inspect.getdoc(hint) or "").split("\n")[0]
            found |= sections(hint, f"{prefix}{name}.")
    return found


def is_node(hint: Any) -> bool:
    """Whether a type is an inner node of the tree."""
    return is_dataclass(hint)


def nearest(name: str, names: list[str]) -> str | None:
    """The likeliest meant name: one with the same last part if there is just one, otherwise the most similar."""
    same = [other for other in names if other.rsplit(".")[-1] == name.rsplit(".")[-1]]
    if len(same) == 1:
        return same[0]
    close = get_close_matches(name, names, n=1, cutoff=0.75)
    return close[0] if close else None


def _spell(hint: Any) -> str:
    parts = get_args(hint)
    if isinstance(hint, type) and not parts:
        return "None" if hint is type(None) else hint.__name__
    spelled = ["..." if part is Ellipsis else _spell(part) for part in parts]
    return f"tuple[{', '.join(spelled)}]" if get_origin(hint) is tuple else " | ".join(spelled)


def _comments(schema: type) -> dict[str, str]:
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in inspect.getsource(schema).splitlines():
        entry = _FIELD.match(line)
        if line.startswith("    # "):
            lines.append(line[6:])
            continue
        if entry and lines:
            found[entry[1]] = " ".join(lines)
        lines = []
    return found
