"""Matrix products of many experts at once: rows sorted by expert, each run of rows times its own weight.

Shapes: R rows, K in, M out, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_linear_reference(x_RK: Tensor, weight_EMK: Tensor, counts: list[int]) -> Tensor:
    """One expert after the other; the plain meaning of `grouped_linear`."""
    parts = [F.linear(x, weight) for x, weight in zip(x_RK.split(counts), weight_EMK.unbind(), strict=True)]
    return torch.cat(parts)


def grouped_linear(x_RK: Tensor, weight_EMK: Tensor, counts: list[int]) -> Tensor:
    """y[r] = weight[expert of r] @ x[r], [R, M]; the first counts[0] rows belong to expert 0, and so on.

    Experts without rows get zero gradients, never None: a reduction over ranks waits for every one of them.
    """
    ends = torch.tensor(counts, device=x_RK.device).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x_RK, weight_EMK.transpose(1, 2), offs=ends)
