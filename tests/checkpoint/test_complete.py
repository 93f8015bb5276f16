"""A directory is complete or absent."""

from pathlib import Path

import pytest

from dstrain.checkpoint.complete import complete_or_absent
from dstrain.errors import ConfigError, UserError


@pytest.mark.parametrize("exists", [False, True])
def test_it_appears_when_it_is_full(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "deep" / "out"
    if exists:
        target.mkdir(parents=True)
    with complete_or_absent("out", target) as directory:
        (directory / "a").write_text("1")
        assert not (target / "a").exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "a").read_text() == "1"


def test_nothing_stays_after_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with complete_or_absent("out", tmp_path / "out") as directory:
            (directory / "a").write_text("1")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old").write_text("1")
    with complete_or_absent("out", tmp_path / "out") as directory:
        (directory / "new").write_text("2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_there_is_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "directory":
        target.mkdir()
    mine = target if kind == "file" else target / "mine"
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=r"out=.*out: something is there already"), complete_or_absent("out", target):
        pass
    assert mine.read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"), complete_or_absent("out", tmp_path / "file" / "out"):
        pass
