"""Files that appear complete or not at all, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Replace ``file`` in one step; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


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
