import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dstrain.engine.state import FlatShard
from dstrain.errors import UserError
from tests.checkpoint.state import blank, checkpointer, cut, differing, one, tensors
from tests.gloo.spawn import spawn

EXTRA = {"samples": 12345678901, "lr": 0.1, "rng": [1, 2, 3], "name": "ü"}


def test_what_is_saved_is_loaded_bitwise(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path / "checkpoints")
    state = cut(tensors(seed=0), rank=0, world_size=1, seed=0)
    saver.save(7, state, EXTRA)
    saver.finish()
    target = blank(state)
    assert checkpointer(tmp_path / "checkpoints").load(7, target) == EXTRA
    assert differing(state, target) == []


def test_save_returns_early_and_keeps_its_snapshot(tmp_path: Path) -> None:
    saver, state, extra = checkpointer(tmp_path), one(1.0, numel=40_000_000), {"samples": [1]}
    saver.save(1, state, extra)
    assert saver.steps() == []
    state["master/w"].local.fill_(2.0)
    extra["samples"].append(2)
    # The second save has to wait: it uses the same memory.
    saver.save(2, state, extra)
    state["master/w"].local.fill_(3.0)
    saver.finish()
    assert saver.steps() == [1, 2]
    for step, samples in ((1, [1]), (2, [1, 2])):
        assert saver.load(step, state) == {"samples": samples}
        assert torch.equal(state["master/w"].local, torch.full((40_000_000,), float(step)))


def test_a_tensor_may_change_its_size_between_saves(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    for step, numel in enumerate((10, 20, 5)):
        saver.save(step, one(step, numel), {})
    saver.finish()
    for step, numel in enumerate((10, 20, 5)):
        target = one(-1.0, numel)
        saver.load(step, target)
        assert differing(target, one(step, numel)) == []


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    for value in (1.0, 2.0):
        saver.save(5, one(value), {})
    saver.finish()
    target = one(0.0)
    saver.load(5, target)
    assert differing(target, one(2.0)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, state = checkpointer(tmp_path), cut(tensors(seed=0), rank=0, world_size=1, seed=0)
    saver.save(1, state, EXTRA)
    saver.finish()
    files = {path.name: path.read_bytes() for path in (tmp_path / "step-00000001").iterdir()}
    assert sorted(files) == ["manifest.crc32", "manifest.json", "rank-00000.bin"]
    raw = [bytes(shard.local.view(torch.uint8).tolist()) for shard in state.values()]
    assert files["rank-00000.bin"] == b"".join(raw)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    target = blank(state)
    saver.load(1, target)
    assert differing(state, target) == []


def test_optional_tensors_keep_their_values_when_none_was_saved(tmp_path: Path) -> None:
    saver, imported = checkpointer(tmp_path), one(1.0)
    saver.save(0, imported, {})
    moments = {f"exp_avg/{name}": FlatShard((10,), 0, torch.full((10,), 9.0)) for name in "wv"}
    with pytest.raises(UserError, match="no tensor exp_avg/w"):
        saver.load(0, {**one(0.0), **moments})
    target = one(0.0)
    saver.load(0, {**target, **moments}, optional_prefixes=("exp_avg/", "exp_avg_sq/"))
    assert differing(target, imported) == []
    assert all(torch.equal(moment.local, torch.full((10,), 9.0)) for moment in moments.values())


def test_optional_is_all_or_nothing(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    moments = {f"exp_avg/{name}": FlatShard((10,), 0, torch.zeros(10)) for name in "wv"}
    saver.save(0, {"exp_avg/v": moments["exp_avg/v"]}, {})
    with pytest.raises(UserError, match="no tensor exp_avg/w"):
        saver.load(0, moments, optional_prefixes=("exp_avg/",))


def test_another_shape_or_kind_is_refused(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    saver.save(3, one(1.0, numel=6), {})
    with pytest.raises(UserError, match=r"master/w has the shape \[6\] .* and \[2, 3\] in this model"):
        saver.load(3, {"master/w": FlatShard((2, 3), 0, torch.zeros(6))})
    with pytest.raises(UserError, match=r"float32 .*int64"):
        saver.load(3, {"master/w": FlatShard((6,), 0, torch.zeros(6, dtype=torch.int64))})


def test_floating_dtypes_are_converted(tmp_path: Path) -> None:
    saver, values = checkpointer(tmp_path), torch.randn(50, generator=torch.Generator().manual_seed(0))
    saver.save(1, {"w": FlatShard((50,), 0, values)}, {})
    target = FlatShard((50,), 10, torch.zeros(40, dtype=torch.bfloat16))
    saver.load(1, {"w": target})
    assert torch.equal(target.local, values[10:].bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_on_a_gpu(tmp_path: Path) -> None:
    saver, state = checkpointer(tmp_path), cut(tensors(seed=0), rank=0, world_size=1, seed=0)
    on_gpu = {name: FlatShard(shard.shape, shard.offset, shard.local.cuda()) for name, shard in state.items()}
    for step in (1, 2):
        saver.save(step, on_gpu, {})
    for shard in on_gpu.values():
        shard.local.zero_()
    saver.load(2, on_gpu)
    assert differing(state, {n: FlatShard(s.shape, s.offset, s.local.cpu()) for n, s in on_gpu.items()}) == []


def test_an_absent_step_names_those_that_exist(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path / "none")
    assert saver.steps() == []
    with pytest.raises(UserError, match=r"no complete checkpoint of step 4 .* there is no complete one"):
        saver.load(4, one(0.0))
    for step in (1, 2):
        saver.save(step, one(0.0), {})
    with pytest.raises(UserError, match=r"complete steps: 1, 2\."):
        saver.load(4, one(0.0))


def test_extra_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer(tmp_path).save(1, one(0.0), {"x": torch.zeros(1)})


def _train_while_saving(rank: int, world_size: int, directory: Path) -> tuple[int, bool]:
    saver, shards = checkpointer(directory), one(1.0, numel=10_000_000)
    shards["master/w"] = FlatShard((20_000_000,), rank * 10_000_000, shards["master/w"].local)
    saver.save(1, shards, {})
    rounds, sum_right = 0, True
    done = torch.zeros(1)
    while not done:
        total = torch.ones(1000) * rank
        dist.all_reduce(total)
        sum_right &= bool((total == sum(range(world_size))).all())
        # All ranks have to leave after the same round.
        done = torch.tensor([float(1 in saver.steps())])
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        rounds += 1
    saver.finish()
    return rounds, sum_right


def test_training_communicates_while_a_save_does(tmp_path: Path) -> None:
    for rounds, sum_right in spawn(_train_while_saving, 2, tmp_path):
        assert rounds > 1
        assert sum_right
