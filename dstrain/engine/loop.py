"""The training step: micro-batches through the model, gradients through the engine, figures to whoever listens.

The global batch is rows [samples, samples + sequences) of the loader's endless order; rank d of R takes its d-th part.
Losses are shares of the global batch (model/transformer.py), so adding up is all that ranks and micro-batches do.
"""

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from dstrain.comm.agreement import gathered
from dstrain.comm.collectives import Peers, Reducing, all_reduce_max, all_reduce_sum
from dstrain.comm.trace import STAGES, CommTotals, Label, exposed
from dstrain.config.schema import Config
from dstrain.dispatch.balance import update_bias
from dstrain.engine.contract import Engine
from dstrain.engine.placement import Moved, Placer
from dstrain.engine.recipe import batch_sequences, bias_update_rate, learning_rate, mtp_loss_weight
from dstrain.engine.state import FlatShard, Progress, Shards
from dstrain.errors import SharedError
from dstrain.mesh.groups import Groups
from dstrain.model.layer import End, Walk, walk_whole
from dstrain.model.loss import StepLoss
from dstrain.model.transformer import Transformer, router_names
from dstrain.parallel.apply import logical_parameters
from dstrain.parallel.precision import product_names
from dstrain.plan.placement import Placement
from dstrain.precision.products import cached_weights
from dstrain.precision.watch import LARGEST, figures
from dstrain.schedule.choose import Orders, Program
from dstrain.schedule.pipe import Pipe
from dstrain.schedule.run import NoEdges, run_stages

# (first sample, count) -> tokens [count, seq_len + lookahead]
Batches = Callable[[int, int], Tensor]
# Output of the stage before, None for the first one -> the way of a micro-batch through a stage.
StartWalk = Callable[[Tensor | None], Walk[None]]


@dataclass(frozen=True)
class LayerLoad:
    """What one MoE layer did with the global batch."""

    name: str
    load_E: Tensor
    # Where the experts were.
    placement: Placement
    # Mean entropy of a token's normalised affinities, in nats.
    entropy: float
    bias_range: float


@dataclass(frozen=True)
class StepReport:
    """A finished step; the losses are means over the global batch."""

    progress: Progress
    loss: float
    loss_main: float
    loss_mtp: float
    loss_balance: float
    loss_z: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    # This rank's traffic, and its waiting for it.
    comm: CommTotals
    # Waiting of the rank that waited longest, up to the end of the reduction.
    comm_exposed_worst_ms: float
    # Peak of the rank that needs most: GPU memory, or resident memory of the process on a CPU.
    memory_gib: float
    layers: list[LayerLoad]
    # Experts on their way to other ranks, if it was time to look.
    moved: Moved | None
    # In which order the micro-batches ran their phases, and why.
    order: str
    # What quantising did to the step's tensors (precision/watch.py); empty unless it was time to look.
    rounding: dict[str, float]
    # Some rank was asked to stop (a signal).
    stop: bool


class _Sums:
    """Adds up courses, then ranks: one small FP64 all-reduce a step, exact for the integer loads.

    It sets out when the last forward pass has ended, and travels under what is left of the backward passes. Of a
    pipeline, each rank knows the losses and loads of its stages; the sum over all ranks is that of the whole model. It
    sets out at the end of the step then: other stages have still much to do, and waiting for them is bubble.
    """

    def __init__(self, courses: Sequence[tuple[int, int]], model: Transformer, peers: Peers | None):
        self._missing = set(courses)
        self._losses: dict[tuple[int, int], StepLoss] = {}
        self._model, self._peers = model, peers
        self._reducing: Reducing | None = None

    def add(self, course: tuple[int, int], loss: StepLoss) -> None:
        """The loss of a course; sums are formed in their order, whatever order they come in."""
        self._losses[course] = loss
        self._missing.discard(course)
        if self._missing:
            return
        losses = [self._losses[course] for course in sorted(self._losses)]
        parts_5 = torch.stack([torch.cat((loss.parts_4, loss.total[None])) for loss in losses]).double().sum(0)
        entropy_L = parts_5.new_zeros(self._model.num_blocks)
        load_LE = parts_5.new_zeros(self._model.num_blocks, self._model.config.num_experts)
        for (stage, _), loss in sorted(self._losses.items(), key=lambda item: item[0]):
            if loss.reports:
                first = sum(self._model.blocks[:stage])
                own = slice(first, first + len(loss.reports))
                entropy_L[own] += torch.stack([report.entropy for report in loss.reports])
                load_LE[own] += torch.stack([report.load_E for report in loss.reports])
        self._shape_LE = load_LE.shape
        self._own = torch.cat((parts_5, entropy_L, load_LE.flatten()))
        if len(self._model.stages) == 1:
            self._reducing = Reducing(self._own, self._peers)

    def wait(self) -> None:
        """Until the sums over all ranks are there."""
        if self._missing:
            raise RuntimeError("a micro-batch has not run forward")
        layers, kind = self._shape_LE[0], None
        if self._reducing is None:
            self._reducing, kind = Reducing(self._own, self._peers), STAGES
        self.parts_5, self.entropy_L, load = self._reducing.wait(kind).split((5, layers, self._shape_LE.numel()))
        self.load_LE = load.view(self._shape_LE)


