"""Pictures of steps, read back as pixels."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from dstrain.plan import picture
from dstrain.plan.simulation import play_step
from dstrain.plan.times import Reduction, StepTimes
from dstrain.schedule.draw import COLOURS
from dstrain.schedule.pipeline import Kind
from dstrain.schedule.simulate import even_costs
from tests.plan.test_simulation import job_with, played


def share(image: np.ndarray, colour: str) -> float:
    return float(np.all(np.abs(image[:, :, :3] - to_rgb(colour)) < 0.01, axis=2).mean())


def test_a_step_with_its_end(tmp_path: Path):
    """The update takes as much room as time; hatching appears where links are slow."""
    images = {}
    for wire in (0.01, 1.5):
        end = Reduction(20.0, 0.0, 24.0)
        times = StepTimes((even_costs(2, wire),) * 2, 0.1, 0.0, (end,) * 2)
        step = play_step(job_with("1f1b", 2, 4), times)
        picture.write(step, "A title", tmp_path / "step.png", "dstrain")
        images[wire] = imread(tmp_path / "step.png")
    fast = images[0.01]
    forward, backward, update = (
        share(fast, colour) for colour in (COLOURS[Kind.FORWARD], COLOURS[Kind.BACKWARD], picture.UPDATED.colour)
    )
    # 4 micro-batches of 2 and 4 ms, and 24 ms of update.
    assert update / (forward + backward) == pytest.approx(1, rel=0.25)
    assert share(fast, picture.REDUCED.colour) > 0
    hatched = [share(images[wire], picture.EXPOSED.colour) for wire in (0.01, 1.5)]
    assert hatched[1] > 3 * hatched[0]


def test_a_large_step_stays_small_enough_to_look_at(tmp_path: Path):
    step = played(job_with("dualpipe", 16, 64, overlap=True), even_costs(1))
    picture.write(step, "A title", tmp_path / "step.png", "dstrain")
    height, width, _ = imread(tmp_path / "step.png").shape
    assert width == 1650
    assert height < 2 * width
