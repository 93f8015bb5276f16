"""DeepSpeed's deepspeed.moe.layer.MoE.

The logits of the gate, the experts and the shared expert, which DeepSpeed doesn't have, are the bench's; the top-k gate
with its capacity, the exchange of padded buffers and the layer that calls them are DeepSpeed's. It sends capacity rows
for every expert. Without dropping, the capacity is that of the fullest expert of all ranks; with capacity factor one it
is the mean, and what exceeds it is dropped.
"""

import os
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor, nn

from dstrain.bench.peers.contract import Compute, Facts, Peer, Spec, versions_of

CURE = "Run `pip install 'dstrain[deepspeed]'`"
ADAPTATIONS = (
    "DS_ACCELERATOR=cpu; its shared-memory reduction is not compiled",
    "experts and the logits of the gate come from the bench; the shared expert, which it lacks, follows the layer",
)
DROPLESS = "capacity of the fullest expert, nothing dropped; Tutel's kernels, which it can use on CUDA, were not run"
DROPPING = "capacity factor 1.0, which drops tokens: less work than the others do; without Tutel's kernels"


def _connect() -> None:
    """Lets DeepSpeed use the process groups that exist."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops
    from deepspeed import comm

    # An empty table of compiled operators: otherwise the first group on a CPU starts a C++ build of over a minute.
    with patch.object(deepspeed.ops, "__compatible_ops__", {}):
        comm.init_distributed("gloo", verbose=False)


class _Experts(nn.Module):
    """Rows arrive as [ranks, experts here, capacity, D]."""

    def __init__(self, compute: Compute, block: int):
        super().__init__()
        self.compute, self.block = compute, block

    def forward(self, rows_GECD: Tensor) -> Tensor:
        ranks, experts, capacity, hidden = rows_GECD.shape
        rows_RD = rows_GECD.transpose(0, 1).reshape(-1, hidden)
        y_RD = self.compute.experts(rows_RD, [ranks * capacity] * experts, self.block)
        return y_RD.view(experts, ranks, capacity, hidden).transpose(0, 1)


class _Layer:
    def __init__(self, spec: Spec, compute: Compute, block: int, group: dist.ProcessGroup, drops: bool):
        from deepspeed.moe import sharded_moe
        from deepspeed.moe.layer import MoE

        class Gate(sharded_moe.TopKGate):
            logits_TE: Tensor

            def forward(self, x_TD: Tensor, used_token: Any, sparse_routes: bool, use_tutel: bool) -> Any:
                limits = (self.capacity_factor, self.min_capacity, self.drop_tokens, self.ep_group)
                return sharded_moe.topkgating(self.logits_TE, self.k, *limits, sparse_routes=sparse_routes)

        self.spec, self.compute, self.block = spec, compute, block
        self.moe = MoE(spec.hidden, nn.Identity(), spec.experts, ep_size=group.size(), k=spec.top_k, drop_tokens=drops)
        self.gate = Gate(spec.hidden, spec.experts, spec.top_k, drop_tokens=drops)
        self.moe.deepspeed_moe.gate = self.gate
        self.moe.deepspeed_moe.experts = _Experts(compute, block)
        self.moe.deepspeed_moe._set_ep_group(group)

    def __call__(self, x_TD: Tensor, micro_batch: int) -> Tensor:
        self.gate.logits_TE = self.spec.logits_TE(self.block, micro_batch)
        return self.moe(x_TD)[0] + self.compute.shared(x_TD, self.block)


def facts(drops: bool = False) -> Facts:
    versions = versions_of(["deepspeed"], "DeepSpeed", CURE)
    name, limit = ("DeepSpeed, capacity 1.0", DROPPING) if drops else ("DeepSpeed, dropless", DROPLESS)
    return Facts(name, versions, ADAPTATIONS, (limit,))


def make(spec: Spec, group: dist.ProcessGroup, compute: Compute, drops: bool = False) -> Peer:
    _connect()
    layers = [_Layer(spec, compute, block, group, drops) for block in range(spec.blocks)]
    return Peer(facts(drops), compute, layers)
