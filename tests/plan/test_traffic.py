"""Bytes of a token's way: against sampling, against counting by hand, and against what real dispatchers send."""

import random
import time
from math import comb

import pytest
import torch

from dstrain.comm.trace import Transfer
from dstrain.dispatch.alltoall import AllToAllDispatcher
from dstrain.dispatch.contract import Route
from dstrain.dispatch.hierarchical import HierarchicalDispatcher
from dstrain.dispatch.rank import RankDispatcher
from dstrain.dispatch.transport import Transport
from dstrain.dispatch.wire import wire_format
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place, connect
from dstrain.mesh.topology import Link
from dstrain.plan.traffic import Message, Router, Rows, Way, exact, expected, link_bytes
from tests.gloo.spawn import spawn

V3 = Router(256, 8, 8, 4)
HIDDEN, EXPERTS, TOKENS = 200, 24, 12
KINDS = ("alltoall", "rank", "hierarchical")


# -- Expected ---------------------------------------------------------------------------------------------------------


def test_places_without_groups():
    """R (1 - C(E - E/R, k) / C(E, k))."""
    for ranks in (2, 8, 64, 256):
        share = 256 // ranks
        formula = ranks * (1 - comb(256 - share, 8) / comb(256, 8))
        assert Router(256, 8).places(ranks) == pytest.approx(formula)
    assert Router(16, 16).places(4) == 4
    assert Router(16, 1).places(16) == pytest.approx(1)


def test_places_of_published_models():
    """At most four nodes a token in V3 and three devices in V2, which groups that hold the best experts reach."""
    assert V3.places(8) == pytest.approx(4)
    assert Router(160, 6, 8, 3).places(8) == pytest.approx(3)
    # NVLink is 3.2 times as fast as InfiniBand: a token may visit 3.2 ranks in each node for nothing.
    assert V3.places(64) / V3.places(8) < 3.2


def routed(router: Router, generator: random.Random) -> list[int]:
    """The experts of a token with random scores, as the router of V3 chooses them: groups by their two best."""
    scores = [generator.random() for _ in range(router.num_experts)]
    size = router.num_experts // router.num_groups
    best = sorted(
        range(router.num_groups), key=lambda group: -sum(sorted(scores[group * size : (group + 1) * size])[-2:])
    )
    allowed = [group * size + i for group in best[: router.groups_per_token] for i in range(size)]
    return sorted(allowed, key=lambda expert: -scores[expert])[: router.experts_per_token]


