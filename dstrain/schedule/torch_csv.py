"""A pipeline schedule in the form that torch.distributed.pipelining (2.13) reads as `compute_only`. No torch.

A line for each rank, its ops separated by commas: `0F3` is forward of stage 0 for micro-batch 3, `B` full backward, `I`
and `W` its halves, and `(0F3;1B0)OVERLAP_F_B` a pair. `_PipelineScheduleRuntime._load_csv` checks it and adds the
transfers; what it makes of it runs.
"""

from dstrain.errors import UserError
from dstrain.schedule.pipeline import Op, Pipeline, Slot


def to_csv(pipeline: Pipeline) -> str:
    """Raises UserError for a mirrored layout: in torch, each stage is at home on one rank."""
    if pipeline.layout.mirrored:
        raise UserError(
            f"{pipeline.name} holds every stage on two ranks, which torch's pipelining cannot express. "
            "Take dualpipev: the same order on half of the ranks."
        )
    return "".join(",".join(_slot(slot) for slot in slots) + "\n" for slots in pipeline.ranks)


def _slot(slot: Slot) -> str:
    ops = [_op(op) for op in slot]
    return f"({';'.join(ops)})OVERLAP_F_B" if len(ops) > 1 else ops[0]


def _op(op: Op) -> str:
    return f"{op.stage}{op.kind.value}{op.micro_batch}"
