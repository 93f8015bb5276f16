"""The dimensions of a transformer as the planner counts with them: MLA or grouped queries, experts or none.

dstrain trains MLA/MoE models; others are here so that predictions can be compared with what others have measured.

D hidden, H heads, V vocabulary, E experts, F dense width, I expert width. A gated feed-forward network has three
matrices, another one two.
"""

from dataclasses import dataclass
from functools import cached_property

from dstrain.config.schema import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """Widths in values. `kv_rank` 0: grouped-query attention, without latents; `experts` 0: a dense model."""

    name: str
    vocab: int
    hidden: int
    layers: int
    # The first layers have a dense feed-forward network.
    dense_layers: int
    heads: int
    kv_heads: int
    # Of a head: queries and keys (rotary part included), values.
    qk_dim: int
    v_dim: int
    # MLA; of the queries 0 where they are not compressed.
    q_rank: int
    kv_rank: int
    rope_dim: int
    ffn: int
    gated: bool
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    # All shared experts together.
    shared_ffn: int = 0
    # Groups of experts, and how many of them a token uses.
    groups: int = 1
    groups_per_token: int = 1
    mtp: int = 0
    tied: bool = False

    @staticmethod
    def of(model: ModelConfig) -> "Architecture":
        """Of a config whose vocabulary is known."""
        assert model.vocab_size is not None
        return Architecture(
            name="",
            vocab=model.vocab_size,
            hidden=model.hidden_size,
            layers=model.num_layers,
            dense_layers=model.num_dense_layers,
            heads=model.num_heads,
            kv_heads=model.num_heads,
            qk_dim=model.qk_nope_head_dim + model.qk_rope_head_dim,
            v_dim=model.v_head_dim,
            q_rank=model.q_lora_rank or 0,
            kv_rank=model.kv_lora_rank,
            rope_dim=model.qk_rope_head_dim,
            ffn=model.intermediate_size,
            gated=True,
            experts=model.num_experts,
            experts_per_token=model.experts_per_token,
            expert_ffn=model.moe_intermediate_size,
            shared_ffn=model.num_shared_experts * model.moe_intermediate_size,
            groups=model.router.num_groups,
            groups_per_token=model.router.groups_per_token,
            mtp=model.mtp.depth,
            tied=model.tie_embeddings,
        )

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def is_mla(self) -> bool:
        return self.kv_rank > 0

    @cached_property
    def attention_matrices(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of every projection of a layer; those of one input are one product where kernels fuse them."""
        D, queries, values = self.hidden, self.heads * self.qk_dim, self.heads * self.v_dim
        if not self.is_mla:
            return ((queries + self.kv_heads * (self.qk_dim + self.v_dim), D), (D, values))
        q = ((self.q_rank, D), (queries, self.q_rank)) if self.q_rank else ((queries, D),)
        up = self.heads * (self.qk_dim - self.rope_dim + self.v_dim)
        return (*q, (self.kv_rank + self.rope_dim, D), (up, self.kv_rank), (D, values))

    @cached_property
    def attention_weights(self) -> int:
        return sum(out * wide for out, wide in self.attention_matrices)

    @cached_property
    def norm_weights(self) -> int:
        return 2 * self.hidden + self.kv_rank + self.q_rank

    @property
    def matrices_of_ffn(self) -> int:
        return 3 if self.gated else 2

    def ffn_weights(self, width: int) -> int:
        """Of a feed-forward network, or an expert, of that width."""
        return self.matrices_of_ffn * self.hidden * width

    @cached_property
    def moe_dense_weights(self) -> int:
        """Of the feed-forward part of an MoE layer what is no routed expert: shared experts and router."""
        return self.ffn_weights(self.shared_ffn) + self.experts * self.hidden

    @cached_property
    def expert_weights(self) -> int:
        """Of one routed expert."""
        return self.ffn_weights(self.expert_ffn)

    @property
    def embedding_weights(self) -> int:
        return self.vocab * self.hidden

    @cached_property
    def total(self) -> int:
        """All parameters, MTP modules without."""
        layer = self.attention_weights + self.norm_weights
        moe = self.moe_dense_weights + self.experts * self.expert_weights
        tables = self.embedding_weights * (1 if self.tied else 2) + self.hidden
        return self.layers * layer + self.dense_layers * self.ffn_weights(self.ffn) + self.moe_layers * moe + tables

    @cached_property
    def active(self) -> int:
        """Weights that a token is multiplied with, head included, embedding and norms not; MTP modules without."""
        moe = self.moe_dense_weights + self.experts_per_token * self.expert_weights
        dense = self.dense_layers * self.ffn_weights(self.ffn)
        return self.layers * self.attention_weights + dense + self.moe_layers * moe + self.embedding_weights

    def flops_per_token(self, seq_len: int) -> float:
        """Of a forward and a backward pass, as plan.count.flops_per_token counts them; MTP modules are included."""
        attention = 6 * self.heads * (self.qk_dim + self.v_dim) * (seq_len + 1) / 2
        flops = 6 * self.active + self.layers * attention
        if not self.mtp:
            return flops
        layer = self.attention_weights + self.moe_dense_weights + self.experts_per_token * self.expert_weights
        return flops + self.mtp * (6 * (layer + 2 * self.hidden**2 + self.embedding_weights) + attention)
