from dataclasses import replace

import pytest
import torch

from dstrain.config.precision import BACKENDS as NAMES
from dstrain.config.schema import Config, ModelConfig, PrecisionConfig
from dstrain.errors import ConfigError
from dstrain.precision.backends.choose import BACKENDS, Machine, choose, decide, make_backend

BOTH = frozenset({"triton", "deep_gemm"})
TRITON = frozenset({"triton"})
T4 = Machine("Tesla T4", (7, 5), (13, 0), BOTH)
CPU = Machine("a CPU", packages=BOTH)
A100 = Machine("NVIDIA A100", (8, 0), (13, 0), BOTH)
L40S = Machine("NVIDIA L40S", (8, 9), (13, 0), BOTH)
H100 = Machine("NVIDIA H100", (9, 0), (13, 0), BOTH)
B200 = Machine("NVIDIA B200", (10, 0), (13, 0), BOTH)
RTX3090 = Machine("NVIDIA GeForce RTX 3090", (8, 6), (13, 0), TRITON)
RTX5090 = Machine("NVIDIA GeForce RTX 5090", (12, 0), (13, 0), BOTH)
MI300X = Machine("AMD Instinct MI300X", packages=TRITON)


def config(backend: str = "auto", products: str = "fp8", **precision: str) -> Config:
    return Config(precision=PrecisionConfig(products=products, backend=backend, **precision))


@pytest.mark.parametrize(
    ("machine", "backend", "reason"),
    [
        (CPU, "reference", "reference: on a CPU"),
        (
            A100,
            "bf16",
            "bf16: NVIDIA A100 (8.0) has no FP8 tensor cores: operands kept in FP8, multiplied in BF16",
        ),
        (
            RTX3090,
            "bf16",
            "bf16: NVIDIA GeForce RTX 3090 (8.6) has no FP8 tensor cores: operands kept in FP8, multiplied in BF16",
        ),
        (
            replace(A100, packages=frozenset()),
            "reference",
            "reference: NVIDIA A100 (8.0) has no FP8 tensor cores, and bf16 needs the package triton: products in BF16 "
            "of dequantised operands",
        ),
        (
            T4,
            "reference",
            "reference: Tesla T4 (7.5) has no FP8 tensor cores: products in BF16 of dequantised operands",
        ),
        (
            MI300X,
            "reference",
            "reference: AMD Instinct MI300X is no GPU by NVIDIA: products in BF16 of dequantised operands",
        ),
        (
            L40S,
            "triton",
            "triton: NVIDIA L40S (8.9) has FP8 tensor cores, and deepgemm needs compute capability 9.x to 10.x, and "
            "scaled_mm needs compute capability 9.x",
        ),
        (H100, "deepgemm", "deepgemm: NVIDIA H100 (9.0) has FP8 tensor cores"),
        (
            replace(H100, packages=TRITON),
            "scaled_mm",
            "scaled_mm: NVIDIA H100 (9.0) has FP8 tensor cores, and deepgemm needs the package deep_gemm",
        ),
        (
            replace(H100, packages=TRITON, cuda=(12, 8)),
            "triton",
            "triton: NVIDIA H100 (9.0) has FP8 tensor cores, and deepgemm needs the package deep_gemm, and scaled_mm "
            "needs CUDA 12.9",
        ),
        (B200, "deepgemm", "deepgemm: NVIDIA B200 (10.0) has FP8 tensor cores"),
        (
            RTX5090,
            "triton",
            "triton: NVIDIA GeForce RTX 5090 (12.0) has FP8 tensor cores, and deepgemm needs compute capability 9.x to "
            "10.x, and scaled_mm needs compute capability 9.x",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Machine) else "",
)
def test_auto_takes_the_fastest_that_can(machine: Machine, backend: str, reason: str):
    choice = decide(config(), machine)
    assert (choice.backend, choice.reason) == (backend, reason)


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({"scales": "plain"}, "triton"),
        ({"compute_dtype": "float32"}, "triton"),
        ({"gradient_tiles": "blocks"}, "reference"),
        ({"products": "mxfp8"}, "mxfp8"),
    ],
    ids=str,
)
def test_auto_on_blackwell(change: dict[str, str], backend: str):
    assert decide(config(**change), B200).backend == backend


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({"scales": "plain"}, "reference"),
        ({"compute_dtype": "float32"}, "bf16"),
        ({"gradient_tiles": "blocks"}, "reference"),
        ({"products": "mxfp8"}, "reference"),
    ],
    ids=str,
)
def test_auto_on_ampere(change: dict[str, str], backend: str):
    choice = decide(config(**change), A100)
    assert choice.backend == backend
    assert choice.reason.startswith(f"{backend}: NVIDIA A100 (8.0) has no FP8 tensor cores")


