"""`dstrain tokenize`: text into a token file pair that `data.path` can name."""

from pathlib import Path

from rich.console import Console

from dstrain.config.commands import TokenizeRoot
from dstrain.data.indexed import TokenFile, bin_path, token_prefix, unigram_entropy
from dstrain.data.tokenize import lock, tokenize
from dstrain.errors import ConfigError


def run(config: TokenizeRoot) -> None:
    """Writes `out`.bin and `out`.idx and says what is in them."""
    data = config.data
    if data.path is None:
        raise ConfigError("data.path", data.path, "there is nothing to tokenise", "Give the path of a corpus.")
    if token_prefix(Path(data.path)) is not None:
        raise ConfigError("data.path", data.path, "is tokenised already", "Use it as data.path of a run.")
    if not config.out:
        raise ConfigError("out", repr(config.out), "the prefix of the files is missing", "Give for example out=corpus.")
    out = Path(config.out.removesuffix(".bin").removesuffix(".idx"))
    with lock(out):
        report = tokenize(Path(data.path), out, data.tokenizer, data.text_key, config.workers)
    rate = report.tokens / report.seconds
    Console().print(
        f"{out}.bin, .idx: {report.documents:,} documents, {report.tokens:,} tokens, "
        f"{bin_path(out).stat().st_size:,} bytes from {report.read_bytes:,} bytes of input "
        f"in {report.seconds:.1f} s ({rate:,.0f} tokens/s); "
        f"unigram entropy {unigram_entropy(TokenFile(out).token_counts()):.4f} nats/token",
        highlight=False,
        soft_wrap=True,
    )
