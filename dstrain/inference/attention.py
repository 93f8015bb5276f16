"""MLA over the cache, without ever making keys and values (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

A key is linear in the latent, so its matrix can move over to the query, and that of the value behind the sum:

    q . (W_k c) + q_r . r  =  [W_k^T q ; q_r] . [c ; r]        sum_s p_s (W_v c_s)  =  W_v (sum_s p_s c_s)

What is left is attention with a single key and value head, the cache itself, that all query heads share.

Shapes: B sequences, T new tokens, S tokens up to and with them, H heads, N nope, R rope, V value dimensions, C latent
rank, K = C + R, D hidden.
"""

import torch
from torch import Tensor

from dstrain.inference.cache import LatentCache
from dstrain.model.attention import Attention, causal_attention


def cached_attention(
    attn: Attention, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache: LatentCache, layer: int
) -> Tensor:
    """`attn(x)` for tokens that follow those in the cache; keeps them. [B, T, D].

    The first tokens of a sequence have nothing but themselves to see: they take the training form, which a fused
    kernel computes without the T x T scores.
    """
    latent_BTC, k_rope_BTR = attn.compress(x_BTD, cos_TR, sin_TR)
    kept_BSK = cache.append(layer, latent_BTC, k_rope_BTR)
    q_latent = attn.query_latent(x_BTD)
    if cache.length == 0:
        q, k, v = attn.expand(q_latent, latent_BTC, k_rope_BTR, cos_TR, sin_TR)
        out_BTHV = causal_attention(q, k, v, attn.scale).transpose(1, 2)
    else:
        q_nope, q_rope = attn.query_heads(q_latent, cos_TR, sin_TR)
        out_BTHV = absorbed_attention(attn, q_nope, q_rope, kept_BSK)
    return attn.o(out_BTHV.flatten(-2))


def absorbed_attention(attn: Attention, q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, kept_BSK: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens to all S, [B, T, H, V]; scores and sums in FP32 or wider."""
    wide = torch.promote_types(kept_BSK.dtype, torch.float32)
    k_up_HNC, v_up_HVC = attn.kv_b.weight.unflatten(0, (attn.num_heads, -1)).split((attn.nope, attn.value), dim=1)
    q_BTHC = torch.einsum("bthn,hnc->bthc", q_nope_BTHN, k_up_HNC)
    q_BTHK = torch.cat((q_BTHC, q_rope_BTHR), dim=-1).to(wide)
    keys_BSK = kept_BSK.to(wide)
    # One matrix product for all heads: the rows of all heads meet the same keys.
    scores_BTHS = (q_BTHK.flatten(1, 2) @ keys_BSK.mT).unflatten(1, q_BTHK.shape[1:3]) * attn.scale
    probs_BTHS = scores_BTHS.masked_fill(_unseen(scores_BTHS), -torch.inf).softmax(-1)
    mixed_BRC = probs_BTHS.flatten(1, 2) @ keys_BSK[..., : attn.latent]
    mixed_BTHC = mixed_BRC.unflatten(1, q_BTHK.shape[1:3]).to(kept_BSK.dtype)
    return torch.einsum("bthc,hvc->bthv", mixed_BTHC, v_up_HVC)


def _unseen(scores_BTHS: Tensor) -> Tensor:
    """True where a token would look ahead, [T, 1, S]."""
    new, _, seen = scores_BTHS.shape[1:]
    positions_S = torch.arange(seen, device=scores_BTHS.device)
    return positions_S > positions_S[seen - new :, None, None]
