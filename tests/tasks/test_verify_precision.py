"""What decides whether FP8 is near enough to BF16, and the command that asks."""

from math import inf, nan, sqrt
from typing import Any

import pytest
import torch

from dstrain.config import load
from dstrain.tasks import verify
from dstrain.tasks.verify_precision import LOSS, distance


def figures(**changed: Any) -> dict[str, Any]:
    grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 12.0])}
    return {"losses": [5.0, 4.0], "norms": [13.0, 13.0], "grads": grads} | changed


def test_distances_are_relative_by_norm():
    found = distance(
        figures(losses=[5.0, 4.1], grads={"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([2.0, 12.0])}), figures()
    )
    assert found.loss == pytest.approx(0.025)
    assert found.tensors == pytest.approx({"a": 0.2, "b": 1 / 6})
    assert found.whole == pytest.approx(sqrt(5) / 13)
    assert found.worst == "a"


def test_equal_runs_are_near_enough():
    found = distance(figures(), figures())
    assert (found.loss, found.grad_norm, found.whole, set(found.tensors.values())) == (0, 0, 0, {0.0})
    assert found.breaches(None) == []


@pytest.mark.parametrize(
    ("changed", "breach"),
    [
        ({"losses": [5.0, 4.0 * (1 + 2 * LOSS)]}, "loss"),
        ({"losses": [5.0, nan]}, "loss"),
        ({"grads": {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([4.0, 12.0])}}, "gradient 0.31"),
        ({"grads": {"a": torch.tensor([-3.0, -4.0]), "b": torch.tensor([0.0, 12.0])}}, "gradient of a 2"),
        ({"grads": {"a": torch.tensor([3.0, 4.0])}}, "gradient of b"),
        ({"grads": {"a": torch.tensor([3.0, nan]), "b": torch.tensor([0.0, 12.0])}}, "gradient"),
    ],
)
def test_what_is_too_far(changed: dict[str, Any], breach: str):
    assert any(said.startswith(breach) for said in distance(figures(**changed), figures()).breaches(None))


def test_a_tolerance_of_its_own():
    near = distance(figures(grads={"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 12.0])}), figures())
    assert near.breaches(0.1) == []
    assert near.breaches(0.05) == ["gradient 0.077 > 0.05"]
    assert distance(figures(grads={}), figures(grads={"a": torch.ones(1)})).whole == inf


def test_verify_compares_fp8_with_bf16_and_fp32(capsys: pytest.CaptureFixture):
    verify.run(load.compose("verify", ["precision=fp8", "verify.steps=1", "train.sequences=4", "mesh.ep=2"]))
    said = " ".join(capsys.readouterr().out.split())
    assert all(part in said for part in ("FP8 from BF16", "FP8 from FP32", "BF16 from FP32", "agrees with BF16"))
    assert "wire fp8, products by reference: on a CPU" in said
