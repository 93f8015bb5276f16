"""Whether transfers run under compute on a GPU: a stack of MoE layers, with and without tokens that travel over NCCL.

    python scripts/bench_gpu_overlap.py [--tokens 4096] [--hidden 2048] [--layers 4] [--micro-batches 8] [--wire auto]

One GPU is enough: the rank sends its rows to itself, so packing, NCCL's kernels, unpacking, streams, events and host
time are those of a real run, while the link is as fast as the GPU's memory. Forward and backward passes only, BF16:

    none          experts on this rank, one graph a micro-batch
    sequential    rows travel, one micro-batch after the other: every transfer is waited for
    2 in flight   the same in the order of two micro-batches in flight

Of the time in which a side stream computes or copies, `hidden` is the share in which the main stream does, too.
"""

import argparse
import json
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table as Sheet
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dstrain.comm.collectives import Peers
from dstrain.comm.trace import Trace
from dstrain.config.schema import Config, DispatchConfig, ModelConfig, TrainConfig
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Groups, Place
from dstrain.mesh.topology import Link, Topology
from dstrain.model.transformer import Transformer
from dstrain.parallel.apply import build_model
from dstrain.schedule.order import fixed
from dstrain.schedule.run import run
from dstrain.schedule.table import Table, sequential

WARM_UP, ROUNDS = 2, 5
Intervals = list[tuple[float, float]]


@dataclass(frozen=True)
class Figures:
    """Of one step; times in ms."""

    device_ms: float
    # Until the host had issued everything.
    issued_ms: float
    exposed_ms: float
    side_ms: float
    hidden_ms: float
    # Of the main stream.
    busy_ms: float
    peak_gib: float
    # Times the host waited for the device, by thread.
    syncs: Counter[str]


def groups_of_one(travels: bool) -> Groups:
    """A rank alone; where rows are to travel, it is a group of one over NCCL."""
    device = torch.device("cuda", 0)
    trace, place, topology = Trace(device), Place(0, 1, device), Topology((0,))
    names = ("ep", "ep_home") if travels else ()
    peers = {name: Peers(dist.new_group([0], backend="nccl"), trace, name, (0,), (Link.SELF,)) for name in names}
    return Groups(Mesh(), place, Mesh().coordinate(0), trace, topology, **peers)


def config_of(arguments: argparse.Namespace) -> Config:
    """V2-Lite's attention and experts, 16 of them, of which a token visits 4."""
    model = ModelConfig(
        vocab_size=8192,
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        num_dense_layers=0,
        num_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        moe_intermediate_size=1408,
    )
    train = TrainConfig(sequences=arguments.micro_batches, seq_len=arguments.tokens)
    return Config(model=model, train=train, dispatch=DispatchConfig(kind=arguments.kind, wire=arguments.wire))


def step_of(model: Transformer, batches: Sequence[Tensor], table: Table, trace: Trace) -> Callable[[], None]:
    """A step without an optimiser; gradients are added up where they are."""
    walks = [partial(model.walk, tokens, len(batches)) for tokens in batches]

    def step() -> None:
        run(table, walks, trace)

    return step


def whole_graph(model: Transformer, batches: Sequence[Tensor]) -> Callable[[], None]:
    def step() -> None:
        for tokens in batches:
            model(tokens, len(batches)).total.backward()

    return step


def measured(step: Callable[[], None], trace: Trace) -> Figures:
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    device_ms, issued_ms, exposed_ms = zip(*(timed(step, trace) for _ in range(ROUNDS)), strict=True)
    streams = sorted(kernels(step).values(), key=total, reverse=True)
    main, side = merged(streams[0]), merged([span for spans in streams[1:] for span in spans])
    both = total(main) + total(side) - total(merged([*main, *side]))
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    medians = (sorted(times)[ROUNDS // 2] for times in (device_ms, issued_ms, exposed_ms))
    return Figures(*medians, total(side), both, total(main), peak_gib, host_waits(step))


def timed(step: Callable[[], None], trace: Trace) -> tuple[float, float, float]:
    """ms of the device, of the host until it had issued all, and of waiting for transfers."""
    trace.take()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began = time.perf_counter()
    begin.record()
    step()
    end.record()
    issued_ms = (time.perf_counter() - began) * 1e3
    torch.cuda.synchronize()
    return begin.elapsed_time(end), issued_ms, trace.take().exposed_ms


def kernels(step: Callable[[], None]) -> dict[int, Intervals]:
    """What ran on each stream of the device, in ms."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: dict[int, Intervals] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            span = (event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3)
            found.setdefault(event["args"]["stream"], []).append(span)
    return found


def merged(spans: Intervals) -> Intervals:
    """The same time without overlaps, in order."""
    found: Intervals = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def total(spans: Intervals) -> float:
    return sum(end - start for start, end in spans)


def host_waits(step: Callable[[], None]) -> Counter[str]:
    """Where torch made a thread of the host wait for the device."""
    found: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        thread = threading.current_thread().name
        if "synchroniz" in str(message):
            found[f"{thread}: {'/'.join(Path(filename).parts[-2:])}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return found


def ways(arguments: argparse.Namespace) -> Iterator[tuple[str, Figures]]:
    config, count = config_of(arguments), arguments.micro_batches
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(8192, (1, arguments.tokens + 1), generator=generator).cuda() for _ in range(count)]
    for travels in (False, True):
        groups = groups_of_one(travels)
        model = build_model(config, groups)
        for name, parameter in model.named_parameters():
            if "router" not in name:
                parameter.data = parameter.data.bfloat16()
        if not travels:
            yield "none", measured(whole_graph(model, batches), groups.trace)
            continue
        tables = {"sequential": sequential(arguments.layers, count), "2 in flight": fixed(arguments.layers, count, 2)}
        for name, table in tables.items():
            yield name, measured(step_of(model, batches, table, groups.trace), groups.trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--kind", default="rank")
    parser.add_argument("--wire", default="auto")
    arguments = parser.parse_args()
    console = Console(width=140)
    if not torch.cuda.is_available():
        console.print("no GPU here: nothing was measured")
        return
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    size = f"{arguments.layers} layers, {arguments.micro_batches} x {arguments.tokens} tokens x {arguments.hidden}"
    sheet = Sheet(title=f"ms of a step on {torch.cuda.get_device_name()}: {size}, {arguments.kind}, {arguments.wire}")
    for column in ("transfers", "step", "issued", "exposed", "main busy", "side busy", "hidden", "peak GiB", "waits"):
        sheet.add_column(column, justify="right")
    for name, x in ways(arguments):
        times = (x.device_ms, x.issued_ms, x.exposed_ms, x.busy_ms, x.side_ms)
        hidden = f"{x.hidden_ms / x.side_ms:.0%}" if x.side_ms else ""
        sheet.add_row(name, *(f"{ms:.1f}" for ms in times), hidden, f"{x.peak_gib:.1f}", str(x.syncs.total()))
        for place, times_there in x.syncs.most_common():
            console.print(f"{name}: {times_there} waits in {place}")
    console.print(sheet)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
