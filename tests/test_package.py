"""The sdist and the wheel contain the whole package; what pip installs from them computes in FP8."""

from __future__ import annotations

import ast
import re
import sys
import tarfile
import zipfile

import pytest

from tools import package


@pytest.mark.slow
def test_an_installed_wheel_computes_in_fp8(tmp_path):
    sdist, wheel = package.build(tmp_path)
    for files in (package.files_of(sdist), package.files_of(wheel)):
        assert {"te_dynamo/py.typed", "te_dynamo/lowering/cpu/linears.cpp", "te_dynamo/lowering/cpu/fp8.h"} <= files == package.sources()
    with tarfile.open(sdist) as made:
        assert f"{sdist.name.removesuffix('.tar.gz')}/LICENSE" in made.getnames()
    with zipfile.ZipFile(wheel) as made:
        (entries,) = (name for name in made.namelist() if name.endswith("entry_points.txt"))
        assert "te_fp8 = te_dynamo.backend:te_fp8" in made.read(entries).decode()
    assert "computes in FP8" in package.trial(wheel, tmp_path / "venv", clean=False)


def test_what_is_imported_is_declared():
    """In pyproject.toml, or by torch: a development environment has more packages than a user's."""
    named = (
        alias
        for path in (package.ROOT / package.PACKAGE).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for alias in ([a.name for a in node.names] if isinstance(node, ast.Import) else [])
        + ([node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else [])
    )
    imported = {name.partition(".")[0] for name in named} - sys.stdlib_module_names - {"te_dynamo"}
    declared = set(re.findall(r'"([a-z][\w-]*)(?:\[\w+\])?(?:[<>=][^"]*)?"', (package.ROOT / "pyproject.toml").read_text()))
    assert {"torch", "numpy"} <= imported
    assert imported - declared <= {"sympy", "transformer_engine_torch"}  # torch's, and the extra `te`'s


def test_a_file_that_is_left_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "said", lambda command, cwd: built(tmp_path))
    with pytest.raises(RuntimeError, match=r"te_dynamo-0.1.0.tar.gz lacks te_dynamo/__init__.py, .*linears.cpp.*package-data"):
        package.build(tmp_path)


def built(folder) -> str:
    """Builds an sdist and a wheel that lack a file."""
    with tarfile.open(folder / "te_dynamo-0.1.0.tar.gz", "w:gz"):
        pass
    with zipfile.ZipFile(folder / "te_dynamo-0.1.0-py3-none-any.whl", "w"):
        pass
    return "te_dynamo-0.1.0.tar.gz"
