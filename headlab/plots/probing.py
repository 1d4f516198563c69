"""What trained probes answer about combinations that they never met, and which features they tie together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..errors import HeadlabError
from .common import CHANCE, bars, labelled

if TYPE_CHECKING:
    import pandas as pd

PROBES = {  # kinds of attention; told apart by colour and by symbol
    "mha": ("MHA", "#000000", "circle"),
    "matched": ("MHA, as many parameters", "#888888", "square"),
    "static": ("static maps", "#e69f00", "diamond"),
    "gates": ("gates only", "#999933", "cross"),
    "query": ("query side only", "#56b4e9", "triangle-up"),
    "key": ("key side only", "#0072b2", "triangle-down"),
    "low_rank": ("low rank only", "#009e73", "pentagon"),
    "pre": ("before the softmax only", "#cc79a7", "triangle-left"),
    "post": ("after the softmax only", "#882255", "triangle-right"),
    "dynamic": ("DCMHA (published)", "#332288", "hexagram"),
    "dcmha": ("DCMHA (all branches)", "#d55e00", "star"),
    "compositional": ("compositional attention", "#44aa99", "x"),
}
SETTINGS = {  # of probes: what a reader sees of a value
    "heads": "{} heads",
    "d_head": "{} per head",
    "features": "{} features",
    "values": "{} values",
    "records": "{} records",
    "held_out": "{:.0%} held out",
    "shared_values": "shared values {}",
    "mlp": "MLP {}",
    "layers": "{} layers",
    "lr": "rate {:g}",
    "weight_decay": "decay {:g}",
    "average": "average {:g}",
    "steps": "{:,} steps",
    "hold": "hold {:g}",
    "rank": "rank {}",
    "parameters": "{:,} parameters",
}


class Probed(Protocol):
    """What `probes` and `probe_kinds` need of trained probes: a line per run, as of `synthetic_tasks`' `ProbeResults`."""

    def to_frame(self) -> pd.DataFrame: ...


def probes(results: Probed, x: str = "heads", title: str = "Probes: accuracy on unseen combinations") -> go.Figure:
    """Accuracy on unseen combinations against a size: a line per kind, the mean over seeds, bars from the worst seed to the
    best; dotted in the same colour on trained combinations. A panel per level, and for an MLP on the query before attention.

    Runs of one kind at the same x that differ in something else have lines of their own, which say in what.

    Args:
        results: of `synthetic_tasks`' probes.
        x: what stands below: heads, parameters, features, records, d_head, held_out ... any number that a run has.
    """
    frame = results.to_frame()
    if x not in SETTINGS or x not in frame or frame[x].dtype.kind not in "iuf":
        known = [name for name in SETTINGS if name in frame and frame[name].dtype.kind in "iuf"]
        raise HeadlabError(f"x is one of {', '.join(known)}, not {x!r}")
    panels = _panels(frame)
    figure = make_subplots(1, len(panels), shared_yaxes=True, subplot_titles=list(panels), horizontal_spacing=0.03)
    seen: set[str] = set()
    for column, runs in enumerate(panels.values(), 1):
        here: dict[str, Any] = {"row": 1, "col": column}
        chance = runs.groupby(x)["chance"].mean()
        line = {"name": "chance", "legendgroup": "chance", "mode": "lines", "line": CHANCE, "showlegend": column == 1}
        figure.add_scatter(x=chance.index, y=100 * chance, hovertemplate="chance %{y:.2f} %<extra></extra>", **line, **here)
        for kind, label, own in _lines(runs, x):
            _, colour, symbol = _probe(kind)
            points = [group for _, group in own.groupby(x)]
            for which, many in (("seen", False), ("test", True)):
                means, low, high = (100 * np.array([how(g[which]) for g in points]) for how in (np.mean, np.min, np.max))
                style = {"mode": "lines", "line": {"color": colour, "dash": "dot", "width": 1}, "showlegend": False}
                if many:
                    style = {"mode": "lines+markers", "line": {"color": colour, "width": 2}, "name": label}
                    style |= {"marker": {"symbol": symbol, "size": 8}, "showlegend": label not in seen}
                    style |= {"error_y": bars(means, low, high)}
                figure.add_scatter(
                    x=[group[x].iloc[0] for group in points],
                    y=means,
                    legendgroup=label,
                    text=[_seeds(label, SETTINGS[x].format(group[x].iloc[0]), group) for group in points],
                    hovertemplate="%{text}<extra></extra>",
                    **style,
                    **here,
                )
            seen.add(label)
    log = {"type": "log", "tickvals": sorted(frame[x].unique())} if x == "heads" else {}
    figure.update_xaxes(title=x.replace("_", " "), **log)
    figure.update_yaxes(title="accuracy (%), dotted: trained combinations", range=[-3, 103], col=1)
    figure.update_layout(title=title, legend={"traceorder": "normal"})
    return figure


