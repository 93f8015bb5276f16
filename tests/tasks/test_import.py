"""`dstrain import`: what is written is bitwise what was read, and what does not fit is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dstrain.checkpoint.save import Checkpointer
from dstrain.config.commands import ExportRoot, ImportRoot
from dstrain.config.load import read
from dstrain.config.schema import MtpConfig, PrecisionConfig, RunConfig
from dstrain.engine.state import FlatShard
from dstrain.errors import ConfigError, UserError
from dstrain.tasks import export, import_
from tests.checkpoint.huggingface_cases import SEQ_LEN, WITH_MTP, random_model, read_run, write_run

WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def export_to(out: Path, run: Path, dtype: str = "bfloat16") -> Path:
    export.run(ExportRoot(run=RunConfig(str(run)), out=str(out), precision=PrecisionConfig(dtype)))
    return out


def import_to(run: Path, source: Path) -> Path:
    import_.run(ImportRoot(path=str(source), run=RunConfig(str(run))))
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 checkpoint with MTP modules, in one file."""
    tmp_path = tmp_path_factory.mktemp("original")
    write_run(tmp_path / "run", random_model(WITH_MTP))
    return export_to(tmp_path / "hf", tmp_path / "run")


@pytest.fixture
def hf(original: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(original, tmp_path / "hf"))


def rewrite(hf: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces tensors by name; None removes one."""
    found = {**load_file(hf / WEIGHTS), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, hf / WEIGHTS)
    (hf / INDEX).unlink()


def test_import_then_export_changes_no_bit(hf: Path, tmp_path: Path) -> None:
    again = export_to(tmp_path / "again", import_to(tmp_path / "run", hf))
    assert {path.name for path in hf.iterdir()} == {path.name for path in again.iterdir()}
    for path in hf.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_run_holds_fp32_weights_and_nothing_of_an_optimiser(hf: Path, tmp_path: Path) -> None:
    run = import_to(tmp_path / "run", hf)
    checkpointer = Checkpointer(run / "checkpoints", keep_last=1, keep_every_steps=0, group=None)
    assert checkpointer.steps() == [0]
    manifest = json.loads((run / "checkpoints" / "step-00000000" / "manifest.json").read_text())
    assert {name.partition("/")[0] for name in manifest["tensors"]} == {"master", "buffer"}
    assert {tensor["dtype"] for tensor in manifest["tensors"].values()} == {"float32"}
    moment = {"exp_avg/norm.weight": FlatShard((64,), 0, torch.full((64,), 3.0))}
    extra = checkpointer.load(0, moment, optional_prefixes=("exp_avg/",))
    assert extra == {"progress": {"step": 0, "samples": 0, "tokens": 0}}
    assert (moment["exp_avg/norm.weight"].local == 3).all()


def test_the_config_is_that_of_the_model(hf: Path, tmp_path: Path) -> None:
    config = read(import_to(tmp_path / "run", hf) / "config.yaml")
    assert config.model == WITH_MTP
    assert config.train.seq_len == SEQ_LEN
    assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.json")
    assert Path(config.data.tokenizer).is_file()


def test_mtp_modules_that_only_config_json_knows_are_left_out(hf: Path, tmp_path: Path) -> None:
    mtp = [name for name in load_file(hf / WEIGHTS) if name.startswith(("model.layers.3.", "model.layers.4."))]
    rewrite(hf, **dict.fromkeys(mtp))
    assert read_run(import_to(tmp_path / "run", hf)).config.mtp == MtpConfig()


def test_old_rope_buffers_are_passed_over(hf: Path, tmp_path: Path) -> None:
    rewrite(hf, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    import_to(tmp_path / "run", hf)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.self_attn.o_proj.weight", None, r"no tensor model\.layers\.1\.self_attn\.o_proj\.weight"),
        ("model.layers.1.mlp.experts.7.up_proj.weight", None, r"no tensor model\.layers\.1\.mlp\.experts\.7\.up_proj"),
        ("model.norm.weight", torch.ones(65), r"model\.norm\.weight has the shape \[65\].*implies \[64\]"),
        ("model.layers.1.self_attn.q_proj.bias", torch.ones(4), r"1 tensors .*q_proj\.bias among them"),
        ("model.layers.3.embed_tokens.weight", torch.ones(320, 64), "differs from model.embed_tokens.weight"),
        ("model.layers.4.shared_head.head.weight", torch.ones(320, 64), "differs from lm_head.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    hf: Path, tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    rewrite(hf, **{name: tensor})
    with pytest.raises(UserError, match=message):
        import_to(tmp_path / "run", hf)
    assert not (tmp_path / "run").exists()


def test_copies_in_mtp_layers_may_be_absent(hf: Path, tmp_path: Path) -> None:
    rewrite(hf, **{"model.layers.3.embed_tokens.weight": None, "model.layers.4.shared_head.head.weight": None})
    assert read_run(import_to(tmp_path / "run", hf)).config == WITH_MTP


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        import_to(tmp_path / "run", tmp_path)


def test_a_run_is_not_overwritten(hf: Path, tmp_path: Path) -> None:
    run = import_to(tmp_path / "run", hf)
    with pytest.raises(ConfigError, match="something is there already"):
        import_to(run, hf)
