"""Routes depend on the seed alone, and obey limits and skew."""

import torch

from dstrain.bench.workload import Workload

WORK = Workload(4, 2, 64, 32, 4, 200, 2, 3)


def experts(work: Workload, rank: int = 0) -> torch.Tensor:
    return torch.stack([route.experts_TK for block in work.routes(rank) for route in block])


def test_a_rank_gets_the_same_routes_again_and_others_get_others():
    again = experts(Workload(4, 2, 64, 32, 4, 200, 2, 3))
    assert torch.equal(experts(WORK), again)
    assert not torch.equal(experts(WORK), experts(WORK, rank=1))
    assert not torch.equal(again[0], again[1])


def test_experts_of_a_token_are_distinct_and_weights_sum_to_one():
    route = WORK.routes(3)[1][2]
    assert (route.experts_TK.sort(1).values.diff(dim=1) > 0).all()
    torch.testing.assert_close(route.weights_TK.sum(1), torch.ones(200))


def test_free_routes_are_even():
    load = torch.bincount(experts(WORK).flatten(), minlength=32)
    assert load.min() > 0.7 * load.float().mean()


def test_limited_routes_visit_few_nodes():
    work = Workload(4, 2, 64, 32, 4, 200, 1, 1, route_nodes=2)
    nodes = experts(work)[0] // 8
    visited = torch.zeros(200, 4).scatter_(1, nodes, 1.0).sum(1)
    assert visited.max() == 2
    assert experts(work).unique().numel() == 32


def test_skewed_routes_have_favourites():
    load = torch.bincount(experts(Workload(4, 2, 64, 32, 4, 200, 1, 1, route_skew=1.5)).flatten(), minlength=32)
    assert load.max() > 4 * load.float().mean()
