from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dstrain.data.indexed import TokenFile, TokenWriter
from dstrain.data.samples import Corpus, TokenStream
from dstrain.data.tokenizer import FimTokens
from dstrain.errors import UserError

EOD, FIM = 256, FimTokens(257, 258, 259)


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    """60 documents of 1 to 40 random bytes, each with its end."""
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(0, 256, rng.integers(1, 41)), EOD) for _ in range(60)]
    with TokenWriter(tmp_path / "c", np.dtype(np.uint16)) as writer:
        writer.add(np.concatenate(documents), [len(d) for d in documents], [True] * len(documents))
    return TokenFile(tmp_path / "c")


def split(stream: TokenStream) -> list[list[int]]:
    """The documents of a stream, ends left out."""
    tokens = stream.read(0, stream.length).tolist()
    assert tokens[-1] == EOD
    documents: list[list[int]] = [[]]
    for token in tokens[:-1]:
        documents[-1].append(token) if token != EOD else documents.append([])
    return documents


def undo_fim(document: list[int]) -> list[int]:
    """prefix + middle + suffix of a document in the order prefix, suffix, middle."""
    hole, end = document.index(FIM.hole), document.index(FIM.end)
    assert document[0] == FIM.begin
    return document[1:hole] + document[end + 1 :] + document[hole + 1 : end]


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_fim_loses_nothing(file: TokenFile, rate: float) -> None:
    stream = TokenStream(file, FIM, rate, key=5)
    documents = split(stream)
    originals = [file.document(n)[:-1].tolist() for n in range(file.num_documents)]
    changed = [document[:1] == [FIM.begin] for document in documents]
    assert [undo_fim(d) if c else d for d, c in zip(documents, changed, strict=True)] == originals
    assert stream.length == file.num_tokens + 3 * sum(changed)
    assert {0.0: sum(changed) == 0, 0.3: 8 < sum(changed) < 30, 1.0: all(changed)}[rate]


def test_fim_depends_on_key_and_cuts_differ(file: TokenFile) -> None:
    streams = [TokenStream(file, FIM, 0.5, key) for key in (1, 1, 2)]
    same, again, other = (stream.read(0, 500).tolist() for stream in streams)
    assert same == again != other
    holes = Counter(d.index(FIM.hole) for d in split(TokenStream(file, FIM, 1.0, key=1)))
    assert len(holes) > 10


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_any_part_of_the_stream_reads_as_the_whole_does(file: TokenFile, rate: float) -> None:
    stream = TokenStream(file, FIM, rate, key=3)
    whole = stream.read(0, stream.length)
    for start in range(0, stream.length, 7):
        for length in (1, 2, 5, 90):
            stop = min(start + length, stream.length)
            assert stream.read(start, stop).tolist() == whole[start:stop].tolist()


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_an_epoch_trains_on_every_token_once(file: TokenFile, rate: float) -> None:
    stream = TokenStream(file, FIM, rate, key=3)
    whole = stream.read(0, stream.length)
    corpus = Corpus(stream, seq_len=16, lookahead=2, key=9, name="c")
    assert corpus.num_windows == (stream.length - 2) // 16
    orders = []
    for epoch in range(2):
        samples = [corpus.sample(epoch * corpus.num_windows + n).tolist() for n in range(corpus.num_windows)]
        windows = [whole[16 * w : 16 * w + 18].tolist() for w in range(corpus.num_windows)]
        assert sorted(samples) == sorted(windows)
        orders.append([windows.index(sample) for sample in samples])
    assert orders[0] != orders[1] != list(range(corpus.num_windows))


def test_smallest_corpus(file: TokenFile) -> None:
    stream = TokenStream(file)
    corpus = Corpus(stream, seq_len=stream.length - 2, lookahead=2, key=0, name="c")
    assert corpus.sample(3).tolist() == stream.read(0, stream.length).tolist()
    with pytest.raises(UserError, match=r"c has .* tokens, less than one sample of train\.seq_len"):
        Corpus(stream, seq_len=stream.length - 1, lookahead=2, key=0, name="c")
