"""What figures share: colours, bars, labelled rows; and how they are saved."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..results import write
from ..scores import Heads

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


def save_html(figure: go.Figure, path: str | Path) -> Path:
    """Write a figure as one HTML file that opens anywhere, without a network. Returns the path."""
    return write(path, lambda temporary: figure.write_html(temporary, include_plotlyjs=True))
