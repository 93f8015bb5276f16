"""Tokens per second of greedy generation with the compressed cache, against computing the whole text again each time.

python scripts/bench_generate.py [--length 512]
"""

import argparse
import time
from collections.abc import Iterator
from itertools import islice

import torch

from dstrain.config.schema import ModelConfig
from dstrain.dispatch.local import LocalDispatcher
from dstrain.inference.cache import LatentCache
from dstrain.inference.generate import generate
from dstrain.model.init import init_weights
from dstrain.model.transformer import Transformer


def tiny_model() -> Transformer:
    config = ModelConfig(vocab_size=320, init_std=0.1)
    model = Transformer(config, range(config.num_experts), LocalDispatcher(config.num_experts))
    init_weights(model, seed=0)
    return model


@torch.inference_mode()
def recompute(model: Transformer, tokens: list[int]) -> Iterator[int]:
    """Greedy text without a cache."""
    tokens = list(tokens)
    while True:
        hidden_1TD = model.hidden(torch.tensor([tokens]))
        tokens.append(int(model.scores(hidden_1TD[0, -1]).argmax()))
        yield tokens[-1]


def rate(stream: Iterator[int], count: int) -> tuple[float, list[int]]:
    """Tokens per second after the first, and the tokens."""
    first = next(stream)
    start = time.perf_counter()
    rest = list(islice(stream, count))
    return count / (time.perf_counter() - start), [first, *rest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens in front of the timed ones")
    parser.add_argument("--count", type=int, default=32, help="tokens that are timed")
    args = parser.parse_args()
    model = tiny_model()
    prompt = torch.randint(0, 256, (args.length,), generator=torch.Generator().manual_seed(0)).tolist()
    greedy = {"temperature": 0.0, "top_p": 1.0, "seed": 0}
    cached, text = rate(generate(model, prompt, max_tokens=args.count + 1, **greedy), args.count)
    plain, plain_text = rate(recompute(model, prompt), args.count)
    cache = LatentCache(model.config, 1, 1, dtype=torch.float32, device="cpu")
    print(
        f"after {args.length} tokens, {torch.get_num_threads()} threads: cache {cached:.1f} tokens/s, "
        f"recomputed {plain:.1f} tokens/s, ratio {cached / plain:.1f}; "
        f"{'same' if text == plain_text else 'DIFFERENT'} text; {cache.bytes_per_token:,} bytes of FP32 per token"
    )


if __name__ == "__main__":
    main()
