"""Whatever is said to make a job fit does."""

from dataclasses import replace

from dstrain.plan.cures import CHANGES, cures
from dstrain.plan.memory import rank_memory
from tests.plan.test_memory import GPU, v3


def test_a_job_that_fits_needs_no_cure() -> None:
    job = v3(pp=16, products="fp8_block", pipeline="1f1b", recompute=frozenset({"layer"}))
    assert max(rank.total_gib for rank in rank_memory(job, GPU)) < GPU.memory_gib
    assert cures(job, GPU) == ()


def test_where_the_memory_is_not_known_nothing_is_said() -> None:
    assert cures(v3(), replace(GPU, memory_gib=0.0)) == ()


def test_cures_name_keys_and_what_is_needed_then() -> None:
    job = v3(pipeline="1f1b", recompute=frozenset())
    needs = max(rank.total_gib for rank in rank_memory(job, GPU))
    lines = cures(job, replace(GPU, memory_gib=needs - 1))
    assert any(line.startswith("With train.recompute='[norm, mla_up, swiglu]' it fits") for line in lines)
    for line in lines:
        assert float(line.rsplit(": ", 1)[1].removesuffix(" GiB.")) <= needs - 1


def test_what_no_change_cures_is_said() -> None:
    (line,) = cures(v3(pipeline="1f1b"), replace(GPU, memory_gib=4.0))
    assert "Nothing tried makes it fit" in line


def test_changes_keep_the_batch_and_the_devices() -> None:
    job = v3(pipeline="dualpipe", recompute=frozenset(), micro_batch=2)
    for change in CHANGES:
        changed = change(job, GPU)
        if changed is not None:
            keys, other = changed
            assert "=" in keys
            assert (other.gpus, other.sequences, other.seq_len) == (job.gpus, job.sequences, job.seq_len)
            assert other.micro_batches * other.dp * other.micro_batch == other.sequences
