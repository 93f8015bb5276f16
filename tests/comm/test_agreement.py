"""What one rank meets, all raise; nobody is left waiting."""

from pathlib import Path

import pytest
import torch.distributed as dist

from dstrain.comm.agreement import on_first, together
from dstrain.errors import SharedError, UserError
from tests.gloo.spawn import spawn


def read(path: str) -> str:
    if not Path(path).exists():
        raise UserError(f"{Path(path).name} is missing")
    return Path(path).read_text()


def message(action) -> str:
    try:
        action()
    except SharedError as error:
        return str(error)
    return "no error"


def attempts(rank: int, world: int, present: str, absent: str) -> dict[str, object]:
    group = dist.group.WORLD
    path = absent if rank == 1 else present
    return {
        "one rank": message(lambda: together(lambda: read(path), group)),
        "two ranks": message(lambda: together(lambda: read(f"{absent}{rank}" if rank else present), group)),
        "first only": message(lambda: on_first(lambda: read(absent), group)),
        # Only the first rank's own path is there.
        "on_first": on_first(lambda: read(present if rank == 0 else absent), group),
        "together": together(lambda: f"{read(present)}{rank}", group),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("agreement")
    (folder / "present").write_text("text")
    return spawn(attempts, 3, str(folder / "present"), str(folder / "absent"))


@pytest.mark.parametrize("case", ["one rank", "first only"])
def test_every_rank_raises_the_same(found: list[dict[str, object]], case: str):
    assert [outcome[case] for outcome in found] == ["absent is missing"] * 3


def test_of_two_problems_that_of_the_lower_rank_is_told(found: list[dict[str, object]]):
    assert [outcome["two ranks"] for outcome in found] == ["absent1 is missing"] * 3


def test_results(found: list[dict[str, object]]):
    assert [outcome["on_first"] for outcome in found] == ["text"] * 3
    assert [outcome["together"] for outcome in found] == ["text0", "text1", "text2"]


@pytest.mark.parametrize("call", [together, on_first])
def test_alone(call, tmp_path: Path):
    assert call(lambda: 5, None) == 5
    with pytest.raises(SharedError, match="absent is missing"):
        call(lambda: read(str(tmp_path / "absent")), None)


@pytest.mark.parametrize("call", [together, on_first])
def test_a_bug_stays_a_bug(call):
    with pytest.raises(ZeroDivisionError):
        call(lambda: 1 // 0, None)
