from collections import Counter
from dataclasses import replace

import pytest
import torch

from dstrain.inference import generate as module
from dstrain.inference.generate import choose, generate, nucleus
from dstrain.model.transformer import Transformer
from tests.inference.models import BASE, VARIANTS, build

PROMPT = [5, 17, 3, 44, 9]
GREEDY = {"max_tokens": 40, "temperature": 0.0, "top_p": 1.0, "seed": 0}
SAMPLED = {"max_tokens": 30, "temperature": 1.0, "top_p": 0.9, "seed": 3}


@torch.no_grad()
def greedy_by_recomputing(model: Transformer, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", [[7], PROMPT])
def test_greedy_text_is_that_of_full_recomputation(variant: str, prompt: list[int]) -> None:
    model = build(VARIANTS[variant])
    made = list(generate(model, prompt, **GREEDY))
    assert made == greedy_by_recomputing(model, prompt, GREEDY["max_tokens"])
    assert len(set(made)) > 3, "a text that repeats itself would prove little"


def test_the_seed_alone_decides() -> None:
    model = build(BASE)
    torch.manual_seed(0)
    first = list(generate(model, PROMPT, **SAMPLED))
    torch.manual_seed(1)
    again = []
    for token in generate(model, PROMPT, **SAMPLED):
        torch.rand(7)
        again.append(token)
    assert again == first
    assert list(generate(model, PROMPT, **SAMPLED | {"seed": 4})) != first


def test_the_global_random_state_is_left_alone() -> None:
    model = build(BASE)
    before = torch.get_rng_state()
    list(generate(model, PROMPT, **SAMPLED))
    assert torch.equal(torch.get_rng_state(), before)


def test_it_ends_before_the_end_of_document() -> None:
    model = build(BASE)
    endless = list(generate(model, PROMPT, **GREEDY))
    eod = endless[12]
    assert list(generate(model, PROMPT, **GREEDY, eod=eod)) == endless[: endless.index(eod)]


def test_tokens_come_while_the_rest_is_still_to_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr(module, "advance", lambda *args, real=module.advance: passes.append(1) or real(*args))
    stream = generate(build(BASE), PROMPT, **GREEDY)
    for count in (1, 2, 3):
        next(stream)
        assert len(passes) == count


def test_padding_of_the_vocabulary_is_never_chosen() -> None:
    model = build(BASE)
    options = SAMPLED | {"temperature": 50.0, "top_p": 1.0}
    assert max(generate(model, PROMPT, **options)) >= 32
    assert max(generate(model, PROMPT, **options, vocab_size=32)) < 32


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        list(generate(build(BASE), [], **GREEDY))


def test_it_goes_on_beyond_the_trained_length() -> None:
    model = build(VARIANTS["YaRN"])
    prompt = [token % 96 for token in range(model.config.rope.original_seq_len * 5)]
    assert list(generate(model, prompt, **GREEDY)) == greedy_by_recomputing(model, prompt, GREEDY["max_tokens"])


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 5.0])
def test_the_nucleus_is_the_smallest_set_that_holds_top_p(top_p: float, sharpness: float) -> None:
    # Random values: with ties, several sets would be smallest.
    generator = torch.Generator().manual_seed(0)
    probs_V = (sharpness * torch.randn(50, generator=generator) + 1e-3 * torch.rand(50, generator=generator)).softmax(
        -1
    )
    kept = nucleus(probs_V, top_p)
    expected, mass = set(), 0.0
    for token in sorted(range(50), key=lambda token: -float(probs_V[token])):
        if mass >= top_p and expected:
            break
        expected.add(token)
        mass += float(probs_V[token])
    assert set(kept.nonzero().flatten().tolist()) == expected
    assert torch.equal(kept[list(expected)], probs_V[list(expected)])


def test_equally_likely_tokens_do_not_all_slip_into_a_small_nucleus() -> None:
    assert (nucleus(torch.full((8,), 0.125), 0.25) > 0).sum() == 2


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -30.0])
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(choose(logits_V, 2.0, 1.0, generator) for _ in range(4000))
    expected_V = (logits_V / 2.0).softmax(-1)
    for token, probability in enumerate(expected_V.tolist()):
        assert drawn[token] / 4000 == pytest.approx(probability, abs=0.03)
    confined = {choose(logits_V, 2.0, 0.6, generator) for _ in range(200)}
    assert confined == {0, 1}


def test_low_temperature_nears_the_likeliest_token() -> None:
    model = build(replace(BASE, num_layers=1))
    cold = SAMPLED | {"temperature": 1e-4}
    assert list(generate(model, PROMPT, **cold)) == list(generate(model, PROMPT, **GREEDY | {"max_tokens": 30}))
