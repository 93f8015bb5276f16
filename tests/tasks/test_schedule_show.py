"""`dstrain schedule show` as a user meets it."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest


@pytest.fixture
def show(command):
    return partial(command, "schedule", "show")


TABLE = ("dualpipev", "mesh.pp=4", "micro_batches=10")


def test_text_picture_and_timeline(show):
    status, out, _ = show(*TABLE)
    assert status == 0
    assert out.startswith("dualpipev: 4 ranks, 8 stages, 10 micro-batches (F 1, I 1, W 1, pair x 1)\n")
    assert "\nrank 3                 F3.0 F4.0 F3.1" in out
    assert "makespan 66; ranks are idle for 9.1% of it" in out
    assert "written: dualpipev-4x10.png, dualpipev-4x10.json (open it at ui.perfetto.dev)" in out
    assert sorted(path.name for path in Path().iterdir()) == ["dualpipev-4x10.json", "dualpipev-4x10.png"]
    slots = [
        event for event in json.loads(Path("dualpipev-4x10.json").read_text())["traceEvents"] if event["ph"] == "X"
    ]
    assert max(event["ts"] + event["dur"] for event in slots) == 66_000


def test_times_change_the_makespan(show):
    assert "makespan 53.4; " in show(*TABLE, "pair=0.7")[1]
    assert "makespan 660; " in show(*TABLE, "times=[10,10,10]")[1]


@pytest.mark.parametrize(("out", "begins"), [("a/t.txt", "dstrain schedule show: dualpipev"), ("a/t.csv", "0F0,0F1,")])
def test_one_file(show, out: str, begins: str):
    for _ in range(2):
        status, said, _ = show(*TABLE, f"out={out}")
        assert status == 0
    assert f"written: {out}\n" in said
    assert Path(out).read_text().startswith(begins)
    assert [path.name for path in Path().iterdir()] == ["a"]


def test_a_prefix(show):
    assert show(*TABLE, "out=pictures/v")[0] == 0
    assert sorted(path.name for path in Path("pictures").iterdir()) == ["v.json", "v.png"]


@pytest.mark.parametrize("out", ["new/", "there", "."])
def test_a_directory(show, out: str):
    Path("there").mkdir()
    assert show(*TABLE, f"out={out}")[0] == 0
    assert {path.name for path in Path(out).iterdir()} - {"there"} == {"dualpipev-4x10.json", "dualpipev-4x10.png"}


def test_a_reader_that_has_seen_enough(tmp_path: Path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "dstrain", "schedule", "show", *TABLE]
    ended = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, cwd=tmp_path, timeout=120, check=False)
    os.close(write_end)
    assert ended.stderr == b""


@pytest.mark.parametrize("name", ["dualpipev-4x10.png", "dualpipev-4x10.json"])
def test_files_of_others_stay(show, name: str):
    Path(name).write_text("mine")
    status, out, err = show(*TABLE)
    assert (status, out) == (2, "")
    assert err.startswith(f"dstrain: out={name}: {name} is there, and this command has not made it.")
    assert [path.name for path in Path().iterdir()] == [name]
    assert Path(name).read_text() == "mine"
    assert show(*TABLE, "out=other")[0] == 0


def test_a_long_table_is_cut_on_the_console(show):
    _, out, _ = show("zb_1p", "mesh.pp=32", "micro_batches=64", "out=whole.txt")
    assert len(out.splitlines()) < 100
    assert "more stretches of time; out=table.txt writes the whole table" in out
    whole = Path("whole.txt").read_text()
    assert all(f"W{stage}.{micro_batch}" in whole for stage in range(32) for micro_batch in range(64))


def test_the_batch_of_a_recipe(show):
    _, out, _ = show("+experiment=deepseek_v3", "mesh.dp=2", "out=v3.csv", "schedule.pipeline=dualpipev")
    assert out.startswith("dualpipev: 16 ranks, 32 stages, 120 micro-batches ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("dualpip", "mesh.pp=4"),
            "schedule.pipeline=dualpip: there is no such choice. Choose one of 1f1b, interleaved,",
        ),
        (("dualpipe", "mesh.pp=5"), "mesh.pp=5: dualpipe feeds both ends and needs an even number of pipeline ranks."),
        (
            ("dualpipev", "mesh.pp=4", "micro_batches=5"),
            "micro_batches=5: dualpipev on 4 pipeline ranks needs at least 8",
        ),
        ((*TABLE, "times=[1,inf,1]"), "times=[1.0, inf, 1.0]: a time is above 0, and finite."),
        ((*TABLE, "times=[1,0,1]"), "times=[1.0, 0.0, 1.0]: a time is above 0, and finite."),
        (("1f1b",), "mesh.pp=1: a pipeline has several ranks. Set mesh.pp=4, say."),
        (("dualpipe", "mesh.pp=4", "out=t.csv"), "dualpipe holds every stage on two ranks, which torch's pipelining"),
    ],
)
def test_mistakes(show, arguments: tuple[str, ...], message: str):
    status, out, err = show(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"dstrain: {message}")
    assert list(Path().iterdir()) == []
