"""The loss of a step, and which token is predicted from which."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dstrain.model
from dstrain.config.schema import ModelConfig, MtpConfig, RouterConfig
from dstrain.dispatch.local import LocalDispatcher
from dstrain.model.init import init_weights
from dstrain.model.layer import walk_whole
from dstrain.model.rope import rotation
from dstrain.model.transformer import Transformer, router_names
from dstrain.plan.split import Stage

MODEL = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_layers=3,
    num_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=8,
    experts_per_token=2,
    init_std=0.2,
    router=RouterConfig(balance_loss_weight=0.01, z_loss_weight=0.001),
    mtp=MtpConfig(depth=2, loss_weight=0.3),
)
SEQ_LEN = 10


def initial(model: ModelConfig = MODEL, seed: int = 0) -> Transformer:
    transformer = Transformer(model, range(8), LocalDispatcher(8))
    init_weights(transformer, seed)
    return transformer


def batch(sequences: int, depth: int = 2) -> Tensor:
    torch.manual_seed(6)
    return torch.randint(0, 50, (sequences, SEQ_LEN + 1 + depth))


@torch.no_grad()
def test_the_main_loss_is_the_cross_entropy_of_the_next_token() -> None:
    model, tokens = initial(), batch(3)
    logits = model.logits(tokens[:, :SEQ_LEN])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1 : SEQ_LEN + 1].flatten())
    torch.testing.assert_close(model(tokens, total_sequences=3).parts_4[0], expected)


@torch.no_grad()
def test_logits_do_not_see_later_tokens() -> None:
    model, tokens = initial(), batch(1)
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % 50
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before - after)[:, 6:].abs().amax((0, 2)).min() > 1e-4


@torch.no_grad()
def test_a_module_of_depth_k_predicts_the_token_k_further_from_the_one_k_ahead() -> None:
    model, tokens = initial(), batch(3)
    cos_sin = rotation(torch.arange(SEQ_LEN), 8, MODEL.rope)
    hidden = model.hidden(tokens[:, :SEQ_LEN])
    losses = []
    for depth, module in enumerate(model.mtp, start=1):
        joined = module.join(model.embed(tokens[:, depth : depth + SEQ_LEN]), hidden)
        hidden = module.norm(module.layer(joined, *cos_sin)[0])
        logits = hidden @ model.head.weight.T
        for sequence in range(3):
            for t in range(SEQ_LEN):
                losses.append(-logits[sequence, t].log_softmax(-1)[tokens[sequence, t + depth + 1]])
    # Both depths count alike.
    torch.testing.assert_close(model(tokens, total_sequences=3).parts_4[1], torch.stack(losses).mean())


def test_mtp_learns_the_token_after_the_next() -> None:
    # Tokens count up.
    model = initial(replace(MODEL, init_std=0.1, mtp=MtpConfig(depth=1)))
    tokens = (torch.arange(SEQ_LEN + 2) + torch.arange(0, 50, 5)[:, None]) % 50
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens, total_sequences=len(tokens), mtp_weight=1.0)
        loss.total.backward()
        optimizer.step()
    assert loss.parts_4[:2].max() < 0.5
    hidden = model.hidden(tokens[:, :SEQ_LEN])
    cos_sin = rotation(torch.arange(SEQ_LEN), 8, MODEL.rope)
    joined = model.mtp[0].join(model.embed(tokens[:, 1 : SEQ_LEN + 1]), hidden)
    ahead, _ = model.mtp[0].layer(joined, *cos_sin)
    right = model.scores(model.mtp[0].norm(ahead)).argmax(-1) == (tokens[:, :SEQ_LEN] + 2) % 50
    assert right.float().mean() > 0.9


def test_micro_batches_add_up_to_the_global_batch() -> None:
    model, tokens = initial(), batch(4)
    whole = model(tokens, total_sequences=4)
    whole.total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    shares = [model(part, total_sequences=4) for part in tokens.split((1, 3))]
    for share in shares:
        share.total.backward()
    torch.testing.assert_close(sum(share.parts_4 for share in shares), whole.parts_4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    for n, report in enumerate(whole.reports):
        assert torch.equal(sum(share.reports[n].load_E for share in shares), report.load_E)


def test_the_total_weighs_the_parts() -> None:
    model, tokens = initial(), batch(2)
    for weight, used in ((None, 0.3), (0.1, 0.1), (0.0, 0.0)):
        loss = model(tokens, total_sequences=2, mtp_weight=weight)
        main, mtp, balance, z = loss.parts_4
        torch.testing.assert_close(loss.total, main + used * mtp + 0.01 * balance + 0.001 * z)
        assert balance > 0
        assert z > 0


def test_reports_come_in_the_order_of_the_routers() -> None:
    model, tokens = initial(), batch(2)
    names = [name for name, _ in model.routers()]
    assert names == [
        "layers.1.moe.router",
        "layers.2.moe.router",
        "mtp.0.layer.moe.router",
        "mtp.1.layer.moe.router",
    ]
    loads = []
    for _, router in model.routers():
        router.register_forward_hook(lambda module, inputs, out: loads.append(out[1].load_E))
    for report, load in zip(model(tokens, total_sequences=2).reports, loads, strict=True):
        assert torch.equal(report.load_E, load)


def test_a_tied_head_is_the_embedding() -> None:
    model = initial(replace(MODEL, tie_embeddings=True, mtp=MtpConfig()))
    assert "head.weight" not in model.state_dict()
    tokens = batch(2, depth=0)
    hidden = model.hidden(tokens)
    torch.testing.assert_close(model.logits(tokens), hidden @ model.embed.weight.T)


def test_an_mtp_layer_is_like_the_last_layer() -> None:
    names = initial(replace(MODEL, num_dense_layers=3)).state_dict().keys()
    assert "mtp.1.layer.mlp.gate_up.weight" in names
    assert not any(".moe." in name for name in names)


STAGES = (Stage(range(1), True, False), Stage(range(1, 2), False, False), Stage(range(2, 3), False, True))
ENDS = {
    "MTP": MODEL,
    "tied": replace(MODEL, tie_embeddings=True, mtp=MtpConfig()),
    "plain": replace(MODEL, mtp=MtpConfig()),
}


def stages_of(model: ModelConfig, *own: int) -> Transformer:
    """What a pipeline rank with these stages holds."""
    transformer = Transformer(model, range(8), LocalDispatcher(8), STAGES, own)
    init_weights(transformer, 0)
    return transformer


@pytest.mark.parametrize("name", ENDS)
def test_stages_make_up_the_model(name: str) -> None:
    whole = initial(ENDS[name]).state_dict()
    parts = [stages_of(ENDS[name], stage).state_dict() for stage in range(3)]
    assert {key for part in parts for key in part} == whole.keys()
    for part in parts:
        assert all(torch.equal(tensor, whole[key]) for key, tensor in part.items())
    twice = {key for key in whole if sum(key in part for part in parts) > 1}
    assert twice == (set() if name == "plain" else {"embed.weight"})
    assert stages_of(ENDS[name], 2, 0).state_dict().keys() == parts[0].keys() | parts[2].keys()


@pytest.mark.parametrize("name", ENDS)
def test_each_stage_gives_gradients_to_what_it_uses(name: str) -> None:
    model, tokens = stages_of(ENDS[name], 0, 1, 2), batch(2, ENDS[name].mtp.depth)
    used: dict[str, list[int]] = {key: [] for key, _ in model.named_parameters()}
    x_BTD: Tensor | None = None
    for stage in range(3):
        model.zero_grad()
        end = walk_whole(model.walk_stage(stage, tokens, x_BTD, 2))
        (sum(end.roots) + (0 if end.output is None else end.output.sum())).backward()
        for key, parameter in model.named_parameters():
            used[key] += [stage] if parameter.grad is not None else []
        x_BTD = None if end.output is None else end.output.detach().requires_grad_()
    assert {key: model.users(key) for key in used} == used
    assert stages_of(ENDS[name], 1).users("layers.1.attn.o.weight") == [1]


def test_blocks_and_routers_of_stages() -> None:
    model = stages_of(MODEL, 2)
    assert (model.blocks, model.num_blocks) == ((0, 1, 3), 4)
    assert router_names(MODEL) == [name for name, _ in initial().routers()]
    assert [name for name, _ in model.routers()] == router_names(MODEL)[1:]
    assert router_names(replace(MODEL, num_dense_layers=3)) == []


def test_a_layer_of_another_rank_cannot_be_run() -> None:
    with pytest.raises(RuntimeError, match="layer 0 is held by another pipeline rank"):
        walk_whole(stages_of(MODEL, 1).walk_stage(0, batch(1), torch.zeros(1, SEQ_LEN, 32), 1))


def test_a_tied_head_is_heard_as_a_use_of_the_embedding() -> None:
    """What waits for the weights of a module before it is called has to hear of its use as the head, too."""
    model, calls = stages_of(ENDS["tied"], 2), []
    model.embed.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    walk_whole(model.walk_stage(2, batch(2, 0), torch.zeros(2, SEQ_LEN, 32), 2))
    assert calls == [(2, SEQ_LEN, 32)]


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size must be a number"):
        initial(replace(MODEL, vocab_size=None))


def test_the_model_knows_nothing_of_processes() -> None:
    for path in Path(dstrain.model.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("torch.distributed") for name in imported), path
            assert not (isinstance(node, ast.Attribute) and node.attr == "distributed"), path
