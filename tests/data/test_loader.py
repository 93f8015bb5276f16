import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dstrain.config.schema import Corpus, DataConfig
from dstrain.data.indexed import TokenWriter, bin_path
from dstrain.data.loader import Loader, cache_dir
from dstrain.errors import ConfigError, UserError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {n} of the corpus\n" for n in range(500)))
    return path


def loader(
    path: Path | str | None = None,
    *,
    seq_len: int = 16,
    lookahead: int = 2,
    seed: int = 0,
    vocab_size: int | None = None,
    **config: Any,
) -> Loader:
    data = DataConfig(path=None if path is None else str(path), **config)
    return Loader(data, seq_len=seq_len, lookahead=lookahead, seed=seed, vocab_size=vocab_size)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_batches_are_a_function_of_position(text: Path) -> None:
    """However a range is divided among ranks, steps and processes, its samples are the same."""
    whole = loader(text).batch(0, 2000)
    assert whole.shape == (2000, 18)
    assert whole.dtype == torch.int64
    again = loader(text)
    for first, count in ((1999, 1), (0, 7), (7, 500)):
        assert torch.equal(again.batch(first, count), whole[first : first + count])


def test_batches_hold_the_text_in_shuffled_windows(text: Path) -> None:
    source = loader(text)
    windows = source.num_tokens // 16
    decoded = [source.tokenizer.decode(row[:16].tolist()) for row in source.batch(0, windows)]
    content = text.read_text()
    expected = [content[16 * n : 16 * n + 16] for n in range(windows)]
    assert decoded != expected
    assert sorted(decoded) == sorted(expected)


def test_seeds_and_epochs_differ(text: Path) -> None:
    first, windows = loader(text), loader(text).num_tokens // 16
    assert not torch.equal(first.batch(0, windows), loader(text, seed=1).batch(0, windows))
    assert not torch.equal(first.batch(0, windows), first.batch(windows, windows))


def test_blend_takes_each_corpus_by_its_weight(tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 1000)
    blend = tuple(
        Corpus(path=str(tmp_path / f"{letter}.txt"), weight=weight) for letter, weight in (("a", 3), ("b", 1))
    )
    source = loader(blend=blend)
    letters = source.batch(0, 400)[:, 0]
    assert (letters == ord("a")).sum() == 300
    assert source.num_tokens == 2002


def test_fim(text: Path) -> None:
    assert not (loader(text).batch(0, 500) > 256).any()
    tokens = loader(text, fim_rate=1.0).batch(0, 2000)
    assert {257, 258, 259} <= set(tokens.flatten().tolist())


def test_prefetch_gives_the_plan_in_order(text: Path) -> None:
    for ahead in (0, 1, 3, 100):
        source = loader(text, prefetch_batches=ahead)
        plan = [(0, 2), (6, 1), (3, 3)]
        batches = list(source.prefetch(plan))
        assert len(batches) == 3
        assert all(torch.equal(b, source.batch(*step)) for b, step in zip(batches, plan, strict=True))


class Recorder(Loader):
    """Notes which batches were prepared."""

    def __init__(self, config: DataConfig):
        super().__init__(config, seq_len=16, lookahead=2, seed=0)
        self.prepared: list[int] = []

    def batch(self, first: int, count: int) -> torch.Tensor:
        self.prepared.append(first)
        return super().batch(first, count)


def test_prefetch_works_ahead_and_ends_when_closed(text: Path) -> None:
    config = DataConfig(path=str(text), prefetch_batches=3)
    source = Recorder(config)
    batches = source.prefetch((n, 1) for n in itertools.count())
    next(batches)
    (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("prefetch"))
    deadline = time.monotonic() + 30
    while len(source.prepared) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    batches.close()
    assert not thread.is_alive()
    assert source.prepared == [0, 1, 2, 3]


class Failing(Loader):
    """Cannot make sample 1."""

    def batch(self, first: int, count: int) -> torch.Tensor:
        if first == 1:
            raise UserError("sample 1 is broken")
        return super().batch(first, count)


def test_prefetch_raises_where_the_error_belongs(text: Path) -> None:
    source = Failing(DataConfig(path=str(text)), seq_len=16, lookahead=2, seed=0)
    batches = source.prefetch((n, 1) for n in itertools.count())
    assert torch.equal(next(batches), source.batch(0, 1))
    with pytest.raises(UserError, match="sample 1 is broken"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "c", np.array([1, 2, 3, 4, 999, 6, 7, 8, 256]))
    with pytest.raises(UserError, match=r"holds token 999, but data\.tokenizer has 0 to 259"):
        source.batch(0, 2)


def write(prefix: Path, tokens: np.ndarray) -> Loader:
    with TokenWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(tokens, [len(tokens)], [True])
    return loader(prefix, seq_len=4, lookahead=1)


def test_vocabulary_smaller_than_the_tokenizer(text: Path) -> None:
    assert loader(text, vocab_size=260).batch(0, 1).shape == (1, 18)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=259: the tokenizer bytes has 260 tokens"):
        loader(text, vocab_size=259)


def test_token_file_of_another_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its first document ends with token 7, not with 256"):
        write(tmp_path / "c", np.arange(3, 8))


def test_fim_needs_its_tokens(text: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "plain.json"
    Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>")).save(str(path))
    with pytest.raises(ConfigError, match=r"data.fim_rate=0.1: .* no fill-in-the-middle tokens"):
        loader(text, tokenizer=str(path), fim_rate=0.1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "exactly one of data.path and data.blend"),
        ({"path": "a", "blend": (Corpus("b"),)}, "exactly one of data.path and data.blend"),
        ({"blend": (Corpus("b"), Corpus("c", -1.0))}, r"data.blend\[1\].weight=-1.0: must be above 0"),
        ({"path": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_wrong_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loader(**config)


def test_too_short_and_truncated_corpora(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.txt has 11,391 tokens, less than one sample"):
        loader(text, seq_len=20_000)
    write(tmp_path / "c", np.array([1, 2, 3, 4, 256]))
    bin_path(tmp_path / "c").write_bytes(b"\0" * 4)
    with pytest.raises(UserError, match="has 4 bytes, its index says 10"):
        loader(tmp_path / "c")


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir(DataConfig()) == tmp_path / "cache" / "dstrain" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert str(cache_dir(DataConfig())) == "/home/a/.cache/dstrain/tokens"
    assert str(cache_dir(DataConfig(cache_dir="here"))) == "here"
