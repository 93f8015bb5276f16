"""Progress for whoever watches: a live display on a terminal, plain aligned lines in a pipe or a Slurm log."""

from collections import deque
from datetime import timedelta
from time import monotonic

import rich.console
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from dstrain.metrics.sinks import Record, Value

# Steps whose mean duration predicts the time left.
WINDOW = 50


class Console:
    """A sink. `say` prints a message without breaking the live display."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        every_steps: int = 10,
        console: rich.console.Console | None = None,
    ):
        """`every_steps` thins out the plain lines; the live display shows every step."""
        self.total_steps, self.start_step, self.every_steps = total_steps, start_step, every_steps
        self._console = console or rich.console.Console(highlight=False)
        self._times = deque([(monotonic(), start_step)], maxlen=WINDOW + 1)
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._display: Display | None = None

    def log(self, record: Record) -> None:
        step = int(record["step"] or 0)
        self._times.append((monotonic(), step))
        if self._is_live:
            # Not before the first step: what prepares the run has displays of its own.
            self._display = self._display or Display(self._console, self.total_steps)
            self._display.update(step, self._left(step), figures(record))
        elif step % self.every_steps == 0 or step in (self.start_step + 1, self.total_steps):
            width = len(str(self.total_steps))
            position = f"step {step:>{width}}/{self.total_steps}"
            self.say("  ".join((position, *figures(record), f"{self._left(step)} left")))

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last state of the live display on the screen and the cursor visible."""
        if self._display is not None:
            self._display.stop()

    def _left(self, step: int) -> str:
        """H:MM:SS until the last step, at the mean pace of the last WINDOW steps."""
        (first_time, first_step), (last_time, last_step) = self._times[0], self._times[-1]
        if last_step == first_step:
            return "-:--:--"
        seconds = (last_time - first_time) / (last_step - first_step) * (self.total_steps - step)
        return str(timedelta(seconds=round(seconds)))


class Display:
    """Two lines at the bottom of the terminal, redrawn by a thread: how far, and the figures of the last step."""

    def __init__(self, console: rich.console.Console, total_steps: int):
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]} left")
        )
        self._task = self._progress.add_task("", total=total_steps, left="")
        self._figures = Text(no_wrap=True, overflow="ellipsis")
        self._live = Live(Group(self._progress, self._figures), console=console)
        self._live.start()

    def update(self, step: int, left: str, figures: list[str]) -> None:
        self._progress.update(self._task, completed=step, left=left)
        self._figures.plain = "  ".join(figures)

    def stop(self) -> None:
        self._live.stop()


def figures(record: Record) -> list[str]:
    """The figures worth a glance, each at a fixed width so that lines align; unknown ones are left out."""
    shown = (
        ("loss", "loss {:7.4f}", 1),
        ("lr", "lr {:.1e}", 1),
        ("grad_norm", "norm {:5.2f}", 1),
        ("tokens_per_s", "{:8,.0f} tok/s", 1),
        ("mfu", "MFU {:4.1f} %", 100),
        ("comm_exposed_ms", "wait {:5.1f} ms", 1),
        ("comm_hidden_share", "hidden {:3.0f} %", 100),
        ("stages_wait_ms", "bubble {:5.1f} ms", 1),
    )
    return [text.format(_number(record[key]) * scale) for key, text, scale in shown if record.get(key) is not None]


def _number(value: Value) -> float:
    return float(value) if value is not None else float("nan")
