"""Small models of both families, as runs and as transformers models."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dstrain.checkpoint.save import Checkpointer
from dstrain.config.load import save
from dstrain.config.schema import Config, ModelConfig, MtpConfig, RopeConfig, RouterConfig, RunConfig, TrainConfig
from dstrain.inference.load import empty_model, open_run, weights
from dstrain.model.init import init_weights
from dstrain.model.transformer import Transformer

SEQ_LEN = 96
YARN = RopeConfig(yarn_factor=4.0, original_seq_len=32, mscale=1.0, mscale_all_dim=0.7)
V3 = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=24,
    intermediate_size=96,
    moe_intermediate_size=40,
    num_experts=8,
    experts_per_token=3,
    init_std=0.1,
)
LIMITED = RouterConfig(num_groups=4, groups_per_token=2, scaling_factor=2.5)
V2 = replace(V3, router=RouterConfig(score="softmax", group_score="max", normalize_weights=False, bias_update_rate=0.0))
V2_LIMITED = replace(V2.router, num_groups=4, groups_per_token=3, scaling_factor=4.0)
MODELS = {
    "v3": V3,
    "v3_limited": replace(V3, q_lora_rank=24, num_shared_experts=2, router=LIMITED),
    "v3_one_group": replace(V3, router=replace(LIMITED, num_groups=2, groups_per_token=1, normalize_weights=False)),
    "v3_yarn": replace(V3, q_lora_rank=24, rope=YARN),
    "v3_yarn_without_temperature": replace(V3, rope=replace(YARN, mscale=0.7, mscale_all_dim=0.0)),
    "v3_tied": replace(V3, tie_embeddings=True),
    "v3_dense": replace(V3, num_dense_layers=3),
    "v2": V2,
    "v2_limited": replace(V2, q_lora_rank=24, router=V2_LIMITED, num_dense_layers=0),
    "v2_yarn": replace(V2, rope=replace(YARN, mscale=0.707, mscale_all_dim=0.707)),
}
WITH_MTP = replace(MODELS["v3_limited"], mtp=MtpConfig(depth=2))


def random_model(model: ModelConfig, seed: int = 1) -> Transformer:
    """Random weights; norms and, where the family has them, router biases are random as well."""
    generator = torch.Generator().manual_seed(seed)
    transformer = empty_model(model, "cpu").requires_grad_(True)
    init_weights(transformer, seed)
    for name, parameter in transformer.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    if model.router.score == "sigmoid":
        for _, router in transformer.routers():
            router.bias.normal_(0.0, 0.2, generator=generator)
    return transformer


def write_run(directory: Path, transformer: Transformer, tokenizer: str = "bytes") -> None:
    """`transformer` as step 7 of a run."""
    directory.mkdir()
    config = Config(model=transformer.config, train=TrainConfig(seq_len=SEQ_LEN), run=RunConfig(dir=str(directory)))
    save(replace(config, data=replace(config.data, tokenizer=tokenizer)), directory / "config.yaml")
    checkpointer = Checkpointer(directory / "checkpoints", keep_last=1, keep_every_steps=0, group=None)
    checkpointer.save(7, weights(transformer), {})
    checkpointer.finish()


def read_run(directory: Path) -> Transformer:
    config, checkpointer = open_run(directory)
    transformer = empty_model(config.model, "cpu")
    checkpointer.load(checkpointer.steps()[-1], weights(transformer))
    return transformer


def tokens(sequences: int = 2, length: int = SEQ_LEN) -> Tensor:
    return torch.randint(0, 320, (sequences, length), generator=torch.Generator().manual_seed(5))