def probe_kinds(results: Probed, title: str = "Probes: unseen and trained combinations") -> go.Figure:
    """Every run by kind of attention: a dot for its accuracy on unseen combinations, an open one on trained ones. Panels as
    in `probes`; the best on unseen combinations above."""
    panels = _panels(results.to_frame())
    listed = [sorted(_lines(runs, None), key=lambda one: -one[2]["test"].fillna(-1).mean()) for runs in panels.values()]
    tall = [max(1, len(lines)) for lines in listed]
    height = max(420, 150 + 26 * sum(tall) + 60 * len(panels))
    gap = 70 / height
    figure = make_subplots(len(panels), 1, subplot_titles=list(panels), row_heights=tall, vertical_spacing=gap)
    for row, lines in enumerate(listed, 1):
        own = [(i, kind, label, run) for i, (kind, label, runs) in enumerate(lines) for _, run in runs.iterrows()]
        colours = [_probe(kind)[1] for _, kind, _, _ in own]
        y = [i for i, *_ in own]
        text = [f"<b>{label}</b>, seed {run['seed']}<br>{_told_of(run)}" for _, _, label, run in own]
        for name, which, marker in (
            ("unseen combinations", "test", {"color": colours, "size": 8, "opacity": 0.75}),
            ("trained combinations", "seen", {"color": colours, "size": 12, "symbol": "circle-open", "line_width": 1.5}),
            ("chance", "chance", {"symbol": "line-ns", "size": 12, "line": {"width": 2, "color": CHANCE["color"]}}),
        ):
            style = {"name": name, "legendgroup": name, "showlegend": row == 1, "mode": "markers", "marker": marker}
            values = [100 * run[which] for *_, run in own]
            figure.add_scatter(x=values, y=y, text=text, hovertemplate="%{text}<extra></extra>", **style, row=row, col=1)
        labels = [f"{label} ({_sizes(label, runs)})" for _, label, runs in lines]
        figure.update_yaxes(automargin=True, zeroline=False, **labelled(labels), row=row)
    figure.update_xaxes(range=[-2, 102])
    figure.update_xaxes(title="accuracy (%), a dot per seed", row=len(panels))
    below = {"orientation": "h", "xref": "container", "yref": "container", "x": 0.5, "y": 0.02, "xanchor": "center"}
    figure.update_layout(title=title, height=height + 30, legend=below, margin={"r": 30, "b": 110})
    return figure


