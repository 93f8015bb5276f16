"""torchtitan's MoE with its AllToAllTokenDispatcher.

The gate's logits, experts and shared expert are the bench's; top-k, softmax, reordering, the exchange and the layer
that calls them are torchtitan's. It runs on a CPU as it is.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dstrain.bench.peers.contract import Compute, Facts, Peer, Spec, versions_of

CURE = "Run `pip install 'dstrain[peers]'`"
# What its modules import; the rest of what it depends on is for reading data and showing figures.
PACKAGES = ("torchtitan", "spmd-types", "triton")
ADAPTATIONS = (
    "spmd_backend=partial_dtensor: the list exchange of the default, spmd_types, needs equal sizes on gloo",
    "experts, shared expert and the logits of the gate come from the bench, as modules",
)
LIMITS = ("eager, no overlap: its overlap passes and the DeepEP, HybridEP and async dispatchers need CUDA",)


class _Gate(nn.Module):
    logits_TE: Tensor

    def forward(self, x_1TD: Tensor) -> Tensor:
        return self.logits_TE.unsqueeze(0)


class _Experts(nn.Module):
    def __init__(self, compute: Compute, block: int):
        super().__init__()
        self.compute, self.block = compute, block

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        return self.compute.experts(rows_RD, counts_E.tolist(), self.block)


class _Shared(nn.Module):
    def __init__(self, compute: Compute, block: int):
        super().__init__()
        self.compute, self.block = compute, block

    def forward(self, x_1TD: Tensor) -> Tensor:
        return self.compute.shared(x_1TD, self.block)


def _config(spec: Spec) -> Any:
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    return MoE.Config(
        num_experts=spec.experts,
        router=TokenChoiceTopKRouter.Config(
            num_experts=spec.experts,
            gate=Linear.Config(in_features=1, out_features=1),
            top_k=spec.top_k,
            score_func="softmax",
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=1, hidden_dim=1, num_experts=1),
            token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=spec.experts, top_k=spec.top_k),
        ),
        load_balance_coeff=None,
    )


class _Layer:
    def __init__(self, spec: Spec, compute: Compute, block: int, mesh: DeviceMesh):
        self.spec, self.block, self.gate = spec, block, _Gate()
        self.moe = _config(spec).build()
        # The modules that the configuration made are placeholders of one element.
        self.moe.router.gate = self.gate
        self.moe.routed_experts.inner_experts = _Experts(compute, block)
        self.moe.shared_experts = _Shared(compute, block)
        self.moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)

    def __call__(self, x_TD: Tensor, micro_batch: int) -> Tensor:
        self.gate.logits_TE = self.spec.logits_TE(self.block, micro_batch)
        return self.moe(x_TD.unsqueeze(0)).squeeze(0)


@contextmanager
def _on_gloo() -> Iterator[None]:
    from torchtitan.distributed.utils import get_spmd_backend, set_spmd_backend

    before = get_spmd_backend()
    set_spmd_backend("partial_dtensor")
    try:
        with warnings.catch_warnings():
            # The gate runs in FP32 as it is; autocast on a CPU can't ask for it.
            warnings.filterwarnings("ignore", message="In CPU autocast")
            yield
    finally:
        set_spmd_backend(before)


def facts() -> Facts:
    return Facts("torchtitan", versions_of(PACKAGES, "torchtitan", CURE), ADAPTATIONS, LIMITS)


def make(spec: Spec, group: dist.ProcessGroup, compute: Compute) -> Peer:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ep",))
    layers = [_Layer(spec, compute, block, mesh) for block in range(spec.blocks)]
    return Peer(facts(), compute, layers, _on_gloo)
