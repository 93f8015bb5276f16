"""Every rule, with the field it names."""

from dataclasses import replace
from typing import Any

import pytest

from dstrain.config.check import (
    check,
    check_export,
    check_generate,
    check_import,
    check_same_run,
    check_tokenize,
    check_training,
    check_verify,
    resolve,
)
from dstrain.config.commands import ExportRoot, GenerateRoot, ImportRoot, TokenizeRoot, VerifyRoot
from dstrain.config.schema import Config, Corpus, DataConfig, LrPhase, RecipeChange, RunConfig, TrainConfig
from dstrain.errors import ConfigError

GOOD = Config(train=TrainConfig(sequences=16), data=DataConfig(path="corpus.txt"))


def changed(node: Any, **values: Any) -> Any:
    """A copy with other values; `model__router__score` is model.router.score."""
    for name, value in values.items():
        first, _, rest = name.partition("__")
        node = replace(node, **{first: changed(getattr(node, first), **{rest: value}) if rest else value})
    return node


FP8 = {"precision__products": "fp8", "precision__gather": "fp8"}

BROKEN = [
    # field, values, part of the rule, part of the cure
    ("mesh.pp", {"mesh__pp": 0}, "at least 1", ""),
    ("mesh.dp", {"mesh__dp": 0}, "at least 1", ""),
    ("mesh.ep", {"mesh__ep": 3}, "must divide model.num_experts=16", "1, 2, 4, 8, 16"),
    ("dispatch.kind", {"dispatch__kind": "pigeon"}, "no such choice", "auto, local, alltoall"),
    ("dispatch.kind", {"dispatch__kind": "local", "mesh__ep": 2}, "other ranks", "alltoall"),
    ("schedule.in_flight", {"schedule__in_flight": 0}, "at least 1", ""),
    (
        "schedule.in_flight",
        {"schedule__in_flight": 2, "engine__name": "deepspeed", "engine__zero_stage": 2},
        "one micro-batch after the other",
        "schedule.in_flight=1",
    ),
    ("model.hidden_size", {"model__hidden_size": 0}, "at least 1", ""),
    ("model.vocab_size", {"model__vocab_size": 0}, "at least 1", ""),
    ("model.q_lora_rank", {"model__q_lora_rank": -1}, "at least 1", ""),
    ("model.num_shared_experts", {"model__num_shared_experts": -1}, "at least 0", ""),
    ("model.mtp.depth", {"model__mtp__depth": -1}, "at least 0", ""),
    ("model.norm_eps", {"model__norm_eps": 0.0}, "above 0", ""),
    ("model.num_dense_layers", {"model__num_dense_layers": 5}, "model.num_layers=4", ""),
    ("model.qk_rope_head_dim", {"model__qk_rope_head_dim": 31}, "even", "32"),
    ("model.hidden_size", {"model__hidden_size": 20}, "multiple of 8", "16 or 24"),
    ("model.moe_intermediate_size", {"model__moe_intermediate_size": 6}, "multiple of 8", "Set it to 8"),
    ("model.qk_nope_head_dim", {"model__qk_nope_head_dim": 31}, "multiple of 2", "30 or 32"),
    ("model.kv_lora_rank", {"model__kv_lora_rank": 63}, "multiple of 2", "62 or 64"),
    ("model.rope.yarn_factor", {"model__rope__yarn_factor": 0.5}, "at least 1", ""),
    ("model.rope.beta_fast", {"model__rope__beta_fast": 1.0}, "beta_slow", ""),
    ("model.router.score", {"model__router__score": "relu"}, "no such choice", "sigmoid, softmax"),
    ("model.router.group_score", {"model__router__group_score": "mean"}, "no such choice", "top2_sum, max"),
    ("model.router.num_groups", {"model__router__num_groups": 3}, "must divide", ""),
    ("model.router.groups_per_token", {"model__router__groups_per_token": 2}, "num_groups=1", ""),
    (
        "model.router.num_groups",
        {"model__router__num_groups": 16, "model__router__groups_per_token": 8},
        "two experts in a group",
        "max",
    ),
    ("model.experts_per_token", {"model__experts_per_token": 17}, "among 16 experts", "at most 16"),
    ("model.experts_per_token", {"model__router__num_groups": 8}, "among 2 experts", "groups_per_token"),
    ("model.router.scaling_factor", {"model__router__scaling_factor": 0.0}, "above 0", ""),
    ("train.steps", {"train__steps": -1}, "at least 0", ""),
    ("metrics.trace_steps", {"metrics__trace_steps": (3, 0)}, "the run has the steps 1 to 1000", "counted from 1"),
    ("metrics.trace_steps", {"metrics__trace_steps": (1001,)}, "the run has the steps 1 to 1000", ""),
    ("train.micro_batch", {"train__micro_batch": 0}, "at least 1", ""),
    ("train.sequences", {"train__sequences": None}, "exactly one", "null"),
    ("train.sequences", {"train__batch_tokens": 4096}, "exactly one", "null"),
    ("train.sequences", {"train__sequences": -4}, "at least 1", ""),
    ("train.sequences", {"train__micro_batch": 3}, "multiple of 3", "15 or 18"),
    ("train.sequences", {"mesh__ep": 8, "train__micro_batch": 4}, "dp*ep=8 ranks", "32"),
    (
        "train.batch_tokens",
        {"train__sequences": None, "train__batch_tokens": 4000},
        "train.seq_len=256",
        "3840 or 4096",
    ),
    (
        "train.batch_tokens",
        {"train__sequences": None, "train__batch_tokens": 768, "train__micro_batch": 2},
        "multiple of 512",
        "512 or 1024",
    ),
    (
        "train.ramp.start_sequences",
        {"train__ramp__tokens": 9, "train__ramp__start_sequences": 3, "train__micro_batch": 2},
        "multiple of 2",
        "2 or 4",
    ),
    (
        "train.ramp.increment_sequences",
        {"train__ramp__tokens": 9, "train__ramp__start_sequences": 4},
        "multiple of 1",
        "",
    ),
    (
        "train.ramp.increment_sequences",
        {"train__ramp__tokens": 9, "train__ramp__start_sequences": 4, "train__ramp__increment_sequences": 5},
        "from 4 to 16",
        "divides",
    ),
    ("train.resume", {"train__resume": "yes"}, "no such choice", "never, auto, must"),
    ("train.recompute", {"train__recompute": ("norm", "mlp")}, "no such part", "mla_up"),
    ("train.changes", {"train__changes": (RecipeChange(5), RecipeChange(5))}, "grow", "order"),
    ("optim.lr", {"optim__lr": 0.0}, "above 0", ""),
    ("optim.weight_decay", {"optim__weight_decay": -0.1}, "at least 0", ""),
    ("optim.beta2", {"optim__beta2": 1.0}, "below 1", ""),
    ("optim.phases[0].shape", {"optim__phases": (LrPhase("step"),)}, "no such shape", "cosine"),
    ("optim.phases[0].lr_end", {"optim__phases": (LrPhase(lr_end=-1.0),)}, "negative", ""),
    ("optim.phases[0].tokens", {"optim__phases": (LrPhase(), LrPhase())}, "only the last phase", ""),
    ("precision.compute_dtype", {"precision__compute_dtype": "fp8"}, "no such choice", "float32, bfloat16"),
    ("precision.moments_dtype", {"precision__moments_dtype": "fp8"}, "no such choice", ""),
    (
        "precision.moments_dtype",
        {"precision__moments_dtype": "int8", "engine__name": "deepspeed"},
        "float32 or bfloat16",
        "engine=torch",
    ),
    ("precision.grad_wire_dtype", {"precision__grad_wire_dtype": "fp8"}, "no such choice", ""),
    ("precision.gather", {"precision__gather": "fp4"}, "no such choice", "auto, compute, fp8"),
    ("precision.gather", {"precision__gather": "fp8"}, "products in fp8", "precision.products=fp8"),
    ("precision.gather", {**FP8, "precision__scales": "plain"}, "once more", "precision.scales=power_of_two"),
    ("precision.gather", {**FP8, "engine__name": "deepspeed"}, "in the compute dtype", "precision.gather=auto"),
    ("engine.name", {"engine__name": "fsdp"}, "no such choice", "torch, deepspeed"),
    ("engine.zero_stage", {"engine__zero_stage": 2}, "offers 1", "the other engine"),
    ("engine.zero_stage", {"engine__zero_stage": 3, "engine__name": "deepspeed"}, "offers 1 and 2", ""),
    ("engine.offload_optimizer", {"engine__offload_optimizer": True}, "only the deepspeed engine", "engine=deepspeed"),
    ("metrics.wandb", {"metrics__wandb": "on"}, "no such choice", "offline"),
    ("metrics.console_every_steps", {"metrics__console_every_steps": 0}, "at least 1", ""),
    ("checkpoint.keep_last", {"checkpoint__keep_last": 0}, "at least 1", ""),
    ("checkpoint.every_steps", {"checkpoint__every_steps": -1}, "at least 0", ""),
    ("hardware.memory_gib", {"hardware__memory_gib": -1.0}, "at least 0", ""),
    ("data.path", {"data__blend": (Corpus("a"),)}, "not both", "data.blend"),
    ("data.blend[0].path", {"data__path": None, "data__blend": (Corpus(),)}, "has a path", ""),
    ("data.blend[1].weight", {"data__path": None, "data__blend": (Corpus("a"), Corpus("b", 0.0))}, "above 0", ""),
    ("data.fim_rate", {"data__fim_rate": 1.5}, "share", "between 0 and 1"),
]


