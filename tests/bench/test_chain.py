"""The bench's model under the scheduler: any order gives the same gradients, and a replay costs nothing."""

import torch

from dstrain.bench.chain import Chain, Layer, Replay
from dstrain.bench.emulate import Clock, Emulated
from dstrain.bench.real import Real
from dstrain.bench.workload import Workload
from dstrain.comm.trace import Trace
from dstrain.dispatch.local import LocalDispatcher
from dstrain.schedule.order import fixed
from dstrain.schedule.table import Table, sequential

# One rank that holds all experts.
WORK = Workload(1, 1, 64, 8, 3, 32, 2, 4)


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 64, generator=generator).bfloat16().requires_grad_() for _ in range(4)]


def real_step(table: Table) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    compute = Real(WORK)
    chain = Chain([Layer(LocalDispatcher(8), compute, block) for block in range(2)], WORK.routes(0))
    outputs = chain.step(table, inputs(), Trace(torch.device("cpu")))
    # The norm in front of the experts has no part in the bench.
    used = [parameter for name, parameter in compute.named_parameters() if "ffn_norm" not in name]
    return outputs, [parameter.grad for parameter in used]


def test_orders_agree_on_outputs_and_gradients():
    outputs, grads = real_step(sequential(2, 4))
    others, other_grads = real_step(fixed(2, 4, 2))
    assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_a_replay_sleeps_three_times_a_forward_pass_and_sends_nothing():
    clock, trace = Clock(), Trace(torch.device("cpu"))
    compute = Emulated(clock, forward_ms=1.0, blocks=2)
    chain = Chain([Layer(Replay(3, 8), compute, block) for block in range(2)], WORK.routes(0))
    chain.step(sequential(2, 4), inputs(), trace)
    assert clock.slept_s >= 0.024
    assert trace.take().transfers == []
