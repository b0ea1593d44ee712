"""An estimate as tables: plain text, Markdown, or rich."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from te_dynamo.lab.estimate import HOW_FAR, Estimate, Side, SiteEstimate
from te_dynamo.lab.launches import Launch

WIDTH = 160  # if there is no terminal


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def title(found: Estimate) -> str:
    passes = "forward and backward" if found.training else "forward, in eval"
    return f"{found.device}, {passes}: te_fp8 {found.speedup:.2f}x Inductor (torch {found.torch})"


def tables(found: Estimate) -> list[Table]:
    return [_totals(found), _groups(found), _sites(found)]


def _totals(found: Estimate) -> Table:
    def row(side: Side) -> tuple[str, ...]:
        in_fp8 = f"{side.fp8_tflop / side.tflop:.0%}" if side.tflop else "-"
        figures = (f"{side.gigabytes:.2f}", f"{side.saved / 2**20:.0f}", f"{side.ms:.3f}", f"{found.inductor.ms / side.ms:.2f}x")
        return (side.label, str(side.kernels), str(side.gemms), in_fp8, *figures)

    header = ("", "kernels", "GEMMs", "GEMM FLOPs in FP8", "GB outside GEMMs", "saved MiB", "predicted ms", "over Inductor")
    return Table("A step", header, [row(side) for side in found.sides])


def _groups(found: Estimate) -> Table:
    rows = [(name, *(f"{side.groups[name]:.0f}" for side in found.sides)) for name in found.inductor.groups]
    return Table("Where its microseconds go", ("", *(side.label for side in found.sides)), rows)


def _sites(found: Estimate) -> Table:
    groups: dict[tuple[str, ...], list[SiteEstimate]] = {}
    for site in found.sites:
        if site.kind == "norm":
            continue  # it has no GEMM
        path = re.sub(r"(?<![^.])\d+(?![^.])", "*", site.path)
        groups.setdefault((site.kind, path, site.provider or "-", site.recipe or "-", site.reason or ""), []).append(site)
    rows = []
    for (kind, path, provider, recipe, reason), sites in groups.items():
        name = path if len({site.path for site in sites}) > 1 else sites[0].path
        times = (f"{sum(s.bf16_us for s in sites):.0f}", f"{sum(s.us for s in sites):.0f}")
        rows.append((kind, name or "(the model)", str(len(sites)), provider, recipe, *times, reason))
    return Table(
        "Its sites", ("kind", "path", "sites", "provider", "recipe", "GEMMs in bf16, us", "as computed, us", "not taken because"), rows
    )


def kernels(side: Side) -> Table:
    """Every launch of a side."""

    def row(e: Launch) -> tuple[str, ...]:
        kind = e.role if e.kind in ("triton", "operator") else e.kind
        return (e.phase, kind, f"{e.us:.1f}", f"{e.bytes / 1e6:.1f}", f"{e.flops / 1e9:.1f}", e.name, e.detail)

    rows = [row(launch) for launch in side.launches]
    return Table(f"Launches: {side.label}", ("phase", "kind", "us", "MB", "GFLOP", "name", "of"), rows)


def as_text(found: Estimate) -> str:
    parts = [title(found), *map(text_of, tables(found)), *(f"note: {note}" for note in found.notes), HOW_FAR]
    return "\n\n".join(parts)


def text_of(table: Table) -> str:
    rows = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([table.title, *lines])


def as_markdown(found: Estimate) -> str:
    parts = [f"**{title(found)}**", *map(markdown_of, tables(found)), *(f"- {note}" for note in found.notes), HOW_FAR]
    return "\n\n".join(parts) + "\n"


def markdown_of(table: Table) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (table.header, *table.rows)]
    return "\n".join([lines[0], "|" + "---|" * len(table.header), *lines[1:]])


def print_rich(found: Estimate) -> bool:
    """Prints the estimate with rich. Returns whether rich is installed."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        return False
    console: Any = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(title(found), style="bold", highlight=False)
    for table in tables(found):
        made = RichTable(title=table.title, title_justify="left", title_style="bold")
        for i, name in enumerate(table.header):
            numeric = bool(table.rows) and all(re.fullmatch(r"[\d.]*[x%]?|-", row[i]) for row in table.rows)
            made.add_column(name, justify="right" if numeric else "left", overflow="fold")
        for row in table.rows:
            made.add_row(*row)
        console.print(made, markup=False)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print(HOW_FAR, style="dim", highlight=False)
    return True
