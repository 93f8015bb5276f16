"""Charts read back: well-formed, few elements, areas as long as times."""

import re
from collections import defaultdict
from xml.etree import ElementTree

import pytest

from dstrain.plan import chart
from dstrain.plan.times import Reduction
from dstrain.schedule.simulate import even_costs
from tests.plan.test_simulation import job_with, played, stretch

BOX = re.compile(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H[\d.]+z")


def areas(svg: str) -> dict[str, float]:
    """Of each class, in units of the drawing."""
    found: defaultdict[str, float] = defaultdict(float)
    for path in ElementTree.fromstring(svg).iter("path"):
        for left, upper, right, lower in BOX.findall(path.get("d", "")):
            found[path.get("class", "")] += (float(right) - float(left)) * (float(lower) - float(upper))
    return found


def test_a_bar_is_as_wide_as_the_drawing():
    widths = [float(rect.get("width", "")) for rect in ElementTree.fromstring(chart.bar([1.0, 2.0, 1.0])).iter("rect")]
    assert widths == pytest.approx([chart.WIDTH / 4, chart.WIDTH / 2, chart.WIDTH / 4])


def test_memory_by_rank():
    svg = ElementTree.fromstring(chart.memory_chart([("0", [10.0, 30.0]), ("1 to 3", [10.0, 10.0])], 80.0))
    rects = [(float(r.get("x", "")), float(r.get("y", "")), float(r.get("width", ""))) for r in svg.iter("rect")]
    assert rects[1][2] == pytest.approx(3 * rects[0][2], rel=0.01)
    assert rects[1][0] == pytest.approx(rects[0][0] + rects[0][2], abs=0.11)
    assert rects[2][1] > rects[0][1]
    assert [text.text for text in svg.iter("text")] == ["0", "40.0", "1 to 3", "20.0", "80.0 GiB"]
    line = next(path for path in svg.iter("path")).get("d", "")
    # Twice as far to the right as the longest bar.
    assert float(line[1:].split()[0]) - chart.LEFT == pytest.approx(2 * (rects[0][2] + rects[1][2]), rel=0.01)


def test_areas_of_a_schedule_are_times():
    step = played(job_with("1f1b", 4, 8), stretch(2, 4, 0), end=Reduction(0.0, 0.0, 7.0))
    svg, legend = chart.schedule_chart(step)
    found = areas(svg)
    whole = found["idle"]
    assert found["forward"] / whole == pytest.approx(8 * 2 / step.step_ms, rel=0.03)
    assert found["backward"] / whole == pytest.approx(8 * 4 / step.step_ms, rel=0.03)
    assert found["update"] / whole == pytest.approx(7 / step.step_ms, rel=0.03)
    assert [style for _, style in legend] == ["forward", "backward", "update", "idle"]


def test_waits_and_reductions_are_shown():
    times = {"send_ms": 0.1, "end": Reduction(9.0, 30.0, 0.0)}
    svg, legend = chart.schedule_chart(played(job_with("zb_v", 4, 12, overlap=True), even_costs(2, 1.5), **times))
    assert {"waits", "reduce", "gather", "forward later"} <= set(areas(svg))
    assert ("paler: a later stage of the rank", "forward later") in legend


def test_large_schedules_are_few_elements():
    """A path for each colour, in which a slot takes a few bytes."""
    svg, _ = chart.schedule_chart(played(job_with("1f1b", 16, 512), stretch(1, 2, 0)))
    assert len(list(ElementTree.fromstring(svg).iter())) < 60
    assert len(svg) < 30 * 16 * 512 * 2
    assert areas(svg)["backward"] == pytest.approx(2 * areas(svg)["forward"], rel=0.1)
