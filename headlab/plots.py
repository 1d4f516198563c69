"""Results drawn as plotly figures. A function takes a result and returns a `go.Figure`; it never shows it, sets no
renderer or template, and needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .curves import Curve
from .results import write
from .scores import Head, HeadRows, HeadScores
from .speed import Timing

if TYPE_CHECKING:
    from .dcmha.maps import CompositionMaps

STAGES = {"pre": "scores (pre)", "post": "probabilities (post)"}
PARTS = {
    "identity": ("identity left out", "#7f7f7f"),
    "base": ("base", "#8c564b"),
    "query": ("query, low rank", "#1f77b4"),
    "query_gate": ("query gate", "#17becf"),
    "key": ("key, low rank", "#d62728"),
    "key_gate": ("key gate", "#ff7f0e"),
}


def heads(scores: HeadRows, title: str | None = None) -> go.Figure:
    """A heat map of heads: a row per layer, a column per head; a head that is not there stays blank."""
    labels = scores.labels
    width = max((head.index for row in labels for head in row), default=-1) + 1
    values = np.full((len(labels), width), np.nan)
    hover = np.full((len(labels), width), "", dtype=object)
    columns = scores.to_frame().set_index("head")
    for row, (heads_of_row, numbers) in enumerate(zip(labels, scores.rows, strict=True)):
        for head, value in zip(heads_of_row, numbers, strict=True):
            values[row, head.index] = value
            told = columns.loc[str(head)].drop(["stack", "layer", "index", "group"])
            lines = [f"{name} {_told(number)}" for name, number in told.items()]
            hover[row, head.index] = "<br>".join([f"<b>{head}</b>", *lines])
    signed = bool(np.nanmin(values, initial=0) < 0)
    method = scores.record.get("method", scores.kind)
    heatmap = go.Heatmap(
        z=values,
        y=[_row_name(row, number) for number, row in enumerate(labels)],
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        colorscale="RdBu_r" if signed else "Viridis",
        zmid=0 if signed else None,
        xgap=1,
        ygap=1,
        colorbar_title=_unit(scores),
    )
    figure = go.Figure(heatmap)
    figure.update_layout(title=title or f"Heads by {method}", xaxis_title="head", yaxis_title="layer")
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(dtick=1 if width <= 16 else None)
    return figure


def _row_name(row: tuple[Head, ...], number: int) -> str:
    return f"{row[0].stack} {row[0].layer}".strip() if row else f"row {number}"


def _told(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _unit(scores: HeadRows) -> str:
    if not isinstance(scores, HeadScores):
        return "kept"
    return "change of loss" if scores.kind == "ablation" else "score"


def curves(curves: Mapping[str, Curve], title: str = "Pruning curves") -> go.Figure:
    """Pruning curves over each other, as changes from the whole model, with 95 % intervals over examples."""
    figure = go.Figure()
    palette = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f"]
    what = "metric"
    for number, (name, curve) in enumerate(curves.items()):
        colour, x = palette[number % len(palette)], 100 * curve.fractions
        if curve.record.get("metric") is None:
            what = "loss (nats)"
        if (bounds := curve.intervals()) is not None:
            around = np.concatenate([bounds[:, 1], bounds[::-1, 0]])
            band = {"fillcolor": colour, "opacity": 0.15, "line_width": 0, "fill": "toself", "mode": "lines"}
            outline = np.concatenate([x, x[::-1]])
            figure.add_scatter(x=outline, y=around, hoverinfo="skip", showlegend=False, legendgroup=name, **band)
        told = [f"{len(gone)} of {curve.n_heads} heads removed" for gone in curve.removed]
        figure.add_scatter(
            x=x,
            y=curve.rises,
            name=f"{name} (area {curve.area:.3g})",
            legendgroup=name,
            mode="lines+markers",
            line_color=colour,
            text=told,
            customdata=curve.values,
            hovertemplate=f"<b>{name}</b><br>%{{text}}<br>change %{{y:.4g}}<br>value %{{customdata:.4g}}<extra></extra>",
        )
    figure.update_layout(
        title=title,
        xaxis_title="heads removed (%)",
        yaxis_title=f"change of {what}",
        legend={"x": 0.02, "y": 0.98},
    )
    return figure


def against(scores: HeadScores, exact: HeadScores, title: str | None = None) -> go.Figure:
    """Two scores of the same heads against each other, with their rank correlation."""
    exact.check(scores.labels)
    names = [str(head) for row in scores.labels for head in row]
    rows = [row for row, heads_of_row in enumerate(scores.labels) for _ in heads_of_row]
    x_name, y_name = (s.record.get("method", s.kind) for s in (scores, exact))
    figure = go.Figure(
        go.Scatter(
            x=scores.flat,
            y=exact.flat,
            text=names,
            mode="markers",
            marker={"color": rows, "colorscale": "Viridis", "colorbar": {"title": "row"}},
            hovertemplate=f"<b>%{{text}}</b><br>{x_name} %{{x:.4g}}<br>{y_name} %{{y:.4g}}<extra></extra>",
        )
    )
    rho = scores.rank_correlation(exact)
    figure.update_layout(
        title=title or f"{x_name} against {y_name}: rank correlation {rho:.2f}",
        xaxis_title=f"{x_name} score",
        yaxis_title=f"{y_name}: {_unit(exact)}",
    )
    return figure


def timing(timing: Timing, title: str = "Latency of one forward pass") -> go.Figure:
    """Latency per model and batch, medians with quartiles; attention alone on hover."""
    frame = timing.to_frame()
    figure = go.Figure()
    for name, lines in frame.groupby("model", sort=False):
        told = [
            f"{a:.4g} ms in attention, {p:,} parameters"
            for a, p in zip(lines["attention_ms"], lines["parameters"], strict=True)
        ]
        figure.add_bar(
            x=[f"{b} x {p}" for b, p in zip(lines["batch"], lines["pos"], strict=True)],
            y=lines["ms"],
            name=str(name),
            error_y={
                "type": "data",
                "symmetric": False,
                "array": lines["high"] - lines["ms"],
                "arrayminus": lines["ms"] - lines["low"],
            },
            text=[f"{s:.2f}x" for s in lines["speedup"]],
            textposition="inside",
            insidetextanchor="start",  # the error bar stands at the other end
            customdata=told,
            hovertemplate=f"<b>{name}</b> %{{x}}<br>%{{y:.4g}} ms<br>%{{customdata}}<extra></extra>",
        )
    machine = timing.record.get("device", "")
    figure.update_layout(title=title, xaxis_title=f"examples x tokens ({machine})", yaxis_title="milliseconds")
    return figure


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


def save_html(figure: go.Figure, path: str | Path) -> Path:
    """Write a figure as one HTML file that opens anywhere, without a network. Returns the path."""
    return write(path, lambda temporary: figure.write_html(temporary, include_plotlyjs=True))
