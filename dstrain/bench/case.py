"""One configuration of a bench: how rows travel, in which format, and in which order the work runs."""

from dataclasses import dataclass

from dstrain.errors import ConfigError
from dstrain.schedule.pipelines.choose import NAMES

KINDS = ("alltoall", "rank", "hierarchical")
WIRES = ("bfloat16", "fp8", "mxfp8", "fp4", "logfmt8", "logfmt10")
PEERS = ("megatron", "torchtitan", "deepspeed", "deepspeed_drops")
BLOCK, OVERLAP = "block", "overlap"
DEFAULT_WIRE, DEFAULT_ORDER = "bfloat16", "2"


@dataclass(frozen=True)
class Case:
    """A dispatcher of ours, or a peer as it ships (then `kind` is its name and the rest says nothing)."""

    kind: str
    wire: str = DEFAULT_WIRE
    # Micro-batches in flight; 0: compute stands still during every transfer; None: as many as the pipeline has.
    in_flight: int | None = 0
    # The schedule of a pipeline, "" without one, and whether its pairs interleave.
    pipeline: str = ""
    overlap: bool = False

    @property
    def is_peer(self) -> bool:
        return self.kind in PEERS

    @property
    def name(self) -> str:
        return self.kind if self.is_peer else f"{self.kind}/{self.wire}/{self.order}"

    @property
    def order(self) -> str:
        how = BLOCK if self.in_flight == 0 else OVERLAP if self.overlap else str(self.in_flight or "")
        return "+".join(filter(None, (self.pipeline, how)))


def parse(text: str) -> Case:
    """`hierarchical/fp8/2`, `rank/bfloat16/block`, `rank/bfloat16/1f1b+overlap`, `megatron`; wire and order may be left
    out. Raises ConfigError."""
    kind, *rest = text.split("/")
    wire, order = [*rest, *(DEFAULT_WIRE, DEFAULT_ORDER)[len(rest) :]][:2]
    known = kind in PEERS and not rest
    pipeline, plus, how = order.partition("+")
    in_pipeline = pipeline in NAMES and (how in (BLOCK, OVERLAP) if plus else True)
    in_order = order == BLOCK or (order.isdecimal() and int(order) > 0) or in_pipeline
    if not known and not (kind in KINDS and wire in WIRES and in_order and len(rest) <= 2):
        cure = (
            f"Write <dispatcher>/<wire>/<order>: {' | '.join(KINDS)}, {' | '.join(WIRES)}, {BLOCK} or a number of "
            f"micro-batches in flight or, with pp, {' | '.join(NAMES)}, +{BLOCK} or +{OVERLAP} behind it; or a peer: "
            f"{', '.join(PEERS)}."
        )
        raise ConfigError("cases", text, "there is no such case", cure)
    if known:
        return Case(kind)
    if in_pipeline:
        return Case(kind, wire, 0 if how == BLOCK else None, pipeline, how == OVERLAP)
    return Case(kind, wire, 0 if order == BLOCK else int(order))
