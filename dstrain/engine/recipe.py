"""What changes during a run, as pure functions of how far it is: learning rate, batch size, loss weights.

Progress is counted in tokens wherever the published recipe counts in tokens, so that nothing here has a state.
"""

import math

from dstrain.config.schema import Config, LrPhase, RampConfig, TrainConfig


def full_batch(train: TrainConfig) -> int:
    """Sequences in a global batch after the ramp."""
    return train.sequences if train.sequences is not None else (train.batch_tokens or 0) // train.seq_len


def batch_sequences(train: TrainConfig, tokens: int) -> int:
    """Sequences in the next global batch when `tokens` have been trained on: equal increments, equal stretches."""
    ramp, full = train.ramp, full_batch(train)
    if tokens >= ramp.tokens:
        return full
    return min(full, ramp.start_sequences + _increments(ramp, full, tokens) * ramp.increment_sequences)


def _increments(ramp: RampConfig, full: int, tokens: int) -> int:
    stretches = math.ceil((full - ramp.start_sequences) / ramp.increment_sequences)
    return stretches * tokens // ramp.tokens


def learning_rate(config: Config, step: int, tokens: int) -> float:
    """The rate of the update that follows `step` updates and `tokens` trained tokens.

    Linear warm-up to optim.lr over warmup_steps, then the phases one after the other. Phases are measured in tokens
    from the start of the run, as in DeepSeek-V3 section 4.2; the first one includes the warm-up.
    """
    optim = config.optim
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    begin, rate = 0, optim.lr
    for phase in optim.phases:
        length = phase.tokens or max(_total_tokens(config.train) - begin, 1)
        if tokens < begin + length:
            return _within(phase, rate, (tokens - begin) / length)
        begin, rate = begin + length, phase.lr_end
    return rate


def _within(phase: LrPhase, start: float, share: float) -> float:
    if phase.shape == "constant":
        return phase.lr_end
    if phase.shape == "linear":
        return start + (phase.lr_end - start) * share
    return phase.lr_end + (start - phase.lr_end) * (1 + math.cos(math.pi * share)) / 2


def steps_by_batch(train: TrainConfig) -> dict[int, int]:
    """Steps of the whole run by the sequences of their batches; those of a ramp are walked, since each has its own."""
    steps: dict[int, int] = {}
    tokens, made = 0, 0
    while made < train.steps and tokens < train.ramp.tokens:
        sequences = batch_sequences(train, tokens)
        steps[sequences] = steps.get(sequences, 0) + 1
        tokens, made = tokens + sequences * train.seq_len, made + 1
    full = full_batch(train)
    if made < train.steps:
        steps[full] = steps.get(full, 0) + train.steps - made
    return steps


def _total_tokens(train: TrainConfig) -> int:
    return sum(sequences * steps for sequences, steps in steps_by_batch(train).items()) * train.seq_len


def mtp_loss_weight(config: Config, tokens: int) -> float:
    changed = [
        c.mtp_loss_weight for c in config.train.changes if c.at_tokens <= tokens and c.mtp_loss_weight is not None
    ]
    return changed[-1] if changed else config.model.mtp.loss_weight


def bias_update_rate(config: Config, tokens: int) -> float:
    changed = [
        c.bias_update_rate for c in config.train.changes if c.at_tokens <= tokens and c.bias_update_rate is not None
    ]
    return changed[-1] if changed else config.model.router.bias_update_rate
