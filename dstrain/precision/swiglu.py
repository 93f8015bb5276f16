"""SwiGLU (arXiv:2002.05202), silu(gate) * up, keeping nothing but its input for the backward pass.

A routed expert multiplies here by the weight that the router gave to the row: what follows is linear, so this is the
weight of the expert's output, at a row as narrow as the expert. Everything is computed in FP32 at least and rounded
once.

Shapes: N rows, F inner width; the input holds the gate columns, then the up columns.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# FP32 copies are made of so many elements at a time; on a CPU a block stays in the cache, too.
WIDE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


def swiglu_reference(gate_up: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """The plain meaning of `swiglu`, for autograd."""
    gate, up = _widened(gate_up).chunk(2, dim=-1)
    inner = F.silu(gate) * up
    return (inner if weight_N is None else inner * weight_N[:, None]).to(gate_up.dtype)


def swiglu(gate_up: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """[..., 2F] -> [..., F], in the dtype of the input.

    `weight_N` (FP32), for an input [N, 2F]: a factor of each row. Its gradient is FP32, too.
    """
    return _SwiGLU.apply(gate_up, weight_N)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weight_N)
        inner = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        rows_NF, gate_up_N2F = inner.view(-1, inner.shape[-1]), gate_up.reshape(-1, gate_up.shape[-1])
        for block in _blocks(gate_up_N2F):
            gate, up = _widened(gate_up_N2F[block]).chunk(2, dim=-1)
            wide = F.silu(gate).mul_(up)
            rows_NF[block] = wide if weight_N is None else wide.mul_(weight_N[block, None])
        return inner

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, weight_N = ctx.saved_tensors
        return swiglu_backward(gate_up, weight_N, grad)


def swiglu_backward(gate_up: Tensor, weight_N: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input and of the weights, from that of the output."""
    grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    grad_weight_N = None if weight_N is None else torch.empty_like(weight_N)
    gate_up_N2F, grad_NF = gate_up.reshape(-1, gate_up.shape[-1]), grad.reshape(-1, grad.shape[-1])
    rows_N2F = grad_gate_up.view(gate_up_N2F.shape)
    for block in _blocks(gate_up_N2F):
        gate, up = _widened(gate_up_N2F[block]).chunk(2, dim=-1)
        wide, silu = _widened(grad_NF[block]), F.silu(gate)
        if weight_N is not None and grad_weight_N is not None:
            grad_weight_N[block] = (silu * up).mul_(wide).sum(1)
            wide = wide * weight_N[block, None]
        grad_gate, grad_up = rows_N2F[block].chunk(2, dim=-1)
        grad_up.copy_(silu.mul_(wide))
        grad_gate.copy_(torch.ops.aten.silu_backward(wide * up, gate))
    return grad_gate_up, grad_weight_N


def _widened(x: Tensor) -> Tensor:
    """In FP32, or in FP64 if that is what it is in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Parts of the rows, no more than WIDE_ELEMENTS elements each; everything at once on another device."""
    size = max(1, WIDE_ELEMENTS.get(rows.device.type, rows.numel()) // max(1, rows.shape[1]))
    yield from (slice(begin, begin + size) for begin in range(0, len(rows), size))
