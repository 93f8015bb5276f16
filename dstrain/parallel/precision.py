"""Which modules compute in FP8: every Linear and the experts, but for those that precision.exclude names.

Embedding, head, router, norms and the core of attention never do (DeepSeek-V3 section 3.3.1): they are no such modules,
or the head.
"""

from collections.abc import Collection
from fnmatch import fnmatchcase

import torch

from dstrain.config.schema import PrecisionConfig
from dstrain.dispatch.local import LocalDispatcher
from dstrain.errors import ConfigError
from dstrain.model.attention import Attention
from dstrain.model.moe import Experts
from dstrain.model.transformer import Transformer
from dstrain.precision.backend import Backend
from dstrain.precision.formats import E4M3, E5M6
from dstrain.precision.linear import Linear
from dstrain.precision.products import Products
from dstrain.precision.watch import Watch

NEVER = ("head",)


def modules_in_fp8(model: Transformer, precision: PrecisionConfig) -> dict[str, Linear | Experts]:
    """By name; ConfigError for a pattern of precision.exclude that names none of those that could be among them."""
    if precision.exclude:
        _check_patterns(_able(_whole(model)), precision)
        if not _others(_able(_whole(model)), precision):
            rule = f"nothing is left that computes in {precision.products}"
            raise ConfigError("precision.exclude", list(precision.exclude), rule, "Set precision.products=compute.")
    return _others(_able(model), precision)


def _others(able: dict[str, Linear | Experts], precision: PrecisionConfig) -> dict[str, Linear | Experts]:
    return {name: x for name, x in able.items() if not any(fnmatchcase(name, pattern) for pattern in precision.exclude)}


def product_names(model: Transformer) -> list[str]:
    """Of all that may compute in FP8 in the whole model, other ranks' layers included, from the first layer on."""
    able = _able(_whole(model)).items()
    return [f"{name}.{parameter}" for name, module in able for parameter, _ in module.named_parameters(recurse=False)]


def _able(model: Transformer) -> dict[str, Linear | Experts]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, (Linear, Experts))}
    return {name: module for name, module in found.items() if name not in NEVER}


def _whole(model: Transformer) -> Transformer:
    """All of the model, without memory: a pattern may name what other stages of a pipeline hold."""
    with torch.device("meta"):
        return Transformer(model.config, range(1), LocalDispatcher(model.config.num_experts))


def _check_patterns(able: Collection[str], precision: PrecisionConfig) -> None:
    for pattern in precision.exclude:
        if not any(fnmatchcase(name, pattern) for name in able):
            some = ", ".join(list(able)[:3])
            rule = f"no module that computes in {precision.products} has such a name; there are {some} and others"
            raise ConfigError("precision.exclude", pattern, rule, "Name modules, with * for any part of a name.")


def apply_products(model: Transformer, precision: PrecisionConfig, backend: Backend, watch: Watch) -> None:
    """Gives these modules their products. Raises ConfigError as `modules_in_fp8` does."""
    outputs = {id(module.o) for module in model.modules() if isinstance(module, Attention)}
    for name, module in modules_in_fp8(model, precision).items():
        module.products = {
            # The backward pass of attention needs the input of its output projection as well (section 3.3.3).
            parameter: Products(f"{name}.{parameter}", backend, watch, E5M6 if id(module) in outputs else E4M3)
            for parameter, _ in module.named_parameters(recurse=False)
        }
