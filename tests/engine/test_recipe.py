"""Learning rate, batch size and loss weights by hand, DeepSeek-V3's among them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dstrain.config.schema import Config, LrPhase, MtpConfig, OptimConfig, RampConfig, RecipeChange, TrainConfig
from dstrain.engine.recipe import (
    batch_sequences,
    bias_update_rate,
    full_batch,
    learning_rate,
    mtp_loss_weight,
    steps_by_batch,
)
from tests.tiny import tiny_config

CONF = Path(__file__).parents[2] / "conf"
TRILLION, BILLION = 10**12, 10**9


def published() -> Config:
    """The numbers of conf/experiment/deepseek_v3.yaml, as they stand there."""
    train = yaml.safe_load((CONF / "experiment/deepseek_v3.yaml").read_text())["train"]
    train["ramp"] = RampConfig(**train["ramp"])
    train["changes"] = tuple(RecipeChange(**change) for change in train["changes"])
    optim = yaml.safe_load((CONF / "optim/deepseek_v3.yaml").read_text())
    # YAML reads 2.2e-4 as a number only with a dot in it, which all of them have.
    optim["phases"] = tuple(LrPhase(**phase) for phase in optim["phases"])
    return Config(train=TrainConfig(**train), optim=OptimConfig(**optim))


V3 = published()
# As the report has it, where the recipe begins with as much as its pipeline needs.
REPORTED = replace(V3.train, ramp=RampConfig(469 * BILLION, 3072, 768))


@pytest.mark.parametrize(("step", "rate"), [(0, 2.2e-4 / 2000), (999, 1.1e-4), (1999, 2.2e-4), (2000, 2.2e-4)])
def test_v3_warms_up_over_2000_steps(step: int, rate: float):
    assert learning_rate(V3, step, step * 3072 * 4096) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (5 * TRILLION, 2.2e-4),
        (10 * TRILLION - 1, 2.2e-4),
        (10 * TRILLION, 2.2e-4),
        (12_150 * BILLION, (2.2e-4 + 2.2e-5) / 2),
        # A quarter of the cosine.
        (11_075 * BILLION, 2.2e-5 + 1.98e-4 * (1 + math.sqrt(0.5)) / 2),
        (14_300 * BILLION - 1, 2.2e-5),
        (14_300 * BILLION, 2.2e-5),
        (14_633 * BILLION - 1, 2.2e-5),
        (14_633 * BILLION, 7.3e-6),
        (14_799 * BILLION, 7.3e-6),
    ],
)
def test_v3_rate(tokens: int, rate: float):
    assert learning_rate(V3, 100_000, tokens) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 3072), (469 * BILLION - 1, 14592), (469 * BILLION, 15360)])
def test_v3_batch(tokens: int, sequences: int):
    assert batch_sequences(REPORTED, tokens) == sequences


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 4096), (469 * BILLION - 1, 14336), (469 * BILLION, 15360)])
def test_v3_batch_of_the_recipe(tokens: int, sequences: int):
    assert batch_sequences(V3.train, tokens) == sequences


def test_v3_batch_grows_in_equal_stretches():
    stretch = 469 * BILLION / 16
    found = [batch_sequences(REPORTED, int((n + 0.5) * stretch)) for n in range(16)]
    assert found == list(range(3072, 15360, 768))
    stretch = 469 * BILLION / 11
    found = [batch_sequences(V3.train, int((n + 0.5) * stretch)) for n in range(11)]
    assert found == list(range(4096, 15360, 1024))


def test_v3_trains_on_14_8_trillion_tokens():
    """Walks the ramp, as the trainer does."""
    step = tokens = 0
    while tokens < V3.train.ramp.tokens:
        tokens += batch_sequences(V3.train, tokens) * 4096
        step += 1
    tokens += (V3.train.steps - step) * 15360 * 4096
    assert 0 <= tokens - 14_800 * BILLION < 15360 * 4096


@pytest.mark.parametrize(
    ("tokens", "mtp", "gamma"),
    [
        (0, 0.3, 0.001),
        (10 * TRILLION - 1, 0.3, 0.001),
        (10 * TRILLION, 0.1, 0.001),
        (14_300 * BILLION, 0.1, 0.0),
    ],
)
def test_v3_changes(tokens: int, mtp: float, gamma: float):
    assert mtp_loss_weight(V3, tokens) == mtp
    assert bias_update_rate(V3, tokens) == gamma


def test_a_change_to_zero_counts():
    config = tiny_config(
        model={"mtp": MtpConfig(1, loss_weight=0.5)}, train={"changes": (RecipeChange(10, mtp_loss_weight=0.0),)}
    )
    assert [mtp_loss_weight(config, tokens) for tokens in (9, 10)] == [0.5, 0.0]


def rates(shape: str, lr_end: float, **train: object) -> list[float]:
    """A run of 8 steps of 10 tokens with one phase that lasts until its end."""
    config = tiny_config(
        train={"steps": 8, "sequences": 1, "seq_len": 10, **train},
        optim={"lr": 1.0, "warmup_steps": 2, "phases": (LrPhase(shape, 0, lr_end),)},
    )
    return [learning_rate(config, step, 10 * step) for step in range(8)]


def test_linear_to_the_end_of_the_run():
    assert rates("linear", 0.2) == pytest.approx([0.5, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])


def test_cosine_to_the_end_of_the_run():
    expected = [0.5, 1.0] + [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(2, 8)]
    assert rates("cosine", 0.0) == pytest.approx(expected)


def test_steps_by_batch():
    train = TrainConfig(steps=9, seq_len=10, sequences=6, ramp=RampConfig(100, 2, 2))
    # Two stretches of 50 tokens: 20, 40, 60 trained; 100, 140; then the whole batch.
    assert steps_by_batch(train) == {2: 3, 4: 1, 6: 5}
    assert steps_by_batch(replace(train, steps=2)) == {2: 2}
    assert steps_by_batch(replace(train, ramp=RampConfig())) == {6: 9}
    assert steps_by_batch(replace(train, steps=0)) == {}


def test_the_end_of_a_run_with_a_ramp_is_the_sum_of_its_steps():
    """Batches of 1, 1, 2, 2, ... of 10 tokens: 60 in all, so that the last step begins after 40 of them."""
    config = tiny_config(
        train={"steps": 4, "sequences": 2, "seq_len": 10, "ramp": RampConfig(20, 1, 1)},
        optim={"lr": 1.0, "warmup_steps": 0, "phases": (LrPhase("linear", 0, 0.0),)},
    )
    assert [batch_sequences(config.train, tokens) for tokens in (0, 10, 20, 40)] == [1, 1, 2, 2]
    assert learning_rate(config, 3, 40) == pytest.approx(1 - 40 / 60)


def test_without_phases_the_rate_stays():
    config = tiny_config(optim={"lr": 0.5, "warmup_steps": 4})
    assert [learning_rate(config, step, 99 * step) for step in (0, 3, 4, 1000)] == [0.125, 0.5, 0.5, 0.5]


def test_a_batch_in_tokens():
    assert full_batch(TrainConfig(seq_len=128, batch_tokens=4096)) == 32
    assert batch_sequences(TrainConfig(seq_len=128, sequences=6), 0) == 6


def test_an_increment_that_does_not_divide_stops_at_the_full_batch():
    train = TrainConfig(sequences=10, ramp=RampConfig(tokens=300, start_sequences=2, increment_sequences=3))
    assert [batch_sequences(train, tokens) for tokens in (0, 99, 100, 199, 200, 299, 300)] == [2, 2, 5, 5, 8, 8, 10]
