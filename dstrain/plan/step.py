"""A step in closed form: the work of the costliest rank, the bubbles of its pipeline, what its transfers expose.

Quick enough to look at thousands of layouts; simulation.py plays the table instead. Bubbles are those of the published
formulas (DeepSeek-V3 table 2; arXiv:2104.04473 for interleaved stages), which even stages reach exactly.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import log, sqrt

from dstrain.config.hardware import HardwareConfig
from dstrain.plan.job import Job
from dstrain.plan.layer import added
from dstrain.plan.stages import Shape, Stages
from dstrain.schedule.pipeline import Layout
from dstrain.schedule.pipelines.choose import layout

# Schedules that put all weight gradients off as slots of their own, and have no pairs.
ZERO_BUBBLE = ("zb_1p", "zb_v")


@dataclass(frozen=True)
class Prediction:
    """Of a step, for the rank that takes longest. The seconds but for `step_s` add up to it."""

    step_s: float
    # Kernels, with what is computed again, and tensor-parallel transfers that nothing hides.
    compute_s: float
    # Waiting for other stages, and for the slowest of all devices.
    bubble_s: float
    # All-to-alls that no compute hides.
    exposed_s: float
    # Gradients and weights on their way at the end of a step, as far as nothing hides them; the update.
    reduce_s: float
    update_s: float
    tokens_per_s_per_gpu: float
    # Model FLOPs (plan.count's convention) over the BF16 peak; 0 where it is unknown.
    mfu: float
    # Busy milliseconds by kind of kernel.
    kinds_ms: dict[str, float]


@dataclass(frozen=True)
class Sums:
    """Milliseconds of a micro-batch on a stage."""

    forward: float
    into: float
    weight: float
    # All-to-alls that nothing hides when its passes run one after the other, forward and backward.
    alone: tuple[float, float]
    # The same for a forward pass paired with the backward pass of another micro-batch.
    paired: float

    @property
    def compute(self) -> float:
        return self.forward + self.into + self.weight


class Closed:
    """The closed form of a job on a machine."""

    def __init__(self, job: Job, hardware: HardwareConfig):
        self.job, self.hardware = job, hardware
        self.stages = Stages(job, hardware)
        self.sums = {shape: self._sums(shape) for shape in set(self.stages.shapes)}

    @cached_property
    def placed(self) -> Layout:
        return _placed(self.job.pipeline, self.job.pp, self.job.chunks)

    def _sums(self, shape: Shape) -> Sums:
        forward, into, weight = self.stages.passes(shape)
        sent = self.job.blocking_sends * self.stages.send_ms
        blocks = shape.moe + shape.mtp
        alone, paired = ((0.0, 0.0), 0.0)
        if self.stages.spreads and blocks:
            alone = blocks * self._alone()[0], blocks * self._alone()[1]
            paired = blocks * self._paired()
        return Sums(forward + sent, into + sent, weight, alone, paired)

    def _alone(self) -> tuple[float, float]:
        """Of a block: a shared expert runs under one of the transfers, forward and backward."""
        moe = self.stages.layers.moe
        there, home = moe.out_ms, moe.home_ms
        forward = max(0.0, there - moe.shared[0]) + home
        # Under the shared expert's backward pass, and under weight gradients where they stand apart.
        shadows = (moe.attend[2], moe.experts[2]) if self.job.splits_weights else (0.0, 0.0)
        if self.job.pipeline in ZERO_BUBBLE:
            # Those that follow fill both transfers in equal shares, or run behind them.
            shadows = (moe.passes[2] / 2,) * 2 if self.job.overlap else (0.0, 0.0)
        backward = max(0.0, there - moe.shared[1] - moe.shared[2] - shadows[0]) + max(0.0, home - shadows[1])
        # Others than dstrain send again what they compute again.
        return forward, backward + (there + home) * ("moe" in self.job.recompute)

    def _paired(self) -> float:
        """Of a block: the windows of schedule/overlap.py."""
        moe = self.stages.layers.moe
        (fa, ba, wa), (fs, bs, ws), (fe, be, we) = moe.attend, moe.shared, moe.experts
        windows = ((moe.out_ms, bs + ws + fa), (moe.out_ms, fs + be), (moe.home_ms, we + fe), (moe.home_ms, ba + wa))
        return sum(max(0.0, transfer - compute) for transfer, compute in windows)

    # -- a step -------------------------------------------------------------------------------------------------------

    def predict(self) -> Prediction:
        job, shapes = self.job, self.stages.shapes
        own = [[self.sums[shapes[n]] for n in held] for held in self.placed.held]
        # In a bidirectional pipeline half of the micro-batches pass each copy of a stage.
        count = job.micro_batches / self.placed.copies
        work = [count * sum(each.compute for each in held) for held in own]
        stalls = [sum(self._stall(each, count, len(held)) for each in held) for held in own]
        longest = max(range(len(own)), key=lambda n: work[n] + stalls[n])
        bubble_ms = self._bubble_ms(own)
        ends = self._end(own)
        step_ms = work[longest] + stalls[longest] + bubble_ms + sum(ends)
        kinds = self._kinds(longest, count)
        return prediction(job, self.hardware, step_ms, work[longest], bubble_ms, stalls[longest], ends, kinds)

    def _stall(self, sums: Sums, count: float, stages: int) -> float:
        """Of a stage of a rank that holds so many, in `count` micro-batches."""
        job = self.job
        in_pairs = job.overlap and job.pipeline not in ZERO_BUBBLE and (job.pp > 1 or job.in_flight > 1)
        alone = min(count, self._unpaired / stages) if in_pairs else count
        return (count - alone) * sums.paired + alone * sum(sums.alone)

    @cached_property
    def _unpaired(self) -> float:
        """Passes forward, and as many backward, that have no partner in a schedule of pairs: in bidirectional ones of
        the first rank, in others of the last rank, which begins when the bubble ends."""
        p = self.job.pp
        if p == 1:
            return 0.0
        bidirectional = {"dualpipe": 3 * p / 2 - 1, "dualpipev": 3 * p - 1}
        return bidirectional.get(self.job.pipeline, (self.job.chunks - 1) * p + 1)

    def _bubble_ms(self, own: list[list[Sums]]) -> float:
        job, p = self.job, self.job.pp
        if p == 1:
            return 0.0
        each = [sums for held in own for sums in held]
        stages = len(each) / self.placed.copies
        forward, into, weight = (
            sum(s) / len(each) for s in zip(*((e.forward, e.into, e.weight) for e in each), strict=True)
        )
        alone_f, alone_b = (sum(s) / len(each) for s in zip(*(e.alone for e in each), strict=True))
        forward, into = forward + alone_f, into + alone_b
        pair = forward + into + weight - alone_f - alone_b + sum(e.paired for e in each) / len(each)
        sends_ms = 2 * (stages - 1) * self.stages.send_ms
        filled = job.overlap and self.stages.spreads
        # Of a stage in one stretch, the gradient leaves before weight gradients that are put off.
        late = 0.0 if job.splits_weights and not self.stages.spreads else weight
        bubbles = {
            "1f1b": (p - 1) * (forward + into + late),
            "interleaved": (p - 1) * (forward + into + late),
            # Weight gradients that fill transfers of the last stages can't fill the gaps of the first ones.
            "zb_1p": (p - 1) * max(0.0, forward + into - (0.0 if filled else weight)),
            "zb_v": (p - 1) * max(0.0, forward + into - 2 * weight),
            "dualpipe": (p / 2 - 1) * max(0.0, pair + into - 2 * weight),
            "dualpipev": (p - 1) * max(0.0, pair + into - 2 * weight),
        }
        return bubbles[job.pipeline] + sends_ms

    def _end(self, own: list[list[Sums]]) -> tuple[float, float]:
        """What gradients and weights keep a step from ending, and the update."""
        shapes = [tuple(self.stages.shapes[n] for n in held) for held in self.placed.held]
        alike = {each: self.stages.reduction(each, self.placed.copies) for each in set(shapes)}
        ranks, exposed = [alike[each] for each in shapes], []
        for each, held, shape in zip(ranks, own, shapes, strict=True):
            if not self.job.overlap_dp:
                exposed.append(each.reduce_ms + each.gather_ms)
                continue
            # Buckets leave during the last backward pass, and weights come under the first forward pass, as far as
            # tokens don't take the links.
            carried = sum(map(self.stages.carried_ms, shape))
            backward = sum(sums.into + sums.weight + sums.alone[1] for sums in held) - carried
            forward = sum(sums.forward + sums.alone[0] for sums in held) - carried
            backward, forward = max(0.0, backward), max(0.0, forward)
            exposed.append(max(0.0, each.reduce_ms - backward) + max(0.0, each.gather_ms - forward))
        return max(exposed), max(each.update_ms for each in ranks)

    def _kinds(self, rank: int, count: float) -> dict[str, float]:
        stages = self.stages
        total = added()
        for n in self.placed.held[rank]:
            shape = stages.shapes[n]
            layers = [(shape.dense, stages.layers.dense.kinds)] if shape.dense else []
            moe = shape.moe + shape.mtp
            layers += [(moe, stages.layers.moe.kinds)] if moe else []
            ends = {"head": sum(map(sum, stages.ends(shape)))}
            total = added(total, ends, *({kind: ms * times for kind, ms in kinds.items()} for times, kinds in layers))
        return {kind: ms * count for kind, ms in sorted(total.items(), key=lambda item: -item[1])}


@lru_cache(maxsize=512)
def _placed(pipeline: str, pp: int, chunks: int) -> Layout:
    return layout(pipeline, pp, chunks) if pp > 1 else Layout(((0,),))


def prediction(
    job: Job,
    hardware: HardwareConfig,
    step_ms: float,
    compute_ms: float,
    bubble_ms: float,
    exposed_ms: float,
    ends_ms: Iterable[float],
    kinds_ms: dict[str, float],
) -> Prediction:
    """The figures that follow from the times of a step."""
    reduce_ms, update_ms = ends_ms
    slowest = slowdown(hardware.device_spread, job.gpus)
    waits_ms = (slowest - 1) * compute_ms
    tokens = job.sequences * job.seq_len / job.gpus
    step_s = (step_ms + waits_ms) / 1e3
    peak = hardware.peak_bf16_tflops * 1e12
    return Prediction(
        step_s=step_s,
        compute_s=compute_ms / 1e3,
        bubble_s=(bubble_ms + waits_ms) / 1e3,
        exposed_s=exposed_ms / 1e3,
        reduce_s=reduce_ms / 1e3,
        update_s=update_ms / 1e3,
        tokens_per_s_per_gpu=tokens / step_s,
        mfu=job.model.flops_per_token(job.seq_len) * tokens / step_s / peak if peak else 0.0,
        kinds_ms=kinds_ms,
    )


def slowdown(spread: float, devices: int) -> float:
    """How much longer the slowest of so many devices takes than a typical one, if speeds are normally distributed."""
    return 1 + spread * sqrt(2 * log(devices)) if devices > 1 else 1.0


def predict(job: Job, hardware: HardwareConfig) -> Prediction:
    """The closed form. Raises ConfigError for a machine that does not say what the job depends on."""
    return Closed(job, hardware).predict()
