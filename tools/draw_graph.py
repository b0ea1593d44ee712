"""Draws what te_fp8 makes of the graph of one Llama layer: `python -m tools.draw_graph` writes docs/graph.svg.

The left half is the graph as Dynamo gives it, one box per operation; the right half is the graph after the stage `plan`. The color shows
which semantic operation an operation becomes part of; gray ones stay as they are. Views are not drawn. Nothing is drawn by hand: both
halves are read from the backend's own stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from transformers import LlamaConfig, LlamaModel

import te_dynamo.ops
from te_dynamo.ir.graph import is_call
from te_dynamo.ir.meta import members_of, origin_of
from te_dynamo.sites import Site
from tests.pipeline import stages_of

OUT = Path(__file__).parent.parent / "docs" / "graph.svg"
OPS = te_dynamo.ops
COLORS = {OPS.norm: "#b7dfc2", OPS.linears: "#f9c58d", OPS.qkv: "#c7c3f4", OPS.attention: "#9fd3ee"}
REST, INK, FAINT = "#e9e9ec", "#1d1d24", "#6b6b76"
VIEWS = {"getitem", "view", "reshape", "transpose", "permute", "unsqueeze", "contiguous"}
LEGEND = "Color: what an operation becomes a part of. Gray: stays as it is. Views are not drawn. Inductor compiles all of it as one graph."
WIDTH, LEFT, GAP, ROW, PILL = 960, 480, 6, 30, 24


class Box(NamedTuple):
    text: str
    color: str


def drawing() -> str:
    """The SVG."""
    stages = llama_layer()
    dynamo, plan = ([n for n in stages.graphs[name].graph.nodes if is_operation(n)] for name in ("dynamo", "plan"))
    before, after = before_boxes(dynamo, plan), [after_box(node) for node in plan if name_of(node) not in VIEWS]
    left, height = flowed(before, 20, 70)
    right, bottom = stacked(after, LEFT + 30, 70)
    height = max(height, bottom) + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, sans-serif">',
        f"<title>What te_fp8 makes of a Llama layer: {len(before)} operations become {len(after)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        text(20, 36, f"A Llama layer as Dynamo gives it: {len(before)} operations", size=17, weight="bold"),
        text(LEFT + 30, 36, f"What te_fp8 makes of it: {len(after)}", size=17, weight="bold"),
        text(20, 56, "torch.compile(model)", color=FAINT, mono=True),
        text(LEFT + 30, 56, 'torch.compile(model, backend="te_fp8")', color=FAINT, mono=True),
        f'<path d="M {LEFT - 4} {height / 2 - 14} l 18 14 l -18 14 z" fill="{FAINT}"/>',
        *left,
        *right,
        text(20, height - 16, LEGEND, size=13, color=FAINT),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def llama_layer() -> Any:
    """The stages of one decoder layer's graph, with enough tokens (1,024) for the layout of long sequences."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaModel(config)
    x = torch.randn(1, 1024, 64)
    return stages_of(model.layers[0], x, position_embeddings=model.rotary_emb(x, torch.arange(1024)[None]), dynamic=False)


def is_operation(node: Node) -> bool:
    return node.op in ("call_function", "call_method")


def name_of(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def before_boxes(dynamo: list[Node], plan: list[Node]) -> list[Box]:
    """Dynamo's operations in order. A semantic operation gives its color to its origin, and to those before it that the plan lacks."""
    stays = {node.name for node in plan}
    semantic = [(node, color) for op, color in COLORS.items() for node in plan if is_call(node, op)]
    ends = {origin: color for node, color in semantic for origin in origins(node)}
    found: dict[Node, str] = {}

    def claim(node: Node, color: str) -> None:
        if is_operation(node) and node not in found and node.name not in stays:
            found[node] = color
            for previous in node.all_input_nodes:
                claim(previous, color)

    for node in dynamo:
        if node.name in ends:
            color = ends[node.name]
            found[node] = color
            # The operations between the linears and the attention are RoPE and QK-norm, which become `qkv`.
            for previous in node.all_input_nodes:
                claim(previous, COLORS[OPS.qkv] if color == COLORS[OPS.attention] else color)
    drawn = [node for node in dynamo if name_of(node) not in VIEWS]
    return [Box(name_of(node).replace("scaled_dot_product_attention", "attention"), found.get(node, REST)) for node in drawn]


def origins(node: Node) -> list[str]:
    """The names of the nodes of Dynamo's graph that a node stands for."""
    names = [str(meta["te_origin"]) for meta in members_of(node) if "te_origin" in meta]
    return names or [origin_of(node)]


def after_box(node: Node) -> Box:
    color = next((color for op, color in COLORS.items() if is_call(node, op)), REST)
    return Box(name_of(node) if color == REST else described(node), color)


def described(node: Node) -> str:
    """A description of a semantic operation, with the modules of its weights."""
    site: Site | None = node.meta.get("te_site")
    if is_call(node, OPS.linears):
        names = ", ".join(str(meta["te_path"]).rpartition(".")[2] for meta in members_of(node))
        return f"{names}: one FP8 GEMM" if len(members_of(node)) > 1 else f"{names}: FP8 GEMM"
    if is_call(node, OPS.qkv):
        return "RoPE, written in the attention's layout"
    if is_call(node, OPS.attention):
        return f"attention, {site.layout}" if site is not None else "attention"
    return "RMSNorm"


def flowed(boxes: list[Box], x: int, y: int) -> tuple[list[str], int]:
    """Draws boxes as wide as their text, in rows."""
    drawn, at = [], x
    for box in boxes:
        width = 14 + 7.3 * len(box.text)
        if at + width > LEFT - 20:
            at, y = x, y + ROW
        drawn += pill(at, y, width, box)
        at += int(width) + GAP
    return drawn, y + ROW


def stacked(boxes: list[Box], x: int, y: int) -> tuple[list[str], int]:
    drawn = []
    for box in boxes:
        drawn += pill(x, y, WIDTH - x - 20, box)
        y += ROW
    return drawn, y


def pill(x: float, y: float, width: float, box: Box) -> list[str]:
    shape = f'<rect x="{x}" y="{y}" width="{width:.0f}" height="{PILL}" rx="5" fill="{box.color}"/>'
    return [shape, text(x + 7, y + 16.5, box.text, size=12, mono=True)]


def text(x: float, y: float, words: str, *, size: int = 12, color: str = INK, weight: str = "normal", mono: bool = False) -> str:
    family = ' font-family="Menlo, Consolas, monospace"' if mono else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" font-weight="{weight}"{family}>{words}</text>'


if __name__ == "__main__":
    OUT.write_text(drawing())
    print(f"wrote {OUT}")
