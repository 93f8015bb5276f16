"""Who computes the products of a layer from quantised operands: the interface that every backend offers.

    operand, kept = backend.activation(x)          1x128 tiles; what the backward pass keeps of x, in FP8
    y = backend.forward(operand, weight, ends)
    rows, columns = backend.gradient(grad, ends)   1x128 tiles, and 128x1 for the product over rows
    dx = backend.input_gradient(rows, weight, ends)
    dw = backend.weight_gradient(columns, backend.columns(kept, ends), ends)

`ends` (int32 [E], on the device) says where the rows of each expert end, None that there is one weight for all rows. An
operand is whatever a backend likes to multiply; nobody else looks into it. Sums are FP32, promoted every 128.

Shapes: R rows, K in, M out, F inner width of a SwiGLU, E experts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dstrain.config.schema import PrecisionConfig
from dstrain.precision.e5m6 import Packed
from dstrain.precision.formats import FLOOR, TILE, Format, Scaling
from dstrain.precision.quantize import Quantized
from dstrain.precision.swiglu import swiglu, swiglu_backward

Operand = Any
# Of an activation, until the backward pass.
Kept = Quantized | Packed
MXFP8_TILE = 32
Side = TypeVar("Side")


@dataclass(frozen=True)
class Sides(Generic[Side]):
    """A weight as the sums over its inputs, K, and over its outputs, M, want it."""

    over_in: Side
    over_out: Side


@dataclass(frozen=True)
class Scheme:
    """What is rounded how. `blocks`: weights have a scale per 128x128; without, per tile of the sum's dimension."""

    tile: int = TILE
    blocks: bool = True
    power_of_two: bool = True
    # Gradients in blocks, too: what made DeepSeek's training diverge (section B.2).
    gradient_blocks: bool = False

    @staticmethod
    def of(precision: PrecisionConfig) -> "Scheme":
        if precision.products == "mxfp8":
            return Scheme(MXFP8_TILE, blocks=False)
        return Scheme(
            power_of_two=precision.scales == "power_of_two", gradient_blocks=precision.gradient_tiles == "blocks"
        )

    @property
    def activations(self) -> Scaling:
        """Of weights as well."""
        return Scaling(self.power_of_two, FLOOR)

    @property
    def gradients(self) -> Scaling:
        """Without a floor: losses are shares of the global batch, and gradients as small."""
        return Scaling(self.power_of_two)


class Backend(ABC):
    """`scheme`: what is rounded how; `dtype`: that of activations and gradients around the products."""

    name: str

    def __init__(self, scheme: Scheme, dtype: torch.dtype):
        self.scheme, self.dtype = scheme, dtype

    @abstractmethod
    def weight(self, weight: Tensor) -> Operand:
        """[M, K], or [E, M, K]: an operand for `forward` and `input_gradient`."""

    @abstractmethod
    def activation(self, x_RK: Tensor | Quantized) -> tuple[Operand, Quantized]:
        """An operand for `forward`, and what is to be kept of it; what is quantised already stays as it is."""

    @abstractmethod
    def keep(self, x_RK: Tensor, number: Format) -> Kept:
        """What is to be kept of an activation that is no operand, in E4M3 or E5M6."""

    @abstractmethod
    def restore(self, kept: Kept) -> Tensor:
        """The dequantised activation, [R, K]."""

    @abstractmethod
    def columns(self, x_RK: Tensor | Kept, ends_E: Tensor | None) -> Operand:
        """Of an activation, for `weight_gradient`; what was kept is dequantised, turned and quantised again."""

    @abstractmethod
    def gradient(self, grad_RM: Tensor | Quantized, ends_E: Tensor | None) -> tuple[Operand, Operand]:
        """Operands for `input_gradient` and for `weight_gradient`."""

    @abstractmethod
    def forward(self, x: Operand, weight: Operand, ends_E: Tensor | None) -> Tensor:
        """x W^T of each row's expert, [R, M]."""

    @abstractmethod
    def input_gradient(self, grad: Operand, weight: Operand, ends_E: Tensor | None) -> Tensor:
        """grad W of each row's expert, [R, K]."""

    @abstractmethod
    def weight_gradient(self, grad: Operand, x: Operand, ends_E: Tensor | None) -> Tensor:
        """grad^T x, FP32 [M, K], or [E, M, K] with zeros for experts without rows."""

    def gated(self, gate_up_R2F: Tensor, weight_R: Tensor | None) -> Operand:
        """SwiGLU's output, times the row's weight, as an operand for `forward`."""
        return self.activation(swiglu(gate_up_R2F, weight_R))[0]

    def gated_back(
        self, kept: Kept, weight_R: Tensor | None, grad_RF: Tensor, ends_E: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Operand]:
        """SwiGLU's gradients, of its input [R, 2F] and of the weights, from what was kept of the input and the gradient
        of its output; and its output, computed again, as an operand for `weight_gradient`."""
        gate_up_R2F = self.restore(kept)
        return *swiglu_backward(gate_up_R2F, weight_R, grad_RF), self.columns(swiglu(gate_up_R2F, weight_R), ends_E)
