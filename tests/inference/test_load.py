from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dstrain.config.schema import MtpConfig
from dstrain.errors import UserError
from dstrain.inference.generate import generate
from dstrain.inference.load import empty_model, load_model, open_run, weights
from dstrain.metrics.run_directory import RunDirectory
from dstrain.model.router import Router
from tests.inference.models import BASE, build, random_tokens
from tests.inference.run import write_run

CONFIG = replace(BASE, q_lora_rank=24, mtp=MtpConfig(depth=1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_run(path, {0: build(CONFIG, seed=0), 20: build(CONFIG, seed=20)})
    return path


@pytest.mark.parametrize(("step", "seed"), [(None, 20), (20, 20), (0, 0)])
@torch.no_grad()
def test_the_model_is_that_of_the_checkpoint(run: Path, step: int | None, seed: int) -> None:
    model, config, tokenizer = load_model(run, step, "cpu")
    tokens_BT = random_tokens(CONFIG, 2, 12)
    assert torch.equal(model.logits(tokens_BT), build(CONFIG, seed).logits(tokens_BT))
    assert tokenizer.eod == 256
    assert config.model == replace(CONFIG, mtp=MtpConfig(depth=0))
    assert not list(model.mtp)


def test_an_unknown_step_lists_the_known_ones(run: Path) -> None:
    with pytest.raises(UserError, match=r"no complete checkpoint of step 7 .*complete steps: 0, 20"):
        load_model(run, 7, "cpu")


def test_a_run_without_a_checkpoint_says_how_to_get_one(run: Path, tmp_path: Path) -> None:
    RunDirectory(tmp_path).config_yaml.write_text((run / "config.yaml").read_text())
    with pytest.raises(UserError, match=rf"run.dir={tmp_path}: .*no complete checkpoint.*checkpoint.every_steps"):
        load_model(tmp_path, None, "cpu")


def test_a_directory_without_a_run_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"run.dir={tmp_path / 'nothing'}: .*config.yaml.*dstrain train"):
        open_run(tmp_path / "nothing")


def test_every_weight_has_its_name_in_the_checkpoint_and_shares_its_storage() -> None:
    model = build(CONFIG)
    shards = weights(model)
    assert set(shards) == {
        *(f"master/{name}" for name, _ in model.named_parameters()),
        *(f"buffer/{name}.bias" for name, _ in model.routers()),
    }
    shards["master/layers.1.attn.kv_b.weight"].local.zero_()
    assert not model.layers[1].attn.kv_b.weight.any()


def test_off_the_cpu_all_but_the_routers_are_bf16() -> None:
    model = empty_model(CONFIG, "meta")
    for module in model.modules():
        expected = torch.float32 if isinstance(module, Router) else torch.bfloat16
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        assert all(tensor.dtype == expected for tensor in tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_generates(run: Path) -> None:
    model, _, _ = load_model(run, None, "cuda")
    options = {"max_tokens": 30, "temperature": 1.0, "top_p": 0.9, "seed": 0}
    made = [list(generate(model, [5, 17, 3], **options)) for _ in range(2)]
    assert len(made[0]) == 30
    assert made[0] == made[1]
