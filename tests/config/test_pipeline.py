"""Rules of pipelines, with the field they name."""

import pytest

from dstrain.config.check import check, check_show, check_split
from dstrain.config.commands import ShowRoot, SplitRoot
from dstrain.config.schema import Config, DataConfig, ModelConfig, PartCosts, TrainConfig
from dstrain.errors import ConfigError
from tests.config.test_check import assert_refused, changed

GOOD = changed(
    Config(train=TrainConfig(sequences=16), data=DataConfig(path="corpus.txt"), model=ModelConfig(num_layers=8)),
    mesh__pp=4,
)
RAMP = {"train__ramp__tokens": 9, "train__ramp__start_sequences": 16, "train__ramp__increment_sequences": 16}

BROKEN = [
    # field, values, part of the rule, part of the cure
    ("schedule.pipeline", {"schedule__pipeline": "gpipe"}, "no such choice", "1f1b, interleaved, zb_1p, zb_v"),
    ("schedule.pipeline", {"schedule__pipeline": "gpipe", "mesh__pp": 1}, "no such choice", "dualpipev"),
    ("mesh.pp", {"schedule__pipeline": "dualpipe", "mesh__pp": 3}, "even", "4"),
    ("schedule.chunks", {"schedule__pipeline": "interleaved", "schedule__chunks": 1}, "at least 2", ""),
    # Too few micro-batches, with one, two and four sequences for each.
    (
        "train.sequences",
        {"schedule__pipeline": "dualpipev", "train__sequences": 6},
        "dualpipev on 4 pipeline ranks needs at least 8 micro-batches",
        "Set it to 8,",
    ),
    (
        "train.sequences",
        {"schedule__pipeline": "dualpipe", "mesh__ep": 2, "train__sequences": 14},
        "it gives every rank 7, but dualpipe on 4",
        "Set it to 16,",
    ),
    (
        "train.sequences",
        {"schedule__pipeline": "dualpipe", "mesh__dp": 2, "train__micro_batch": 2, "train__sequences": 36},
        "it gives every rank 9, but dualpipe",
        "Set it to 32,",
    ),
    (
        "train.batch_tokens",
        {"schedule__pipeline": "dualpipe", "train__sequences": None, "train__batch_tokens": 9 * 256},
        "it gives every rank 9, but dualpipe on 4 pipeline ranks needs a multiple of 2",
        "Set it to 2048,",
    ),
    ("train.sequences", {"schedule__pipeline": "interleaved", "train__sequences": 10}, "multiple of 4", "8,"),
    (
        "train.ramp.start_sequences",
        {
            "schedule__pipeline": "dualpipev",
            **RAMP,
            "train__ramp__start_sequences": 4,
            "train__ramp__increment_sequences": 4,
        },
        "at least 8",
        "Set it to 8,",
    ),
    (
        "train.ramp.increment_sequences",
        {
            "schedule__pipeline": "interleaved",
            **RAMP,
            "train__sequences": 20,
            "train__ramp__start_sequences": 8,
            "train__ramp__increment_sequences": 3,
        },
        "the batch of 11 sequences has 11 micro-batches, but interleaved",
        "increments",
    ),
    (
        "mesh.pp",
        {"mesh__pp": 9},
        "pipeline=1f1b makes 9 stages, and model.num_layers=8",
        "at most 8 or model.num_layers to at least 9",
    ),
    ("mesh.pp", {"schedule__pipeline": "zb_v", "mesh__pp": 5}, "makes 10 stages, and model.num_layers=8", "at most 4"),
    ("mesh.pp", {"schedule__pipeline": "interleaved", "schedule__chunks": 3}, "makes 12 stages", "at most 2"),
    ("schedule.split", {"schedule__split": (2, 3, 3)}, "has 4 stages", "Give 4 numbers"),
    ("schedule.split", {"schedule__split": (2, 3, 3, 0)}, "at least one layer", "sum 8"),
    ("schedule.split", {"schedule__split": (2, 2, 2, 1)}, "the sum is 7, not model.num_layers=8", "sum 8"),
    ("schedule.part_ms.head", {"schedule__part_ms": PartCosts(0, 1, 1, 1, -1)}, "at least 0", ""),
    ("schedule.part_ms.dense", {"schedule__part_ms": PartCosts(moe=1)}, "has such layers", "measure=true"),
    ("schedule.part_ms.moe", {"schedule__part_ms": PartCosts(dense=1)}, "has such layers", "measure=true"),
    ("schedule.in_flight", {"schedule__in_flight": 2}, "mesh.pp=4", "schedule.in_flight=1 or null"),
    ("engine.zero_stage", {"engine__name": "deepspeed", "engine__zero_stage": 2}, "end of a step", "zero_stage=1"),
    ("schedule.order", {"schedule__order": "measured"}, "mesh.pp=4", "fixed"),
]


