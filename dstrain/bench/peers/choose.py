"""The peers that the bench can run, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

from dstrain.bench.peers import deepspeed, megatron, torchtitan
from dstrain.bench.peers.contract import Compute, Facts, Peer, Spec


@dataclass(frozen=True)
class Choice:
    """`facts` needs no process group and raises UserError where the peer is not installed."""

    facts: Callable[[], Facts]
    make: Callable[[Spec, dist.ProcessGroup, Compute], Peer]


PEERS = {
    "megatron": Choice(megatron.facts, megatron.make),
    "torchtitan": Choice(torchtitan.facts, torchtitan.make),
    "deepspeed": Choice(deepspeed.facts, deepspeed.make),
    "deepspeed_drops": Choice(partial(deepspeed.facts, drops=True), partial(deepspeed.make, drops=True)),
}
