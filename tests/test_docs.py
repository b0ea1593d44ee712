"""The data in the docs agrees with the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from te_dynamo.config import Options
from te_dynamo.lowering.devices import dotted
from te_dynamo.lowering.te import library
from te_dynamo.lowering.te.hardware import GATES, NOT_IN_TE
from te_dynamo.recipe import CLASSES, Recipe
from tools import draw_graph

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def row(recipe: type[Recipe]) -> str:
    if recipe in NOT_IN_TE:
        return f"| `{recipe.name}` | none | | | {NOT_IN_TE[recipe]} |"
    gate = GATES[recipe]
    where = f"{dotted(gate.least)} and newer" if gate.below is None else f"{dotted(gate.least)} to below {dotted(gate.below)}"
    note = f" {gate.note} |" if gate.note else " |"
    return f"| `{recipe.name}` | {where} | {dotted(gate.cuda)} | {gate.rows}, {gate.columns} |{note}"


@pytest.mark.parametrize("recipe", CLASSES)
def test_what_each_gpu_supports(recipe):
    assert row(recipe) in (DOCS / "support.md").read_text().splitlines()


def test_the_versions_of_transformer_engine():
    text = (DOCS / "transformer-engine.md").read_text()
    assert f"te_dynamo supports TE {dotted(library.OLDEST)} and newer, below {library.NEWEST[0]};" in text
    extra = (ROOT / "pyproject.toml").read_text()
    assert f'te = ["transformer_engine[pytorch]>={dotted(library.OLDEST)},<{library.NEWEST[0]}"]' in extra


def test_the_architecture_names_every_file_and_none_that_is_not_there():
    package = ROOT / "te_dynamo"
    text = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    files = {path.name for path in package.rglob("*.py")} - {"__init__.py"}
    assert files - named == set()
    assert named - files <= {"__init__.py"}


def test_the_options_are_all_there():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", (DOCS / "options.md").read_text(), re.MULTILINE)
    defaults = {f.name: getattr(Options(), f.name) for f in fields(Options)}
    assert {key: ast.literal_eval(value) for key, value in rows} == defaults


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in DOCS.glob("*.md"))])
def test_links_lead_to_files(page):
    """Links within the docs also lead to headings."""
    path = ROOT / page
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        assert not anchor or anchor in {slug(heading) for heading in re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)}, target


def slug(heading: str) -> str:
    """The anchor that mkdocs and GitHub make for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_every_page_is_in_the_navigation():
    named = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_picture_is_of_the_graph_as_it_is_now():
    """`python -m tools.draw_graph` draws it."""
    assert draw_graph.drawing() == draw_graph.OUT.read_text()
    assert re.findall(r"(\d+) operations become (\d+)", draw_graph.OUT.read_text()) == re.findall(
        r"(\d+) operations become (\d+)", (ROOT / "README.md").read_text()
    )


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install -e .[docs]")
    pytest.importorskip("mkdocstrings", reason="needs mkdocstrings: pip install -e .[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "amax_history_len" in (tmp_path / "site" / "reference" / "index.html").read_text()  # from a docstring
