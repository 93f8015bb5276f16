"""The choices of the groups, as help texts list them."""

from pathlib import Path

import pytest

from dstrain.config.directory import WIDTH, choices


def test_choices_are_wrapped():
    lines = choices([]).splitlines()
    assert "engine: deepspeed, torch" in lines
    assert any(line.startswith("hardware: a100_80g, ") for line in lines)
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("flag", [["--config-dir", "own"], ["-cd", "own"], ["--config-dir=own"]], ids=str)
def test_own_choices_are_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: list[str]):
    monkeypatch.chdir(tmp_path)
    for group in ("engine", "mine"):
        (tmp_path / "own" / group).mkdir(parents=True)
        (tmp_path / "own" / group / "other.yaml").write_text("{}")
    lines = choices(["engine=other", *flag, "mesh.ep=2"]).splitlines()
    assert "engine: deepspeed, other, torch" in lines
    assert "mine: other" in lines
