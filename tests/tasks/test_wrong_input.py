"""Whatever a user gets wrong, or a disk: status 2, one message that names the thing and the cure, no traceback."""

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstrain import cli
from dstrain.metrics.run_directory import RunDirectory
from dstrain.tasks import pretrain
from tests.tasks.training import arguments, losses, steps, train, write_corpus

ROOT = Path(cli.__file__).parents[1]
Line = Callable[..., tuple[int, str]]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Line:
    """Runs a command line in this process: (status, what stands on stderr)."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["dstrain", *words])
        capsys.readouterr()
        status = cli.status_of(words)
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def refused(line: Line, tmp_path: Path) -> Callable[..., str]:
    """The one message of a training run that must not begin, or go on, under these overrides."""
    write_corpus(tmp_path / "corpus.txt")

    def run(*overrides: str) -> str:
        return only_message(*line("train", *arguments(tmp_path, "run", *overrides)))

    return run


def only_message(status: int, err: str) -> str:
    assert status == 2, err
    assert err.startswith("dstrain: ")
    assert err.count("\n") == 1, err
    return err.removeprefix("dstrain: ").strip()


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=3", "model.num_layer=3: there is no such key. Did you mean model.num_layers?"),
        ("+model.foo=1", "model.foo=1: there is no such key."),
        ("mesh.ep=3", "mesh.ep=3: it must divide model.num_experts=4. Set mesh.ep to one of 1, 2, 4."),
        ("mesh.ep=2", "mesh={pp: 1, ep: 2}: pp*ep=2 does not divide the number of processes, 1. Start 2, 4, 6, ..."),
        ("mesh.dp=2", "mesh={pp: 1, ep: 1, dp: 2}: pp*ep*dp=2 is not the number of processes, 1. Start 2 processes"),
        ("mesh.pp=2", "mesh={pp: 2, ep: 1}: pp*ep=2 does not divide the number of processes, 1. Start 2, 4, 6, ..."),
        ("train.steps=many", "train.steps=many: "),
        ("data.tokenizer=nowhere.json", "data.tokenizer=nowhere.json: No such file or directory. Give 'bytes' or"),
        ("model.vocab_size=100", "model.vocab_size=100: the tokenizer bytes has 260 tokens. Give at least as many"),
        ("train.resume=must", "train.resume=must: "),
    ],
)
def test_config(refused: Callable[..., str], override: str, message: str):
    assert refused(override).startswith(message)


def test_world_size_of_the_launcher(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "pp*ep=2 does not divide the number of processes, 3" in refused("mesh.ep=2")


def test_other_ranks_leave_the_message_to_the_first(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert line("train", *arguments(tmp_path, "run", "mesh.ep=2")) == (2, "")


def test_verify_of_stages(line: Line):
    wrong = ["mesh.pp=3", "schedule.pipeline=dualpipe"]
    assert only_message(*line("verify", *wrong)).startswith("mesh.pp=3: dualpipe feeds both ends and needs an even")


# -- text -------------------------------------------------------------------------------------------------------------


def corpus(refused: Callable[..., str], path: Path, content: bytes | None) -> str:
    if content is not None:
        path.write_bytes(content)
    return refused(f"data.path={path}")


def test_corpus_that_is_missing(refused: Callable[..., str], tmp_path: Path):
    assert corpus(refused, tmp_path / "no.txt", None).startswith(
        f"data.path={tmp_path / 'no.txt'} does not exist. Give"
    )


def test_corpus_that_is_empty(refused: Callable[..., str], tmp_path: Path):
    assert "a.txt holds no text. Give a corpus with" in corpus(refused, tmp_path / "a.txt", b"")
    (tmp_path / "folder").mkdir()
    assert "folder holds no files. Give a directory with" in corpus(refused, tmp_path / "folder", None)


def test_corpus_that_is_too_short(refused: Callable[..., str], tmp_path: Path):
    assert str(tmp_path / "a.txt") in corpus(refused, tmp_path / "a.txt", b"Short.")


def test_corpus_in_another_encoding(refused: Callable[..., str], tmp_path: Path):
    message = corpus(refused, tmp_path / "a.txt", "Wärme\n".encode("latin-1") * 1000)
    assert message.startswith(f"{tmp_path / 'a.txt'} is not UTF-8: byte 0xe4 at offset 1. Convert the file")


def test_corpus_that_is_no_json(refused: Callable[..., str], tmp_path: Path):
    message = corpus(refused, tmp_path / "a.jsonl", b'{"text": "one"}\n{"text": "tw\n')
    assert message.startswith(f"{tmp_path / 'a.jsonl'}:2: not a line of JSON")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_token_file_that_is_truncated(refused: Callable[..., str], line: Line, tmp_path: Path, suffix: str):
    prefix = tmp_path / "tokens" / "text"
    words = ("tokenize", f"data.path={tmp_path / 'corpus.txt'}", f"out={prefix}", "workers=1")
    assert line(*words) == (0, "")
    size = prefix.with_suffix(suffix).stat().st_size
    os.truncate(prefix.with_suffix(suffix), size - 1)
    message = refused(f"data.path={prefix}")
    assert message.startswith(f"{prefix}{suffix} has {size - 1:,} bytes, its ")
    assert f"says {size:,}. Delete {prefix}.bin and .idx and tokenise again." in message


# -- run directory ----------------------------------------------------------------------------------------------------


def test_run_directory_that_is_a_file(refused: Callable[..., str], tmp_path: Path):
    (tmp_path / "run").write_text("")
    assert refused().startswith(f"run.dir={tmp_path / 'run'} is a file. Name a directory")


def test_run_directory_in_use(refused: Callable[..., str], tmp_path: Path):
    holder = RunDirectory(tmp_path / "run")
    holder.create()
    holder.lock()
    host = socket.gethostname()
    expected = f"run.dir={tmp_path / 'run'} is in use by process {os.getpid()} on {host}. Wait for it to end or choose"
    assert refused().startswith(expected)
    holder.unlock()


def test_run_directory_that_cannot_be_made(refused: Callable[..., str]):
    assert refused("run.dir=/proc/here").startswith("run.dir=/proc/here cannot be written to: ")


def test_run_that_is_there_already(refused: Callable[..., str], tmp_path: Path):
    train(tmp_path, "run", "train.steps=1")
    assert refused().startswith(f"run.dir={tmp_path / 'run'} holds an earlier run, and train.resume is never.")
    message = refused("train.resume=auto", "model.hidden_size=64")
    assert message.startswith(f"run.dir={tmp_path / 'run'}: the run there has model.hidden_size=32, not 64.")


# -- checkpoints ------------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["rank-00000.bin", "manifest.json"])
def test_checkpoint_with_one_flipped_bit(refused: Callable[..., str], tmp_path: Path, file: str):
    run = train(tmp_path, "run")
    uninterrupted = losses(run)
    newest = run / "checkpoints" / "step-00000012"
    flip_a_byte(newest / file)
    message = refused("train.resume=auto")
    assert message.startswith(f"The checkpoint {newest} is damaged: ")
    assert message.endswith("or delete that directory and resume from an earlier one; complete steps: 6.")
    for child in newest.iterdir():
        child.unlink()
    newest.rmdir()
    train(tmp_path, "run", "train.resume=auto")
    assert losses(run) == uninterrupted


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Sets the size beyond which this process cannot write a file; the last limit ends with the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lower(nbytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]) if nbytes else before)

    yield lower
    lower(0)


def test_checkpoint_that_cannot_be_written(refused: Callable[..., str], limit: Callable[[int], None], tmp_path: Path):
    train(tmp_path, "run", "train.steps=6")
    limit(20_000)
    message = refused("train.resume=auto")
    limit(0)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert message.startswith(f"The checkpoint of step 12 could not be written to {checkpoints}: File too large (")
    assert message.endswith(
        "Make room or permit writing there, then resume; what was saved earlier is intact: complete steps: 6."
    )
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000006"]
    assert losses(train(tmp_path, "run", "train.resume=auto")) == losses(train(tmp_path, "whole"))


def test_metrics_that_cannot_be_written(
    refused: Callable[..., str], limit: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run ends with a checkpoint: what was learned until then is kept."""
    log = pretrain.log

    def log_within_limits(report, *rest):
        limit((tmp_path / "run" / "metrics.jsonl").stat().st_size + 10 if report.progress.step == 3 else 0)
        problem = log(report, *rest)
        limit(0)
        return problem

    monkeypatch.setattr(pretrain, "log", log_within_limits)
    message = refused()
    assert message.startswith(f"{tmp_path / 'run' / 'metrics.jsonl'} cannot be written: File too large. Make room")
    assert steps(tmp_path / "run") == [4]


