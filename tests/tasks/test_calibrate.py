"""`dstrain calibrate` from outside: a table, and a file that plans and runs take as their hardware."""

from pathlib import Path

import pytest

from dstrain import cli
from dstrain.bench import kernels
from dstrain.hardware import named
from dstrain.mesh.groups import free_port

SMALL = ["model=micro", "precision=fp32", "train.seq_len=16", "train.sequences=4", "train.micro_batch=1"]


def test_what_is_measured_becomes_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernels, "LONG_ENOUGH_S", 0.001)
    assert cli.status_of(["calibrate", *SMALL, "calibrate.rounds=1"]) == 0
    said = capsys.readouterr().out
    assert "gemm_bf16_efficiency" in said
    assert "Written: hardware/measured.yaml. Use it: dstrain plan --config-dir . hardware=measured" in said
    machine = named("measured", tmp_path / "hardware")
    assert machine.peak_bf16_tflops > 0
    assert {evidence.kind for evidence in machine.evidence} == {"calibration"}
    again = cli.status_of(["calibrate", *SMALL])
    assert again == 2
    said = capsys.readouterr().err
    assert said.startswith("dstrain: calibrate.out=hardware/measured.yaml: there is such a file. Remove it, or choose")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("calibrate.rounds=0", "calibrate.rounds=0: it must be at least 1."),
        ("calibrate.out=mine.txt", "calibrate.out=mine.txt: a hardware file is YAML. Give calibrate.out=hardware/<"),
        ("mesh.pp=2", "mesh.pp=2: it times the exchanges of one pipeline stage. Set mesh.pp=1."),
        ("mesh.ep=2", "mesh={pp: 1, ep: 2}: pp*ep=2 does not divide the number of processes, 1."),
    ],
)
def test_wrong_input(word: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert cli.status_of(["calibrate", *SMALL, word]) == 2
    assert capsys.readouterr().err.startswith(f"dstrain: {said}")
