import json
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.errors import UserError
from dstrain.metrics.run_directory import RunDirectory, git_state

HOLDER = """
import sys
from dstrain.metrics.run_directory import RunDirectory
run = RunDirectory(sys.argv[1])
run.create()
run.lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock of tmp_path / "run" until it is killed."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_lock_names_the_holder_until_it_is_killed(tmp_path: Path, holder: subprocess.Popen):
    run = RunDirectory(tmp_path / "run")
    for _ in range(2):  # being refused must not wipe out the holder's name
        with pytest.raises(UserError, match=rf"run\.dir={run.path} is in use by process {holder.pid} on "):
            run.lock()
    holder.kill()
    holder.wait()
    run.lock()


def test_unlock_gives_the_directory_back(tmp_path: Path):
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    first.lock()
    with pytest.raises(UserError, match="in use"):
        second.lock()
    first.unlock()
    second.lock()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_is_refused(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir=.*(is a file|Not a directory)"):
        RunDirectory(tmp_path / name).create()


def test_an_unwritable_directory_is_refused():
    # Nobody, not even root, may make files here.
    with pytest.raises(UserError, match="cannot be written to"):
        RunDirectory("/proc/run").create()
    with pytest.raises(UserError, match="cannot be written to"):
        RunDirectory("/proc").lock()


def test_holds_run_means_results(tmp_path: Path):
    run = RunDirectory(tmp_path / "run")
    assert not run.holds_run()
    run.create()
    run.lock()
    run.write_environment(world_size=1)
    run.config_yaml.write_text("train: {}\n")
    run.metrics_jsonl.touch()
    run.checkpoints.mkdir()
    assert not run.holds_run()  # a start that failed before its first step may be repeated
    run.metrics_jsonl.write_text('{"step": 1}\n')
    assert run.holds_run()
    run.metrics_jsonl.unlink()
    (run.checkpoints / "step-00000001").mkdir()
    assert run.holds_run()


def test_environment_keeps_every_start(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.write_environment(world_size=1)
    run.write_environment(world_size=4)
    first, second = json.loads(run.environment_json.read_text())
    assert (first["world_size"], second["world_size"]) == (1, 4)
    assert first["packages"]["numpy"].count(".") == 2
    assert "pytest" in first["command"]


def test_git_state_is_that_of_the_source_itself(tmp_path: Path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    inner = tmp_path / "inner"
    inner.mkdir()
    assert git_state(tmp_path) is None
    git("init")
    (inner / "a.py").write_text("")
    git("add", ".")
    git("commit", "-m", "a")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (inner / "a.py").write_text("1")
    assert git_state(tmp_path)["dirty"]
    assert git_state(inner) is None
