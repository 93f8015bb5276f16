"""The schedule that a config names, and what it asks of the number of ranks and micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from dstrain.schedule.pipeline import Layout, Pipeline
from dstrain.schedule.pipelines.dualpipe import dualpipe, dualpipev
from dstrain.schedule.pipelines.one_f_one_b import interleaved, one_f_one_b
from dstrain.schedule.pipelines.zero_bubble import zb_1p, zb_v

# By name: the layout for (ranks, chunks).
_LAYOUTS: dict[str, Callable[[int, int], Layout]] = {
    "1f1b": lambda ranks, chunks: Layout.looped(ranks, 1),
    "interleaved": Layout.looped,
    "zb_1p": lambda ranks, chunks: Layout.looped(ranks, 1),
    "zb_v": lambda ranks, chunks: Layout.folded(ranks),
    "dualpipe": lambda ranks, chunks: Layout.bidirectional(ranks),
    "dualpipev": lambda ranks, chunks: Layout.folded(ranks),
}
NAMES = tuple(_LAYOUTS)


@dataclass(frozen=True)
class Broken:
    """A rule that an argument of `make` breaks, and how to mend it."""

    argument: str
    rule: str
    cure: str


def layout(name: str, ranks: int, chunks: int = 2) -> Layout:
    """Which stages each rank holds under schedule `name`; `chunks` per rank where it is interleaved."""
    return _LAYOUTS[name](ranks, chunks)


def rule_broken(name: str, ranks: int, micro_batches: int, chunks: int = 2) -> Broken | None:
    """The first rule that `make` would be given the wrong arguments for, or None."""
    if name not in NAMES:
        return Broken("name", f"is no pipeline schedule ({', '.join(NAMES)})", "Take one of them")
    if name == "dualpipe" and ranks % 2:
        cure = f"Take {ranks + 1} or another even number, or dualpipev, which takes any"
        return Broken("ranks", "dualpipe feeds both ends and needs an even number of pipeline ranks", cure)
    if name == "interleaved" and chunks < 1:
        return Broken("chunks", "a rank holds at least one stage", "Take 2")
    return _micro_batches_broken(name, ranks, micro_batches)


def _micro_batches_broken(name: str, ranks: int, micro_batches: int) -> Broken | None:
    least = 2 * ranks if name in ("dualpipe", "dualpipev") else 1
    step = {"dualpipe": 2, "interleaved": ranks}.get(name, 1)
    if micro_batches >= least and micro_batches % step == 0:
        return None
    nearest = max(least, round(micro_batches / step) * step, step)
    if micro_batches < least:
        rule = f"{name} on {ranks} pipeline ranks needs at least {least} micro-batches a step"
    else:
        rule = f"{name} on {ranks} pipeline ranks needs a multiple of {step} micro-batches a step"
    return Broken("micro_batches", rule, f"The nearest number allowed is {nearest}")


@lru_cache(maxsize=4)
def make(name: str, ranks: int, micro_batches: int, chunks: int = 2, overlap: bool = False) -> Pipeline:
    """The table of a schedule. Arguments keep the rules (`rule_broken`).

    `overlap` makes pairs of the alternating ops of 1f1b and interleaved; dualpipe and dualpipev always have them.
    """
    if name == "1f1b":
        return one_f_one_b(ranks, micro_batches, overlap)
    if name == "interleaved":
        return interleaved(ranks, micro_batches, chunks, overlap)
    builders = {"zb_1p": zb_1p, "zb_v": zb_v, "dualpipe": dualpipe, "dualpipev": dualpipev}
    return builders[name](ranks, micro_batches)
