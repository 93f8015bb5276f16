"""One rank on a GPU that sends everything to itself over NCCL: the streams, events and buffers of a real run.

Skips itself where there is no GPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.comm.flat import FlatCollectives
from dstrain.comm.trace import Label
from dstrain.config.schema import Config
from dstrain.engine.loop import StepReport, Trainer
from dstrain.engine.sharding import ShardedEngine
from dstrain.engine.state import Progress
from dstrain.mesh.groups import Groups
from dstrain.parallel.apply import build_model
from dstrain.schedule.order import fixed
from dstrain.schedule.overlap import expand
from dstrain.schedule.pipe import Pipe, Traffic
from dstrain.schedule.pipelines.choose import make
from dstrain.schedule.run import run_stages
from dstrain.schedule.table import Table, sequential
from tests.dispatch.cases import EXPERTS, ROUTES
from tests.dispatch.test_contract import FORMATS, assert_close, assert_equal, reference
from tests.dispatch.test_contract import run as there_and_back
from tests.gpu.nccl import GPU, afresh, alone_over_nccl, transport
from tests.gpu.test_training import CONFIG
from tests.schedule.test_run import by_table, collected, differences, on_the_whole_graph
from tests.tiny import alone as on_cpu
from tests.tiny import samples, tiny_config, worst

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KINDS = ("alltoall", "rank", "hierarchical")
ON_RANKS = replace(CONFIG, dispatch=replace(CONFIG.dispatch, kind="rank"))


@pytest.fixture(scope="module")
def alone() -> Iterator[Groups]:
    with alone_over_nccl() as groups:
        yield groups


def carrying(kind: str, name: str) -> Config:
    """The format `name` of tests/dispatch/test_contract.py on a transport."""
    dtype, wire = FORMATS[name]
    precision = {"compute_dtype": str(dtype).removeprefix("torch.")}
    return tiny_config(
        model={"num_experts": EXPERTS}, dispatch={"kind": kind, "wire": wire or "auto"}, precision=precision
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_transport_equals_loops(alone: Groups, kind: str, name: str) -> None:
    dispatcher, (dtype, _) = transport(carrying(kind, name), alone), FORMATS[name]
    for case, experts_of in ROUTES.items():
        found = there_and_back(dispatcher, slice(None), experts_of(0), 0, dtype, GPU)
        expected = reference(case, name, 0)
        assert_equal(found, expected, dtype)
        assert_close(found.experts_grad, expected.experts_grad, dtype)
        assert found.counts == expected.counts
    dispatcher.close()


def on_gpu(config: Config, count: int) -> list[Tensor]:
    return [samples(config, 2 * m, 2).to(GPU) for m in range(count)]


@pytest.mark.parametrize("kind", ["alltoall", "rank"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_micro_batches_in_flight_change_no_bit(alone: Groups, kind: str, dtype: str) -> None:
    config = replace(CONFIG, dispatch=replace(CONFIG.dispatch, kind=kind))
    model = build_model(config, alone)
    for name, parameter in model.named_parameters():
        if "router" not in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    batches = on_gpu(config, 4)
    expected, losses = collected(model, lambda: on_the_whole_graph(model, batches))
    tables: list[Table] = [sequential(model.num_blocks, 4), fixed(model.num_blocks, 4, 2)]
    for table in tables:
        found, ours = collected(model, lambda: by_table(model, batches, table, alone.trace))  # noqa: B023
        assert differences(found, expected) == []
        assert all(torch.equal(a.total, b.total) for a, b in zip(ours, losses, strict=True))


def reports(config: Config, groups: Groups, steps: int = 3) -> list[StepReport]:
    """Of steps that start from the weights of the CPU: a device has random streams of its own."""
    model = build_model(config, groups)
    model.load_state_dict(
        {name: x.to(groups.place.device) for name, x in build_model(config, on_cpu()).state_dict().items()}
    )
    engine = ShardedEngine(model, config, groups)
    batches = lambda first, count: samples(config, first, count)  # noqa: E731
    trainer = Trainer(config, groups, model, engine, batches, Progress())
    return [trainer.step() for _ in range(steps)]


def start(config: Config) -> dict[str, Tensor]:
    return build_model(config, on_cpu()).state_dict()


@pytest.mark.parametrize("in_flight", [1, 2])
def test_steps_are_those_of_the_cpu(alone: Groups, in_flight: int) -> None:
    config = replace(ON_RANKS, schedule=replace(CONFIG.schedule, in_flight=in_flight))
    gpu = reports(config, afresh(alone))
    for ours, theirs in zip(gpu, reports(config, on_cpu()), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
    assert f"{in_flight} of 4 micro-batches in flight" in gpu[-1].order


def test_the_account_of_a_step_is_plausible(alone: Groups) -> None:
    groups = afresh(alone)
    groups.trace.keeps_spans = True
    *_, report = reports(ON_RANKS, groups)
    comm, waits = report.comm, {f"wait {kind}" for kind in report.comm.waited_ms}
    # Two MoE blocks, four micro-batches, both directions; gradients and parameters in buckets; the sum of losses.
    assert {kind: n for kind, n in counted(comm.transfers).items() if kind in ("dispatch", "combine")} == {
        "dispatch": 16,
        "combine": 16,
    }
    assert all(t.end_s is not None and t.start_s < t.end_s for t in comm.transfers if t.kind in ("dispatch", "combine"))
    assert comm.sent_bytes == {}
    # The device finds no more time to wait than the host sees pass.
    assert all(ms >= 0 for ms in comm.waited_ms.values())
    assert 0 < comm.exposed_ms < report.seconds * 1e3
    assert {span.name for span in comm.spans} == {"attend", "shared", "experts", *waits}
    for span in comm.spans:
        assert comm.start_s - 1e-3 < span.start_s <= span.end_s < comm.end_s + 1e-3
    compute = [s for s in comm.spans if not s.name.startswith("wait") and s.label.direction == "forward"]
    assert len(compute) == 4 * (3 + 2 + 2)


def counted(transfers: list[Any]) -> dict[str, int]:
    kinds = [transfer.kind for transfer in transfers]
    return {kind: kinds.count(kind) for kind in kinds}


def test_flat_buffers_pass_the_side_stream(alone: Groups) -> None:
    flat = FlatCollectives(alone.trace)
    x = torch.randn(1 << 24, device=GPU)
    expected, busy = x.clone() * 3, torch.randn(4096, 4096, device=GPU)
    # Whoever starts a sum may still be computing what is summed, and who waits may go on at once.
    for _ in range(20):
        busy = busy @ busy / 4096
    x.mul_(3)
    summed = flat.reduce_scatter(x, alone.data, torch.float32, "grad").wait()
    gathered = flat.all_gather(x, alone.data, "param").wait()
    assert torch.equal(summed, expected)
    assert torch.equal(gathered.flatten(), expected)


@pytest.mark.parametrize(("pipeline", "overlap"), [("interleaved", True), ("zb_v", False), ("dualpipev", True)])
def test_a_pipeline_on_one_rank_equals_the_whole_graph(alone: Groups, pipeline: str, overlap: bool) -> None:
    config = tiny_config(model=vars(CONFIG.model) | {"num_layers": 4}, dispatch={"kind": "rank"})
    cut = replace(config, schedule=replace(config.schedule, split=(2, 2)))
    made = make(pipeline, 1, 4, 2, overlap=overlap and pipeline == "interleaved")
    groups = afresh(alone, made.layout)
    staged, whole, batches = build_model(cut, groups), build_model(config, alone), on_gpu(config, 4)
    traffic, pipe, like = Traffic.of(made, 0), Pipe(groups), torch.empty(0, device=GPU)

    def by_stages(overlaps: bool) -> list[Any]:
        pipe.begin(traffic, like)
        starts = {
            (stage, m): lambda x, stage=stage, m=m: staged.walk_stage(stage, batches[m], x, 7)
            for stage, m in made.rank_of
        }
        table = expand(made.ranks[0], staged.blocks, overlap=overlaps)
        return list(run_stages(table, starts, staged.blocks, pipe, groups.trace).values())

    expected, losses = collected(whole, lambda: on_the_whole_graph(whole, batches))
    plain, _ = collected(staged, partial(by_stages, False))
    found, ours = collected(staged, partial(by_stages, overlap))
    assert staged.blocks == (1, 3)
    assert differences(found, plain) == []
    total = sum(loss.total for loss in ours)
    assert total.item() == pytest.approx(sum(loss.total for loss in losses).item(), rel=1e-6)
    sums = [{name: torch.stack(grads).sum(0) for name, grads in side.items()} for side in (found, expected)]
    assert worst(*sums) < 1e-5


def test_labels_reach_the_threads_of_the_device(alone: Groups) -> None:
    """Backward passes run in a thread of autograd's own, which sees the label of the action that started them."""
    model, batches = build_model(CONFIG, alone), on_gpu(CONFIG, 1)
    alone.trace.take()
    collected(model, lambda: by_table(model, batches, sequential(model.num_blocks, 1), alone.trace))
    torch.cuda.synchronize()
    labels = [(t.kind, t.label) for t in alone.trace.take().transfers]
    ways = [(k, d) for k, d in (("dispatch", "forward"), ("combine", "forward"), ("combine", "backward"))]
    assert labels[:2] == [(kind, Label(0, 0, direction)) for kind, direction in ways[:2]]
    assert {(kind, label.direction) for kind, label in labels} == {*ways, ("dispatch", "backward")}
