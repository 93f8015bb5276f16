import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from dstrain.data import tokenize as tokenize_module
from dstrain.data.indexed import TokenFile, bin_path, idx_path
from dstrain.data.tokenize import Report, cached_tokens, tokenize
from dstrain.data.tokenizer import load_tokenizer
from dstrain.errors import UserError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """300 documents, 3 MB in all: several batches; every 50th is empty."""
    path = tmp_path / "corpus.jsonl"
    words = "the cat sat on the mat and that was that "
    with open(path, "w") as stream:
        for n in range(300):
            stream.write(json.dumps({"text": f"{n} {words * 250}" if n % 50 else ""}) + "\n")
    return path


def test_output_does_not_depend_on_the_number_of_workers(corpus: Path, tmp_path: Path, bpe_file: Path) -> None:
    for workers in (1, 2):
        report = tokenize(corpus, tmp_path / f"w{workers}", str(bpe_file), "text", workers)
    for path in (bin_path, idx_path):
        assert path(tmp_path / "w1").read_bytes() == path(tmp_path / "w2").read_bytes()
    file, tokenizer = TokenFile(tmp_path / "w2"), load_tokenizer(str(bpe_file))
    assert (report.documents, report.tokens) == (294, file.num_tokens) == (file.num_documents, file.num_tokens)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for number, text in enumerate(text for text in texts if text):
        assert file.document(number).tolist()[-1] == tokenizer.eod
        assert tokenizer.decode(file.document(number).tolist()) == text


def test_long_text_is_one_document_of_several_pieces(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{n} lines of text\n" for n in range(150_000)))
    tokenize(path, tmp_path / "long", "bytes", "text", workers=2)
    file = TokenFile(tmp_path / "long")
    assert file.num_documents == 1
    assert bytes(file.document(0)[:-1].tolist()) == path.read_bytes()
    assert file.document(0)[-1] == 256


def test_errors_reach_the_caller_and_leave_nothing(corpus: Path, tmp_path: Path) -> None:
    with open(corpus, "a") as stream:
        stream.write("oops\n")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"corpus\.jsonl:301"):
        tokenize(corpus, tmp_path / "out" / "c", "bytes", "text", workers=2)
    corpus.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="holds no text"):
        tokenize(corpus, tmp_path / "out" / "c", "bytes", "text")
    assert not list((tmp_path / "out").iterdir())


def test_cache_follows_text_tokenizer_and_key(tmp_path: Path, bpe_file: Path) -> None:
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text('{"text": "one", "other": "two"}\n')

    def prefix(tokenizer: str = "bytes", text_key: str = "text") -> Path:
        return cached_tokens(path, tokenizer, text_key, cache).prefix

    first = prefix()
    written = bin_path(first).stat().st_mtime_ns
    assert prefix() == first
    assert bin_path(first).stat().st_mtime_ns == written
    others = {prefix(str(bpe_file)), prefix(text_key="other")}
    path.write_text('{"text": "six", "other": "two"}\n')
    os.utime(path, ns=(0, 10**9))
    others.add(prefix())
    assert len({first, *others}) == 4
    assert cached_tokens(first, "bytes", "text", cache).prefix == first


def _open_cached(path: Path, cache: Path, barrier: Barrier) -> None:
    def count_and_tokenize(path: Path, out: Path, tokenizer: str, text_key: str, workers: int | None = None) -> Report:
        (cache / f"made-by-{os.getpid()}").touch()
        time.sleep(0.5)
        return tokenize(path, out, tokenizer, text_key, workers)

    tokenize_module.tokenize = count_and_tokenize
    barrier.wait()
    assert cached_tokens(path, "bytes", "text", cache).num_documents == 294


def test_processes_that_want_the_same_corpus_make_it_once(corpus: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    ranks = [context.Process(target=_open_cached, args=(corpus, tmp_path, barrier)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert len(list(tmp_path.glob("made-by-*"))) == 1


# A corpus without end.
ENDLESS = """
import itertools, sys
from pathlib import Path
from dstrain.data import tokenize
from dstrain.data.source import Piece

if __name__ == "__main__":
    tokenize.read_documents = lambda *_: (Piece("the cat sat on the mat " * 1000, 0) for _ in itertools.count())
    tokenize.tokenize(Path(sys.argv[0]), Path(sys.argv[1]), sys.argv[2], "text", 2)
"""


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_tokens_and_no_processes(tmp_path: Path, bpe_file: Path, how: signal.Signals) -> None:
    script, out = tmp_path / "endless.py", tmp_path / "c"
    script.write_text(ENDLESS)
    root = str(Path(tokenize_module.__file__).parents[2])
    command = [sys.executable, str(script), str(out), str(bpe_file)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": root})
    part = tmp_path / "c.bin.part"
    wait_until(lambda: part.exists() and part.stat().st_size > 0)
    workers = _children(process.pid)
    assert len(workers) >= 2
    process.send_signal(how)
    process.wait(timeout=30)
    wait_until(lambda: not any(_alive(worker) for worker in workers))
    assert not bin_path(out).exists()
    assert not idx_path(out).exists()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing happened within 30 s"
        time.sleep(0.05)
