"""Where the YAML files of a config lie."""

from pathlib import Path


def conf_dir() -> Path:
    """The YAML tree: inside the package once installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"
