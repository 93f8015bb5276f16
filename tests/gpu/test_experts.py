import pytest
import torch
from torch import Tensor

from dstrain.precision.chunked import chunked
from dstrain.precision.grouped import grouped_linear
from dstrain.precision.swiglu import swiglu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_chunks_compute_what_the_whole_does_in_less_memory():
    ends = torch.tensor([60000, 60000, 60001, 65536], device="cuda", dtype=torch.int32)
    shapes = ((65536, 512), (4, 2 * 1024, 512), (4, 512, 1024))

    def run(chunk_rows: int) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        rows, gate_up, down = (torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes)
        torch.cuda.reset_peak_memory_stats()

        def compute(rows: Tensor, weights: Tensor | None, ends: Tensor) -> Tensor:
            return grouped_linear(swiglu(grouped_linear(rows, gate_up, ends), weights), down, ends)

        if chunk_rows:
            out = chunked(compute, (gate_up, down), rows, None, ends, chunk_rows)
        else:
            out = compute(rows, None, ends)
        out.backward(torch.ones_like(out))
        return [out.detach(), rows.grad, gate_up.grad, down.grad], torch.cuda.max_memory_allocated()

    whole, whole_bytes = run(0)
    parts, chunked_bytes = run(4096)
    for ours, theirs in zip(parts, whole, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 1e-2 * theirs.float().norm()
    assert chunked_bytes < whole_bytes - 65536 * 2048 * 2
