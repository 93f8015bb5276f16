"""The command line as a user meets it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain import cli
from dstrain.errors import SharedError, UserError

ROOT = Path(cli.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def dstrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dstrain", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Runs a command line in this process: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dstrain", *arguments])
        status = cli.status_of(arguments)
        return status, *capsys.readouterr()

    return run


def test_one_process_from_outside(tmp_path: Path):
    """A mistake: one line on stderr, status 2, nothing written."""
    done = dstrain(tmp_path, "train", "data.path=x", "mesh.ep=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dstrain: mesh.ep=3: it must divide model.num_experts=16. Set mesh.ep to one of")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_command_runs(tmp_path: Path):
    (tmp_path / "corpus.txt").write_text("A text.\n" * 50)
    done = dstrain(tmp_path, "tokenize", "data.path=corpus.txt", "out=tokens", "workers=1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tokens.bin").stat().st_size > 400


def test_usage_lists_the_commands(line):
    for arguments in ([], ["--help"], ["-h"]):
        status, out, _ = line(*arguments)
        assert status == 0
        assert all(f"  {command} " in out for command in cli.COMMANDS)


def test_version(line):
    assert line("--version")[1].startswith("dstrain ")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("trian", "train"), ("varify", "verify"), ("exprot", "export"), ("bench", "bench comm` or `dstrain bench fabric")],
)
def test_unknown_command(line, typed: str, meant: str):
    status, _, err = line(typed)
    assert status == 2
    assert err == f"dstrain: There is no command '{typed}'. Did you mean `dstrain {meant}`? " + (
        "`dstrain --help` lists the commands.\n"
    )


def test_help_of_a_command(line):
    status, out, _ = line("train", "--help")
    assert status == 0
    assert "model: deepseek_v2, deepseek_v2_lite, deepseek_v3, micro, small, tiny" in out
    assert "model.router. DeepSeek-V3 section 2.1.2 by default" in out
    assert "  steps                      Optimiser steps of the whole run, counted from its beginning" in out
    assert "--cfg job" in out
    assert max(map(len, out.splitlines())) <= 120
    assert "None" not in out


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in ("train", "completion")])
def test_help_of_the_other_commands(line, command: str):
    status, out, _ = line(*command.split(), "-h")
    assert status == 0
    # Only configs of training and suites of benches are composed of groups.
    composed = ("verify", "dryrun", "bench comm", "bench fabric", "schedule show", "schedule split")
    composed += ("plan", "plan search", "plan trace", "calibrate")
    assert ("Groups" in out) == (command in composed)
    assert out.startswith(f"dstrain {command} ")


def test_a_reader_of_the_help_may_stop(tmp_path: Path):
    command = [sys.executable, "-m", "dstrain", "train", "--help"]
    # Python's own buffer would hide that nobody reads on.
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_flags_of_hydra(line):
    status, out, _ = line("train", "+experiment=tiny_cpu", "train.seed=5", "--cfg", "job", "-p", "train")
    assert status == 0
    assert out.startswith("# @package train\nsteps: ")
    assert "seed: 5" in out
    assert "output_subdir: null" in line("train", "--cfg", "hydra")[1]


def test_info(tmp_path: Path):
    done = dstrain(tmp_path, "train", "+experiment=tiny_cpu", "--info", "defaults-tree")
    assert done.returncode == 0
    assert "experiment: tiny_cpu" in done.stdout


@pytest.mark.parametrize(
    ("error", "rank", "status", "printed"),
    [
        (SharedError("The corpus is empty."), "0", 2, "dstrain: The corpus is empty.\n"),
        (SharedError("The corpus is empty."), "1", 2, ""),
        (UserError("The disk of this node is full."), "1", 2, "dstrain: The disk of this node is full.\n"),
        (KeyboardInterrupt(), "0", 130, ""),
        (SystemExit(75), "0", 75, ""),
    ],
)
def test_how_a_task_ends(line, monkeypatch, error: BaseException, rank: str, status: int, printed: str):
    def ends(config: object) -> None:
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli, "SILENT_RANK_WAIT_S", 0.0)
    monkeypatch.setattr("dstrain.tasks.tokenize.run", ends)
    got, _, err = line("tokenize", "data.path=x", "out=y")
    assert (got, err) == (status, printed)


@pytest.mark.slow
def test_a_shared_mistake_is_printed_once_under_torchrun(tmp_path: Path):
    """torchrun ends every process once one has failed, also one that was about to print."""
    # Rank 0 takes longest to its message.
    (tmp_path / "late.py").write_text(
        "import os, time\ntime.sleep(3 * (os.environ['RANK'] == '0'))\nfrom dstrain.cli import main\nmain()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "late.py"]
    words = ["train", "data.path=x", "mesh.ep=3"]
    done = subprocess.run(
        [*command, *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr.count("dstrain: mesh.ep=3: it must divide model.num_experts=16.") == 1, done.stderr


def test_a_bug_keeps_its_traceback(line, monkeypatch):
    def broken(config: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("dstrain.tasks.tokenize.run", broken)
    with pytest.raises(ZeroDivisionError):
        line("tokenize", "data.path=x", "out=y")


FIRST_WORDS = {
    "train",
    "verify",
    "dryrun",
    "generate",
    "export",
    "import",
    "tokenize",
    "plan",
    "calibrate",
    "schedule",
    "bench",
    "completion",
}
COMPLETED = [
    ("dstrain ", FIRST_WORDS),
    ("dstrain tr", {"train"}),
    ("dstrain bench ", {"comm", "fabric"}),
    ("dstrain bench fabric route_", {"route_nodes=", "route_skew="}),
    ("dstrain train mod", {"model=", "model."}),
    ("dstrain train model=ti", {"model=tiny"}),
    ("dstrain train +exp", {"+experiment="}),
    ("dstrain train +experiment=h", {"+experiment=h100_4x8"}),
    ("dstrain train +experiment=tiny_cpu mesh.", {"mesh.dp=", "mesh.ep=", "mesh.pp=", "mesh.timeout_s="}),
    ("dstrain verify verify.st", {"verify.steps="}),
    ("dstrain schedule show micro", {"micro_batches="}),
    ("dstrain plan sea", {"search"}),
    ("dstrain plan hardware=h80", {"hardware=h800_sxm"}),
    ("dstrain plan search to", {"top="}),
    ("dstrain schedule show dualpipev micro", {"micro_batches="}),
]


@pytest.mark.parametrize(("typed", "expected"), COMPLETED)
def test_completion_query(line, monkeypatch, typed: str, expected: set[str]):
    monkeypatch.setenv("COMP_LINE", typed)
    status, out, _ = line("-sc", "query=bash")
    assert status == 0
    assert {word for word in out.split() if word.startswith(typed.rsplit(" ", 1)[1])} == expected


def test_completion_in_bash(tmp_path: Path):
    """Bash splits words at "="; what it gets back replaces only the part behind it."""
    command = tmp_path / "dstrain"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dstrain "$@"\n')
    command.chmod(0o755)
    script = """
        eval "$(dstrain completion bash)"
        COMP_LINE="dstrain train model=deepseek_v3" COMP_POINT=25
        COMP_WORDS=(dstrain train model = dee) COMP_CWORD=4
        _dstrain_completion && printf '[%s]' "${COMPREPLY[@]}"
    """
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env={**ENVIRONMENT, "PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[deepseek_v2 ][deepseek_v2_lite ][deepseek_v3 ]", done.stderr


def test_completion_is_for_bash(line):
    assert line("completion", "bash")[1] == line("train", "-sc", "install=bash")[1] == cli.BASH_COMPLETION
    assert line("completion", "tcsh")[0] == 2
    assert line("completion", "--help")[0] == 0
