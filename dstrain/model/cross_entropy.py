"""Cross entropy in the memory of the logits: no FP32 copy of them, no gradient beside them.

What is kept of the forward pass is the logits as they came, in the compute dtype. Each pass takes a few rows at a time
to FP32; the backward pass computes their probabilities again and writes the gradient over the logits, which nobody
needs from then on. So a logit takes 2 bytes in BF16 at every moment, instead of 4 between the passes and 12 at the
peak. Gradients are those of `cross_entropy_reference`, the plain form, but for the last bit of FP32, so in BF16 nearly
all are equal.

Shapes: N tokens, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Of a chunk in FP32: enough rows to keep a GPU busy, and little beside the logits of a micro-batch.
CHUNK_BYTES = 32 * 2**20


def cross_entropy_reference(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over tokens of the cross entropy of their targets, computed in FP32 as a whole."""
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over tokens of the cross entropy of their targets, FP32.

    The backward pass overwrites `logits_NV` by its gradient: who wants the logits after it keeps a copy. A second
    backward pass over the same graph raises RuntimeError.
    """
    return _CrossEntropy.apply(logits_NV, targets_N)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        ctx.is_spent = False
        losses_N = logits_NV.new_empty(len(targets_N), dtype=torch.float32)
        for rows in _chunks(logits_NV):
            log_p_CV = F.log_softmax(logits_NV[rows], -1, dtype=torch.float32)
            losses_N[rows] = -log_p_CV.gather(1, targets_N[rows, None])[:, 0]
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # With hooks on saved tensors autograd doesn't compare versions.
        if ctx.is_spent:
            raise RuntimeError(
                "a second backward pass through cross entropy: the first one has overwritten the logits by their "
                "gradient; run the forward pass again"
            )
        ctx.is_spent = True
        logits_NV, targets_N = ctx.saved_tensors
        # The version counter stays that of the logits: whatever else has kept them raises instead of reading gradients.
        grad_NV = logits_NV.detach()
        for rows in _chunks(grad_NV):
            # A kernel that finds the sums of exponentials anew reads no more than one that takes kept ones.
            p_CV, targets_C1 = F.softmax(grad_NV[rows], -1, dtype=torch.float32), targets_N[rows, None]
            target_C1 = p_CV.gather(1, targets_C1).mul_(grad).sub_(grad)
            # Rounded once, on the way out.
            torch.mul(p_CV, grad, out=grad_NV[rows])
            grad_NV[rows].scatter_(1, targets_C1, target_C1.to(grad_NV.dtype))
        return grad_NV, None


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    tokens, width = logits_NV.shape
    size = max(1, CHUNK_BYTES // (4 * width))
    return (slice(start, start + size) for start in range(0, tokens, size))
