"""Training runs that others have measured and published, as jobs: what `dstrain plan validate` compares with.

A row names a model, a GPU and a configuration, and what was measured; the schema is that of data/published_runs.json.
What a source does not say is taken from what its software does by default (`SOFTWARE`). No constant of a machine is
fitted to what the rows measured; what software hides, repeats and launches was described with them in sight.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from math import ceil
from pathlib import Path
from typing import Any

from dstrain.config.hardware import HardwareConfig
from dstrain.errors import UserError
from dstrain.hardware import of_gpu
from dstrain.plan.architecture import Architecture
from dstrain.plan.job import Job
from dstrain.plan.layouts import PAIRED
from dstrain.plan.row_rules import check_rows

PRODUCTS = {"bf16": "bf16", "fp16": "bf16", "fp8": "fp8_tensor", "fp8blk": "fp8_block", "mxfp8": "mxfp8"}
SCHEDULES = {
    "1f1b": "1f1b",
    "interleaved": "interleaved",
    "dualpipe": "dualpipe",
    "dualpipev": "dualpipev",
    "zb1p": "zb_1p",
    "zbv": "zb_v",
}
# Of those, such that put weight gradients off.
SPLIT = (*PAIRED, "zb1p", "zbv")
# A limit is in nodes of so many that the experts lie on.
LIMITED_NODES = 8
DISPATCHERS = {
    "a2a": "alltoall",
    "alltoall": "alltoall",
    "nccl": "alltoall",
    "deepep": "deepep",
    "hybridep": "deepep",
    "flex": "deepep",
}
# Words of `recompute` -> those of a job.
RECOMPUTE = {
    "none": (),
    "full": ("layer",),
    "attn": ("core",),
    "core_attn": ("core",),
    "act": ("swiglu",),
    "moe_act": ("swiglu",),
    "selective": ("core",),
    "layernorm": ("norm",),
    "mla_up_proj": ("mla_up",),
    "moe": ("moe",),
    "mlp": ("moe",),
}
# Words that a job knows by the same name.
SAME = ("norm", "mla_up", "core", "swiglu", "experts", "sac")
# Keys of `config` that describe the run, and others that say something about it.
KNOWN = frozenset(
    [
        "prec",
        "seq",
        "gbs",
        "mbs",
        "tp",
        "pp",
        "vp",
        "cp",
        "ep",
        "etp",
        "zero",
        "sched",
        "recompute",
        "ep_overlap",
        "dispatcher",
        "node_limit",
        "cuda_graph",
        "flash",
        "sp",
        "overlap_dp",
        "tp_overlap",
        "grad_bytes",
        "mem_gib",
        "attn_mult",
        "fused",
        "split",
    ]
)


@dataclass(frozen=True)
class Row:
    """A published run; `config` as its source says it."""

    id: str
    group: str
    model: Architecture
    gpu: str
    n_gpu: int
    gpus_per_node: int
    nic_gbytes_per_s: float
    config: Mapping[str, Any]
    metric: str
    value: float
    source: str = ""

    @property
    def memory_gib(self) -> float | None:
        """The measured peak, where the source tells it."""
        return self.config.get("mem_gib")

    @property
    def unknown(self) -> frozenset[str]:
        """Keys of `config`, and modules that it computes again, that change nothing."""
        modules = {word for word in self.recomputed if word not in RECOMPUTE and word not in SAME}
        return (frozenset(self.config) - KNOWN) | {f"recompute={word}" for word in modules}

    @property
    def recomputed(self) -> list[str]:
        return [word.strip() for word in str(self.config.get("recompute", "none")).split(",")]


@dataclass(frozen=True)
class Software:
    """What a framework does where a row does not say it."""

    # Of accumulated gradients and on the wire.
    grad_bytes: int = 4
    tp_overlap: float = 0.0
    blocking_sends: bool = False
    # Kernels bound by memory, over those of fused ones.
    unfused: float = 1.0
    launch_per_expert: bool = False
    # Layers that are left over go to the first stages, whatever they cost.
    spreads_rest: bool = False
    # Of the update; a kernel for each operation of AdamW has 22 operands of 4 bytes instead of 7.
    update_bytes: int = 10


# A part of `source` -> its software.
SOFTWARE = {
    # NeMo and Megatron-Bridge: BF16 gradients, tensor-parallel transfers split up under products.
    "dgxc-benchmarking": Software(grad_bytes=2, tp_overlap=0.7, launch_per_expert=True),
    "Megatron-Bridge": Software(grad_bytes=2, tp_overlap=0.7, launch_per_expert=True),
    "ModelZoo": Software(launch_per_expert=True),
    # Megatron-LM of 2022: scores in memory, one send after the other.
    "arXiv:2205.05198": Software(blocking_sends=True),
    "arXiv:2201.11990": Software(blocking_sends=True),
    "torchtitan": Software(spreads_rest=True),
    # One kernel after the other, as PyTorch has them.
    "llm-foundry": Software(grad_bytes=2, unfused=1.6, update_bytes=80),
    "SimuMax": Software(blocking_sends=True, launch_per_expert=True),
}


def read(path: Path | None = None) -> list[Row]:
    """The rows of a file, or those that come with dstrain. Raises UserError for a row that makes no job."""
    found = _load(path)
    rows, models = (found.get("rows"), found.get("models", {})) if isinstance(found, dict) else (found, {})
    known = _packaged("published_models.json")
    known = known | models if isinstance(models, dict) else models
    return [_row(row, known[row["model"]]) for row in check_rows(rows, known, str(path))]


def _packaged(name: str) -> Any:
    return json.loads((resources.files("dstrain.plan") / "data" / name).read_text())


def _load(path: Path | None) -> Any:
    if path is None:
        return _packaged("published_runs.json")
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Name a JSON file of runs.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error


def _row(row: Mapping[str, Any], dims: Mapping[str, Any]) -> Row:
    per_node = row.get("gpus_per_node", 8)
    return Row(
        id=str(row["id"]),
        group=row.get("group", ""),
        model=_architecture(row["model"], _given(dims)),
        gpu=row["gpu"],
        n_gpu=row["n_gpu"],
        gpus_per_node=per_node,
        nic_gbytes_per_s=row.get("nic_GBps_per_gpu") or 0.0,
        config=_given(row["config"]),
        metric=row["metric"],
        value=float(row["value"]),
        source=row.get("source", ""),
    )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Null is as good as nothing."""
    return {key: value for key, value in values.items() if value is not None}


