"""Settings of the process: ours where the user has none."""

import os
import subprocess
import sys

import pytest

from dstrain.host import tune_gpu, tune_gpu_memory


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    environment = {"CUDA_MODULE_LOADING": "LAZY"}
    monkeypatch.setattr("os.environ", environment)
    tune_gpu()
    assert environment == {"CUDA_MODULE_LOADING": "LAZY", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_allocator_stays(monkeypatch: pytest.MonkeyPatch, name: str):
    environment = {name: "max_split_size_mb:128"}
    monkeypatch.setattr("os.environ", environment)
    tune_gpu_memory()
    assert environment == {name: "max_split_size_mb:128"}


def test_torch_takes_the_allocator_that_was_set():
    """Though it was imported before."""
    program = (
        "import torch\n"
        "from dstrain.host import tune_gpu_memory\n"
        "tune_gpu_memory()\n"
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "expandable_segments:True"
