"""What a model costs, counted from its dimensions alone: parameters, floating-point operations, cache bytes.

A weight matrix of n values costs a token 2n operations forward and 4n backward; causal attention over S positions lets
a token see (S + 1) / 2 of them on average. DeepSeek-V3 comes out at 671,026,404,352 parameters (671.026B; the FP32
balancing biases of the router, buffers that no gradient reaches, are 14,848 more and not counted), 250.46 GFLOP per
token at 4K without MTP, and 70,272 bytes of BF16 cache per token.

D hidden, H heads, V vocabulary, E experts, I expert width.
"""

from dataclasses import dataclass
from math import ceil

from dstrain.config.schema import ModelConfig, PartCosts
from dstrain.errors import ConfigError


@dataclass(frozen=True)
class Parameters:
    """Parameters by part. MTP is counted beside the main model, as DeepSeek does: embedding and head are shared."""

    embedding: int
    # 0 when tied to the embedding.
    head: int
    # All layers, without norms.
    attention: int
    dense_mlp: int
    router: int
    shared_experts: int
    routed_experts: int
    norms: int
    # Everything that the MTP modules own, and of it their routed experts.
    mtp: int
    mtp_routed_experts: int
    # Share of the routed experts that a token uses.
    active_share: float

    @property
    def total(self) -> int:
        """The main model, as published sizes are counted."""
        return self.dense + self.routed_experts

    @property
    def dense(self) -> int:
        """What every rank of an expert-parallel group holds in full (without MTP)."""
        parts = (self.embedding, self.head, self.attention, self.dense_mlp, self.router, self.shared_experts)
        return sum(parts) + self.norms

    @property
    def active(self) -> int:
        """What one token uses, both embedding tables included."""
        return self.dense + round(self.routed_experts * self.active_share)

    @property
    def trained(self) -> int:
        """Everything the optimiser updates: the main model and the MTP modules."""
        return self.total + self.mtp

    def on_rank(self, ep: int) -> int:
        """Parameters that a rank computes with when the experts are spread over `ep` ranks."""
        return self.trained - (self.routed_experts + self.mtp_routed_experts) * (ep - 1) // ep


def parameters(model: ModelConfig) -> Parameters:
    """Counts the matrices of ARCHITECTURE.md, "Names of tensors"; needs `model.vocab_size`."""
    D, V = model.hidden_size, _vocab_size(model)
    moe_layers = model.num_layers - model.num_dense_layers
    return Parameters(
        embedding=V * D,
        head=0 if model.tie_embeddings else V * D,
        attention=model.num_layers * attention_weights(model),
        dense_mlp=model.num_dense_layers * 3 * D * model.intermediate_size,
        router=moe_layers * model.num_experts * D,
        shared_experts=moe_layers * model.num_shared_experts * expert_weights(model),
        routed_experts=moe_layers * model.num_experts * expert_weights(model),
        norms=model.num_layers * _layer_norms(model) + D,
        mtp=model.mtp.depth * _mtp_module(model),
        mtp_routed_experts=model.mtp.depth * model.num_experts * expert_weights(model),
        active_share=model.experts_per_token / model.num_experts,
    )


def attention_weights(model: ModelConfig) -> int:
    """Matrices of one MLA layer."""
    D, H = model.hidden_size, model.num_heads
    queries = H * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    q = D * queries if model.q_lora_rank is None else model.q_lora_rank * (D + queries)
    kv_a = D * (model.kv_lora_rank + model.qk_rope_head_dim)
    kv_b = model.kv_lora_rank * H * (model.qk_nope_head_dim + model.v_head_dim)
    return q + kv_a + kv_b + H * model.v_head_dim * D


def expert_weights(model: ModelConfig) -> int:
    """Gate, up and down of one expert."""
    return 3 * model.hidden_size * model.moe_intermediate_size


def flops_per_token(model: ModelConfig, seq_len: int, *, mtp: bool = True) -> float:
    """Operations of a forward and a backward pass for one token of a sequence of `seq_len`; recomputation is extra.

    With `mtp`, the modules and their use of the shared head are added. Embedding look-ups, norms, rotary positions and
    activation functions are not counted, as everywhere in the field.
    """
    parts, moe_layers = part_flops(model, seq_len), model.num_layers - model.num_dense_layers
    flops = model.num_dense_layers * parts.dense + moe_layers * parts.moe + parts.head
    return flops + model.mtp.depth * parts.mtp if mtp else flops


def part_flops(model: ModelConfig, seq_len: int) -> PartCosts:
    """The same for each part of a model, of layers and MTP modules for one of them."""
    attention = 6 * attention_weights(model) + 6 * model.num_heads * _head_dims(model) * (seq_len + 1) / 2
    head = 6 * model.hidden_size * _vocab_size(model)
    moe = attention + 6 * _moe_active(model)
    return PartCosts(
        dense=attention + 6 * 3 * model.hidden_size * model.intermediate_size,
        moe=moe,
        mtp=moe + 6 * 2 * model.hidden_size**2 + head,
        head=head,
    )


def cache_values_per_token(model: ModelConfig) -> int:
    """Values that MLA keeps per token and layer: the latent and one shared rotary key."""
    return model.kv_lora_rank + model.qk_rope_head_dim


def cache_bytes_per_token(model: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes of cache per token over all layers."""
    return model.num_layers * cache_values_per_token(model) * bytes_per_value


def rank_state_gib(model: ModelConfig, *, ep: int, dp: int, moments_bytes: int = 2) -> float:
    """Memory of weights, gradients and optimiser on one rank under ZeRO-1, in GiB; activations come on top.

    BF16 weights (2 bytes) and FP32 gradients (4) of what the rank computes with; FP32 master (4) and two moments of
    its share: the experts are shared by dp ranks, everything else by dp * ep.
    """
    counted = parameters(model)
    held = counted.on_rank(ep)
    experts = (counted.routed_experts + counted.mtp_routed_experts) // ep
    owned = ceil(experts / dp) + ceil((held - experts) / (dp * ep))
    return (held * (2 + 4) + owned * (4 + 2 * moments_bytes)) / 2**30


def _vocab_size(model: ModelConfig) -> int:
    if model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size", None, "a model can't be counted without it", "Give the size of the vocabulary."
        )
    return model.vocab_size


def _head_dims(model: ModelConfig) -> int:
    return model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim


def _layer_norms(model: ModelConfig) -> int:
    return 2 * model.hidden_size + model.kv_lora_rank + (model.q_lora_rank or 0)


def _moe_active(model: ModelConfig) -> int:
    used = model.num_shared_experts + model.experts_per_token
    return used * expert_weights(model) + model.num_experts * model.hidden_size


def _mtp_module(model: ModelConfig) -> int:
    D = model.hidden_size
    experts = (model.num_shared_experts + model.num_experts) * expert_weights(model) + model.num_experts * D
    return 2 * D * D + 3 * D + attention_weights(model) + _layer_norms(model) + experts
