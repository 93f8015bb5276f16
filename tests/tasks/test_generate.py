import os
import pty
import subprocess
import sys
from dataclasses import replace

import pytest

from dstrain.config.commands import GenerateRoot
from dstrain.config.schema import RunConfig
from dstrain.data.tokenizer import ByteTokenizer
from dstrain.inference.generate import generate
from dstrain.model.transformer import Transformer
from dstrain.tasks.generate import run
from tests.inference.models import BASE, build
from tests.inference.run import write_run

CONFIG = replace(BASE, vocab_size=320)
SAMPLED = {"max_tokens": 60, "temperature": 0.7, "top_p": 0.9, "seed": 5}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(CONFIG)


@pytest.fixture(scope="module")
def root(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> GenerateRoot:
    path = tmp_path_factory.mktemp("run")
    write_run(path, {3: model})
    return GenerateRoot(run=RunConfig(str(path)), **SAMPLED)


def continuation(model: Transformer, prompt: list[int], **changes: float) -> str:
    options = {**SAMPLED, **changes, "eod": ByteTokenizer.eod, "vocab_size": ByteTokenizer.vocab_size}
    return ByteTokenizer().decode(list(generate(model, prompt, **options)))


@pytest.mark.parametrize("prompt", ["Once upon a time,\tthere ", "Grüße"])
def test_prompt_and_continuation_are_printed(
    prompt: str, model: Transformer, root: GenerateRoot, capsys: pytest.CaptureFixture[str]
) -> None:
    run(replace(root, prompt=prompt))
    out, err = capsys.readouterr()
    assert out == prompt + continuation(model, list(prompt.encode())) + "\n"
    assert err.endswith(" tokens/s)\n")
    assert "tokens in" in err


def test_an_empty_prompt_starts_a_document(
    model: Transformer, root: GenerateRoot, capsys: pytest.CaptureFixture[str]
) -> None:
    run(replace(root, temperature=0.0, top_p=1.0))
    assert capsys.readouterr().out == continuation(model, [ByteTokenizer.eod], temperature=0, top_p=1) + "\n"


def test_a_terminal_gets_the_prompt_dimmed_and_no_control_characters(
    root: GenerateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        run(replace(root, prompt="Hello", temperature=5.0, max_tokens=200))
    shown = os.read(reader, 10_000).decode().replace("\r\n", "\n")
    os.close(reader)
    assert shown.startswith("\033[2mHello\033[22m")
    text = shown.removeprefix("\033[2mHello\033[22m")
    assert "\ufffd" in text
    assert not [char for char in text if char < " " and char not in "\n\t"]


def test_the_command_stops_quietly_when_nobody_reads_on(root: GenerateRoot) -> None:
    command = [
        sys.executable,
        "-m",
        "dstrain",
        "generate",
        f"run.dir={root.run.dir}",
        "prompt=Hello",
        "max_tokens=9999",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(8).startswith("Hello")
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0
