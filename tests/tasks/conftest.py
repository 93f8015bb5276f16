"""What tests of commands share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain import cli


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `dstrain ...` in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.status_of(words)
        return status, *capsys.readouterr()

    return run
