"""Batches as a function of position: sample p of a run is the same whatever the ranks, and a resume needs only p."""

import os
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dstrain.config import schema
from dstrain.data.indexed import TokenFile
from dstrain.data.samples import Corpus, TokenStream
from dstrain.data.shuffle import blend, blend_shares, derive_key
from dstrain.data.tokenize import cached_tokens
from dstrain.data.tokenizer import Tokenizer, load_tokenizer
from dstrain.errors import ConfigError, UserError

# Uses of the seed that must not share random numbers.
ORDER, FIM = 1, 2


class Loader:
    """Opens the corpora of `config`, tokenising text into the cache first (one process does, the others wait).

    Raises UserError or ConfigError for a missing, empty, truncated or too short corpus, for a tokenizer that is larger
    than the model's `vocab_size` or lacks fill-in-the-middle tokens, and for token files of another tokenizer.
    """

    def __init__(
        self, config: schema.DataConfig, *, seq_len: int, lookahead: int, seed: int, vocab_size: int | None = None
    ):
        self.tokenizer = load_tokenizer(config.tokenizer)
        _check_tokenizer(self.tokenizer, config, vocab_size)
        parts = _parts(config)
        self._shares = blend_shares([part.weight for part in parts])
        self._prefetch_batches = config.prefetch_batches
        self.num_tokens = 0
        self._corpora: list[Corpus] = []
        for number, part in enumerate(parts):
            file = cached_tokens(Path(part.path), config.tokenizer, config.text_key, cache_dir(config))
            _check_eod(file, self.tokenizer, config.tokenizer)
            stream = TokenStream(file, self.tokenizer.fim, config.fim_rate, derive_key(seed, FIM, number))
            key = derive_key(seed, ORDER, number)
            self._corpora.append(Corpus(stream, seq_len=seq_len, lookahead=lookahead, key=key, name=part.path))
            self.num_tokens += stream.length

    def batch(self, first: int, count: int) -> Tensor:
        """Samples [first, first + count) of the run: int64 [count, seq_len + lookahead]."""
        batch = torch.from_numpy(np.stack([self._sample(first + n) for n in range(count)]).astype(np.int64, copy=False))
        if batch.max() >= self.tokenizer.vocab_size or batch.min() < 0:
            raise UserError(
                f"the corpus holds token {int(batch.max() if batch.min() >= 0 else batch.min())}, "
                f"but data.tokenizer has 0 to {self.tokenizer.vocab_size - 1}. "
                f"Give the tokenizer that the token files were made with."
            )
        return batch

    def _sample(self, position: int) -> np.ndarray:
        corpus, own_position = blend(position, self._shares)
        return self._corpora[corpus].sample(own_position)

    def prefetch(self, plan: Iterable[tuple[int, int]]) -> Generator[Tensor, None, None]:
        """`batch(first, count)` for each of `plan`, prepared up to `prefetch_batches` ahead in a background thread.

        An error in the thread is raised here in its turn. Closing the iterator ends the thread.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        waiting: deque[Future[Tensor]] = deque()
        try:
            for first, count in plan:
                waiting.append(pool.submit(self.batch, first, count))
                if len(waiting) > self._prefetch_batches:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def cache_dir(config: schema.DataConfig) -> Path:
    """Where token files made from text are kept."""
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dstrain" / "tokens"


def _parts(config: schema.DataConfig) -> tuple[schema.Corpus, ...]:
    if (config.path is None) == (not config.blend):
        raise ConfigError(
            "data.path", config.path, "give exactly one of data.path and data.blend", "Set or remove one."
        )
    for number, part in enumerate(config.blend):
        if not 0 < part.weight < float("inf"):
            raise ConfigError(
                f"data.blend[{number}].weight", part.weight, "must be above 0", "Or leave the corpus out."
            )
    return config.blend or (schema.Corpus(path=config.path or ""),)


def _check_tokenizer(tokenizer: Tokenizer, config: schema.DataConfig, vocab_size: int | None) -> None:
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        rule = f"the tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens"
        raise ConfigError("model.vocab_size", vocab_size, rule, "Give at least as many, or null to have it derived.")
    if config.fim_rate > 0 and tokenizer.fim is None:
        rule = f"the tokenizer {config.tokenizer} has no fill-in-the-middle tokens (such as <｜fim▁begin｜>)"
        raise ConfigError("data.fim_rate", config.fim_rate, rule, "Add them to the tokenizer, or set 0.")


def _check_eod(file: TokenFile, tokenizer: Tokenizer, spec: str) -> None:
    """Token files of another tokenizer, or made without end-of-document tokens, are seen at their first document."""
    if int(file.document(0)[-1]) != tokenizer.eod:
        raise UserError(
            f"{file.prefix}: its first document ends with token {int(file.document(0)[-1])}, not with "
            f"{tokenizer.eod}, the end of document of data.tokenizer={spec}. Give the tokenizer that made the file; "
            f"Megatron's preprocess_data.py needs --append-eod."
        )
