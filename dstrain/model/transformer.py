"""The language model: embedding, decoder layers, head, and the loss of a training step.

A sample carries T + 1 + depth tokens: T inputs, the next token of each as its target, and one more target for each
depth of multi-token prediction, so that every position has every target and their number is known beforehand.

Shapes: B sequences, T inputs of a sequence, S = T + 1 + MTP depth, D hidden, V vocabulary, L MoE layers, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.config.schema import ModelConfig
from dstrain.dispatch.contract import Dispatcher
from dstrain.model.layer import DenseLayer, MoELayer
from dstrain.model.mtp import MtpModule
from dstrain.model.rope import rotation
from dstrain.model.router import Router, RouterReport


@dataclass(frozen=True)
class StepLoss:
    """The share of these sequences in the loss of the global batch: all micro-batches of all ranks add up to it."""

    # What to differentiate: main + weights * others.
    total: Tensor
    # Detached parts, unweighted: [main, mtp, balance, z].
    parts_4: Tensor
    # One report per MoE layer, MTP layers last.
    reports: list[RouterReport]


class Transformer(nn.Module):
    """An MLA/MoE model holding the experts `held` of every MoE layer; `dispatcher` reaches the others."""

    def __init__(self, model: ModelConfig, held: range, dispatcher: Dispatcher):
        super().__init__()
        if model.vocab_size is None:
            raise ValueError(
                "model.vocab_size must be a number to build a model; the trainer takes it from the tokenizer"
            )
        self.config = model
        self.embed = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(
            DenseLayer(model) if n < model.num_dense_layers else MoELayer(model, held, dispatcher)
            for n in range(model.num_layers)
        )
        self.norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
        if not model.tie_embeddings:
            self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        # An MTP layer is built like the last layer of the model.
        mtp_moe = model.num_dense_layers < model.num_layers
        self.mtp = nn.ModuleList(
            MtpModule(model, MoELayer(model, held, dispatcher) if mtp_moe else DenseLayer(model))
            for _ in range(model.mtp.depth)
        )

    def scores(self, hidden: Tensor) -> Tensor:
        """The head: [..., D] -> [..., V]."""
        return F.linear(hidden, self.embed.weight) if self.config.tie_embeddings else self.head(hidden)

    def routers(self) -> Iterator[tuple[str, Router]]:
        """The routers with their logical names, in the order of `StepLoss.reports`."""
        yield from ((name, module) for name, module in self.named_modules() if isinstance(module, Router))

    def parts(self) -> Iterator[nn.Module]:
        """The modules that are called one after the other and together hold every parameter once."""
        yield self.embed
        yield from self.layers
        yield self.norm
        if not self.config.tie_embeddings:
            yield self.head
        yield from self.mtp

    def hidden(self, tokens_BT: Tensor) -> tuple[Tensor, list[RouterReport]]:
        """Final hidden states after the norm, [B, T, D]."""
        cos, sin = rotation(self._positions(tokens_BT), self.config.qk_rope_head_dim, self.config.rope)
        x_BTD = self.embed(tokens_BT)
        reports = []
        for layer in self.layers:
            x_BTD, report = layer(x_BTD, cos, sin)
            if report is not None:
                reports.append(report)
        return self.norm(x_BTD), reports

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Scores of the next token, [B, T, V]."""
        return self.scores(self.hidden(tokens_BT)[0])

    def forward(self, tokens_BS: Tensor, total_sequences: int, mtp_weight: float | None = None) -> StepLoss:
        """The loss share of a micro-batch whose global batch has `total_sequences` sequences."""
        depth = self.config.mtp.depth
        seq_len = tokens_BS.shape[1] - 1 - depth
        hidden, reports = self.hidden(tokens_BS[:, :seq_len])
        main = self._cross_entropy(hidden, tokens_BS[:, 1 : seq_len + 1])
        mtp = main.new_zeros(())
        cos, sin = rotation(self._positions(tokens_BS[:, :seq_len]), self.config.qk_rope_head_dim, self.config.rope)
        for k, module in enumerate(self.mtp, start=1):
            hidden, report = module(self.embed(tokens_BS[:, k : seq_len + k]), hidden, cos, sin)
            mtp = mtp + self._cross_entropy(hidden, tokens_BS[:, k + 1 : seq_len + k + 1]) / depth
            reports += [report] if report is not None else []
        balance = sum((r.balance_loss for r in reports), main.new_zeros(()))
        z = sum((r.z_loss for r in reports), main.new_zeros(()))
        parts_4 = torch.stack((main, mtp, balance, z)) / total_sequences
        router = self.config.router
        weight = self.config.mtp.loss_weight if mtp_weight is None else mtp_weight
        weights = (1.0, weight, router.balance_loss_weight, router.z_loss_weight)
        total = torch.stack([w * part for w, part in zip(weights, parts_4.unbind(), strict=True)]).sum()
        return StepLoss(total=total, parts_4=parts_4.detach(), reports=reports)

    def _cross_entropy(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Sum over sequences of the mean cross entropy of their tokens, FP32."""
        logits_NV = self.scores(hidden_BTD).flatten(0, 1).float()
        return F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum") / targets_BT.shape[1]

    @staticmethod
    def _positions(tokens_BT: Tensor) -> Tensor:
        return torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
