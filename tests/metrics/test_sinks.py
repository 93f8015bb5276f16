import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.errors import UserError
from dstrain.metrics.sinks import JsonlSink


def write(path: Path, steps: range, resume_step: int | None = None) -> None:
    sink = JsonlSink(path, resume_step)
    for step in steps:
        sink.log({"step": step, "loss": 1 / step})
    sink.close()


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_floats_keep_every_bit(tmp_path: Path):
    values = {"step": 1, "a": 0.1 + 0.2, "b": 5e-324, "c": 1 / 3, "d": None, "e": 2**53 + 1}
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(values)
    assert json.loads((tmp_path / "m.jsonl").read_text()) == values


def test_nan_and_infinity_are_valid_json(tmp_path: Path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf})
    record = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert math.isnan(float(record["a"]))
    assert (float(record["b"]), float(record["c"])) == (math.inf, -math.inf)


def test_resume_drops_what_will_be_computed_again(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    write(path, range(1, 11))
    kept = path.read_bytes().splitlines()[:6]
    write(path, range(7, 9), resume_step=6)
    assert steps(path) == list(range(1, 9))
    assert path.read_bytes().splitlines()[:6] == kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("cut", range(1, 24))
def test_resume_mends_a_torn_last_line(tmp_path: Path, cut: int):
    path = tmp_path / "m.jsonl"
    write(path, range(1, 5))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    write(path, range(5, 6), resume_step=4)
    # Without its line feed alone, the last record is still whole.
    assert steps(path) == ([1, 2, 3, 4, 5] if cut == 1 else [1, 2, 3, 5])


def test_resume_without_earlier_metrics(tmp_path: Path):
    write(tmp_path / "m.jsonl", range(5, 7), resume_step=4)
    assert steps(tmp_path / "m.jsonl") == [5, 6]


def test_a_killed_process_loses_nothing_it_logged(tmp_path: Path):
    code = (
        "import os, signal, sys; from pathlib import Path; from dstrain.metrics.sinks import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]))\n"
        "for step in range(1, 8): sink.log({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.jsonl")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path / "m.jsonl") == list(range(1, 8))


def test_a_full_disk_is_said_plainly():
    sink = JsonlSink(Path("/dev/full"))
    with pytest.raises(UserError, match="/dev/full cannot be written: No space left on device"):
        sink.log({"step": 1})