@pytest.mark.parametrize(("field", "values", "rule", "cure"), BROKEN)
def test_rule(field: str, values: dict, rule: str, cure: str):
    assert_refused(changed(GOOD, **values), field, rule, cure)


KEPT = [
    {},
    {"mesh__pp": 8},
    {"schedule__overlap": True},
    {"schedule__overlap": False, "schedule__pipeline": "dualpipe"},
    {"schedule__pipeline": "zb_1p", "schedule__overlap": False},
    {"schedule__pipeline": "dualpipe", "mesh__ep": 2},
    {"schedule__pipeline": "dualpipev", "mesh__pp": 3},
    {"schedule__pipeline": "interleaved", "schedule__split": (1,) * 8},
    {"schedule__split": (1, 2, 3, 2), "schedule__in_flight": 1},
    {"schedule__part_ms": PartCosts(dense=1, moe=2)},
    {"schedule__pipeline": "dualpipev", "train__sequences": 32, **RAMP},
    # Without a pipeline its keys mean nothing.
    {"mesh__pp": 1, "schedule__pipeline": "dualpipe", "train__sequences": 3},
    {"mesh__pp": 1, "schedule__pipeline": "dualpipev", "schedule__in_flight": 2, "schedule__order": "measured"},
    {"mesh__pp": 1, "schedule__split": (3, 3)},
]


@pytest.mark.parametrize("values", KEPT)
def test_legal_configs_pass(values: dict):
    check(changed(GOOD, **values))


def test_micro_batches_follow_from_the_world_size():
    config = changed(GOOD, schedule__pipeline="dualpipev")
    check(config, world_size=8)
    with pytest.raises(ConfigError, match=r"train\.sequences=16: it gives every rank 4, but .* Set it to 32,"):
        check(config, world_size=16)


SHOW = changed(ShowRoot(train=TrainConfig(sequences=16)), mesh__pp=4, schedule__pipeline="dualpipe")


@pytest.mark.parametrize(
    ("field", "values", "rule"),
    [
        ("mesh.pp", {"mesh__pp": 1}, "several ranks"),
        ("mesh.pp", {"mesh__pp": 5}, "even number"),
        ("schedule.pipeline", {"schedule__pipeline": "dualpip"}, "no such choice"),
        ("micro_batches", {"micro_batches": 7}, "at least 8"),
        ("micro_batches", {"micro_batches": 0}, "at least 1"),
        ("train.sequences", {"train__sequences": 6}, "at least 8"),
        ("times", {"times": (1.0, 1.0)}, "three times"),
        ("times", {"times": (1.0, 0.0, 1.0)}, "above 0"),
        ("pair", {"pair": 0.0}, "above 0"),
    ],
)
def test_show(field: str, values: dict, rule: str):
    check_show(SHOW)
    with pytest.raises(ConfigError) as caught:
        check_show(changed(SHOW, **values))
    assert caught.value.field == field
    assert rule in caught.value.rule


def test_show_needs_no_model_that_fits():
    """A table is one of ranks and micro-batches."""
    check_show(changed(SHOW, mesh__pp=64, micro_batches=512))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("mesh.pp", {"mesh__pp": 1}),
        ("mesh.pp", {"mesh__pp": 5}),
        ("schedule.split", {"schedule__split": (4,)}),
        ("model.hidden_size", {"model__hidden_size": 20}),
        ("rounds", {"rounds": 0}),
    ],
)
def test_split(field: str, values: dict):
    config = changed(SplitRoot(train=TrainConfig(sequences=16)), mesh__pp=4)
    check_split(config)
    with pytest.raises(ConfigError) as caught:
        check_split(changed(config, **values))
    assert caught.value.field == field
