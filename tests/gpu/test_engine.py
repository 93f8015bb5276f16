"""What the engine keeps and sends in 8 bits is on a GPU what it is on a CPU."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.comm.collectives import Peers
from dstrain.comm.flat import FlatCollectives
from dstrain.comm.trace import Trace
from dstrain.engine.fp8 import WEIGHTS, Fp8Gather, stacks_of
from dstrain.engine.moments import EightBit
from dstrain.precision.quantize import dequantize_blocks, quantize_blocks
from tests.gloo.spawn import spawn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = (3, 300, 200)


def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 3, 200)


def rounded(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """By a group of one, in a lane; and without a group."""
    cuda = torch.device("cuda", 0)
    flat = noise().flatten().to(cuda)
    stacks, shares = stacks_of([0], [SHAPE]), [slice(0, len(flat))]
    found = []
    for peers in (Peers(dist.group.WORLD, Trace(cuda)), None):
        compute = torch.zeros(len(flat), dtype=torch.bfloat16, device=cuda)
        flight = Fp8Gather(stacks, shares, peers, cuda).start(FlatCollectives(Trace(cuda)), flat, compute)
        if flight is not None:
            flight.wait()
        found.append(compute.float().cpu().view(SHAPE))
    return found[0], found[1]


def test_weights_are_rounded_alike():
    expected = dequantize_blocks(quantize_blocks(noise(), WEIGHTS))
    gathered, alone = spawn(rounded, 1)[0]
    assert torch.equal(gathered, expected)
    assert torch.equal(alone, expected)


@pytest.mark.parametrize("signed", [True, False])
def test_moments_are_rounded_alike(signed: bool):
    x = noise().flatten() if signed else noise().flatten().square()
    here, there = (EightBit.zeros_like(y, signed=signed) for y in (x, x.cuda()))
    here.write(slice(0, len(x)), x)
    there.write(slice(0, len(x)), x.cuda())
    assert torch.equal(there.state.codes.cpu(), here.state.codes)
    assert torch.equal(there.lend().cpu(), here.lend())
