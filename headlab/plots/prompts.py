"""Attention patterns over the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..errors import HeadlabError
from .common import shown

if TYPE_CHECKING:
    from ..attention.prompts import Pattern
    from ..tables import Head

MOST = 12  # heads in one figure, unless more are asked for
LONGEST = 16  # letters of a token beside the figure
SMALL, LARGE = 300, 560  # pixels of one head's figure


def pattern(pattern: Pattern, heads: Iterable[Head | str] | None = None, raw: bool = False) -> go.Figure:
    """Attention patterns of a prompt, one small figure per head: queries down, keys to the right.

    Args:
        pattern: of `attention_patterns`.
        heads: which heads, also by name; by default the first 12 that there are.
        raw: where heads are composed (DCMHA), the softmax before the post maps instead of the composed pattern.

    Raises:
        HeadlabError: there is no pattern (or no raw one) of a head.
    """
    there = pattern.pick(None, raw)
    drawn = there[:MOST] if heads is None else pattern.pick(heads, raw)
    if not drawn:
        raise HeadlabError("there is nothing to draw: give at least one head")
    columns = min(len(drawn), 4 if len(drawn) > 6 else 2 if len(drawn) == 4 else 3)
    n_rows = ceil(len(drawn) / columns)
    sides = [pattern.sides(head) for head in drawn]
    labels = [(_labels(queries), _labels(keys)) for queries, keys in sides]
    alike = len({(id(queries), id(keys)) for queries, keys in sides}) == 1  # then only the outer ones are labelled
    most = max(len(tokens) for both in sides for tokens in both)
    side = LARGE if len(drawn) == 1 else min(LARGE, max(SMALL, 11 * most))
    longest = max(len(label) for both in labels for label in both[0])
    margin = (30 + 7 * min(longest, LONGEST + 5)) / (side * columns)  # of the figure's width, for the tokens of a column
    below = (40 + 6 * min(longest, LONGEST + 5)) / (side * n_rows)
    figure = make_subplots(
        n_rows,
        columns,
        subplot_titles=[str(head) for head in drawn],
        horizontal_spacing=0.02 if alike and columns > 1 else min(margin, 0.9 / max(columns - 1, 1)),
        vertical_spacing=34 / (side * n_rows) if alike else min(below, 0.9 / max(n_rows - 1, 1)),
    )
    values = [pattern.of(head, raw).numpy() for head in drawn]
    for number, (head, value) in enumerate(zip(drawn, values, strict=True)):
        row, column = number // columns + 1, number % columns + 1
        heatmap = go.Heatmap(
            z=np.where(np.isfinite(value), np.round(value.astype(float), 4), np.nan),
            x=labels[number][1],
            y=labels[number][0],
            coloraxis="coloraxis",
            hovertemplate=f"<b>{head}</b><br>query %{{y}}<br>key %{{x}}<br>%{{z:.3f}}<extra></extra>",
        )
        figure.add_trace(heatmap, row=row, col=column)
        lowest = number + columns >= len(drawn)
        figure.update_xaxes(showticklabels=lowest or not alike, title="key" if lowest else None, row=row, col=column)
        first = column == 1
        figure.update_yaxes(showticklabels=first or not alike, title="query" if first else None, row=row, col=column)
    figure.update_xaxes(type="category", tickangle=-90, tickfont_size=10, showgrid=False, constrain="domain")
    figure.update_yaxes(type="category", autorange="reversed", tickfont_size=10, showgrid=False)
    holes = sum(int((~np.isfinite(value)).sum()) for value in values)
    title = "Attention patterns" + (" before the post maps" if raw else " after the post maps" if pattern.composed else "")
    notes = [f"the first {len(drawn)} of {len(there)} heads"] if heads is None and len(drawn) < len(there) else []
    notes += [f"{holes} pairs without a number are grey"] if holes else []
    figure.update_layout(
        title=f"{title} ({'; '.join(notes)})" if notes else title,
        coloraxis=_scale(values, signed=pattern.composed and not raw),
        height=150 + side * n_rows,
        width=200 + side * columns,
        plot_bgcolor="#d9d9d9",  # where there is no number
    )
    return figure


def _scale(values: list[np.ndarray], signed: bool) -> dict[str, object]:
    """One scale for all heads. Composed patterns may be negative and above 1."""
    largest = max((float(np.abs(value[np.isfinite(value)]).max(initial=0)) for value in values), default=0) or 1.0
    bar = {"title": "weight" if signed else "probability", "lenmode": "pixels", "len": 250, "y": 1, "yanchor": "top"}
    if signed:
        return {"colorscale": "RdBu_r", "cmin": -largest, "cmax": largest, "cmid": 0, "colorbar": bar}
    return {"colorscale": "Blues", "cmin": 0, "cmax": largest, "colorbar": bar}


def _labels(tokens: tuple[str, ...]) -> list[str]:
    """Tokens with their positions, which tells equal ones apart: `cat (3)`. What looks like markup or a formula is text."""
    labels = []
    for position, token in enumerate(tokens):
        seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
        seen = seen.strip() or repr(seen)
        seen = seen if len(seen) <= LONGEST else seen[: LONGEST - 1] + "…"
        labels.append(f"{shown(seen)} ({position})")
    return labels
