"""The router: which experts a token visits, with what weight, and what keeps the experts evenly loaded.

DeepSeek-V3 (arXiv:2412.19437) section 2.1.2; all of it in FP32.

    s = sigmoid(W x) (or softmax)         affinity of a token to each expert
    choice: top K of s + bias             the bias steers the choice only; it has no gradient and moves once a step,
                                          against the load of the global batch (dispatch/balance.py)
    weight = s_chosen / sum(s_chosen) * scaling_factor

With groups, only the experts of the best `groups_per_token` groups can be chosen, so that a token visits few nodes.

Shapes: B sequences, T tokens of a sequence, N = B * T, D hidden, E experts, G groups, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dstrain.config.schema import ModelConfig, RouterConfig
from dstrain.dispatch.contract import Route
from dstrain.precision.linear import wide_linear


@dataclass(frozen=True)
class RouterReport:
    """What routing a micro-batch showed; sums, so that micro-batches and ranks add up."""

    # Tokens sent to each expert, int64 [E].
    load_E: Tensor
    # Sum over tokens of the entropy of the normalised affinities, in nats.
    entropy: Tensor
    # Sum over sequences of the balance loss and of the mean squared log-sum-exp, unweighted, with gradient.
    balance_loss: Tensor
    z_loss: Tensor


def _group_scores(choice_NGE: Tensor, router: RouterConfig) -> Tensor:
    """The rank of each group, [N, G]."""
    if router.group_score == "max":
        return choice_NGE.amax(-1)
    return choice_NGE.topk(min(2, choice_NGE.shape[-1]), dim=-1).values.sum(-1)


def choose_experts(choice_NE: Tensor, router: RouterConfig, experts_per_token: int) -> Tensor:
    """The best `experts_per_token` experts among the best groups, int64 [N, K]."""
    if router.groups_per_token < router.num_groups:
        choice_NGE = choice_NE.unflatten(-1, (router.num_groups, -1))
        best_NM = _group_scores(choice_NGE, router).topk(router.groups_per_token, dim=-1).indices
        shut_NG = torch.ones_like(choice_NGE[..., 0], dtype=torch.bool).scatter(1, best_NM, False)
        choice_NE = choice_NGE.masked_fill(shut_NG[..., None], -torch.inf).flatten(-2)
    return choice_NE.topk(experts_per_token, dim=-1).indices


def balance_loss(affinity_BTE: Tensor, load_BE: Tensor, experts_per_token: int) -> Tensor:
    """V3 eq. 17-20 for each sequence, summed over sequences: sum_e f_e P_e.

    f is the load relative to an even one, P the mean normalised affinity; 1 for perfect balance. The load is that
    of the experts really chosen (by bias and groups), where eq. 18 writes the K best affinities.
    """
    tokens, experts = affinity_BTE.shape[1:]
    f_BE = load_BE * (experts / (experts_per_token * tokens))
    return (f_BE * affinity_BTE.mean(1)).sum()


class Router(nn.Module):
    """[B, T, D] -> (Route of the N tokens, RouterReport)."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.config = model.router
        self.experts_per_token = model.experts_per_token
        self.weight = nn.Parameter(torch.empty(model.num_experts, model.hidden_size))
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(model.num_experts, dtype=torch.float32))

    def forward(self, x_BTD: Tensor) -> tuple[Route, RouterReport]:
        logits_BTE = wide_linear(x_BTD, self.weight)
        scores_BTE = logits_BTE.sigmoid() if self.config.score == "sigmoid" else logits_BTE.softmax(-1)
        with torch.no_grad():
            choice_NE = (scores_BTE + self.bias).flatten(0, 1)
            experts_NK = choose_experts(choice_NE, self.config, self.experts_per_token)
        weights_NK = scores_BTE.flatten(0, 1).gather(1, experts_NK)
        if self.config.normalize_weights:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        route = Route(experts_NK, weights_NK * self.config.scaling_factor)
        return route, self._report(logits_BTE, scores_BTE, experts_NK)

    def _report(self, logits_BTE: Tensor, scores_BTE: Tensor, experts_NK: Tensor) -> RouterReport:
        sequences, _, experts = scores_BTE.shape
        chosen_BS = experts_NK.unflatten(0, (sequences, -1)).flatten(1)
        load_BE = torch.zeros(sequences, experts, dtype=torch.int64, device=chosen_BS.device)
        load_BE.scatter_add_(1, chosen_BS, torch.ones_like(chosen_BS))
        affinity_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
        spread = affinity_BTE.detach()
        nothing = logits_BTE.new_zeros(())
        return RouterReport(
            load_E=load_BE.sum(0),
            entropy=-torch.special.xlogy(spread, spread).sum(),
            balance_loss=balance_loss(affinity_BTE, load_BE, self.experts_per_token)
            if self.config.balance_loss_weight
            else nothing,
            z_loss=logits_BTE.logsumexp(-1).square().mean(1).sum() if self.config.z_loss_weight else nothing,
        )
