"""The manifest says what a checkpoint holds and where each range lies, with a checksum of every byte.

It is plain JSON, and its own checksum lies beside it, so nothing in a checkpoint has to be trusted before it is checked
and nothing in it can be executed. Tensors are named and shaped as the run knows them, whatever the layout:

    {"format": 1, "dstrain": "0.1.0", "torch": "2.13.0", "step": 100, "extra": {...},
     "tensors": {"master/norm.weight": {"dtype": "float32", "shape": [256], "chunks": [
         {"offset": 0, "numel": 128, "file": "rank-00000.bin", "position": 0, "nbytes": 512, "crc32": 305419896}, ...

CRC-32 detects every flipped byte, runs at several GB/s, and comes with Python; it guards against accidents only.
"""

import json
import os
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint.directory import MANIFEST
from dstrain.errors import UserError

FORMAT = 1
CHECKSUM = "manifest.crc32"
READ_BYTES = 8 << 20


class DamageError(Exception):
    """A checkpoint is not as it was written; the message says where."""


@dataclass(frozen=True)
class Chunk:
    """The elements [offset, offset + numel) of a flattened tensor: `nbytes` bytes at `position` of `file`."""

    offset: int
    numel: int
    file: str
    position: int
    nbytes: int
    crc32: int


@dataclass(frozen=True)
class SavedTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        covered = sum(chunk.numel for chunk in self.chunks)
        if covered != prod(self.shape):
            raise ValueError(f"the ranges that ranks hold cover {covered} of the {prod(self.shape)} elements")


@dataclass(frozen=True)
class Manifest:
    step: int
    # What the trainer wants to remember besides tensors: JSON values.
    extra: dict[str, Any]
    tensors: dict[str, SavedTensor]

    def file_bytes(self) -> dict[str, int]:
        """The size of every tensor file; chunks lie in it without gaps."""
        sizes: dict[str, int] = defaultdict(int)
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                sizes[chunk.file] += chunk.nbytes
        return dict(sizes)

    def write(self, directory: Path) -> None:
        """Writes the manifest and its checksum, durably."""
        tensors = {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": tensor.shape,
                "chunks": [asdict(chunk) for chunk in tensor.chunks],
            }
            for name, tensor in self.tensors.items()
        }
        versions = {"format": FORMAT, "dstrain": _own_version(), "torch": torch.__version__}
        content = {**versions, "step": self.step, "extra": self.extra, "tensors": tensors}
        data = json.dumps(content).encode()
        write_durably(directory / MANIFEST, data)
        write_durably(directory / CHECKSUM, f"{zlib.crc32(data):08x}\n".encode())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Raises DamageError unless the manifest is what was written, UserError if another version wrote it."""
        data, checksum = (_read(directory / name) for name in (MANIFEST, CHECKSUM))
        if checksum != f"{zlib.crc32(data):08x}\n".encode():
            raise DamageError(f"{MANIFEST} does not match its checksum in {CHECKSUM}")
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise UserError(
                f"The checkpoint {directory} has format {content['format']} and this dstrain reads format {FORMAT}. "
                f"Load it with dstrain {content['dstrain']}, which wrote it."
            )
        tensors = {
            name: SavedTensor(
                dtype=getattr(torch, tensor["dtype"]),
                shape=tuple(tensor["shape"]),
                chunks=tuple(Chunk(**chunk) for chunk in tensor["chunks"]),
            )
            for name, tensor in content["tensors"].items()
        }
        return cls(content["step"], content["extra"], tensors)

    def verify(self, directory: Path, rank: int, world_size: int) -> None:
        """Checks the size of every file and this rank's share of the checksums; raises DamageError."""
        for file, nbytes in self.file_bytes().items():
            check_size(directory / file, nbytes)
        named = [(name, chunk) for name, tensor in self.tensors.items() for chunk in tensor.chunks]
        named.sort(key=lambda item: item[1].nbytes, reverse=True)
        buffer = memoryview(bytearray(READ_BYTES))
        for name, chunk in named[rank::world_size]:
            if _checksum(directory / chunk.file, chunk, buffer) != chunk.crc32:
                last = chunk.offset + chunk.numel - 1
                raise DamageError(f"elements {chunk.offset} to {last} of {name} in {chunk.file} fail their checksum")


def check_size(path: Path, nbytes: int) -> None:
    """Raises DamageError unless the file is there in full."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise DamageError(f"{path.name} is missing") from None
    if actual != nbytes:
        raise DamageError(f"{path.name} has {actual} bytes instead of {nbytes}")


def write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _own_version() -> str | None:
    try:
        return version("dstrain")
    except PackageNotFoundError:
        # A source tree that was not installed.
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamageError(f"{path.name} cannot be read ({error.strerror})") from error


def _checksum(path: Path, chunk: Chunk, buffer: memoryview) -> int:
    crc, left = 0, chunk.nbytes
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(chunk.position)
            while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
                crc, left = zlib.crc32(buffer[:count], crc), left - count
    except OSError as error:
        raise DamageError(f"{path.name} cannot be read ({error.strerror})") from error
    return crc
