"""Our tables run by torch.distributed.pipelining, and beside the orders that it makes itself."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from dstrain.errors import UserError
from dstrain.schedule.pipeline import Pipeline
from dstrain.schedule.pipelines.choose import make
from dstrain.schedule.torch_csv import to_csv
from tests.gloo.spawn import spawn

HIDDEN, MICRO_BATCH = 6, 3
SPLIT_TEXT = """\
0F0,0F1,0I0,0W0,0F2,0I1,0W1,0I2,0W2
1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1W2
"""


def make_stages(num_stages: int) -> list[nn.Module]:
    """H -> H each, equal in all processes."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh()) for _ in range(num_stages)]


def batch(micro_batches: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs_BH, targets_BH = torch.randn(2, micro_batches * MICRO_BATCH, HIDDEN, generator=generator)
    return inputs_BH, targets_BH


def wrapped(stages: list[nn.Module], held: tuple[int, ...]) -> list[PipelineStage]:
    # With shapes given, torch runs no stage to find them out.
    meta_BH = torch.empty(MICRO_BATCH, HIDDEN, device="meta")
    gradient_BH = torch.empty(MICRO_BATCH, HIDDEN, device="meta")
    return [
        PipelineStage(
            stages[i],
            i,
            len(stages),
            torch.device("cpu"),
            input_args=(meta_BH.requires_grad_(i > 0),),
            output_args=(torch.empty(MICRO_BATCH, HIDDEN, device="meta", requires_grad=True),),
            input_grads=(gradient_BH if i else None,),
            output_grads=(gradient_BH if i < len(stages) - 1 else None,),
        )
        for i in held
    ]


CASES = [
    ("1f1b", False),
    ("1f1b", True),
    ("interleaved", False),
    ("interleaved", True),
    ("zb_1p", False),
    ("zb_v", False),
    ("dualpipev", False),
]
Gradients = dict[tuple[int, str], Tensor]


def run_csv(rank: int, world_size: int, folder: str, micro_batches: int) -> list[Gradients]:
    """For each case, the gradients of a rank after a step of torch's runtime, by stage and name."""
    return [step(rank, make(name, world_size, micro_batches, overlap=overlap), folder) for name, overlap in CASES]


def step(rank: int, pipeline: Pipeline, folder: str) -> Gradients:
    stages = make_stages(pipeline.layout.num_stages)
    held = pipeline.layout.held[rank]
    path = Path(folder) / f"{rank}.csv"
    path.write_text(to_csv(pipeline))
    runtime = schedules._PipelineScheduleRuntime(wrapped(stages, held), pipeline.micro_batches, loss_fn=F.mse_loss)
    runtime._load_csv(str(path))
    inputs_BH, targets_BH = batch(pipeline.micro_batches)
    # Each end takes what belongs there.
    arguments = (inputs_BH,) if 0 in held else ()
    runtime.step(*arguments, target=targets_BH if len(stages) - 1 in held else None)
    return {(i, key): parameter.grad for i in held for key, parameter in stages[i].named_parameters()}


@pytest.fixture(scope="module")
def gradients_of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[Gradients]]:
    return spawn(run_csv, 2, str(tmp_path_factory.mktemp("csv")), 6)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "-".join(map(str, CASES[case])))
def test_gradients_equal_one_process(gradients_of_ranks: list[list[Gradients]], case: int):
    stages = make_stages(make(CASES[case][0], 2, 6).layout.num_stages)
    inputs_BH, targets_BH = batch(6)
    F.mse_loss(nn.Sequential(*stages)(inputs_BH), targets_BH).backward()
    wanted = {(i, key): p.grad for i, stage in enumerate(stages) for key, p in stage.named_parameters()}
    gradients = {**gradients_of_ranks[0][case], **gradients_of_ranks[1][case]}
    assert gradients.keys() == wanted.keys()
    for place, gradient in wanted.items():
        torch.testing.assert_close(gradients[place], gradient, rtol=1e-5, atol=1e-8)


CLASSES = {
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    # With one stage a rank it is zb_1p.
    "zb_1p": schedules.ScheduleInterleavedZeroBubble,
    "zb_v": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
Orders = dict[tuple[str, int], list[list[str]]]


def torch_orders(rank: int, world_size: int) -> Orders:
    return {(name, count): torch_order(rank, world_size, name, count) for name in CLASSES for count in (8, 12)}


def torch_order(rank: int, world_size: int, name: str, micro_batches: int) -> list[list[str]]:
    """The compute actions of every rank as a schedule class of torch orders them."""
    held = make(name, world_size, micro_batches).layout.held[rank]
    stages = wrapped(make_stages(world_size * len(held)), held)
    if name == "1f1b":
        order = CLASSES[name](stages[0], micro_batches)._get_pipeline_order()
    else:
        order = CLASSES[name](stages, micro_batches).pipeline_order
    compute = [
        [action for action in order[i] if action is not None and action.is_compute_op] for i in range(world_size)
    ]
    return [[str(action) for action in actions] for actions in compute]


@pytest.fixture(scope="module")
def orders_of_torch() -> Orders:
    return spawn(torch_orders, 4)[0]


def our_order(name: str, micro_batches: int) -> list[list[str]]:
    return [line.split(",") for line in to_csv(make(name, 4, micro_batches)).splitlines()]


@pytest.mark.parametrize("micro_batches", [8, 12])
@pytest.mark.parametrize("name", ["interleaved", "zb_1p", "dualpipev"])
def test_order_equals_that_of_torch(orders_of_torch: Orders, name: str, micro_batches: int):
    assert our_order(name, micro_batches) == orders_of_torch[name, micro_batches]


@pytest.mark.parametrize("micro_batches", [8, 12])
def test_1f1b_differs_in_names_of_the_last_rank(orders_of_torch: Orders, micro_batches: int):
    """torch lists the last rank's forward ops as micro-batches 1, 2, ... and runs 0, 1, ..."""
    *ours, last = our_order("1f1b", micro_batches)
    *theirs, listed = orders_of_torch["1f1b", micro_batches]
    assert ours == theirs
    assert [f"3F{int(op[2:]) + 1}" if op[1] == "F" else op for op in last] == listed


@pytest.mark.parametrize("micro_batches", [8, 12])
def test_zb_v_differs_in_the_last_weight_gradients(orders_of_torch: Orders, micro_batches: int):
    """Weight gradients stand in the same places. Of those put off in the cool-down, torch does all of the first leg
    that fit and then the second leg; ours are oldest first."""
    theirs = orders_of_torch["zb_v", micro_batches]
    for rank, (our, their) in enumerate(zip(our_order("zb_v", micro_batches), theirs, strict=True)):
        assert sorted(our) == sorted(their)
        assert [op if "W" not in op else "W" for op in our] == [op if "W" not in op else "W" for op in their]
        # Up to the first of two input gradients in a row, nothing is put off.
        cool_down = next((i for i in range(len(our) - 1) if "I" in our[i] and "I" in our[i + 1]), len(our))
        assert our[:cool_down] == their[:cool_down]
        assert (our == their) == (rank == 0)


def test_text():
    assert to_csv(make("zb_1p", 2, 3)) == SPLIT_TEXT
    assert to_csv(make("1f1b", 1, 2, overlap=True)) == "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n"


def test_mirrored_stages_are_refused():
    with pytest.raises(UserError, match="dualpipe holds every stage on two ranks.* Take dualpipev"):
        to_csv(make("dualpipe", 4, 8))
