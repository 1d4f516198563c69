"""Results drawn as plotly figures. A function takes a result and returns a `go.Figure`; it never shows it, sets no
renderer or template, and needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .curves import Curve
from .errors import HeadlabError
from .results import write
from .scores import Head, HeadRows, HeadScores
from .speed import Timing

if TYPE_CHECKING:
    import pandas as pd

    from .dcmha.maps import CompositionMaps

PALETTE = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f"]
STAGES = {"pre": "scores (pre)", "post": "probabilities (post)"}
PARTS = {
    "identity": ("identity left out", "#7f7f7f"),
    "base": ("base", "#8c564b"),
    "query": ("query, low rank", "#1f77b4"),
    "query_gate": ("query gate", "#17becf"),
    "key": ("key, low rank", "#d62728"),
    "key_gate": ("key gate", "#ff7f0e"),
}
MEASURES = {  # of answers
    "all": ("whole answer", "circle"),
    "first": ("first token", "diamond"),
    "choice": ("among the choices", "square"),
}
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
    "weight_decay": "weight decay {:g}",
    "steps": "{:,} steps",
    "parameters": "{:,} parameters",
}
CHANCE = {"color": "#a0a0a0", "dash": "dash", "width": 1.5}


class Evaluated(Protocol):
    """What `tasks` needs of an evaluation: `synthetic_tasks.Evaluation`."""

    def by(self, *names: str) -> pd.DataFrame: ...


class Probed(Protocol):
    """What `probes` and `probe_kinds` need of trained probes: a line per run, as of `synthetic_tasks`' `ProbeResults`."""

    def to_frame(self) -> pd.DataFrame: ...


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
    what = "metric"
    for number, (name, curve) in enumerate(curves.items()):
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


