"""`dstrain plan trace` as a user meets it."""

import json
from functools import partial
from pathlib import Path

import pytest

RUN = ("hardware=h100_sxm", "mesh.pp=2", "mesh.ep=2", "train.sequences=16", "schedule.pipeline=zb_1p")


@pytest.fixture
def trace(command):
    return partial(command, "plan", "trace", *RUN)


def test_a_timeline(trace):
    status, out, _ = trace("out=a/step.json")
    assert status == 0
    assert "Written: a/step.json (open it at ui.perfetto.dev)\n" in out
    content = json.loads(Path("a/step.json").read_text())
    assert {event["pid"] for event in content["traceEvents"]} == {0, 1}
    assert content["otherData"]["made by"] == "dstrain plan trace"


@pytest.mark.parametrize(("name", "begins"), [("step.png", b"\x89PNG"), ("plan.html", b"<!doctype html>")])
def test_other_files(trace, name: str, begins: bytes):
    status, out, _ = trace(f"out={name}")
    assert status == 0
    assert f"Written: {name}\n" in out
    assert Path(name).read_bytes().startswith(begins)


def test_wrong_outputs(trace):
    Path("mine.json").write_text("mine")
    for out, message in (
        ("mine.json", "out=mine.json: it is there already. "),
        ("step.svg", "out=step.svg: its ending says what is written. Give <name>.json (a timeline for Perfetto), "),
        ("mine.json/x.png", "out=mine.json/x.png: it cannot be written ("),
    ):
        status, said, err = trace(f"out={out}")
        assert (status, said) == (2, "")
        assert err.startswith(f"dstrain: {message}")
    assert Path("mine.json").read_text() == "mine"
