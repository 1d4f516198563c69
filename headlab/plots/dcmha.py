"""Composition maps of DCMHA: what passes from head to head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..errors import HeadlabError

if TYPE_CHECKING:
    from torch import Tensor

    from ..dcmha.maps import CompositionMaps

STAGES = {"pre": "scores (pre)", "post": "probabilities (post)"}
PARTS = {
    "identity": ("identity left out", "#7f7f7f"),
    "base": ("base", "#8c564b"),
    "query": ("query, low rank", "#1f77b4"),
    "query_gate": ("query gate", "#17becf"),
    "key": ("key, low rank", "#d62728"),
    "key_gate": ("key gate", "#ff7f0e"),
}


def maps(maps: CompositionMaps, layer: int | None = None) -> go.Figure:
    """Composition maps. Without a layer: how far every layer is from the identity, and by which branches; with one: its
    mean maps less the identity, from head (rows) to head (columns)."""
    return _distances(maps) if layer is None else _mean_maps(maps, layer)


def _distances(maps: CompositionMaps) -> go.Figure:
    """Stacked by each branch's share of |C - I|^2; a branch that others undo hangs below zero."""
    frame = maps.to_frame()
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=list(STAGES.values()), horizontal_spacing=0.03)
    for column, stage in enumerate(STAGES, 1):
        lines = frame[frame["stage"] == stage]
        for part, (name, colour) in PARTS.items():
            if not frame[part].any():
                continue
            told = [f"<b>L{layer}</b> {name}: {100 * x:.3g} %" for layer, x in zip(lines["layer"], lines[part], strict=True)]
            figure.add_bar(
                x=lines["layer"],
                y=lines["distance"] * lines[part],
                name=name,
                legendgroup=part,
                showlegend=column == 1,
                marker_color=colour,
                text=told,
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
                row=1,
                col=column,
            )
        told = [
            f"<b>L{layer}</b> {distance:.3g}<br>{100 * explained:.3g} % explained by the query"
            for layer, distance, explained in lines[["layer", "distance", "explained_by_query"]].itertuples(index=False)
        ]
        figure.add_scatter(
            x=lines["layer"],
            y=lines["distance"],
            name="distance",
            legendgroup="distance",
            showlegend=column == 1,
            mode="markers",
            marker={"color": "black", "symbol": "diamond", "size": 6},
            text=told,
            hovertemplate="%{text}<extra></extra>",
            row=1,
            col=column,
        )
    figure.update_layout(title="Composition maps: distance from the identity, by branch", barmode="relative")
    figure.update_xaxes(title="layer", dtick=1 if len(maps.layers) <= 16 else None)
    figure.update_yaxes(title="distance", col=1)
    return figure


def _mean_maps(maps: CompositionMaps, layer: int) -> go.Figure:
    drawn = [[(maps.mean(layer, stage), maps.heads(layer, stage)) for stage in STAGES]]
    return _small_maps(
        drawn, layer, f"Mean composition maps of layer {layer}, less the identity", [list(STAGES.values())], identity=True
    )


def map_grid(
    maps: CompositionMaps,
    layer: int,
    stage: str = "post",
    queries: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    example: int = 0,
) -> go.Figure:
    """Composition maps of one layer and stage at pairs of tokens, less the identity: queries down, keys to the right.

    Args:
        queries, keys: positions of tokens; by default up to 4, evenly over the example. A key after its query stays empty
            where the model is causal.

    Raises:
        HeadlabError: there is no such layer, stage or token.
    """
    found = next((one for one in maps.by_layer if one.layer == layer), None)
    real = found.real[example].nonzero().flatten().tolist() if found is not None and example < len(found.real) else [0]
    even = [real[i] for i in sorted({round(i * (len(real) - 1) / 3) for i in range(4)})]
    queries, keys = (list(even if given is None else given) for given in (queries, keys))
    if not queries or not keys:
        raise HeadlabError("there is nothing to draw: give at least one query and one key")
    hidden = found is not None and found.causal
    ends = maps.heads(layer, stage)
    drawn = [
        [None if hidden and key > query else (maps.dense(layer, stage, query, key, example), ends) for key in keys]
        for query in queries
    ]
    titles = [[f"query {query}, key {key}" if one else "" for key, one in zip(keys, row, strict=True)]
              for query, row in zip(queries, drawn, strict=True)]  # fmt: skip
    title = f"Composition maps of layer {layer}, {STAGES[stage]}, less the identity"
    return _small_maps(drawn, layer, title, titles, identity=True)


