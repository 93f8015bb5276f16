"""The router against brute force and against the equations of DeepSeek-V3, section 2.1.2."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from dstrain.config.schema import ModelConfig, RouterConfig
from dstrain.model.router import Router, balance_loss, choose_experts

MODEL = ModelConfig(
    hidden_size=8,
    num_experts=12,
    experts_per_token=3,
    router=RouterConfig(scaling_factor=2.5, z_loss_weight=0.1),
)
SOFTMAX = replace(MODEL, router=replace(MODEL.router, score="softmax", normalize_weights=False))
LIMITS = [(4, 1, "top2_sum"), (4, 2, "top2_sum"), (3, 2, "max"), (6, 3, "top2_sum"), (6, 2, "max"), (4, 4, "max")]


def random_router(model: ModelConfig) -> Router:
    torch.manual_seed(7)
    router = Router(model)
    torch.nn.init.normal_(router.weight)
    router.bias.normal_(0.0, 0.3)
    return router


def brute_force(scores_E: Tensor, groups: int, allowed: int, group_score: str) -> set[int]:
    """Tries every choice of groups; the best one has the largest sum of group ranks."""
    size = len(scores_E) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    best = 1 if group_score == "max" else 2
    ranks = [sum(sorted(scores_E[group].tolist())[-best:]) for group in members]
    chosen = max(combinations(range(groups), allowed), key=lambda some: sum(ranks[g] for g in some))
    experts = sorted((e for g in chosen for e in members[g]), key=lambda e: scores_E[e].item())
    return set(experts[-3:])


@pytest.mark.parametrize(("groups", "allowed", "group_score"), LIMITS)
def test_limited_groups_give_what_brute_force_gives(groups: int, allowed: int, group_score: str) -> None:
    torch.manual_seed(1)
    # Biased scores may be negative.
    scores_NE = torch.randn(40, 12)
    config = RouterConfig(num_groups=groups, groups_per_token=allowed, group_score=group_score)
    chosen = choose_experts(scores_NE, config, 3)
    expected = [brute_force(scores_E, groups, allowed, group_score) for scores_E in scores_NE]
    assert [set(row) for row in chosen.tolist()] == expected
    unlimited = choose_experts(scores_NE, RouterConfig(), 3)
    assert ([set(row) for row in unlimited.tolist()] == expected) == (groups == allowed)


def test_the_bias_steers_the_choice_and_not_the_weight() -> None:
    router, x = random_router(MODEL), torch.randn(2, 20, 8)
    route, _ = router(x)
    scores = (x.flatten(0, 1) @ router.weight.T).sigmoid()
    assert torch.equal(route.experts_TK, (scores + router.bias).topk(3).indices)
    assert not torch.equal(route.experts_TK.sort().values, scores.topk(3).indices.sort().values)
    chosen = scores.gather(1, route.experts_TK)
    torch.testing.assert_close(route.weights_TK, 2.5 * chosen / chosen.sum(1, keepdim=True))


def test_softmax_weights_stay_as_they_are() -> None:
    router, x = random_router(SOFTMAX), torch.randn(1, 20, 8)
    route, _ = router(x)
    scores = (x[0] @ router.weight.T).softmax(-1)
    torch.testing.assert_close(route.weights_TK, 2.5 * scores.gather(1, route.experts_TK))


def test_gradients_reach_the_weight_and_never_the_bias() -> None:
    router = random_router(MODEL)
    x = torch.randn(2, 20, 8, requires_grad=True)
    assert "bias" not in dict(router.named_parameters())
    router.bias.requires_grad_(True)
    route, report = router(x)
    (route.weights_TK.square().sum() + report.balance_loss + report.z_loss).backward()
    assert router.bias.grad is None
    assert router.weight.grad.abs().amin() > 0
    assert x.grad.abs().sum() > 0


def test_everything_is_fp32_whatever_comes_in() -> None:
    router = random_router(MODEL)
    rounded = random_router(MODEL)
    rounded.weight.data = rounded.weight.data.bfloat16()
    router.weight.data = rounded.weight.data.float()
    x = torch.randn(1, 20, 8).bfloat16()
    route, _ = rounded(x)
    expected, _ = router(x.float())
    assert route.weights_TK.dtype == torch.float32
    assert torch.equal(route.weights_TK, expected.weights_TK)


def written_out_balance_loss(affinity_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Equations 17 to 20 for one sequence."""
    tokens, experts = affinity_TE.shape
    normalised = affinity_TE / affinity_TE.sum(-1, keepdim=True)
    total = affinity_TE.new_zeros(())
    for e in range(experts):
        f = experts / (experts_TK.shape[1] * tokens) * (experts_TK == e).sum()
        total = total + f * normalised[:, e].mean()
    return total


@pytest.mark.parametrize("model", [MODEL, SOFTMAX], ids=["sigmoid", "softmax"])
def test_auxiliary_losses_and_their_gradients(model: ModelConfig) -> None:
    router, x = random_router(model), torch.randn(2, 20, 8)
    route, report = router(x)
    logits = x @ router.weight.T
    scores = logits.sigmoid() if model is MODEL else logits.softmax(-1)
    experts = route.experts_TK.unflatten(0, (2, 20))
    balance = sum(written_out_balance_loss(scores[b], experts[b]) for b in range(2))
    z = sum(logits[b].exp().sum(-1).log().square().mean() for b in range(2))
    torch.testing.assert_close(report.balance_loss, balance)
    torch.testing.assert_close(report.z_loss, z)
    for found, expected in ((report.balance_loss, balance), (report.z_loss, z)):
        [ours] = torch.autograd.grad(found, router.weight, retain_graph=True)
        [theirs] = torch.autograd.grad(expected, router.weight, retain_graph=True)
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().max() > 1e-3


def test_perfect_balance_costs_one_per_sequence() -> None:
    even = torch.full((3, 8, 4), 0.25)
    assert balance_loss(even, torch.full((3, 4), 4), experts_per_token=2) == 3
    skewed = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(1, 8, 4)
    assert balance_loss(skewed, torch.tensor([[8, 8, 0, 0]]), experts_per_token=2) == pytest.approx(1.6)


def test_the_report_counts_every_pair() -> None:
    router, x = random_router(MODEL), torch.randn(2, 20, 8)
    route, report = router(x)
    assert torch.equal(report.load_E, route.experts_TK.flatten().bincount(minlength=12))
    scores = (x @ router.weight.T).sigmoid()
    p = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(report.entropy, -(p * p.log()).sum())
    assert not report.entropy.requires_grad
