"""Feed-forward networks against their formulas."""

from dataclasses import replace

import torch
from torch import Tensor

from dstrain.config.schema import ModelConfig
from dstrain.model.moe import Experts, FeedForward, MoE
from dstrain.precision.swiglu import swiglu

MODEL = ModelConfig(hidden_size=16, moe_intermediate_size=8, num_experts=4, num_shared_experts=3)


def swiglu_network(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = x @ gate_up[: len(gate_up) // 2].T, x @ gate_up[len(gate_up) // 2 :].T
    return (gate * gate.sigmoid() * up) @ down.T


def test_the_gate_comes_first() -> None:
    out = swiglu(torch.tensor([1.0, -2.0, 10.0, 100.0]))
    torch.testing.assert_close(out, torch.tensor([7.3105858, -23.8405844]))


def test_feed_forward_is_the_formula() -> None:
    torch.manual_seed(0)
    network, x = FeedForward(16, 24), torch.randn(3, 5, 16)
    assert network.gate_up.weight.shape == (48, 16)
    torch.testing.assert_close(network(x), swiglu_network(x, network.gate_up.weight, network.down.weight))


def test_every_row_passes_its_own_expert() -> None:
    torch.manual_seed(0)
    experts = Experts(MODEL, range(4))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    rows, counts = torch.randn(9, 16), [2, 0, 6, 1]
    weights = torch.rand(9)
    out = experts(rows, torch.tensor(counts), weights)
    expert_of_row = [e for e, count in enumerate(counts) for _ in range(count)]
    for row, expert in enumerate(expert_of_row):
        expected = swiglu_network(rows[row], experts.gate_up[expert], experts.down[expert])
        torch.testing.assert_close(out[row], weights[row] * expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(experts(rows, torch.tensor(counts)) * weights[:, None], out, rtol=1e-4, atol=1e-4)


def test_an_expert_without_rows_has_zero_gradient_and_not_none() -> None:
    experts = Experts(MODEL, range(4))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    experts(torch.randn(5, 16), torch.tensor([5, 0, 0, 0])).square().sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad[0].any()
        assert not parameter.grad[1:].any()


def test_a_rank_holds_its_own_experts_and_all_shared_ones() -> None:
    moe = MoE(MODEL, range(1, 3))
    assert moe.experts.gate_up.shape == (2, 16, 16)
    assert moe.router.weight.shape == (4, 16)
    assert moe.shared is not None
    assert moe.shared.down.weight.shape == (16, 24)
    assert MoE(replace(MODEL, num_shared_experts=0), range(4)).shared is None