def map_branches(maps: CompositionMaps, layer: int, stage: str = "post") -> go.Figure:
    """The mean part that every branch adds to the composition maps of one layer and stage; branches of zeros are left out.

    Raises:
        HeadlabError: there is no such layer or stage, or every map is the identity.
    """
    ends = maps.heads(layer, stage)
    parts = {part: maps.mean(layer, stage, part) for part in PARTS if part != "identity"}
    there = {part: mean for part, mean in parts.items() if mean.any()}
    if not there:
        raise HeadlabError(f"no branch adds anything to the maps of layer {layer} ({stage}): they are the identity")
    title = f"Mean of what every branch adds, layer {layer}, {STAGES[stage]}"
    return _small_maps([[(mean, ends) for mean in there.values()]], layer, title, [[PARTS[part][0] for part in there]])


Map = tuple["Tensor", tuple[tuple[int, ...], tuple[int, ...]]]
"""Weights [head_from, head_to], and the heads they are of."""


def _small_maps(
    drawn: Sequence[Sequence[Map | None]], layer: int, title: str, titles: Sequence[Sequence[str]], identity: bool = False
) -> go.Figure:
    """Maps in rows and columns on one scale; less the identity, if told so."""
    n_rows, n_columns = len(drawn), max(map(len, drawn))
    figure = make_subplots(
        n_rows,
        n_columns,
        subplot_titles=[text for row in titles for text in row],
        horizontal_spacing=0.24 / (n_columns + 1),
        vertical_spacing=0.3 / (n_rows + 1),
    )
    largest = 0.0
    for number, one in enumerate(one for row in drawn for one in row):
        row, column = number // n_columns + 1, number % n_columns + 1
        axis = "" if number == 0 else str(number + 1)
        if one is None:
            figure.update_xaxes(visible=False, row=row, col=column)
            figure.update_yaxes(visible=False, row=row, col=column)
            continue
        weights, (sources, targets) = one
        values = weights.numpy() - (np.equal.outer(sources, targets) if identity else 0)
        largest = max(largest, np.abs(values).max(initial=0))
        told = [
            [f"from L{layer}H{m} to L{layer}H{n}: {value:.2g}" for n, value in zip(targets, line, strict=True)]
            for m, line in zip(sources, values, strict=True)
        ]
        heatmap = go.Heatmap(
            z=values,
            x=[str(n) for n in targets],
            y=[str(m) for m in sources],
            text=told,
            hovertemplate="%{text}<extra></extra>",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
        )
        figure.add_trace(heatmap, row=row, col=column)
        few = max(len(sources), len(targets)) * n_columns <= 32
        square = {"scaleanchor": f"x{axis}", "constrain": "domain", "autorange": "reversed"}
        below, left = row == n_rows, column == 1
        sides = {"type": "category", "dtick": 1 if few else None}
        figure.update_xaxes(title="to head" if below else None, constrain="domain", **sides, row=row, col=column)
        figure.update_yaxes(title="from head" if left else None, **sides, **square, row=row, col=column)
    limit = largest or 1.0
    scale = {"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "cmid": 0, "colorbar": {"title": "weight"}}
    figure.update_layout(title=title, coloraxis=scale, height=max(450, 150 + 230 * n_rows))
    return figure
