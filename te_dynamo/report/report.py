"""What `te_dynamo.explain` returns."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from te_dynamo.sites import Site

LOGITS = "the logits"  # the reason for which logits are left begins with this
COLUMNS = ("kind", "path", "sites", "provider", "recipe", "layout", "GFLOP", "not taken because")


@dataclass(frozen=True)
class Report:
    """What the backend did with one call of a model. `print(report)` shows it.

    Attributes:
        graph_count: Graphs that Dynamo gave to the backend.
        graph_break_count: Graph breaks, as Dynamo counts them; `graph_breaks` has each reason and how often.
        sites: Every site that was considered, once for each module that runs it. `kind` names the operation
            ("linear", "attention", "grouped_linear", ...), with what makes its input in front ("norm_linear", "activation_linear"), or
            is "graph" if a whole graph was left to Inductor; `path` is the module's name in `model.named_modules()`,
            or the parameter's if no module has it; `provider` is None if the site was left to Inductor, for `reason`; `flops` are
            forward's, over all calls; `layout` is the attention's.
        fp8_flops, counted_flops: FLOPs in FP8, and all that could be: those of the weight GEMMs that ran (defined in
            `te_dynamo.report.flops`), in forward and, with backward=True, in backward. Logits count only with
            include_logits, the GEMMs of attention only with attention="fp8". GEMMs outside of all graphs count as not
            in FP8.
        backward: Whether backward was run, and is counted.
        notes: Further remarks for the user, as sentences.
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
        """`fp8_flops / counted_flops`; 0 if there was nothing to count."""
        return self.fp8_flops / self.counted_flops if self.counted_flops else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that `json.dumps` takes."""
        return asdict(self) | {
            "fp8_flop_fraction": self.fp8_flop_fraction,
            "notes": list(self.notes),
            "sites": [asdict(site) | {"detail": {k: _plain(v) for k, v in site.detail.items()}} for site in self.sites],
        }

    def to_markdown(self) -> str:
        """What `print` shows, in Markdown."""
        summary = "".join(f"- {line}\n" for line in self._summary())
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in self._rows()]
        rows.insert(1, "|" + " --- |" * len(COLUMNS) + "\n")
        return summary + ("\n" + "".join(rows) if self.sites else "")

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*self._summary(), *(["", *table] if self.sites else [])])

    def _summary(self) -> list[str]:
        taken = sum(site.provider is not None for site in self.sites)
        passes = "forward and backward" if self.backward else "forward"
        without = ", without the logits" if any((site.reason or "").startswith(LOGITS) for site in self.sites) else ""
        lines = [
            f"te_fp8: {taken} of {len(self.sites)} sites taken",
            f"FP8: {self.fp8_flop_fraction:.1%} of the FLOPs of the weight GEMMs ({passes}{without})",
            f"graphs: {self.graph_count}, graph breaks: {self.graph_break_count}",
        ]
        for reason, count in self.graph_breaks.items():
            lines.append(f"graph break{f' ({count} times)' if count > 1 else ''}: {' '.join(reason.splitlines()[0].split())}")
        return lines + [f"note: {note}" for note in self.notes]

    def _rows(self) -> list[tuple[str, ...]]:
        """The header, and one row for all sites whose paths differ only in numbers, like the layers of a model."""
        groups: dict[tuple[str, ...], list[Site]] = {}
        for site in self.sites:
            path = re.sub(r"(?<![^.])\d+(?![^.])", "*", site.path)
            key = (site.kind, path, site.provider or "-", site.recipe or "-", site.layout or "-", site.reason or "")
            groups.setdefault(key, []).append(site)
        rows: list[tuple[str, ...]] = [COLUMNS]
        for (kind, path, *choice, reason), sites in groups.items():
            name = path if len({site.path for site in sites}) > 1 else sites[0].path
            rows.append((kind, name or "(the model)", str(len(sites)), *choice, f"{sum(s.flops for s in sites) / 1e9:.3g}", reason))
        return rows


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
