"""`dstrain plan trace`: a planned step as a timeline for Perfetto, as a picture, or in the report of the whole plan."""

import json
from collections.abc import Callable
from pathlib import Path

from dstrain.config.plan import SUFFIXES, TraceRoot
from dstrain.errors import UserError
from dstrain.plan import timeline
from dstrain.plan.report import Report, short
from dstrain.plan.simulation import Played
from dstrain.tasks.output import claim
from dstrain.tasks.plan import note, open_console, prepare, report_of

# What every file carries.
MARK = "dstrain plan trace"


def run(config: TraceRoot) -> None:
    """Writes `out`, and says what a step takes."""
    claim(config.out)
    console, fit, path = open_console(), prepare(config), Path(config.out)
    page, simulation = report_of(fit)
    try:
        WRITERS[path.suffix](page, simulation.played, path)
    except OSError as error:
        raise UserError(f"out={path} can't be written: {error.strerror}. Choose another place.") from error
    viewer = " (open it at ui.perfetto.dev)" if path.suffix == ".json" else ""
    last = f"A step takes {short(page.step_s.value)} s. Written: {path}{viewer}"
    for line in (*note(config, fit), last, f"out= also takes {others(path.suffix)}"):
        console.print(line, soft_wrap=True, markup=False)


def others(suffix: str) -> str:
    return ", ".join(f"<name>{other} ({what})" for other, what in SUFFIXES.items() if other != suffix)


def title(page: Report) -> str:
    return f"{page.title}: a step of {short(page.step_s.value)} s"


def _timeline(page: Report, played: Played, path: Path) -> None:
    path.write_text(json.dumps(timeline.trace(played, title(page), MARK)) + "\n")


def _picture(page: Report, played: Played, path: Path) -> None:
    # Only here: it takes half a second to load.
    from dstrain.plan import picture

    picture.write(played, title(page), path, MARK)


def _report(page: Report, played: Played, path: Path) -> None:
    from dstrain.plan import html

    path.write_text(html.render(page, played), encoding="utf-8")


WRITERS: dict[str, Callable[[Report, Played, Path], None]] = {".json": _timeline, ".png": _picture, ".html": _report}
