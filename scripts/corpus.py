"""Makes a corpus that every machine has: the sources of Python's standard library, one module a document, as JSONL.

    python scripts/corpus.py out.jsonl [--megabytes 8]

Prints its size and its unigram entropy by bytes: a model whose loss is below it has learnt more than frequencies.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dstrain.data.indexed import unigram_entropy
from dstrain.data.tokenizer import ByteTokenizer

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo"}


def modules(root: Path) -> Iterator[tuple[str, str]]:
    """(name, source) of the modules under `root`, sorted by name."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # Some distributions add modules generated for their machine.
        if not LEFT_OUT.intersection(name.parts) and not name.name.startswith("_sysconfigdata"):
            yield str(name), path.read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, default=8.0, help="stop after this many million bytes of text")
    args = parser.parse_args()

    tokenizer = ByteTokenizer()
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    with open(args.out, "w", encoding="utf-8") as stream:
        for name, text in modules(Path(sysconfig.get_paths()["stdlib"])):
            if counts[: tokenizer.eod].sum() >= args.megabytes * 1e6:
                break
            if text:
                stream.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
                counts += np.bincount(tokenizer.encode_array(text), minlength=len(counts))
                counts[tokenizer.eod] += 1

    print(
        f"{args.out}: {counts[tokenizer.eod]:,} documents, {counts.sum():,} byte tokens, "
        f"unigram entropy {unigram_entropy(counts):.4f} nats/token"
    )


if __name__ == "__main__":
    main()
