"""A rank of the bench: runs steps of one case after another, as the driver asks, and reports what each one took.

The driver and a worker talk over a pipe, in Python objects; all ranks get the same requests in the same order. Between
two requests nothing is under way, so the driver can read the counters of the cards.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.bench.case import Case
from dstrain.bench.chain import BlockingLane, Chain, Layer, Replay
from dstrain.bench.emulate import Clock, Emulated
from dstrain.bench.messages import Failure, Prepare, Record, Run, StepFigures, Timing
from dstrain.bench.peers.choose import PEERS
from dstrain.bench.peers.contract import Compute, Spec
from dstrain.bench.pipeline import Staged
from dstrain.bench.real import DTYPE, Real, model_config
from dstrain.bench.workload import Workload
from dstrain.comm.collectives import Peers
from dstrain.comm.trace import CommTotals
from dstrain.config.schema import Config, DispatchConfig, MeshConfig
from dstrain.dispatch.choose import make_dispatcher
from dstrain.dispatch.contract import Dispatcher
from dstrain.dispatch.transport import Transport
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.schedule.choose import timed
from dstrain.schedule.simulate import Costs
from dstrain.schedule.table import Table

# Runs a step over the inputs of its micro-batches, in the order of a table.
Step = Callable[[Table, list[Tensor]], object]


@dataclass
class _Bench:
    """The current model on this rank, and what has been built for its cases."""

    groups: Groups
    ep: Peers
    work: Workload
    clock: Clock
    compute: Compute
    # As much as this rank has in a pipeline, in blocks of a model of its own.
    alone: Compute
    steps: dict[Case | None, Step] = field(default_factory=dict)
    staged: dict[Case, Staged] = field(default_factory=dict)

    def answer(self, request: Run | Timing | Record) -> object:
        if isinstance(request, Run):
            return self.run(request)
        return self.time(request) if isinstance(request, Timing) else self.record(request)

    def run(self, request: Run) -> list[StepFigures]:
        if request.case not in self.steps:
            self.steps[request.case] = self._build(request.case)
        step = self.steps[request.case]
        return [self._measure(step, request.table) for _ in range(request.steps)]

    def time(self, request: Timing) -> Costs:
        self.run(Run(request.case, request.table, 1))
        step, inputs = self.steps[request.case], self._inputs()
        return timed(self._recorded(lambda: step(request.table, inputs)), self.work.blocks)

    def record(self, request: Record) -> CommTotals:
        staged, inputs = self.staged[request.case], self._inputs()
        return self._recorded(lambda: staged.step(inputs, staged.alone if request.alone else None))

    def _recorded(self, act: Callable[[], object]) -> CommTotals:
        trace = self.groups.trace
        dist.barrier(self.groups.background)
        trace.take()
        trace.keeps_spans = True
        act()
        trace.keeps_spans = False
        return trace.take()

    def _measure(self, step: Step, table: Table) -> StepFigures:
        trace, clock, inputs = self.groups.trace, self.clock, self._inputs()
        dist.barrier(self.groups.background)
        trace.take()
        before = clock.slept_s, time.thread_time(), time.process_time(), time.perf_counter()
        step(table, inputs)
        now = clock.slept_s, time.thread_time(), time.process_time(), time.perf_counter()
        compute, main_cpu, cpu, whole = ((b - a) * 1e3 for a, b in zip(before, now, strict=True))
        return StepFigures(whole, compute, trace.take().exposed_ms, main_cpu, cpu)

    def _build(self, case: Case | None) -> Step:
        """What runs a step."""
        routes = self.work.routes(self.groups.coordinate.ep)
        if case is not None and case.is_peer:
            work = self.work
            spec = Spec(work.hidden_size, work.num_experts, work.experts_per_token, work.tokens, routes)
            peer = PEERS[case.kind].make(spec, self.ep.group, self.compute)
            return lambda _, inputs: peer.step(inputs)
        if case is None:
            own = range(self.work.blocks // self.groups.mesh.pp)
            chain = Chain([Layer(self._replay(), self.alone, block) for block in own], routes)
        else:
            dispatcher = self._dispatcher(case)
            chain = Chain([Layer(dispatcher, self.compute, block) for block in range(self.work.blocks)], routes)
        if case is not None and case.pipeline:
            staged = self.staged[case] = Staged(case, self.groups, self.work, chain)
            return lambda _, inputs: staged.step(inputs)
        return lambda table, inputs: chain.step(table, inputs, self.groups.trace)

    def _replay(self) -> Replay:
        """Sleeps don't depend on rows: none are copied for them."""
        return Replay(self.work.experts_per_token if isinstance(self.compute, Real) else 1, self.work.held)

    def _inputs(self) -> list[Tensor]:
        return drawn(self.work, self.groups.place.rank)

    def _dispatcher(self, case: Case) -> Dispatcher:
        """As training makes it."""
        work, dispatch = self.work, DispatchConfig(kind=case.kind, wire=case.wire)
        config = Config(mesh=MeshConfig(ep=work.ranks), model=model_config(work), dispatch=dispatch)
        dispatcher = make_dispatcher(config, self.groups)
        if case.in_flight == 0 and isinstance(dispatcher, Transport):
            dispatcher.lane = BlockingLane(self.groups.trace)
        return dispatcher


def drawn(work: Workload, rank: int) -> list[Tensor]:
    """Random inputs of all micro-batches, each a leaf [T, D]."""
    generator, shape = torch.Generator().manual_seed(rank), (work.tokens, work.hidden_size)
    inputs = [torch.randn(shape, generator=generator) for _ in range(work.micro_batches)]
    return [x_TD.to(DTYPE).requires_grad_() for x_TD in inputs]


def _prepared(request: Prepare, groups: Groups, ep: Peers, clock: Clock) -> _Bench:
    work, forward_ms = request.work, request.forward_ms
    if forward_ms is None:
        real = Real(work)
        return _Bench(groups, ep, work, clock, real, real)
    whole, own = (Emulated(clock, forward_ms, blocks) for blocks in (work.blocks, work.blocks // groups.mesh.pp))
    return _Bench(groups, ep, work, clock, whole, own)


def serve(driver: Connection, timeout_s: float, pp: int) -> None:
    """Answers requests until the driver sends None. `pp`: ranks of a pipeline."""
    place = Place.from_environment()
    groups = connect(Mesh(pp=pp, ep=place.world // pp), place, timeout_s)
    if groups.ep is None:
        raise RuntimeError("the bench needs several ranks")
    clock, bench = Clock(), None
    driver.send(groups.topology)
    while (request := driver.recv()) is not None:
        if isinstance(request, Prepare):
            bench = _prepared(request, groups, groups.ep, clock)
            driver.send(None)
        elif bench is not None:
            driver.send(bench.answer(request))
    dist.barrier(groups.background)


def main() -> None:
    """`python -m dstrain.bench.worker <file descriptor of the pipe> <time-out in seconds> <ranks of a pipeline>`"""
    torch.set_num_threads(1)
    driver, status = Connection(int(sys.argv[1])), 0
    try:
        serve(driver, float(sys.argv[2]), int(sys.argv[3]))
    except BaseException:
        status = 1
        traceback.print_exc()
        with suppress(OSError):
            driver.send(Failure(traceback.format_exc()))
    sys.stderr.flush()
    # Receives that will never be answered would hold back a regular exit.
    os._exit(status)


if __name__ == "__main__":
    main()
