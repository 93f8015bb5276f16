"""The tokenizer files of a Hugging Face model directory."""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from dstrain.data.tokenizer import EOD_NAMES, FIM_NAMES, ByteTokenizer, load_tokenizer

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


def write_tokenizer(spec: str, directory: Path) -> None:
    """Writes the tokenizer `spec` ("bytes" or a JSON file), with what transformers must know to open it."""
    if spec == "bytes":
        byte_tokenizer().save(str(directory / TOKENIZER))
    else:
        shutil.copyfile(spec, directory / TOKENIZER)
    beside = Path(spec).with_name(CONFIG)
    if spec != "bytes" and beside.is_file():
        shutil.copyfile(beside, directory / CONFIG)
        return
    eos = Tokenizer.from_file(str(directory / TOKENIZER)).id_to_token(load_tokenizer(spec).eod)
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "clean_up_tokenization_spaces": False}
    (directory / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def copy_tokenizer(source: Path, directory: Path, final: Path) -> str:
    """Copies the tokenizer of a model directory; returns `data.tokenizer` for when `directory` is called `final`.

    A directory without one gives "bytes": the model can still be trained on token files.
    """
    for name in (TOKENIZER, CONFIG):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    return str(final.absolute() / TOKENIZER) if (source / TOKENIZER).is_file() else "bytes"


def byte_tokenizer() -> Tokenizer:
    """`data.tokenizer.ByteTokenizer` as a tokenizer of the library: byte-level BPE without a single merge."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = (EOD_NAMES[0], *FIM_NAMES[0])[: ByteTokenizer.vocab_size - 256]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that byte-level BPE (GPT-2) shows for each byte: itself where it prints, else one from 256 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]
