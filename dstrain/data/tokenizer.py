"""Text to token numbers and back, by a `tokenizers` JSON file or by bytes.

A document ends with the `eod` token. Fill-in-the-middle needs three further tokens; a tokenizer without them has
`fim = None`. Text is never trusted with special tokens: "<|endoftext|>" inside a document is encoded as the characters
it consists of.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dstrain.errors import UserError

EOD_NAMES = ("<|endoftext|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<eos>")
# In the order of FimTokens.
FIM_NAMES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


class FimTokens(NamedTuple):
    """The tokens before the prefix, before the suffix (in the place of the hole) and before the middle."""

    begin: int
    hole: int
    end: int


class Tokenizer(Protocol):
    """`fingerprint` differs between tokenizers that encode differently."""

    vocab_size: int
    eod: int
    fim: FimTokens | None
    fingerprint: str

    def encode_array(self, text: str) -> np.ndarray:
        """The tokens of `text` as 1-D integers, without end of document."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without end of document."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Special tokens are left out; incomplete UTF-8 becomes U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes 0..255, end of document 256, fill-in-the-middle 257..259."""

    vocab_size = 260
    eod = 256
    fim: FimTokens | None = FimTokens(257, 258, 259)
    fingerprint = "bytes"

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, read from its JSON file."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Backend

        data = _read(path)
        try:
            self._backend = Backend.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is not a tokenizer file of the `tokenizers` library: {error}") from error
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eod = self._find_eod(path)
        self.fim = self._find_fim()
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def _find_eod(self, path: Path) -> int:
        for name in EOD_NAMES:
            if (token := self._backend.token_to_id(name)) is not None:
                return token
        raise UserError(
            f"{path} has no end-of-document token: none of {', '.join(EOD_NAMES)} is in its vocabulary. "
            f"Add one of them as a special token to the tokenizer."
        )

    def _find_fim(self) -> FimTokens | None:
        for names in FIM_NAMES:
            tokens = [token for name in names if (token := self._backend.token_to_id(name)) is not None]
            if len(tokens) == len(names):
                return FimTokens(*tokens)
        return None

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.int64)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.tokenizer={path}: {error.strerror}. Give 'bytes' or the path of a tokenizer.json."
        ) from error


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer for "bytes", or for the path of a tokenizer JSON file. UserError if it can't be read."""
    return ByteTokenizer() if spec == "bytes" else JsonTokenizer(Path(spec))


def embedding_rows(tokenizer: Tokenizer) -> int:
    """Of a model for this tokenizer: its tokens, rounded up to a multiple of 64, which kernels like."""
    return -(-tokenizer.vocab_size // 64) * 64


class StreamDecoder:
    """Text of tokens that come one by one, never with half a character.

    Text is decoded together with the tokens just before it, because some decoders drop a space at the beginning, and is
    held back while it ends in an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # How many of `_tokens` have been printed; they stay as context.
        self._printed = 0

    def push(self, token: int) -> str:
        """The text that became complete with `token`; may be empty."""
        self._tokens.append(token)
        text = self._pending()
        return "" if text.endswith("\ufffd") else self._take(text)

    def flush(self) -> str:
        """What was held back; U+FFFD stands for bytes that never became a character."""
        return self._take(self._pending())

    def _pending(self) -> str:
        context = self._tokenizer.decode(self._tokens[: self._printed])
        return self._tokenizer.decode(self._tokens)[len(context) :]

    def _take(self, text: str) -> str:
        if text:
            self._tokens = self._tokens[self._printed :]
            self._printed = len(self._tokens)
        return text
