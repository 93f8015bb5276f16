"""`dstrain schedule show`: the table of a pipeline as text, picture, timeline or CSV, with its figures."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console

from dstrain.config.commands import ShowRoot
from dstrain.errors import ConfigError, UserError
from dstrain.schedule import draw, listing, timeline
from dstrain.schedule.figures import Figures, Span, StageCosts, figures, play
from dstrain.schedule.pipeline import Pipeline
from dstrain.schedule.pipelines import choose
from dstrain.schedule.torch_csv import to_csv

# What every file but the CSV carries, so that it may be written again.
MARK = "dstrain schedule show"
# A pipe has no width of its own.
PIPE_WIDTH = 120
MOST_LINES = 60
# Of ranks in the table of figures.
MOST_RANKS = 16


@dataclass(frozen=True)
class Shown:
    """A table with what it takes to show it."""

    pipeline: Pipeline
    costs: StageCosts
    spans: list[list[Span]]
    figures: Figures

    @property
    def title(self) -> str:
        pipeline, costs = self.pipeline, self.costs
        times = f"F {costs.forward_ms[0]:g}, I {costs.input_ms[0]:g}, W {costs.weight_ms[0]:g}, pair x {costs.pair:g}"
        counts = (
            f"{len(pipeline.ranks)} ranks, {pipeline.layout.num_stages} stages, {pipeline.micro_batches} micro-batches"
        )
        return f"{pipeline.name}: {counts} ({times})"


def run(config: ShowRoot) -> None:
    """Writes what `out` names, and prints table and figures."""
    shown = play_table(config)
    paths = outputs(config.out, shown.pipeline)
    for path in paths:
        require_own(path)
    for path in paths:
        write(shown, path)
    # It ends without noise when what reads its output, `head` say, has seen enough.
    console = Console(highlight=False)
    for line in console_lines(shown, shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH):
        console.print(line, soft_wrap=True, markup=False)
    for line in about_files(paths):
        console.print(line, soft_wrap=True, markup=False)


def play_table(config: ShowRoot) -> Shown:
    schedule, train, mesh = config.schedule, config.train, config.mesh
    micro_batches = config.micro_batches
    if micro_batches is None:
        sequences = train.sequences or (train.batch_tokens or 0) // train.seq_len
        micro_batches = sequences // ((mesh.dp or 1) * mesh.ep * train.micro_batch)
    pipeline = choose.make(schedule.pipeline, mesh.pp, micro_batches, schedule.chunks, schedule.overlap is True)
    forward, inputs, weights = config.times
    costs = StageCosts.even(pipeline.layout.num_stages, forward, inputs, weights, config.pair)
    return Shown(pipeline, costs, play(pipeline, costs), figures(pipeline, costs))


def console_lines(shown: Shown, width: int) -> Iterator[str]:
    """What fits on a console; a note says where the rest is."""
    yield shown.title
    ranks = len(shown.pipeline.ranks)
    stretches = max(1, MOST_LINES // (ranks + 2))
    blocks = listing.blocks(shown.spans, width)
    for block in islice(blocks, stretches):
        yield ""
        yield from block
    more = sum(1 for _ in blocks)
    if more:
        yield f"\n... {more} more stretches of time; out=table.txt writes the whole table"
    lines = listing.figures_table(shown.pipeline, shown.figures)
    yield ""
    yield from lines[: MOST_RANKS + 1]
    if ranks > MOST_RANKS:
        yield f"... {ranks - MOST_RANKS} more ranks; out=table.txt writes all"
    yield ""
    yield from listing.summary(shown.pipeline, shown.figures)


def about_files(paths: Sequence[Path]) -> list[str]:
    others = [what for suffix, what in ABOUT.items() if suffix not in {path.suffix for path in paths}]
    viewer = " (open it at ui.perfetto.dev)" if any(path.suffix == ".json" for path in paths) else ""
    return [f"\nwritten: {', '.join(map(str, paths))}{viewer}", f"out= also takes {', '.join(others)}"]


def outputs(out: str, pipeline: Pipeline) -> list[Path]:
    """One file where `out` names its kind, otherwise picture and timeline under that prefix or in that directory."""
    prefix = out
    if not out or out.endswith("/") or Path(out).is_dir():
        prefix = str(Path(out) / f"{pipeline.name}-{len(pipeline.ranks)}x{pipeline.micro_batches}")
    if Path(prefix).suffix in WRITERS:
        return [Path(prefix)]
    return [Path(f"{prefix}.png"), Path(f"{prefix}.json")]


def require_own(path: Path) -> None:
    """Refuses to write over a file that this command has not made."""
    if not path.exists():
        return
    cell = rb"\(?\d+[FBIW]\d+[,;\n]"
    is_own = path.is_file() and is_marked(path.read_bytes()[:4096], cell if path.suffix == ".csv" else MARK.encode())
    if not is_own:
        rule = f"{path} is there, and this command has not made it"
        raise ConfigError("out", path, rule, "Choose another name, or remove it.")


def is_marked(head: bytes, pattern: bytes) -> bool:
    return re.search(pattern, head) is not None


def write(shown: Shown, path: Path) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[path.suffix](shown, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Choose another out.") from error


def _picture(shown: Shown, path: Path) -> None:
    played = shown.figures
    title = f"{shown.title}, makespan {played.makespan_ms:g}, {played.bubble_share:.1%} idle"
    draw.draw(shown.pipeline.layout, shown.spans, title, path, MARK)


def _timeline(shown: Shown, path: Path) -> None:
    events = list(timeline.events(shown.pipeline, shown.spans))
    content = {"otherData": {"made by": MARK, "table": shown.title}, "traceEvents": events, "displayTimeUnit": "ms"}
    path.write_text(json.dumps(content) + "\n")


def _text(shown: Shown, path: Path) -> None:
    (whole,) = listing.blocks(shown.spans)
    lines: Sequence[str] = listing.figures_table(shown.pipeline, shown.figures)
    about = listing.summary(shown.pipeline, shown.figures)
    path.write_text("\n".join([f"{MARK}: {shown.title}", "", *whole, "", *lines, "", *about, ""]))


def _csv(shown: Shown, path: Path) -> None:
    path.write_text(to_csv(shown.pipeline))


WRITERS: dict[str, Callable[[Shown, Path], None]] = {
    ".png": _picture,
    ".json": _timeline,
    ".txt": _text,
    ".csv": _csv,
}
ABOUT = {
    ".png": "<name>.png (a picture)",
    ".json": "<name>.json (a timeline for Perfetto)",
    ".txt": "<name>.txt (the whole table)",
    ".csv": "<name>.csv (for torch.distributed.pipelining)",
}
