"""Reading and writing safetensors files, against the safetensors library itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dstrain.checkpoint.weight_files import INDEX, WeightReader, WeightWriter
from dstrain.errors import UserError

BF16 = torch.bfloat16


def write_three(directory: Path, shard_bytes: float) -> dict[str, torch.Tensor]:
    whole = torch.arange(96.0).view(3, 8, 4)
    writer = WeightWriter(directory, shard_bytes)
    parts = dict(zip("abc", whole.unbind(), strict=True))
    for name, part in parts.items():
        writer.add(name, part, BF16)
    writer.finish()
    return parts


@pytest.mark.parametrize(("shard_bytes", "files"), [(1, 3), (64, 3), (127, 3), (128, 2), (1e9, 1)])
def test_files_are_no_larger_than_asked_and_indexed(tmp_path: Path, shard_bytes: float, files: int) -> None:
    parts = write_three(tmp_path, shard_bytes)
    names = [f"model-{n:05}-of-{files:05}.safetensors" for n in range(1, files + 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 3 * 64
    for name, part in parts.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], part.to(BF16))


def test_tensors_come_back_from_all_files(tmp_path: Path) -> None:
    parts = write_three(tmp_path, 64)
    with WeightReader(tmp_path) as reader:
        assert set(reader) == set(parts)
        assert len(reader) == 3
        for name, part in parts.items():
            assert torch.equal(reader[name], part.to(BF16))


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with WeightReader(tmp_path) as reader:
        assert torch.equal(reader["a"], torch.ones(2))
        assert "b" not in reader


def test_fp8_comes_out_multiplied_by_its_scales(tmp_path: Path) -> None:
    weight = torch.full((130, 4), 2.0)
    writer = WeightWriter(tmp_path, 1e9)
    writer.add_fp8("w", weight)
    writer.finish()
    [path] = tmp_path.glob("*.safetensors")
    stored = load_file(path)
    assert (stored["w"].dtype, stored["w_scale_inv"].shape) == (torch.float8_e4m3fn, (2, 1))
    with WeightReader(tmp_path) as reader:
        assert list(reader) == ["w"]
        torch.testing.assert_close(reader["w"], weight)


def test_fp8_without_block_scales_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with WeightReader(tmp_path) as reader, pytest.raises(UserError, match="without w_scale_inv"):
        reader["w"]
    scales = {"w": torch.ones(4, 4).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(2, 2)}
    save_file(scales, tmp_path / "model.safetensors")
    with WeightReader(tmp_path) as reader, pytest.raises(UserError, match=r"scales of shape \(2, 2\)"):
        reader["w"]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        WeightReader(tmp_path)
    write_three(tmp_path, 64)
    second = tmp_path / "model-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors cannot be read"):
        WeightReader(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors cannot be read"):
        WeightReader(tmp_path)


def test_whoever_may_read_the_index_may_read_the_weights(tmp_path: Path) -> None:
    writer = WeightWriter(tmp_path, 2**20)
    writer.add("w", torch.ones(2), torch.float32)
    writer.finish()
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
