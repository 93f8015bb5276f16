"""`dstrain schedule split` as a user meets it."""

import re
from functools import partial

import pytest


@pytest.fixture
def split(command):
    return partial(command, "schedule", "split")


def rows(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def test_deepseek_v3(split):
    status, out, _ = split("+experiment=deepseek_v3")
    assert status == 0
    stages = rows(out)
    assert stages[0][:4] == ["0", "0, 15", "0-3", "embedding, 3 dense, 1 MoE"]
    assert stages[15] == ["15", "0, 15", "60", "1 MoE, 1 MTP, head", "19.77", "7.6%", "1.21"]
    assert "planned, costs by FLOPs of a token" in out
    assert "'schedule.split=[4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1]'" in out


def test_a_listed_split(split):
    _, out, _ = split("mesh.pp=2", "schedule.split=[3,1]")
    assert [row[2] for row in rows(out)] == ["0-2", "3"]
    assert "as schedule.split lists them" in out
    assert sum(float(row[5].rstrip("%")) for row in rows(out)) == pytest.approx(100, abs=0.2)


def test_what_it_prints_can_be_typed(split):
    """The measured costs, given as a key, plan the same split again."""
    small = ["mesh.pp=2", "model=micro", "train.seq_len=16", "model.vocab_size=64"]
    status, measured, _ = split(*small, "measure=true", "rounds=1")
    assert status == 0
    keys = re.findall(r"'(schedule\.\w+=.*)'", measured)
    assert [key.partition("=")[0] for key in keys] == ["schedule.part_ms", "schedule.split"]
    _, again, _ = split(*small, keys[0])
    assert rows(again) == rows(measured)
    assert "costs by schedule.part_ms" in again
    assert [row[:4] for row in rows(split(*small, keys[1])[1])] == [row[:4] for row in rows(measured)]


def test_a_mistake(split):
    status, out, err = split("mesh.pp=9", "model=tiny")
    assert (status, out) == (2, "")
    assert err.startswith("dstrain: mesh.pp=9: pipeline=1f1b makes 9 stages, and model.num_layers=4. Set mesh.pp to at")
