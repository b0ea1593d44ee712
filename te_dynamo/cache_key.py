"""A hash of this package's sources: part of the key of torch's compile caches, which know a custom operator by name only."""

from __future__ import annotations

import hashlib
from pathlib import Path


def hash_sources(root: Path) -> str:
    """SHA-256 over every Python file below `root`, by relative path and content."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


SOURCES_HASH = hash_sources(Path(__file__).parent)
