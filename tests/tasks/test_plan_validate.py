"""`dstrain plan validate` as a user meets it."""

import json
from functools import partial
from pathlib import Path

import pytest

from tests.plan.test_row_rules import MODEL, ROW


@pytest.fixture
def validate(command):
    return partial(command, "plan", "validate")


def write(*rows: dict) -> None:
    Path("runs.json").write_text(json.dumps({"rows": rows, "models": {"mine": MODEL}}))


def test_own_runs(validate):
    other = {**ROW, "id": "b", "group": "mine", "config": {**ROW["config"], "pp": 1, "colour": "red", "mem_gib": 40}}
    write({**ROW, "group": "mine"}, other)
    status, out, err = validate("runs.json", "out=errors.json")
    assert (status, err) == (0, "")
    found = {row["id"]: row for row in json.loads(Path("errors.json").read_text())}
    assert list(found) == ["a", "b", "b:mem"]
    assert found["a"]["measured"] == found["b"]["measured"] == 3.0
    for row in found.values():
        assert row["error_pct"] == pytest.approx(100 * (row["predicted"] / row["measured"] - 1))
        assert f"{row['error_pct']:+.1f}" in out
    assert "\nmine, memory " in out
    assert "\ndense, several nodes " in out
    assert "Layouts in the right order: 0 of 1 pairs; of those measured more than 1% apart 0 of 0.\n" in out
    assert "Not modelled: colour.\n" in out
    assert "Written: errors.json\n" in out


def test_published_runs(validate):
    """All that come with dstrain, within loose bounds: a leaderboard has the figures themselves."""
    status, out, _ = validate("out=errors.json")
    assert status == 0
    errors = [abs(row["error_pct"]) for row in json.loads(Path("errors.json").read_text())]
    assert len(errors) == 125 + 46
    assert sorted(errors)[len(errors) // 2] < 10
    assert "\nMoE, several nodes " in out


def test_wrong_input(validate):
    write({**ROW, "gpu": "H101"})
    for words, message in (
        (["runs.json"], "Row a: gpu=H101: there is no machine for this GPU. "),
        (["other.json"], "other.json cannot be read: No such file or directory. "),
        (["runs.json", "out=runs.json"], "out=runs.json: it is there already. "),
        (["out=errors.csv"], "out=errors.csv: errors are written as JSON. "),
    ):
        status, out, err = validate(*words)
        assert (status, out) == (2, "")
        assert err.startswith(f"dstrain: {message}")
