import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.precision.backends.layout import by_expert, padded_ends, padded_places, placed, swizzled
from dstrain.precision.quantize import padded_rows

COUNTS = [[3, 128, 0, 130], [0, 0, 5], [256], [0, 0]]


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_rows_of_every_expert_begin_a_tile(counts: list[int]):
    place_R, owner_P = padded_places(ends(counts), sum(counts))
    values = torch.arange(sum(counts), dtype=torch.float32)[:, None] + 1
    spread = placed(values, place_R, len(owner_P))
    expected = torch.cat([F.pad(part, (0, 0, 0, -len(part) % 128)) for part in values.split(counts)])
    assert torch.equal(spread[: len(expected)], expected)
    assert not spread[len(expected) :].any()
    assert padded_ends(ends(counts)).tolist() == [
        int(n) for n in torch.tensor(list(map(padded_rows, counts))).cumsum(0)
    ]
    for expert, end in enumerate(padded_ends(ends(counts)).tolist()):
        assert set(owner_P[end - padded_rows(counts[expert]) : end].tolist()) <= {expert, -1}
    assert int((owner_P >= 0).sum()) == sum(counts)


def test_rows_behind_all_experts_find_a_place():
    place_R, owner_P = padded_places(ends([1, 130]), 140)
    assert len(set(place_R.tolist())) == 140
    assert int(place_R.max()) < len(owner_P)


def test_quantised_rows_keep_their_bits():
    values = torch.linspace(-448, 448, 6).view(2, 3).to(torch.float8_e4m3fn)
    spread = placed(values, torch.tensor([4, 1]), 6)
    assert torch.equal(spread[[4, 1]].float(), values.float())


def swizzled_plainly(scale_MS: Tensor) -> Tensor:
    """Byte by byte, by NVIDIA's description of the layout (cuBLAS, "1D block scaling factors layout")."""
    rows, columns = scale_MS.shape
    blocks = torch.zeros(-(-rows // 128), -(-columns // 4), 512, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            place = row % 32 * 16 + row % 128 // 32 * 4 + column % 4
            blocks[row // 128, column // 4, place] = int(scale_MS[row, column].log2()) + 127
    return blocks


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 9), (40, 3)], ids=str)
def test_swizzled(shape: tuple[int, int]):
    scale = 2.0 ** torch.randint(-126, 128, shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(swizzled(scale).view(torch.uint8), swizzled_plainly(scale))
    both = swizzled(torch.stack((scale, 2 * scale.clamp(max=2.0**126))))
    assert torch.equal(both[0].view(torch.uint8), swizzled_plainly(scale))


def test_a_scale_of_nan_stays_one():
    assert swizzled(torch.tensor([[torch.nan]]))[0, 0, 0].float().isnan()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_scales_of_every_expert_lie_on_their_own(counts: list[int]):
    """Columns of 32 rows each: an expert's matrix of scales is swizzled, then the next one's follows."""
    padded = [padded_rows(count) // 32 for count in counts]
    columns = padded_rows(sum(counts), len(counts)) // 32
    scale = 2.0 ** torch.randint(-9, 9, (200, columns), generator=torch.Generator().manual_seed(2))
    ours = by_expert(swizzled(scale), ends(counts)).view(torch.uint8).flatten()
    parts = [swizzled_plainly(part).flatten() for part in scale[:, : sum(padded)].split(padded, 1)]
    expected = torch.cat(parts)
    assert torch.equal(ours[: len(expected)], expected)