def test_auto_without_a_gpu_for_mxfp8():
    reason = "reference, products in BF16 of dequantised operands: mxfp8 needs compute capability 10.x"
    assert decide(config(products="mxfp8"), H100).reason == reason


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_what_is_asked_for_is_taken(name: str):
    asked = config(name, "mxfp8" if name == "mxfp8" else "fp8")
    machine = H100 if name == "scaled_mm" else B200
    assert decide(asked, machine).reason == f"{name}: asked for, on {machine.label}"


@pytest.mark.parametrize(
    ("asked", "machine", "message"),
    [
        (
            config("triton"),
            CPU,
            "it needs compute capability 8.9 or higher, and here is a CPU. Use another GPU, or set",
        ),
        (config("bf16"), T4, "it needs compute capability 8.0 or higher, and here is Tesla T4 (7.5). Use another GPU"),
        (
            config("bf16", scales="plain"),
            A100,
            "it needs precision.scales=power_of_two, and here is plain. Set precision.scales=power_of_two, or set",
        ),
        (config("triton"), A100, "it needs compute capability 8.9 or higher, and here is NVIDIA A100 (8.0)."),
        (
            config("triton"),
            replace(H100, packages=frozenset()),
            "it needs the package triton, and here is none. Install",
        ),
        (config("scaled_mm"), B200, "it needs compute capability 9.x, and here is NVIDIA B200 (10.0)."),
        (
            config("scaled_mm"),
            replace(H100, cuda=(12, 6)),
            "it needs CUDA 12.9, and here is 12.6. Install torch for CUDA",
        ),
        (config("deepgemm"), replace(H100, packages=TRITON), "it needs the package deep_gemm, and here is none."),
        (config("deepgemm", scales="plain"), B200, "it needs precision.scales=power_of_two on capability 10.x"),
        (config("deepgemm", compute_dtype="float32"), H100, "it needs precision.compute_dtype=bfloat16"),
        (config("triton", gradient_tiles="blocks"), H100, "it needs precision.gradient_tiles=rows"),
        (config("triton", "mxfp8"), B200, "it needs precision.products=fp8, and here is precision.products=mxfp8."),
        (config("mxfp8"), B200, "it needs precision.products=mxfp8, and here is precision.products=fp8."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_not_work_is_refused(asked: Config, machine: Machine, message: str):
    with pytest.raises(ConfigError) as error:
        decide(asked, machine)
    assert str(error.value).startswith(f"precision.backend={asked.precision.backend}: {message}")


def test_mxfp8_needs_whole_tiles():
    odd = replace(config("mxfp8", "mxfp8"), model=ModelConfig(kv_lora_rank=56))
    with pytest.raises(ConfigError, match=r"needs sides in multiples of 32, and here is model.kv_lora_rank = 56"):
        decide(odd, B200)
    assert decide(replace(odd, precision=config(products="mxfp8").precision), B200).backend == "reference"


def test_this_machine():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose(config(), device)
    assert make_backend(choice.backend, config().precision).name == choice.backend
    assert choose(config("reference"), device).backend == "reference"


@pytest.mark.parametrize("name", ["reference", "bf16", "triton", "scaled_mm", "mxfp8"])
def test_a_backend_is_made_by_its_name(name: str):
    backend = make_backend(name, config(products="mxfp8" if name == "mxfp8" else "fp8", scales="plain").precision)
    assert backend.name == name
    assert backend.dtype is torch.bfloat16
    assert (backend.scheme.tile, backend.scheme.power_of_two) == ((32, True) if name == "mxfp8" else (128, False))


def test_every_name_that_a_config_may_have_is_known():
    assert set(NAMES) == {"auto", "reference", *BACKENDS}
