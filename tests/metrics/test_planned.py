"""What was planned beside what was measured; a plan that can't be made, and one that breaks, end no run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.config.hardware import Evidence, HardwareConfig
from dstrain.config.schema import Config
from dstrain.metrics import planned as module
from dstrain.metrics.planned import WARM_UP, Comparison, Planned, planned, promise, step_s
from dstrain.plan.job import job_of
from dstrain.plan.simulation import simulate
from tests.tasks import training

MACHINE = HardwareConfig(
    "lab",
    peak_bf16_tflops=0.1,
    memory_gbytes_per_s=10.0,
    sustained=1.0,
    kernel_us=0.0,
    evidence=(Evidence(("peak_bf16_tflops", "memory_gbytes_per_s"), "calibration", "a test"),),
)


def config(folder: Path, **changes: object) -> Config:
    made = training.config(folder, "run", "mesh.dp=1", "model.vocab_size=320")
    return replace(made, hardware=replace(MACHINE, **changes))  # type: ignore[arg-type]


def record(taken_s: float, planned_s: float, waited_s: float = 0.0) -> dict[str, float]:
    return {"step_ms": taken_s * 1e3, "planned_step_s": planned_s, "comm_exposed_worst_ms": waited_s * 1e3}


def test_a_step_is_planned_for_its_own_batch(tmp_path: Path):
    run = config(tmp_path)
    sequences = run.train.sequences or 0
    assert step_s(run, sequences * run.train.seq_len) == simulate(job_of(run), MACHINE).prediction.step_s
    half, whole = (planned(run, count) for count in (sequences // 2, sequences))
    assert isinstance(half, Planned)
    assert isinstance(whole, Planned)
    assert half.step_s < whole.step_s


def test_a_machine_that_says_nothing_is_passed_over(tmp_path: Path):
    run = config(tmp_path, peak_bf16_tflops=0.0)
    assert promise(run) == ""
    assert step_s(run, 256) is None


def test_why_there_is_no_plan_is_said(tmp_path: Path):
    said = promise(config(tmp_path, nodes=3))
    assert said.startswith("no plan of this run: hardware.nodes=3: 3 devices are not the 1 ranks")
    assert "\n" not in said


def test_a_plan_that_breaks_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    run = config(tmp_path, name="another")
    monkeypatch.setattr(module, "simulate", broken)
    assert promise(run) == "no plan of this run: ZeroDivisionError: division by zero"


def test_the_promise_has_an_interval_around_it(tmp_path: Path):
    run = config(tmp_path)
    words = promise(run).replace("(", " ").replace(")", " ").replace("-", " ").split()
    assert words[0] == "planned:"
    value, low, high = (float(words[place]) for place in (1, 5, 6))
    assert low < value < high


def test_medians_are_compared_without_the_first_steps():
    comparison = Comparison()
    for _ in range(WARM_UP):
        comparison.log(record(9.0, 0.5))
    assert comparison.line() == ""
    for taken_s in (0.4, 0.5, 5.0):
        comparison.log(record(taken_s, 0.45, 0.01))
    said = "a step took 0.5 s (median of 3), planned were 0.45 s: the plan is off by -10.0%; it waited 0.01 s"
    assert comparison.line().startswith(said)


def test_a_run_promises_keeps_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    keys = ("peak_bf16_tflops=0.1", "memory_gbytes_per_s=10")
    run = training.train(tmp_path, "run", *(f"hardware.{key}" for key in keys), "checkpoint.every_steps=0")
    said = capsys.readouterr().out
    (seconds,) = {json.loads(line)["planned_step_s"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert f"planned: {seconds:.3g} s a step" in said
    assert f"planned were {seconds:.3g} s: the plan is off by" in said
