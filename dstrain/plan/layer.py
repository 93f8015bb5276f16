"""The kernels of a layer, and what they take: forward, for input gradients and for weight gradients, phase by phase.

A product costs the same in all three passes but for what it writes: weight gradients are added up in memory. Kernels
bound by memory are counted in bytes: of a value of 2 bytes read and written, 4. They are what simple models forget; of
an MoE layer of DeepSeek-V3 they are a quarter (dstrain/plan/data/deepseek_train_trace.json).

T tokens of a micro-batch, S of them where tensor parallelism spreads tokens instead of widths, D hidden, R rows that
come to the experts of a rank.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dstrain.config.hardware import HardwareConfig
from dstrain.plan.device import NARROW, Device
from dstrain.plan.job import Job
from dstrain.plan.network import Exchanges, Group, Network, exchanges, router_key, visited

# Launches of a layer in each pass, forward and backward: the attention half, a dense half, an MoE half.
LAUNCHES = {"attention": (16, 30), "dense": (8, 16), "moe": (45, 60)}
# Bytes of a logit in cross entropy: forward (maximum, exponential, sum), backward.
LOGIT_BYTES = (12, 6)


# Seconds by kind of kernel.
Kinds = defaultdict[str, float]


def _none() -> Kinds:
    return defaultdict(float)


def added(*parts: Mapping[str, float]) -> Kinds:
    """The sum, kind by kind."""
    total = _none()
    for part in parts:
        for kind, seconds in part.items():
            total[kind] += seconds
    return total


@dataclass(frozen=True)
class Work:
    """What the three passes take."""

    forward: Kinds = field(default_factory=_none)
    input: Kinds = field(default_factory=_none)
    weight: Kinds = field(default_factory=_none)

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(self.passes, other.passes, strict=True)
        return Work(*(added(*pair) for pair in pairs))

    @property
    def passes(self) -> tuple[Kinds, Kinds, Kinds]:
        return self.forward, self.input, self.weight

    @property
    def seconds(self) -> tuple[float, float, float]:
        forward, into, weight = self.passes
        return sum(forward.values()), sum(into.values()), sum(weight.values())


@dataclass(frozen=True)
class LayerWork:
    """Of one layer; `experts` and `shared` are empty in a dense one."""

    attend: Work
    shared: Work
    experts: Work
    exchanges: Exchanges
    # Launches of kernels, forward and backward; of the forward ones, those that the host can't make ahead, because it
    # waits for the number of rows that arrive.
    launches: tuple[int, int]
    awaited: int = 0


class Kernels:
    """What layers of a job take on a machine."""

    def __init__(self, job: Job, hardware: HardwareConfig):
        self.job, self.hardware, self.model = job, hardware, job.model
        self.device = Device(hardware)
        self.network = Network(hardware)
        # Of tokens outside of tensor-parallel products.
        self.spread_tokens = job.tokens / (job.tp if job.sequence_parallel else 1)
        self.sum_bytes = 2 * job.grad_bytes if job.micro_batches > 1 and job.zero < 3 else job.grad_bytes
        self.per_node = hardware.devices_per_node
        self.tensor_group = Group.of(job.tp, 1, self.per_node)

    # -- parts of layers ----------------------------------------------------------------------------------------------

    def _product(self, work: Work, rows: int, out: int, wide: int, groups: int = 1, name: str = "gemm") -> None:
        """A linear layer [out, wide], or those of several experts with `rows` rows each."""
        device, products = self.device, self.job.products
        work.forward[name] += device.product_s(rows, out, wide, products, groups=groups)
        work.input[name] += device.product_s(rows, wide, out, products, groups=groups)
        work.weight[name] += device.product_s(out, wide, rows, products, groups=groups, out_bytes=self.sum_bytes)
        if products in NARROW:
            self._casts(work, rows * groups, out, wide)

    def _casts(self, work: Work, rows: float, out: int, wide: int) -> None:
        """Bytes read and written to quantise what a linear layer multiplies."""
        forward, backward, weight = CASTS[self.job.products]
        self._memory(work.forward, rows * wide * forward, 1, "cast")
        self._memory(work.input, rows * out * backward, 1, "cast")
        if weight:
            self._memory(work.weight, rows * wide * weight, 1, "cast")

    def _memory(self, kinds: Kinds, num_bytes: float, kernels: int, name: str) -> None:
        kinds[name] += self.device.memory_s(num_bytes * self.job.unfused, kernels)

    def _norm(self, work: Work) -> None:
        """A norm over the hidden size with the residual sum before it."""
        values = self.spread_tokens * self.model.hidden
        self._memory(work.forward, values * 10, 2, "norm")
        self._memory(work.input, values * 14, 2, "norm")

    def _activation(self, work: Work, values: float) -> None:
        """Of `values` values of the inner width."""
        forward, backward = (6, 10) if self.model.gated else (4, 6)
        self._memory(work.forward, values * forward, 1, "activation")
        self._memory(work.input, values * backward, 1, "activation")

    def _tensor_transfers(self, work: Work) -> None:
        """Of one half of a layer: gather before it, reduce-scatter behind it; in the backward pass the gather behind
        it, while the others run under its products."""
        if self.job.tp == 1:
            return
        once = self.network.collective_s(self.job.tokens * self.model.hidden * 2, self.tensor_group)
        once *= 1 - self.job.tp_overlap
        work.forward["tensor parallel"] += 2 * once
        work.input["tensor parallel"] += once if self.job.sequence_parallel else 2 * once

    # -- halves of layers ---------------------------------------------------------------------------------------------

    @cached_property
    def attention(self) -> Work:
        """Norm, projections, rotary positions, core."""
        work, model, tp, tokens = Work(), self.model, self.job.tp, self.job.tokens
        self._norm(work)
        *before, (out, wide) = model.attention_matrices
        for rows, columns in before:
            # Latents are not cut.
            is_up = model.is_mla and columns != model.hidden
            cut = tp if is_up or not model.is_mla or (not model.q_rank and rows > model.hidden) else 1
            self._product(work, tokens, rows // cut, columns, name="mla up" if is_up else "gemm")
        self._product(work, tokens, out, wide // tp)
        if model.is_mla:
            latents = tokens * (model.q_rank + model.kv_rank)
            self._memory(work.forward, 4 * latents, 2, "norm")
            self._memory(work.input, 6 * latents, 2, "norm")
        turned = model.heads * 2 if model.is_mla else model.heads + model.kv_heads
        for kinds in (work.forward, work.input):
            self._memory(kinds, 4 * tokens * turned * model.qk_dim / tp, 2, "rope")
        self._core(work)
        self._tensor_transfers(work)
        return work

    def _core(self, work: Work) -> None:
        job, model = self.job, self.model
        sequences = job.micro_batch / job.cp
        heads, dims = model.heads // job.tp, model.qk_dim + model.v_dim
        if not job.flash:
            self._plain_core(work, sequences, heads)
            return
        # Context parallelism takes the scores piece by piece.
        sequences, length = sequences * job.cp**2, job.seq_len // job.cp
        scale = job.slow_attention
        work.forward["attention"] += scale * self.device.attention_s(sequences, length, heads, dims)
        work.input["attention"] += scale * self.device.attention_s(sequences, length, heads, dims, backward=True)

    def _plain_core(self, work: Work, sequences: float, heads: int) -> None:
        """Scores in memory: products over all positions, mask with softmax, dropout."""
        model, length = self.model, self.job.seq_len
        batch = max(1, round(sequences * heads))
        scores_s = self.device.product_s(length, length, model.qk_dim, "bf16", groups=batch)
        values_s = self.device.product_s(length, model.v_dim, length, "bf16", groups=batch)
        work.forward["attention"] += scores_s + values_s
        work.input["attention"] += 2 * (scores_s + values_s)
        self._memory(work.forward, batch * length**2 * SCORE_BYTES[0], 2, "attention")
        self._memory(work.input, batch * length**2 * SCORE_BYTES[1], 2, "attention")

    @cached_property
    def dense(self) -> Work:
        """Norm and the feed-forward network of a dense layer."""
        work = Work()
        self._norm(work)
        self._feed_forward(work, self.model.ffn)
        self._tensor_transfers(work)
        return work

    def _feed_forward(self, work: Work, width: int) -> None:
        tokens, inner = self.job.tokens, width // self.job.tp
        self._product(work, tokens, (2 if self.model.gated else 1) * inner, self.model.hidden)
        self._product(work, tokens, self.model.hidden, inner)
        self._activation(work, tokens * inner)

    @cached_property
    def routing(self) -> Work:
        """Norm, router and choice of experts, of an MoE layer."""
        work, model = Work(), self.model
        self._norm(work)
        scores = self.spread_tokens * model.experts
        for kinds in (work.forward, work.input, work.weight):
            kinds["routing"] += self.device.product_s(
                round(self.spread_tokens), model.experts, model.hidden, "float32", out_bytes=4
            )
        self._memory(work.forward, 40 * scores, 8, "routing")
        self._memory(work.input, 24 * scores, 6, "routing")
        return work

    @cached_property
    def shared(self) -> Work:
        work = Work()
        if self.model.shared_ffn:
            self._feed_forward(work, self.model.shared_ffn)
        return work

    @cached_property
    def experts(self) -> Work:
        """Rows in order, the experts of a rank, and rows back in order."""
        work, model, job = Work(), self.model, self.job
        held = max(1, model.experts // job.ep)
        sent = self.spread_tokens * model.experts_per_token
        rows = sent * job.etp * job.skew
        each, inner = max(1, round(rows / held)), model.expert_ffn // job.etp
        self._product(work, each, (2 if model.gated else 1) * inner, model.hidden, held, "grouped gemm")
        self._product(work, each, model.hidden, inner, held, "grouped gemm")
        self._activation(work, rows * inner)
        if job.etp > 1:
            # Ranks that share an expert need all rows of each other.
            once = self.network.collective_s(rows * model.hidden * 2, Group.of(job.etp, 1, self.per_node))
            work.forward["tensor parallel"] += 2 * once
            work.input["tensor parallel"] += 2 * once
        # Dispatch and combine, in both directions: rows are copied out of what arrived, and added up to what leaves.
        for kinds in (work.forward, work.input):
            self._memory(kinds, 2 * self._permuted(rows) * model.hidden, 4, "permute")
        return work

    def _permuted(self, rows: float) -> float:
        """Bytes of each way to the experts, for each value of a row."""
        model, job, tokens = self.model, self.job, self.spread_tokens
        if job.ep == 1 or job.dispatcher == "local":
            return 2 * (tokens + rows)
        if job.dispatcher == "alltoall":
            # In the order of ranks before they leave, and of experts where they arrive.
            return 2 * (tokens + rows) + (4 * rows if model.experts > job.ep else 0)
        arrived = tokens * job.etp * visited(router_key(model), job.ep)
        return 2 * (arrived + rows)

    # -- whole layers -------------------------------------------------------------------------------------------------

    @cached_property
    def dense_layer(self) -> LayerWork:
        return LayerWork(self.attention + self.dense, Work(), Work(), Exchanges(0.0, 0.0), _launches("dense"))

    @cached_property
    def moe_layer(self) -> LayerWork:
        sent = exchanges(self.job, self.hardware, self.spread_tokens)
        forward, backward = _launches("moe")
        more = self._launches_of_experts()
        awaited = LAUNCHES["moe"][0] + more if sent.out_s else 0
        launches = forward + more, backward + 2 * more
        return LayerWork(self.attention + self.routing, self.shared, self.experts, sent, launches, awaited)

    def _launches_of_experts(self) -> int:
        """Of two products forward, with the casts of both operands."""
        if not self.job.launch_per_expert:
            return 0
        return self.model.experts // self.job.ep * (6 if self.job.products in NARROW else 2)

    @cached_property
    def embedding(self) -> Work:
        work, values = Work(), self.spread_tokens * self.model.hidden
        self._memory(work.forward, 4 * values, 1, "head")
        self._memory(work.weight, 10 * values, 1, "head")
        return work

    @cached_property
    def head(self) -> Work:
        """Final norm, logits in the compute dtype and cross entropy."""
        work, model, job = Work(), self.model, self.job
        self._norm(work)
        width = model.vocab // job.tp
        products = "float32" if job.products == "float32" else "bf16"
        for kinds, shape, out_bytes in (
            (work.forward, (job.tokens, width, model.hidden), 2),
            (work.input, (job.tokens, model.hidden, width), 2),
            (work.weight, (width, model.hidden, job.tokens), self.sum_bytes),
        ):
            kinds["head"] += self.device.product_s(*shape, products, out_bytes=out_bytes)
        self._memory(work.forward, job.tokens * width * LOGIT_BYTES[0], 3, "head")
        self._memory(work.input, job.tokens * width * LOGIT_BYTES[1], 1, "head")
        return work

    @cached_property
    def mtp(self) -> Work:
        """Of an MTP module what is no layer: two norms, the projection, its use of the head."""
        work = Work()
        self._norm(work)
        self._product(work, self.job.tokens, self.model.hidden, 2 * self.model.hidden)
        return work + self.head


def _launches(half: str) -> tuple[int, int]:
    (forward, backward), (more, back) = LAUNCHES["attention"], LAUNCHES[half]
    return forward + more, backward + back


# Bytes a value: of the input forward, of the gradient backward, of the input again for the weight gradient. fp8_tensor
# reads and writes it as it is and transposed; fp8_block writes rows, and later columns out of them; mxfp8 both at once.
CASTS: dict[str, Sequence[float]] = {"fp8_tensor": (4, 4, 0), "fp8_block": (3, 6, 2), "mxfp8": (4, 4, 0)}
# A score where attention keeps them: softmax, mask and dropout read and write it.
SCORE_BYTES = (11, 12)
