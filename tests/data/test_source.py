import gzip
import json
import sys
from pathlib import Path

import pytest

from dstrain.data import source
from dstrain.data.source import read_documents, source_files
from dstrain.errors import UserError


def texts(path: Path, text_key: str = "text") -> list[str]:
    """Documents put together again from their pieces."""
    documents, pending = [], ""
    for piece in read_documents(path, text_key):
        pending += piece.text
        if piece.ends_document:
            documents.append(pending)
            pending = ""
    assert not pending
    return documents


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("eins\r\nzwei ä\n".encode())
    assert texts(path) == ["eins\r\nzwei ä\n"]


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 10, 1000])
def test_long_text_streams_as_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(source, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "a.txt"
    text = "".join(f"Zeile ä {n}\n" for n in range(20)) + "Ende"
    path.write_text(text, encoding="utf-8")
    pieces = list(read_documents(path, "text"))
    assert texts(path) == [text]
    assert sum(piece.read_bytes for piece in pieces) == path.stat().st_size
    assert (len(pieces) > 1) == (piece_bytes < 1000)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    raw = b'{"text": "eins", "n": 1}\n\n{"n": 2, "text": "\\ud83d\\ude80"}'
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    assert texts(path) == ["eins", "🚀"]
    assert sum(piece.read_bytes for piece in read_documents(path, "text")) == path.stat().st_size


def test_directory_is_sorted_and_recursive_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/.hidden", ".git/config", "__pycache__/x.pyc", "c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d.jsonl").write_text('{"text": "d"}\n')
    assert texts(tmp_path) == ["a/z.md", "b.txt", "c.py", "d"]


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"n": [1, 2], "body": ["eins", "zwei"]}), path)
    assert texts(path, "body") == ["eins", "zwei"]
    with pytest.raises(UserError, match=r"data\.text_key=text: .*a\.parquet has only n, body"):
        texts(path)


def test_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"text": ["eins", "zwei"]})
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=train.select([0])).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict(test=train).save_to_disk(tmp_path / "no_train")
    assert texts(tmp_path / "one") == texts(tmp_path / "splits") == ["eins", "zwei"]
    with pytest.raises(UserError, match="has the splits test"):
        texts(tmp_path / "no_train")


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_missing_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"x")
    if module == "datasets":
        path = tmp_path / "dataset"
        path.mkdir()
        (path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"pip install 'dstrain\[data\]'"):
        texts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": oops}', "a.jsonl:2: not a line of JSON"),
        ('{"body": "x"}', "data.text_key=text: .*a.jsonl:2 has only body"),
        ('{"text": 3}', "a.jsonl:2: 'text' is not a string but 3"),
        ('["x"]', "a.jsonl:2: a JSON list"),
        ('{"text": "\\ud800"}', "a.jsonl:2: 'text' holds half a surrogate pair"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        texts(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_non_utf8_names_file_and_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(source, "PIECE_BYTES", 4)
    path = tmp_path / name
    path.write_bytes(b'{"text": "eins"}\n{"text": "z\xe9"}\n')
    with pytest.raises(UserError, match=rf"{name} is not UTF-8: byte 0xe9 at offset 28"):
        texts(path)


def test_broken_containers_are_user_errors(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "eins"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "plain.jsonl.gz").write_bytes(b"no gzip")
    for name in ("cut.jsonl.gz", "plain.jsonl.gz"):
        with pytest.raises(UserError, match=f"{name} is not a complete gzip file"):
            texts(tmp_path / name)
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a complete parquet file"):
        texts(tmp_path / "a.parquet")


def test_missing_and_empty_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        texts(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no files"):
        texts(tmp_path)


def test_the_standard_library_is_a_corpus() -> None:
    names = [file.name for file in source_files(Path("python-stdlib"))]
    assert {"dataclasses.py", "socket.py"} <= set(names)
    assert not [name for name in names if not name.endswith(".py")]
    assert next(read_documents(Path("python-stdlib"), "text")).text
