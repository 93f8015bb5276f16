"""What a schedule may ask of a model: a walk that stops at every MoE block, and the four phases of the block.

    block = next(walk)                                  compute: a stretch of the model, up to the block's router
    outbound = block.layer.dispatch(block.attended)     a transfer sets out; meanwhile:
    stream = block.layer.shared(block.attended)         compute
    arrived = outbound.wait()
    rows = block.layer.experts(arrived)                 compute
    homebound = block.layer.combine(rows, arrived)      a transfer sets out
    block = walk.send(stream + homebound.wait())        compute: the next stretch

A schedule may keep several micro-batches between phases at once, each with a walk of its own; nothing in a layer
remembers which came last. Dense layers are parts of stretches. Whatever has this shape can be scheduled: `Transformer`,
or sleeps that stand for an accelerator. Its tensors meet other stretches and blocks of the same micro-batch through
`attended`, the handles and what is sent, and in no other way, since that is where graphs are cut.
"""

from collections.abc import Generator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from dstrain.dispatch.contract import Arrived, Handle
from dstrain.model.layer import Attended

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class PhasedLayer(Protocol):
    """What a schedule may ask of an MoE layer. Shapes as in model/layer.py."""

    def dispatch(self, attended: Attended) -> Handle[Arrived]: ...

    def experts(self, arrived: Arrived) -> Tensor: ...

    def combine(self, rows_RD: Tensor, arrived: Arrived) -> Handle[Tensor]: ...

    def shared(self, attended: Attended) -> Tensor:
        """The residual stream plus the shared expert: what can be computed while a transfer is under way."""
        ...


class PhasedBlock(Protocol):
    """Where a walk stops. `roots`: loss terms of the stretch before, scalars to be differentiated with weight 1."""

    @property
    def layer(self) -> PhasedLayer: ...

    @property
    def attended(self) -> Attended: ...

    @property
    def roots(self) -> Sequence[Tensor]: ...


class WalkEnd(Protocol[Result_co]):
    """What a walk returns: the roots of its last stretch, whatever the caller wants to know, and what the next stage of
    a pipeline starts from, None where the model ends."""

    @property
    def roots(self) -> Sequence[Tensor]: ...

    @property
    def output(self) -> Tensor | None: ...

    @property
    def result(self) -> Result_co: ...


PhasedWalk = Generator[PhasedBlock, Tensor, WalkEnd[Result]]
