"""DeepSeek-V2/V3 tensors on the Hugging Face disk format, and ours.

The disk has a tensor for every expert and one each for gate and up; ours are the same rows, one after the other:

    layers.3.moe.experts.gate_up [E, 2I, D]  =  rows of experts.0.gate_proj, experts.0.up_proj, experts.1.gate_proj, ...

RoPE dimensions are interleaved on both sides, and no value changes. An MTP module follows the last layer as one more;
its embedding and head are the model's, which the disk repeats.

D hidden, E experts, I expert width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dstrain.config.schema import ModelConfig
from dstrain.dispatch.local import LocalDispatcher
from dstrain.errors import UserError
from dstrain.model.transformer import Transformer

Table = dict[str, tuple[str, ...]]

MODEL: Table = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}

LAYER: Table = {
    "attn_norm.weight": ("input_layernorm.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "attn.q.weight": ("self_attn.q_proj.weight",),
    "attn.q_a.weight": ("self_attn.q_a_proj.weight",),
    "attn.q_a_norm.weight": ("self_attn.q_a_layernorm.weight",),
    "attn.q_b.weight": ("self_attn.q_b_proj.weight",),
    "attn.kv_a.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attn.kv_a_norm.weight": ("self_attn.kv_a_layernorm.weight",),
    "attn.kv_b.weight": ("self_attn.kv_b_proj.weight",),
    "attn.o.weight": ("self_attn.o_proj.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
    "moe.router.weight": ("mlp.gate.weight",),
    "moe.router.bias": ("mlp.gate.e_score_correction_bias",),
    "moe.experts.gate_up": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "moe.experts.down": ("mlp.experts.{expert}.down_proj.weight",),
    "moe.shared.gate_up.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "moe.shared.down.weight": ("mlp.shared_experts.down_proj.weight",),
}

# Besides a whole layer.
MTP: Table = {
    "embed_norm.weight": ("enorm.weight",),
    "hidden_norm.weight": ("hnorm.weight",),
    "proj.weight": ("eh_proj.weight",),
    "norm.weight": ("shared_head.norm.weight",),
}

# What the FP8 format stores in FP8: the matrices of attention and of the feed-forward networks.
FP8 = {
    *(f"attn.{part}.weight" for part in ("q", "q_a", "q_b", "kv_a", "kv_b", "o")),
    *(name for name in LAYER if name.startswith(("mlp.", "moe.experts.", "moe.shared."))),
}


@dataclass(frozen=True)
class LogicalTensor:
    """One of our tensors: what it is called here and on the disk."""

    name: str
    shape: tuple[int, ...]
    # The disk's tensors, in the order of our rows.
    parts: tuple[str, ...]
    # Names under which the disk repeats the whole tensor.
    copies: tuple[str, ...]
    # Whether the FP8 format quantises it.
    is_fp8: bool
    # Always FP32 on the disk.
    is_bias: bool

    @property
    def key(self) -> str:
        """Its name in a checkpoint."""
        return f"{'buffer' if self.is_bias else 'master'}/{self.name}"

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The disk's tensors, as views; the copies last."""
        if len(self.parts) == 1:
            yield self.parts[0], tensor.reshape(tensor.shape[-2:])
        elif self.parts:
            yield from zip(self.parts, tensor.flatten(0, -2).chunk(len(self.parts)), strict=True)
        yield from ((name, tensor) for name in self.copies)

    def join(self, disk: Mapping[str, Tensor]) -> Tensor:
        """The whole in FP32 from the disk's tensors; UserError where one is absent, misshapen, or an unequal copy."""
        whole = torch.zeros(self.shape, dtype=torch.float32)
        for name, part in self.split(whole):
            if name in self.copies:
                self._compare(name, disk, whole)
            else:
                part.copy_(_find(name, disk, tuple(part.shape)))
        return whole

    def _compare(self, copy: str, disk: Mapping[str, Tensor], whole: Tensor) -> None:
        if copy in disk and not torch.equal(disk[copy].float(), whole):
            raise UserError(
                f"{copy} differs from {self.parts[0]}, but dstrain shares embedding and head between the model and its "
                "MTP modules. Set num_nextn_predict_layers to 0 in config.json to import the model without them."
            )


def _find(name: str, disk: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    if name not in disk:
        raise UserError(f"The weights have no tensor {name}, which config.json implies. Is a file missing?")
    found = disk[name]
    if tuple(found.shape) != shape:
        raise UserError(
            f"{name} has the shape {list(found.shape)}, but config.json implies {list(shape)}. "
            "The weights and config.json belong to different models."
        )
    return found


def logical_tensors(model: ModelConfig) -> list[LogicalTensor]:
    """Every tensor of the model, router biases included, in the order of the layers."""
    with torch.device("meta"):
        transformer = Transformer(model, range(model.num_experts), LocalDispatcher(model.num_experts))
    return [_logical_tensor(name, tuple(meta.shape), model) for name, meta in transformer.state_dict().items()]


def _logical_tensor(name: str, shape: tuple[int, ...], model: ModelConfig) -> LogicalTensor:
    prefix, inner, table = _place(name, model)
    if inner not in table:
        raise UserError(f"{name} has no counterpart in a Hugging Face DeepSeek model.")
    parts = tuple(
        prefix + part.format(expert=expert)
        for expert in range(model.num_experts if "{expert}" in table[inner][0] else 1)
        for part in table[inner]
    )
    is_bias = inner == "moe.router.bias"
    # V2 has no balancing bias to store.
    stored = () if is_bias and model.router.score == "softmax" else parts
    return LogicalTensor(name, shape, stored, _copies(name, model), inner in FP8, is_bias)


def _place(name: str, model: ModelConfig) -> tuple[str, str, Table]:
    """The disk's prefix, the rest of our name, and the table that has it."""
    head, _, rest = name.partition(".")
    if head not in ("layers", "mtp"):
        return "", name, MODEL
    number, _, inner = rest.partition(".")
    if head == "layers":
        return f"model.layers.{number}.", inner, LAYER
    prefix = f"model.layers.{model.num_layers + int(number)}."
    if inner.startswith("layer."):
        return prefix, inner.removeprefix("layer."), LAYER
    return prefix, inner, MTP


def _copies(name: str, model: ModelConfig) -> tuple[str, ...]:
    repeated = {
        "embed.weight": ["embed_tokens.weight"] + ["shared_head.head.weight"] * model.tie_embeddings,
        "head.weight": ["shared_head.head.weight"],
    }
    mtp_layers = range(model.num_layers, model.num_layers + model.mtp.depth)
    return tuple(f"model.layers.{n}.{copy}" for n in mtp_layers for copy in repeated.get(name, ()))
