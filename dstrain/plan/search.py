"""The best layouts of a training job: all are predicted in closed form, the best of them by playing their step.

A layout fits if its fullest pipeline rank does. Played are the best ones, and of every family (all layouts with eight
pipeline ranks, say) the best, so that what is said about families is said of steps played alike.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dstrain.config.hardware import HardwareConfig
from dstrain.errors import ConfigError
from dstrain.plan.job import Job
from dstrain.plan.layouts import PAIRED, Run, keys
from dstrain.plan.memory import rank_memory
from dstrain.plan.simulation import simulate
from dstrain.plan.stages import Stages
from dstrain.plan.step import Prediction, predict
from dstrain.schedule.pipelines.choose import rule_broken

# Layouts played for each one that is asked for.
PLAYED = 3


def _schedule(job: Job) -> str:
    if job.pp == 1:
        return f"in_flight={job.in_flight}"
    name = f"{job.pipeline} of {job.chunks} chunks" if job.pipeline == "interleaved" else job.pipeline
    return f"{name} overlapped" if job.overlap and job.pipeline not in PAIRED else name


# By what layouts are told apart: how a family is named, in the words of a config.
FAMILIES: dict[str, Callable[[Job], str]] = {
    "pp": lambda job: f"pp={job.pp}",
    "ep": lambda job: f"ep={job.ep}",
    "schedule": _schedule,
    "micro_batch": lambda job: f"micro_batch={job.micro_batch}",
    "recompute": lambda job: f"recompute=[{','.join(sorted(job.recompute))}]",
    "dispatcher": lambda job: job.dispatcher,
    "products": lambda job: job.products,
    "node limit": lambda job: f"{job.model.groups_per_token} of {job.model.groups} groups",
}
# Of which it is told where they don't fit.
TOLD = ("pp", "ep", "schedule", "micro_batch", "recompute")
# Below this share of a step two layouts take equally long.
EQUAL = 0.001


@dataclass(frozen=True)
class Entry:
    """A layout that fits."""

    job: Job
    # Played for those that a search returns.
    prediction: Prediction
    # Of the fullest pipeline rank.
    memory_gib: float


@dataclass(frozen=True)
class Misfit:
    """A layout that needs more memory than a device has."""

    job: Job
    memory_gib: float
    lacking_gib: float


@dataclass(frozen=True)
class Found:
    """What a search has come to. Nothing fits where `entries` are empty."""

    # The quickest first.
    entries: tuple[Entry, ...]
    looked_at: int
    fitting: int
    # The layout that lacks least.
    nearest: Misfit | None
    # The job as it was given, in closed form, and its place among those that fit in the order of the closed form; None
    # where it does not fit or breaks a rule of the search.
    place: int | None
    # Why the first one is the best; if nothing fits, what is lacking.
    why: str
    # What to write behind `dstrain train` to train it.
    keys: tuple[str, ...]


def search(
    job: Job,
    hardware: HardwareConfig,
    top: int = 20,
    *,
    batches: Iterable[int] = (),
    vary: Iterable[str] = (),
) -> Found:
    """The `top` quickest layouts for the model, batch and devices of `job`; `batches`: further sequences in a batch
    that the run has (a ramp); `vary`: what besides the layout, see dstrain.config.plan.VARIABLE.

    Raises ConfigError if no layout takes the batch.
    """
    run = Run(job, hardware, tuple({job.sequences, *batches}), frozenset(vary))
    looked = _Looked(job, hardware)
    for layout in run.layouts():
        looked.at(layout)
    if not looked.count:
        rule = f"no layout of {job.gpus} devices takes it: every rank needs whole micro-batches"
        cure = f"Choose a multiple of {job.gpus}, or other devices"
        raise ConfigError("train.sequences", job.sequences, rule, cure)
    return looked.found(top)


class _Looked:
    """Layouts in the order in which they were tried."""

    def __init__(self, given: Job, hardware: HardwareConfig):
        self.given, self.hardware = given, hardware
        self.fitting: list[Entry] = []
        self.misfits: dict[tuple[str, str], Misfit] = {}
        self.count = 0

    def at(self, job: Job) -> None:
        self.count += 1
        memory_gib = self._memory_gib(job)
        lacking_gib = self._lacking_gib(memory_gib)
        if lacking_gib <= 0:
            self.fitting.append(Entry(job, predict(job, self.hardware), memory_gib))
            return
        for family, name in _families(job):
            known = self.misfits.get((family, name))
            if known is None or lacking_gib < known.lacking_gib:
                self.misfits[family, name] = Misfit(job, memory_gib, lacking_gib)

    def _memory_gib(self, job: Job) -> float:
        return max(rank.total_gib for rank in rank_memory(job, self.hardware))

    def _lacking_gib(self, memory_gib: float) -> float:
        """0 where the device's memory is not known."""
        return memory_gib - self.hardware.memory_gib if self.hardware.memory_gib else 0.0

    @property
    def nearest(self) -> Misfit | None:
        return min(self.misfits.values(), key=lambda misfit: misfit.lacking_gib, default=None)

    def found(self, top: int) -> Found:
        pool = self._played(top)
        if not pool:
            return Found((), self.count, 0, self.nearest, None, self._nothing(), ())
        best = pool[0]
        split = [shape.dense + shape.moe for shape in Stages(best.job, self.hardware).shapes]
        return Found(
            entries=tuple(pool[:top]),
            looked_at=self.count,
            fitting=len(self.fitting),
            nearest=self.nearest,
            place=self._place(),
            why="; ".join(self._reasons(best, pool)),
            keys=keys(best.job, self.given, split),
        )

    @cached_property
    def ranked(self) -> list[Entry]:
        """In the order of the closed form; of layouts that differ in the transport of tokens alone and take equally
        long, only the first."""
        first: dict[tuple[Job, float], Entry] = {}
        for entry in sorted(self.fitting, key=_order):
            first.setdefault((replace(entry.job, dispatcher=""), entry.prediction.step_s), entry)
        return list(first.values())

    def _played(self, top: int) -> list[Entry]:
        chosen = {entry.job: entry for entry in self.ranked[: PLAYED * top]}
        known: set[tuple[str, str]] = set()
        for entry in self.ranked:
            families = set(_families(entry.job))
            if families - known:
                known |= families
                chosen[entry.job] = entry
        # Those with the same table one after the other: making it is most of the work.
        by_table = sorted(chosen.values(), key=lambda entry: _table(entry.job))
        played = [replace(each, prediction=simulate(each.job, self.hardware).prediction) for each in by_table]
        return sorted(played, key=_order)

    def _place(self) -> int | None:
        """Of the job as it was given."""
        job = self.given
        whole = job.micro_batches and not rule_broken(job.pipeline, job.pp, job.micro_batches, job.chunks)
        if not whole or self._lacking_gib(self._memory_gib(job)) > 0:
            return None
        step_s = predict(self.given, self.hardware).step_s
        return 1 + sum(entry.prediction.step_s < step_s for entry in self.fitting)

    # -- reasons ------------------------------------------------------------------------------------------------------

    def _reasons(self, best: Entry, pool: Sequence[Entry]) -> Iterator[str]:
        """What it would cost to leave the best one's families, of each the least; and which other ones don't fit."""
        told = set()
        for name_of in FAMILIES.values():
            other = next((entry for entry in pool if name_of(entry.job) != name_of(best.job)), None)
            if other is not None and other.job not in told:
                told.add(other.job)
                names = (name(other.job) for name in FAMILIES.values() if name(other.job) != name(best.job))
                yield f"{', '.join(names)} {_slower(other.prediction, best.prediction)}"
        fitting = {family for entry in self.fitting for family in _families(entry.job)}
        for told_family in TOLD:
            lacking = [
                (misfit.lacking_gib, name)
                for (family, name), misfit in self.misfits.items()
                if family == told_family and (family, name) not in fitting
            ]
            if lacking:
                gib, name = min(lacking)
                yield f"{name} does not fit by {gib:.1f} GiB"

    def _nothing(self) -> str:
        misfit = self.nearest
        assert misfit is not None
        fullest = max(rank_memory(misfit.job, self.hardware), key=lambda rank: rank.total_gib)
        largest = sorted(fullest.parts_gib.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in largest)
        words = ", ".join(name for _, name in _families(misfit.job))
        return (
            f"nothing fits: the nearest layout ({words}) needs {misfit.memory_gib:.1f} GiB on pipeline rank "
            f"{fullest.rank} ({parts}), {misfit.lacking_gib:.1f} GiB more than a device has"
        )


def _families(job: Job) -> list[tuple[str, str]]:
    return [(family, name_of(job)) for family, name_of in FAMILIES.items()]


def _order(entry: Entry) -> tuple[float, bool, float]:
    """The quickest first; of equals the transport that dstrain itself has, and the one that needs less memory."""
    return entry.prediction.step_s, entry.job.dispatcher == "deepep", entry.memory_gib


def _table(job: Job) -> tuple[str, int, int, int, bool]:
    return job.pipeline, job.pp, job.chunks, job.micro_batches, job.overlap


def _slower(other: Prediction, best: Prediction) -> str:
    """By how much, and what most of it is."""
    share = other.step_s / best.step_s - 1
    if share < EQUAL:
        return "is as quick"
    part, more_s = max(
        ((name, seconds - _parts(best)[name]) for name, seconds in _parts(other).items()), key=lambda part: part[1]
    )
    return f"is {share:.1%} slower ({part} +{more_s:.3g} s)"


def _parts(prediction: Prediction) -> dict[str, float]:
    return {
        "compute": prediction.compute_s,
        "bubble": prediction.bubble_s,
        "exposed all-to-all": prediction.exposed_s,
        "gradients and weights": prediction.reduce_s,
        "update": prediction.update_s,
    }
