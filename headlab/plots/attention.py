"""Which head plays which role, and which heads attend alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .common import PALETTE, row_names

if TYPE_CHECKING:
    from ..attention.roles import Roles
    from ..attention.similarity import Similarity
    from ..tables import Head

COLOURS = {
    "induction": "#d62728",
    "duplicate": "#ff7f0e",
    "previous": "#1f77b4",
    "next": "#17becf",
    "delimiter": "#8c564b",
    "rare": "#e377c2",
    "self": "#9467bd",
    "positional": "#2ca02c",
    "first": "#bcbd22",
}
NONE = "#d9d9d9"
STACKS = {"": "", "enc": "encoder", "dec": "decoder", "cross": "cross-attention"}


def roles(roles: Roles, title: str = "Roles of heads") -> go.Figure:
    """A cell per head in the colour of its main role, all its numbers on hover; a head that is not there stays blank."""
    from ..attention.roles import ROLES

    width = max((head.index for row in roles.heads for head in row), default=-1) + 1
    names = ["none of these", *ROLES]
    values = np.full((len(roles.heads), width), np.nan)
    hover = np.full(values.shape, "", dtype=object)
    lines = iter(roles.to_frame().to_dict("records"))
    for row, heads in enumerate(roles.heads):
        for head in heads:
            line = next(lines)
            values[row, head.index] = names.index(line["role"] or names[0])
            hover[row, head.index] = _told(head, line)
    colours = [NONE, *(COLOURS[role] for role in ROLES)]
    steps = [(edge / len(names), colour) for number, colour in enumerate(colours) for edge in (number, number + 1)]
    heatmap = go.Heatmap(
        z=values,
        y=row_names(roles.heads),
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        colorscale=steps,
        zmin=-0.5,
        zmax=len(names) - 0.5,
        showscale=False,
        xgap=1,
        ygap=1,
    )
    figure = go.Figure(heatmap)
    counts = [int((values == number).sum()) for number in range(len(names))]
    for name, colour, count in zip([*names[1:], names[0]], [*colours[1:], NONE], [*counts[1:], counts[0]], strict=True):
        if count:
            marker = {"color": colour, "symbol": "square", "size": 12}
            figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=f"{name} ({count})")
    unmeasured = [name for name in ROLES if name in roles.columns and all(np.isnan(r).all() for r in roles.columns[name])]
    if unmeasured:
        _note(figure, f"not measured on this data or model: {', '.join(unmeasured)}")
    figure.update_layout(title=title, xaxis_title="head", yaxis_title="layer", legend_title="main role (heads)")
    figure.update_layout(height=max(420, 190 + 17 * len(roles.heads)), showlegend=True, plot_bgcolor="white")
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(dtick=1 if width <= 16 else None, range=[-0.5, width - 0.5], showgrid=False, zeroline=False)
    return figure


def _told(head: Head, line: dict[str, Any]) -> str:
    """All numbers of a head, with standard errors; what was not measured is left out."""
    told = [f"<b>{head}</b> {line['roles'] or 'plays none of these roles'}"]
    skipped = {"head", "stack", "layer", "index", "group", "role", "roles"}
    for name, value in line.items():
        if name in skipped or name.endswith("_se") or np.isnan(value):
            continue
        error = line.get(f"{name}_se", np.nan)
        more = "" if np.isnan(error) else f" ± {error:.2g}"
        told.append(f"{name.replace('_', ' ')} {value:.3g}{more}{UNITS.get(name, '')}")
    return "<br>".join(told)


UNITS = {"entropy": " nats", "raw_entropy": " nats", "distance": " tokens", "raw_distance": " tokens", "copying": " sd"}


def _note(figure: go.Figure, text: str) -> None:
    corner = {"xref": "paper", "yref": "paper", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}
    figure.add_annotation(text=text, showarrow=False, font_size=11, **corner)


def similarity(
    similarity: Similarity, colour: Literal["cluster", "layer"] = "cluster", title: str = "Heads that attend alike"
) -> go.Figure:
    """A map of heads, on which those whose patterns are alike stand close; a panel per stack, equal scales on both axes.

    Args:
        colour: by `cluster` or by `layer`.
    """
    stacks = list(dict.fromkeys(head.stack for head in similarity.heads))
    figure = make_subplots(1, max(1, len(stacks)), subplot_titles=[STACKS.get(name, name) for name in stacks])
    nearest = dict(zip(map(str, similarity.heads), similarity.to_frame().to_dict("records"), strict=True))
    clusters = sorted(set(similarity.clusters)) if colour == "cluster" else [None]
    deepest = max((head.layer for head in similarity.heads), default=0)
    for column, stack in enumerate(stacks, 1):
        for cluster in clusters:
            chosen = [
                i
                for i, (head, label) in enumerate(zip(similarity.heads, similarity.clusters, strict=True))
                if head.stack == stack and cluster in (None, label)
            ]
            if not chosen:
                continue
            heads = [similarity.heads[i] for i in chosen]
            marker: dict[str, Any] = {"size": 9, "line": {"width": 0.5, "color": "white"}}
            if cluster is None:
                marker |= {"color": [head.layer for head in heads], "colorscale": "Viridis", "cmin": 0, "cmax": deepest}
                marker |= {"colorbar": {"title": "layer"}, "showscale": column == 1}
            else:
                marker |= {"color": PALETTE[cluster % len(PALETTE)], "symbol": SYMBOLS[cluster // len(PALETTE) % 4]}
            figure.add_scatter(
                x=similarity.points[chosen, 0],
                y=similarity.points[chosen, 1],
                mode="markers",
                marker=marker,
                name=f"cluster {cluster} ({len(chosen)})",
                showlegend=cluster is not None,
                text=[_neighbour(nearest[str(head)]) for head in heads],
                hovertemplate="%{text}<extra></extra>",
                row=1,
                col=column,
            )
        axis = "x" if column == 1 else f"x{column}"
        figure.update_yaxes(scaleanchor=axis, constrain="domain", col=column)
    figure.update_xaxes(title="root of the divergence (√nats)", constrain="domain")
    figure.update_yaxes(title="root of the divergence (√nats)", col=1)
    figure.update_layout(title=title, height=560, legend_title="cluster (heads)")
    return figure


SYMBOLS = ("circle", "diamond", "square", "x")


def _neighbour(line: dict[str, Any]) -> str:
    told = f"<b>{line['head']}</b>, cluster {line['cluster']}"
    return f"{told}<br>nearest: {line['nearest']}, {line['divergence']:.3g} nats" if line["nearest"] else told


def similarity_matrix(similarity: Similarity, title: str = "Divergence between heads' patterns") -> go.Figure:
    """The divergence of all pairs of heads, in their order; pairs of different stacks are not comparable and stay blank."""
    names = [str(head) for head in similarity.heads]
    heatmap = go.Heatmap(
        z=np.round(similarity.distances, 4),
        x=names,
        y=names,
        hovertemplate="<b>%{y}</b> and <b>%{x}</b>: %{z:.4f} nats<extra></extra>",
        colorscale="Viridis_r",
        zmin=0,
        zmax=float(np.log(2)),
        colorbar={"title": "nats"},
        hoverongaps=False,
    )
    figure = go.Figure(heatmap)
    first = [i for i, head in enumerate(similarity.heads) if not i or head.row != similarity.heads[i - 1].row]
    step = max(1, -(-len(first) // 16))
    shown = [names[i] for i in (first[::step] if len(names) > 24 else range(len(names)))]
    ticks = {"type": "category", "tickvals": shown, "showgrid": False, "zeroline": False}
    if np.isnan(similarity.distances).any():
        _note(figure, "blank: heads of different stacks, which have no patterns in common")
    figure.update_xaxes(title="head", constrain="domain", tickangle=-90, **ticks)
    figure.update_yaxes(title="head", autorange="reversed", scaleanchor="x", constrain="domain", **ticks)
    figure.update_layout(title=title, height=700, plot_bgcolor="white")
    return figure
