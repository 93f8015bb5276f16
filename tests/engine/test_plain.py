"""The reference engine against torch used by hand."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from dstrain.engine.plain import PlainEngine
from dstrain.parallel.apply import build_model
from tests.tiny import TINY, alone, samples, tiny_config, whole, worst


def by_hand(clip: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Norms of three steps and the weights after them."""
    model = build_model(TINY, alone())
    decaying = {n: p for n, p in model.named_parameters() if p.dim() > 1 and n != "embed.weight"}
    spared = [p for n, p in model.named_parameters() if n not in decaying]
    adamw = torch.optim.AdamW(
        [{"params": list(decaying.values()), "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    norms = []
    for step in range(3):
        adamw.zero_grad()
        model(samples(TINY, 8 * step, 8), 8).total.backward()
        norms.append(clip_grad_norm_(model.parameters(), clip or torch.inf).item())
        adamw.step()
    return norms, {f"master/{name}": p.detach().flatten() for name, p in model.named_parameters()}


@pytest.mark.parametrize("clip", [0.0, 0.2, 1000.0])
def test_equals_torch_by_hand(clip: float):
    config = tiny_config(optim={"clip_norm": clip})
    model = build_model(config, alone())
    engine, norms = PlainEngine(model, config.optim), []
    for step in range(3):
        # Two halves of a batch.
        for half in range(2):
            loss = model(samples(config, 8 * step + 4 * half, 4), 8).total
            loss.backward()
        norms.append(engine.reduce())
        engine.step(0.01)
    expected_norms, expected = by_hand(clip)
    assert min(norms) > 0.3
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert worst(whole(engine.state()), expected) < 1e-3


def test_a_parameter_without_gradient_is_an_error():
    model = build_model(TINY, alone())
    engine = PlainEngine(model, TINY.optim)
    with pytest.raises(RuntimeError, match=r"embed\.weight has no gradient"):
        engine.reduce()
