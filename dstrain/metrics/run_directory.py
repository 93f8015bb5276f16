"""The directory that holds everything a run writes, and the lock that keeps a second run out of it.

Every rank may build a `RunDirectory` to know the paths; only rank 0 calls `create`, `lock` and `write_environment`. The
lock is the kernel's (flock on `.lock`), so it ends with the process that holds it, however that process ends.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import dstrain
from dstrain.errors import UserError

PACKAGES = ("dstrain", "torch", "numpy", "deepspeed", "transformers", "wandb")


class RunDirectory:
    """Paths of a run directory, laid out as in ARCHITECTURE.md."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self.config_yaml = self.path / "config.yaml"
        self.environment_json = self.path / "environment.json"
        self.metrics_jsonl = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.wandb_id = self.path / "wandb_id"
        self._lock: TextIO | None = None

    def trace_json(self, step: int) -> Path:
        """The timeline of a step."""
        return self.path / f"trace-step-{step}.json"

    def create(self) -> None:
        """Makes the directory and its parents. Raises UserError where that is impossible."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"run.dir={self.path} is a file. Name a directory that exists or can be made.") from error
        except OSError as error:
            raise self._unusable(error) from error

    def holds_run(self) -> bool:
        """Whether an earlier run left results here: metrics or a checkpoint. A new run must not mix its own in."""
        has_metrics = self.metrics_jsonl.is_file() and self.metrics_jsonl.stat().st_size > 0
        return has_metrics or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def set_metrics_aside(self) -> Path | None:
        """Moves the figures of a run that begins again from its first step out of the way; where to, if there are any.

        Its checkpoints may be lost, or it was killed before the first one: either way nothing else is left of it.
        """
        if not self.metrics_jsonl.is_file() or self.metrics_jsonl.stat().st_size == 0:
            return None
        numbers = (n for n in range(1, 10**6) if not (self.path / f"metrics.before-{n}.jsonl").exists())
        aside = self.path / f"metrics.before-{next(numbers)}.jsonl"
        with self.writing():
            self.metrics_jsonl.rename(aside)
        return aside

    def lock(self) -> None:
        """Takes the directory until `unlock` or the end of the process; UserError names a holder on any machine."""
        try:
            # "a+" because a holder's name must survive the opening by somebody who is then refused.
            file = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                raise self._refusal(file, error) from error
        self._lock = file
        with self.writing():
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()

    def unlock(self) -> None:
        """Gives the directory back. `.lock` stays: removing it would race with the next holder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_environment(self, world_size: int) -> None:
        """Appends what this process runs on to environment.json: a list with one entry a start, oldest first."""
        entries = json.loads(self.environment_json.read_text()) if self.environment_json.exists() else []
        fresh = self.path / "environment.json.new"
        with self.writing():
            fresh.write_text(json.dumps([*entries, environment(world_size)], indent=2) + "\n")
            os.replace(fresh, self.environment_json)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns an OSError into a UserError about this directory."""
        try:
            yield
        except OSError as error:
            raise self._unusable(error) from error

    def _refusal(self, file: TextIO, error: OSError) -> UserError:
        if not isinstance(error, BlockingIOError):
            return UserError(f"run.dir={self.path} cannot be locked: {error.strerror}. Use a file system with flock.")
        file.seek(0)
        text = file.read()
        # Empty for the instant between a holder's lock and its name.
        holder = "process {pid} on {host}".format(**json.loads(text)) if text else "another process"
        return UserError(f"run.dir={self.path} is in use by {holder}. Wait for it to end or choose another run.dir.")

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"run.dir={self.path} cannot be written to: {error.strerror}. Choose another run.dir.")


def environment(world_size: int) -> dict[str, Any]:
    """Versions, source, machine and command of this process, as JSON values."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "host": socket.gethostname(),
        "world_size": world_size,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": git_state(Path(dstrain.__path__[0]).parent),
    }


def git_state(source: Path) -> dict[str, Any] | None:
    """Commit of the checkout whose root is `source`, and whether files differ from it; None if it is no checkout.

    A parent directory that happens to be somebody else's repository (a virtual environment inside a project) does not
    count: its commit would say nothing about this code.
    """
    root = _git(source, "rev-parse", "--show-toplevel")
    commit = _git(source, "rev-parse", "HEAD")
    if not root or not commit or Path(root).resolve() != source.resolve():
        return None
    return {"commit": commit, "dirty": bool(_git(source, "status", "--porcelain"))}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
