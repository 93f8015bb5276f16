"""Rows that are none are refused with one message that names row, field, value and cure."""

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.errors import UserError
from dstrain.plan.published import job_of_row, machine_of, read

CONFIG = {"prec": "bf16", "seq": 4096, "gbs": 64, "mbs": 1, "pp": 2}
ROW = {"id": "a", "model": "mine", "gpu": "H100", "n_gpu": 16, "metric": "step_s", "value": 3.0, "config": CONFIG}
MODEL = {"num_layers": 8, "hidden": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "ffn_dim": 14336}
MODEL |= {"vocab_size": 32000}


def load(tmp_path: Path, rows: Any, models: Any) -> None:
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"rows": rows, "models": models}))
    for row in read(file):
        job_of_row(row)
        machine_of(row)


def test_a_row_that_is_one(tmp_path: Path):
    load(tmp_path, [ROW], {"mine": MODEL})


NO_VALUE = {key: value for key, value in ROW.items() if key != "value"}
WRONG = [
    (NO_VALUE, "Row a has no value: every row needs one."),
    ({**ROW, "gpu": "H101"}, "Row a: gpu=H101: there is no machine for this GPU. Use one of "),
    ({**ROW, "gpu": 5}, "Row a: gpu=5 must be text."),
    ({**ROW, "model": "other"}, "Row a: model=other is not known. Use one of "),
    ({**ROW, "metric": "days"}, "Row a: metric=days is not known. Use one of step_s, "),
    ({**ROW, "value": -1}, "Row a: value=-1 must be a number above 0."),
    ({**ROW, "value": "3"}, "Row a: value='3' must be a number above 0."),
    ({**ROW, "value": float("nan")}, "Row a: value=nan must be a number above 0."),
    ({**ROW, "n_gpu": 16.5}, "Row a: n_gpu=16.5 must be a whole number above 0."),
    ({**ROW, "nic_GBps_per_gpu": -50}, "Row a: nic_GBps_per_gpu=-50 must be a number above 0."),
    ({**ROW, "config": 5}, "Row a: config=5 must be an object with prec, seq, gbs, mbs."),
    ({**ROW, "config": {**CONFIG, "seq": None}}, "Row a: config has no seq: every row needs one."),
    ({**ROW, "config": {**CONFIG, "mem_gib": "much"}}, "Row a: mem_gib='much' must be a number above 0."),
    ({**ROW, "config": {**CONFIG, "zero": 7}}, "Row a: zero=7 is no stage of ZeRO."),
    ({**ROW, "config": {**CONFIG, "tp_overlap": 2}}, "Row a: tp_overlap=2 must be a share."),
    ({**ROW, "config": {**CONFIG, "pp": 3}}, "Row a: n_gpu=16 must be a multiple of tp * cp * pp=3."),
    ({**ROW, "config": {**CONFIG, "gbs": 63}}, "Row a: gbs=63 must be a multiple of mbs * n_gpu / (tp * cp * pp)=8."),
    ({**ROW, "config": {**CONFIG, "pp": 16}}, "Row a: pp * vp = 16 * 1 stages are more than the 8 layers fill."),
    ({**ROW, "config": {**CONFIG, "sched": "best"}}, "Row a: sched='best' is not one of 1f1b, "),
    ("row", "Row number 1 is 'row'. Make it an object with id, "),
]


@pytest.mark.parametrize(("row", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_rows_that_are_none(tmp_path: Path, row: Any, message: str):
    with pytest.raises(UserError) as caught:
        load(tmp_path, [row], {"mine": MODEL})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"mine": {**MODEL, "hidden": None}}, "Row a: model mine has no hidden: its dimensions need one."),
        ({"mine": {**MODEL, "num_layers": 1.5}}, "Row a: model mine: num_layers=1.5 must be a whole number above 0."),
        (
            {"mine": {**MODEL, "num_experts": -2}},
            "Row a: model mine: num_experts=-2 must be a whole number of at least",
        ),
        ({"mine": {**MODEL, "num_experts": 8}}, "Row a: model mine has no topk: "),
        ({"mine": {**MODEL, "kv_rank": 8}}, "Row a: model mine has no qk_nope_dim: "),
        ({"mine": 5}, "Row a: model mine is 5. Make it an object with num_layers, "),
    ],
)
def test_models_that_are_none(tmp_path: Path, models: Any, message: str):
    with pytest.raises(UserError) as caught:
        load(tmp_path, [ROW], models)
    assert str(caught.value).startswith(message)


def test_files_that_hold_no_rows(tmp_path: Path):
    with pytest.raises(UserError, match="there are no rows"):
        load(tmp_path, [], {})
    with pytest.raises(UserError, match='"models" is'):
        load(tmp_path, [ROW], [])
    with pytest.raises(UserError, match=r"Row a: id='a' is there twice"):
        load(tmp_path, [ROW, ROW], {"mine": MODEL})
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "other.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read(tmp_path / "bad.json")
