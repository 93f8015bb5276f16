"""Recomputation by choice: what is named here is computed again in the backward pass instead of being kept.

`norm`, `mla_up` and `swiglu` are DeepSeek-V3's choice (section 3.2.3): cheap to compute, large to keep. What a wrapped
method returns is kept wherever the next product needs it, so a method has to reach past what is to be forgotten.
`mla_up` goes from the latents to the output of attention: queries, keys and values of all heads lie within. `swiglu`
includes the down-projection, which is not run again: recomputation stops at the last tensor that is missing. `attend`
and `experts` are whole phases; `layer` is all that a layer computes. Communication is never repeated: what has arrived
is kept.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from dstrain.model.attention import Attention
from dstrain.model.layer import DenseLayer, MoELayer
from dstrain.model.moe import Experts, FeedForward
from dstrain.model.transformer import Transformer

# Name in train.recompute -> the methods that are wrapped.
METHODS: dict[str, list[tuple[type[nn.Module], str]]] = {
    # With the router, which reads what a norm returns in BF16 even where all others take it in FP8.
    "norm": [(nn.RMSNorm, "forward"), (MoELayer, "route")],
    "mla_up": [(Attention, "attend")],
    "swiglu": [(FeedForward, "lower"), (Experts, "lower")],
    "attend": [(MoELayer, "attend"), (DenseLayer, "attention")],
    "experts": [(Experts, "forward")],
    "layer": [(MoELayer, "attend"), (MoELayer, "shared"), (Experts, "forward"), (DenseLayer, "forward")],
}


def _forgets_swiglu(module: nn.Module) -> bool:
    """In FP8 SwiGLU is computed again as it is, from an input kept in FP8; wrapped, it would be kept in BF16."""
    return getattr(module.down if isinstance(module, FeedForward) else module, "products", None) is not None


def apply_recompute(model: Transformer, names: tuple[str, ...]) -> None:
    """Wraps the named methods of every module of `model`; the model draws no random numbers, so none are replayed."""
    for name in names:
        for kind, method in METHODS[name]:
            for module in model.modules():
                if isinstance(module, kind) and not (name == "swiglu" and _forgets_swiglu(module)):
                    again = partial(checkpoint, getattr(module, method), use_reentrant=False, preserve_rng_state=False)
                    setattr(module, method, again)
