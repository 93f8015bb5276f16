"""All ranks succeed or all raise the same error: a mistake that one rank meets must not leave the others hanging."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dstrain.errors import SharedError, UserError

Result = TypeVar("Result")


def together(action: Callable[[], Result], group: dist.ProcessGroup | None) -> Result:
    """Runs `action` on every rank of a gloo group; if any meets a UserError, all raise that of the lowest rank."""
    problem, result = _attempt(action)
    problems = [problem]
    if group is not None:
        problems = [None] * group.size()
        dist.all_gather_object(problems, problem, group=group)
    for problem in problems:
        if problem is not None:
            raise SharedError(problem)
    return result  # type: ignore[return-value]


def on_first(action: Callable[[], Result], group: dist.ProcessGroup | None) -> Result:
    """Runs `action` on the first rank of a gloo group; every rank gets its result, or raises its UserError."""
    outcome: list[Any] = [None]
    if group is None or group.rank() == 0:
        outcome = [_attempt(action)]
    if group is not None:
        dist.broadcast_object_list(outcome, group_src=0, group=group)
    problem, result = outcome[0]
    if problem is not None:
        raise SharedError(problem)
    return result


def _attempt(action: Callable[[], Result]) -> tuple[str | None, Result | None]:
    try:
        return None, action()
    except UserError as error:
        return str(error), None


def gathered(value: Result, group: dist.ProcessGroup | None) -> list[Result]:
    """What every rank of a gloo group has to say, in their order."""
    said: list[Result] = [value]
    if group is not None:
        said *= group.size()
        dist.all_gather_object(said, value, group=group)
    return said
