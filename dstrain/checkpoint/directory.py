"""A checkpoint is complete or absent, because a directory gets its final name in one step.

    step-00000100.partial/     being written; becomes, when every file is safe on the disk,
    step-00000100/             a complete checkpoint; becomes, when it is no longer kept,
    step-00000100.deleting/    being removed

A process that is killed leaves a name with a suffix behind at worst; the next save sweeps it away.
"""

import os
import re
import shutil
from pathlib import Path

from dstrain.errors import UserError

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})(\.partial|\.deleting)?")


class CheckpointDirectory:
    """The checkpoints of a run by step. Changes are made by one rank; every rank may read."""

    def __init__(self, path: Path):
        self.path = path

    def complete(self, step: int) -> Path:
        return self.path / f"step-{step:08}"

    def partial(self, step: int) -> Path:
        return self.path / f"step-{step:08}.partial"

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        matches = (NAME.fullmatch(child.name) for child in self.path.iterdir())
        steps = (int(match[1]) for match in matches if match and not match[2])
        return sorted(step for step in steps if (self.complete(step) / MANIFEST).exists())

    def begin(self, step: int) -> None:
        """Removes what a killed run left and makes an empty place for `step`."""
        self.sweep()
        self.partial(step).mkdir(parents=True)

    def commit(self, step: int) -> None:
        """Gives the written files of `step` their final name.

        An older checkpoint of the same step is replaced; only here does a kill at the wrong moment cost that step.
        """
        sync_directory(self.partial(step))
        if self.complete(step).exists():
            self._discard(step)
        self.partial(step).rename(self.complete(step))
        sync_directory(self.path)

    def abandon(self, step: int) -> None:
        """Makes room again after a failure. What cannot be removed now, the next `begin` tries again, and complains."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def prune(self, newest: int, keep_last: int, keep_every_steps: int) -> None:
        """Removes all but `newest`, the last `keep_last` and the multiples of `keep_every_steps` (0: none)."""
        steps = self.steps()
        kept = {newest, *steps[max(0, len(steps) - keep_last) :]}
        if keep_every_steps:
            kept |= {step for step in steps if step % keep_every_steps == 0}
        for step in steps:
            if step not in kept:
                self._prune(step)

    def sweep(self) -> None:
        """Removes unfinished and half-deleted checkpoints; nothing else in the directory is touched."""
        if not self.path.is_dir():
            return
        for child in list(self.path.iterdir()):
            match = NAME.fullmatch(child.name)
            if match and match[2] and child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)

    def _prune(self, step: int) -> None:
        try:
            self._discard(step)
        except OSError as error:
            raise UserError(
                f"The checkpoint {self.complete(step)} is no longer kept but could not be removed: {error.strerror}. "
                f"Permit writing there or remove it yourself, then resume; {self._choice(without=step)}."
            ) from error

    def _discard(self, step: int) -> None:
        doomed = self.path / f"step-{step:08}.deleting"
        self.complete(step).rename(doomed)
        # The new name must be on the disk before the first file goes.
        sync_directory(self.path)
        shutil.rmtree(doomed)

    def require(self, step: int) -> Path:
        """The directory of a complete checkpoint, or a UserError that lists those that exist."""
        if step not in self.steps():
            raise UserError(f"There is no complete checkpoint of step {step} in {self.path}; {self._choice()}.")
        return self.complete(step)

    def damaged(self, step: int, finding: str) -> UserError:
        """What to tell the user when the checkpoint of `step` cannot be trusted."""
        return UserError(
            f"The checkpoint {self.complete(step)} is damaged: {finding}. Restore it from a copy, or delete that "
            f"directory and resume from an earlier one; {self._choice(without=step)}."
        )

    def unwritable(self, step: int, error: OSError, needed_bytes: int | None) -> UserError:
        """What to tell the user when the checkpoint of `step` could not be written."""
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        free = f"{shutil.disk_usage(existing).free / 1e6:.1f} MB are free"
        need = f"the checkpoint needs {needed_bytes / 1e6:.1f} MB and {free}" if needed_bytes else free
        return UserError(
            f"The checkpoint of step {step} could not be written to {self.path}: {error.strerror or error} ({need}). "
            "Make room or permit writing there, then resume; what was saved earlier is intact: "
            f"{self._choice(without=step)}."
        )

    def _choice(self, without: int | None = None) -> str:
        steps = [step for step in self.steps() if step != without]
        return f"complete steps: {', '.join(map(str, steps))}" if steps else "there is no complete one"


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
