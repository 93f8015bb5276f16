"""The package as its own rules see it: modules, what each imports, and the layer table of ARCHITECTURE.md."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees by dotted name, `__init__` files under the names of their packages."""
    trees = {}
    for path in sorted((ROOT / "dstrain").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


@cache
def imports(module: str) -> frozenset[str]:
    """Dotted names that a module imports anywhere in it, inside functions too: modules where they are ours."""
    found = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {_target(node.module, alias.name) for alias in node.names}
    return frozenset(found)


def _target(package: str, name: str) -> str:
    """`from package import name` means the module package.name, or something that lives in `package`."""
    whole = f"{package}.{name}"
    return whole if whole in modules() or not package.startswith("dstrain") else package


@cache
def layers() -> dict[str, tuple[int, int]]:
    """Name as in the table -> (layer, place in its row)."""
    rows = re.findall(r"^\| (\d)(?:, no torch)? \| (.+) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    return {name.strip(): (int(layer), place) for layer, names in rows for place, name in enumerate(names.split(","))}


def unit(module: str) -> str | None:
    """The table's name for a module: the longest that is a prefix of it, or None."""
    path = module.removeprefix("dstrain.")
    matches = [name for name in layers() if path == name or path.startswith(name + ".")]
    return max(matches, key=len, default=None)
