"""Tells torch's distributed checkpoint what ranges there are.

To it every tensor is one-dimensional and every rank's range a chunk, so saving in one layout and loading in another is
the intersection of intervals, which it computes. Ranges that several ranks hold are written by one of them. Logical
shapes travel beside the plan, because a flat tensor has forgotten them.
"""

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dstrain.engine.state import FlatShard, Shards

# Logical name -> dtype and logical shape.
Layouts = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class ShardSavePlanner(DefaultSavePlanner):
    """Plans the writes of `Shards`; the metadata's `planner_data` are the `Layouts` of all ranks' tensors."""

    state_dict: Shards

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = state_dict

    def create_local_plan(self) -> SavePlan:
        # An empty range would have the same offset, hence the same key, as the one that follows it.
        items = [
            _write_item(name, shard, offset, part)
            for name, shard in self.state_dict.items()
            for offset, part in shard.ranges()
            if part.numel()
        ]
        layouts = {name: (shard.local.dtype, shard.shape) for name, shard in self.state_dict.items()}
        return SavePlan(items, planner_data=layouts)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, replace(metadata, planner_data=_agree([plan.planner_data for plan in all_plans]))

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return _range(self.state_dict[write_item.index.fqn], write_item.index)


class ShardLoadPlanner(DefaultLoadPlanner):
    """Plans the reads that fill `Shards`."""

    state_dict: Shards

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, shard in self.state_dict.items():
            chunks = [_chunk(offset, part) for offset, part in shard.ranges() if part.numel()]
            if chunks:
                saved = self.metadata.state_dict_metadata[name]  # type: ignore[union-attr]
                items += create_read_items_for_chunk_list(name, saved, chunks)  # type: ignore[arg-type]
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _range(self.state_dict[index.fqn], index)


def _range(shard: FlatShard, index: MetadataIndex) -> Tensor:
    """The part of a shard that a plan means: ranges that are not empty differ in where they begin."""
    return next(part for offset, part in shard.ranges() if (offset,) == tuple(index.offset or ()) and part.numel())


def _chunk(offset: int, part: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size((offset,)), torch.Size((part.numel(),)))


def _write_item(name: str, shard: FlatShard, offset: int, part: Tensor) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, (offset,)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(offset, part),
            properties=TensorProperties(dtype=part.dtype),
            size=torch.Size((prod(shard.shape),)),
        ),
    )


def _agree(all_layouts: list[Layouts]) -> Layouts:
    merged: Layouts = {}
    for layouts in all_layouts:
        for name, layout in layouts.items():
            if merged.setdefault(name, layout) != layout:
                raise ValueError(f"ranks disagree about {name}: {merged[name]} and {layout}")
    return merged
