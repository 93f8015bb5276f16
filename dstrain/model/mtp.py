"""Multi-token prediction (DeepSeek-V3 section 2.2): module k predicts the token k further ahead than the model does.

    h_k = norm(layer(W [norm(embedding of token t + k) ; norm(h_(k-1))]))       h_0: the model's own final state

Embedding and head are the model's. Shapes: B sequences, T tokens, D hidden.
"""

import torch
from torch import Tensor, nn

from dstrain.config.schema import ModelConfig
from dstrain.model.layer import DenseLayer, MoELayer
from dstrain.model.router import RouterReport


class MtpModule(nn.Module):
    def __init__(self, model: ModelConfig, layer: DenseLayer | MoELayer):
        super().__init__()
        self.embed_norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.hidden_norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.proj = nn.Linear(2 * model.hidden_size, model.hidden_size, bias=False)
        self.layer = layer
        self.norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)

    def forward(
        self, embedded_BTD: Tensor, hidden_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor
    ) -> tuple[Tensor, RouterReport | None]:
        """The hidden states of this depth, ready for the head."""
        joined = torch.cat((self.embed_norm(embedded_BTD), self.hidden_norm(hidden_BTD)), dim=-1)
        x_BTD, report = self.layer(self.proj(joined), cos_TR, sin_TR)
        return self.norm(x_BTD), report
