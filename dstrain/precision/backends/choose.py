"""Who computes products in FP8 here: the backend that a config names, or the fastest that can, and why.

    deepgemm    compute capability 9.0 and 10.x      DeepSeek's kernels, where the package is installed
    scaled_mm   9.0, CUDA 12.9                       cuBLASLt for single weights, Triton for experts
    triton      8.9 and up                           our own kernels
    bf16        8.0 and up                           kept in FP8, multiplied in BF16: for GPUs without FP8 tensor cores
    mxfp8       10.x, CUDA 12.8                      precision.products=mxfp8 only
    reference   anything                             operands rounded as in FP8, multiplied in a wider dtype

The first of them that can is taken: libraries tuned for a chip come before our own kernels. What is known about a
machine is one value, so every GPU can be decided for without having it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from dstrain.config.schema import Config, ModelConfig, PrecisionConfig
from dstrain.errors import ConfigError
from dstrain.precision.backend import MXFP8_TILE, Backend, Scheme

INSTALL = {
    "triton": "Install triton==3.7.1, or torch for CUDA, which brings it",
    "deep_gemm": "Install DeepGEMM as github.com/deepseek-ai/DeepGEMM says",
}
NO_CAPABILITY = (0, 0)
CPU = "a CPU"


@dataclass(frozen=True)
class Machine:
    """What decides: the device of this process and the libraries around it."""

    # As messages call it: "NVIDIA L40S", "a CPU".
    name: str
    # Of a GPU by NVIDIA; of anything else NO_CAPABILITY.
    capability: tuple[int, int] = NO_CAPABILITY
    # Version that torch was built for.
    cuda: tuple[int, int] = (0, 0)
    # Those of INSTALL that are there.
    packages: frozenset[str] = frozenset()

    @staticmethod
    def of(device: torch.device) -> "Machine":
        packages = frozenset(name for name in INSTALL if find_spec(name) is not None)
        if device.type != "cuda":
            return Machine(CPU if device.type == "cpu" else device.type, packages=packages)
        name = torch.cuda.get_device_name(device)
        if torch.version.cuda is None:
            return Machine(name, packages=packages)
        major, minor = torch.version.cuda.split(".")[:2]
        return Machine(name, torch.cuda.get_device_capability(device), (int(major), int(minor)), packages)

    @property
    def label(self) -> str:
        return self.name if self.capability == NO_CAPABILITY else f"{self.name} ({_dotted(self.capability)})"


@dataclass(frozen=True)
class Choice:
    """What precision.backend comes to on a machine."""

    backend: str
    # One sentence for a log.
    reason: str


@dataclass(frozen=True)
class Against:
    """Why a backend can't be taken: it "needs ..."; what is there instead; how to mend it."""

    needs: str
    here: str
    cure: str


@dataclass(frozen=True)
class Needs:
    """Of a backend."""

    products: str
    # Capabilities from the first on, below the second.
    capabilities: tuple[tuple[int, int], tuple[int, int]]
    packages: tuple[str, ...] = ("triton",)
    cuda: tuple[int, int] = (12, 0)
    # Whether results can be FP32 as well.
    has_float32: bool = True
    # Whether scales can be other than powers of two.
    has_plain: bool = True

    @property
    def capability(self) -> str:
        (least, below) = self.capabilities
        if below[0] > 90:
            return f"{_dotted(least)} or higher"
        return f"{least[0]}.x" if below[0] == least[0] + 1 else f"{least[0]}.x to {below[0] - 1}.x"


# In the order of `auto`.
BACKENDS = {
    "deepgemm": Needs("fp8", ((9, 0), (11, 0)), ("triton", "deep_gemm"), has_float32=False),
    "scaled_mm": Needs("fp8", ((9, 0), (10, 0)), cuda=(12, 9)),
    "triton": Needs("fp8", ((8, 9), (99, 0))),
    "bf16": Needs("fp8", ((8, 0), (99, 0)), has_plain=False),
    "mxfp8": Needs("mxfp8", ((10, 0), (11, 0)), cuda=(12, 8), has_float32=False),
}


def choose(config: Config, device: torch.device) -> Choice:
    """For a config whose precision.products are not compute. ConfigError where the backend that is named can't work."""
    return decide(config, Machine.of(device))


def decide(config: Config, machine: Machine) -> Choice:
    """`choose` for any machine."""
    name = config.precision.backend
    if name == "auto":
        return _first_that_can(config, machine)
    against = _against(name, config, machine)
    if against is not None:
        rule = f"it needs {against.needs}, and here is {against.here}"
        raise ConfigError("precision.backend", name, rule, f"{against.cure}, or set precision.backend=auto.")
    return Choice(name, f"{name}: asked for, on {machine.label}")


def make_backend(name: str, precision: PrecisionConfig) -> Backend:
    """A backend that `choose` has found able; its libraries are imported now."""
    scheme, dtype = Scheme.of(precision), getattr(torch, precision.compute_dtype)
    return _backend_class(name)(scheme, dtype)


def _backend_class(name: str) -> type[Backend]:
    if name == "deepgemm":
        from dstrain.precision.backends.deepgemm import DeepGemmBackend

        return DeepGemmBackend
    if name == "scaled_mm":
        from dstrain.precision.backends.scaled_mm import ScaledMmBackend

        return ScaledMmBackend
    if name == "triton":
        from dstrain.precision.backends.triton import TritonBackend

        return TritonBackend
    if name == "bf16":
        from dstrain.precision.backends.bf16 import Bf16Backend

        return Bf16Backend
    if name == "mxfp8":
        from dstrain.precision.backends.mxfp8 import Mxfp8Backend

        return Mxfp8Backend
    from dstrain.precision.reference import Reference

    return Reference