def _panels(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Runs by level and by what stands before attention, with titles."""
    if frame.empty:
        raise HeadlabError("there are no runs to draw")
    shares = ["seen", "test", "chance", "mapped_seen", "mapped_test"]
    frame = frame.astype(dict.fromkeys(shares, float))  # None, for what a run has not, becomes NaN
    panels = {}
    for level in dict.fromkeys(["binding", "conflict", *frame["level"]]):
        runs = frame[frame["level"] == level]
        for first in sorted(runs["first"].unique()):
            told = ", MLP on the query first" if first else ", no MLP first" if runs["first"].any() else ""
            panels[f"level {level}{told}"] = runs[runs["first"] == first]
    return panels


def _lines(runs: pd.DataFrame, x: str | None) -> list[tuple[str, str, pd.DataFrame]]:
    """Kind, label and runs of every line: a kind, split by the settings that differ at one x."""
    found = []
    for kind in sorted(runs["kind"].unique(), key=lambda kind: [*PROBES, kind].index(kind)):
        own = runs[runs["kind"] == kind]
        groups = [group for _, group in own.groupby(x)] if x else [own]
        names = [n for n in SETTINGS if n in runs and n not in (x, "parameters") and any(g[n].nunique() > 1 for g in groups)]
        for values, part in own.groupby(names, dropna=False) if names else [((), own)]:
            told = [SETTINGS[name].format(_plain(value)) for name, value in zip(names, values, strict=True)]
            found.append((kind, ", ".join([_probe(kind)[0], *told]), part))
    return found


def _probe(kind: str) -> tuple[str, str, str]:
    return PROBES.get(kind, (kind, "#bcbd22", "asterisk-open"))


def _plain(value: Any) -> Any:
    return ("no", "yes")[bool(value)] if isinstance(value, (bool, np.bool_)) else value


def _sizes(label: str, runs: pd.DataFrame) -> str:
    heads = [] if " heads" in label else [f"{_between(runs['own_heads'])} heads"]
    return ", ".join([*heads, f"{_between(runs['parameters'])} parameters"])


def _between(numbers: pd.Series) -> str:
    return " to ".join(f"{n:,}" for n in sorted({numbers.min(), numbers.max()}))


def _seeds(label: str, x: str, runs: pd.DataFrame) -> str:
    shares = [
        f"{name} " + ", ".join(f"{100 * share:.1f}" for share in runs[which]) + " %"
        for which, name in (("test", "unseen"), ("seen", "trained"))
    ]
    seeds = ", ".join(map(str, runs["seed"]))
    return "<br>".join([f"<b>{label}</b>, {x}", f"{_between(runs['parameters'])} parameters", f"seeds {seeds}", *shares])


def _told_of(run: pd.Series) -> str:
    shares = {"unseen": "test", "trained": "seen", "chance": "chance"}
    shares |= {"right link in the map, unseen": "mapped_test", "right link in the map, trained": "mapped_seen"}
    return "<br>".join(f"{name} {100 * run[which]:.1f} %" for name, which in shares.items() if run[which] == run[which])


def feature_map(
    maps: Sequence[tuple[str, Any, tuple[int, int] | None]], title: str = "Where features looked up are carried"
) -> go.Figure:
    """Heat maps of matrices [looked up, reported] by feature, side by side, each with the true pair framed.

    Args:
        maps: for every query its title, the matrix (numpy or torch), and its (looked up, reported) features or None.
    """
    if not maps:
        raise HeadlabError("there are no maps to draw")
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = make_subplots(rows, columns, subplot_titles=[name for name, _, _ in maps], horizontal_spacing=0.06)
    values = [np.asarray(m.detach().float().cpu() if hasattr(m, "detach") else m, dtype=float) for _, m, _ in maps]
    for number, (matrix, (name, _, pair)) in enumerate(zip(values, maps, strict=True)):
        if matrix.ndim != 2 or (pair and not (0 <= pair[0] < matrix.shape[0] and 0 <= pair[1] < matrix.shape[1])):
            raise HeadlabError(
                f"{name}: expected a matrix [looked up, reported] that has {pair}, not the shape {matrix.shape}"
            )
        where = {"row": number // columns + 1, "col": number % columns + 1}
        looked_up, reported = ([f"{letter}{i}" for i in range(n)] for letter, n in zip("pa", matrix.shape, strict=True))
        hover = "looked up %{y}, reported %{x}: %{z:.3g}<extra></extra>"
        heatmap = go.Heatmap(z=matrix, x=reported, y=looked_up, coloraxis="coloraxis", xgap=1, ygap=1, hovertemplate=hover)
        figure.add_trace(heatmap, **where)
        if pair:
            p, a = pair
            line = {"color": "black", "width": 3}
            figure.add_shape(type="rect", x0=a - 0.5, x1=a + 0.5, y0=p - 0.5, y1=p + 0.5, line=line, **where)
        square = {"scaleanchor": f"x{number + 1 if number else ''}", "constrain": "domain", "autorange": "reversed"}
        figure.update_xaxes(title="reported", type="category", constrain="domain", **where)
        figure.update_yaxes(title="looked up" if where["col"] == 1 else None, type="category", **square, **where)
    limit = max((np.nanmax(np.abs(matrix), initial=0) for matrix in values), default=0) or 1.0
    signed = any((matrix < 0).any() for matrix in values)
    scale = {"colorscale": "RdBu_r" if signed else "Blues", "cmin": -limit if signed else 0, "cmax": limit}
    figure.update_layout(title=f"{title} (framed: the true pair)", coloraxis=scale | {"colorbar": {"title": "weight"}})
    return figure
