"""Documents from text files, JSON lines, parquet, Hugging Face datasets on disk, and directories of the first three.

A text file is one document, a line or row of the others is one. Everything streams: a long text file comes as several
pieces of one document, cut at line ends.
"""

import gzip
import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from dstrain.errors import ConfigError, UserError

# A text file is read in pieces of about this size: no file has to fit into memory, and one file feeds all cores.
PIECE_BYTES = 2**20
# A corpus that every machine has: data.path=python-stdlib reads the sources of Python's standard library.
STANDARD_LIBRARY = Path("python-stdlib")
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo"}
NEEDS_EXTRA = "needs pyarrow and datasets, which are not installed: pip install 'dstrain[data]'"


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one. `read_bytes` is the share of the input files' size that it stands for."""

    text: str
    read_bytes: int
    ends_document: bool = True


def source_files(path: Path) -> list[Path]:
    """The files of a corpus, sorted; hidden ones and __pycache__ are left out. UserError if there are none."""
    if path.is_file():
        return [path]
    if path == STANDARD_LIBRARY and not path.exists():
        return _standard_library()
    if not path.is_dir():
        raise UserError(
            f"data.path={path} does not exist. Give text, JSONL, parquet, a directory, a token file "
            "prefix, or python-stdlib."
        )
    if files := sorted(file for file in path.rglob("*") if file.is_file() and _visible(file.relative_to(path))):
        return files
    raise UserError(f"data.path={path} holds no files. Give a directory with text, JSONL or parquet files.")


def _standard_library() -> list[Path]:
    """The modules of the running Python, without their tests and what others installed among them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in root.rglob("*.py") if not NOT_LIBRARY.intersection(file.relative_to(root).parts))
    # Some distributions add modules generated for their machine.
    return sorted(file for file in files if not file.name.startswith("_sysconfigdata"))


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def read_documents(path: Path, text_key: str) -> Iterator[Piece]:
    """All documents in a fixed order.

    Raises UserError naming the file (and line or byte) for what isn't UTF-8, JSON or parquet, or lacks `text_key`.
    """
    if path.is_dir() and _is_dataset(path):
        yield from _read_dataset(path, text_key)
        return
    for file in source_files(path):
        yield from _read_file(file, text_key)


def _read_file(file: Path, text_key: str) -> Iterator[Piece]:
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(file, text_key)
    if file.suffix == ".parquet":
        return _read_parquet(file, text_key)
    return _read_text(file)


def _read_text(file: Path) -> Iterator[Piece]:
    with _open(file) as stream:
        offset, raw = 0, _read_lines(stream)
        while raw:
            following = _read_lines(stream)
            yield Piece(_decode(raw, file, offset), len(raw), ends_document=not following)
            offset, raw = offset + len(raw), following


def _read_lines(stream: BinaryIO) -> bytes:
    block = stream.read(PIECE_BYTES)
    return block if len(block) < PIECE_BYTES else block + stream.readline()


def _open(file: Path) -> BinaryIO:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}.") from error


def _decode(raw: bytes, file: Path, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}. Convert the file "
            f"(iconv -t UTF-8), or take it out of the corpus."
        ) from error


def _read_jsonl(file: Path, text_key: str) -> Iterator[Piece]:
    zipped = file.suffix == ".gz"
    with _open(file) as compressed, gzip.open(compressed) if zipped else compressed as stream:
        offset, before = 0, 0
        for number, line in enumerate(_lines(cast(BinaryIO, stream), file), 1):
            text = _decode(line, file, offset)
            offset += len(line)
            # Of a compressed file, what the decompressor has taken in so far.
            position = compressed.tell() if zipped else offset
            if text.strip():
                yield Piece(_text_of(text, f"{file}:{number}", text_key), position - before)
                before = position


def _lines(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    try:
        yield from stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file} is not a complete gzip file: {error}. Make or download it again.") from error


def _text_of(line: str, where: str, text_key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a line of JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: a JSON {type(record).__name__}; each line must be an object with text in data.text_key."
        )
    _check_key(text_key, list(record), where)
    if not isinstance(record[text_key], str):
        raise UserError(f"{where}: {text_key!r} is not a string but {json.dumps(record[text_key])[:40]}.")
    # JSON can escape half a surrogate pair, which no encoding of Unicode can hold.
    if "\\u" in line and not _encodable(record[text_key]):
        raise UserError(f"{where}: {text_key!r} holds half a surrogate pair (\\ud800 to \\udfff). Repair the line.")
    return record[text_key]


def _encodable(text: str) -> bool:
    try:
        return bool(text.encode()) or True
    except UnicodeEncodeError:
        return False


def _check_key(text_key: str, keys: list[str], where: str) -> None:
    if text_key not in keys:
        raise ConfigError(
            "data.text_key",
            text_key,
            f"{where} has only {', '.join(keys) or 'no keys'}",
            "Name the key that holds the text.",
        )


def _read_parquet(file: Path, text_key: str) -> Iterator[Piece]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{file}: parquet {NEEDS_EXTRA}") from error
    try:
        table = parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a complete parquet file: {error}") from error
    _check_key(text_key, table.schema_arrow.names, str(file))
    row_bytes = file.stat().st_size // max(1, table.metadata.num_rows)
    rows = (value for batch in table.iter_batches(columns=[text_key]) for value in batch.column(0).to_pylist())
    for number, text in enumerate(rows):
        yield Piece(_check_text(text, f"{file}: row {number}", text_key), row_bytes)


def _check_text(value: Any, where: str, text_key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {text_key!r} is not a string but {value!r:.40}.")
    return value


def _is_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _read_dataset(path: Path, text_key: str) -> Iterator[Piece]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: a Hugging Face dataset {NEEDS_EXTRA}") from error
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"data.path={path} is not a complete Hugging Face dataset: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise UserError(f"data.path={path} has the splits {', '.join(data)}. Give the directory of one of them.")
        data = data["train"]
    _check_key(text_key, data.column_names, str(path))
    row_bytes = sum(file.stat().st_size for file in source_files(path)) // max(1, len(data))
    for number, row in enumerate(data.select_columns(text_key)):
        yield Piece(_check_text(row[text_key], f"{path}: row {number}", text_key), row_bytes)
