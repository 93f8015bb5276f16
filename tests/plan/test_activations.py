"""What layers are said to keep is what autograd keeps."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dstrain.config.schema import Config, MtpConfig
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from dstrain.model.cross_entropy import CHUNK_BYTES
from dstrain.parallel.apply import build_model
from dstrain.plan.activations import DSTRAIN, Activations
from dstrain.plan.job import job_of
from dstrain.precision.tensor import QuantizedTensor
from tests.tiny import CPU, tiny_config


def kept_bytes(config: Config) -> int:
    """What a micro-batch keeps after its forward pass: the tensors that autograd holds, and those that functions which
    are to run again hold as their arguments."""
    model = build_model(config, connect(Mesh(), Place(0, 1, CPU)))
    if config.precision.compute_dtype == "bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    gc.collect()
    before = {x.untyped_storage().data_ptr() for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)}
    storages: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        for part in (x.held.values, x.held.scale) if isinstance(x, QuantizedTensor) else (x,):
            if part.untyped_storage().data_ptr() not in before:
                storages[part.untyped_storage().data_ptr()] = part.detach()
        return x

    tokens = torch.randint(64, (config.train.micro_batch, config.train.seq_len + 1 + config.model.mtp.depth))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(tokens, len(tokens)).total
    for x in [x for x in gc.get_objects() if type(x) is Tensor]:
        keep(x)
    del loss
    return sum(x.untyped_storage().nbytes() for x in storages.values())


def activation_config(products: str, recompute: tuple[str, ...]) -> Config:
    return tiny_config(
        model={
            "hidden_size": 256,
            "num_heads": 4,
            "num_layers": 4,
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "intermediate_size": 512,
            "moe_intermediate_size": 256,
            "num_experts": 8,
            "mtp": MtpConfig(),
        },
        train={"sequences": 1, "micro_batch": 1, "seq_len": 128, "recompute": recompute},
        precision={"compute_dtype": "bfloat16", "products": products},
        dispatch={"expert_chunk_rows": 0},
    )


@pytest.mark.parametrize("products", ["compute", "fp8"])
@pytest.mark.parametrize(
    "recompute", [(), ("norm",), ("mla_up",), ("swiglu",), ("norm", "mla_up", "swiglu"), ("attend",), ("layer",)]
)
def test_layers_keep_what_autograd_keeps(products: str, recompute: tuple[str, ...]) -> None:
    config = activation_config(products, recompute)
    kept = Activations(job_of(config), DSTRAIN, composed=True)
    model = kept.model
    predicted = model.dense_layers * kept.dense.live + model.moe_layers * kept.moe.live + kept.head.live + kept.logits
    assert predicted == pytest.approx(kept_bytes(config), rel=0.04)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("depth", [0, 1])
def test_logits_are_kept_once(dtype: str, depth: int) -> None:
    """Of the head and of each MTP module, in the dtype they are computed in: what a larger vocabulary adds."""
    kept, predicted = [], []
    for vocab in (64, 2048):
        base = activation_config("compute", ("layer",))
        model = replace(base.model, vocab_size=vocab, num_layers=1, mtp=MtpConfig(depth=depth))
        config = replace(base, model=model, precision=replace(base.precision, compute_dtype=dtype))
        kept.append(kept_bytes(config))
        predicted.append((1 + depth) * Activations(job_of(config), DSTRAIN, composed=True).logits)
    assert kept[1] - kept[0] == pytest.approx(predicted[1] - predicted[0], rel=0.01)


def test_chunks_of_logits_are_those_of_cross_entropy() -> None:
    assert DSTRAIN.logit_chunk_bytes == CHUNK_BYTES
