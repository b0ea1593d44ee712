"""What the docs state as data is what the code has."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from pathlib import Path

import pytest

from te_dynamo.lowering.devices import dotted
from te_dynamo.lowering.te import library
from te_dynamo.lowering.te.hardware import GATES, NOT_IN_TE
from te_dynamo.recipe import CLASSES, Recipe

DOCS = Path(__file__).parent.parent / "docs"


def row(recipe: type[Recipe]) -> str:
    if recipe in NOT_IN_TE:
        return f"| `{recipe.name}` | none | | | {NOT_IN_TE[recipe]} |"
    gate = GATES[recipe]
    where = f"{dotted(gate.least)} and newer" if gate.below is None else f"{dotted(gate.least)} to below {dotted(gate.below)}"
    note = f" {gate.note} |" if gate.note else " |"
    return f"| `{recipe.name}` | {where} | {dotted(gate.cuda)} | {gate.rows}, {gate.columns} |{note}"


@pytest.mark.parametrize("recipe", CLASSES)
def test_what_each_gpu_supports(recipe):
    assert row(recipe) in (DOCS / "transformer-engine.md").read_text().splitlines()


def test_the_versions_of_transformer_engine():
    text = (DOCS / "transformer-engine.md").read_text()
    assert f"te_dynamo supports TE {dotted(library.OLDEST)} and newer, below {library.NEWEST[0]};" in text
    extra = (DOCS.parent / "pyproject.toml").read_text()
    assert f'te = ["transformer_engine[pytorch]>={dotted(library.OLDEST)},<{library.NEWEST[0]}"]' in extra


def test_the_architecture_names_every_file_and_none_that_is_not_there():
    package = DOCS.parent / "te_dynamo"
    text = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    files = {path.name for path in package.rglob("*.py")} - {"__init__.py"}
    assert files - named == set()
    assert named - files == {"test_extending.py", "capture.py", "__init__.py"}


@pytest.mark.parametrize("page", ["huggingface.md", "accelerate.md"])
def test_code_blocks_are_python_and_what_they_import_is_there(page):
    blocks = re.findall(r"```python\n(.*?)```", textwrap.dedent((DOCS / page).read_text()), re.DOTALL)
    assert blocks
    for block in map(textwrap.dedent, blocks):
        for statement in ast.parse(block).body:
            if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("te_dynamo"):
                module = importlib.import_module(statement.module or "")
                assert [name.name for name in statement.names if not hasattr(module, name.name)] == []
