"""Whether a testbed can be built here, and the programs that tests run in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.bench.testbed import Fabric, Testbed
from dstrain.errors import UserError


def _missing() -> str | None:
    try:
        with Testbed(Fabric(nodes=1, rate_mbit=100)):
            return None
    except UserError as error:
        return str(error)


_REASON = _missing()
needs_testbed = pytest.mark.skipif(_REASON is not None, reason=_REASON or "")


def namespaces() -> set[str]:
    """What `ip netns` lists, without what belongs to other living processes: another run of these tests, say."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in listed.splitlines()}
    return {name for name in names if not _is_others(name)}


def _is_others(name: str) -> bool:
    owner = name.removeprefix("dstrain-").partition("-")[0]
    return name.startswith("dstrain-") and owner != str(os.getpid()) and Path(f"/proc/{owner}").exists()


def python(source: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", source, *arguments]
