"""A hash of this package's sources: part of the key of torch's compile caches, which know a custom operator by name only."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".py", ".h", ".cpp")


def hash_sources(root: Path) -> str:
    """SHA-256 over every source below `root`, by relative path and content."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


SOURCES_HASH = hash_sources(Path(__file__).parent)


def sources_key(modules: Iterable[str]) -> str:
    """The hash of this package, and of those `modules` that are outside of it: third-party operations and implementations."""
    foreign = sorted(m for m in modules if not m.startswith("te_dynamo."))
    files = [getattr(sys.modules[m], "__file__", None) for m in foreign]
    digests = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files if f is not None and Path(f).exists()]
    return " ".join([SOURCES_HASH, *digests])
