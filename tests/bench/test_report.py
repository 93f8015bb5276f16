"""Figures as JSON, as a table and as a picture."""

import io
import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from dstrain.bench import picture
from dstrain.bench.fabric import CaseFigures, PointFigures
from dstrain.bench.played import Played
from dstrain.bench.report import Machine, Report, show, speedups
from dstrain.config.bench import FabricRoot

SVG = "{http://www.w3.org/2000/svg}"
# No letter of the pictures' font is wider on average.
LETTER_PIXELS = 7.5


def case(name: str, step_ms: float, wire_ms: float) -> CaseFigures:
    return CaseFigures(
        name=name,
        step_ms=step_ms,
        fastest_ms=step_ms - 10,
        slowest_ms=step_ms + 10,
        wire_ms=wire_ms,
        bound_ms=max(1053.0, wire_ms),
        exposed_ms=step_ms - 1053.0,
        waited_ms=None if name == "megatron" else 50.0,
        host_ms=20.0,
        main_cpu_ms=30.0,
        cpu_ms=300.0,
        line_bytes=wire_ms * 25e3,
        sent_bytes=wire_ms * 24e3,
        theory_bytes=None if name == "megatron" else round(wire_ms * 24e3 / 1.001),
    )


@pytest.fixture
def point() -> PointFigures:
    cases = [
        case("megatron", 3592.0, 2115.0),
        case("alltoall/bfloat16/block", 3174.0, 2115.0),
        case("hierarchical/bfloat16/2", 1170.0, 711.0),
    ]
    return PointFigures(FabricRoot(), 1053.0, 1060.0, 1055.0, 2106.0, cases, {"torchtitan": "it is not installed"})


@pytest.fixture
def report(point: PointFigures) -> Report:
    busy = replace(
        point, config=replace(point.config, route_nodes=1, loopback_mbit=640.0), slept_ms=1100.0, compute_ms=1200.0
    )
    return Report(Machine("A processor", 2, "6.18", "2.13", 0.5), {}, points=[point, busy])


def shown(report: Report, number: int) -> str:
    written = io.StringIO()
    show(report.points[number], report.machine, Console(file=written, width=160))
    return written.getvalue()


def test_speedups_against_the_own_baseline_and_peers(point: PointFigures):
    assert speedups(point.cases[2], point) == {
        "megatron": pytest.approx(3.07, abs=0.01),
        "alltoall/bfloat16/block": pytest.approx(2.713, abs=0.001),
    }
    assert set(speedups(point.cases[0], point)) == {"alltoall/bfloat16/block"}


def test_json_holds_figures_and_what_follows_from_them(report: Report, tmp_path):
    report.save(tmp_path / "new" / "folder")
    content = json.loads((tmp_path / "new" / "folder" / "result.json").read_text())
    assert content["machine"]["cores"] == 2
    assert [found["is_void"] for found in content["points"]] == [False, True]
    found = content["points"][0]["cases"][2]
    assert found["over_bound"] == pytest.approx(1170 / 1053)
    assert found["over_theory"] == pytest.approx(1.001, abs=1e-4)
    assert found["times_as_fast_as"]["megatron"] > 3


def test_the_table_says_what_was_measured_and_what_was_not(report: Report):
    text = shown(report, 0)
    assert "2 nodes x 2 ranks, 200 Mbit" in text
    assert "emulated compute 1053 ms (slept 1055 ms, alone 1060 ms) a step" in text
    assert "A processor, 2 cores, load 0.5" in text
    assert "torchtitan is left out: it is not installed" in text
    assert "3.07" in text
    assert "void" not in text


def test_wrong_bytes_are_named(report: Report, point: PointFigures):
    assert "Bytes are within 1% of theory" in shown(report, 0)
    point.cases[1] = replace(point.cases[1], theory_bytes=round(point.cases[1].sent_bytes / 1.02))
    assert "alltoall/bfloat16/block sent 1.0200 times what its routes demand" in shown(report, 0)
    assert "within 1%" not in shown(report, 0)


def test_a_busy_machine_makes_figures_void(report: Report):
    assert "sleeps took 4.5% longer than they should, a step without transfers 14.0%" in shown(report, 1)


def test_the_picture_shows_every_case_inside_its_frame(report: Report):
    report.points[0].cases.append(case("hierarchical/bfloat16/dualpipev+overlap", 1250.0, 711.0))
    root = ElementTree.fromstring(picture.draw(report))
    texts = [(text.text, float(text.get("x")), text.get("text-anchor")) for text in root.iter(f"{SVG}text")]
    assert [text for text, _, _ in texts].count("hierarchical/bfloat16/2") == 2
    for text, x, anchor in texts:
        width = len(text) * LETTER_PIXELS
        assert x - width * (anchor == "end") > 0
        assert x + width * (anchor == "start") < picture.WIDTH
    bars = [(float(bar.get("x")), float(bar.get("width"))) for bar in root.iter(f"{SVG}rect") if bar.get("x")]
    assert max(x + width for x, width in bars) <= picture.MARGIN + picture.LABELS + picture.SCALE + 0.1
    assert min(width for _, width in bars) >= 0


def test_a_pipeline_is_held_against_its_own_table(report: Report, point: PointFigures):
    blocking, plain, pairs = (
        replace(case(f"rank/fp8/{order}", step_ms, 900.0), played=own)
        for order, step_ms, own in (
            ("1f1b+block", 2000.0, Played(None, 1060.0, 3.0, 0.7, True, [2, 1], [2, 1])),
            ("1f1b", 1600.0, Played(1500.0, 1060.0, 3.0, 0.7, True, [2, 1], [2, 1])),
            ("dualpipev+overlap", 1250.0, Played(1200.0, 1060.0, 3.0, 0.7, False, [6, 5], [5, 5])),
        )
    )
    report.points[0] = replace(point, config=replace(point.config, pp=2), cases=[blocking, plain, pairs])
    text = " ".join(shown(report, 0).split())
    assert "pipelines of 2 ranks inside nodes, experts spread over all nodes" in text
    assert "dualpipev+overlap 1200 1060 3.0 0.7 1.042 differs from table 6, 5 5, 5" in text
    assert "1f1b+block 1060 3.0 0.7 equals table 2, 1 2, 1" in text
    assert speedups(pairs, report.points[0]) == {"rank/fp8/1f1b+block": 1.6, "rank/fp8/1f1b": 1.28}
    found = json.loads(report.as_json())["points"][0]["cases"]
    assert [each["over_simulated"] for each in found] == [None, 1600.0 / 1500.0, 1250.0 / 1200.0]
    assert found[2]["played"]["as_table"] is False
