import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch

from dstrain.checkpoint.save import Checkpointer
from dstrain.engine.state import FlatShard
from tests.checkpoint.state import checkpointer, one
from tests.gloo.spawn import spawn

NUMEL = 2_000_000


@pytest.mark.parametrize(
    ("keep_last", "keep_every_steps", "kept"),
    [
        (1, 0, [12]),
        (2, 0, [10, 12]),
        (1, 4, [4, 8, 12]),
        (2, 5, [10, 12]),
        (3, 6, [6, 8, 10, 12]),
        (99, 0, [2, 4, 6, 8, 10, 12]),
    ],
)
def test_retention(tmp_path: Path, keep_last: int, keep_every_steps: int, kept: list[int]) -> None:
    saver = checkpointer(tmp_path, keep_last, keep_every_steps)
    for step in range(2, 13, 2):
        saver.save(step, one(step), {})
    saver.finish()
    assert saver.steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08}" for step in kept]


def test_what_was_just_saved_always_stays(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, keep_last=2)
    for step in (100, 200, 50):
        saver.save(step, one(step), {})
    saver.finish()
    assert saver.steps() == [50, 100, 200]


def test_only_leftovers_of_our_own_are_swept(tmp_path: Path) -> None:
    kept = ["step-00000001", "step-7.partial", "notes.partial", "step-00000002.partial.old", "mine"]
    swept = ["step-00000002.partial", "step-00000003.deleting", "step-123456789.partial"]
    for name in [*kept, *swept]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "step-00000009.partial").write_text("a file, not a directory")
    (tmp_path / "step-00000008.partial").symlink_to(tmp_path / "mine")
    saver = checkpointer(tmp_path)
    assert saver.steps() == []
    saver.save(4, one(1.0), {})
    saver.finish()
    assert saver.steps() == [4]
    expected = {*kept, "step-00000004", "step-00000008.partial", "step-00000009.partial"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (tmp_path / "mine" / "file").exists()


def _shards(rank: int, world_size: int, value: float) -> dict[str, FlatShard]:
    share = NUMEL // world_size
    return {
        name: FlatShard((NUMEL,), rank * share, torch.full((share,), float(value)))
        for name in ("master/w", "exp_avg/w")
    }


def _save_until_killed(rank: int, world_size: int, directory: Path, delay_s: float) -> None:
    """Goes on from the newest checkpoint, saving without pause and noting each step known to be complete."""
    saver = checkpointer(directory / "checkpoints", keep_last=2)
    step = max(saver.steps(), default=0)
    if step:
        _check(saver, step, rank, world_size)
    threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        step += 1
        saver.save(step, _shards(rank, world_size, step), {"step": step})
        saver.finish()
        if rank == 0:
            (directory / f"finished-{step}").touch()


def _check(saver: Checkpointer, step: int, rank: int, world_size: int) -> None:
    target = _shards(rank, world_size, -1.0)
    assert saver.load(step, target) == {"step": step}
    assert all((shard.local == step).all() for shard in target.values())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_kill_loses_nothing_that_was_finished(tmp_path: Path, world_size: int) -> None:
    rng, interrupted = random.Random(world_size), 0
    for _ in range(6):
        with pytest.raises(RuntimeError, match=r"died without a word|Connection|closed"):
            spawn(_save_until_killed, world_size, tmp_path, rng.uniform(0.01, 0.4))
        saver = checkpointer(tmp_path / "checkpoints", keep_last=2)
        interrupted += any(path.suffix for path in (tmp_path / "checkpoints").glob("*"))
        finished = [int(path.name.split("-")[1]) for path in tmp_path.glob("finished-*")]
        newest = max(saver.steps(), default=0)
        assert newest >= max(finished, default=0)
        for step in saver.steps():
            _check(saver, step, 0, 1)
    assert newest > 0
    assert interrupted > 0, "no kill hit a checkpoint being written"
