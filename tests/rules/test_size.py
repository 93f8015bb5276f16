"""Files and functions stay small enough to be read in one go."""

import ast
import statistics

import pytest

from tests.rules.tree import ROOT, modules

FILE_LINES = 400
FUNCTION_LINES = 50
MEDIAN_FUNCTION_LINES = 12

SOURCES = [path for folder in ("dstrain", "tests", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]


def function_lines() -> dict[str, int]:
    """Lines of every function of the package, its docstring left out."""
    return {
        f"{module}.{node.name}": _lines(node)
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


def _lines(node: ast.FunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (node.end_lineno or node.lineno) - body[0].lineno + 1 if body else 0


def test_files():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {path: lines for path, lines in lengths.items() if lines > FILE_LINES}


def test_functions():
    lines = function_lines()
    assert not {name: count for name, count in lines.items() if count > FUNCTION_LINES}
    assert statistics.median(lines.values()) <= MEDIAN_FUNCTION_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "dstrain").rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_init_files_are_empty(path):
    """Importing a package must not import what is in it."""
    statements = ast.parse(path.read_text()).body
    assert not [node for node in statements if not isinstance(node, ast.Expr)]
