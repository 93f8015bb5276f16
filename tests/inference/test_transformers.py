"""The same weights in transformers continue a prompt with the same tokens."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dstrain.checkpoint.huggingface import logical_tensors
from dstrain.checkpoint.huggingface_config import from_json
from dstrain.inference.generate import generate
from dstrain.inference.load import empty_model, weights
from dstrain.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def reference(rope: dict[str, float | str]) -> "transformers.DeepseekV3ForCausalLM":
    config = transformers.DeepseekV3Config(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=128,
        num_nextn_predict_layers=0,
        rope_parameters={"rope_theta": 10000.0, **rope},
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(config).eval()


@torch.no_grad()
def same_weights(path: Path) -> Transformer:
    """Our model of what transformers saved."""
    config = from_json(json.loads((path / "config.json").read_text()))
    model, disk = empty_model(config, "cpu"), load_file(path / "model.safetensors")
    shards = weights(model)
    for tensor in logical_tensors(config):
        shards[tensor.key].local.copy_(tensor.join(disk).view(-1))
    return model


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, YARN], ids=["plain", "YaRN"])
def test_greedy_text_is_that_of_transformers(rope: dict[str, float | str], tmp_path: Path) -> None:
    theirs = reference(rope)
    theirs.save_pretrained(tmp_path)
    prompt = [5, 17, 3, 44, 9]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist()
    made = list(generate(same_weights(tmp_path), prompt, max_tokens=60, temperature=0, top_p=1, seed=0))
    assert made == expected
    assert len(set(made)) > 3, "a text that repeats itself would prove little"
