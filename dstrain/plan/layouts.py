"""The layouts in which dstrain can train a job on the devices that it has.

Varied are the axes of the mesh, micro-batches, the schedule, what is computed again and the transport of tokens; on
request also what changes the training itself: the precision of products, and how many nodes a token may use. Rules are
those of config/check.py, for every batch of the run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dstrain.config.hardware import HardwareConfig
from dstrain.plan.architecture import Architecture
from dstrain.plan.job import Job
from dstrain.plan.network import Group
from dstrain.schedule.pipelines.choose import NAMES, layout, rule_broken

MICRO_BATCHES = (1, 2, 4, 8, 16)
CHUNKS = (2, 3, 4, 6)
RECOMPUTED = ((), ("norm", "swiglu"), ("norm", "mla_up", "swiglu"), ("layer",))
# Whose tables pair forward and backward passes in any case.
PAIRED = ("dualpipe", "dualpipev")
# GB/s inside a node that only NVLink has: what DeepEP's kernels ask for.
NVLINK_GBYTES_PER_S = 150.0
# Precisions of products: the group that a config takes for them, and the wire that follows.
PRECISIONS = {"bf16": ("bf16", "bfloat16"), "fp8_block": ("fp8", "fp8")}

# Fields of a job with other values.
Change = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What layouts are looked for, and where."""

    job: Job
    hardware: HardwareConfig
    # Sequences of all batches of the run, those of a ramp included.
    batches: tuple[int, ...]
    # Any of dstrain.config.plan.VARIABLE.
    vary: frozenset[str]

    def layouts(self) -> Iterator[Job]:
        """All that keep the rules; stages are planned by cost."""
        for degrees in self._degrees():
            spread = replace(self.job, **degrees, split=())
            routers, transports = list(self._routers(spread)), list(self._transports(spread))
            for order in self._orders(spread):
                for recompute in self._recomputed():
                    for numbers in self._numbers():
                        ordered = replace(spread, **order, **numbers, recompute=recompute)
                        yield from (
                            replace(ordered, dispatcher=kind, model=model) for kind in transports for model in routers
                        )

    def _degrees(self) -> Iterator[Change]:
        """pp, ep and what the job has of the others, or nothing of them."""
        job = self.job
        others = {(1, 1, 1), (job.tp, job.cp, job.etp)}
        for tp, cp, etp in sorted(others):
            for pp in divisors(job.gpus // (tp * cp)):
                per_stage = job.gpus // pp
                experts = [ep for ep in divisors(job.model.experts) if per_stage % (ep * etp) == 0]
                for ep in experts if pp <= job.model.layers else ():
                    yield {"tp": tp, "cp": cp, "etp": etp, "pp": pp, "ep": ep}

    def _orders(self, spread: Job) -> Iterator[Change]:
        """Sizes of micro-batches and schedules that take their number."""
        sizes = {*MICRO_BATCHES, self.job.micro_batch}
        for size in sorted(sizes):
            if any(batch % (spread.dp * size) for batch in self.batches):
                continue
            counts = [batch // (spread.dp * size) for batch in self.batches]
            schedules = self._pipelines(spread, counts) if spread.pp > 1 else self._unpiped(spread, counts)
            yield from ({"micro_batch": size, **schedule} for schedule in schedules)

    def _unpiped(self, spread: Job, counts: Sequence[int]) -> Iterator[Change]:
        """Micro-batches in flight; under the transfers of one, another computes."""
        travels = spread.ep > 1
        most = {1, 2, self.job.in_flight} if travels else {1}
        for in_flight in sorted(most):
            if in_flight <= min(counts):
                yield {"pipeline": "1f1b", "chunks": 1, "in_flight": in_flight, "overlap": travels}

    def _pipelines(self, spread: Job, counts: Sequence[int]) -> Iterator[Change]:
        for name in NAMES:
            many = sorted({*CHUNKS, max(2, self.job.chunks)}) if name == "interleaved" else [1]
            for chunks in many:
                fits = layout(name, spread.pp, chunks).num_stages <= spread.model.layers
                if not fits or any(rule_broken(name, spread.pp, count, chunks) for count in counts):
                    continue
                overlaps = [False] if spread.ep == 1 else [True] if name in PAIRED else [False, True]
                for overlap in overlaps:
                    yield {"pipeline": name, "chunks": chunks, "in_flight": 1, "overlap": overlap}

    def _recomputed(self) -> Sequence[frozenset[str]]:
        is_mla = self.job.model.is_mla
        return sorted({*(frozenset(s) for s in RECOMPUTED if is_mla or "mla_up" not in s), self.job.recompute}, key=len)

    def _numbers(self) -> Iterator[Change]:
        job = self.job
        yield {}
        for products, (_, wire) in PRECISIONS.items() if "precision" in self.vary else ():
            if products != job.products and (products == "bf16" or self.hardware.peak_fp8_tflops):
                gathered = 1 if products == "fp8_block" else 2
                yield {
                    "products": products,
                    "wire": wire,
                    "gather_bytes": gathered,
                    "master_bytes": 4,
                    "moment_bytes": 2,
                }

    def _transports(self, spread: Job) -> Iterator[str]:
        if spread.ep == 1:
            yield "local"
            return
        group, machine = self._group(spread), self.hardware
        yield from ("rank", "alltoall")
        if group.nodes > 1 and group.local > 1 and group.size % group.local == 0:
            yield "hierarchical"
        # Its kernels need NVLink and a Hopper, which the first FP8 came with.
        runs = machine.peak_fp8_tflops and machine.intra_node_gbytes_per_s >= NVLINK_GBYTES_PER_S
        if self.job.dispatcher == "deepep" or (runs and self.job.wire in ("bfloat16", "fp8")):
            yield "deepep"

    def _routers(self, spread: Job) -> Iterator[Architecture]:
        """The model as it is; on request with other limits of nodes, which group experts as the nodes do."""
        model, nodes = self.job.model, self._group(spread).nodes
        yield model
        if "node_limit" not in self.vary or nodes == 1:
            return
        limits = [(1, 1)]
        if model.experts % nodes == 0 and model.experts >= 2 * nodes:
            limits += [(nodes, most) for most in sorted({nodes // 4, nodes // 2} - {0})]
        for groups, most in limits:
            enough = most * model.experts // groups >= model.experts_per_token
            if enough and (groups, most) != (model.groups, model.groups_per_token):
                yield replace(model, groups=groups, groups_per_token=most)

    def _group(self, spread: Job) -> Group:
        return Group.of(spread.ep, spread.etp, self.hardware.devices_per_node)


def divisors(number: int) -> list[int]:
    """Of 0 (a model without experts): 1."""
    return [n for n in range(1, max(1, number) + 1) if max(1, number) % n == 0]


def keys(job: Job, given: Job, split: Sequence[int]) -> tuple[str, ...]:
    """What to write behind `dstrain train` and the config of `given` to train the layout; `split`: layers of each
    stage."""
    found = [f"mesh.pp={job.pp}", f"mesh.ep={job.ep}", f"mesh.dp={job.gpus // (job.pp * job.ep)}"]
    found.append(f"train.micro_batch={job.micro_batch}")
    if job.pp > 1:
        found += [f"schedule.pipeline={job.pipeline}", "schedule.in_flight=null"]
        found += [f"schedule.chunks={job.chunks}"] if job.pipeline == "interleaved" else []
        found += [f"schedule.overlap={str(job.overlap).lower()}", f"schedule.split=[{','.join(map(str, split))}]"]
    else:
        found += [f"schedule.in_flight={job.in_flight}", "schedule.overlap=null", "schedule.split=[]"]
    found += [f"train.recompute=[{','.join(sorted(job.recompute))}]", f"dispatch.kind={job.dispatcher}"]
    if job.products != given.products:
        found.append(f"precision={PRECISIONS[job.products][0]}")
    before, now = given.model, job.model
    if (before.groups, before.groups_per_token) != (now.groups, now.groups_per_token):
        found += [f"model.router.num_groups={now.groups}", f"model.router.groups_per_token={now.groups_per_token}"]
    return tuple(found)
