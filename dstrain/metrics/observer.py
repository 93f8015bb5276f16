"""What a run looks at beside the figures of its steps: timelines on request, links that are too slow, the order of
phases."""

from collections.abc import Callable

from dstrain.config.schema import Config
from dstrain.engine.loop import StepReport
from dstrain.errors import UserError
from dstrain.mesh.groups import Groups
from dstrain.metrics import timeline
from dstrain.metrics.links import LinkWatch
from dstrain.metrics.run_directory import RunDirectory


class Observer:
    """All ranks call both methods at the same steps; rank 0 writes and speaks."""

    def __init__(self, config: Config, groups: Groups, directory: RunDirectory, say: Callable[[str], None]):
        self.trace_steps, self.groups = config.metrics.trace_steps, groups
        self.directory, self.say = directory, say
        self._links = LinkWatch(config.hardware, groups)
        self._order = ""

    def before_step(self, step: int) -> None:
        self.groups.trace.keeps_spans = step in self.trace_steps

    def after_step(self, report: StepReport) -> UserError | None:
        """What is wrong if a timeline cannot be written, on rank 0."""
        for warning in self._links.after_step(report.comm):
            self._say(warning)
        if (self.groups.ep or self.groups.pp) and report.order != self._order:
            self._order = report.order
            self._say(f"schedule: {report.order}")
        if report.progress.step not in self.trace_steps:
            return None
        ranks = timeline.gather(report.comm, self.groups)
        path = self.directory.trace_json(report.progress.step)
        try:
            if ranks:
                timeline.write(path, ranks)
        except UserError as error:
            return error
        self._say(
            f"timeline of step {report.progress.step}: open {path} in https://ui.perfetto.dev or chrome://tracing"
        )
        return None

    def _say(self, text: str) -> None:
        if self.groups.place.rank == 0:
            self.say(text)
