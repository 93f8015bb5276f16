"""What a row of measured runs must be before it becomes a job; each breach is one message with row, field, value, rule
and cure."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from dstrain.errors import UserError

METRICS = ("step_s", "tok_s_gpu", "tflops", "gpu_h_per_T", "pair_ms")
REQUIRED = ("id", "model", "gpu", "n_gpu", "config", "metric", "value")
TEXTS = ("id", "group", "model", "gpu", "metric", "source")
# Of `config`: what it must have (but for the trace, gbs), whole numbers, and numbers that may be 0 or up to a limit.
NEEDED = ("prec", "seq", "gbs", "mbs")
WHOLE = ("seq", "gbs", "mbs", "tp", "pp", "vp", "cp", "ep", "etp", "node_limit")
NUMBERS = ("mem_gib", "attn_mult", "fused", "grad_bytes")
ZERO_STAGES = (0, 1, 2, 3)
# Of a model: what every one has, and what those have that don't have a latent, or do.
DIMENSIONS = ("num_layers", "hidden", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")
HEAD_DIMENSIONS = {False: ("head_dim",), True: ("qk_nope_dim", "qk_rope_dim", "v_dim")}
EXPERT_DIMENSIONS = ("topk", "expert_dim")
MAY_BE_ZERO = ("num_experts", "num_dense_layers", "q_rank", "kv_rank", "qk_rope_dim", "shared_expert_dim", "num_mtp")


def check_rows(rows: Any, models: Any, source: str) -> list[dict[str, Any]]:
    """The rows. Raises UserError for the first row that is none; `source` names the file."""
    if not isinstance(rows, list) or not rows:
        cure = 'Write {"rows": [{"id": ..., "model": ..., ...}, ...]}.'
        raise UserError(f"{source}: there are no rows. {cure}")
    if not isinstance(models, dict):
        raise UserError(f'{source}: "models" is {models!r}. Make it an object: a name, and dimensions as an object.')
    names: set[str] = set()
    for number, row in enumerate(rows, 1):
        where = f"Row {row['id'] if isinstance(row, dict) and 'id' in row else f'number {number}'}"
        check_row(where, row, models)
        if row["id"] in names:
            raise UserError(f"{where}: id={row['id']!r} is there twice: rows are told apart by it. Change one.")
        names.add(row["id"])
    return rows


def check_row(where: str, row: Any, models: Mapping[str, Any]) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where} is {row!r}. Make it an object with {', '.join(REQUIRED)}.")
    for key in REQUIRED:
        if key not in row:
            raise UserError(f"{where} has no {key}: every row needs one. Add it to the file.")
    for key in TEXTS:
        if not isinstance(row.get(key, ""), str):
            raise UserError(f"{where}: {key}={row[key]!r} must be text. Correct the row.")
    if row["metric"] not in METRICS:
        raise UserError(f"{where}: metric={row['metric']} is not known. Use one of {', '.join(METRICS)}.")
    _above_zero(where, "n_gpu", row["n_gpu"], whole=True)
    _above_zero(where, "value", row["value"])
    if "gpus_per_node" in row:
        _above_zero(where, "gpus_per_node", row["gpus_per_node"], whole=True)
    if row.get("nic_GBps_per_gpu"):
        _above_zero(where, "nic_GBps_per_gpu", row["nic_GBps_per_gpu"])
    _check_config(where, row["config"], is_step=row["metric"] != "pair_ms")
    if row["model"] not in models:
        cure = f'Use one of {", ".join(sorted(models))}, or describe it under "models" in the file.'
        raise UserError(f"{where}: model={row['model']} is not known. {cure}")
    _check_model(where, row["model"], models[row["model"]])


def _check_config(where: str, config: Any, *, is_step: bool) -> None:
    if not isinstance(config, dict):
        raise UserError(f"{where}: config={config!r} must be an object with {', '.join(NEEDED)}. Correct the row.")
    for key in NEEDED:
        if config.get(key) is None and (is_step or key != "gbs"):
            raise UserError(f"{where}: config has no {key}: every row needs one. Add it to the file.")
    for key in (*WHOLE, *NUMBERS):
        if config.get(key) is not None:
            _above_zero(where, key, config[key], whole=key in WHOLE)
    if config.get("zero") is not None and config["zero"] not in ZERO_STAGES:
        raise UserError(f"{where}: zero={config['zero']!r} is no stage of ZeRO. Use one of 0, 1, 2, 3 (3: FSDP).")
    share = config.get("tp_overlap") or 0
    if not _is_number(share) or not 0 <= share <= 1:
        raise UserError(f"{where}: tp_overlap={share!r} must be a share. Set it between 0 and 1.")


def _check_model(where: str, name: str, dims: Any) -> None:
    if not isinstance(dims, dict):
        raise UserError(f"{where}: model {name} is {dims!r}. Make it an object with {', '.join(DIMENSIONS)}, ...")
    for key in MAY_BE_ZERO:
        value = dims.get(key) or 0
        if not _is_number(value) or value < 0 or value != int(value):
            raise UserError(f"{where}: model {name}: {key}={value!r} must be a whole number of at least 0. Correct it.")
    wanted: Sequence[str] = (*DIMENSIONS, *HEAD_DIMENSIONS[bool(dims.get("kv_rank"))])
    wanted = (*wanted, *(EXPERT_DIMENSIONS if dims.get("num_experts") else ()))
    for key in wanted:
        if dims.get(key) is None:
            raise UserError(f"{where}: model {name} has no {key}: its dimensions need one. Add it to the file.")
        _above_zero(f"{where}: model {name}", key, dims[key], whole=True)


def _above_zero(where: str, key: str, value: Any, *, whole: bool = False) -> None:
    if not _is_number(value) or value <= 0 or (whole and value != int(value)):
        raise UserError(f"{where}: {key}={value!r} must be a {'whole ' * whole}number above 0. Correct it.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
