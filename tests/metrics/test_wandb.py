import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dstrain.errors import UserError
from dstrain.metrics.run_directory import RunDirectory
from dstrain.metrics.wandb import WandbSink

RUN = """
import sys
from dstrain.metrics.run_directory import RunDirectory
from dstrain.metrics.wandb import WandbSink
sink = WandbSink(RunDirectory(sys.argv[1]), "offline", "dstrain", {"train": {"steps": 9}})
for step in range(int(sys.argv[2]), int(sys.argv[2]) + 3):
    sink.log({"step": step, "tokens": 10 * step, "loss": 0.5, "mfu": None, "moe/layer01/entropy": 2.0})
sink.close()
"""


def run_offline(path: Path, first_step: int) -> str:
    """Three steps in a process without account, configuration or input; returns what it printed."""
    environment = {"HOME": str(path), "PATH": "", "WANDB_X_DISABLE_STATS": "true"}
    command = [sys.executable, "-c", RUN, str(path), str(first_step)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def records(file: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def test_offline_run_goes_on_under_its_id(tmp_path: Path):
    pytest.importorskip("wandb")
    assert run_offline(tmp_path, 1) + run_offline(tmp_path, 3) == ""
    run_id = RunDirectory(tmp_path).wandb_id.read_text().strip()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2
    for file, steps in zip(files, ([1, 2, 3], [3, 4, 5]), strict=True):
        found = records(file)
        history = [record["history"]["item"] for record in found if record["type"] == "history"]
        assert [item["step"] for item in history] == steps
        assert history[0]["tokens"] == 10 * steps[0]
        assert history[0]["train/loss"] == 0.5
        assert history[0]["moe/layer01/entropy"] == 2.0
        assert "perf/mfu" not in history[0]
        axes = [record["metric"].get("step_metric") for record in found if record["type"] == "metric"]
        assert "step" in axes


def test_missing_package_names_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does for a package that cannot be imported
    with pytest.raises(UserError, match=r"pip install 'dstrain\[wandb\]'"):
        WandbSink(RunDirectory(tmp_path), "offline", "dstrain", {})
