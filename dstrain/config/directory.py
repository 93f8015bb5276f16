"""Where the YAML files of a config lie, and which choices they are."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill

WIDTH = 120


def conf_dir() -> Path:
    """The YAML tree: inside the package once installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def choices(arguments: Sequence[str]) -> str:
    """The choices of every group, those of a `--config-dir` among the arguments included."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for directory in (conf_dir(), *_own(arguments)):
        for path in directory.glob("*/*.yaml"):
            found[path.parent.name].add(path.stem)
    lines = (f"{group}: {', '.join(sorted(names))}" for group, names in sorted(found.items()))
    return "\n".join(fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def _own(arguments: Sequence[str]) -> Iterator[Path]:
    for word, following in pairwise([*arguments, ""]):
        if word in ("--config-dir", "-cd"):
            yield Path(following)
        elif word.startswith("--config-dir="):
            yield Path(word.partition("=")[2])
