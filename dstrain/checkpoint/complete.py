"""A new directory that is complete or absent: it is filled beside its place and gets its name in one step."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dstrain.checkpoint.directory import sync_directory
from dstrain.errors import ConfigError, UserError


@contextmanager
def complete_or_absent(field: str, path: Path) -> Iterator[Path]:
    """An empty directory to fill, which becomes `path` if nothing is raised and vanishes otherwise.

    `field` names the config key of `path`. ConfigError if something is there already, UserError if writing fails.
    """
    path = path.expanduser().absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(field, path, "something is there already", "Choose another place, or move that away.")
    partial = path.with_name(f"{path.name}.partial")
    try:
        # A killed process may have left one.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
        sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{field}={path} could not be written: {error}. Make room or permit writing there.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
