"""Multi-token prediction (DeepSeek-V3 section 2.2): module k predicts the token k further ahead than the model does.

    h_k = norm(layer(W [norm(embedding of token t + k) ; norm(h_(k-1))]))       h_0: the model's own final state

Embedding and head are the model's; `Transformer.walk` runs the layer and the last norm. Shapes: B sequences, T tokens,
D hidden.
"""

import torch
from torch import Tensor, nn

from dstrain.config.schema import ModelConfig
from dstrain.model.layer import DenseLayer, MoELayer
from dstrain.precision.linear import Linear


class MtpModule(nn.Module):
    def __init__(self, model: ModelConfig, layer: DenseLayer | MoELayer):
        super().__init__()
        self.embed_norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.hidden_norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.proj = Linear(2 * model.hidden_size, model.hidden_size)
        self.layer = layer
        self.norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)

    def join(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """What the layer of this depth starts from."""
        return self.proj(torch.cat((self.embed_norm(embedded_BTD), self.hidden_norm(hidden_BTD)), dim=-1))
