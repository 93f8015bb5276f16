"""`dstrain generate`: a prompt continued by the model of a run, printed as it is made."""

import os
import sys
import time
from collections.abc import Iterator

import torch

from dstrain.config.commands import GenerateRoot
from dstrain.data.tokenizer import StreamDecoder
from dstrain.inference.generate import generate
from dstrain.inference.load import load_model

# What a terminal would obey rather than show; lines and tabs may pass.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def run(config: GenerateRoot) -> None:
    """Prints the prompt (dimmed on a terminal) and its continuation; tokens per second go to stderr."""
    model, _, tokenizer = load_model(config.run.dir, config.step, "cuda" if torch.cuda.is_available() else "cpu")
    _show(config.prompt, dim=True)
    start = time.perf_counter()
    tokens = generate(
        model,
        tokenizer.encode(config.prompt) or [tokenizer.eod],
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
    )
    try:
        count = _stream(tokens, StreamDecoder(tokenizer))
    except BrokenPipeError:
        # Whoever read the text has seen enough; what is left must not be flushed at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    seconds = time.perf_counter() - start
    print(f"{count} tokens in {seconds:.2f} s ({count / seconds:.1f} tokens/s)", file=sys.stderr)


def _stream(tokens: Iterator[int], decoder: StreamDecoder) -> int:
    """Shows the tokens as they come and returns their number."""
    count = 0
    for token in tokens:
        _show(decoder.push(token))
        count += 1
    _show(decoder.flush() + "\n")
    return count


def _show(text: str, dim: bool = False) -> None:
    if sys.stdout.isatty():
        text = text.translate(CONTROLS)
        text = f"\033[2m{text}\033[22m" if dim else text
    print(text, end="", flush=True)
