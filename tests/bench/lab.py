"""Whether a testbed can be built here, and the programs that tests run in it."""

import subprocess
import sys

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
    """What `ip netns` lists."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def python(source: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", source, *arguments]
