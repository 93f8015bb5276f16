"""A hardware file as YAML: what `dstrain bench comm` and `dstrain calibrate` leave behind."""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dstrain.config.hardware import Evidence, HardwareConfig
from dstrain.errors import UserError


def calibrated(given: HardwareConfig, source: str, **constants: float) -> HardwareConfig:
    """`given` with what was measured in the place of what it says, and with that as the evidence for it."""
    kept = (replace(each, of=tuple(key for key in each.of if key not in constants)) for each in given.evidence)
    measured = Evidence(tuple(constants), "calibration", source)
    evidence = (*(each for each in kept if each.of), measured)
    return replace(given, **constants, evidence=evidence if constants else given.evidence)  # type: ignore[arg-type]


@dataclass(frozen=True)
class HardwareFile:
    """`key`: of the config, that names the file. UserError where it can't be made."""

    key: str
    path: Path

    def make_room(self) -> None:
        """What can't be written is better known before anything is measured."""
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path.parent, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def write(self, hardware: HardwareConfig, about: Sequence[str]) -> None:
        """A new file, with `about` in front as comments."""
        lines = [f"# {line}" for line in about]
        # What JSON writes for a text, a number or a list is YAML, too.
        lines += [f"{key}: {json.dumps(value)}" for key, value in asdict(hardware).items()]
        with self._explained(), self.path.open("x") as file:
            file.write("\n".join(lines) + "\n")

    def use(self, command: str) -> str:
        """How `dstrain <command>` takes it, as a sentence; "" where it is no choice of a group."""
        directory = self.path.parent
        if directory.name != "hardware":
            return ""
        return f" Use it: dstrain {command} --config-dir {directory.parent} hardware={self.path.stem} ..."

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"{self.key}={self.path} can't be written: {error.strerror}. Choose another place."
            raise UserError(message) from error
