"""The language model: embedding, decoder layers, head, and the loss of a training step.

A sample carries T + 1 + depth tokens: T inputs, the next token of each as its target, and one more target for each
depth of multi-token prediction, so that every position has every target and their number is known beforehand.

Shapes: B sequences, T inputs of a sequence, S = T + 1 + MTP depth, D hidden, V vocabulary, L MoE layers, E experts.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from dstrain.config.schema import ModelConfig
from dstrain.dispatch.contract import Dispatcher
from dstrain.model.cross_entropy import cross_entropy
from dstrain.model.layer import Block, DenseLayer, End, MoELayer, Walk, walk_whole
from dstrain.model.loss import MAIN, MTP, LossTerms, StepLoss
from dstrain.model.mtp import MtpModule
from dstrain.model.rope import rotation
from dstrain.model.router import Router
from dstrain.plan.split import Stage, embeds_at_end, moe_blocks, whole
from dstrain.precision.linear import Embedding, Linear
from dstrain.precision.watch import Watch

# A part of a walk that leaves hidden states behind.
Stretches = Generator[Block, Tensor, Tensor]


def router_names(model: ModelConfig) -> list[str]:
    """The logical names of all routers, in the order of the model: layers first, MTP modules after them."""
    layers = [f"layers.{n}.moe.router" for n in range(model.num_dense_layers, model.num_layers)]
    return layers + ([f"mtp.{n}.layer.moe.router" for n in range(model.mtp.depth)] if layers else [])


class Transformer(nn.Module):
    """An MLA/MoE model holding the experts `held` of every MoE layer; `dispatcher` reaches the others.

    Of a pipeline of `stages` it holds those numbered in `own`, all parameters under the names that they have in the
    whole model; `layers[n]` is None where another rank has layer n, and only the walks through own stages work.
    """

    def __init__(
        self,
        model: ModelConfig,
        held: range,
        dispatcher: Dispatcher,
        stages: Sequence[Stage] = (),
        own: Sequence[int] = (0,),
    ):
        super().__init__()
        if model.vocab_size is None:
            raise ValueError(
                "model.vocab_size must be a number to build a model; the trainer takes it from the tokenizer"
            )
        self.config = model
        # Of its products in FP8, where it has any.
        self.watch = Watch(torch.device("cpu"))
        self.stages, self.own = tuple(stages) or (whole(model),), tuple(own)
        begins = any(self.stages[n].is_first for n in own)
        ends = any(self.stages[n].is_last for n in own)
        if begins or (ends and embeds_at_end(model)):
            self.embed = Embedding(model.vocab_size, model.hidden_size)
        here = {layer for n in own for layer in self.stages[n].layers}
        layers = [self._layer(n, held, dispatcher) if n in here else None for n in range(model.num_layers)]
        self.layers = nn.ModuleList(cast("list[nn.Module]", layers))
        if ends:
            self.norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
            if not model.tie_embeddings:
                self.head = Linear(model.hidden_size, model.vocab_size, shared=True)
        # An MTP layer is built like the last layer of the model.
        self.mtp = nn.ModuleList(
            MtpModule(model, self._layer(model.num_layers - 1, held, dispatcher))
            for _ in range(model.mtp.depth if ends else 0)
        )

    def _layer(self, number: int, held: range, dispatcher: Dispatcher) -> DenseLayer | MoELayer:
        model = self.config
        return DenseLayer(model) if number < model.num_dense_layers else MoELayer(model, held, dispatcher)

    def scores(self, hidden: Tensor) -> Tensor:
        """The head: [..., D] -> [..., V]."""
        return self.embed(hidden, as_head=True) if self.config.tie_embeddings else self.head(hidden)

    def routers(self) -> Iterator[tuple[str, Router]]:
        """The routers that are held, with their logical names, in the order of the model."""
        yield from ((name, module) for name, module in self.named_modules() if isinstance(module, Router))

    @property
    def blocks(self) -> tuple[int, ...]:
        """MoE blocks of every stage of the pipeline, at which a walk through it stops."""
        return tuple(moe_blocks(self.config, stage) for stage in self.stages)

    @property
    def num_blocks(self) -> int:
        """MoE blocks of the whole model."""
        return sum(self.blocks)

    def users(self, name: str) -> list[int]:
        """The own stages that use a parameter: each gives it a gradient per micro-batch."""
        part, _, rest = name.partition(".")
        if part == "layers":
            layer = int(rest.partition(".")[0])
            return [n for n in self.own if layer in self.stages[n].layers]
        at_start, at_end = part == "embed", part != "embed" or embeds_at_end(self.config)
        ends = [(n, self.stages[n]) for n in self.own]
        return [n for n, stage in ends if (stage.is_first and at_start) or (stage.is_last and at_end)]

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final hidden states after the norm, [B, T, D]."""
        cos, sin = self._rotation(tokens_BT.shape[1], tokens_BT.device)
        x_BTD = self.embed(tokens_BT)
        for n in range(self.config.num_layers):
            x_BTD, _ = self._held(n)(x_BTD, cos, sin)
        return self.norm(x_BTD)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Scores of the next token, [B, T, V]."""
        return self.scores(self.hidden(tokens_BT))

    def forward(self, tokens_BS: Tensor, total_sequences: int, mtp_weight: float | None = None) -> StepLoss:
        """The loss share of a micro-batch whose global batch has `total_sequences` sequences, on one whole graph."""
        end = walk_whole(self.walk(tokens_BS, total_sequences, mtp_weight))
        return replace(end.result, total=torch.stack(end.roots).sum())

    def walk(self, tokens_BS: Tensor, total_sequences: int, mtp_weight: float | None = None) -> Walk[StepLoss]:
        """The model as a chain of stretches with a stop at every MoE block. The loss at its end is detached: its roots
        are given out where they arise."""
        return self.walk_stage(0, tokens_BS, None, total_sequences, mtp_weight)

    def walk_stage(
        self,
        number: int,
        tokens_BS: Tensor,
        x_BTD: Tensor | None,
        total_sequences: int,
        mtp_weight: float | None = None,
    ) -> Walk[StepLoss]:
        """`walk` through one stage. `x_BTD`: the output of the stage before, None for the first; its own output is
        that of the walk's end. The loss is the part that arises here."""
        stage, depth = self.stages[number], self.config.mtp.depth
        seq_len = tokens_BS.shape[1] - 1 - depth
        cos, sin = self._rotation(seq_len, tokens_BS.device)
        terms = self._terms(total_sequences, mtp_weight)
        if x_BTD is None:
            x_BTD = self.embed(tokens_BS[:, :seq_len])
        for n in stage.layers:
            x_BTD = yield from self._through(self._held(n), x_BTD, cos, sin, terms)
        if not stage.is_last:
            return End(terms.take(), terms.loss(x_BTD), x_BTD)
        hidden = self.norm(x_BTD)
        terms.add(MAIN, self._cross_entropy(hidden, tokens_BS[:, 1 : seq_len + 1]))
        for k, module in enumerate(self._mtp_modules(), start=1):
            x_BTD = module.join(self.embed(tokens_BS[:, k : seq_len + k]), hidden)
            hidden = module.norm((yield from self._through(module.layer, x_BTD, cos, sin, terms)))
            terms.add(MTP, self._cross_entropy(hidden, tokens_BS[:, k + 1 : seq_len + k + 1]) / depth)
        return End(terms.take(), terms.loss(hidden))

    def _through(
        self, layer: DenseLayer | MoELayer, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, terms: LossTerms
    ) -> Stretches:
        if isinstance(layer, DenseLayer):
            return layer(x_BTD, cos_TR, sin_TR)[0]
        attended = layer.attend(x_BTD, cos_TR, sin_TR)
        terms.report(attended.report)
        return (yield Block(layer, attended, terms.take()))

    def _terms(self, total_sequences: int, mtp_weight: float | None) -> LossTerms:
        router = self.config.router
        weight = self.config.mtp.loss_weight if mtp_weight is None else mtp_weight
        return LossTerms((1.0, weight, router.balance_loss_weight, router.z_loss_weight), total_sequences)

    def _cross_entropy(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Sum over sequences of the mean cross entropy of their tokens, FP32."""
        logits_NV = self.scores(hidden_BTD).flatten(0, 1)
        return cross_entropy(logits_NV, targets_BT.flatten()) / targets_BT.shape[1]

    def _rotation(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        positions_T = torch.arange(seq_len, device=device)
        return rotation(positions_T, self.config.qk_rope_head_dim, self.config.rope)

    def _held(self, number: int) -> DenseLayer | MoELayer:
        layer = cast("DenseLayer | MoELayer | None", self.layers[number])
        if layer is None:
            raise RuntimeError(f"layer {number} is held by another pipeline rank")
        return layer

    def _mtp_modules(self) -> list[MtpModule]:
        return cast("list[MtpModule]", list(self.mtp))
