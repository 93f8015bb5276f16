"""Settings of the process: ours where the user has none."""

import pytest

from dstrain.host import tune_gpu


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    environment = {"CUDA_MODULE_LOADING": "LAZY"}
    monkeypatch.setattr("os.environ", environment)
    tune_gpu()
    assert environment == {"CUDA_MODULE_LOADING": "LAZY", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
