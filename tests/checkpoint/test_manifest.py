import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.engine.state import Shards
from dstrain.errors import UserError
from tests.checkpoint.state import blank, checkpointer, cut, differing, tensors
from tests.gloo.spawn import spawn

FILES = ["manifest.json", "manifest.crc32", "rank-00000.bin"]


def _flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def _target() -> Shards:
    return blank(cut(tensors(2), 0, 1, seed=0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    saver = checkpointer(tmp_path)
    for step in (1, 2):
        saver.save(step, cut(tensors(step), 0, 1, seed=0), {"step": step})
    saver.finish()
    return tmp_path


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_byte_is_found(saved: Path, file: str) -> None:
    path = saved / "step-00000002" / file
    size = path.stat().st_size
    target = _target()
    for position in {*range(0, size, max(1, size // 40)), size - 1}:
        _flip(path, position, bit=position % 8)
        with pytest.raises(UserError, match=rf"step-00000002 is damaged.*{file}.*earlier one; complete steps: 1\."):
            checkpointer(saved).load(2, target)
        _flip(path, position, bit=position % 8)
    assert differing(target, blank(target)) == [], "a damaged checkpoint must not reach the state"
    assert checkpointer(saved).load(2, target) == {"step": 2}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "harm",
    [lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data + b"\0"],
    ids=["last byte lost", "half", "empty", "one byte more"],
)
def test_a_file_of_another_size_is_found(saved: Path, file: str, harm: Callable[[bytes], bytes]) -> None:
    path = saved / "step-00000002" / file
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match=f"step-00000002 is damaged.*{file}"):
        checkpointer(saved).load(2, _target())


def test_a_missing_file_is_found(saved: Path) -> None:
    (saved / "step-00000002" / "rank-00000.bin").unlink()
    with pytest.raises(UserError, match=r"rank-00000.bin is missing"):
        checkpointer(saved).load(2, _target())
    (saved / "step-00000001" / "manifest.crc32").unlink()
    with pytest.raises(UserError, match=r"manifest.crc32 cannot be read \(No such file or directory\)"):
        checkpointer(saved).load(1, _target())
    (saved / "step-00000001" / "manifest.json").unlink()
    assert checkpointer(saved).steps() == [2]


def test_another_format_is_refused_by_name(saved: Path) -> None:
    directory = saved / "step-00000002"
    data = (directory / "manifest.json").read_bytes().replace(b'"format": 1', b'"format": 9')
    (directory / "manifest.json").write_bytes(data)
    (directory / "manifest.crc32").write_text(f"{zlib.crc32(data):08x}\n")
    with pytest.raises(UserError, match="has format 9 and this dstrain reads format 1"):
        checkpointer(saved).load(2, _target())


def _save(rank: int, world_size: int, directory: Path) -> None:
    saver = checkpointer(directory)
    saver.save(1, cut(tensors(seed=0), rank, world_size, seed=3), {})
    saver.finish()


def _load_damaged(rank: int, world_size: int, directory: Path) -> str:
    try:
        checkpointer(directory).load(1, cut(tensors(seed=0), rank, world_size, seed=4))
    except UserError as error:
        return str(error)
    return "loaded"


def test_all_ranks_give_the_same_verdict(tmp_path: Path) -> None:
    spawn(_save, 4, tmp_path)
    for path in sorted((tmp_path / "step-00000001").glob("rank-*.bin")):
        _flip(path, path.stat().st_size // 2)
        messages = spawn(_load_damaged, 2, tmp_path)
        assert len(set(messages)) == 1
        assert f"in {path.name} fail" in messages[0]
        _flip(path, path.stat().st_size // 2)
    assert spawn(_load_damaged, 2, tmp_path) == ["loaded", "loaded"]
