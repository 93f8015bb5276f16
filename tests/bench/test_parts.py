"""The parts of a model, built and run alone."""

from dataclasses import replace

import pytest
import torch

from dstrain.bench.parts import build, measure, run
from dstrain.config import load
from dstrain.config.schema import Config
from dstrain.model.moe import Experts
from dstrain.plan.split import Stage

CPU = torch.device("cpu")


def config(*overrides: str) -> Config:
    sizes = ["train.seq_len=16", "train.micro_batch=2", "model.vocab_size=64", "precision=fp32"]
    return load.compose("verify", [*sizes, *overrides])


def names(stage: Stage, depth: int = 0) -> set[str]:
    """Of the parts that hold parameters, without numbers."""
    part = build(config(), stage, depth, CPU)
    return {name.split(".")[0] for name, _ in part.named_parameters()}


def test_a_part_holds_nothing_else():
    layers = config().model.num_layers
    assert names(Stage(range(0), True, False)) == {"embed"}
    assert names(Stage(range(1), False, False)) == {"layers"}
    assert names(Stage(range(layers, layers), False, True)) == {"norm", "head"}
    # Module and embedding, whose other user is the first stage.
    assert names(Stage(range(layers, layers), False, True), 1) == {"embed", "norm", "head", "mtp"}


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_experts_of_a_rank_get_the_rows_of_a_rank(ep: int):
    asked = config(f"mesh.ep={ep}")
    layers, seen = asked.model.num_layers, []
    part = build(asked, Stage(range(layers - 1, layers), False, False), 0, CPU)
    (experts,) = [module for module in part.modules() if isinstance(module, Experts)]
    experts.register_forward_hook(lambda module, inputs, output: seen.append((len(inputs[0]), len(inputs[1]))))
    run(part, asked)
    tokens = asked.train.seq_len * asked.train.micro_batch
    assert seen == [(tokens * asked.model.experts_per_token, asked.model.num_experts // ep)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_reach_every_parameter(dtype: str, monkeypatch: pytest.MonkeyPatch):
    asked = config(f"precision.compute_dtype={dtype}")
    layers = asked.model.num_layers
    for stage, depth in ((Stage(range(layers), True, True), 1), (Stage(range(1), False, False), 0)):
        part = build(asked, stage, depth, CPU)
        monkeypatch.setattr(part, "zero_grad", lambda: None)
        run(part, asked)
        # The balancing bias is a buffer; experts that no token chose get zeros.
        assert [name for name, parameter in part.named_parameters() if parameter.grad is None] == []


def test_measured_parts():
    measured = measure(config("model.mtp.depth=1"), CPU, 3)
    assert min(measured.embedding, measured.dense, measured.moe, measured.mtp, measured.head) > 0
    without = measure(config("model.mtp.depth=0", "model.num_dense_layers=0"), CPU, 1)
    assert (without.dense, without.mtp) == (0, 0)
    all_dense = config()
    all_dense = replace(all_dense, model=replace(all_dense.model, num_dense_layers=all_dense.model.num_layers))
    assert measure(all_dense, CPU, 1).moe == 0
