"""What transformers reads from a written tokenizer must encode as ours does."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer

from dstrain.checkpoint.tokenizer_files import copy_tokenizer, write_tokenizer
from dstrain.data.tokenizer import ByteTokenizer, load_tokenizer

TEXT = "def f(x):\n\treturn x ** 2  # naïve — 日本 \x00\x7f\xad"


def test_bytes_mean_the_same_to_transformers(tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), ByteTokenizer()
    assert theirs.encode(TEXT) == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT
    assert theirs.eos_token_id == ours.eod
    assert len(theirs) == ours.vocab_size


def test_bytes_survive_export_and_import(tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path)
    (tmp_path / "run").mkdir()
    back = load_tokenizer(copy_tokenizer(tmp_path, tmp_path / "run", tmp_path / "run"))
    assert back.encode(TEXT) == ByteTokenizer().encode(TEXT)
    assert (back.eod, back.fim, back.vocab_size) == (256, ByteTokenizer.fim, 260)


@pytest.mark.parametrize("has_config", [False, True])
def test_a_file_is_copied_with_what_lies_beside_it(tmp_path: Path, has_config: bool) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a")).save(str(source / "words.json"))
    if has_config:
        (source / "tokenizer_config.json").write_text('{"mine": 1}')
    write_tokenizer(str(source / "words.json"), out)
    assert (out / "tokenizer.json").read_bytes() == (source / "words.json").read_bytes()
    fields = json.loads((out / "tokenizer_config.json").read_text())
    assert fields == {"mine": 1} if has_config else fields["eos_token"] == "</s>"


def test_without_a_tokenizer_bytes_are_assumed(tmp_path: Path) -> None:
    assert copy_tokenizer(tmp_path, tmp_path, tmp_path) == "bytes"
