"""What figures share: colours, bars, labelled rows; and how they are saved."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..results import write
from ..tables import Heads

PALETTE = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f"]
CHANCE = {"color": "#a0a0a0", "dash": "dash", "width": 1.5}


def bars(middle: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """Error bars from `low` to `high`, which need not be as far from the middle."""
    ends = {"type": "data", "symmetric": False, "array": high - middle, "arrayminus": middle - low}
    return ends | {"thickness": 1.2, "width": 3}


def labelled(labels: list[str]) -> dict[str, Any]:
    """An axis with these labels at 0, 1 ... from the top down."""
    return {"tickvals": list(range(len(labels))), "ticktext": labels, "range": [len(labels) - 0.4, -0.6]}


def row_names(labels: Heads) -> list[str]:
    """Layers; in an encoder-decoder with their stack, and a row that pruning left without heads has only its number."""
    plain = not any(head.stack for row in labels for head in row)
    names = (str(number) if plain else f"row {number}" for number in range(len(labels)))
    return [f"{row[0].stack} {row[0].layer}".strip() if row else name for row, name in zip(labels, names, strict=True)]


def shown(text: str) -> str:
    """Text as it can stand in a figure, where it might be read as markup, as a formula or as a field of a hover text."""
    return escape(text, quote=False).replace("$", "&#36;").replace("%{", "%&#123;")  # plotly knows no &quot;


def head_points(labels: Heads, x: np.ndarray, y: np.ndarray, hover: str, told: np.ndarray | None = None) -> go.Figure:
    """A point per head, coloured by stack, or by layer where there is one stack.

    Args:
        labels: the heads, by row.
        x: a number per head.
        y: another one.
        hover: what stands under a head's name; `told` is `customdata` there, `[head, number]`.
    """
    flat = [head for row in labels for head in row]
    stacks = list(dict.fromkeys(head.stack for head in flat))
    layers = {head.layer for head in flat}
    scale = {"title": "layer", "dtick": 1 if len(layers) <= 16 else None}
    figure = go.Figure()
    for number, stack in enumerate(stacks):
        at = [i for i, head in enumerate(flat) if head.stack == stack]
        marker: dict[str, Any] = {"size": 7, "opacity": 0.8, "line": {"width": 0.5, "color": "white"}}
        if len(stacks) > 1:
            marker["color"] = PALETTE[number % len(PALETTE)]
        else:
            marker |= {"color": [flat[i].layer for i in at], "colorscale": "Viridis", "colorbar": scale}
            marker["showscale"] = len(layers) > 1
        figure.add_scatter(
            x=x[at],
            y=y[at],
            text=[str(flat[i]) for i in at],
            customdata=None if told is None else told[at],
            name=stack,
            showlegend=len(stacks) > 1,
            mode="markers",
            marker=marker,
            hovertemplate=f"<b>%{{text}}</b><br>{hover}<extra></extra>",
        )
    figure.update_layout(legend_title="stack" if len(stacks) > 1 else None)
    return figure


def save_html(figure: go.Figure, path: str | Path) -> Path:
    """Write a figure as one HTML file that opens anywhere, without a network. Returns the path."""
    return write(path, lambda temporary: figure.write_html(temporary, include_plotlyjs=True))
