"""AdamW's two moments: vectors in FP32 or BF16, or in 8 bits (arXiv:2110.02861) as torchao stores them.

Of 8 bits, 256 neighbours share an FP32 scale, and a code names one of 256 numbers between -1 and 1 that lie close
together near 0 (torchao's map): 2.03 bytes per parameter for both moments instead of 8. AdamW's own arithmetic stays in
FP32: a stretch is read, updated and written back.

Checkpoints and moves to other ranks know ranges and nothing of blocks: they see FP32 copies, which are lent until they
are taken back or forgotten. Writing what was read changes no bit, hence a run that resumes in its layout goes on as if
it had never ended.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.errors import ConfigError

if TYPE_CHECKING:
    from torchao.optim.subclass_8bit import OptimState8bit

VERSION = "0.18"
BLOCK = 256
# Scales keep so many bits fewer than FP32 has: see `_scales`.
SPARE_BITS = 7
SMALLEST_SCALE = 2.0**-126


@dataclass
class EightBit:
    """The FP32 vector of `length` elements that `state`, a whole number of blocks, stands for."""

    state: "OptimState8bit"
    length: int
    lent: Tensor | None = None

    @staticmethod
    def zeros_like(x: Tensor, *, signed: bool) -> "EightBit":
        """Zeros for the elements of a flat tensor. Raises ConfigError where torchao is missing."""
        _check_installed()
        # What it says about its CUDA kernels when it is imported concerns none of what is used here.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        from torchao.optim.subclass_8bit import OptimState8bit

        padded = -(-len(x) // BLOCK) * BLOCK
        return EightBit(OptimState8bit.zeros((padded,), signed, BLOCK, x.device), len(x))

    @property
    def nbytes(self) -> int:
        return self.state.codes.nbytes + self.state.scale.nbytes

    @cached_property
    def _midpoints(self) -> Tensor:
        return (self.state.qmap[1:] + self.state.qmap[:-1]) / 2

    def read(self, part: slice) -> Tensor:
        """The elements in FP32; `part` begins at a block."""
        from torchao.optim.quant_utils import dequant_with_qmap

        begin, end = part.start, min(part.stop, self.length)
        blocks = slice(begin // BLOCK, -(-end // BLOCK))
        codes = self.state.codes[blocks.start * BLOCK : blocks.stop * BLOCK]
        return dequant_with_qmap(codes, self.state.qmap, self.state.scale[blocks])[: end - begin]

    def write(self, part: slice, wide: Tensor) -> None:
        """Rounds each of the elements to the nearest number of its block."""
        blocks = F.pad(wide, (0, -len(wide) % BLOCK)).view(-1, BLOCK)
        scale = self._scales(blocks)
        codes = torch.bucketize(blocks / scale[:, None], self._midpoints, right=True, out_int32=True)
        if not self.state.signed:
            # A square that became 0 beside a mean that has not would be an update of the mean divided by eps.
            codes = codes.maximum((blocks > 0).int())
        first = part.start // BLOCK
        self.state.codes[part.start : part.start + codes.numel()] = codes.flatten().to(torch.uint8)
        self.state.scale[first : first + len(scale)] = scale

    def _scales(self, blocks: Tensor) -> Tensor:
        """Of each row, so that its extreme element gets the first or the last code.

        Rounded to fewer bits than the products of code and scale have: so the scale that is found in a row that was
        read is the one it was read with.
        """
        scale = blocks.amax(1)
        if self.state.signed:
            scale = scale.maximum(blocks.amin(1) / self.state.qmap[0])
        bits = scale.clamp_min(SMALLEST_SCALE).view(torch.int32)
        return (bits + (1 << (SPARE_BITS - 1))).bitwise_and_(-1 << SPARE_BITS).view(torch.float32)

    def lend(self) -> Tensor:
        """All elements in FP32: the same tensor until it is given back."""
        if self.lent is None:
            self.lent = self.read(slice(0, self.length))
        return self.lent

    def take_back(self) -> None:
        """What was lent may have been written into."""
        if self.lent is not None:
            self.write(slice(0, self.length), self.lent)
        self.forget()

    def forget(self) -> None:
        """What was lent is not to come back."""
        self.lent = None


Moment = Tensor | EightBit


def zeros(like: Tensor, dtype: torch.dtype, *, signed: bool) -> Moment:
    """A moment of the elements of a flat tensor; in torch.int8, one of 8 bits."""
    if dtype == torch.int8:
        return EightBit.zeros_like(like, signed=signed)
    return torch.zeros_like(like, dtype=dtype)


def widened(moment: Moment, part: slice) -> Tensor:
    """Elements in FP32, those of a moment in FP32 in their place."""
    return moment.read(part) if isinstance(moment, EightBit) else moment[part].float()


def keep(moment: Moment, part: slice, wide: Tensor) -> None:
    """Rounds what `widened` gave, and what has been written into since."""
    if isinstance(moment, EightBit):
        moment.write(part, wide)
    elif moment.dtype != wide.dtype:
        moment[part].copy_(wide)


def _check_installed() -> None:
    name = "precision.moments_dtype"
    cure = f"Run `pip install 'dstrain[int8]'` (torchao {VERSION}), or set it to bfloat16."
    try:
        installed = version("torchao")
    except PackageNotFoundError:
        raise ConfigError(name, "int8", "torchao, which stores them, is not installed", cure) from None
    if not installed.startswith(f"{VERSION}."):
        raise ConfigError(name, "int8", f"torchao {installed} is installed, and {VERSION} is needed", cure)
