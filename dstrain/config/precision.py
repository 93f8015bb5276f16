"""The rules of a precision: what its dtypes may be, and which of them need one another."""

from dstrain.config.rules import at_least, need, one_of
from dstrain.config.schema import Config
from dstrain.errors import ConfigError

DTYPES = ("float32", "bfloat16")
# Which of them can is known where the machine is (precision/backends/choose.py).
BACKENDS = ("auto", "reference", "bf16", "triton", "scaled_mm", "deepgemm", "mxfp8")


def check_precision(config: Config) -> None:
    """Raises ConfigError. engine.name has been checked."""
    one_of(config, "precision.compute_dtype", *DTYPES)
    one_of(config, "precision.grad_wire_dtype", *DTYPES)
    at_least(config, 0, "precision.watch_every_steps")
    _check_products(config)
    _check_moments(config)
    _check_gather(config)


def _check_products(config: Config) -> None:
    one_of(config, "precision.products", "compute", "fp8", "mxfp8")
    one_of(config, "precision.backend", *BACKENDS)
    one_of(config, "precision.scales", "power_of_two", "plain")
    one_of(config, "precision.gradient_tiles", "rows", "blocks")
    if config.precision.products == "mxfp8":
        rule, cure = "mxfp8 has a power-of-two scale for 1x32 values, no others", "Leave it out, or set precision=fp8."
        for name, only in (("scales", "power_of_two"), ("gradient_tiles", "rows")):
            value = getattr(config.precision, name)
            need(value == only, (f"precision.{name}", value), rule, cure)


def _check_moments(config: Config) -> None:
    one_of(config, "precision.moments_dtype", *DTYPES, "int8")
    dtype, rule = config.precision.moments_dtype, "engine.name=deepspeed keeps moments in float32 or bfloat16"
    cure = "Set precision.moments_dtype=bfloat16, or engine=torch."
    need(dtype != "int8" or config.engine.name == "torch", ("precision.moments_dtype", dtype), rule, cure)


def gathers_fp8(config: Config) -> bool:
    """Whether the weights of FP8 products are gathered in FP8; `config` has passed its checks."""
    gather = config.precision.gather
    return gather == "fp8" or (gather == "auto" and _against_fp8(config) is None)


def _check_gather(config: Config) -> None:
    one_of(config, "precision.gather", "auto", "compute", "fp8")
    against = _against_fp8(config)
    if config.precision.gather == "fp8" and against is not None:
        rule, cure = against
        raise ConfigError("precision.gather", "fp8", rule, f"Set precision.gather=auto, or {cure}.")


def _against_fp8(config: Config) -> tuple[str, str] | None:
    """Why weights can't be gathered in FP8, and what would mend it."""
    if config.precision.products != "fp8":
        return "only weights of products in fp8 are gathered so, in the same blocks", "precision.products=fp8"
    if config.precision.scales != "power_of_two":
        return "plain scales would round what was gathered once more", "precision.scales=power_of_two"
    if config.engine.name != "torch":
        return f"engine.name={config.engine.name} gathers parameters in the compute dtype", "engine=torch"
    return None
