"""The plain quantisers against the definition, and what must hold of any."""

import pytest
import torch

from dstrain.precision.formats import FLOOR, Scaling
from dstrain.precision.quantize import (
    Quantized,
    dequantize_blocks,
    dequantize_rows,
    padded_rows,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
)
from tests.precision.cases import SCALINGS, SHAPES, matrix, same


def nearest(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 number of x / scale, to even, times scale; every number of E4M3 tried."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[~numbers.isnan()].unique()
    gaps = ((x / scale).double()[..., None] - numbers).abs()
    return numbers[gaps.argmin(-1)].float() * scale


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_every_number_becomes_the_nearest(scaling: Scaling):
    x = matrix(40, 200)[7:]
    q = quantize_rows(x, scaling)
    scale = q.scale.repeat_interleave(128, 1)[:, :200]
    assert torch.equal(q.scale[:, 1], scaling.scales(x[:, 128:].abs().amax(1)))
    assert same(dequantize_rows(q), nearest(x, scale))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_tiles(shape: tuple[int, int]):
    rows, columns = shape
    x = matrix(*shape)
    q = quantize_rows(x, Scaling())
    assert (q.values.shape, q.scale.shape) == (shape, (rows, -(-columns // 128)))
    q = quantize_columns(x, Scaling())
    assert (q.values.shape, q.scale.shape) == ((columns, padded_rows(rows)), (columns, padded_rows(rows) // 128))
    assert same(dequantize_rows(q).t()[:rows], dequantize_rows(quantize_rows(x.t().contiguous(), Scaling())).t())
    q = quantize_blocks(x, Scaling())
    assert (q.values.shape, q.scale.shape) == (shape, (-(-rows // 128), -(-columns // 128)))


def test_columns_begin_a_tile_for_every_expert():
    x, counts = matrix(300, 5)[7:], [100, 0, 193]
    q = quantize_columns(x, Scaling(), counts)
    assert q.values.shape == (5, padded_rows(293, 3))
    alone = [quantize_columns(part, Scaling()) for part in x.split(counts)]
    used = sum(part.values.shape[1] for part in alone)
    assert torch.equal(q.values[:, :used].float(), torch.cat([part.values.float() for part in alone], 1))
    assert torch.equal(q.scale[:, : used // 128], torch.cat([part.scale for part in alone], 1))
    assert not q.values[:, used:].float().any()


def test_a_block_is_one_tile():
    x = matrix(200, 300)[7:]
    q = quantize_blocks(x[None].repeat(2, 1, 1), Scaling())
    assert q.scale[1, 1, 2] == Scaling().scales(x[128:, 256:].abs().amax())
    assert same(dequantize_blocks(q)[0, 128:, 256:], nearest(x[128:, 256:], q.scale[1, 1, 2]))


def test_what_is_not_finite_stays_in_its_tile():
    q = quantize_rows(matrix(7, 300), Scaling())
    assert q.scale.isnan().nonzero().tolist() == [[1, 1], [2, 2]]
    assert dequantize_rows(q)[1, 128:256].isnan().all()
    assert not q.values[1, 128:256].float().any()
    # Zeros, denormals, and an outlier beside which all else vanishes.
    assert not dequantize_rows(q)[3].any()
    assert dequantize_rows(q)[6, 0] == 240 * 128


@pytest.mark.parametrize("floor", [0.0, FLOOR])
def test_quantising_again_changes_nothing_with_powers_of_two(floor: float):
    x = matrix(300, 200)
    for there, back in ((quantize_rows, dequantize_rows), (quantize_blocks, dequantize_blocks)):
        once = back(there(x, Scaling(True, floor)))
        assert same(back(there(once, Scaling(True, floor))), once)
        # And BF16 holds what they come to.
        assert same(once.bfloat16().float(), once)


def test_tiles_of_32():
    x = matrix(40, 200)[7:]
    q = quantize_rows(x, Scaling(), 32)
    assert (q.scale.shape, q.tile) == ((33, 7), 32)
    assert same(dequantize_rows(q), nearest(x, q.scale.repeat_interleave(32, 1)[:, :200]))
    assert isinstance(q, Quantized)
