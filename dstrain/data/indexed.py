"""Token files: the memory-mapped `.bin`/`.idx` pair of Megatron-LM (megatron/core/datasets/indexed_dataset.py).

`.bin` is nothing but tokens. `.idx` is little-endian: magic, u64 version 1, u8 dtype code, u64 sequences S, u64
document bounds N + 1, then int32 lengths [S] in tokens, int64 pointers [S] in bytes, int64 document bounds [N + 1] in
sequences. A document is one sequence, or several if it came in pieces. The index is renamed into place last, so it
exists only beside complete tokens.
"""

import os
import struct
from array import array
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from dstrain.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def token_prefix(path: Path) -> Path | None:
    """The prefix if `path` names a token file pair (by its prefix or either file), otherwise None."""
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    return path if not path.exists() and (bin_path(path).exists() or idx_path(path).exists()) else None


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype of the format that holds every token: uint16 or int32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats per token: the loss of a model that knows how often each token occurs, and nothing else."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


class TokenFile:
    """A token file pair, memory-mapped. UserError if it is missing, truncated or of another format."""

    def __init__(self, prefix: Path):
        self.prefix = prefix
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise UserError(f"{path} is missing. A token file is a pair of .bin and .idx; tokenise again.")
        code, sequences, bounds = self._header()
        # Plain arrays over the mapped memory: slicing np.memmap itself is slow.
        index = np.asarray(np.memmap(idx_path(prefix), np.uint8, mode="r"))
        cuts = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * bounds]).tolist()
        self._lengths, self._pointers, self._bounds = (
            index[start:stop].view(dtype)
            for (start, stop), dtype in zip(pairwise(cuts), (np.int32, np.int64, np.int64), strict=True)
        )
        self.dtype = np.dtype(DTYPES[code])
        self._check_tokens()
        # Tokens of all documents, one after the other: 1-D.
        self.tokens = np.asarray(np.memmap(bin_path(prefix), self.dtype, mode="r"))

    def _header(self) -> tuple[int, int, int]:
        path = idx_path(self.prefix)
        with open(path, "rb") as stream:
            raw = stream.read(HEADER.size)
        if raw[: len(MAGIC)] != MAGIC:
            raise UserError(
                f"{path} is not a Megatron index: it does not begin with MMIDIDX. Give a token file prefix."
            )
        _magic, version, code, sequences, bounds = HEADER.unpack(raw.ljust(HEADER.size, b"\0"))
        expected = HEADER.size + 12 * sequences + 8 * bounds
        # Multimodal indices, which are longer, are refused too.
        if len(raw) < HEADER.size or path.stat().st_size != expected:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, its header says {expected:,}. {self._cure()}")
        if version != 1 or code not in DTYPES:
            raise UserError(f"{path}: version {version} with dtype code {code} is not supported. {self._cure()}")
        return code, sequences, bounds

    def _check_tokens(self) -> None:
        size = bin_path(self.prefix).stat().st_size
        end = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize if len(self._lengths) else 0
        if size != end:
            raise UserError(f"{bin_path(self.prefix)} has {size:,} bytes, its index says {end:,}. {self._cure()}")
        if len(self._bounds) < 2 or self._bounds[0] != 0 or self._bounds[-1] != len(self._lengths) or not end:
            raise UserError(f"{idx_path(self.prefix)} has no documents, or misplaced ones. {self._cure()}")

    def _cure(self) -> str:
        return f"Delete {self.prefix}.bin and .idx and tokenise again."

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self._bounds) - 1

    def document_starts(self) -> np.ndarray:
        """int64 [num_documents + 1]: where each document begins in `tokens`, and the end of the last."""
        starts = np.append(self._pointers[self._bounds[:-1]] // self.dtype.itemsize, self.num_tokens)
        if starts[0] != 0 or (np.diff(starts) < 0).any():
            raise UserError(f"{idx_path(self.prefix)}: documents are not stored in order. {self._cure()}")
        return starts

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document, 1-D, not copied."""
        first, stop = int(self._bounds[number]), int(self._bounds[number + 1])
        start = int(self._pointers[first]) // self.dtype.itemsize
        return self.tokens[start : start + int(self._lengths[first:stop].sum(dtype=np.int64))]

    def token_counts(self) -> np.ndarray:
        """int64 [largest token + 1]: how often each token occurs."""
        counts = np.zeros(0, np.int64)
        for start in range(0, self.num_tokens, 2**24):
            part = np.bincount(self.tokens[start : start + 2**24], minlength=len(counts))
            part[: len(counts)] += counts
            counts = part
        return counts


class TokenWriter:
    """Writes a pair under temporary names; leaving the `with` block without an error puts it in place.

    One writer per prefix at a time: the caller holds a lock.
    """

    def __init__(self, prefix: Path, dtype: np.dtype):
        self._prefix, self._dtype = prefix, dtype
        self._lengths, self._bounds = array("i"), array("q", [0])
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._bounds) - 1

    def __enter__(self) -> "TokenWriter":
        self._bin: BinaryIO = open(self._part(".bin"), "wb")
        return self

    def add(self, tokens: np.ndarray, lengths: list[int], ends: list[bool]) -> None:
        """Appends sequences: `tokens` 1-D, cut into `lengths`; `ends` says after which ones a document ends."""
        self._bin.write(tokens.astype(self._dtype, copy=False).tobytes())
        self.num_tokens += len(tokens)
        for length, end in zip(lengths, ends, strict=True):
            self._lengths.append(length)
            if end:
                self._bounds.append(len(self._lengths))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._put_in_place()
            else:
                self._bin.close()
        finally:
            self._part(".bin").unlink(missing_ok=True)
            self._part(".idx").unlink(missing_ok=True)

    def _put_in_place(self) -> None:
        _flush(self._bin)
        self._write_index()
        idx_path(self._prefix).unlink(missing_ok=True)
        os.replace(self._part(".bin"), bin_path(self._prefix))
        os.replace(self._part(".idx"), idx_path(self._prefix))

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], out=pointers[1:])
        pointers *= self._dtype.itemsize
        with open(self._part(".idx"), "wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, CODES[self._dtype], len(lengths), len(self._bounds)))
            for part in (lengths, pointers, np.frombuffer(self._bounds, np.int64)):
                stream.write(part.tobytes())
            _flush(stream)

    def _part(self, suffix: str) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}{suffix}.part")


def _flush(stream: BinaryIO) -> None:
    """Everything on disk before a rename makes it visible."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