def _architecture(name: str, dims: Mapping[str, Any]) -> Architecture:
    mla = dims.get("kv_rank", 0) > 0
    return Architecture(
        name=name,
        vocab=dims["vocab_size"],
        hidden=dims["hidden"],
        layers=dims["num_layers"],
        dense_layers=dims.get("num_dense_layers", 0) if dims.get("num_experts", 0) else dims["num_layers"],
        heads=dims["num_heads"],
        kv_heads=dims["num_kv_heads"],
        qk_dim=dims["qk_nope_dim"] + dims["qk_rope_dim"] if mla else dims["head_dim"],
        v_dim=dims["v_dim"] if mla else dims["head_dim"],
        q_rank=dims.get("q_rank", 0),
        kv_rank=dims.get("kv_rank", 0),
        rope_dim=dims.get("qk_rope_dim", 0),
        ffn=dims["ffn_dim"],
        gated=dims.get("gated_ffn", True),
        experts=dims.get("num_experts", 0),
        experts_per_token=dims.get("topk", 0),
        expert_ffn=dims.get("expert_dim", 0),
        shared_ffn=dims.get("shared_expert_dim", 0),
        mtp=dims.get("num_mtp", 0),
        tied=dims.get("tied_embeddings", False),
    )


# -- Rows to jobs -----------------------------------------------------------------------------------------------------


def machine_of(row: Row) -> HardwareConfig:
    """The machine of a row. Raises UserError for a GPU without a hardware file."""
    try:
        machine = of_gpu(row.gpu)
    except UserError as error:
        raise UserError(f"Row {row.id}: {error}") from error
    nic = row.nic_gbytes_per_s or machine.inter_node_gbytes_per_s
    return replace(machine, devices_per_node=min(row.gpus_per_node, row.n_gpu), inter_node_gbytes_per_s=nic)


