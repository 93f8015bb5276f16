"""What a layer keeps of a micro-batch for its backward pass, tensor by tensor, and what that pass needs beside it.

Counted as autograd keeps it: a product keeps its input, a norm its input, attention its queries, keys, values and
output, SwiGLU its input. A tensor that two of them keep is there once. What recomputation forgets comes back for one
layer at a time, and is part of the working memory then.

S tokens of a micro-batch where tensor parallelism spreads them, T where it spreads widths; D hidden, F inner width,
R rows that come to the experts of a rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from dstrain.plan.job import Job
from dstrain.plan.network import router_key, visited

# Scales: FP32 for 128 values of fp8_block, as UE8M0 for 32 of mxfp8.
FP8_BYTES = {"fp8_block": 1 + 4 / 128, "mxfp8": 1 + 1 / 32, "fp8_tensor": 1.0}
# Of the input of attention's output projection, kept in 12 bits (DeepSeek-V3 section 3.3.2).
E5M6_BYTES = 1.5 + 4 / 128
# Of a row: its number (int64) and its weight (FP32).
ROW_BYTES = 12
# Of a token and expert: logits, scores and their gradients' way back in FP32, and what chooses among them.
ROUTER_BYTES = 12
# FP32: sum of exponentials of each query and head.
SOFTMAX_BYTES = 4


@dataclass(frozen=True)
class Library:
    """In what frameworks differ, memory being all they agree on otherwise."""

    name: str
    # Of allocated memory: reserved beside it, in pieces that nothing fits into.
    fragmentation: float
    # Cross entropy keeps logits as they come and writes the gradient over them; otherwise FP32 log-probabilities are
    # kept, and gradients stand beside them.
    overwrites_logits: bool = True
    # Of the logits that it has in FP32 at once.
    logit_chunk_bytes: int = 0
    # An empty gradient for each shape of weights lives on: products add to the sum themselves, and autograd wants one.
    placeholders: bool = False
    # The output of a norm is forgotten with the norm, instead of what lies within it.
    forgets_normed: bool = False
    # Values are as wide as keys in the core of attention, and so is its output.
    pads_values: bool = False
    # FP8 products keep inputs in FP8, and quantise a weight once a step, both ways round.
    keeps_fp8: bool = True
    # With them SwiGLU's input is kept in FP8 and its output computed again; attention's output for the product after it
    # in E5M6; and rows of tokens as they came, one for all experts of a rank.
    keeps_narrow: bool = False
    # Outputs and gradients that a stage is ready to receive beside those in use.
    receives_ahead: int = 0
    # Every micro-batch has a buffer for its gradient, and its output stays until then (torch.distributed.pipelining).
    keeps_outputs: bool = False
    # What travels is packed, beside what it is packed from.
    packs: bool = False
    # Cosines and sines are kept by every layer, for queries and for keys.
    keeps_rotation: bool = False

    @staticmethod
    def of(source: str) -> "Library":
        """Of a published run, by where it was published: Megatron-Core where nothing else is known."""
        return TORCHTITAN if "torchtitan" in source or "llm-foundry" in source else MEGATRON


# Segments that grow (host.py) lose the rest of a page at the end of a block: assumed.
DSTRAIN = Library(
    "dstrain",
    0.02,
    logit_chunk_bytes=32 * 2**20,
    pads_values=True,
    keeps_narrow=True,
    receives_ahead=2,
    packs=True,
    keeps_rotation=True,
)
# Segments of fixed sizes: reserved over allocated memory of seven configurations of Megatron-LM on B200, 1.03 to 1.07
# (SimuMax, docs/b200/b200_release_v1.2_summary.json). Cross entropy is Transformer Engine's (parallel_cross_entropy).
MEGATRON = Library("Megatron-Core", 0.05, placeholders=True, forgets_normed=True)
# FP8 products of torchao take, and keep, BF16.
TORCHTITAN = Library("torchtitan", 0.05, overwrites_logits=False, keeps_fp8=False, keeps_outputs=True)

# FP32: a logit's log-probability between the passes, and the gradients of two steps behind it in the backward pass.
LOG_PROBABILITY_BYTES, LOG_PROBABILITY_WORK_BYTES = 4, 8


@dataclass(frozen=True)
class Kept:
    """Bytes of a micro-batch."""

    # From its forward pass until the gradient of its input is there.
    live: float
    # From there until the weight gradient, where that is put off: inputs of products and gradients of their outputs.
    pending: float
    # The most that its backward pass needs beside.
    working: float


@dataclass(frozen=True)
class Saved:
    """A tensor that the backward pass wants."""

    num_bytes: float
    # Names of `Job.recompute` that forget it.
    forgotten_by: frozenset[str] = frozenset()


def _saved(num_bytes: float, forgotten_by: str = "") -> Saved:
    return Saved(num_bytes, frozenset(forgotten_by.split()))


class Activations:
    """Of a job's layers, embedding and head. `composed`: norms are composed of FP32 operations, as on a CPU."""

    def __init__(self, job: Job, library: Library, *, composed: bool = False):
        self.job, self.library, self.model = job, library, job.model
        self.composed = composed
        self.value = 4 if job.products == "float32" else 2
        narrow = FP8_BYTES.get(job.products) if library.keeps_fp8 else None
        self.is_narrow = narrow is not None
        # Of a value that a product keeps, and one that SwiGLU keeps.
        self.input = narrow or self.value
        self.gated = self.input if library.keeps_narrow else self.value
        self.repeats_swiglu = self.is_narrow and library.keeps_narrow
        self.spread = job.tokens / job.tp if job.sequence_parallel and job.tp > 1 else job.tokens
        # A tensor of the residual stream, in elements.
        self.stream = self.spread * self.model.hidden

    # -- what a layer keeps -------------------------------------------------------------------------------------------

    def _norm(self, elements: float, *, forgotten: str = "") -> Iterator[Saved]:
        """The input of a norm, which the residual stream passes as well."""
        if self.composed and "norm" not in self.job.recompute:
            # x and x / rms in FP32; x itself nobody needs.
            yield _saved(elements * 8, forgotten)
        else:
            yield _saved(elements * self.value, forgotten)

    def _normed(self) -> str:
        """What forgets the output of a norm, a product's input."""
        return "norm sac" if self.library.forgets_normed else "sac"

    @cached_property
    def attention(self) -> list[Saved]:
        """From the input of the layer to what is added to it."""
        job, model = self.job, self.model
        tokens, heads = job.tokens, model.heads / job.tp
        whole = "layer attend"
        found = [_saved(self.stream * self.input, f"{self._normed()} {whole}")]
        # What is run again begins with the stream as it was.
        again = job.recompute & {"layer", "attend"}
        found += [_saved(self.stream * self.value)] if again else self._norm(self.stream)
        if model.is_mla:
            found += self._latents(whole)
        queries, keys = heads * model.qk_dim, model.kv_heads / job.tp * model.qk_dim
        v_dim = model.qk_dim if self.library.pads_values else model.v_dim
        values = model.kv_heads / job.tp * v_dim
        up = f"mla_up core {whole}" if model.is_mla else whole
        found.append(_saved(tokens * queries * self.value, f"mla_up {whole}"))
        found.append(_saved(tokens * keys * self.value, f"mla_up sac {whole}"))
        found.append(_saved(tokens * values * self.value, f"mla_up {whole}"))
        if job.flash:
            found.append(_saved(tokens * heads * SOFTMAX_BYTES, f"mla_up core {whole}"))
        else:
            # Scores before and after dropout, and its mask (arXiv:2205.05198, 5 a s^2 b).
            found.append(_saved(tokens * heads * job.seq_len * 5, f"core {whole}"))
        padded = self.library.pads_values and model.v_dim < model.qk_dim
        if padded or self.is_narrow or job.cp > 1:
            # Attention's own output is not what the projection keeps: it is cut, rounded, or sent on to the ranks that
            # hold the tokens.
            found.append(_saved(tokens * heads * v_dim * self.value, up))
        narrow = E5M6_BYTES if self.repeats_swiglu and job.products == "fp8_block" else self.input
        found.append(_saved(tokens * heads * model.v_dim * narrow, whole))
        return found

    def _latents(self, whole: str) -> Iterator[Saved]:
        """Of MLA: what is compressed, before and behind the norm; the latents are not cut by tensors."""
        model = self.model
        for width in (model.q_rank, model.kv_rank):
            if width:
                yield from self._norm(self.spread * width, forgotten=whole)
                yield _saved(self.spread * width * self.input, f"{self._normed()} {whole}")
        yield _saved(self.spread * model.rope_dim * self.value, whole)
        if self.library.keeps_rotation:
            yield _saved(self.spread * model.rope_dim * 4, f"mla_up {whole}")
            yield _saved(self.spread * model.rope_dim * 4, whole)

    def ffn(self, width: float, *, forgotten: str) -> list[Saved]:
        """A dense network of that inner width, its input apart."""
        elements = self.job.tokens * width / self.job.tp
        found = [_saved(elements * self.gated, forgotten)]
        if self.model.gated:
            found.append(_saved(elements * self.gated, f"sac {forgotten}"))
        if not self.repeats_swiglu:
            found.append(_saved(elements * self.input, f"swiglu sac {forgotten}"))
        return found

    def second(self, whole: str) -> list[Saved]:
        """The residual stream before the second half, and its norm; `whole` forgets the norm's input."""
        return [
            *self._norm(self.stream, forgotten=f"{whole} sac"),
            _saved(self.stream * self.input, f"{self._normed()} layer"),
        ]

    @cached_property
    def dense_layer(self) -> list[Saved]:
        found = [*self.attention, *self.second("layer"), *self.ffn(self.model.ffn, forgotten="layer")]
        if "sac" in self.job.recompute and self.job.unfused > 1:
            # The last product's output is kept because it is one; a compiler sees that nobody wants it.
            found.append(_saved(self.stream * self.value))
        return found

    @cached_property
    def moe_layer(self) -> list[Saved]:
        job, model = self.job, self.model
        # Norm and router belong to the first half.
        found = [*self.attention, *self.second("layer attend")]
        found.append(_saved(self.spread * model.experts * ROUTER_BYTES, "layer attend"))
        if self.is_narrow:
            # The router takes the norm's output as it is.
            found.append(_saved(self.stream * self.value, "norm layer attend"))
        if "layer" in job.recompute and self.library is DSTRAIN:
            # The shared expert is a piece of its own: the stream and its norm before it.
            found.append(_saved(2 * self.stream * self.value))
        found += self.ffn(model.shared_ffn, forgotten="layer") if model.shared_ffn else []
        return found + self.experts

    @cached_property
    def rows(self) -> float:
        """That come to the experts of the most loaded rank."""
        return self.spread * self.model.experts_per_token * self.job.etp * self.job.skew

    @cached_property
    def experts(self) -> list[Saved]:
        job, model = self.job, self.model
        elements = self.rows * model.expert_ffn / job.etp
        whole = "layer experts moe"
        found = [_saved(self._arrived, "moe"), _saved(self.rows * ROW_BYTES)]
        found.append(_saved(elements * self.gated * (2 if model.gated else 1), whole))
        if not self.repeats_swiglu:
            found.append(_saved(elements * self.input, f"swiglu {whole}"))
        return found

    @property
    def _arrived(self) -> float:
        """Rows that experts take; kept as they came, they are fewer, but what runs again as a whole takes all."""
        taken = self.rows * self.model.hidden * self.input
        if not self.repeats_swiglu:
            return taken
        shared = self.job.dispatcher != "alltoall"
        places = visited(router_key(self.model), self.job.ep) if shared else self.model.experts_per_token
        came = taken * places / self.model.experts_per_token
        return came + (taken if self.job.recompute & {"layer", "experts"} else 0.0)

    # -- sums ---------------------------------------------------------------------------------------------------------

    def sums(self, saved: list[Saved]) -> tuple[float, float]:
        """What is kept, and what comes back when the backward pass needs it."""
        names = self.job.recompute
        total = sum(one.num_bytes for one in saved)
        kept = sum(one.num_bytes for one in saved if not one.forgotten_by & names)
        return kept, total - kept

    @cached_property
    def dense(self) -> Kept:
        if not (self.model.dense_layers or not self.model.experts):
            return Kept(0.0, 0.0, 0.0)
        kept, forgotten = self.sums(self.dense_layer)
        inner = self.job.tokens * self.model.ffn / self.job.tp * self.value
        # Gradients of the stream and of the activation's input.
        working = self.stream * self.value + inner * (2 if self.model.gated else 1) + self._gathered
        weights = [*self._attention_weights, self.model.hidden * self.model.ffn * self.model.matrices_of_ffn]
        pending = self._pending(self.model.ffn)
        return Kept(kept, pending, working + forgotten + self._weight_gradient(weights))

    @cached_property
    def moe(self) -> Kept:
        model, job = self.model, self.job
        if not model.experts:
            return Kept(0.0, 0.0, 0.0)
        kept, forgotten = self.sums(self.moe_layer)
        rows = self.rows * model.hidden * self.value
        # Gradients of the stream, and of rows before and behind a step of their way.
        working = 2 * self.stream * self.value + 2 * rows + self._gathered
        held = model.experts / job.ep
        weights = [*self._attention_weights, held * model.hidden * model.expert_ffn / job.etp * 2]
        experts = self.rows * (model.expert_ffn / job.etp * 3 + model.hidden) * self.input
        pending = self._pending(model.shared_ffn) + experts + self._arrived
        return Kept(kept, pending, working + forgotten + self._weight_gradient(weights))

    @property
    def _gathered(self) -> float:
        """Where tensor parallelism spreads tokens, a gradient and an input of all of them."""
        gathers = self.job.sequence_parallel and self.job.tp > 1
        return 2 * self.job.tokens * self.model.hidden * self.value if gathers else 0.0

    @property
    def _attention_weights(self) -> list[float]:
        return [out * wide for out, wide in self.model.attention_matrices]

    def _weight_gradient(self, sizes: list[float]) -> float:
        """The largest one, before it is added to the sum: FP32 of FP8 products."""
        if self.library.placeholders:
            return 0.0
        return max(sizes) / self.job.tp * (4 if self.is_narrow else self.value)

    def _pending(self, width: float) -> float:
        """Inputs of a layer's products and the gradients of their outputs, quantised alike, routed experts without;
        its dense network is `width` wide."""
        model = self.model
        outputs = sum(out for out, _ in model.attention_matrices)
        inputs = sum(wide for _, wide in model.attention_matrices[1:] if wide != model.hidden)
        inner = width * (3 if model.gated else 2)
        # The stream's norm before each half, the gradient behind the second.
        return (self.job.tokens * (outputs + inputs + inner) / self.job.tp + 3 * self.stream) * self.input

    # -- ends of the model --------------------------------------------------------------------------------------------

    @cached_property
    def logits(self) -> float:
        """Of a micro-batch, kept for the backward pass; the head and each MTP module have as many."""
        return self._logit_count * (self.value if self.library.overwrites_logits else LOG_PROBABILITY_BYTES)

    @cached_property
    def holes(self) -> float:
        """Where logits were before their log-probabilities: nothing that follows has their size."""
        return 0.0 if self.library.overwrites_logits else self._logit_count * self.value

    @property
    def _logit_count(self) -> float:
        return self.job.tokens * self.model.vocab / self.job.tp

    @cached_property
    def head(self) -> Kept:
        """The last norm and the head; logits are counted apart, until their gradient waits for the weight's."""
        gradient = self._logit_count * self.value
        table = 0.0 if self.library.placeholders else self.model.embedding_weights / self.job.tp * self.value
        if self.library.overwrites_logits:
            work = max(min(self._logit_count * 4, self.library.logit_chunk_bytes), table)
        else:
            work = max(self._logit_count * LOG_PROBABILITY_WORK_BYTES, gradient + table)
        pending = gradient + self.stream * self.value
        return Kept(self._last_norm, pending, work + self.stream * self.value + self._gathered)

    @cached_property
    def mtp(self) -> float:
        """What a module keeps beside its layer and its logits: it joins two normed streams before, and has a norm of
        its own behind."""
        return 2 * (self._last_norm - self.stream * self.value + self.stream * self.input) + self._last_norm

    @property
    def _last_norm(self) -> float:
        return sum(one.num_bytes for one in self._norm(self.stream)) + self.stream * self.value

    @cached_property
    def embedding(self) -> Kept:
        """Its gradient is as large as the table, at the end of a backward pass."""
        return Kept(0.0, 0.0, self.model.embedding_weights / self.job.tp * self.value)
