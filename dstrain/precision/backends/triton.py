"""FP8 products in Triton, for every GPU with FP8 tensor cores: L40S, H100, B200, RTX 4090 and 5090."""

from torch import Tensor

from dstrain.precision.backend import Kept, Operand, Sides
from dstrain.precision.backends.gpu import GpuBackend
from dstrain.precision.kernels.gemm import multiply_rows
from dstrain.precision.kernels.gemm_columns import multiply_columns
from dstrain.precision.kernels.quantize import quantize_blocks_both
from dstrain.precision.kernels.swiglu import swiglu_rows, swiglu_rows_back
from dstrain.precision.quantize import Quantized

# In blocks, and turned: tensor cores want both sides of an FP8 product along the dimension of the sum.
Weight = Sides[Quantized]


class TritonBackend(GpuBackend):
    name = "triton"

    def weight(self, weight: Tensor) -> Weight:
        return Weight(*quantize_blocks_both(weight, self.scheme.activations))

    def forward(self, x: Quantized, weight: Weight, ends_E: Tensor | None) -> Tensor:
        return self._multiply(x, weight.over_in, ends_E)

    def input_gradient(self, grad: Quantized, weight: Weight, ends_E: Tensor | None) -> Tensor:
        return self._multiply(grad, weight.over_out, ends_E)

    def weight_gradient(self, grad: Operand, x: Operand, ends_E: Tensor | None) -> Tensor:
        return multiply_columns(grad, x, ends_E)

    def gated(self, gate_up_R2F: Tensor, weight_R: Tensor | None) -> Quantized:
        return swiglu_rows(gate_up_R2F.contiguous(), weight_R, self.scheme.activations)

    def gated_back(
        self, kept: Kept, weight_R: Tensor | None, grad_RF: Tensor, ends_E: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Quantized]:
        if not isinstance(kept, Quantized):
            return super().gated_back(kept, weight_R, grad_RF, ends_E)
        return swiglu_rows_back(kept, weight_R, grad_RF, self.scheme.activations, ends_E)

    def _multiply(self, rows: Quantized, blocks: Quantized, ends_E: Tensor | None) -> Tensor:
        """Rows times the transpose of blocks: both kinds of product over channels."""
        return multiply_rows(rows, blocks, ends_E, self.dtype)
