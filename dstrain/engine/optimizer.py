"""AdamW on flat shards: FP32 master weights, moments in FP32, BF16 (DeepSeek-V3 section 3.3.3) or 8 bits (moments.py).

The arithmetic is torch's fused kernel in FP32. Narrow moments are widened a stretch at a time, so that the whole shard
is never held twice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dstrain.config.schema import OptimConfig
from dstrain.engine.moments import EightBit, Moment, keep, widened, zeros

BLOCK_ELEMENTS = 1 << 20
NORM_BLOCK_ELEMENTS = 1 << 14


def square_sum(flat: Tensor) -> Tensor:
    """The sum of squares of an FP32 vector, FP64 scalar, to about one unit in the last place of FP32.

    torch adds a long vector up in a few FP32 lanes, which costs digits (1e-5 for a million elements); norms of short
    blocks, which one kernel takes, keep them, and are far quicker than a sum in FP64.
    """
    whole = len(flat) // NORM_BLOCK_ELEMENTS * NORM_BLOCK_ELEMENTS
    blocks, rest = flat[:whole].view(-1, NORM_BLOCK_ELEMENTS), flat[whole:]
    norms = torch.cat((torch.linalg.vector_norm(blocks, dim=1), torch.linalg.vector_norm(rest)[None]))
    return norms.double().square().sum()


@dataclass(frozen=True)
class AdamShard:
    """A flat FP32 range of weights with its two moments, updated in place."""

    master: Tensor
    exp_avg: Moment
    exp_avg_sq: Moment
    decays: bool

    @staticmethod
    def of(master: Tensor, moments_dtype: torch.dtype, decays: bool) -> "AdamShard":
        """Moments of zeros; torch.int8 stands for 8 bits."""
        return AdamShard(
            master, zeros(master, moments_dtype, signed=True), zeros(master, moments_dtype, signed=False), decays
        )

    def tensors(self) -> dict[str, Tensor]:
        """The three vectors by name, live; of moments in 8 bits FP32 copies, which `take_back` follows or `forget`."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        lent = {name: x.lend() if isinstance(x, EightBit) else x for name, x in moments.items()}
        return {"master": self.master, **lent}

    def take_back(self) -> None:
        """What `tensors` gave may have been written into."""
        for moment in self._lenders():
            moment.take_back()

    def forget(self) -> None:
        """Nobody uses what `tensors` gave any more."""
        for moment in self._lenders():
            moment.forget()

    def _lenders(self) -> list[EightBit]:
        return [moment for moment in (self.exp_avg, self.exp_avg_sq) if isinstance(moment, EightBit)]

    @torch.no_grad()
    def update(self, grad: Tensor, lr: float, updates_before: int, optim: OptimConfig) -> None:
        """One AdamW step with the FP32 gradient `grad`; `updates_before` steps have been made."""
        for begin in range(0, len(self.master), BLOCK_ELEMENTS):
            self._update_block(slice(begin, begin + BLOCK_ELEMENTS), grad, lr, updates_before, optim)

    def _update_block(self, part: slice, grad: Tensor, lr: float, updates_before: int, optim: OptimConfig) -> None:
        wide_m, wide_v = widened(self.exp_avg, part), widened(self.exp_avg_sq, part)
        adamw(
            [self.master[part]],
            [grad[part]],
            [wide_m],
            [wide_v],
            max_exp_avg_sqs=[],
            # Filled on the device: a copy from the host would be waited for.
            state_steps=[torch.full((), float(updates_before), device=self.master.device)],
            fused=True,
            amsgrad=False,
            beta1=optim.beta1,
            beta2=optim.beta2,
            lr=lr,
            weight_decay=optim.weight_decay if self.decays else 0.0,
            eps=optim.eps,
            maximize=False,
        )
        keep(self.exp_avg, part, wide_m)
        keep(self.exp_avg_sq, part, wide_v)
