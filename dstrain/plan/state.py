"""What a rank holds for the whole of a run: weights, gradients, master weights and moments.

Counted as the engine packs them (engine/sharding.py), but for the padding of its buckets: experts are shared by the
ranks that hold the same ones, everything else by all that read other tokens.
"""

from collections.abc import Iterator, Sequence

from dstrain.plan.activations import DSTRAIN, FP8_BYTES, Library
from dstrain.plan.job import Job
from dstrain.plan.stages import Shape, weights_of

# Of an 8-bit moment: a scale in FP32 for 256 values.
INT8_BYTES = 1 + 4 / 256


class State:
    """Of the ranks of a job, each of whose stages `copies` ranks of a pipeline hold."""

    def __init__(self, job: Job, library: Library, copies: int, *, is_gpu: bool):
        self.job, self.library, self.copies, self.is_gpu, self.model = job, library, copies, is_gpu, job.model
        # Bytes of a weight.
        self.value = 4 if job.products == "float32" else 2

    def sizes(self, shapes: Sequence[Shape]) -> tuple[float, float, float]:
        """Bytes of weights, gradients and optimiser of a rank that holds these stages."""
        job = self.job
        moment = INT8_BYTES if job.moment_bytes == 1 else job.moment_bytes
        weights = gradients = optimizer = 0.0
        for count, products, ranks in self.parameters(shapes):
            owned = count / (ranks if job.zero else 1)
            optimizer += owned * (job.master_bytes + 2 * moment)
            gradients += (owned if job.zero == 3 else count) * job.grad_bytes
            # Sharded weights are the master weights.
            weights += (0.0 if job.zero == 3 else count * self.value) + products * self._fp8_copies
        if self.library is DSTRAIN and job.master_bytes:
            # Weights of routers are FP32, and their own masters.
            routers = sum(map(self.moe_layers, shapes)) * self.model.experts * self.model.hidden
            weights += routers * (job.master_bytes - self.value)
            optimizer -= routers / (job.dp * self.copies) * job.master_bytes
        return weights, gradients, optimizer

    @property
    def _fp8_copies(self) -> float:
        """Bytes of a weight of FP8 products beside it: as it is and transposed."""
        held = self.job.products in FP8_BYTES and self.library.keeps_fp8 and self.is_gpu
        return 2.0 if held else 0.0

    def parameters(self, shapes: Sequence[Shape]) -> Iterator[tuple[float, float, int]]:
        """Of a rank: parameters, those of them in products that may be FP8, and the ranks that share their state."""
        job, copies = self.job, self.copies
        experts = sum(self._experts(shape) for shape in shapes)
        yield experts, experts, job.expert_dp * copies
        dense = [self._dense(shape) for shape in shapes]
        yield sum(all_ for all_, _ in dense), sum(products for _, products in dense), job.dp * job.cp * copies
        # An embedding that both ends of the model use is shared by the ranks of both.
        apart = self._embeds_at_end and job.pp > 1 and copies == 1 and not _is_whole(shapes)
        for name in set().union(*map(self._tables, shapes)):
            ends = 2 if name == "embedding" and apart else 1
            yield self.model.embedding_weights / job.tp, 0.0, job.dp * job.cp * copies * ends

    @property
    def _embeds_at_end(self) -> bool:
        return self.model.tied or self.model.mtp > 0

    def _tables(self, shape: Shape) -> set[str]:
        """The embedding and the head that a stage uses; MTP modules use both."""
        ends = shape.is_last or shape.mtp > 0
        found = {"embedding"} if shape.is_first or shape.mtp or (ends and self.model.tied) else set()
        return found | ({"head"} if ends and not self.model.tied else set())

    def moe_layers(self, shape: Shape) -> int:
        """With those of MTP modules, which are like the last layer."""
        return shape.moe + (shape.mtp if self.model.experts else 0)

    def _experts(self, shape: Shape) -> float:
        job, model = self.job, self.model
        return self.moe_layers(shape) * model.experts * model.expert_weights / (job.ep * job.etp)

    def _dense(self, shape: Shape) -> tuple[float, float]:
        """Everything but experts and tables; and of it, what is multiplied outside of the router."""
        job, model = self.job, self.model
        moe = self.moe_layers(shape)
        router = model.experts * model.hidden
        norms = (shape.dense + moe) * model.norm_weights + (model.hidden if shape.is_last else 0)
        products = (shape.dense * weights_of(model, is_moe=False) + moe * weights_of(model, is_moe=True)) - (
            (shape.dense + moe) * model.norm_weights + moe * router
        )
        products += shape.mtp * 2 * model.hidden**2
        norms += shape.mtp * 3 * model.hidden
        return products / job.tp + moe * router + norms, products / job.tp


def _is_whole(shapes: Sequence[Shape]) -> bool:
    """Whether a rank has both ends of the model."""
    return any(shape.is_first for shape in shapes) and any(shape.is_last for shape in shapes)