def _first_that_can(config: Config, machine: Machine) -> Choice:
    dtype = "FP32" if _is_wide(config.precision) else "BF16"
    slowly = f"products in {dtype} of dequantised operands"
    if machine.name == CPU:
        return Choice("reference", "reference: on a CPU")
    lack = _lack(machine)
    others: list[str] = []
    for name in _candidates(config, machine):
        against = _against(name, config, machine)
        if against is None and lack:
            return Choice(name, f"{name}: {lack}: operands kept in FP8, multiplied in BF16")
        if against is None:
            why = "".join(f", and {other}" for other in others)
            return Choice(name, f"{name}: {machine.label} has FP8 tensor cores{why}")
        others.append(f"{name} needs {against.needs}")
    if lack:
        return Choice("reference", f"reference: {', and '.join([lack, *others])}: {slowly}")
    return Choice("reference", f"reference, {slowly}: {', and '.join(others)}")


def _lack(machine: Machine) -> str | None:
    """Why a GPU can't multiply in FP8."""
    if machine.capability >= BACKENDS["triton"].capabilities[0]:
        return None
    lack = "is no GPU by NVIDIA" if machine.capability == NO_CAPABILITY else "has no FP8 tensor cores"
    return f"{machine.label} {lack}"


def _candidates(config: Config, machine: Machine) -> list[str]:
    """In the order of trial; `bf16` only where a chip has no FP8, but BF16."""
    names = [name for name in BACKENDS if name != "bf16"]
    if _lack(machine) is not None:
        names = ["bf16"] if machine.capability >= BACKENDS["bf16"].capabilities[0] else []
    return [name for name in names if BACKENDS[name].products == config.precision.products]


def _against(name: str, config: Config, machine: Machine) -> Against | None:
    return None if name == "reference" else next(_obstacles(BACKENDS[name], config, machine), None)


def _obstacles(needs: Needs, config: Config, machine: Machine) -> Iterator[Against]:
    """The first is the one worth telling."""
    precision, (least, below) = config.precision, needs.capabilities
    if precision.products != needs.products:
        here, cure = f"precision.products={precision.products}", f"Set precision.products={needs.products}"
        yield Against(f"precision.products={needs.products}", here, cure)
    if not least <= machine.capability < below:
        yield Against(f"compute capability {needs.capability}", machine.label, "Use another GPU")
    if machine.cuda < needs.cuda:
        cuda = _dotted(needs.cuda)
        yield Against(f"CUDA {cuda}", f"{_dotted(machine.cuda)}", f"Install torch for CUDA {cuda} or later")
    for package in needs.packages:
        if package not in machine.packages:
            yield Against(f"the package {package}", "none", INSTALL[package])
    if precision.compute_dtype == "float32" and not needs.has_float32:
        cure = "Set precision.compute_dtype=bfloat16"
        yield Against("precision.compute_dtype=bfloat16", "float32", cure)
    yield from _obstacles_of_tiles(needs, config, machine)


def _obstacles_of_tiles(needs: Needs, config: Config, machine: Machine) -> Iterator[Against]:
    precision = config.precision
    if precision.products == "fp8" and precision.gradient_tiles != "rows":
        cure = "Set precision.gradient_tiles=rows"
        yield Against("precision.gradient_tiles=rows", precision.gradient_tiles, cure)
    if precision.scales != "power_of_two":
        cure = "Set precision.scales=power_of_two"
        if not needs.has_plain:
            yield Against("precision.scales=power_of_two", precision.scales, cure)
        if "deep_gemm" in needs.packages and machine.capability >= (10, 0):
            yield Against("precision.scales=power_of_two on capability 10.x", precision.scales, cure)
    if needs.products == "mxfp8":
        for name, side in _sides(config.model):
            if side % MXFP8_TILE:
                yield Against(f"sides in multiples of {MXFP8_TILE}", f"{name} = {side}", f"Choose {name} so")


def _sides(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """Of the matrices that compute in FP8."""
    heads, rope = model.num_heads, model.qk_rope_head_dim
    yield "model.hidden_size", model.hidden_size
    if model.num_dense_layers:
        yield "model.intermediate_size", model.intermediate_size
    yield "model.moe_intermediate_size", model.moe_intermediate_size
    if model.q_lora_rank is not None:
        yield "model.q_lora_rank", model.q_lora_rank
    yield "model.kv_lora_rank", model.kv_lora_rank
    yield "model.kv_lora_rank + model.qk_rope_head_dim", model.kv_lora_rank + rope
    yield "model.num_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)", heads * (model.qk_nope_head_dim + rope)
    yield "model.num_heads * model.v_head_dim", heads * model.v_head_dim
    both = heads * (model.qk_nope_head_dim + model.v_head_dim)
    yield "model.num_heads * (model.qk_nope_head_dim + model.v_head_dim)", both


def _is_wide(precision: PrecisionConfig) -> bool:
    """Whether dequantised values fill more than BF16."""
    plain = precision.products == "fp8" and precision.scales == "plain"
    return plain or precision.compute_dtype == "float32"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
