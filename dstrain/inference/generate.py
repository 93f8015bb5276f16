"""Text from a model, one token at a time: what has been seen stays in the cache, and only the new token is computed.

Shapes: B sequences, T new tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from dstrain.inference.attention import cached_attention
from dstrain.inference.cache import LatentCache
from dstrain.model.layer import DenseLayer, MoELayer
from dstrain.model.transformer import Transformer


@torch.no_grad()
def advance(model: Transformer, tokens_BT: Tensor, cache: LatentCache) -> Tensor:
    """`model.hidden` for the tokens that follow those in the cache, which takes them in: [B, T, D]."""
    cos, sin = cache.rotation(tokens_BT.shape[1])
    x_BTD = model.embed(tokens_BT)
    for number, layer in enumerate(cast("list[DenseLayer | MoELayer]", model.layers)):
        x_BTD = x_BTD + cached_attention(layer.attn, layer.attn_norm(x_BTD), cos, sin, cache, number)
        x_BTD = layer.feed_forward(x_BTD)
    cache.length += tokens_BT.shape[1]
    return model.norm(x_BTD)


@torch.inference_mode()
def generate(
    model: Transformer,
    tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    eod: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yields up to `max_tokens` tokens after `tokens` (at least one), each as soon as it is known; ends before `eod`.

    Temperature 0 takes the likeliest token. `vocab_size` leaves out the tokens from there on, which only pad the
    model's vocabulary. The seed alone decides between equally distributed continuations: no other random state is
    read or changed. Rotary positions go beyond the trained length, the quality of the text need not.
    """
    if not tokens:
        raise ValueError("a prompt needs at least one token, such as the end of a document")
    weight = model.embed.weight
    cache = LatentCache(model.config, 1, len(tokens) + max_tokens, dtype=weight.dtype, device=weight.device)
    generator = torch.Generator(weight.device).manual_seed(seed)
    new = list(tokens)
    for _ in range(max_tokens):
        hidden_1TD = advance(model, torch.tensor([new], device=weight.device), cache)
        logits_V = model.scores(hidden_1TD[0, -1])[:vocab_size]
        token = choose(logits_V, temperature, top_p, generator)
        if token == eod:
            return
        yield token
        new = [token]


def choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token drawn from softmax(logits / temperature), cut down to its nucleus; the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V = nucleus((logits_V.float() / temperature).softmax(-1), top_p)
    return int(probs_V.multinomial(1, generator=generator))


def nucleus(probs_V: Tensor, top_p: float) -> Tensor:
    """Zero outside the smallest set of likeliest tokens that holds `top_p` (arXiv:1904.09751), [V].

    Nothing comes before the likeliest token, so it stays however small `top_p` > 0 is.
    """
    ordered_V, order_V = probs_V.sort(descending=True, stable=True)
    before_V = ordered_V.cumsum(-1) - ordered_V
    return torch.zeros_like(probs_V).scatter(-1, order_V, ordered_V.masked_fill(before_V >= top_p, 0.0))
