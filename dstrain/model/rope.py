"""Rotary positions (arXiv:2104.09864) on interleaved pairs, stretched by YaRN (arXiv:2309.00071).

Dimension pair (2i, 2i+1) of a position t turns by t * theta^(-2i/R). YaRN slows the pairs that make less than beta_slow
turns over the original context by the extension factor, leaves those that make more than beta_fast alone, and blends
linearly between.

Shapes: T positions, R rotary dimensions.
"""

import math

import torch
from torch import Tensor

from dstrain.config.schema import RopeConfig


def _pair_of_turns(turns: float, dims: int, rope: RopeConfig) -> float:
    """The (fractional) pair index that makes `turns` full turns over the original context."""
    return dims * math.log(rope.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def inverse_frequencies(dims: int, rope: RopeConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair, FP32 [R/2]."""
    plain = rope.theta ** (-torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    if rope.yarn_factor <= 1:
        return plain
    low = max(math.floor(_pair_of_turns(rope.beta_fast, dims, rope)), 0)
    high = min(math.ceil(_pair_of_turns(rope.beta_slow, dims, rope)), dims - 1)
    ramp = (torch.arange(dims // 2, dtype=torch.float32, device=device) - low) / max(high - low, 0.001)
    stretched_share = ramp.clamp(0, 1)
    return plain * (1 - stretched_share) + plain / rope.yarn_factor * stretched_share


def temperature(factor: float, mscale: float) -> float:
    """YaRN's 0.1 m ln(s) + 1; 1 without extension, and for m = 0."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(head_dim: int, rope: RopeConfig) -> float:
    """1/sqrt(head_dim), raised by YaRN's temperature."""
    return head_dim**-0.5 * temperature(rope.yarn_factor, rope.mscale_all_dim) ** 2


def rotation(positions_T: Tensor, dims: int, rope: RopeConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, each FP32 [T, R/2] on the device of `positions_T`."""
    gain = temperature(rope.yarn_factor, rope.mscale) / temperature(rope.yarn_factor, rope.mscale_all_dim)
    angles = positions_T.float()[:, None] * inverse_frequencies(dims, rope, positions_T.device)
    return angles.cos() * gain, angles.sin() * gain


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs of the last dimension, in FP32 or wider; keeps the dtype of x.

    cos and sin must broadcast against x[..., ::2].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # A pair is a complex number, and turning it one multiplication.
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
