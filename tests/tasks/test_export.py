"""`dstrain export`: dtypes, the FP8 format read by the letter of its definition, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dstrain.config.commands import ExportRoot, ImportRoot
from dstrain.config.load import compose, read, save
from dstrain.config.schema import PrecisionConfig, RunConfig
from dstrain.errors import ConfigError, UserError
from dstrain.precision.formats import FLOOR, Scaling
from dstrain.precision.rounding import round_blocks
from dstrain.tasks import export, import_
from tests.checkpoint.huggingface_cases import MODELS, V2, WITH_MTP, random_model, read_run, write_run

# The 576 rows of DeepSeek's kv_a, and an expert width that is no multiple of a block either.
ODD = replace(WITH_MTP, hidden_size=200, kv_lora_rank=512, qk_rope_head_dim=64, moe_intermediate_size=192, num_layers=2)
BIAS = "e_score_correction_bias"
PRECISIONS = {
    "bfloat16": PrecisionConfig(),
    "float32": PrecisionConfig("float32"),
    "fp8": PrecisionConfig(products="fp8"),
}
KEPT_IN_BF16 = ("norm", "embed", "head", "mlp.gate.weight", "eh_proj")


def export_run(tmp_path: Path, dtype: str = "bfloat16", out: str = "hf", run: str = "run", **fields: float) -> Path:
    config = ExportRoot(run=RunConfig(str(tmp_path / run)), out=str(tmp_path / out), precision=PRECISIONS[dtype])
    export.run(replace(config, **fields))
    return tmp_path / out


def stored(directory: Path) -> dict[str, Tensor]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for file in set(index.values()):
        tensors |= load_file(directory / file)
    assert tensors.keys() == index.keys()
    return tensors


def test_bf16_is_the_rounded_master_and_biases_stay_fp32(tmp_path: Path) -> None:
    ours = random_model(WITH_MTP)
    write_run(tmp_path / "run", ours)
    tensors = stored(export_run(tmp_path))
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if BIAS in name else torch.bfloat16), name
    state = ours.state_dict()
    gate = state["layers.1.moe.experts.gate_up"][5, : WITH_MTP.moe_intermediate_size]
    assert torch.equal(tensors["model.layers.1.mlp.experts.5.gate_proj.weight"], gate.bfloat16())
    assert torch.equal(tensors[f"model.layers.4.mlp.gate.{BIAS}"], state["mtp.1.layer.moe.router.bias"])
    assert torch.equal(tensors["model.layers.4.shared_head.head.weight"], state["head.weight"].bfloat16())


@pytest.mark.parametrize(
    ("choice", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_command_takes_a_precision(tmp_path: Path, choice: str, dtype: torch.dtype) -> None:
    write_run(tmp_path / "run", random_model(MODELS["v3"]))
    out = tmp_path / "hf"
    export.run(compose("export", [f"run.dir={tmp_path / 'run'}", f"out={out}", f"precision={choice}"]))
    assert stored(out)["model.layers.0.self_attn.o_proj.weight"].dtype == dtype


def by_definition(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """FP8 matrices times the scale of the block that each element lies in, in FP32."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    for name, tensor in plain.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scales = tensors[f"{name}_scale_inv"]
            row = torch.arange(tensor.shape[0])[:, None] // 128
            column = torch.arange(tensor.shape[1])[None, :] // 128
            assert scales.shape == (row.max() + 1, column.max() + 1)
            plain[name] = tensor.float() * scales[row, column]
    return plain


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of odd sizes, one of whose experts is zero, exported in FP8 and imported from it."""
    tmp_path = tmp_path_factory.mktemp("fp8")
    ours = random_model(ODD)
    ours.layers[1].moe.experts.down.data[3] = 0
    write_run(tmp_path / "run", ours)
    export_run(tmp_path, "fp8")
    import_.run(ImportRoot(path=str(tmp_path / "hf"), run=RunConfig(str(tmp_path / "back"))))
    return tmp_path


def test_fp8_holds_the_matrices_of_attention_and_feed_forward_only(fp8: Path) -> None:
    tensors = stored(fp8 / "hf")
    for name, tensor in tensors.items():
        if any(part in name for part in KEPT_IN_BF16):
            assert tensor.dtype == torch.bfloat16, name
        elif name.endswith("_scale_inv") or BIAS in name:
            assert tensor.dtype == torch.float32, name
        else:
            assert tensor.dtype == torch.float8_e4m3fn, name
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 200)
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    quantization = json.loads((fp8 / "hf" / "config.json").read_text())["quantization_config"]
    assert quantization["weight_block_size"] == [128, 128]


@pytest.mark.parametrize("run", ["back", "run"])
def test_fp8_means_the_same_to_an_independent_reader(fp8: Path, run: str) -> None:
    plain, model = by_definition(stored(fp8 / "hf")), read_run(fp8 / run).state_dict()
    gate_up, width = model["layers.1.moe.experts.gate_up"], ODD.moe_intermediate_size
    pairs = {
        "self_attn.kv_a_proj_with_mqa": model["layers.1.attn.kv_a.weight"],
        "self_attn.kv_b_proj": model["layers.1.attn.kv_b.weight"],
        "mlp.experts.2.gate_proj": gate_up[2, :width],
        "mlp.experts.7.up_proj": gate_up[7, width:],
        "mlp.experts.3.down_proj": model["layers.1.moe.experts.down"][3],
        "mlp.shared_experts.up_proj": model["layers.1.moe.shared.gate_up.weight"][2 * width :],
    }
    # What was imported is exactly what the files say; what was exported was rounded to three mantissa bits.
    tolerance = {"rtol": 0.0, "atol": 0.0} if run == "back" else {"rtol": 1 / 16, "atol": 0.001}
    for name, expected in pairs.items():
        torch.testing.assert_close(plain[f"model.layers.1.{name}.weight"], expected, **tolerance)


def test_a_zero_expert_survives_fp8(fp8: Path) -> None:
    assert not read_run(fp8 / "back").layers[1].moe.experts.down[3].any()


def test_fp8_exported_again_holds_the_same_codes(fp8: Path) -> None:
    first, again = stored(fp8 / "hf"), stored(export_run(fp8, "fp8", out="again", run="back"))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        if name.endswith("_scale_inv"):
            torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0)
        else:
            assert torch.equal(again[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_a_run_in_fp8_exports_the_weights_that_it_computed_with(tmp_path: Path) -> None:
    ours = random_model(WITH_MTP)
    write_run(tmp_path / "run", ours)
    trained = read(tmp_path / "run" / "config.yaml")
    save(replace(trained, precision=PrecisionConfig(products="fp8")), tmp_path / "run" / "config.yaml")
    directory = export_run(tmp_path, "fp8")
    written = stored(directory)
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    scales = torch.cat([tensor.flatten() for name, tensor in written.items() if name.endswith("_scale_inv")])
    assert torch.equal(scales.log2(), scales.log2().round())
    weight = ours.state_dict()["layers.1.attn.kv_b.weight"]
    computed = round_blocks(weight, Scaling(True, FLOOR), torch.float32)
    assert torch.equal(by_definition(written)["model.layers.1.self_attn.kv_b_proj.weight"], computed)


def test_a_softmax_router_with_a_bias_is_refused_and_nothing_written(tmp_path: Path) -> None:
    ours = random_model(V2)
    ours.layers[2].moe.router.bias[1] = 0.5
    write_run(tmp_path / "run", ours)
    with pytest.raises(UserError, match=r"layers\.2\.moe\.router\.bias is not zero"):
        export_run(tmp_path)
    assert not (tmp_path / "hf").exists()


def test_shards_are_no_larger_than_asked(tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_model(MODELS["v3"]))
    directory = export_run(tmp_path, shard_gib=100_000 / 2**30)
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in directory.glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) <= 100_000
    assert sum(tensor.nbytes for tensor in stored(directory).values()) == sum(sizes)


def test_an_occupied_place_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_model(MODELS["v3"]))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("")
    with pytest.raises(ConfigError, match="something is there already"):
        export_run(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_model(MODELS["v3"]))
    [file] = (tmp_path / "run" / "checkpoints" / "step-00000007").glob("*.bin")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        export_run(tmp_path)
    assert not (tmp_path / "hf").exists()


def test_an_absent_step_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_model(MODELS["v3"]))
    with pytest.raises(UserError, match=r"step 3 .* complete steps: 7"):
        export_run(tmp_path, step=3)
