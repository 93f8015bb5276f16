"""Where the figures of a step go.

A record is a flat mapping with these keys; a figure that is unknown is None or absent:

    step, tokens                            position in the run: optimiser steps, and tokens trained on, so far
    loss, loss_main, loss_mtp               nats per token, over the global batch
    loss_balance, loss_z                    without their weights; 0 where the weight is 0
    lr, grad_norm                           the norm is that of the whole gradient, before clipping
    tokens_per_s, tokens_per_s_per_gpu, mfu mfu is a share of the peak, 0 to 1
    step_ms, memory_gib                     wall time; peak on the worst rank
    comm_exposed_ms, comm_exposed_worst_ms  of the wall time, compute waiting for transfers: rank 0, and the worst rank
    comm_dispatch_exposed_ms                and combine, grad, param, reduce, ...: what rank 0 waited for
    comm_busy_ms, comm_hidden_share         time in which rank 0 had a transfer under way, and the share not waited for
    stages_wait_ms                          compute waiting for other stages of a pipeline: its bubble, on rank 0
    comm_node_mb, comm_network_mb           what rank 0 sent to ranks of its node and over the network, in 10^6 bytes
    comm_dispatch_mb                        and combine, grad, param, reduce, ...: the same by kind
    moe/layer03/load_max_over_mean          of the experts of a layer; moe/mtp0/... for the MTP modules. Beside it:
                rank_load_max_over_mean     of the ranks, which wait for the busiest
                overload_share              share of the load that lies above the mean of the experts
                dead_experts                experts without a token in the global batch
                entropy, bias_range         nats; largest minus smallest balancing bias
    placement/moved_experts, sent_mib, ms   in steps that looked at the placement: what moved, from rank 0, in what time
    placement/load_before, load_after       busiest rank over the mean, mean over layers, since the last look

Several sinks are a tuple that the trainer walks over on rank 0.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from dstrain.errors import UserError

Value = float | int | str | None
Record = Mapping[str, Value]


class Sink(Protocol):
    def log(self, record: Record) -> None:
        """Takes the figures of one step; `step` is always among them."""
        ...

    def close(self) -> None:
        """Writes out what is held back. Nothing is logged afterwards."""
        ...


class JsonlSink:
    """One JSON object a line, in the hands of the kernel before `log` returns: a killed process loses nothing.

    Floats keep every bit. JSON has no NaN and no infinity, so these become the strings "NaN", "Infinity" and
    "-Infinity", which `float()` reads back.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        """Appends to `path`; with `resume_step`, first drops the later records, which will be computed again."""
        self.path = path
        try:
            if resume_step is not None and path.exists():
                drop_after(path, resume_step)
            # Without a buffer, for what cannot be written would be tried again when the file is closed.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error

    def log(self, record: Record) -> None:
        line = json.dumps({key: _valid(value) for key, value in record.items()}, allow_nan=False)
        rest = memoryview(f"{line}\n".encode())
        try:
            while rest:
                # A disk that is nearly full takes a part.
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        self._file.close()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written: {error.strerror}. Make room or choose another run.dir.")


def drop_after(path: Path, step: int) -> None:
    """Removes the records later than `step`, and a last line that a kill tore, in one atomic replacement."""
    fresh = path.with_name(path.name + ".new")
    with path.open(encoding="utf-8", errors="replace") as lines, fresh.open("w", encoding="utf-8") as out:
        out.writelines(_up_to(lines, step))
        out.flush()
        os.fsync(out.fileno())
    os.replace(fresh, path)


def _up_to(lines: Iterator[str], step: int) -> Iterator[str]:
    for line in lines:
        whole = line.endswith("\n")
        try:
            record_step = json.loads(line)["step"]
        except json.JSONDecodeError:
            # Only a last line can be torn; anything else that is no record was put there by somebody who wants it.
            if whole:
                yield line
            continue
        if record_step <= step:
            yield line if whole else line + "\n"


def _valid(value: Value) -> Value:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
