"""Layouts against the rules of the config, and a search against looking at all of them."""

from contextlib import suppress
from dataclasses import replace

import pytest

from dstrain.config.check import check
from dstrain.config.hardware import HardwareConfig
from dstrain.config.load import compose
from dstrain.config.schema import Config
from dstrain.engine.recipe import steps_by_batch
from dstrain.errors import ConfigError
from dstrain.hardware import named
from dstrain.plan.job import Job, job_of
from dstrain.plan.layouts import Run, keys
from dstrain.plan.memory import rank_memory
from dstrain.plan.search import search
from dstrain.plan.simulation import simulate
from dstrain.plan.stages import Stages
from dstrain.plan.step import predict

# Eight layers of 16 experts on two nodes of four.
OVERRIDES = ["model=tiny", "model.num_layers=8", "train.sequences=16", "train.micro_batch=1", "mesh.pp=2", "mesh.ep=4"]
MACHINE = replace(named("h100_sxm"), devices_per_node=4)


def config_with(*overrides: str) -> Config:
    return compose("verify", [*OVERRIDES, "mesh.dp=1", "model.vocab_size=320", *overrides])


GIVEN = config_with()


def small(**changes: object) -> Job:
    return replace(job_of(GIVEN), **changes)


def layouts(job: Job, *batches: int, vary: tuple[str, ...] = ()) -> list[Job]:
    return list(Run(job, MACHINE, (job.sequences, *batches), frozenset(vary)).layouts())


def typed(job: Job, given: Job) -> tuple[str, ...]:
    split = [shape.dense + shape.moe for shape in Stages(job, MACHINE).shapes]
    return keys(job, given, split)


def test_every_layout_is_one_that_dstrain_trains():
    """What is typed for it keeps all rules of a config, and becomes that very job."""
    given = small()
    found = layouts(given, vary=("precision", "node_limit"))
    assert len(found) == len(set(found)) > 300
    for job in found[:: len(found) // 6]:
        config = config_with(*typed(job, given))
        check(config, job.gpus)
        split = tuple(shape.dense + shape.moe for shape in Stages(job, MACHINE).shapes) if job.pp > 1 else ()
        assert job_of(config) == replace(job, split=split)


def test_no_mesh_is_left_out():
    """Every mesh and schedule that a config can have is among the layouts, and no other."""
    given, found = small(), set()
    for pp in range(1, 9):
        for ep in range(1, 9):
            for pipeline in ("1f1b", "interleaved", "zb_1p", "zb_v", "dualpipe", "dualpipev"):
                mesh = replace(GIVEN.mesh, pp=pp, ep=ep, dp=None)
                config = replace(GIVEN, mesh=mesh, schedule=replace(GIVEN.schedule, pipeline=pipeline))
                with suppress(ConfigError):
                    check(config, 8)
                    found.add((pp, ep, pipeline if pp > 1 else "1f1b"))
    assert {(job.pp, job.ep, job.pipeline) for job in layouts(given)} == found


def test_a_ramp_leaves_out_what_its_small_batches_do_not_fill():
    given = small()
    whole, small_alone = set(layouts(given)), set(layouts(replace(given, sequences=8)))
    ramped = set(layouts(given, 8))
    both = {job for job in whole if replace(job, sequences=8) in small_alone}
    assert len(ramped ^ both) == 0
    assert 0 < len(ramped) < len(whole)


def test_only_what_is_asked_for_varies():
    given = small()
    assert {(job.products, job.model) for job in layouts(given)} == {(given.products, given.model)}
    assert {job.products for job in layouts(given, vary=("precision",))} == {"float32", "bf16", "fp8_block"}
    limits = {(job.model.groups, job.model.groups_per_token) for job in layouts(given, vary=("node_limit",))}
    assert limits == {(1, 1), (2, 1)}


def test_a_search_finds_the_quickest_of_all_that_fit():
    given = small()
    machine = replace(MACHINE, memory_gib=_median_gib(given))
    found = search(given, machine, top=5)
    every = layouts(given)
    fitting = [job for job in every if _needed_gib(job) <= machine.memory_gib]
    assert (found.looked_at, found.fitting) == (len(every), len(fitting))
    assert 0 < len(fitting) < len(every)
    assert len(found.entries) == 5
    seconds = [entry.prediction.step_s for entry in found.entries]
    assert seconds == sorted(seconds)
    assert found.entries[0].prediction.step_s <= min(simulate(job, machine).prediction.step_s for job in fitting[::50])
    for entry in found.entries:
        assert entry.job in fitting
        assert entry.memory_gib == _needed_gib(entry.job)
        assert entry.prediction == simulate(entry.job, machine).prediction


def _needed_gib(job: Job) -> float:
    return _most_gib(job, MACHINE)


def _median_gib(given: Job) -> float:
    return sorted(map(_needed_gib, layouts(given)))[len(layouts(given)) // 2]


def test_place_of_the_given_layout():
    given = small()
    found = search(given, MACHINE, top=1)
    step_s = predict(given, MACHINE).step_s
    assert found.place == 1 + sum(predict(job, MACHINE).step_s < step_s for job in layouts(given))


def test_where_nothing_fits_the_nearest_is_named():
    given = small()
    found = search(given, replace(MACHINE, memory_gib=0.5), top=5)
    least_gib = min(map(_needed_gib, layouts(given)))
    assert (found.entries, found.fitting, found.keys) == ((), 0, ())
    assert found.nearest is not None
    assert found.nearest.memory_gib == least_gib
    assert found.why.startswith("nothing fits")
    assert f"{least_gib - 0.5:.1f} GiB more" in found.why


def test_a_batch_that_no_layout_takes_is_refused():
    with pytest.raises(ConfigError, match=r"train\.sequences=3: .*8 devices"):
        search(small(sequences=3, model=replace(small().model, layers=4)), MACHINE)


def test_a_given_layout_without_a_place():
    """It leaves ranks without a micro-batch, but others don't."""
    found = search(small(sequences=3), MACHINE, top=1)
    assert found.place is None
    assert {entry.job.pp for entry in found.entries} == {8}


def test_deepseeks_own_layout_of_v3_is_the_quickest():
    """Of all that need no more memory than it does: 16 pipeline ranks of DualPipe, experts over 64 ranks."""
    config = compose("verify", ["+experiment=deepseek_v3", "precision=fp8"])
    given, machine = replace(job_of(config), dispatcher="deepep"), config.hardware
    step_s, capacity_gib = predict(given, machine).step_s, _most_gib(given, machine)
    every = Run(given, machine, tuple(steps_by_batch(config.train)), frozenset()).layouts()
    # No other transport is quicker than DeepEP's.
    found = [job for job in every if job.dispatcher in ("deepep", "local")]
    assert len(found) > 2000
    quicker = [job for job in found if predict(job, machine).step_s < step_s * (1 - 1e-9)]
    assert [job for job in quicker if _most_gib(job, machine) <= capacity_gib] == []


def _most_gib(job: Job, machine: HardwareConfig) -> float:
    return max(rank.total_gib for rank in rank_memory(job, machine))