@pytest.mark.parametrize("router", [V3, Router(160, 6, 8, 3), Router(32, 8, 4, 2), Router(64, 6)])
@pytest.mark.parametrize("places", [2, 4, 16])
def test_places_against_a_router_with_random_scores(router: Router, places: int):
    generator, tokens = random.Random(0), 1500
    share = router.num_experts // places
    visited = sum(len({expert // share for expert in routed(router, generator)}) for _ in range(tokens)) / tokens
    assert router.places(places) == pytest.approx(visited, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", [Router(64, 6), Router(64, 6, 4, 2)])
def test_expected_is_the_mean_of_exact(kind: str, router: Router):
    nodes, tokens, rows = [[0, 1], [2, 3], [4, 5], [6, 7]], 500, Rows.of("fp8", "bfloat16", 512)
    node_of_rank = [rank // 2 for rank in range(8)]
    generator = random.Random(1)
    routes = [[routed(router, generator) for _ in range(tokens)] for _ in range(8)]
    counted = link_bytes(exact(kind, nodes, 64, routes), node_of_rank, rows)
    planned = link_bytes(expected(kind, [2, 2, 2, 2], router, tokens), node_of_rank, rows)
    for key, num_bytes in planned.items():
        assert 8 * num_bytes == pytest.approx(counted[key], rel=0.03), key


# -- Exact ------------------------------------------------------------------------------------------------------------


def test_messages_by_hand():
    """Two nodes of two ranks with two experts each."""
    routes = [[[0, 1, 7], [4, 5, 6]], [], [[2, 6, 7]], []]
    by_kind = {kind: exact(kind, [[0, 1], [2, 3]], 8, routes) for kind in KINDS}
    counts = {
        kind: {(m.hop, m.source, m.target): (m.rows, m.pairs) for m in messages if m.pairs}
        for kind, messages in by_kind.items()
    }
    assert counts["alltoall"] == {
        (0, 0, 0): (2, 2), (0, 0, 2): (2, 2), (0, 0, 3): (2, 2), (0, 2, 1): (1, 1), (0, 2, 3): (2, 2)
    }  # fmt: skip
    assert counts["rank"] == {
        (0, 0, 0): (1, 2), (0, 0, 2): (1, 2), (0, 0, 3): (2, 2), (0, 2, 1): (1, 1), (0, 2, 3): (1, 2)
    }  # fmt: skip
    assert counts["hierarchical"] == {
        (0, 0, 0): (1, 2), (0, 0, 2): (2, 4), (0, 2, 0): (1, 1), (0, 2, 2): (1, 2),
        (1, 0, 0): (1, 2), (1, 0, 1): (1, 1), (1, 2, 2): (1, 2), (1, 2, 3): (3, 4),
    }  # fmt: skip
    # Every rank writes to every other, were it only that nothing comes.
    assert [len(by_kind[kind]) for kind in KINDS] == [16, 16, 16]


def test_bytes_of_a_message():
    message, rows = Message(0, 0, 1, rows=3, pairs=5, experts=12), Rows.of("fp8", "bfloat16", 512)
    assert rows == Rows(520, 1024)
    assert message.num_bytes(Way.DISPATCH, rows) == 16 + 48 + 3 * 520  # header; 8 + 20 + 6, rounded up; rows
    assert message.num_bytes(Way.COMBINE, rows) == 3 * 1024
    assert message.num_bytes(Way.COMBINE_GRADIENT, rows) == 3 * 520
    assert message.num_bytes(Way.DISPATCH_GRADIENT, rows) == 32 + 3 * 1024
    assert Message(0, 1, 1, 3, 5, 12).num_bytes(Way.COMBINE, rows) == 0
    assert [message.sender(way) for way in Way] == [0, 1, 0, 1]


# -- What dispatchers send --------------------------------------------------------------------------------------------


def random_routes(ranks: int) -> list[list[list[int]]]:
    """Uneven: rank r has r times some tokens; nobody asks for the last experts."""
    generator = random.Random(3)
    return [[generator.sample(range(EXPERTS - 5), 4) for _ in range(rank * TOKENS)] for rank in range(ranks)]


def make(kind: str, groups: Groups, wire: str) -> Transport:
    wire_ = wire_format(wire, torch.float32)
    if kind == "hierarchical":
        return HierarchicalDispatcher(EXPERTS, groups.ep_nodes, groups.ep_node, wire_)
    return {"alltoall": AllToAllDispatcher, "rank": RankDispatcher}[kind](EXPERTS, groups.ep, wire_)


def transfers(groups: Groups, since_s: float) -> list[Transfer]:
    """The four that began after a point in time, once all of their messages have left."""
    found: dict[float, Transfer] = {}
    while len(found) < 4 or any(transfer.end_s is None for transfer in found.values()):
        # One that is under way comes again.
        found |= {t.start_s: t for t in groups.trace.take().transfers if t.start_s > since_s}
        time.sleep(0.01)
    return [found[start_s] for start_s in sorted(found)]


def sent_in_run(rank: int, world: int, wire: str) -> dict[str, list[dict[Link, int]]]:
    """By kind of dispatcher, what this rank sent in each way, in the order of ways in time."""
    groups = connect(Mesh(1, 1, world), Place(rank, world, torch.device("cpu")), 30, ranks_per_node=2)
    experts = torch.tensor(random_routes(world)[rank], dtype=torch.int64).view(-1, 4)
    sent = {}
    for kind in KINDS:
        dispatcher, began_s = make(kind, groups, wire), time.perf_counter()
        x_TD = torch.randn(len(experts), HIDDEN, requires_grad=True)
        weights_TK = torch.rand(experts.shape, requires_grad=True)
        arrived = dispatcher.dispatch(x_TD, Route(experts, weights_TK)).wait()
        dispatcher.combine(arrived.rows_RD * 2, arrived.ticket).wait().sum().backward()
        sent[kind] = [transfer.sent_bytes for transfer in transfers(groups, began_s)]
        dispatcher.close()
    return sent


@pytest.mark.parametrize("wire", ["float32", "fp8"])
def test_real_dispatchers_send_exactly_that(wire: str):
    rows, nodes = Rows.of(wire, "float32", HIDDEN), [[0, 1], [2, 3]]
    node_of_rank = [0, 0, 1, 1]
    by_rank = spawn(sent_in_run, 4, wire)
    in_time = (Way.DISPATCH, Way.COMBINE, Way.COMBINE_GRADIENT, Way.DISPATCH_GRADIENT)
    for kind in KINDS:
        messages = exact(kind, nodes, EXPERTS, random_routes(4))
        for rank, sent in enumerate(by_rank):
            for way, by_link in zip(in_time, sent[kind], strict=True):
                own = [message for message in messages if message.sender(way) == rank]
                planned = link_bytes(own, node_of_rank, rows)
                for link in (Link.NODE, Link.NETWORK):
                    assert by_link.get(link, 0) == planned[way, link], (kind, rank, way, link)
