"""New files that a command writes: never over one that is there, and refused before the work."""

import json
from pathlib import Path
from typing import Any

from dstrain.errors import ConfigError, UserError


def claim(out: str) -> None:
    """Finds out before the work whether the file can be written. Raises ConfigError."""
    path = Path(out)
    if path.exists():
        raise ConfigError("out", out, "it is there already", "Choose another name, or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.unlink()
    except OSError as error:
        raise ConfigError("out", out, f"it cannot be written ({error.strerror})", "Choose another place.") from error


def write_json(content: Any, path: Path) -> None:
    """A new file. UserError where it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            json.dump(content, file, indent=1)
    except OSError as error:
        raise UserError(f"out={path} can't be written: {error.strerror}. Choose another place.") from error
