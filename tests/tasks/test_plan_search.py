"""`dstrain plan search` as a user meets it."""

import re
from functools import partial

import pytest

from dstrain.config import load

# Few layouts, and few micro-batches to play.
RUN = ("hardware=h100_sxm", "hardware.nodes=1", "hardware.devices_per_node=4", "train.sequences=8", "top=3")


@pytest.fixture
def search(command):
    return partial(command, "plan", "search", *RUN)


def test_the_best_layouts(search):
    status, out, _ = search()
    assert status == 0
    places = re.findall(r"^ *(\d) +(\d+) +(\d+) +(\d+) ", out, re.MULTILINE)
    assert [place for place, *_ in places] == ["1", "2", "3"]
    assert {int(pp) * int(ep) * int(dp) for _, pp, ep, dp in places} == {4}
    assert re.search(r"^[\d,]+ layouts looked at, [\d,]+ fit 79", out, re.MULTILINE)
    assert "\nBeside the best:\n  " in out
    assert re.search(r"The config's own layout is number \d+ of those that fit", out)
    # Hours of the best, as its own figures have them.
    days, hours = re.search(
        r"The run with the best: ([\d.e-]+) days, ([\d,]+) device-hours, [\d,]+ US dollars", out
    ).groups()
    assert float(days) == pytest.approx(int(hours.replace(",", "")) / 4 / 24, rel=0.01, abs=0.2)
    # The keys are those of a run on that machine.
    keys = re.search(r"Train it with: (.*)", out)[1].replace("'", "").split()
    config = load.compose("train", ["data.path=x", "train.sequences=8", *keys], world_size=4)
    assert config.mesh.pp * config.mesh.ep * config.mesh.dp == 4


def test_a_layout_that_cannot_run_is_no_hindrance(search):
    status, out, _ = search("mesh.ep=3", "mesh.pp=5")
    assert status == 0
    assert "The config's own layout can't run: mesh.ep=3: it must divide model.num_experts=16." in out


def test_wrong_input(search):
    for word, message in (
        ("top=0", "top=0: it must be at least 1. "),
        ("vary=[speed]", "vary=speed: a search can't vary this. Choose any of precision, node_limit."),
        ("hardware=cpu", "hardware.peak_bf16_tflops=0.0: hardware=cpu does not say it"),
    ):
        status, out, err = search(word)
        assert (status, out) == (2, "")
        assert err.startswith(f"dstrain: {message}")