def assert_refused(config: Config, field: str, rule: str, cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.field == field
    assert rule in caught.value.rule
    assert cure in caught.value.cure
    assert caught.value.cure.endswith(".")


@pytest.mark.parametrize(("field", "values", "rule", "cure"), BROKEN)
def test_rule(field: str, values: dict, rule: str, cure: str):
    assert_refused(changed(GOOD, **values), field, rule, cure)


KEPT = [
    {},
    {"mesh__ep": 16},
    {"mesh__ep": 2, "dispatch__kind": "alltoall"},
    {"dispatch__kind": "alltoall"},
    {"engine__name": "deepspeed", "engine__zero_stage": 2, "engine__offload_optimizer": True},
    {"model__tie_embeddings": True, "model__num_dense_layers": 4},
    {"model__router__num_groups": 8, "model__router__groups_per_token": 2},
    {"train__sequences": None, "train__batch_tokens": 4096},
    {"train__ramp__tokens": 9, "train__ramp__start_sequences": 4, "train__ramp__increment_sequences": 6},
    {"optim__phases": (LrPhase("constant", 10), LrPhase("cosine"))},
    {"data__path": None, "data__blend": (Corpus("a", 2.0), Corpus("b"))},
    {**FP8, "precision__moments_dtype": "int8"},
    {**FP8, "precision__gather": "auto", "precision__scales": "plain", "engine__name": "deepspeed"},
]


@pytest.mark.parametrize("values", KEPT)
def test_legal_configs_pass(values: dict):
    check(changed(GOOD, **values))


def test_world_size():
    check(changed(GOOD, mesh__ep=2), world_size=8)
    with pytest.raises(ConfigError, match=r"does not divide the number of processes, 6\. Start 4, 8, 12"):
        check(changed(GOOD, mesh__ep=4), world_size=6)
    with pytest.raises(ConfigError, match=r"pp\*ep\*dp=8 is not the number of processes, 4\. Start 8"):
        check(changed(GOOD, mesh__ep=4, mesh__dp=2), world_size=4)
    with pytest.raises(ConfigError, match="dp\\*ep=32 ranks"):
        check(GOOD, world_size=32)


def test_resolve_fills_in_the_replicas():
    assert resolve(changed(GOOD, mesh__ep=2), 8).mesh.dp == 4
    assert resolve(changed(GOOD, mesh__ep=2)).mesh.dp == 1
    assert resolve(changed(GOOD, mesh__ep=2, mesh__dp=3)).mesh.dp == 3


def test_training_needs_more():
    check_training(GOOD, 1)
    check_training(changed(GOOD, mesh__pp=2), 2)
    with pytest.raises(ConfigError, match=r"data\.path=None: training needs text"):
        check_training(changed(GOOD, data__path=None), 1)
    with pytest.raises(ConfigError, match=r"train\.resume=auto.*Give run\.dir"):
        check_training(changed(GOOD, train__resume="auto"), 1)


DIFFERENT = {
    "model.hidden_size": {"model__hidden_size": 512},
    "model.router.score": {"model__router__score": "softmax"},
    "train.seed": {"train__seed": 1},
    "train.seq_len": {"train__seq_len": 128},
    "data.path": {"data__path": "other.txt"},
    "data.blend": {"data__blend": (Corpus("a"),)},
    "data.tokenizer": {"data__tokenizer": "bpe.json"},
    "data.fim_rate": {"data__fim_rate": 0.1},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_run_is_refused(name: str):
    with pytest.raises(ConfigError, match="run.dir=.*the run there has " + name.replace(".", r"\.")):
        check_same_run(GOOD, changed(GOOD, **DIFFERENT[name]))


def test_differences_name_both_values():
    with pytest.raises(ConfigError, match="train.seed=0, not 7; data.path=corpus.txt, not x"):
        check_same_run(GOOD, changed(GOOD, train__seed=7, data__path="x"))


SAME = [
    {"mesh__ep": 4, "mesh__dp": 2},
    {"train__steps": 5, "train__micro_batch": 2},
    {"checkpoint__every_steps": 1, "metrics__wandb": "offline"},
    {"engine__name": "deepspeed", "dispatch__kind": "alltoall", "hardware__name": "a100"},
]


def test_a_vocabulary_still_to_be_derived_is_no_difference():
    check_same_run(changed(GOOD, model__vocab_size=320), GOOD)
    with pytest.raises(ConfigError, match="model.vocab_size=320, not 512"):
        check_same_run(changed(GOOD, model__vocab_size=320), changed(GOOD, model__vocab_size=512))


@pytest.mark.parametrize("values", SAME)
def test_the_same_run_may_change_its_surroundings(values: dict):
    check_same_run(changed(GOOD, model__vocab_size=320), changed(GOOD, model__vocab_size=320, **values))


def test_an_imported_model_takes_any_data():
    imported = changed(GOOD, data__path=None)
    check_same_run(imported, changed(GOOD, train__seed=3, data__tokenizer="bpe.json"))
    with pytest.raises(ConfigError, match=r"model\.num_layers"):
        check_same_run(imported, changed(GOOD, model__num_layers=5))


RUN = RunConfig("runs/a")
COMMANDS = [
    (check_verify, VerifyRoot(train=TrainConfig(sequences=16)), {"verify__steps": 0}, "verify.steps"),
    (check_verify, VerifyRoot(train=TrainConfig(sequences=16)), {"verify__tolerance": 0.0}, "verify.tolerance"),
    (check_verify, VerifyRoot(train=TrainConfig(sequences=16)), {"mesh__ep": 5}, "mesh.ep"),
    (check_generate, GenerateRoot(run=RUN), {"run__dir": ""}, "run.dir"),
    (check_generate, GenerateRoot(run=RUN), {"max_tokens": 0}, "max_tokens"),
    (check_generate, GenerateRoot(run=RUN), {"temperature": -1.0}, "temperature"),
    (check_generate, GenerateRoot(run=RUN), {"top_p": 0.0}, "top_p"),
    (check_generate, GenerateRoot(run=RUN), {"seed": 2**63}, "seed"),
    (check_export, ExportRoot(run=RUN, out="hf"), {"run__dir": ""}, "run.dir"),
    (check_export, ExportRoot(run=RUN, out="hf"), {"out": ""}, "out"),
    (check_export, ExportRoot(run=RUN, out="hf"), {"precision__products": "mxfp8"}, "precision.products"),
    (check_export, ExportRoot(run=RUN, out="hf"), {"shard_gib": 0.0}, "shard_gib"),
    (check_import, ImportRoot(path="hf", run=RUN), {"path": ""}, "path"),
    (check_import, ImportRoot(path="hf", run=RUN), {"run__dir": ""}, "run.dir"),
    (check_tokenize, TokenizeRoot(data=DataConfig(path="a"), out="b"), {"data__path": None}, "data.path"),
    (check_tokenize, TokenizeRoot(data=DataConfig(path="a"), out="b"), {"out": ""}, "out"),
    (check_tokenize, TokenizeRoot(data=DataConfig(path="a"), out="b"), {"workers": 0}, "workers"),
]


@pytest.mark.parametrize(("rules", "good", "values", "field"), COMMANDS)
def test_commands(rules: Any, good: Any, values: dict, field: str):
    rules(good)
    with pytest.raises(ConfigError) as caught:
        rules(changed(good, **values))
    assert caught.value.field == field
