"""What `engine=deepspeed` refuses, and what it relies on in DeepSpeed. Its results: tests/gloo/test_deepspeed.py."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from dstrain.config.schema import Config, EngineConfig, PrecisionConfig
from dstrain.engine import deepspeed
from dstrain.engine.deepspeed import VERSION, check_deepspeed
from dstrain.errors import ConfigError

GOOD = Config(engine=EngineConfig("deepspeed"))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("offload", [False, True])
def test_accepts(stage: int, offload: bool):
    check_deepspeed(replace(GOOD, engine=EngineConfig("deepspeed", stage, offload_optimizer=offload)))


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("engine.zero_stage", replace(GOOD, engine=EngineConfig("deepspeed", zero_stage=0))),
        ("engine.zero_stage", replace(GOOD, engine=EngineConfig("deepspeed", zero_stage=3))),
        ("precision.grad_wire_dtype", replace(GOOD, precision=PrecisionConfig(grad_wire_dtype="bfloat16"))),
    ],
)
def test_refuses(field: str, bad: Config):
    with pytest.raises(ConfigError) as error:
        check_deepspeed(bad)
    assert error.value.field == field


def _absent(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(("version", "reason"), [(_absent, "not installed"), (lambda _: "0.19.9", "0.19.9")])
def test_needs_its_one_version(monkeypatch: pytest.MonkeyPatch, version, reason: str):
    monkeypatch.setattr(deepspeed, "version", version)
    with pytest.raises(ConfigError, match=reason) as error:
        check_deepspeed(GOOD)
    assert "pip install 'dstrain[deepspeed]'" in error.value.cure


def test_version_is_that_of_the_extra():
    assert f'"deepspeed=={VERSION}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")


# One process without a launcher: a step, then what DeepSpeed left behind.
ALONE = """
import json
import torch
from dstrain.config.schema import *
from dstrain.engine.choose import make_engine
from dstrain.mesh.axes import Mesh
from dstrain.mesh.groups import Place, connect
from dstrain.parallel.apply import build_model, logical_parameters

model = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_experts=4, moe_intermediate_size=16)
precision = PrecisionConfig("float32", "bfloat16", "float32")
config = Config(model=model, precision=precision, engine=EngineConfig("deepspeed", bucket_mib=1))
groups = connect(Mesh(), Place.from_environment())
model = build_model(config, groups)
engine = make_engine(model, config, groups)
engine.expect({x.name: 1 for x in logical_parameters(model)})
model(torch.randint(64, (2, 17)), 2, 0.0).total.backward()
norm = engine.reduce()
engine.step(1e-3)
from deepspeed import comm
print(json.dumps({"norm": norm, "compiled": comm.comm.cdb.shm_comm_op is not None}))
"""


def test_runs_alone_silently_and_compiles_nothing(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DS_", "RANK", "WORLD"))}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["norm"] > 0
    assert not found["compiled"]
    assert not list(tmp_path.iterdir())


def test_private_parts_are_there():
    """Those whose absence would not be an error but another result."""
    zero = pytest.importorskip("dstrain.engine.zero")
    base = zero.DeepSpeedZeroOptimizer
    # Overridden, or read from buckets that they fill.
    for name in ("average_tensor", "_gradient_reduction_buffer_dtype", "setup_buckets"):
        assert inspect.isfunction(getattr(base, name)), name
    assert "self._gradient_reduction_buffer_dtype()" in inspect.getsource(base.setup_buckets)
    assert "self.timers(OPTIMIZER_ALLGATHER_TIMER).start()" in inspect.getsource(base.step)
    # All that is handed over by name must be taken by name.
    taken = inspect.signature(base.__init__).parameters
    assert {"gradient_average", "contiguous_gradients", "compute_grad_norm", "check_grad_overflow"} <= taken.keys()
    assert taken["reduce_scatter"].default is True
