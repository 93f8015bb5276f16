import json
from pathlib import Path

import pytest

from dstrain.data.tokenizer import EOD_NAMES, ByteTokenizer, FimTokens, StreamDecoder, load_tokenizer
from dstrain.errors import UserError

TEXT = "Straße 北京 🚀 naïve\n\n  x = 1 <|endoftext|>"


def test_bytes_roundtrip() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9] == tokenizer.encode_array("aé").tolist()
    assert tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.eod]) == TEXT
    assert tokenizer.vocab_size == 1 + max(tokenizer.eod, *(tokenizer.fim or ()))


def test_json_roundtrip_treats_special_tokens_in_text_as_text(bpe_file: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_file))
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.eod not in tokens
    assert tokenizer.decode([*tokens, tokenizer.eod]) == TEXT
    assert tokenizer.encode_array(TEXT).tolist() == tokens
    assert tokenizer.vocab_size > max(tokens)
    assert tokenizer.fim == FimTokens(1, 2, 3)


def test_fingerprint_follows_content(bpe_file: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.json"
    record = json.loads(bpe_file.read_text())
    record["model"]["merges"] = record["model"]["merges"][:-1]
    changed.write_text(json.dumps(record))
    prints = {load_tokenizer(spec).fingerprint for spec in ("bytes", str(bpe_file), str(changed))}
    assert len(prints) == 3


@pytest.mark.parametrize("spec", ["bytes", "bpe"])
def test_stream_prints_whole_characters_only(spec: str, bpe_file: Path) -> None:
    tokenizer = load_tokenizer("bytes" if spec == "bytes" else str(bpe_file))
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(token) for token in tokenizer.encode(TEXT)]
    assert "".join(parts) == TEXT
    assert decoder.flush() == ""
    assert not any("\ufffd" in part for part in parts)
    assert len([part for part in parts if part]) > 10


def test_stream_flush_shows_an_incomplete_character() -> None:
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(token) for token in b"a\xc3"] == ["a", ""]
    assert decoder.flush() == "\ufffd"


def test_stream_goes_on_after_invalid_bytes() -> None:
    decoder = StreamDecoder(ByteTokenizer())
    assert "".join(decoder.push(token) for token in b"\xff\xffab") == "\ufffd\ufffdab"


def test_missing_eod_is_named(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "t.json"
    Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(UserError, match="no end-of-document token") as error:
        load_tokenizer(str(path))
    assert EOD_NAMES[0] in str(error.value)


@pytest.mark.parametrize("content", [None, "no json", "{}"])
def test_unreadable_file_is_a_user_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"t\.json"):
        load_tokenizer(str(path))
