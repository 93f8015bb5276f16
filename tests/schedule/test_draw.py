"""Pictures, read back as pixels."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from dstrain.schedule import draw
from dstrain.schedule.figures import StageCosts, play
from dstrain.schedule.pipeline import Kind, Op
from dstrain.schedule.pipelines.choose import make


def painted(folder: Path, name: str, ranks: int, micro_batches: int) -> np.ndarray:
    pipeline = make(name, ranks, micro_batches)
    spans = play(pipeline, StageCosts.even(pipeline.layout.num_stages, 1, 1, 1))
    draw.draw(pipeline.layout, spans, "A title", folder / "table.png", "dstrain")
    return imread(folder / "table.png")[:, :, :3]


def share(image: np.ndarray, colour: str | tuple[float, float, float]) -> float:
    return float(np.all(np.abs(image - to_rgb(colour)) < 0.01, axis=2).mean())


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_areas_are_times(tmp_path: Path, name: str):
    """Backward passes, twice as long as forward passes, cover about twice the area; idle time what is left."""
    image = painted(tmp_path, name, 4, 8)
    forward = share(image, draw.COLOURS[Kind.FORWARD])
    assert forward > 0.05
    if name == "1f1b":
        assert share(image, draw.COLOURS[Kind.BACKWARD]) == pytest.approx(2 * forward, rel=0.15)
        # 9 of 33 units on every rank.
        assert share(image, draw.IDLE) == pytest.approx(9 / 8 * forward, rel=0.25)
    else:
        assert share(image, draw.COLOURS[Kind.INPUT]) == pytest.approx(forward, rel=0.15)
        assert share(image, draw.COLOURS[Kind.WEIGHT]) == pytest.approx(forward, rel=0.15)
        later = draw.colour(Op(Kind.FORWARD, 7, 0), (0, 7))
        assert share(image, later) == pytest.approx(forward, rel=0.15)


def test_size_is_that_of_a_screen(tmp_path: Path):
    height, width, _ = painted(tmp_path, "dualpipev", 4, 10).shape
    assert width == draw.WIDTH_IN * draw.DPI == 1650
    assert 300 < height < 1000


def test_a_large_table_stays_readable(tmp_path: Path):
    """More ranks than fit: fewer panels, not a picture without end."""
    height, width, _ = painted(tmp_path, "1f1b", 64, 128).shape
    assert width == 1650
    assert height < (draw.MOST_ROWS + 10) * draw.ROW_IN * draw.DPI
