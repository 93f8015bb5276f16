"""Checkpoints: the main thread copies the state aside and goes on, a second thread writes it.

The second thread runs torch's distributed checkpoint over a process group of its own, so its messages cannot mix with
those of training. The main thread touches that group only after the second one has finished.
"""

import json
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from dstrain.checkpoint.directory import CheckpointDirectory
from dstrain.checkpoint.manifest import DamageError, Manifest, SavedTensor
from dstrain.checkpoint.planner import ShardLoadPlanner, ShardSavePlanner
from dstrain.checkpoint.storage import ChunkReader, ChunkWriter, Retention
from dstrain.comm.agreement import together
from dstrain.engine.state import FlatShard, Shards
from dstrain.errors import SharedError, UserError


class Checkpointer:
    """Saves, finds and loads the checkpoints of one run. Every rank of `group` makes the same calls in the same order.

    `group` is a gloo group of all ranks that nothing else uses; None: a single process. `directory` is shared by all
    ranks. Only one run at a time may save into it; any number may load.
    """

    def __init__(self, directory: Path, *, keep_last: int, keep_every_steps: int, group: dist.ProcessGroup | None):
        self.directory = CheckpointDirectory(directory)
        self.retention = Retention(keep_last, keep_every_steps)
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self._staging: dict[str, Tensor] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        # A run of one process is no mistake, whatever torch thinks.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def save(self, step: int, shards: Shards, extra: dict[str, Any]) -> None:
        """Copies `shards` to CPU memory and writes them in the background; `shards` may change once this returns.

        `extra` holds JSON values; that of the first rank is saved. Waits for the previous save and raises its
        UserError, if it had one, on every rank.
        """
        self.finish()
        snapshot = json.loads(json.dumps(extra))
        self._pending = self._worker.submit(self._write, step, self._stage(shards), snapshot)

    def finish(self) -> None:
        """Waits until what was saved last is complete; raises UserError if it could not be written.

        To be called before the process groups are destroyed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def steps(self) -> list[int]:
        """The complete checkpoints that this rank sees, oldest first. A save under way is not among them."""
        return self.directory.steps()

    def load(
        self, step: int, shards: Shards, optional_prefixes: tuple[str, ...] = (), *, verify: bool = True
    ) -> dict[str, Any]:
        """Verifies the checkpoint, writes it into `shards[...].local` and returns what was saved as `extra`.

        The ranges may be cut differently from the saved ones, and the checkpoint may hold more tensors than `shards`.
        Floating dtypes are converted. A tensor whose name starts with an optional prefix keeps its value if the
        checkpoint holds nothing under that prefix. Without `verify`, checksums are left alone, for a reader that has
        verified them and then fetches one tensor after the other. Raises the same UserError on every rank, before
        anything is written, if the checkpoint is absent, damaged, or of a differently shaped model.
        """
        self.finish()
        manifest, present = together(lambda: self._inspect(step, shards, optional_prefixes, verify), self.group)
        reader = ChunkReader(self.directory.complete(step), manifest)
        try:
            state_dict_loader.load(
                present,
                storage_reader=reader,
                planner=ShardLoadPlanner(),
                process_group=self.group,
                no_dist=self.group is None,
            )
        except CheckpointException as failure:
            raise _cause(failure) from failure
        return manifest.extra

    def _stage(self, shards: Shards) -> Shards:
        self._staging = {name: self._buffer(name, shard.local) for name, shard in shards.items()}
        for name, shard in shards.items():
            self._staging[name].copy_(shard.local.detach(), non_blocking=True)
        if any(shard.local.is_cuda for shard in shards.values()):
            torch.cuda.current_stream().synchronize()
        return {name: replace(shard, local=self._staging[name]) for name, shard in shards.items()}

    def _buffer(self, name: str, local: Tensor) -> Tensor:
        """CPU memory for one range: the one of the previous save if it fits."""
        buffer = self._staging.get(name)
        if buffer is not None and (buffer.numel(), buffer.dtype) == (local.numel(), local.dtype):
            return buffer
        return torch.empty(local.numel(), dtype=local.dtype, pin_memory=local.is_cuda)

    def _write(self, step: int, shards: Shards, extra: dict[str, Any]) -> None:
        writer = ChunkWriter(self.directory, step, extra, self.retention)
        try:
            state_dict_saver.save(
                shards,
                storage_writer=writer,
                planner=ShardSavePlanner(),
                process_group=self.group,
                no_dist=self.group is None,
            )
        except CheckpointException as failure:
            # Every rank has stopped writing, and the room may be what is lacking.
            if self.rank == 0:
                self.directory.abandon(step)
            raise _cause(failure) from failure

    def _inspect(
        self, step: int, shards: Shards, optional_prefixes: tuple[str, ...], verify: bool
    ) -> tuple[Manifest, Shards]:
        path = self.directory.require(step)
        try:
            manifest = Manifest.read(path)
            present = _matching(manifest, shards, optional_prefixes, path)
            if verify:
                manifest.verify(path, self.rank, self.world_size)
        except DamageError as finding:
            raise self.directory.damaged(step, str(finding)) from finding
        return manifest, present


def _matching(manifest: Manifest, shards: Shards, optional_prefixes: tuple[str, ...], path: Path) -> Shards:
    """The part of `shards` that the checkpoint holds; UserError if that is not what it should hold."""
    absent = tuple(
        prefix for prefix in optional_prefixes if not any(name.startswith(prefix) for name in manifest.tensors)
    )
    present = {name: shard for name, shard in shards.items() if not (absent and name.startswith(absent))}
    for name, shard in present.items():
        if name not in manifest.tensors:
            raise UserError(
                f"The checkpoint {path} has no tensor {name}, which this model has. "
                "Resume with the model config that the checkpoint was saved with (config.yaml of its run)."
            )
        _check_tensor(name, shard, manifest.tensors[name], path)
    return present


def _check_tensor(name: str, shard: FlatShard, saved: SavedTensor, path: Path) -> None:
    if shard.shape != saved.shape:
        raise UserError(
            f"{name} has the shape {list(saved.shape)} in the checkpoint {path} and {list(shard.shape)} in this model. "
            "Resume with the model config that the checkpoint was saved with (config.yaml of its run)."
        )
    if shard.local.dtype.is_floating_point != saved.dtype.is_floating_point:
        raise UserError(
            f"{name} is {saved.dtype} in the checkpoint {path} and {shard.local.dtype} in this run, and only floating "
            "dtypes are converted into one another. Resume with the version that saved it."
        )


def _cause(failure: CheckpointException) -> BaseException:
    """What went wrong first, on the lowest rank: the same on all ranks."""
    error, _ = failure.failures[min(failure.failures)]
    return SharedError(str(error)) if isinstance(error, UserError) else error
