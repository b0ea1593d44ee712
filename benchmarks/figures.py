"""The results of `python -m benchmarks`, as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("te_dynamo", "torch", "triton", "transformers")


@dataclass(frozen=True)
class Figure:
    """A ratio to Inductor (below 1: less time, or fewer bytes), or a count.

    low, high: the extremes of the repetitions of which it is the median; None if it was measured once, or cannot vary. target: the
    largest acceptable value. unit: "x" for a ratio, "" for a count.
    """

    section: str
    what: str
    value: float
    target: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = "x"

    @classmethod
    def of(cls, section: str, what: str, found: Sequence[float], target: float | None = None) -> Figure:
        """The median of repetitions, and their spread."""
        spread = (min(found), max(found)) if len(found) > 1 else (None, None)
        return cls(section, what, median(found), target, *spread)

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.value <= self.target

    @property
    def spread(self) -> str:
        return "" if self.low is None or self.high is None else f"{self.low:.2f} to {self.high:.2f}"

    def __str__(self) -> str:
        wanted = "" if self.target is None else f"(target {self.target:.3g}{self.unit}) "
        spread = f" [{self.spread}]" if self.spread else ""
        return f"{self.value:7.2f}{self.unit}{spread}  {wanted}{self.what}"


def about() -> dict[str, Any]:
    """The date, the processor and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "processor": processor(), "versions": versions}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def markdown(found: Sequence[Figure], where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v or 'none'}" for name, v in where["versions"].items())
    lines = [f"# Benchmarks, {where['date']}", "", f"{where['processor']}; {versions}.", ""]
    lines += ["Ratios to Inductor in the same run: medians, and the extremes of their repetitions.", ""]
    lines += ["| section | what | ratio | spread | target | met |", "|---|---|---|---|---|---|"]
    for f in found:
        target, met = ("", "") if f.target is None else (f"{f.target:.3g}{f.unit}", "yes" if f.met else "NO")
        lines.append(f"| {f.section} | {f.what} | {f.value:.2f}{f.unit} | {f.spread} | {target} | {met} |")
    return "\n".join(lines) + "\n"


def draw(found: Sequence[Figure], path: Path) -> bool:
    """Draws the ratios as bars, with their spread and targets. Returns whether matplotlib is installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    ratios = [f for f in found if f.unit == "x"][::-1]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.35 * len(ratios)), layout="constrained")
    places = range(len(ratios))
    errors = [[f.value - (f.low or f.value) for f in ratios], [(f.high or f.value) - f.value for f in ratios]]
    colors = ["#c44e52" if f.met is False else "#4c72b0" for f in ratios]
    axes.barh(places, [f.value for f in ratios], xerr=errors, color=colors, error_kw={"linewidth": 0.8})
    targets = [(i, f.target) for i, f in enumerate(ratios) if f.target is not None]
    axes.scatter([t for _, t in targets], [i for i, _ in targets], marker="|", s=120, color="black", label="target")
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(places, [re.sub(r" \(.*?\)", "", f.what)[:60] for f in ratios], fontsize=7)
    axes.set_xlabel("te_fp8 to Inductor: less is better")
    if targets:
        axes.legend(loc="lower right", fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def write(found: Sequence[Figure], folder: Path, name: str) -> list[Path]:
    """Writes the result files, and returns their paths."""
    where = about()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(where | {"figures": [asdict(f) | {"met": f.met} for f in found]}, indent=1) + "\n")
    paths[1].write_text(markdown(found, where))
    return paths if draw(found, paths[2]) else paths[:2]
