"""What MLA remembers of a token: one latent and one rotary key per layer, for all heads together.

DeepSeek-V3 keeps 512 + 64 values per token and layer, 70,272 bytes of BF16 per token, where keys and values of its 128
heads would take 71 times as much.

Shapes: L layers, B sequences, S tokens there is room for, T new tokens, C latent rank, R rope dimensions.
"""

import torch
from torch import Tensor

from dstrain.config.schema import ModelConfig
from dstrain.model.rope import rotation


class LatentCache:
    """Room for `capacity` tokens of `sequences` sequences of equal length; `length` of them have been seen."""

    def __init__(
        self, model: ModelConfig, sequences: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ):
        width = model.kv_lora_rank + model.qk_rope_head_dim
        self._kept = torch.empty(model.num_layers, sequences, capacity, width, dtype=dtype, device=device)
        positions_S = torch.arange(capacity, device=device)
        self._cos, self._sin = rotation(positions_S, model.qk_rope_head_dim, model.rope)
        self.capacity, self.length = capacity, 0

    @property
    def bytes_per_token(self) -> int:
        """Of one sequence, over all layers."""
        layers, _, _, width = self._kept.shape
        return layers * width * self._kept.element_size()

    def rotation(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, R/2] of the next `count` positions. ValueError if there is no room for them."""
        end = self.length + count
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens; {self.length} + {count} do not fit")
        return self._cos[self.length : end], self._sin[self.length : end]

    def append(self, layer: int, latent_BTC: Tensor, k_rope_BTR: Tensor) -> Tensor:
        """Keeps the next tokens of a layer; returns all of its tokens, latent then rotary key: [B, length + T, C + R].

        Every layer appends the same tokens before `length` moves on.
        """
        end = self.length + latent_BTC.shape[1]
        self._kept[layer, :, self.length : end] = torch.cat((latent_BTC, k_rope_BTR), dim=-1)
        return self._kept[layer, :, :end]
