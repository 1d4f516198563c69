"""Composition between heads: every pair as a matrix, the strongest ones as a graph."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from ..circuits.composition import KINDS, CompositionScores, MapReader, Pair, Reader
from ..errors import HeadlabError
from .common import PALETTE

TICKS = 16  # names along an axis before only some of them are written


def composition_matrix(scores: CompositionScores, title: str | None = None) -> go.Figure:
    """The score of every earlier head (rows) with every later reader (columns), layer by layer."""
    sources, readers = list(map(str, scores.sources)), list(map(str, scores.readers))
    values = scores.values.numpy()
    heatmap = go.Heatmap(
        z=values,
        x=readers,
        y=sources,
        customdata=values / scores.baseline,
        hovertemplate="<b>%{y} -> %{x}</b><br>score %{z:.3g}<br>%{customdata:.2f} x random<extra></extra>",
        hoverongaps=False,
        colorscale="Viridis",
        zmin=0,
        zmax=float(np.nanmax(values, initial=0)) or 1.0,
        colorbar_title=f"score<br>(random<br>{scores.baseline:.3g})",
    )
    figure = go.Figure(heatmap)
    line = {"color": "#d0d0d0", "width": 0.6}
    for axis, ends in (("y", scores.sources), ("x", scores.readers)):
        layers = [end.layer for end in ends]
        firsts = [i for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer]
        for first in firsts[1:]:
            across = {"x0": 0, "x1": 1, "xref": "x domain"} if axis == "y" else {"y0": 0, "y1": 1, "yref": "y domain"}
            figure.add_shape(type="line", line=line, **across, **{f"{axis}0": first - 0.5, f"{axis}1": first - 0.5})
        middles = [(a + b - 1) // 2 for a, b in zip(firsts, [*firsts[1:], len(ends)], strict=True)]
        shown: list[int] = []
        for middle in middles:  # layers of a pruned model may have few heads
            if not shown or middle - shown[-1] >= len(ends) / TICKS:
                shown.append(middle)
        figure.update_layout(
            {f"{axis}axis": {"tickvals": [str(ends[i]) for i in shown], "ticktext": [f"L{layers[i]}" for i in shown]}}
        )
    what = "layers" if scores.what == "M" else "heads"
    figure.update_layout(
        title=(title or f"{scores.what}-composition: what {KINDS[scores.what]} of later {what} read of earlier heads")
        + _holes(scores)
    )
    figure.update_xaxes(title="reads (later layer)", type="category", constrain="domain", showgrid=False)
    figure.update_yaxes(title="writes (earlier layer)", type="category", autorange="reversed", showgrid=False)
    if scores.what != "M":
        figure.update_yaxes(scaleanchor="x", constrain="domain")
    figure.update_layout(height=700)
    return figure


def _holes(scores: CompositionScores) -> str:
    later = np.array([[a.layer < b.layer for b in scores.readers] for a in scores.sources])
    count = int(np.isnan(scores.values.numpy()[later]).sum())
    return f"<br><sup>{count} of {later.sum()} pairs have no score (a matrix is zero or not finite)</sup>" if count else ""


def composition_graph(scores: CompositionScores, above: float = 2.0, k: int = 50, title: str | None = None) -> go.Figure:
    """Heads as nodes, layers as columns; edges are the k strongest pairs that score more than `above` times random.

    Raises:
        HeadlabError: k is no positive number.
    """
    if k < 1:
        raise HeadlabError(f"k is the number of edges to draw at most, 1 or more, not {k}")
    pairs = [pair for pair in scores.top(k) if pair.ratio > above]
    n_heads = max(head.index for head in scores.sources) + 1
    places = list(dict.fromkeys(end.place for end in scores.readers if isinstance(end, MapReader)))

    def at(end: Reader) -> tuple[float, float]:
        return end.layer, n_heads + 0.5 + places.index(end.place) if isinstance(end, MapReader) else end.index

    figure = go.Figure()
    for pair in reversed(pairs):  # the strongest on top
        _edge(figure, pair, at(pair.source), at(pair.reader), pairs[0].score)
    every: dict[Reader, None] = dict.fromkeys([*scores.sources, *scores.readers])
    for is_map in (False, True):
        ends = [end for end in every if isinstance(end, MapReader) == is_map]
        if ends:
            figure.add_scatter(
                x=[at(end)[0] for end in ends],
                y=[at(end)[1] for end in ends],
                text=[_partners(end, pairs) for end in ends],
                mode="markers",
                marker={
                    "size": 9,
                    "symbol": "square" if is_map else "circle",
                    "color": [PALETTE[0] if _touched(end, pairs) else "#d9d9d9" for end in ends],
                    "line": {"width": 1, "color": "white"},
                },
                hovertemplate="%{text}<extra></extra>",
                showlegend=False,
            )
    layers = scores.layer_indices
    step = -(-n_heads // TICKS)
    ticks = list(range(0, n_heads, step))
    figure.update_layout(title=(title or f"{scores.what}-composition") + f"<br><sup>{_told(pairs, above, k)}</sup>")
    figure.update_xaxes(title="layer", tickvals=layers[:: -(-len(layers) // TICKS)], showgrid=False, zeroline=False)
    figure.update_yaxes(
        title="head",
        tickvals=[*ticks, *(n_heads + 0.5 + i for i in range(len(places)))],
        ticktext=[*map(str, ticks), *places],
        range=[n_heads + len(places) + (0.1 if places else -0.4), -0.6],
        zeroline=False,
        showgrid=False,
    )
    return figure


def _told(pairs: list[Pair], above: float, k: int) -> str:
    if not pairs:
        return f"no pair scores more than {above:g} x random"
    which = f"the {k} strongest pairs" if len(pairs) == k else f"all {len(pairs)} pairs above {above:g} x random"
    return f"{which}: {pairs[0].ratio:.1f} to {pairs[-1].ratio:.1f} x random"


def _edge(figure: go.Figure, pair: Pair, start: tuple[float, float], end: tuple[float, float], strongest: float) -> None:
    """A bowed line, which no node in between hides, with the pair told along it."""
    t = np.linspace(0, 1, 13)
    bow = 0.35 * np.sin(np.pi * t) * min(end[0] - start[0] - 0.5, 1.5)
    x, y = start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t * t * (3 - 2 * t) + bow
    share = pair.score / strongest
    told = f"<b>{pair.source} -> {pair.reader}</b><br>score {pair.score:.3g}<br>{pair.ratio:.2f} x random"
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"width": 0.6 + 3 * share**2, "color": PALETTE[1]},
        opacity=0.15 + 0.65 * share**2,
        text=[told] * len(t),
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _touched(end: Reader, pairs: list[Pair]) -> bool:
    return any(end in (pair.source, pair.reader) for pair in pairs)


def _partners(end: Reader, pairs: list[Pair]) -> str:
    """A node's hover: its name, and the edges into it and out of it, the strongest first."""
    lines = [f"<b>{end}</b>"]
    lines += [f"reads {pair.source} {pair.score:.3g}" for pair in pairs if pair.reader == end][:5]
    lines += [f"feeds {pair.reader} {pair.score:.3g}" for pair in pairs if pair.source == end][:5]
    return "<br>".join(lines)
