"""The dispatcher of a rank that holds every expert: sorting, and no transfer. The reference for all others."""

from dstrain.dispatch.transport import Transport
from dstrain.dispatch.wire import WireFormat


class LocalDispatcher(Transport):
    """All `num_experts` experts are here. With a wire format, rows are rounded as if they travelled in it."""

    def __init__(self, num_experts: int, wire: WireFormat | None = None, keeps_quantised: bool = False):
        super().__init__(num_experts, wire, keeps_quantised=keeps_quantised)
