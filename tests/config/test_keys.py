from dstrain.config.commands import GenerateRoot
from dstrain.config.keys import keys, nearest, sections
from dstrain.config.schema import Config, LrPhase


def test_every_leaf_with_type_and_comment():
    found = keys(Config)
    assert found["mesh.dp"].type == "int | None"
    assert found["mesh.dp"].comment == "Replicas of each expert-parallel group; None: world size / (pp * ep)."
    assert found["optim.phases"].type == "tuple[LrPhase, ...]"
    assert found["data.path"].is_text
    assert not found["train.steps"].is_text
    assert "model.rope" not in found
    assert list(keys(LrPhase)) == ["shape", "tokens", "lr_end"]


def test_rules_in_words():
    found = keys(Config)
    assert found["train.sequences"].rule == "must be a whole number or null"
    assert found["train.recompute"].rule == "must be a list: [text, ...]"
    assert found["optim.phases"].rule == "must be a list: [{key: value, ...}, ...]"


def test_inner_nodes_with_the_first_line_about_them():
    found = sections(Config)
    assert found["dispatch"] == "How tokens reach their experts."
    assert "model.router" in found
    assert all(found.values())


def test_nearest_name():
    names = list(keys(Config))
    assert nearest("model.n_exprts", names) == "model.num_experts"
    assert nearest("steps", names) == "train.steps"
    assert nearest("model.foo", names) is None
    assert nearest("promt", list(keys(GenerateRoot))) == "prompt"
