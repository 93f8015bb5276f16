import math
import struct
from pathlib import Path

import numpy as np
import pytest

from dstrain.data.indexed import TokenFile, TokenWriter, bin_path, idx_path, token_dtype, token_prefix, unigram_entropy
from dstrain.errors import UserError

# Three documents; the second came in two pieces.
TOKENS, LENGTHS, ENDS = [1, 2, 3, 4, 5, 6, 7, 65535], [2, 1, 3, 2], [True, False, True, True]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with TokenWriter(tmp_path / "c.v1", np.dtype(np.uint16)) as writer:
        writer.add(np.array(TOKENS[:3]), LENGTHS[:2], ENDS[:2])
        writer.add(np.array(TOKENS[3:]), LENGTHS[2:], ENDS[2:])
    return tmp_path / "c.v1"


def test_roundtrip(prefix: Path) -> None:
    file = TokenFile(prefix)
    assert file.tokens.tolist() == TOKENS
    assert [file.document(n).tolist() for n in range(3)] == [[1, 2], [3, 4, 5, 6], [7, 65535]]
    assert file.document_starts().tolist() == [0, 2, 6, 8]
    assert (file.num_tokens, file.num_documents, file.dtype) == (8, 3, np.dtype(np.uint16))
    counts = file.token_counts()
    assert len(counts) == 65536
    assert np.flatnonzero(counts).tolist() == TOKENS


def test_bytes_of_the_format(prefix: Path) -> None:
    """Written out by hand from Megatron's description."""
    assert bin_path(prefix).read_bytes() == struct.pack("<8H", *TOKENS)
    assert idx_path(prefix).read_bytes() == (
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, 4, 4)
        + struct.pack("<4i", *LENGTHS)
        + struct.pack("<4q", 0, 4, 6, 12)
        + struct.pack("<4q", 0, 1, 3, 4)
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_ours_and_we_read_megatrons(tmp_path: Path, dtype: type) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    with TokenWriter(tmp_path / "ours", np.dtype(dtype)) as writer:
        writer.add(np.array(TOKENS), LENGTHS, ENDS)
    theirs = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    sequences = np.split(np.array(TOKENS), np.cumsum(LENGTHS)[:-1])
    for sequence, end in zip(sequences, ENDS, strict=True):
        theirs.add_item(torch.from_numpy(sequence))
        if end:
            theirs.end_document()
    theirs.finalize(str(tmp_path / "theirs.idx"))

    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [read[n].tolist() for n in range(4)] == [sequence.tolist() for sequence in sequences]
    assert read.document_indices.tolist() == [0, 1, 3, 4]
    assert TokenFile(tmp_path / "theirs").document(1).tolist() == [3, 4, 5, 6]


def cut_file(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("size", [15, 14, 0])
def test_truncated_tokens_are_detected(prefix: Path, size: int) -> None:
    cut_file(bin_path(prefix), size)
    with pytest.raises(UserError, match=f"bin has {size} bytes, its index says 16. Delete .* tokenise again"):
        TokenFile(prefix)


@pytest.mark.parametrize("size", [112, 20, 9])
def test_truncated_index_is_detected(prefix: Path, size: int) -> None:
    cut_file(idx_path(prefix), size)
    with pytest.raises(UserError, match=f"idx has {size} bytes, its header says"):
        TokenFile(prefix)


def test_other_files_are_refused(prefix: Path) -> None:
    raw = idx_path(prefix).read_bytes()
    idx_path(prefix).write_bytes(raw[:17] + b"\x07" + raw[18:])
    with pytest.raises(UserError, match="dtype code 7"):
        TokenFile(prefix)
    idx_path(prefix).write_bytes(b"TNTIDX" + raw)
    with pytest.raises(UserError, match="not a Megatron index"):
        TokenFile(prefix)
    idx_path(prefix).unlink()
    with pytest.raises(UserError, match="idx is missing"):
        TokenFile(prefix)


def test_unordered_documents_are_refused(prefix: Path) -> None:
    raw = bytearray(idx_path(prefix).read_bytes())
    raw[34 + 16 : 34 + 24] = struct.pack("<q", 8)
    idx_path(prefix).write_bytes(raw)
    with pytest.raises(UserError, match="not stored in order"):
        TokenFile(prefix).document_starts()


def test_a_failed_writer_leaves_what_was_there(prefix: Path) -> None:
    def fail() -> None:
        with TokenWriter(prefix, np.dtype(np.uint16)) as writer:
            writer.add(np.array([9]), [1], [True])
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        fail()
    assert TokenFile(prefix).tokens.tolist() == TOKENS
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["c.v1.bin", "c.v1.idx"]


def test_prefix_is_recognised_by_any_of_its_names(prefix: Path, tmp_path: Path) -> None:
    assert token_prefix(prefix) == token_prefix(bin_path(prefix)) == token_prefix(idx_path(prefix)) == prefix
    assert token_prefix(tmp_path) is None
    (tmp_path / "text.txt").touch()
    assert token_prefix(tmp_path / "text.txt") is None
    bin_path(prefix).unlink()
    assert token_prefix(prefix) == prefix


def test_dtype_is_the_smallest_that_fits() -> None:
    assert [token_dtype(size) for size in (260, 65536, 65537)] == [np.uint16, np.uint16, np.int32]


def test_entropy() -> None:
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([3, 1])) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
