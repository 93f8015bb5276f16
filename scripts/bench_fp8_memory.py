"""What the forward pass keeps for the backward pass in FP8, as a share of what it keeps in BF16.

    python scripts/bench_fp8_memory.py [overrides ...]

Counted are the bytes of all storages that autograd holds after the forward pass of one micro-batch, without parameters:
measured on the model itself. Both keep what DeepSeek-V3 keeps (recomputing norms, MLA's up-projections and SwiGLU,
section 3.2.3), or everything. The default models have the proportions of the published ones at a quarter of their width
(tokens, vocabulary and layers are few); overrides change them.
"""

import sys

import torch
from torch import Tensor

from dstrain.config.load import compose
from dstrain.config.schema import Config
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.parallel.apply import build_model
from dstrain.precision.tensor import QuantizedTensor

QUARTER_V3 = (
    "model=deepseek_v3",
    "model.vocab_size=320",
    "model.hidden_size=1792",
    "model.num_layers=5",
    "model.num_dense_layers=1",
    "model.num_heads=32",
    "model.q_lora_rank=384",
    "model.kv_lora_rank=128",
    "model.intermediate_size=4608",
    "model.moe_intermediate_size=512",
    "model.num_experts=16",
    "model.router.num_groups=4",
    "model.router.groups_per_token=2",
    "model.mtp.depth=0",
)
MODELS = {
    "V3's proportions, top 8": QUARTER_V3,
    "tiny": ("model=tiny", "model.vocab_size=320"),
}
RECOMPUTE = {"nothing recomputed": "[]", "norm, mla_up, swiglu recomputed": "[norm,mla_up,swiglu]"}


def kept_bytes(config: Config, groups: Groups) -> int:
    """In the forward pass of one micro-batch."""
    model = build_model(config, groups)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    outside = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    storages: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        for part in (x.held.values, x.held.scale) if isinstance(x, QuantizedTensor) else (x,):
            if part.untyped_storage().data_ptr() not in outside:
                # Held, so that no address is used twice.
                storages[part.untyped_storage().data_ptr()] = part.detach()
        return x

    tokens = torch.randint(256, (config.train.micro_batch, config.train.seq_len + 1), generator=torch.Generator())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(tokens, len(tokens)).total
    del loss
    return sum(x.untyped_storage().nbytes() for x in storages.values())


def main() -> None:
    groups = connect(Mesh(), Place(0, 1, torch.device("cpu")))
    usual = ("train.seq_len=512", "train.micro_batch=1", "train.sequences=1", "dispatch.expert_chunk_rows=0")
    for model, keys in MODELS.items():
        for name, recompute in RECOMPUTE.items():
            sizes = []
            for precision in ("bf16", "fp8"):
                chosen = (f"precision={precision}", f"train.recompute={recompute}")
                config = compose("train", [*keys, *usual, "data.path=python-stdlib", *sys.argv[1:], *chosen])
                sizes.append(kept_bytes(config, groups) / (config.train.seq_len * config.train.micro_batch))
            bf16, fp8 = sizes
            found = f"{bf16 / 1024:7.1f} KiB a token in BF16, {fp8 / 1024:7.1f} in FP8: {fp8 / bf16:.2f}"
            print(f"{model:24} {name:32} {found}")


if __name__ == "__main__":
    main()
