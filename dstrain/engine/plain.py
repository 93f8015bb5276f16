"""The plain reference of all engines: one process, whole gradients, torch's own AdamW."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from dstrain.config.schema import OptimConfig
from dstrain.engine.state import FlatShard, Shards
from dstrain.model.transformer import Transformer
from dstrain.parallel.apply import LogicalParameter, logical_parameters


@dataclass
class PlainEngine:
    """The `Engine` of engine/contract.py in FP32, with nothing clever in it."""

    model: Transformer
    optim: OptimConfig
    _logicals: list[LogicalParameter] = field(init=False)
    _adamw: torch.optim.AdamW = field(init=False)
    _norm: float = 0.0

    def __post_init__(self) -> None:
        self._logicals = logical_parameters(self.model)
        groups = [
            {"params": [x.parameter for x in self._logicals if x.decays], "weight_decay": self.optim.weight_decay},
            {"params": [x.parameter for x in self._logicals if not x.decays], "weight_decay": 0.0},
        ]
        betas = (self.optim.beta1, self.optim.beta2)
        self._adamw = torch.optim.AdamW(groups, betas=betas, eps=self.optim.eps, foreach=False)

    def expect(self, gradients: Mapping[str, int]) -> None:
        """autograd adds the gradients up."""

    def reduce(self) -> float:
        squares = [shard.local.double().square().sum() for _, shard in self.gradients()]
        self._norm = torch.stack(squares).sum().sqrt().item()
        return self._norm

    def gradients(self) -> Iterator[tuple[str, FlatShard]]:
        for x in self._logicals:
            if x.parameter.grad is None:
                raise RuntimeError(f"{x.name} has no gradient")
            yield x.name, FlatShard.of_parts(x.shape, x.offsets, x.part_numel, 0, x.parameter.grad.view(-1))

    def step(self, lr: float) -> None:
        if self.optim.clip_norm and self._norm > self.optim.clip_norm:
            for _, shard in self.gradients():
                shard.local.mul_(self.optim.clip_norm / self._norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad()

    def state(self) -> Shards:
        return {
            f"master/{x.name}": FlatShard.of_parts(x.shape, x.offsets, x.part_numel, 0, x.parameter.detach().view(-1))
            for x in self._logicals
        }

    def loaded(self, step: int) -> None:
        raise NotImplementedError("the plain engine is a reference for comparisons and keeps no moments to resume from")

    def settle(self) -> None:
        """Nothing is ever under way."""
