"""The safetensors files of a Hugging Face model directory, one tensor at a time in both directions."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dstrain.checkpoint import blockwise
from dstrain.errors import UserError

INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"


class WeightReader(Mapping[str, Tensor]):
    """The tensors of a directory by name, read when asked for; FP8 matrices come out in FP32, without their scales."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._open = ExitStack()
        self._file_of: dict[str, Any] = {}
        for path in self._paths():
            file = self._enter(path)
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __getitem__(self, name: str) -> Tensor:
        stored = self._file_of[name].get_tensor(name)
        if stored.dtype != torch.float8_e4m3fn:
            return stored
        if name + SCALE not in self._file_of:
            raise UserError(f"{name} is stored in FP8 without {name}{SCALE}. Only 128 x 128 block scales can be read.")
        try:
            return blockwise.dequantize(stored, self._file_of[name + SCALE].get_tensor(name + SCALE))
        except ValueError as error:
            raise UserError(f"{name}{SCALE}: {error}. Only 128 x 128 block scales can be read.") from error

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._file_of if not name.endswith(SCALE))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _paths(self) -> list[Path]:
        index = self.directory / INDEX
        if index.is_file():
            return [self.directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        paths = sorted(self.directory.glob("*.safetensors"))
        if not paths:
            raise UserError(f"{self.directory} holds no *.safetensors files. Other weight formats cannot be imported.")
        return paths

    def _enter(self, path: Path) -> Any:
        try:
            return self._open.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            self._open.close()
            raise UserError(f"{path} cannot be read: {error}. Download or copy it again.") from error


class WeightWriter:
    """Writes tensors to files of at most `shard_bytes`, and their index; a larger tensor gets a file of its own."""

    def __init__(self, directory: Path, shard_bytes: float):
        self.directory = directory
        self.shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        """A copy of `tensor`, which may be a view of a larger one."""
        copied = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
        if self._pending and self._pending_bytes + copied.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = copied
        self._pending_bytes += copied.nbytes

    def add_fp8(self, name: str, matrix: Tensor, power_of_two: bool = False) -> None:
        """`matrix` as E4M3 values and block scales."""
        values, scales = blockwise.quantize(matrix, power_of_two)
        self.add(name, values, values.dtype)
        self.add(name + SCALE, scales, scales.dtype)

    def finish(self) -> None:
        """Writes what is left, gives the files their final names and writes the index."""
        self._flush()
        index_file = self.directory / INDEX
        index_file.touch()
        files = [f"model-{n:05}-of-{len(self._shards):05}.safetensors" for n in range(1, len(self._shards) + 1)]
        for n, file in enumerate(files):
            self._unnumbered(n).rename(self.directory / file)
            # safetensors keeps its files from everybody else; the directory's other files say who may read.
            (self.directory / file).chmod(index_file.stat().st_mode)
        weight_map = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        index_file.write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        # Consumers look for the framework's name in the metadata.
        save_file(self._pending, self._unnumbered(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _unnumbered(self, shard: int) -> Path:
        """A shard's name until the number of shards is known."""
        return self.directory / f"model-{shard + 1:05}.safetensors"