def tasks(
    evaluation: Evaluated | Mapping[str, Evaluated],
    by: str | Sequence[str | tuple[str, ...]] = "relation",
    measure: str | Sequence[str] = "all",
    title: str = "Accuracy on in-context tasks",
) -> go.Figure:
    """Accuracy of a language model, or of several by name, with 95 % intervals; a row per value of a factor.

    Args:
        evaluation: of `synthetic_tasks.evaluate`.
        by: a factor (or `task`, `difficulty` ...), or several, one below the other; a tuple of factors is their
            combinations.
        measure: `all`, `first` or `choice` (which is drawn with chance), or several.
    """
    named = dict(evaluation) if isinstance(evaluation, Mapping) else {"": evaluation}
    measures = [measure] if isinstance(measure, str) else list(measure)
    factors = [(one,) if isinstance(one, str) else one for one in ([by] if isinstance(by, str) else by)]
    if not (named and measures and factors):
        raise HeadlabError("there is nothing to draw: give at least one evaluation, one measure and one factor")
    if unknown := [name for name in measures if name not in MEASURES]:
        raise HeadlabError(f"measure is one or more of {', '.join(MEASURES)}, not {', '.join(map(repr, unknown))}")
    rows, at, lines = _task_rows(named, factors)
    figure = go.Figure()
    drawn = [(name, one) for name in named for one in measures]
    for number, (name, one) in enumerate(drawn):
        own = [(at[key], line) for key, line in lines[name].items()]
        offset = 0.7 * ((number + 0.5) / len(drawn) - 0.5)
        y, told, symbol = [place + offset for place, _ in own], *MEASURES[one]
        label = ", ".join(filter(None, [name, told if len(measures) > 1 or not name else ""]))
        x, low, high = (np.array([100 * line[one + end] for _, line in own]) for end in ("", "_low", "_high"))
        colour = list(named).index(name) if len(named) > 1 else number
        figure.add_scatter(
            x=x,
            y=y,
            name=label,
            mode="markers",
            marker={"color": PALETTE[colour % len(PALETTE)], "symbol": symbol, "size": 7},
            error_x=_bars(x, low, high),
            text=[
                f"<b>{rows[place]}</b> {label}<br>{a:.1f} % (95 %: {b:.1f} to {c:.1f})<br>{line['n']} answers in "
                f"{line['contexts']} contexts<br>{line['logprob']:.3g} nats an answer"
                for (place, line), a, b, c in zip(own, x, low, high, strict=True)
            ],
            hovertemplate="%{text}<extra></extra>",
        )
        if one == "choice":
            figure.add_scatter(
                x=[100 * line["chance"] for _, line in own],
                y=y,
                name="chance among the choices",
                legendgroup="chance",
                showlegend=(name, one) == next(pair for pair in drawn if pair[1] == "choice"),
                mode="markers",
                marker={"symbol": "line-ns", "size": 9, "line": {"width": 2, "color": CHANCE["color"]}},
                hovertemplate="chance %{x:.1f} %<extra></extra>",
            )
    what = " and ".join(factors[0]) if len(factors) == 1 else None
    figure.update_yaxes(title=what, automargin=True, zeroline=False, **_rows(rows))
    figure.update_xaxes(title="accuracy (%)", range=[-2, 102])
    above = 70 + 24 * -(-len(figure.data) // 2)  # the legend, two names in a line where they are long
    figure.update_layout(
        title={"text": title, "y": 1, "yanchor": "top", "pad": {"t": 20}},
        height=max(420, above + 90 + len(rows) * (14 + 6 * len(drawn))),
        margin_t=above,
        showlegend=True,
        legend={"orientation": "h", "y": 1, "yanchor": "bottom"},
    )
    return figure


def _bars(middle: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    ends = {"type": "data", "symmetric": False, "array": high - middle, "arrayminus": middle - low}
    return ends | {"thickness": 1.2, "width": 3}


def _task_rows(
    named: Mapping[str, Evaluated], factors: Sequence[tuple[str, ...]]
) -> tuple[list[str], dict[Any, int], dict[str, dict[Any, Any]]]:
    """The rows' labels, with headings where there are several factors; which row a value has; every evaluation's lines."""
    rows: list[str] = []
    at: dict[Any, int] = {}
    lines: dict[str, dict[Any, Any]] = {name: {} for name in named}
    for names in factors:
        if len(factors) > 1:
            rows.append(f"<b>{' and '.join(names).replace('_', ' ')}</b>")
        for name, evaluation in named.items():
            for line in evaluation.by(*names).to_dict("records"):
                values = [_value(line[one]) for one in names]
                key = (names, *values)
                if key not in at:
                    at[key] = len(rows)
                    rows.append(", ".join(values) or "all answers")
                lines[name][key] = line
    return rows, at, lines


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
                    style |= {"error_y": _bars(means, low, high)}
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
        own = [(place, kind, label, run) for place, (kind, label, runs) in enumerate(lines) for _, run in runs.iterrows()]
        colours = [_probe(kind)[1] for _, kind, _, _ in own]
        y = [place for place, *_ in own]
        text = [f"<b>{label}</b>, seed {run['seed']}<br>{_told_of(run)}" for _, _, label, run in own]
        for name, which, marker in (
            ("unseen combinations", "test", {"color": colours, "size": 8, "opacity": 0.75}),
            ("trained combinations", "seen", {"color": colours, "size": 12, "symbol": "circle-open", "line_width": 1.5}),
            ("chance", "chance", {"symbol": "line-ns", "size": 12, "line": {"width": 2, "color": CHANCE["color"]}}),
        ):
            style = {"name": name, "legendgroup": name, "showlegend": row == 1, "mode": "markers", "marker": marker}
            values = [100 * run[which] for *_, run in own]
            figure.add_scatter(x=values, y=y, text=text, hovertemplate="%{text}<extra></extra>", **style, row=row, col=1)
        labels = [f"{label} ({_between(runs['parameters'])} parameters)" for _, label, runs in lines]
        figure.update_yaxes(automargin=True, zeroline=False, **_rows(labels), row=row)
    figure.update_xaxes(range=[-2, 102])
    figure.update_xaxes(title="accuracy (%), a dot per seed", row=len(panels))
    figure.update_layout(title=title, height=height)
    return figure


def _rows(labels: list[str]) -> dict[str, Any]:
    """An axis with these labels at 0, 1 ... from the top down."""
    return {"tickvals": list(range(len(labels))), "ticktext": labels, "range": [len(labels) - 0.4, -0.6]}


def _value(value: Any) -> str:
    return "none" if value is None or value != value else f"{value:g}" if isinstance(value, float) else str(value)


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
        names = [n for n in SETTINGS if n not in (x, "parameters") and any(g[n].nunique() > 1 for g in groups)]
        for values, part in own.groupby(names, dropna=False) if names else [((), own)]:
            told = [SETTINGS[name].format(_plain(value)) for name, value in zip(names, values, strict=True)]
            found.append((kind, ", ".join([_probe(kind)[0], *told]), part))
    return found


def _probe(kind: str) -> tuple[str, str, str]:
    return PROBES.get(kind, (kind, "#bcbd22", "asterisk-open"))


def _plain(value: Any) -> Any:
    return ("no", "yes")[bool(value)] if isinstance(value, (bool, np.bool_)) else value


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


def save_html(figure: go.Figure, path: str | Path) -> Path:
    """Write a figure as one HTML file that opens anywhere, without a network. Returns the path."""
    return write(path, lambda temporary: figure.write_html(temporary, include_plotlyjs=True))
