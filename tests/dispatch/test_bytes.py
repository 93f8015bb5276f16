"""What rows in FP8 save on the way to the experts, forward and backward, counted as real ranks send it.

Shapes: T tokens, K experts per token, D hidden.
"""

import time

import pytest
import torch

from dstrain.comm.trace import Transfer
from dstrain.dispatch.wire import wire_format
from dstrain.mesh.topology import Link
from tests.dispatch.cases import EXPERTS, TRANSPORTS, everyone, make, route_of
from tests.gloo.spawn import spawn

TOKENS, PER_TOKEN = 48, 3
OUT = (("dispatch", "forward"), ("combine", "backward"))
HOME = (("combine", "forward"), ("dispatch", "backward"))


def ways(transport: str, wire: str, hidden: int, rank: int) -> list[Transfer]:
    """The four transfers of a micro-batch in BF16, once all of their messages have left."""
    dispatcher, trace = make(transport, wire_format(wire, torch.bfloat16)), everyone().trace
    generator, began_s = torch.Generator().manual_seed(rank), time.perf_counter()
    x_TD = torch.randn(TOKENS, hidden, generator=generator).bfloat16().requires_grad_()
    experts_TK = torch.rand(TOKENS, EXPERTS, generator=generator).topk(PER_TOKEN).indices
    arrived = dispatcher.dispatch(x_TD, route_of(experts_TK, rank)).wait()
    made_RD = arrived.rows_RD * arrived.weights_R[:, None].bfloat16()
    dispatcher.combine(made_RD, arrived.ticket).wait().sum().backward()
    found: dict[float, Transfer] = {}
    while len(found) < 4 or any(transfer.end_s is None for transfer in found.values()):
        # One that is under way comes again.
        found |= {t.start_s: t for t in trace.take().transfers if t.start_s > began_s}
        time.sleep(0.01)
    dispatcher.close()
    return list(found.values())


def sent_bytes(transfers: list[Transfer], directions: tuple[tuple[str, str], ...]) -> int:
    chosen = [t for t in transfers if (t.kind, t.label.direction) in directions]
    return sum(t.sent_bytes.get(link, 0) for t in chosen for link in (Link.NODE, Link.NETWORK))


def shares(rank: int, world: int, wire: str, hidden: int) -> dict[str, tuple[float, float]]:
    """Bytes that this rank sends out in a wire format, and home, against BF16, by transport."""
    found = {}
    for transport in TRANSPORTS[world]:
        narrow, wide = (ways(transport, name, hidden, rank) for name in (wire, "bfloat16"))
        out, home = (sent_bytes(narrow, way) / sent_bytes(wide, way) for way in (OUT, HOME))
        found[transport] = out, home
    return found


@pytest.mark.parametrize(("wire", "most"), [("fp8", 0.53), ("mxfp8", 0.53)])
def test_rows_out_take_half_of_the_bytes(wire: str, most: float):
    """Of all transports, with what else a message holds: counts, masks and weights. Rows home are as they were."""
    for found in spawn(shares, 4, wire, 1024):
        assert list(found) == list(TRANSPORTS[4])
        for transport, (out, home) in found.items():
            print(f"{wire}, {transport}: {out:.4f} of BF16's bytes out, {home:.4f} home")
            assert 0.5 < out <= most, transport
            assert home == 1, transport
