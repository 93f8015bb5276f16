"""The whole bench on a small network, as a user starts it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.bench.case import parse
from dstrain.bench.fabric import measure
from dstrain.bench.launch import Launch
from dstrain.bench.messages import Prepare, Run
from dstrain.bench.testbed import Fabric, Testbed, remove_leftovers
from dstrain.bench.workload import Workload
from dstrain.config.bench import FabricRoot
from dstrain.errors import UserError
from tests.bench.lab import namespaces, needs_testbed

ROOT = Path(__file__).parents[2]
TINY = ["hidden_size=128", "tokens=64", "num_experts=8", "experts_per_token=3", "micro_batches=2", "rounds=1"]


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dstrain", "bench", "fabric", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)


@needs_testbed
def test_two_points_from_outside(tmp_path: Path):
    remove_leftovers()
    before = namespaces()
    done = bench(
        tmp_path,
        *TINY,
        "steps=1",
        "cases=[alltoall/bfloat16/block, hierarchical/fp8/2, rank/fp8/3]",
        "points=[{flat_ratio: 1}, {ranks_per_node: 1}]",
        "burst_kib=128",
        "out=here",
    )
    assert done.returncode == 0, done.stderr
    assert "emulated compute" in done.stdout
    assert "hierarchical/fp8/2 is left out: with one rank on each node" in done.stdout
    assert "rank/fp8/3 is left out: a step has micro_batches=2, no more can be in flight" in done.stdout
    assert namespaces() == before
    first, second = json.loads((tmp_path / "here" / "result.json").read_text())["points"]
    assert [case["name"] for case in first["cases"]] == ["alltoall/bfloat16/block", "hierarchical/fp8/2"]
    assert [case["name"] for case in second["cases"]] == ["alltoall/bfloat16/block"]
    for case in first["cases"]:
        # So short a step has few bytes beside those of barriers.
        assert 0.99 < case["over_theory"] < 1.05
        assert case["step_ms"] >= first["nominal_compute_ms"]
    assert (tmp_path / "here" / "picture.svg").is_file()


@needs_testbed
def test_pipelines_from_outside(tmp_path: Path):
    cases = "cases=[alltoall/bfloat16/1f1b+block, alltoall/bfloat16/dualpipev+overlap]"
    sizes = ["pp=2", "num_blocks=4", "micro_batches=4", "steps=1", "burst_kib=128"]
    done = bench(tmp_path, *TINY[:4], "rounds=1", cases, *sizes, "out=here")
    assert done.returncode == 0, done.stderr
    assert "pipelines of 2 ranks inside nodes, experts spread over all nodes" in done.stdout
    (point,) = json.loads((tmp_path / "here" / "result.json").read_text())["points"]
    for case, peaks in zip(point["cases"], ([2, 1], [5, 5]), strict=True):
        # All that crosses the network are tokens.
        assert 0.99 < case["over_theory"] < 1.05
        assert case["step_ms"] >= point["nominal_compute_ms"]
        assert case["played"]["as_table"]
        assert case["played"]["peak_live"] == case["played"]["table_peak_live"] == peaks
    assert point["cases"][0]["over_simulated"] is None
    # Bubbles, and what a transfer leaves exposed.
    assert point["cases"][1]["played"]["simulated_ms"] > point["nominal_compute_ms"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("rank/fp8/2", "cases=rank/fp8/2: pp=2 cuts the model into stages"),
        ("megatron", "cases=megatron: pp=2 cuts the model into stages"),
        (
            "rank/fp8/dualpipev",
            "cases=rank/fp8/dualpipev: dualpipev on 2 pipeline ranks needs at least 4 micro-batches",
        ),
    ],
)
def test_cases_that_a_pipeline_cannot_have(tmp_path: Path, case: str, message: str):
    done = bench(tmp_path, "pp=2", "num_blocks=4", "micro_batches=3", f"cases=[{case}]")
    assert done.returncode == 2
    assert done.stderr.startswith(f"dstrain: {message}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@needs_testbed
def test_real_compute_and_a_measured_order():
    config = FabricRoot(
        ranks_per_node=1, hidden_size=64, tokens=32, num_experts=4, experts_per_token=2, micro_batches=2, rounds=1
    )
    point = measure(
        FabricRoot(**{**vars(config), "compute": "real", "order": "measured", "steps": 1}),
        [parse("rank")],
        {},
        lambda _: None,
    )
    assert point.compute_ms > 0
    assert point.cases[0].step_ms > 0
    assert not point.is_void


def ask(spoil: Callable[[Launch], object]) -> None:
    """Two ranks, something that goes wrong, and a request."""
    with Testbed(Fabric(nodes=2)) as testbed, Launch(testbed, 1, 60) as launch:
        spoil(launch)
        launch.request(Prepare(Workload(2, 1, 64, 4, 2, 8, 1, 1), 0.0))


@needs_testbed
def test_a_rank_that_fails_ends_the_bench_with_its_traceback():
    impossible = Prepare(Workload(2, 1, 64, 4, 2, 0, 0, 0), None)
    with pytest.raises(RuntimeError, match="rank . of the bench failed:\nTraceback"):
        ask(lambda launch: (launch.request(impossible), launch.request(Run(None, (), 1))))


@needs_testbed
def test_a_rank_that_dies_is_noticed():
    with pytest.raises(RuntimeError, match=r"rank 1 of the bench died without a word \(SIGKILL\)"):
        ask(lambda launch: launch.processes[1].kill())


@needs_testbed
def test_ranks_that_are_too_slow_are_named():
    with Testbed(Fabric(nodes=2)) as testbed, pytest.raises(UserError, match="Ranks 0, 1 .* Raise timeout_s"):
        Launch(testbed, 1, 0.01).__enter__()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rate_mbit=0", "rate_mbit=0.0: it must be above 0"),
        ("rate_mbit=inf", "rate_mbit=inf: it must be finite"),
        ("nodes=1", "nodes=1: a network needs two nodes"),
        ("cases=[hierarchical/fp9]", "cases=hierarchical/fp9: there is no such case"),
        ("num_experts=6", "num_experts=6: 2 nodes of 2 ranks hold equally many experts"),
        ("points=[{route_nodes: 3}]", "route_nodes=3: there are 2 nodes"),
        ("suite=huge", "suite=huge: there is no such choice. Choose one of bytes, pipeline, quick, release, standing."),
        ("pp=3", "pp=3: nodes of 2 ranks hold whole pipelines"),
        ("pp=2", "num_blocks=2: pp=2 ranks hold up to two stages each"),
        ("cases=[rank/fp8/zb_v]", "cases=rank/fp8/zb_v: a pipeline has several ranks"),
        ("ranks_per_nod=5", "ranks_per_nod=5: there is no such key. Did you mean ranks_per_node?"),
    ],
)
def test_wrong_input(tmp_path: Path, override: str, message: str):
    done = bench(tmp_path, override)
    assert done.returncode == 2
    assert done.stderr.startswith(f"dstrain: {message}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_figures_are_not_written_over(tmp_path: Path):
    (tmp_path / "taken" / "result.json").parent.mkdir()
    (tmp_path / "taken" / "result.json").write_text("{}")
    done = bench(tmp_path, "out=taken")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dstrain: out=taken: it is there already")


def test_it_starts_its_own_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = bench(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "run it as one process, without torchrun" in done.stderr
