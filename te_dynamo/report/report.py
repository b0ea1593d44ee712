"""What `te_dynamo.explain` returns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from te_dynamo.sites import Site

COLUMNS = ("kind", "path", "sites", "provider", "recipe", "layout", "GFLOP", "not taken because")


@dataclass(frozen=True)
class Report:
    """What the backend did with one call of a model. `print(report)` shows it.

    Attributes:
        graph_count: Graphs that Dynamo gave to the backend.
        graph_break_count: Graph breaks, as Dynamo counts them; `graph_breaks` has each reason and how often.
        sites: Every place that was considered, once for each module that runs it. `kind` is "linear", "norm_linear" or
            "attention" ("graph" where a whole graph was left); `path` is the module's name in `model.named_modules()`,
            or the parameter's where no module has it; `provider` is None where it was left, for `reason`; `flops` are
            the forward's, of all calls; `layout` is the attention's.
        fp8_flops, counted_flops: FLOPs in FP8, and FLOPs that could be: of the weight GEMMs that ran (see
            `te_dynamo.report.flops` for what that is), in forward and, with backward=True, in backward. Without the
            logits, unless include_logits. With attention="fp8" the products of attention count too. GEMMs outside of
            every graph and in no site count as not in FP8.
        backward: Whether backward was run, and is counted.
        notes: What else there is to know, as sentences.
    """

    graph_count: int
    graph_break_count: int
    sites: tuple[Site, ...]
    fp8_flops: int
    counted_flops: int
    backward: bool
    graph_breaks: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def fp8_flop_fraction(self) -> float:
        """`fp8_flops / counted_flops`; 0 where there was nothing to count."""
        return self.fp8_flops / self.counted_flops if self.counted_flops else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that `json.dumps` takes."""
        return asdict(self) | {
            "fp8_flop_fraction": self.fp8_flop_fraction,
            "notes": list(self.notes),
            "sites": [asdict(site) | {"detail": {k: _plain(v) for k, v in site.detail.items()}} for site in self.sites],
        }

    def to_markdown(self) -> str:
        """The same as `print` shows, in Markdown."""
        rows = [COLUMNS, *self._rows()]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        table.insert(1, "|" + " --- |" * len(COLUMNS))
        parts = ["\n".join(f"- {line}" for line in self._summary()), *(["\n".join(table)] if self.sites else [])]
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        rows = [COLUMNS, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*self._summary(), *(["", *table] if self.sites else [])])

    def _summary(self) -> list[str]:
        taken = sum(site.provider is not None for site in self.sites)
        passes = "forward and backward" if self.backward else "forward"
        lines = [
            f"te_fp8: {taken} of {len(self.sites)} sites taken",
            f"FP8: {self.fp8_flop_fraction:.1%} of the FLOPs of the weight GEMMs ({passes})",
            f"graphs: {self.graph_count}, graph breaks: {self.graph_break_count}",
        ]
        for reason, count in self.graph_breaks.items():
            lines.append(f"graph break{f' ({count} times)' if count > 1 else ''}: {' '.join(reason.splitlines()[0].split())}")
        return lines + [f"note: {note}" for note in self.notes]

    def _rows(self) -> list[tuple[str, ...]]:
        """A row for sites that differ only in the numbers within their paths, as the layers of a model do."""
        groups: dict[tuple[str, ...], list[Site]] = {}
        for site in self.sites:
            path = re.sub(r"(?<![^.])\d+(?![^.])", "*", site.path)
            key = (site.kind, path, site.provider or "-", site.recipe or "-", site.layout or "-", site.reason or "")
            groups.setdefault(key, []).append(site)
        return [self._row(key, sites) for key, sites in groups.items()]

    @staticmethod
    def _row(key: tuple[str, ...], sites: Sequence[Site]) -> tuple[str, ...]:
        kind, path, provider, recipe, layout, reason = key
        paths = Counter(site.path for site in sites)
        name = (next(iter(paths)) if len(paths) == 1 else path) or "(the model)"
        gigaflops = f"{sum(site.flops for site in sites) / 1e9:.3g}"
        return kind, name, str(len(sites)), provider, recipe, layout, gigaflops, reason


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
