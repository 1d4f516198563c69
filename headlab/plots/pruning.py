"""Which heads matter, what removing them costs, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from ..pruning.curves import Curve
from ..pruning.timing import Timing
from ..scores import HeadRows, HeadScores
from .common import PALETTE, head_points, row_names, shown


def heads(scores: HeadRows, title: str | None = None) -> go.Figure:
    """A heat map of heads: a row per layer, a column per head; a head that is not there is grey."""
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
        y=row_names(labels),
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        colorscale="RdBu_r" if signed else "Viridis",
        zmid=0 if signed else None,
        xgap=1,
        ygap=1,
        colorbar_title=_unit(scores),
    )
    figure = go.Figure(heatmap)
    told = f"<br><sup>grey: no such head in the model ({missing})</sup>" if (missing := int((hover == "").sum())) else ""
    figure.update_layout(title=(title or f"Heads by {method}") + told, xaxis_title="head", yaxis_title="layer")
    figure.update_layout(height=max(450, 190 + 14 * len(labels)), plot_bgcolor="#d9d9d9")
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(dtick=1 if width <= 16 else None, range=[-0.5, width - 0.5], showgrid=False, zeroline=False)
    return figure


def _told(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _unit(scores: HeadRows) -> str:
    if not isinstance(scores, HeadScores):
        return "kept"
    if scores.kind != "ablation":
        return "score"
    return "change of<br>loss (nats)" if scores.record.get("loss") == "own" else "change of loss"


def curves(curves: Mapping[str, Curve], title: str = "Pruning curves") -> go.Figure:
    """Pruning curves over each other, as changes from the whole model, with 95 % intervals over examples.

    Shares are of the model's heads; of curves by stack (`hl.stack_curves`) of the stack's.
    """
    figure = go.Figure()
    what = "metric"
    for number, (name, curve) in enumerate((shown(name), curve) for name, curve in curves.items()):
        colour, x = PALETTE[number % len(PALETTE)], 100 * curve.fractions
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
    by_stack = {"stack" in curve.record for curve in curves.values()}
    removed = "heads of the stack removed (%)" if by_stack == {True} else "heads removed (%)"
    figure.update_layout(
        title=title,
        xaxis_title=removed if len(by_stack) < 2 else f"{removed}, of the model or of the stack",
        yaxis_title=f"change of {what}",
        legend={"x": 0.02, "y": 0.98},
    )
    return figure


def against(scores: HeadScores, exact: HeadScores, title: str | None = None) -> go.Figure:
    """Two scores of the same heads against each other, with their rank correlation."""
    exact.check(scores.labels)
    x_name, y_name = (s.record.get("method", s.kind) for s in (scores, exact))
    hover = f"{x_name} %{{x:.4g}}<br>{y_name} %{{y:.4g}}"
    figure = head_points(scores.labels, scores.flat, exact.flat, hover)
    rho = scores.rank_correlation(exact)
    figure.update_layout(
        title=title or f"{x_name} against {y_name}: rank correlation {rho:.2f}",
        xaxis_title=f"{x_name} score",
        yaxis_title=f"{y_name}: {_unit(exact).replace('<br>', ' ')}",
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
            name=shown(str(name)),
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
            hovertemplate=f"<b>{shown(str(name))}</b> %{{x}}<br>%{{y:.4g}} ms<br>%{{customdata}}<extra></extra>",
        )
    machine = timing.record.get("device", "")
    figure.update_layout(title=title, xaxis_title=f"examples x tokens ({machine})", yaxis_title="milliseconds")
    return figure
