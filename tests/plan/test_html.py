"""The page of a plan: complete, well-formed, and in need of nothing else."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dstrain import hardware
from dstrain.plan import report
from dstrain.plan.html import render
from dstrain.plan.job import Job
from dstrain.plan.report import RankUse, Report, Verdict, short
from dstrain.plan.simulation import Played, simulate
from tests.plan.test_simulation import EXPERTS

EMPTY = {"meta", "br"}


class Reader(HTMLParser):
    """Text outside of styles; complains where elements are not closed in turn."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def planned() -> tuple[Report, Played]:
    job = Job(EXPERTS, 128, 4096, 64 * 16, pp=4, ep=8, pipeline="dualpipe", overlap=True)
    machine, step = hardware.named("h800_sxm"), simulate(job, hardware.named("h800_sxm"))
    memory = [RankUse(rank, {"weights": 10.0 + rank, "buffers": 0.0}, 10.0 + rank) for rank in (0, 1, 1, 3)]
    verdict = Verdict(True, ("It fits with room to spare.",))
    return report.make(job, machine, step.prediction, memory, verdict, {1024: 1000}), step.played


def test_everything_is_on_the_page(planned: tuple[Report, Played]):
    page, step = planned
    text = Reader(render(page, step)).text
    assert page.title in text
    assert f"{page.mfu:.1%}" in text
    assert "13.0 GiB" in text
    assert "fits" in text
    for line in (*page.about.values(), *page.verdict.lines, *page.assumptions):
        assert " ".join(line.split()) in text
    for source in page.evidence:
        assert source.source in text
    largest, seconds = max(page.parts_s.items(), key=lambda part: part[1])
    assert f"{largest} {short(seconds)} s, {seconds / page.step_s.value:.1%}" in text
    # A part that nobody has is left out.
    assert "buffers" not in text


def test_needs_nothing_from_elsewhere(planned: tuple[Report, Played]):
    text = render(*planned)
    assert not Reader(text).addresses
    assert "<script" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {"#waits"}
    assert "@import" not in text
    assert "prefers-color-scheme:dark" in text


def test_words_are_not_markup(planned: tuple[Report, Played]):
    page = replace(planned[0], title="<b>x</b> & y", assumptions=("a < b",))
    text = render(page, planned[1])
    assert "<b>x</b>" not in text
    assert "<b>x</b> & y" in Reader(text).text


@pytest.mark.parametrize(("fits", "word"), [(False, "does not fit"), (True, "fits")])
def test_verdict(planned: tuple[Report, Played], fits: bool, word: str):
    page = replace(planned[0], verdict=Verdict(fits, ()), cost=None, mfu=None, capacity_gib=80.0)
    text = Reader(render(page, planned[1])).text
    assert f"of 80.0, on the fullest rank {word}" in text
    assert "US dollars" not in text
    assert "utilisation" not in text


def test_unknown_memory(planned: tuple[Report, Played]):
    page = replace(planned[0], verdict=Verdict(None, ()), capacity_gib=0.0)
    assert "of memory, on the fullest rank" in Reader(render(page, planned[1])).text
