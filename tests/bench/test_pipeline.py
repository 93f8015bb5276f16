"""The bench's chain in stages: the same gradients as in one piece, on one rank and in real processes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dstrain.bench.case import Case, parse
from dstrain.bench.chain import Chain, Layer
from dstrain.bench.pipeline import Staged, alone, cut, pipeline
from dstrain.bench.real import Real
from dstrain.bench.worker import drawn
from dstrain.bench.workload import Workload
from dstrain.config.schema import Config, DispatchConfig, ModelConfig
from dstrain.dispatch.choose import make_dispatcher
from dstrain.dispatch.contract import Dispatcher
from dstrain.dispatch.local import LocalDispatcher
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.schedule.figures import peak_live
from dstrain.schedule.pipeline import check
from dstrain.schedule.pipelines.choose import NAMES, make
from dstrain.schedule.table import sequential
from tests.gloo.spawn import spawn
from tests.tiny import CPU
from tests.tiny import alone as one_process

ORDERS = ("1f1b", "1f1b+block", "1f1b+overlap", "interleaved", "zb_1p", "zb_v", "dualpipev+overlap")


def gradients(groups: Groups, work: Workload, dispatcher: Dispatcher, act: Callable[[Chain, list[Tensor]], object]):
    """By block, after a step: those of the weights, and of what entered."""
    compute = Real(work)
    layers = [Layer(dispatcher, compute, block) for block in range(work.blocks)]
    inputs = drawn(work, groups.coordinate.ep)
    act(Chain(layers, work.routes(groups.coordinate.ep)), inputs)
    found: dict[int, list[Tensor]] = {block: [] for block in range(work.blocks)}
    for name, parameter in compute.named_parameters():
        if parameter.grad is not None:
            found[int(name.split(".")[1])].append(parameter.grad)
    found[-1] = [x_TD.grad for x_TD in inputs if x_TD.grad is not None]
    return found


def test_two_stages_on_one_rank():
    work, groups = Workload(1, 1, 64, 8, 3, 32, 2, 4), one_process()

    def in_stages(chain: Chain, inputs: list[Tensor]) -> None:
        Staged(parse("rank/bfloat16/interleaved"), groups, work, chain).step(inputs)

    def whole(chain: Chain, inputs: list[Tensor]) -> None:
        chain.step(sequential(2, 4), inputs, groups.trace)

    found, expected = (gradients(groups, work, LocalDispatcher(8), act) for act in (in_stages, whole))
    assert all(torch.equal(a, b) for block in (0, 1, -1) for a, b in zip(found[block], expected[block], strict=True))
    assert all(expected.values())
    assert all(grad.abs().sum() > 0 for grads in found.values() for grad in grads)


def over_four_ranks(rank: int, world: int) -> list[tuple[str, dict[int, bool]]]:
    """Whether the gradients of a rank's blocks are bit by bit those of the chain in one piece."""
    work = Workload(2, 1, 64, 4, 2, 16, 4, 4)
    groups = connect(Mesh(pp=2, ep=2), Place(rank, world, CPU), ranks_per_node=1)
    model = ModelConfig(hidden_size=64, num_experts=4, experts_per_token=2)
    dispatcher = make_dispatcher(Config(model=model, dispatch=DispatchConfig(kind="alltoall")), groups)
    expected = gradients(groups, work, dispatcher, lambda c, inputs: c.step(sequential(4, 4), inputs, groups.trace))
    results = []
    for order, one_by_one in (*((order, False) for order in ORDERS), ("zb_v", True)):
        case = parse(f"alltoall/bfloat16/{order}")

        def step(chain: Chain, inputs: list[Tensor], case: Case = case, one_by_one: bool = one_by_one) -> None:
            staged = Staged(case, groups, work, chain)
            staged.step(inputs, staged.alone if one_by_one else None)

        found, made = gradients(groups, work, dispatcher, step), pipeline(case, 2, 4)
        stages = cut(4, made.layout.num_stages)
        ours = {block for stage in made.layout.held[groups.coordinate.pp] for block in stages[stage]}
        same = {
            block: all(map(torch.equal, found[block], expected[block])) and len(found[block]) == len(expected[block])
            for block in ours
        }
        results.append((order, same | {block: not found[block] for block in set(range(4)) - ours}))
    return results


def test_every_schedule_in_processes():
    for results in spawn(over_four_ranks, 4, timeout_s=120):
        assert len(results) == 1 + len(ORDERS)
        assert [result for result in results if not all(result[1].values())] == []


@pytest.mark.parametrize("name", NAMES)
def test_one_micro_batch_at_a_time(name: str):
    made = alone(make(name, 4, 8))
    check(made)
    # Of the stages of a rank, those that a micro-batch passes.
    most = 1 if made.layout.mirrored else len(made.layout.held[0])
    assert [peak_live(slots) for slots in made.ranks] == [most] * 4


def test_stages_are_equal():
    assert cut(8, 4) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
