"""What must not stand in the sources: paths of somebody's machine, and notes to oneself."""

import re
import subprocess

import pytest

from tests.rules.tree import ROOT

FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.}*])/(?:tmp|root|work)/"),
    "unfinished work": re.compile(r"\b(?:TO[D]O|FIX[M]E|XX[X])\b"),
}


def sources() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file() and name != "LICENSE"]


@pytest.mark.parametrize("reason", FORBIDDEN)
def test_words(reason: str):
    found = []
    for name in sources():
        text = (ROOT / name).read_text(encoding="utf-8", errors="replace")
        found += [f"{name}: {match.group()}" for match in FORBIDDEN[reason].finditer(text)]
    assert not found, f"{reason}: {found}"
