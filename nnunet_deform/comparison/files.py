"""Files that appear complete or not at all, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A file to write beside ``file``, which takes its place in one step when the block succeeds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    with _replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_table(file: Path, table: pd.DataFrame) -> None:
    """As Parquet, which keeps every bit of the figures."""
    with _replacing(file) as partial:
        table.to_parquet(partial, index=False)


def write_csv(file: Path, table: pd.DataFrame) -> None:
    """Numbers in the shortest form that keeps every bit of them."""
    with _replacing(file) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")


def write_json(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2) + "\n")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def fingerprint(file: Path) -> str:
    """SHA-256 of the bytes; of a JSON file of its content, so that its layout does not matter."""
    if file.suffix == ".json":
        return hashlib.sha256(json.dumps(read_json(file), sort_keys=True).encode()).hexdigest()
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
