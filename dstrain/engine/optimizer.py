"""AdamW on flat shards: FP32 master weights, moments in FP32 or BF16 (DeepSeek-V3 section 3.3.3).

The arithmetic is torch's fused kernel in FP32. Narrow moments are widened a block at a time, so that the whole shard is
never held twice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dstrain.config.schema import OptimConfig

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
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decays: bool

    @staticmethod
    def of(master: Tensor, moments_dtype: torch.dtype, decays: bool) -> "AdamShard":
        exp_avg = torch.zeros_like(master, dtype=moments_dtype)
        return AdamShard(master, exp_avg, torch.zeros_like(exp_avg), decays)

    @torch.no_grad()
    def update(self, grad: Tensor, lr: float, updates_before: int, optim: OptimConfig) -> None:
        """One AdamW step with the FP32 gradient `grad`; `updates_before` steps have been made."""
        blocks = zip(
            *(t.split(BLOCK_ELEMENTS) for t in (self.master, grad, self.exp_avg, self.exp_avg_sq)), strict=True
        )
        for master, g, m, v in blocks:
            self._update_block(master, g, m, v, lr=lr, updates_before=updates_before, optim=optim)

    def _update_block(
        self, master: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, lr: float, updates_before: int, optim: OptimConfig
    ) -> None:
        wide_m, wide_v = m.float(), v.float()
        adamw(
            [master],
            [grad],
            [wide_m],
            [wide_v],
            max_exp_avg_sqs=[],
            # Filled on the device: a copy from the host would be waited for.
            state_steps=[torch.full((), float(updates_before), device=master.device)],
            fused=True,
            amsgrad=False,
            beta1=optim.beta1,
            beta2=optim.beta2,
            lr=lr,
            weight_decay=optim.weight_decay if self.decays else 0.0,
            eps=optim.eps,
            maximize=False,
        )
        if m.dtype != wide_m.dtype:
            m.copy_(wide_m)
            v.copy_(wide_v)
