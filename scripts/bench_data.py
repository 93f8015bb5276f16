"""Tokens per second of the data loader alone, cold (page cache dropped) and warm.

python scripts/bench_data.py [--tokens 20000000]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from dstrain.config.schema import DataConfig
from dstrain.data.indexed import TokenWriter, bin_path
from dstrain.data.loader import Loader
from dstrain.data.tokenizer import ByteTokenizer

DOCUMENT_TOKENS = 1000


def write_tokens(prefix: Path, num_tokens: int) -> None:
    """Random bytes in documents of DOCUMENT_TOKENS."""
    tokens = np.random.default_rng(0).integers(0, 256, num_tokens).astype(np.uint16)
    tokens[DOCUMENT_TOKENS - 1 :: DOCUMENT_TOKENS] = ByteTokenizer.eod
    count = num_tokens // DOCUMENT_TOKENS
    with TokenWriter(prefix, tokens.dtype) as writer:
        writer.add(tokens[: count * DOCUMENT_TOKENS], [DOCUMENT_TOKENS] * count, [True] * count)


def drop_cache(path: Path) -> None:
    with open(path, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(loader: Loader, seq_len: int, num_tokens: int) -> float:
    """Tokens per second over one epoch in batches of about 64 Ki tokens."""
    count = max(1, 2**16 // seq_len)
    plan = [(first, count) for first in range(0, num_tokens // seq_len, count)]
    start = time.perf_counter()
    tokens = sum(batch[:, :seq_len].numel() for batch in loader.prefetch(plan))
    return tokens / (time.perf_counter() - start)


def compare(prefix: Path, seq_len: int, fim_rate: float, num_tokens: int) -> None:
    """A cold epoch, then a warm one. Pages leave the cache only while nothing maps them, so the loader opens after."""
    drop_cache(bin_path(prefix))
    loader = Loader(DataConfig(path=str(prefix), fim_rate=fim_rate), seq_len=seq_len, lookahead=2, seed=0)
    cold, warm = (measure(loader, seq_len, num_tokens) for _ in range(2))
    print(f"seq_len {seq_len:5}, fim_rate {fim_rate}: cold {cold / 1e6:6.1f}, warm {warm / 1e6:6.1f} million tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "tokens"
        write_tokens(prefix, args.tokens)
        for seq_len in (256, 4096):
            for fim_rate in (0.0, 0.1):
                compare(prefix, seq_len, fim_rate, args.tokens)


if __name__ == "__main__":
    main()
