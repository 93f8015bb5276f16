"""`dstrain bench comm` from outside: a table, and a file that a training run takes as its hardware."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from dstrain import cli
from dstrain.config import load
from dstrain.mesh.groups import free_port

ROOT = Path(__file__).parents[2]
SMALL = ["model=micro", "mesh.ep=2", "train.seq_len=16", "train.sequences=4", "train.micro_batch=1", "comm.rounds=1"]


def launch(folder: Path, *words: str) -> list["subprocess.CompletedProcess[str]"]:
    """`dstrain bench comm` as two processes."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "dstrain", "bench", "comm", *SMALL, *words]
    ranks = [
        subprocess.Popen(
            command, cwd=folder, env=env | {"RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    return [
        subprocess.CompletedProcess(command, rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)
    ]


def test_what_is_measured_becomes_the_hardware_of_a_run(tmp_path: Path):
    first, second = launch(tmp_path, "hardware=h100_sxm")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "inside a node" in first.stdout
    assert "rank: dispatch" in first.stdout
    assert "Written: hardware/measured.yaml. Use it: dstrain train --config-dir . hardware=measured" in first.stdout
    assert second.stdout == ""
    words = ["train", "hardware=measured", "data.path=x", "--config-dir", ".", "--cfg", "job", "-p", "hardware"]
    shown = subprocess.run(
        [sys.executable, "-m", "dstrain", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    given = load.compose("train", ["hardware=h100_sxm", "data.path=x"]).hardware
    values = yaml.safe_load(shown)
    assert values["name"] == "h100_sxm"
    assert values["peak_bf16_tflops"] == given.peak_bf16_tflops
    # Two processes of one machine: what lies between nodes has not been measured.
    assert values["inter_node_gbytes_per_s"] == given.inter_node_gbytes_per_s
    assert values["intra_node_gbytes_per_s"] != given.intra_node_gbytes_per_s
    assert values["intra_node_latency_us"] > 0
    assert values["devices_per_node"] == 2


def test_a_file_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "taken").write_text("a file")
    first, second = launch(tmp_path, "comm.out=taken/mine.yaml")
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr == "dstrain: comm.out=taken/mine.yaml can't be written: File exists. Choose another place.\n"


@pytest.mark.parametrize(
    ("world", "word", "said"),
    [
        ("1", "comm.rounds=1", "WORLD_SIZE=1: one process has no links to measure. Start several: torchrun"),
        ("2", "comm.rounds=0", "comm.rounds=0: it must be at least 1."),
        ("2", "comm.out=mine.txt", "comm.out=mine.txt: a hardware file is YAML. Give comm.out=hardware/<name>.yaml."),
        ("2", "comm.out=there.yaml", "comm.out=there.yaml: there is such a file. Remove it, or choose another one."),
        ("2", "comm.ou=x", "comm.ou=x: there is no such key. Did you mean comm.out?"),
        ("2", "mesh.pp=2", "mesh.pp=2: it times the exchanges of one pipeline stage."),
        ("3", "mesh.ep=2", "mesh.ep"),
    ],
)
def test_refused_before_anything_is_measured(
    world: str, word: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
):
    (tmp_path / "there.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr("sys.argv", ["dstrain"])
    assert cli.status_of(["bench", "comm", *SMALL[:5], word]) == 2
    assert said in capsys.readouterr().err
