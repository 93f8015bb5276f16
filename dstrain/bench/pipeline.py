"""A rank of a pipeline in the bench: the schedules and the runtime of training around the bench's chain of blocks.

The chain is cut into equal stages, as many as a schedule has, so that all schedules have the same work. The ranks of an
expert-parallel group are on different nodes and a pipeline stays on one: what must hide crosses the limited links.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dstrain.bench.case import Case
from dstrain.bench.chain import Chain
from dstrain.bench.workload import Workload
from dstrain.mesh.groups import Groups
from dstrain.schedule.choose import Program
from dstrain.schedule.phases import PhasedWalk
from dstrain.schedule.pipe import Pipe
from dstrain.schedule.pipeline import Kind, Op, Pipeline, Slot
from dstrain.schedule.pipelines.choose import make
from dstrain.schedule.run import run_stages


def pipeline(case: Case, ranks: int, micro_batches: int) -> Pipeline:
    """The table of a case. 1f1b and interleaved get pairs where passes are to overlap."""
    return make(case.pipeline, ranks, micro_batches, overlap=case.overlap)


def alone(made: Pipeline) -> Pipeline:
    """The same stages on the same ranks, with one micro-batch under way at a time: nothing waits for another's work."""

    def slots(rank: int) -> Iterator[Slot]:
        for m in range(made.micro_batches):
            own = [stage for stage in sorted(made.layout.held[rank]) if made.rank_of[stage, m] == rank]
            yield from ((Op(Kind.FORWARD, stage, m),) for stage in own)
            yield from ((Op(Kind.BACKWARD, stage, m),) for stage in reversed(own))

    return Pipeline(made.name, made.layout, made.micro_batches, tuple(tuple(slots(r)) for r in range(len(made.ranks))))


def cut(blocks: int, stages: int) -> list[range]:
    """The blocks of every stage; `stages` divides `blocks`."""
    size = blocks // stages
    return [range(stage * size, (stage + 1) * size) for stage in range(stages)]


@dataclass
class Staged:
    """The steps of a case on this rank. `chain` has all blocks, of which this rank uses those of its stages."""

    case: Case
    groups: Groups
    work: Workload
    chain: Chain

    def __post_init__(self) -> None:
        made = pipeline(self.case, self.groups.mesh.pp, self.work.micro_batches)
        self.stages = cut(self.work.blocks, made.layout.num_stages)
        self.blocks, self.pipe = [len(stage) for stage in self.stages], Pipe(self.groups)
        rank = self.groups.coordinate.pp
        self.usual = Program.of(made, rank, self.blocks, overlap=self.case.overlap)
        self.alone = Program.of(alone(made), rank, self.blocks, overlap=False)

    def step(self, inputs: Sequence[Tensor], program: Program | None = None) -> None:
        """Forward and backward over this rank's part of the micro-batches."""
        program = program or self.usual
        if program.traffic is not None:
            self.pipe.begin(program.traffic, torch.empty_like(inputs[0], requires_grad=False))
        starts = {(stage, m): partial(self._start, inputs[m], stage, m) for stage, m in program.courses}
        run_stages(program.table, starts, self.blocks, self.pipe, self.groups.trace)

    def _start(self, first_TD: Tensor, stage: int, micro_batch: int, x_TD: Tensor | None) -> PhasedWalk[Tensor | None]:
        return self.chain.walk(first_TD if x_TD is None else x_TD, micro_batch, self.stages[stage])
