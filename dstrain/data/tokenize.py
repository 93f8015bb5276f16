"""Text -> token files, on all cores.

This process reads and writes, others encode batches of about a megabyte. Batches come back in the order of reading, so
the files do not depend on the number of processes; a bounded number is under way, so memory does not depend on the
corpus. A lock beside the files lets several ranks or runs that want the same corpus make it once.
"""

import fcntl
import hashlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dstrain.data.indexed import TokenFile, TokenWriter, idx_path, token_dtype, token_prefix
from dstrain.data.source import PIECE_BYTES, Piece, read_documents, source_files
from dstrain.data.tokenizer import Tokenizer, load_tokenizer
from dstrain.errors import UserError

# Goes into the names of cached files: raise it when the same text would give other tokens.
CACHE_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """A batch: sequences laid end to end in `tokens`."""

    tokens: np.ndarray
    lengths: list[int]
    ends: list[bool]
    read_bytes: int


def encode_batch(pieces: list[Piece], tokenizer: Tokenizer) -> Encoded:
    """Pieces as tokens, with the end-of-document token after each document; empty documents vanish."""
    dtype = token_dtype(tokenizer.vocab_size)
    sequences, ends, read_bytes = [], [], 0
    for piece in pieces:
        read_bytes += piece.read_bytes
        if piece.text:
            tokens = tokenizer.encode_array(piece.text).astype(dtype)
            sequences.append(np.append(tokens, dtype.type(tokenizer.eod)) if piece.ends_document else tokens)
            ends.append(piece.ends_document)
    return Encoded(np.concatenate([np.zeros(0, dtype), *sequences]), [len(s) for s in sequences], ends, read_bytes)


class _Worker:
    """What a process of the pool keeps between batches: its tokenizer."""

    tokenizer: Tokenizer

    @classmethod
    def start(cls, spec: str) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        cls.tokenizer = load_tokenizer(spec)

    @classmethod
    def encode(cls, pieces: list[Piece]) -> Encoded:
        return encode_batch(pieces, cls.tokenizer)


def _end_with_parent() -> None:
    """A pool whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(pieces: Iterable[Piece], spec: str, workers: int) -> Iterator[Encoded]:
    """Encoded batches in order; a corpus of one batch, or one worker, needs no processes."""
    batches = _batches(pieces)
    first = [batch for _, batch in zip(range(2), batches, strict=False)]
    if workers == 1 or len(first) < 2:
        tokenizer = load_tokenizer(spec)
        for batches_here in (first, batches):
            yield from (encode_batch(batch, tokenizer) for batch in batches_here)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _Worker.start, (spec,)) as pool:
        yield from _in_order(pool, [*first], batches, 2 * workers)


def _in_order(
    pool: ProcessPoolExecutor, first: list[list[Piece]], rest: Iterator[list[Piece]], ahead: int
) -> Iterator[Encoded]:
    waiting: deque[Future[Encoded]] = deque(pool.submit(_Worker.encode, batch) for batch in first)
    try:
        for batch in rest:
            waiting.append(pool.submit(_Worker.encode, batch))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _num_workers() -> int:
    """The cores that this process may use; one if it may not have children."""
    if multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Report:
    """What a tokenisation wrote."""

    prefix: Path
    documents: int
    tokens: int
    read_bytes: int
    seconds: float


def tokenize(path: Path, out: Path, tokenizer: str, text_key: str, workers: int | None = None) -> Report:
    """Writes `out`.bin and `out`.idx from the corpus at `path`; `workers=None`: one per core. UserError if empty."""
    dtype = token_dtype(load_tokenizer(tokenizer).vocab_size)
    workers = _num_workers() if workers is None else workers
    start = time.perf_counter()
    total = sum(file.stat().st_size for file in source_files(path))
    with _write_errors(out), TokenWriter(out, dtype) as writer, _progress(path, total) as advance:
        for batch in _encode_all(read_documents(path, text_key), tokenizer, workers):
            writer.add(batch.tokens, batch.lengths, batch.ends)
            advance(batch.read_bytes, writer.num_tokens)
        if not writer.num_documents:
            raise UserError(f"data.path={path} holds no text. Give a corpus with at least one document.")
    return Report(out, writer.num_documents, writer.num_tokens, total, time.perf_counter() - start)


@contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    """What cannot be read is reported where it is read; any other trouble with files is that of the output."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out}.bin could not be written: {error.strerror or error}. Make room, or set data.cache_dir or out."
        ) from error


@contextmanager
def _progress(path: Path, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal: call it with bytes just read and tokens so far."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"Tokenising {path.name}", total=total, tokens=0, rate=0.0)

        def advance(read_bytes: int, tokens: int) -> None:
            bar.update(task, advance=read_bytes, tokens=tokens, rate=tokens / (time.perf_counter() - start))

        yield advance


@contextmanager
def lock(prefix: Path) -> Iterator[None]:
    """Held by one process of this machine (or of a shared file system that honours flock) at a time."""
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        stream = open(prefix.with_name(f".{prefix.name}.lock"), "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{prefix.parent} can't be written to: {error.strerror}. Set data.cache_dir or out.") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that is making %s", prefix)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def cached_tokens(path: Path, tokenizer: str, text_key: str, cache_dir: Path) -> TokenFile:
    """The token file at prefix `path`, or that of the text at `path`, made and kept in `cache_dir` if need be."""
    if (prefix := token_prefix(path)) is not None:
        return TokenFile(prefix)
    prefix = cache_dir / f"{path.stem}-{_cache_key(path, tokenizer, text_key)}"
    if not idx_path(prefix).exists():
        with lock(prefix):
            if not idx_path(prefix).exists():
                tokenize(path, prefix, tokenizer, text_key)
    return TokenFile(prefix)


def _cache_key(path: Path, tokenizer: str, text_key: str) -> str:
    """Differs when a file's name, size or time of change, the tokenizer or the key of the text does."""
    parts = [str(CACHE_VERSION), load_tokenizer(tokenizer).fingerprint, text_key]
    for file in source_files(path):
        stat = file.stat()
        parts.append(f"{file.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
