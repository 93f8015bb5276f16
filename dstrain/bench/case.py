"""One configuration of a bench: how rows travel, in which format, and in which order the work runs."""

from dataclasses import dataclass

from dstrain.errors import ConfigError

KINDS = ("alltoall", "rank", "hierarchical")
WIRES = ("bfloat16", "fp8", "fp4")
PEERS = ("megatron", "torchtitan", "deepspeed", "deepspeed_drops")
BLOCK = "block"
DEFAULT_WIRE, DEFAULT_ORDER = "bfloat16", "2"


@dataclass(frozen=True)
class Case:
    """A dispatcher of ours, or a peer as it ships (then `kind` is its name and the rest says nothing)."""

    kind: str
    wire: str = DEFAULT_WIRE
    # Micro-batches in flight; 0: compute stands still during every transfer.
    in_flight: int = 0

    @property
    def is_peer(self) -> bool:
        return self.kind in PEERS

    @property
    def name(self) -> str:
        return self.kind if self.is_peer else f"{self.kind}/{self.wire}/{self.in_flight or BLOCK}"


def parse(text: str) -> Case:
    """`hierarchical/fp8/2`, `rank/bfloat16/block`, `megatron`; wire and order may be left out. Raises ConfigError."""
    kind, *rest = text.split("/")
    wire, order = [*rest, *(DEFAULT_WIRE, DEFAULT_ORDER)[len(rest) :]][:2]
    known = kind in PEERS and not rest
    ours = kind in KINDS and wire in WIRES and (order == BLOCK or (order.isdecimal() and int(order) > 0))
    if not known and not (ours and len(rest) <= 2):
        cure = (
            f"Write <dispatcher>/<wire>/<order>: {' | '.join(KINDS)}, {' | '.join(WIRES)}, {BLOCK} or a number of "
            f"micro-batches in flight; or a peer: {', '.join(PEERS)}."
        )
        raise ConfigError("cases", text, "there is no such case", cure)
    return Case(kind) if known else Case(kind, wire, 0 if order == BLOCK else int(order))