def test_text_that_cannot_be_tokenised_for_lack_of_room(
    refused: Callable[..., str], limit: Callable[[int], None], tmp_path: Path
):
    limit(1000)
    message = refused()
    limit(0)
    assert message.startswith(f"{tmp_path / 'tokens'}/corpus-")
    assert ".bin could not be written: File too large. Make room, or set data.cache_dir or out." in message
    assert not list((tmp_path / "tokens").glob("*.part"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk(refused: Callable[..., str], small_disk: Path):
    run = small_disk / "run"
    words = (f"run.dir={run}", "checkpoint.every_steps=4", "checkpoint.keep_last=9")
    message = refused(*words)
    assert "No space left on device" in message
    assert message.endswith("complete steps: 4.")
    assert steps(run) == [4]
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 20))
    assert "No space left on device" in refused(*words, "train.resume=auto")
    filler.unlink()
    # A few records fit, but no second checkpoint.
    assert "No space left on device" in refused(*words, "train.resume=auto")
    assert steps(run) == [4]


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs `dstrain train` as two processes from outside: (status of both, what they said on stderr together)."""

    def run(*overrides: str) -> tuple[int, str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [sys.executable, "-m", "dstrain", "train", *arguments(tmp_path, "run", "mesh.ep=2", *overrides)]
        ranks = [
            subprocess.Popen(words, env=os.environ | here | there | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
            for rank in "01"
        ]
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
        assert ranks[0].returncode == ranks[1].returncode, said
        return ranks[0].returncode, "".join(said)

    return run


@pytest.mark.slow
def test_two_ranks_speak_with_one_voice(two_ranks: Callable[..., tuple[int, str]], tmp_path: Path):
    write_corpus(tmp_path / "corpus.txt")
    run = train(tmp_path, "run", "train.steps=6", "mesh.ep=2", world=2)
    # The second rank reads this file.
    flip_a_byte(run / "checkpoints" / "step-00000006" / "rank-00001.bin")
    message = only_message(*two_ranks("train.resume=auto"))
    assert message.startswith(f"The checkpoint {run / 'checkpoints' / 'step-00000006'} is damaged: ")


@pytest.mark.slow
def test_two_ranks_on_a_full_disk(two_ranks: Callable[..., tuple[int, str]], small_disk: Path, tmp_path: Path):
    write_corpus(tmp_path / "corpus.txt")
    message = only_message(
        *two_ranks(f"run.dir={small_disk / 'run'}", "checkpoint.every_steps=4", "checkpoint.keep_last=9")
    )
    assert "No space left on device" in message
    assert steps(small_disk / "run") == [4]
