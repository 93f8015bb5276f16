"""The same weights give the same logits in transformers, in both directions, and no value changes on the way."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_layers import MtpModel

from dstrain.checkpoint.huggingface import logical_tensors
from dstrain.config.commands import ExportRoot, ImportRoot
from dstrain.config.schema import ModelConfig, MtpConfig, PrecisionConfig, RunConfig
from dstrain.model.rope import rotation
from dstrain.model.transformer import Transformer
from dstrain.tasks import export, import_
from tests.checkpoint.huggingface_cases import MODELS, SEQ_LEN, V3, WITH_MTP, random_model, read_run, tokens, write_run

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def exported(tmp_path: Path, transformer: Transformer) -> Path:
    write_run(tmp_path / "run", transformer)
    run, precision = RunConfig(str(tmp_path / "run")), PrecisionConfig("float32")
    export.run(ExportRoot(run=run, out=str(tmp_path / "hf"), precision=precision))
    return tmp_path / "hf"


def imported(tmp_path: Path, source: Path) -> Transformer:
    import_.run(ImportRoot(path=str(source), run=RunConfig(str(tmp_path / "imported"))))
    return read_run(tmp_path / "imported")


def opened(directory: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def assert_same_logits(ours: Tensor, theirs: Tensor, label: str) -> None:
    error = (ours - theirs).abs().max().item()
    scale = theirs.abs().max().item()
    print(f"logit error {label}: {error:.2e} absolute, {error / scale:.2e} of the largest logit")
    assert scale > 1, "logits too small to say anything"
    assert error < TOLERANCE
    assert error / scale < TOLERANCE


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_exported_weights_give_the_same_logits(case: str, tmp_path: Path) -> None:
    ours = random_model(MODELS[case])
    theirs = opened(exported(tmp_path, ours))
    assert_same_logits(ours.logits(tokens()), theirs(tokens()).logits, case)


DIMENSIONS = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "eos_token_id": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
THEIRS = {
    "v3": DeepseekV3Config(
        **DIMENSIONS, q_lora_rank=24, n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5
    ),
    "v3_yarn": DeepseekV3Config(
        **DIMENSIONS, q_lora_rank=None, n_shared_experts=2, n_group=1, topk_group=1, rope_parameters=dict(YARN)
    ),
    "v2": DeepseekV2Config(**DIMENSIONS, q_lora_rank=None, n_shared_experts=2, topk_method="greedy"),
    "v2_yarn_limited": DeepseekV2Config(
        **DIMENSIONS,
        q_lora_rank=24,
        n_shared_experts=1,
        topk_method="group_limited_greedy",
        n_group=3,
        topk_group=2,
        routed_scaling_factor=16.0,
        rope_parameters=dict(YARN),
    ),
}


def their_random_model(case: str) -> PreTrainedModel:
    torch.manual_seed(2)
    build = DeepseekV3ForCausalLM if case.startswith("v3") else DeepseekV2ForCausalLM
    model = build(THEIRS[case])
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        if "e_score_correction_bias" in name:
            tensor.normal_(0.0, 0.2)
    return model


@pytest.mark.parametrize("case", THEIRS)
@torch.no_grad()
def test_imported_weights_give_the_same_logits(case: str, tmp_path: Path) -> None:
    theirs = their_random_model(case)
    theirs.save_pretrained(tmp_path / "hf")
    ours = imported(tmp_path, tmp_path / "hf")
    assert_same_logits(ours.logits(tokens()), theirs(tokens()).logits, f"{case} imported")


# The rows of our tensor in theirs; transformers fuses gate and up of the experts in memory.
SAME_GRADIENT = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.0.attn.q_b.weight": "model.layers.0.self_attn.q_b_proj.weight",
    "layers.1.attn.kv_a.weight": "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    "layers.1.attn.kv_a_norm.weight": "model.layers.1.self_attn.kv_a_layernorm.weight",
    "layers.1.moe.router.weight": "model.layers.1.mlp.gate.weight",
    "layers.1.moe.experts.gate_up": "model.layers.1.mlp.experts.gate_up_proj",
    "layers.2.moe.experts.down": "model.layers.2.mlp.experts.down_proj",
    "layers.2.moe.shared.down.weight": "model.layers.2.mlp.shared_experts.down_proj.weight",
}


@pytest.mark.parametrize("case", ["v3_limited", "v3_yarn", "v2_limited"])
def test_gradients_of_the_loss_are_the_same(case: str, tmp_path: Path) -> None:
    model = replace(MODELS[case], router=replace(MODELS[case].router, balance_loss_weight=0.0), num_dense_layers=1)
    ours = random_model(model)
    theirs = opened(exported(tmp_path, ours))
    batch = tokens(length=SEQ_LEN + 1)
    loss = ours(batch, total_sequences=2).total
    loss.backward()
    their_loss = F.cross_entropy(theirs(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=0)
    for name, their_name in SAME_GRADIENT.items():
        expected = theirs.get_parameter(their_name).grad
        error = (ours.get_parameter(name).grad - expected).norm() / expected.norm()
        assert error < TOLERANCE, (name, error)


@torch.no_grad()
def test_mtp_modules_compute_what_those_of_transformers_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers knows the MTP layer of the 61-layer model only.
    mtp_layers = [r"model\.layers\.3.*", r"model\.layers\.4.*"]
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", mtp_layers)
    ours = random_model(WITH_MTP)
    theirs = opened(exported(tmp_path, ours))
    their_mtp = MtpModel.from_pretrained(theirs)
    batch = tokens(length=SEQ_LEN + 2)
    hidden = ours.hidden(batch[:, :SEQ_LEN])
    # What transformers feeds its MTP modules is the hidden state after the final norm.
    their_hidden = theirs(batch[:, :SEQ_LEN], output_hidden_states=True).hidden_states[-1]
    cos, sin = rotation(torch.arange(SEQ_LEN), WITH_MTP.qk_rope_head_dim, WITH_MTP.rope)
    for depth in (1, 2):
        ahead = batch[:, depth : depth + SEQ_LEN]
        module = ours.mtp[depth - 1]
        hidden = module.norm(module.layer(module.join(ours.embed(ahead), hidden), cos, sin)[0])
        positions = torch.arange(depth, depth + SEQ_LEN)[None]
        their_hidden = their_mtp.forward_layer(depth - 1, their_hidden, positions, None, input_ids=ahead)
        assert_same_logits(ours.scores(hidden), theirs.lm_head(their_hidden), f"MTP depth {depth}")


@pytest.mark.parametrize("case", ["v3_limited", "v3_tied", "v2_yarn", "mtp"])
def test_export_and_import_change_no_bit(case: str, tmp_path: Path) -> None:
    ours = random_model(MODELS.get(case, WITH_MTP))
    back = imported(tmp_path, exported(tmp_path, ours))
    assert ours.state_dict().keys() == back.state_dict().keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def every_disk_name(model: ModelConfig) -> list[str]:
    return [name for tensor in logical_tensors(model) for name in (*tensor.parts, *tensor.copies)]


def test_mtp_layers_follow_the_others_with_copies_of_embedding_and_head() -> None:
    names = every_disk_name(WITH_MTP)
    assert len(names) == len(set(names))
    for layer in (3, 4):
        for rest in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"):
            assert f"model.layers.{layer}.{rest}.weight" in names
        assert f"model.layers.{layer}.mlp.experts.7.up_proj.weight" in names
    assert not any(name.startswith("model.layers.5.") for name in names)


def test_a_tied_head_is_the_embedding_in_mtp_layers() -> None:
    tied = replace(V3, tie_embeddings=True, mtp=MtpConfig(depth=1))
    [embed] = [tensor for tensor in logical_tensors(tied) if tensor.name == "embed.weight"]
    assert embed.copies == ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    assert "lm_head.weight" not in every_disk_name(tied)