def rank_share(config: Config, groups: Groups, progress: Progress) -> list[tuple[int, int]]:
    """(first sample, count) of each micro-batch that this rank takes of the next global batch."""
    size, ranks = config.train.micro_batch, groups.mesh.data
    own = batch_sequences(config.train, progress.tokens) // ranks
    begin = progress.samples + own * groups.mesh.data_index(groups.place.rank)
    return [(first, size) for first in range(begin, begin + own, size)]


def after_step(config: Config, progress: Progress) -> Progress:
    """Where the run stands after one more step."""
    sequences = batch_sequences(config.train, progress.tokens)
    tokens = progress.tokens + sequences * config.train.seq_len
    return Progress(progress.step + 1, progress.samples + sequences, tokens)


def rest_of_run(config: Config, groups: Groups, progress: Progress) -> Iterator[tuple[int, int]]:
    """All micro-batches of this rank from `progress` to the last step: what a loader may prepare ahead."""
    while progress.step < config.train.steps:
        yield from rank_share(config, groups, progress)
        progress = after_step(config, progress)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class Trainer:
    """Runs steps of a model under an engine; `progress` is where the run stands."""

    config: Config
    groups: Groups
    model: Transformer
    engine: Engine
    batches: Batches
    progress: Progress
    # Size of the text, which decides the order of its samples: a run goes on with the same one only. 0: not from text.
    corpus_tokens: int = 0

    def __post_init__(self) -> None:
        self.placer = Placer(self.config, self.groups, self.model, self.engine)
        # Where nothing travels, there is nothing to cut a graph for: a whole stage is one stretch.
        blocks = self.model.blocks if self.groups.ep else (0,) * len(self.model.blocks)
        self.orders = Orders(self.config, self.groups, blocks)
        self._users = {x.name: self.model.users(x.name) for x in logical_parameters(self.model)}
        self.edges: Pipe | NoEdges = Pipe(self.groups) if self.groups.pp else NoEdges()

    def accumulate(self, read: list[Tensor] | None = None) -> _Sums:
        """Forward and backward over this rank's part of the next batch; `read` gets the tokens of its micro-batches, or
        has them."""
        sequences = batch_sequences(self.config.train, self.progress.tokens)
        weight = mtp_loss_weight(self.config, self.progress.tokens)
        todo = rank_share(self.config, self.groups, self.progress)
        program = self.orders.program(len(todo))
        # The data ranks are all ranks, and in their own group gradients are on the way at this time.
        sums = _Sums(program.courses, self.model, self.groups.world)
        read = [] if read is None else read

        def tokens(number: int) -> Tensor:
            """Of a micro-batch; they are read in their order, and kept for the stages that are still to come."""
            while len(read) <= number:
                read.append(self.batches(*todo[len(read)]).to(self.groups.place.device, non_blocking=True))
            return read[number]

        def start(stage: int, number: int, x_BTD: Tensor | None) -> Walk[None]:
            walk = self.model.walk_stage(stage, tokens(number), x_BTD, sequences, weight)
            end = (yield from walk) if self.orders.stages[stage] else walk_whole(walk)
            sums.add((stage, number), end.result)
            return End(end.roots, None, end.output)

        self.engine.expect(self._gradients(program))
        with cached_weights(self.model):
            self.forward_and_backward(program, {course: partial(start, *course) for course in program.courses})
        return sums

    def _gradients(self, program: Program) -> dict[str, int]:
        """How many gradients each parameter gets in a step."""
        courses = Counter(stage for stage, _ in program.courses)
        return {name: sum(courses[stage] for stage in users) for name, users in self._users.items()}

    def forward_and_backward(self, program: Program, starts: Mapping[tuple[int, int], StartWalk]) -> None:
        """Over this rank's part of the micro-batches of a step."""
        if isinstance(self.edges, Pipe) and program.traffic is not None:
            train, dtype = self.config.train, getattr(torch, self.config.precision.compute_dtype)
            shape = (train.micro_batch, train.seq_len, self.config.model.hidden_size)
            # One element, seen as many: it says what is to come and takes no memory.
            self.edges.begin(
                program.traffic, torch.empty(1, dtype=dtype, device=self.groups.place.device).expand(shape)
            )
        # Weight gradients are put off only where compute has something to wait for.
        defers = self.orders.blocks > 0 or program.traffic is not None
        run_stages(program.table, starts, self.orders.stages, self.edges, self.groups.trace, defer_weights=defers)

    def step(self, *, stop: bool = False) -> StepReport:
        """One optimiser step. Raises SharedError when loss or gradient are not finite, before anything is updated."""
        began = time.perf_counter()
        self.groups.trace.label = Label(step=self.progress.step + 1)
        looks, read = self._looks(), list[Tensor]()
        with self.model.watch.counting() if looks else nullcontext():
            sums = self.accumulate(read)
        sums.wait()
        # On a GPU it ends with a synchronisation: from then on, the times of all waits are known.
        grad_norm = self.engine.reduce()
        exposed_ms = exposed(self.groups.trace.waited_ms())
        worst = sums.parts_5.new_tensor([float(stop), _peak_memory_gib(self.groups.place.device), exposed_ms])
        any_stop, memory_gib, exposed_ms = all_reduce_max(worst, self.groups.world).tolist()
        main, mtp, balance, z, total = sums.parts_5.tolist()
        if not (isfinite(total) and isfinite(grad_norm)):
            raise SharedError(
                f"step {self.progress.step + 1}: loss {total:.6g} and gradient norm {grad_norm:.6g} must be finite"
                f"{self._culprit(read)}. Nothing was updated; go on from the last checkpoint with a lower optim.lr or "
                "a longer optim.warmup_steps."
            )
        lr = learning_rate(self.config, self.progress.step, self.progress.tokens)
        self.engine.step(lr)
        before, self.progress = self.progress, after_step(self.config, self.progress)
        tokens = self.progress.tokens - before.tokens
        layers = self._balance(sums, tokens, bias_update_rate(self.config, before.tokens))
        moved = self.placer.after_step(self.progress.step, sums.load_LE)
        if self.groups.place.device.type == "cuda":
            # Not the whole device: the gather of the new parameters goes on under the next forward pass.
            torch.cuda.current_stream().synchronize()
        seconds, comm = time.perf_counter() - began, self.groups.trace.take()
        self.orders.after_step(comm)
        return StepReport(
            self.progress,
            loss=total,
            loss_main=main,
            loss_mtp=mtp,
            loss_balance=balance,
            loss_z=z,
            lr=lr,
            grad_norm=grad_norm,
            tokens=tokens,
            seconds=seconds,
            comm=comm,
            comm_exposed_worst_ms=max(exposed_ms, comm.exposed_ms),
            memory_gib=memory_gib,
            layers=layers,
            moved=moved,
            order=self.orders.reason,
            rounding=self._rounding() if looks else {},
            stop=any_stop > 0,
        )

    def _looks(self) -> bool:
        """Whether it is time to watch what quantising does."""
        every = self.config.precision.watch_every_steps
        return self.config.precision.products != "compute" and every > 0 and (self.progress.step + 1) % every == 0

    def _rounding(self) -> dict[str, float]:
        counts_C5, world = self.model.watch.counts, self.groups.world
        largest_C = all_reduce_max(counts_C5[:, LARGEST].clone(), world)
        all_reduce_sum(counts_C5, world)[:, LARGEST] = largest_C
        return figures(counts_C5)

    def _culprit(self, read: list[Tensor]) -> str:
        """Where the step went wrong, if it was met on its way into a product in FP8: the step is run once more, and
        this time every tensor is looked at."""
        if self.config.precision.products == "compute":
            return ""
        with self.model.watch.naming() as broken:
            self.accumulate(read).wait()
        order = product_names(self.model)

        def when(first: tuple[str, str]) -> tuple[bool, int]:
            """The backward pass meets first what the forward pass has left, and the last layers first."""
            is_gradient, place = first[0] == "gradient", order.index(first[1])
            return is_gradient, -place if is_gradient else place

        firsts = [names[0] for names in gathered(broken, self.groups.background) if names]
        if not firsts:
            return ""
        kind, name = min(firsts, key=when)
        return f"; the first tensor with NaN or infinity that was to be quantised is the {kind} of {name}"

    def _balance(self, sums: _Sums, tokens: int, rate: float) -> list[LayerLoad]:
        """Moves the router biases against the load of the global batch, which every rank knows of every layer."""
        names, own = router_names(self.config.model), dict(self.model.routers())
        spread_L = sums.entropy_L.new_zeros(len(names))
        for row, name in enumerate(names):
            if name in own:
                update_bias(own[name].bias, sums.load_LE[row], rate)
                spread_L[row] = own[name].bias.max() - own[name].bias.min()
        if self.groups.pp:
            all_reduce_max(spread_L, self.groups.world)
        return [
            LayerLoad(name, load_E, placement, entropy / tokens, spread)
            for name, load_E, placement, entropy, spread in zip(
                names, sums.load_LE, self.placer.placements, sums.entropy_L.tolist(), spread_L.tolist(), strict=True
            )
        ]

    def state(self) -> Shards:
        """Everything that a checkpoint keeps: the engine's shards and the router biases."""
        biases = {f"buffer/{name}.bias": router.bias for name, router in self.model.routers()}
        return self.engine.state() | {name: FlatShard(tuple(b.shape), 0, b.view(-1)) for name, b in biases.items()}
