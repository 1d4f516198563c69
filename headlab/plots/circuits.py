"""Circuits of heads: singular spectra, the share of content against distance, and singular directions as tokens.

A number of every head is drawn by `heads`: `plots.heads(table.scores("copying"))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from ..choices import Circuit, check
from ..circuits.summary import CircuitTable
from ..circuits.tokens import Directions
from ..errors import HeadlabError
from .common import shown

_LONGEST = 14  # characters of a token in a cell


def spectra(table: CircuitTable, circuit: Circuit = "ov") -> go.Figure:
    """The largest singular values of every head's circuit, over the largest one; a line per head, coloured by layer."""
    check("circuit", circuit, Circuit)
    frame, names = table.to_frame(), table.singular_values(circuit)
    values = frame[names].to_numpy(dtype=float)  # [head, column]
    figure = _lines(
        table,
        np.arange(1, len(names) + 1),
        values / values[:, :1],
        [f"singular value {i} of {circuit.upper()}" for i in range(1, len(names) + 1)],
        [f"{circuit.upper()} norm {norm:.4g}, effective rank {rank:.3g}" for norm, rank in _sizes(frame, circuit)],
    )
    title = _title(f"Singular spectra of {circuit.upper()} circuits", values)
    figure.update_layout(title=title, xaxis_title="singular value, from the largest", yaxis_title="over the largest")
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(range=[0, 1.03])
    return figure


def _sizes(frame: Any, circuit: str) -> list[tuple[float, float]]:
    return list(frame[[f"{circuit}_frobenius", f"{circuit}_rank"]].itertuples(index=False))


def content(table: CircuitTable) -> go.Figure:
    """The share of content in every head's QK circuit against the distance of the key; a line per head, coloured by layer.

    Raises:
        HeadlabError: the model is not rotary.
    """
    names = [name for name in table.columns if name.startswith("content_")]
    if not names:
        raise HeadlabError("the table has no share of content by distance: only rotary models have one")
    frame, distances = table.to_frame(), [int(name.removeprefix("content_")) for name in names]
    values = frame[names].to_numpy(dtype=float)
    sizes = [f"QK norm {norm:.4g}, effective rank {rank:.3g}" for norm, rank in _sizes(frame, "qk")]
    figure = _lines(table, np.array(distances), values, [f"content at distance {d}" for d in distances], sizes)
    title = _title("Content in QK circuits by distance", values)
    figure.update_layout(title=title, xaxis_title="distance of the key (tokens)", yaxis_title="share of content")
    figure.update_xaxes(type="log", tickvals=distances)
    figure.update_yaxes(range=[0, 1.03])
    return figure


def _title(title: str, values: np.ndarray) -> str:
    missing = int(np.isnan(values).all(1).sum())
    return f"{title} ({missing} of {len(values)} heads have none)" if missing else title


def _lines(table: CircuitTable, x: np.ndarray, values: np.ndarray, what: Sequence[str], sizes: Sequence[str]) -> go.Figure:
    """A trace per row of heads, in which a line per head; values are [head, column]."""
    figure, start = go.Figure(), 0
    n_rows = len(table.heads)
    colours = sample_colorscale("Viridis", np.linspace(0, 1, max(n_rows, 2)))
    for row, heads in enumerate(table.heads):
        if not heads:
            continue
        of_row = values[start : start + len(heads)]
        told = [
            [f"<b>{head}</b><br>{name}: {value:.3g}<br>{size}" for name, value in zip(what, line, strict=True)] + [""]
            for head, line, size in zip(heads, of_row, sizes[start : start + len(heads)], strict=True)
        ]
        start += len(heads)
        figure.add_scatter(
            x=np.tile(np.append(x, x[-1]), len(heads)),
            y=np.pad(of_row, ((0, 0), (0, 1)), constant_values=np.nan).ravel(),  # a gap after every line
            text=[text for line in told for text in line],
            hovertemplate="%{text}<extra></extra>",
            mode="lines+markers",
            marker={"size": 4},
            line={"color": colours[row], "width": 1},
            opacity=0.6,
            name=f"{heads[0].stack} layer {heads[0].layer}".strip(),
            showlegend=False,
        )
    scale = {"colorscale": "Viridis", "cmin": 0, "cmax": max(n_rows - 1, 1), "showscale": True}
    bar = {"title": "layer" if not table.heads[0] or not table.heads[0][0].stack else "row"}
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker=scale | {"color": [0], "colorbar": bar},
        showlegend=False,
        hoverinfo="skip",
    )  # only to show the scale of colours
    return figure


def tokens_of(directions: Directions) -> go.Figure:
    """Singular directions as tokens: a pair of columns per direction, going in and coming out, from the + to the - end."""
    lines = directions.lines
    n = 1 + max(line["rank"] for line in lines)
    columns = list(dict.fromkeys((line["direction"], line["side"]) for line in lines))
    z = np.full((2 * n, len(columns)), np.nan)
    text, hover = np.full(z.shape, "", dtype=object), np.full(z.shape, "", dtype=object)
    sides = {"qk": {"in": "query", "out": "key"}, "ov": {"in": "reads", "out": "writes"}}[directions.circuit]
    for line in lines:
        column = columns.index((line["direction"], line["side"]))
        at = line["rank"] if line["end"] == "+" else 2 * n - 1 - line["rank"]
        z[at, column] = line["value"]
        text[at, column] = _token(line["token"])
        hover[at, column] = (
            f"<b>{directions.head}</b> {directions.circuit.upper()} direction {line['direction'] + 1}, singular value "
            f"{line['singular_value']:.4g}<br>{sides[line['side']]} {_token(line['token'], None)} (token {line['id']}): "
            f"{line['value']:.4g}"
        )
    singular = {line["direction"]: line["singular_value"] for line in lines}
    titles = [f"{f'{singular[i]:.3g}' if side == 'in' else ' '}<br>{sides[side]}" for i, side in columns]
    heatmap = go.Heatmap(
        z=z / np.nanmax(np.abs(z), axis=0),
        customdata=hover,
        text=text,
        texttemplate="%{text}",
        textfont_size=11,
        hovertemplate="%{customdata}<extra></extra>",
        colorscale="RdBu_r",
        zmid=0,
        zmin=-2.2,  # pale enough to read the tokens
        zmax=2.2,
        showscale=False,
        xgap=1,
        ygap=1,
    )
    figure = go.Figure(heatmap)
    ends = {"tickvals": [0, 2 * n - 1], "ticktext": ["+", "-"], "title": "end of the direction"}
    figure.update_yaxes(autorange="reversed", **ends)
    figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=titles, side="top", title="singular value, side")
    figure.update_layout(
        title={
            "text": f"{directions.head}: singular directions of the {directions.circuit.upper()} circuit"
            "<br><sup>colour: how far the token lies along the direction, over the furthest in its column</sup>",
            "y": 0.97,
            "yanchor": "top",
        },
        width=120 + 105 * len(columns),
        height=210 + 21 * 2 * n,
        margin={"t": 140},
    )
    return figure


def _token(token: str, longest: int | None = _LONGEST) -> str:
    """A token as it can stand in a figure: spaces and line ends visible, not too long, no HTML."""
    visible = repr(token)[1:-1].replace(" ", "·")
    if longest is not None and len(visible) > longest:
        visible = visible[: longest - 1] + "…"
    return shown(visible)
