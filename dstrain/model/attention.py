"""Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values share one narrow latent.

    c = norm(W_kv_a x)[:C]                 the latent: all that a cache has to keep,
    r = rope((W_kv_a x)[C:])               together with one rotary key shared by all heads
    k, v = W_kv_b c                        per head: key without position, value
    q = W_q_b norm(W_q_a x)  or  W_q x     per head: part without position, rotary part

`forward` is the training form. The absorbed form, which attends to the latent itself, is in inference/.

Shapes: B sequences, T tokens, D hidden, H heads, C latent rank, N nope, R rope, V value dimensions of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.config.schema import ModelConfig
from dstrain.model.rope import rotate, softmax_scale
from dstrain.precision.linear import Linear


def causal_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, scale: float) -> Tensor:
    """Causal softmax attention, [B, H, T, V].

    Values are padded to the width of the keys where they are narrower: the fused kernels of torch want equal widths,
    and without one the T x T scores would be materialised.
    """
    width = v_BHTV.shape[-1]
    padded = F.pad(v_BHTV, (0, q_BHTK.shape[-1] - width)) if width < q_BHTK.shape[-1] else v_BHTV
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, padded, is_causal=True, scale=scale)[..., :width]


class Attention(nn.Module):
    """MLA: [B, T, D] -> [B, T, D]. `q_lora_rank=None` gives full-rank queries (V2-Lite)."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.num_heads = model.num_heads
        self.nope, self.rope, self.value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
        self.latent = model.kv_lora_rank
        self.scale = softmax_scale(self.nope + self.rope, model.rope)
        q_width = self.num_heads * (self.nope + self.rope)
        if model.q_lora_rank is None:
            self.q = Linear(model.hidden_size, q_width)
        else:
            self.q_a = Linear(model.hidden_size, model.q_lora_rank)
            self.q_a_norm = nn.RMSNorm(model.q_lora_rank, eps=model.norm_eps)
            self.q_b = Linear(model.q_lora_rank, q_width)
        self.kv_a = Linear(model.hidden_size, self.latent + self.rope)
        self.kv_a_norm = nn.RMSNorm(self.latent, eps=model.norm_eps)
        self.kv_b = Linear(self.latent, self.num_heads * (self.nope + self.value))
        self.o = Linear(self.num_heads * self.value, model.hidden_size)

    def query_latent(self, x_BTD: Tensor) -> Tensor:
        """What the query heads are made from: the compressed, normalised query, or x itself at full rank."""
        return self.q_b.prepared(self.q_a_norm(self.q_a(x_BTD))) if hasattr(self, "q_a") else x_BTD

    def query_heads(self, latent_BTQ: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Queries without position [B, T, H, N] and rotary queries [B, T, H, R]."""
        up = self.q_b if hasattr(self, "q_b") else self.q
        q_BTHK = up(latent_BTQ).unflatten(-1, (self.num_heads, -1))
        q_nope, q_rope = q_BTHK.split((self.nope, self.rope), dim=-1)
        return q_nope, rotate(q_rope, cos_TR[:, None], sin_TR[:, None])

    def compress(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised latent [B, T, C] and the shared rotary key [B, T, R]: what a cache keeps."""
        latent, k_rope = self.kv_a(x_BTD).split((self.latent, self.rope), dim=-1)
        return self.kv_a_norm(latent), rotate(k_rope, cos_TR, sin_TR)

    def expand(
        self, q_latent: Tensor, latent_BTC: Tensor, k_rope_BTR: Tensor, cos_TR: Tensor, sin_TR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Up-projects latents to the query, key and value heads, each [B, H, T, .]."""
        q = torch.cat(self.query_heads(q_latent, cos_TR, sin_TR), dim=-1)
        k_nope, v = self.kv_b(latent_BTC).unflatten(-1, (self.num_heads, -1)).split((self.nope, self.value), dim=-1)
        k_rope = k_rope_BTR[:, :, None].expand(-1, -1, self.num_heads, -1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(
        self, q_latent: Tensor, latent_BTC: Tensor, k_rope_BTR: Tensor, cos_TR: Tensor, sin_TR: Tensor
    ) -> Tensor:
        """From the latents to the heads' results side by side, [B, T, H * V]."""
        q, k, v = self.expand(q_latent, latent_BTC, k_rope_BTR, cos_TR, sin_TR)
        return causal_attention(q, k, v, self.scale).transpose(1, 2).flatten(-2)

    def forward(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        x_BTD = self.kv_a.prepared(x_BTD, self.q_a if hasattr(self, "q_a") else self.q)
        latent, k_rope = self.compress(x_BTD, cos_TR, sin_TR)
        latents = self.query_latent(x_BTD), self.kv_b.prepared(latent)
        return self.o(self.attend(*latents, k_rope, cos_TR, sin_TR))
