"""Megatron-Core's MoELayer with its alltoall token dispatcher.

Experts, shared expert and the gate's logits are the bench's; top-k, softmax, permutation, the exchange and the layer
that calls them are Megatron's. Its training path is written for CUDA: what it asks of the device is answered for a CPU
while it runs.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dstrain.bench.peers.contract import Compute, Facts, Peer, Spec, versions_of

CURE = "Run `pip install 'dstrain[peers]'`"
ADAPTATIONS = (
    "torch.cuda.current_device is the CPU; streams and events do nothing",
    "split sizes become arrays although they lie on the CPU already",
    "experts, shared expert and the logits of the gate come from the bench, as modules",
)
LIMITS = (
    "alltoall dispatcher, no overlap: its overlap modes and the flex dispatcher need CUDA and were not run",
    "without Transformer Engine: no fused permutation or router",
)


class _Stream:
    """For streams and events alike: on a CPU, work is done when the call returns."""

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def record_event(self) -> "_Stream":
        return self

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron's copy to the host returns, for a tensor that is there."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Also without the warnings that Transformer Engine and Apex are missing."""
    from megatron.core.transformer.moe import token_dispatcher

    stream = _Stream()
    answers = {
        "current_device": lambda: torch.device("cpu"),
        "Stream": lambda *args, **kwargs: stream,
        "current_stream": lambda *args: stream,
        "stream": lambda _: nullcontext(),
    }
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _moved))
        yield


class _Experts(nn.Module):
    """In the place of Megatron's SequentialMLP, which multiplies by the weights as well."""

    def __init__(self, compute: Compute, block: int):
        super().__init__()
        self.compute, self.block = compute, block

    def forward(self, rows_RD: Tensor, counts_E: Tensor, weights_R: Tensor) -> tuple[Tensor, None]:
        y_RD = self.compute.experts(rows_RD, counts_E.tolist(), self.block)
        return (y_RD * weights_R.unsqueeze(-1)).to(rows_RD.dtype), None


class _Shared(nn.Module):
    def __init__(self, compute: Compute, block: int):
        super().__init__()
        self.compute, self.block = compute, block

    def forward(self, x_T1D: Tensor) -> Tensor:
        return self.compute.shared(x_T1D, self.block)


def _config(spec: Spec, ranks: int) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=spec.hidden,
        num_attention_heads=1,
        num_moe_experts=spec.experts,
        moe_router_topk=spec.top_k,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_shared_expert_intermediate_size=spec.hidden,
        expert_model_parallel_size=ranks,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
    )


def _groups(group: dist.ProcessGroup) -> Any:
    """Expert parallelism only: every other axis is a group of one."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    rest = dict.fromkeys(("tp", "cp", "tp_cp", "tp_dp_cp", "expt_tp", "expt_dp"), alone)
    return ProcessGroupCollection(ep=group, tp_ep=group, **rest)


class _Placeholder(nn.Module):
    """Until the bench's own modules take the places."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()


class _Layer:
    def __init__(self, spec: Spec, compute: Compute, block: int, config: Any, groups: Any):
        from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
        from megatron.core.transformer.moe.router import TopKRouter

        class Router(TopKRouter):
            logits_TE: Tensor

            def gating(self, x_T1D: Tensor) -> Tensor:
                return self.logits_TE

        self.spec, self.block = spec, block
        submodules = MoESubmodules(experts=_Placeholder, shared_experts=_Placeholder, router=Router)
        self.moe = MoELayer(config, submodules, layer_number=1, pg_collection=groups)
        self.moe.experts, self.moe.shared_experts = _Experts(compute, block), _Shared(compute, block)

    def __call__(self, x_TD: Tensor, micro_batch: int) -> Tensor:
        self.moe.router.logits_TE = self.spec.logits_TE(self.block, micro_batch)
        y_T1D, _ = self.moe(x_TD.unsqueeze(1))
        return y_T1D.squeeze(1)


def facts() -> Facts:
    versions = versions_of(["megatron-core"], "Megatron-Core", CURE)
    return Facts("Megatron-Core", versions, ADAPTATIONS, LIMITS)


def make(spec: Spec, group: dist.ProcessGroup, compute: Compute) -> Peer:
    with _on_cpu():
        config, groups = _config(spec, group.size()), _groups(group)
        layers = [_Layer(spec, compute, block, config, groups) for block in range(spec.blocks)]
    return Peer(facts(), compute, layers, _on_cpu)
