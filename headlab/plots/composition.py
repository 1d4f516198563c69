"""Composition maps of DCMHA: what passes from head to head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

if TYPE_CHECKING:
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
    figure = make_subplots(1, 2, subplot_titles=list(STAGES.values()), horizontal_spacing=0.12)
    largest = 0.0
    for column, stage in enumerate(STAGES, 1):
        sources, targets = maps.heads(layer, stage)
        values = maps.mean(layer, stage).numpy() - np.equal.outer(sources, targets)
        largest = max(largest, np.abs(values).max(initial=0))
        told = [
            [f"from L{layer}H{m} to L{layer}H{n}: {value:.2g}" for n, value in zip(targets, row, strict=True)]
            for m, row in zip(sources, values, strict=True)
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
        figure.add_trace(heatmap, row=1, col=column)
        few = max(len(sources), len(targets)) <= 16
        square = {"scaleanchor": f"x{column if column > 1 else ''}", "constrain": "domain", "autorange": "reversed"}
        figure.update_xaxes(title="to head", type="category", dtick=1 if few else None, constrain="domain", col=column)
        figure.update_yaxes(title="from head", type="category", dtick=1 if few else None, **square, col=column)
    limit = largest or 1.0
    figure.update_layout(
        title=f"Mean composition maps of layer {layer}, less the identity",
        coloraxis={"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "cmid": 0, "colorbar": {"title": "weight"}},
    )
    return figure
