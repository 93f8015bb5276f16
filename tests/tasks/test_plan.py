"""`dstrain plan` as a user meets it."""

import re
import subprocess
import sys
from functools import partial

import pytest


@pytest.fixture
def plan(command):
    return partial(command, "plan")


def test_one_page(plan):
    status, out, err = plan("+experiment=h100_4x8", "hardware.nodes=4", "model.vocab_size=102400")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "15.71B parameters on 32 x h100_sxm"
    assert len(lines) < 60
    for begins in (r"A step takes [\d.]+ \([\d.]+-[\d.]+\) s, ", r"compute ", r"a rank +\d", r"Fits: a device needs "):
        assert any(re.match(begins, line) for line in lines), begins
    assert "The run: 70,466 steps, 1.33T tokens, " in out
    assert "device-hours, " in out
    assert "  Balanced routing: all experts get equally many tokens." in lines
    assert any(line.startswith("  specification: ") for line in lines)


def test_deepseek_v3_without_torch():
    """In a process of its own: predicting must not cost the seconds that importing torch does."""
    program = "import sys; from dstrain import cli; print(cli.status_of(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", program, "plan", "+experiment=deepseek_v3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert re.search(r"^rank 1-\d+ ", done.stdout, re.MULTILINE)
    # A third of 2048 H800 is what no layout of BF16 reaches; a tenth would be a mistake.
    assert 0.1 < float(re.search(r"MFU ([\d.]+)%", done.stdout)[1]) / 100 < 0.5


def test_fewer_devices_than_the_recipe_has(plan):
    status, out, _ = plan(
        "+experiment=deepseek_v3",
        "hardware=a100_pcie_25g",
        "hardware.nodes=8",
        "train.sequences=1024",
        "train.ramp.tokens=0",
    )
    assert status == 0
    assert out.startswith(
        "The mesh asks for 2,048 devices, hardware.nodes=8 has 64: planned with mesh.ep=4 mesh.dp=1.\n"
    )
    assert "Does not fit: pipeline rank " in out


def test_a_vocabulary_of_bytes(plan):
    """As in training, the tokenizer says it."""
    status, out, _ = plan("hardware=l40s", "train.steps=7")
    assert status == 0
    assert "The run: 7 steps, 28,672 tokens" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+experiment=deepseek_v4"], "experiment=deepseek_v4: there is no such choice. Choose one of "),
        (["hardware=h101"], "hardware=h101: there is no such choice. Choose one of "),
        ([], "hardware.peak_bf16_tflops=0.0: hardware=cpu does not say it"),
        (["hardware=h100_sxm", "mesh.ep=3"], "mesh.ep=3: it must divide model.num_experts=16. "),
        (["hardware=h100_sxm", "mesh.pp=3", "hardware.nodes=1"], "mesh.pp=3: it must divide the 8 devices of "),
        (
            ["hardware=h100_sxm", "hardware.inter_node_gbytes_per_s=-1"],
            "hardware.inter_node_gbytes_per_s=-1.0: it must",
        ),
        (["serach"], "There is no command 'plan serach'. Did you mean `dstrain plan search`?"),
    ],
)
def test_wrong_input(plan, words: list[str], message: str):
    status, out, err = plan(*words)
    assert (status, out) == (2, "")
    assert err.startswith(f"dstrain: {message}")
    assert err.count("\n") == 1
