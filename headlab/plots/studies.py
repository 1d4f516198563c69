"""Figures of studies that compare: data with data, and a model with itself at other times of its training."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from ..studies.checkpoints import Profile, step_of
from ..studies.correlation import Correlation
from .common import CHANCE, PALETTE, head_points, shown


def correlation(result: Correlation, title: str | None = None) -> go.Figure:
    """Scores on one set of data against scores on another: a point per head, coloured by stack, or by layer if there is one.

    Michel, Levy & Neubig 2019, figure 2.
    """
    points = result.points()
    one, other = map(shown, result.names)
    hover = f"{one} %{{x:.4g}} (rank %{{customdata[0]:.0f}})<br>{other} %{{y:.4g}} (rank %{{customdata[1]:.0f}})"
    ranks = points[["first_rank", "second_rank"]].to_numpy()
    figure = head_points(result.heads, points["first"].to_numpy(), points["second"].to_numpy(), hover, ranks)
    whole = result.lines[0]
    if result.r is None:
        told = "correlation not defined: fewer than three heads, or all scores the same"
    else:
        told = f"Pearson r = {result.r:.2f} ({_p(whole['p'])}), Spearman rho = {result.rho:.2f} ({_p(whole['rho_p'])})"
    methods = {result.record.get(which, {}).get("method", "score") for which in ("first", "second")}
    quantity = _QUANTITY.get(methods.pop(), "score") if len(methods) == 1 else "score"
    figure.update_layout(
        title={"text": title or f"Heads on two sets of data, {whole['heads']} heads", "subtitle": {"text": told}},
        xaxis_title=f"{quantity}, {one}",
        yaxis_title=f"{quantity}, {other}",
        margin={"t": 90},
    )
    return figure


_QUANTITY = {"ablation": "change of loss on removal", "taylor": "importance (Taylor)"}


def _p(value: float | None) -> str:
    if value is None:
        return "p not defined"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def profile(result: Profile, title: str = "Pruning over the course of training") -> go.Figure:
    """A pruning curve per checkpoint against that checkpoint with all its heads, early ones light and late ones dark.

    With a metric, per cent of the checkpoint's own unpruned value (Michel, Levy & Neubig 2019, figure 5); with a loss, its
    rise in nats. A checkpoint whose metric is not above zero has no curve, and the title says so.
    """
    by_metric = result.record.get("metric") is not None
    relative = 100 * result.relative if by_metric else result.relative
    figure = go.Figure()
    figure.add_hline(y=100 if by_metric else 0, line=CHANCE)
    n = len(result.names)
    colours = sample_colorscale("Viridis_r", list(np.linspace(0.1, 1.0, n))) if n > 1 else [PALETTE[0]]
    what, unit = ("metric", " %") if by_metric else ("loss", " nats")
    for name, curve, values, colour in zip(result.names, result.curves, relative, colours, strict=True):
        whole = f"{curve.values[0]:.3g}"
        told = [f"{len(gone)} of {curve.n_heads} heads removed" for gone in curve.removed]
        figure.add_scatter(
            x=100 * curve.fractions,
            y=values,
            name=f"{shown(_short(name))} ({whole})",
            mode="lines+markers",
            line_color=colour,
            text=told,
            customdata=curve.values,
            hovertemplate=f"<b>{shown(name)}</b><br>%{{text}}<br>{what} %{{customdata:.4g}}, with all heads {whole}<br>"
            f"{'left' if by_metric else 'rise'} %{{y:.4g}}{unit}<extra></extra>",
        )
    holes = [shown(name) for name, values in zip(result.names, relative, strict=True) if np.isnan(values).any()]
    left_out = f"no curve for {', '.join(holes)}: {what} not above zero" if holes else ""
    figure.update_layout(
        title={"text": title, "subtitle": {"text": left_out}} if holes else title,
        xaxis_title="heads removed (%)",
        yaxis_title=f"{what} left (% of the checkpoint's own)" if by_metric else "rise of the loss (nats)",
        legend_title=f"checkpoint ({what}, all heads)",
    )
    return figure


def _short(name: str) -> str:
    """`step 500` for what is called by a step, else the name."""
    step = step_of(name)
    return name if step is None or not name.startswith(("checkpoint", "step")) else f"step {step:,}"
