"""Writes and reads the ranges that torch's distributed checkpoint has planned, as raw bytes.

Each rank appends its chunks to one file of its own and takes their checksums on the way. When all are done, one rank
writes the manifest, gives the directory its final name and removes what is no longer kept.
"""

import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dstrain.checkpoint.directory import CheckpointDirectory
from dstrain.checkpoint.manifest import Chunk, DamageError, Manifest, SavedTensor, check_size
from dstrain.checkpoint.planner import Layouts


@dataclass(frozen=True)
class Retention:
    """The newest `keep_last` checkpoints stay, and every multiple of `keep_every_steps` (0: none)."""

    keep_last: int
    keep_every_steps: int


@dataclass(frozen=True)
class Assignment:
    """What the coordinator tells a rank: the name of its file, and the size of the whole checkpoint."""

    file: str
    total_bytes: int


class ChunkWriter(StorageWriter):
    """Writes one checkpoint. Errors of the file system leave it as UserErrors."""

    def __init__(self, directory: CheckpointDirectory, step: int, extra: dict[str, Any], retention: Retention):
        self.directory, self.step, self.extra, self.retention = directory, step, extra, retention
        self.total_bytes: int | None = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            with self._file_errors():
                self.directory.begin(self.step)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        total_bytes = sum(_nbytes(item) for plan in plans for item in plan.items)
        return [
            replace(plan, storage_data=Assignment(f"rank-{rank:05}.bin", total_bytes))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.total_bytes = plan.storage_data.total_bytes
        done: Future[list[WriteResult]] = Future()
        with self._file_errors():
            done.set_result(self._write_file(plan, planner) if plan.items else [])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        manifest = Manifest(self.step, self.extra, _saved_tensors(metadata.planner_data, results))
        with self._file_errors():
            self._check_files(manifest)
            manifest.write(self.directory.partial(self.step))
            self.directory.commit(self.step)
        self.directory.prune(self.step, self.retention.keep_last, self.retention.keep_every_steps)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """One writer writes one checkpoint: there is nothing to forget."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def _write_file(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name, results = plan.storage_data.file, []
        with (self.directory.partial(self.step) / name).open("wb") as file:
            for item in plan.items:
                position, data = file.tell(), as_bytes(planner.resolve_data(item))  # type: ignore[arg-type]
                file.write(data)
                offset, numel = _range(item)
                chunk = Chunk(offset, numel, name, position, len(data), zlib.crc32(data))
                results.append(WriteResult(item.index, chunk.nbytes, chunk))
            file.flush()
            os.fsync(file.fileno())
        return results

    def _check_files(self, manifest: Manifest) -> None:
        for file, nbytes in manifest.file_bytes().items():
            try:
                check_size(self.directory.partial(self.step) / file, nbytes)
            except DamageError as finding:
                raise OSError(f"{finding}, as seen by the first rank: all nodes must share this directory") from finding

    @contextmanager
    def _file_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.directory.unwritable(self.step, error, self.total_bytes) from error


class ChunkReader(StorageReader):
    """Reads ranges of a checkpoint whose manifest has been read and verified."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self.chunks = {
            MetadataIndex(name, (chunk.offset,)): chunk
            for name, tensor in manifest.tensors.items()
            for chunk in tensor.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _flat_metadata(tensor) for name, tensor in self.manifest.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The manifest is at hand already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.chunks[item.storage_index].file].append(item)
        for name, items in by_file.items():
            with (self.directory / name).open("rb") as file:
                for item in sorted(items, key=lambda item: self.chunks[item.storage_index].position):
                    self._read_item(file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """One reader reads one checkpoint: there is nothing to forget."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def _read_item(self, file: BinaryIO, item: ReadItem, planner: LoadPlanner) -> None:
        chunk = self.chunks[item.storage_index]
        dtype = self.manifest.tensors[item.storage_index.fqn].dtype
        target = planner.resolve_tensor(item).detach()
        direct = target.is_cpu and target.is_contiguous() and target.dtype == dtype
        source = target if direct else torch.empty(target.shape, dtype=dtype)
        file.seek(chunk.position + item.storage_offsets[0] * dtype.itemsize)
        data = as_bytes(source)
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise OSError(f"{chunk.file} ended early while it was read")
        if not direct:
            target.copy_(source)
        planner.commit_tensor(item, target)


def as_bytes(local: Tensor) -> memoryview:
    """The bytes of a contiguous 1-D CPU tensor, not copied."""
    return local.view(torch.uint8).numpy().data


def _range(item: WriteItem) -> tuple[int, int]:
    if item.tensor_data is None:
        raise ValueError(f"{item.index.fqn} is not a tensor")
    return item.tensor_data.chunk.offsets[0], item.tensor_data.chunk.sizes[0]


def _nbytes(item: WriteItem) -> int:
    return _range(item)[1] * item.tensor_data.properties.dtype.itemsize  # type: ignore[union-attr]


def _saved_tensors(layouts: Layouts, results: list[list[WriteResult]]) -> dict[str, SavedTensor]:
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    for result in (result for of_rank in results for result in of_rank):
        chunks[result.index.fqn].append(result.storage_data)
    return {
        name: SavedTensor(dtype, shape, tuple(sorted(chunks[name], key=lambda chunk: chunk.offset)))
        for name, (dtype, shape) in layouts.items()
    }


def _flat_metadata(tensor: SavedTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size((c.offset,)), torch.Size((c.numel,))) for c in tensor.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size((prod(tensor.shape),)), chunks)
