import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dstrain.engine.state import FlatShard
from tests.checkpoint.state import blank, checkpointer, cut, differing, tensors
from tests.gloo.spawn import spawn


def _load_and_save_again(
    rank: int, world_size: int, directory: Path, seed: int, step: int, load_cuts: int, save_cuts: int
) -> list[str]:
    """Loads `step`, compares, saves step + 1 cut in another way."""
    full, saver = tensors(seed), checkpointer(directory)
    expected = cut(full, rank, world_size, load_cuts)
    target = blank(expected)
    extra = saver.load(step, target)
    wrong = differing(expected, target)
    saver.save(step + 1, cut(full, rank, world_size, save_cuts), {"step": step + 1})
    saver.finish()
    return wrong + ([] if extra == {"step": step} else ["extra"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_state_travels_through_layouts(tmp_path: Path, seed: int) -> None:
    saver, full = checkpointer(tmp_path), tensors(seed)
    saver.save(1, cut(full, 0, 1, seed=0), {"step": 1})
    saver.finish()
    for step, world_size in enumerate((4, 2, 3, 4), start=1):
        results = spawn(_load_and_save_again, world_size, tmp_path, seed, step, 10 * seed + step, 20 * seed + step)
        assert results == [[]] * world_size
    expected = cut(full, 0, 1, seed=0)
    target = blank(expected)
    assert saver.load(5, target) == {"step": 5}
    assert differing(expected, target) == []


def _save_replicas(rank: int, world_size: int, directory: Path) -> None:
    saver = checkpointer(directory)
    shards = {name: FlatShard((1000,), 0, torch.full((1000,), 1.5)) for name in "abcd"}
    # A tensor that only the last rank has, as with pipeline stages.
    if rank == world_size - 1:
        shards["last"] = FlatShard((2, 5), 0, torch.arange(10.0))
    saver.save(1, shards, {"rank": rank})
    saver.finish()


def test_replicas_are_written_once_and_by_several_ranks(tmp_path: Path) -> None:
    spawn(_save_replicas, 4, tmp_path)
    manifest = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    chunks = {name: tensor["chunks"] for name, tensor in manifest["tensors"].items()}
    assert {name: len(of_tensor) for name, of_tensor in chunks.items()} == {"a": 1, "b": 1, "c": 1, "d": 1, "last": 1}
    assert len({of_tensor[0]["file"] for of_tensor in chunks.values()}) == 4
    assert manifest["extra"] == {"rank": 0}
    target = {"last": FlatShard((2, 5), 3, torch.zeros(4))}
    checkpointer(tmp_path).load(1, target)
    assert target["last"].local.tolist() == [3, 4, 5, 6]


def _save_moved_experts(rank: int, world_size: int, directory: Path) -> None:
    """Six experts of four values, each its own place; the ranks hold 5 0 | 3 1 | 2 4, then the other way round."""
    parts = [[5, 0], [3, 1], [2, 4]][rank]
    whole, offsets = torch.arange(24.0).view(6, 4), [4 * part for part in parts]
    flat = whole[parts].flatten()
    saver = checkpointer(directory)
    saver.save(1, {"w": FlatShard.of_parts((6, 4), offsets, 4, 0, flat)}, {})
    saver.finish()
    again = FlatShard.of_parts((6, 4), [4 * part for part in parts[::-1]], 4, 0, torch.zeros(8))
    saver.load(1, {"w": again})
    assert again.local.tolist() == whole[parts[::-1]].flatten().tolist()


def test_experts_that_were_moved_are_found_by_name(tmp_path: Path) -> None:
    spawn(_save_moved_experts, 3, tmp_path)
    target = {"w": FlatShard((6, 4), 0, torch.zeros(24))}
    checkpointer(tmp_path).load(1, target)
    assert target["w"].local.tolist() == list(range(24))


def test_a_hole_in_the_state_is_refused(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    saver.save(1, {"w": FlatShard((10,), 0, torch.zeros(9))}, {})
    with pytest.raises(ValueError, match="cover 9 of the 10 elements"):
        saver.finish()
    assert list(tmp_path.iterdir()) == []


def _save_disagreeing(rank: int, world_size: int, directory: Path) -> str:
    saver = checkpointer(directory)
    shape = (10,) if rank else (2, 5)
    saver.save(1, {"w": FlatShard(shape, rank * 5, torch.zeros(5))}, {})
    try:
        saver.finish()
    except ValueError as error:
        return str(error)
    finally:
        dist.barrier()
    return "saved"


def test_ranks_that_disagree_about_a_shape_are_refused(tmp_path: Path) -> None:
    messages = spawn(_save_disagreeing, 2, tmp_path)
    assert all("ranks disagree about w" in message for message in messages)
    assert list(tmp_path.iterdir()) == []
