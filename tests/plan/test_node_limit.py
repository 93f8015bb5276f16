import pytest

from dstrain.config import load
from dstrain.plan.node_limit import describe, group_nodes
from dstrain.plan.traffic import Router


@pytest.mark.parametrize(
    ("groups", "node_sizes", "expected"),
    [
        (4, [2, 2, 2, 2], [1, 1, 1, 1]),
        (8, [4, 4], [1] * 8),
        (2, [2, 2, 2, 2], [2, 2]),
        # Experts 0 to 7, 8 to 15, 16 to 23 on nodes of 12 experts.
        (3, [2, 2], [1, 2, 1]),
        (3, [1, 2, 1], [2, 1, 2]),
    ],
)
def test_group_nodes(groups: int, node_sizes: list[int], expected: list[int]):
    num_experts = 24 if groups == 3 else 16
    assert group_nodes(Router(num_experts, 4, groups, 1), node_sizes) == expected


def test_limit_that_follows_the_nodes():
    text = describe(Router(256, 8, 8, 4), [8] * 8)
    assert (
        text == "routing limit follows the nodes: a token visits at most 4 of 8 nodes, 4.00 on average instead of 5.29"
    )


def test_limit_across_nodes_says_what_would_help():
    text = describe(Router(24, 4, 4, 2), [1, 1, 1])
    assert "does not follow the nodes, a group lies on up to 2: a token visits at most 3 of 3 nodes" in text
    assert "model.router.num_groups as a multiple of 3" in text


@pytest.mark.parametrize("name", sorted(path.stem for path in (load.conf_dir() / "routing").glob("*.yaml")))
def test_limits_to_choose_from(name: str):
    overrides = [f"+routing={name}", "model.num_experts=32", "data.path=x"]
    router = load.compose("train", overrides).model.router
    assert f"{router.groups_per_token}_of_{router.num_groups}" == name


@pytest.mark.parametrize("router", [Router(16, 4), Router(16, 4, 4, 4)])
def test_nothing_to_say_without_a_limit(router: Router):
    assert describe(router, [2, 2]) == ""


def test_nothing_to_say_on_one_node():
    assert describe(Router(16, 4, 4, 2), [4]) == ""
