"""The contract between a layer and whoever orders its work: four phases, cut where communication happens.

    attended = layer.attend(x, cos, sin)            compute
    outbound = layer.dispatch(attended)             a transfer sets out; meanwhile:
    stream = layer.shared(attended)                 compute
    arrived = outbound.wait()
    rows = layer.experts(arrived)                   compute
    homebound = layer.combine(rows, arrived)        a transfer sets out
    x = stream + homebound.wait()

A schedule may keep several micro-batches between phases at once; nothing in a layer remembers which came last. A dense
layer has no transfers and is called whole.
"""

from typing import Protocol

from torch import Tensor

from dstrain.dispatch.contract import Arrived, Handle
from dstrain.model.layer import Attended


class PhasedLayer(Protocol):
    """What a schedule may ask of an MoE layer. Shapes as in model/layer.py."""

    def attend(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Attended: ...

    def dispatch(self, attended: Attended) -> Handle[Arrived]: ...

    def experts(self, arrived: Arrived) -> Tensor: ...

    def combine(self, rows_RD: Tensor, arrived: Arrived) -> Handle[Tensor]: ...

    def shared(self, attended: Attended) -> Tensor:
        """The residual stream plus the shared expert: what can be computed while a transfer is under way."""
        ...