def job_of_row(row: Row) -> Job:
    """Raises UserError if the row has a word that is not known, or a layout that does not divide."""
    config = row.config
    software = next((found for part, found in SOFTWARE.items() if part in row.source), Software())
    chunks = config.get("vp", 1)
    in_pairs = config.get("ep_overlap") == "pair" or config.get("sched") in PAIRED or row.metric == "pair_ms"
    job = Job(
        model=_limited(row.model, config.get("node_limit"), row),
        gpus=row.n_gpu,
        seq_len=config["seq"],
        sequences=config.get("gbs", row.n_gpu * config["mbs"]),
        micro_batch=config["mbs"],
        **{axis: config.get(axis, 1) for axis in ("tp", "cp", "pp", "ep", "etp")},
        pipeline=_word(row, "sched", SCHEDULES, "interleaved" if chunks > 1 else "1f1b"),
        chunks=chunks,
        free_split=True,
        update_bytes=software.update_bytes,
        # Grouped products of MXFP8 find the numbers of rows on the device (cuBLAS, since Blackwell).
        launch_per_expert=software.launch_per_expert and config["prec"] != "mxfp8",
        overlap=in_pairs,
        splits_weights=in_pairs or "ep_overlap" in config or config.get("sched") in SPLIT,
        in_flight=2 if row.metric == "pair_ms" else 1,
        products=_word(row, "prec", PRODUCTS, "bf16"),
        dispatcher=_word(row, "dispatcher", DISPATCHERS, "deepep"),
        wire="fp8" if config["prec"] == "fp8blk" and "deepseek" in row.group else "bfloat16",
        zero=config.get("zero", 1),
        grad_bytes=config.get("grad_bytes", software.grad_bytes),
        grad_wire_bytes=config.get("grad_bytes", software.grad_bytes),
        recompute=frozenset(_recompute(row)),
        # In a pipeline all stages reduce at its very end, over cards that also carry what passes between stages.
        overlap_dp=config.get("overlap_dp", config.get("pp", 1) == 1),
        tp_overlap=config.get("tp_overlap", software.tp_overlap),
        sequence_parallel=config.get("sp", True) and config.get("tp", 1) > 1,
        blocking_sends=software.blocking_sends and chunks == 1,
        flash=config.get("flash", True),
        cuda_graph=config.get("cuda_graph", False),
        unfused=config.get("fused", software.unfused),
        slow_attention=config.get("attn_mult", 1.0),
    )
    _check(row, job)
    return replace(job, split=_split(row, job.num_stages, software))


def _split(row: Row, stages: int, software: Software) -> tuple[int, ...]:
    """As many layers on every stage, where that is possible: what all frameworks do unless they are told otherwise."""
    asked, layers = row.config.get("split"), row.model.layers
    if asked:
        whole = isinstance(asked, list) and all(type(each) is int and each >= 0 for each in asked)
        if not whole or len(asked) != stages or sum(asked) != layers:
            rule = f"split={asked!r} must be {stages} whole numbers that add up to {layers}, the layers of each stage"
            raise UserError(f"Row {row.id}: {rule}. Correct the row.")
        return tuple(asked)
    each, rest = divmod(layers, stages)
    if rest and not software.spreads_rest:
        return ()
    return (each + 1,) * rest + (each,) * (stages - rest)


def _word(row: Row, key: str, words: Mapping[str, str], default: str) -> str:
    word = row.config.get(key)
    if word is None:
        return default
    if word not in words:
        raise UserError(f"Row {row.id}: {key}={word!r} is not one of {', '.join(words)}.")
    return words[word]


def _recompute(row: Row) -> Iterator[str]:
    for word in row.recomputed:
        yield from (word,) if word in SAME else RECOMPUTE.get(word, ())


def _limited(model: Architecture, nodes: int | None, row: Row) -> Architecture:
    """DeepSeek's own runs of V3 route to 4 of 8 nodes; others say so, or route freely. Raises UserError for a limit
    that leaves a token too few experts."""
    if nodes is None and "deepseek" in row.group and model.experts == 256:
        nodes = 4
    if not nodes or not model.experts or model.experts % LIMITED_NODES:
        return model
    topk = model.experts_per_token
    least = ceil(topk * LIMITED_NODES / model.experts)
    if not least <= nodes <= LIMITED_NODES:
        rule = f"node_limit={nodes} must be at most {LIMITED_NODES}, and at least {least} for topk={topk}"
        raise UserError(f"Row {row.id}: {rule}. Correct the row.")
    return replace(model, groups=LIMITED_NODES, groups_per_token=nodes)


def _check(row: Row, job: Job) -> None:
    """Raises UserError for a layout that does not divide."""
    rules = (
        ("n_gpu", job.gpus, "tp * cp * pp", job.tp * job.cp * job.pp),
        ("n_gpu", job.gpus, "ep * etp * pp", job.ep * job.etp * job.pp),
        ("gbs", job.sequences, "mbs * n_gpu / (tp * cp * pp)", job.micro_batch * max(1, job.dp)),
        ("num_heads", job.model.heads, "tp", job.tp),
        ("num_experts", job.model.experts, "ep", job.ep),
    )
    for key, value, name, divisor in rules:
        if value % divisor:
            raise UserError(f"Row {row.id}: {key}={value} must be a multiple of {name}={divisor}. Correct the row.")
    # The embedding and the head may have stages of their own.
    most = job.model.layers + 2
    if job.num_stages > most:
        rule = f"pp * vp = {job.pp} * {job.chunks} stages are more than the {job.model.layers} layers fill"
        raise UserError(f"Row {row.id}: {rule}. Lower pp or vp.")
