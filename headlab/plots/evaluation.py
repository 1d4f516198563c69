"""How many answers of a language model are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import plotly.graph_objects as go

from ..errors import HeadlabError
from .common import CHANCE, PALETTE, bars, labelled

if TYPE_CHECKING:
    import pandas as pd

MEASURES = {  # of answers
    "all": ("whole answer", "circle"),
    "first": ("first token", "diamond"),
    "choice": ("among the choices", "square"),
}


class Evaluated(Protocol):
    """What `tasks` needs of an evaluation: `synthetic_tasks.Evaluation`."""

    def by(self, *names: str) -> pd.DataFrame: ...


def tasks(
    evaluation: Evaluated | Mapping[str, Evaluated],
    by: str | Sequence[str | tuple[str, ...]] = "relation",
    measure: str | Sequence[str] = "all",
    title: str = "Accuracy on in-context tasks",
) -> go.Figure:
    """Accuracy of a language model, or of several by name, with 95 % intervals; a line per value of a factor.

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
    labels, at, lines = _labels(named, factors)
    figure = go.Figure()
    drawn = [(name, one) for name in named for one in measures]
    for number, (name, one) in enumerate(drawn):
        own = [(at[key], line) for key, line in lines[name].items()]
        offset = 0.7 * ((number + 0.5) / len(drawn) - 0.5)
        y, told, symbol = [i + offset for i, _ in own], *MEASURES[one]
        label = ", ".join(filter(None, [name, told if len(measures) > 1 or not name else ""]))
        x, low, high = (np.array([100 * line[one + end] for _, line in own]) for end in ("", "_low", "_high"))
        colour = list(named).index(name) if len(named) > 1 else number
        figure.add_scatter(
            x=x,
            y=y,
            name=label,
            mode="markers",
            marker={"color": PALETTE[colour % len(PALETTE)], "symbol": symbol, "size": 7},
            error_x=bars(x, low, high),
            text=[
                f"<b>{labels[i]}</b> {label}<br>{a:.1f} % (95 %: {b:.1f} to {c:.1f})<br>{line['n']} answers in "
                f"{line['contexts']} contexts<br>{line['logprob']:.3g} nats an answer"
                for (i, line), a, b, c in zip(own, x, low, high, strict=True)
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
    figure.update_yaxes(title=what, automargin=True, zeroline=False, **labelled(labels))
    figure.update_xaxes(title="accuracy (%)", range=[-2, 102])
    above = 70 + 24 * -(-len(figure.data) // 2)  # the legend, two names in a line where they are long
    figure.update_layout(
        title={"text": title, "y": 1, "yanchor": "top", "pad": {"t": 20}},
        height=max(420, above + 90 + len(labels) * (14 + 6 * len(drawn))),
        margin_t=above,
        showlegend=True,
        legend={"orientation": "h", "y": 1, "yanchor": "bottom"},
    )
    return figure


def _labels(
    named: Mapping[str, Evaluated], factors: Sequence[tuple[str, ...]]
) -> tuple[list[str], dict[Any, int], dict[str, dict[Any, Any]]]:
    """Labels, with headings where there are several factors; which of them a value has; every evaluation's lines."""
    labels: list[str] = []
    at: dict[Any, int] = {}
    lines: dict[str, dict[Any, Any]] = {name: {} for name in named}
    for names in factors:
        if len(factors) > 1:
            labels.append(f"<b>{' and '.join(names).replace('_', ' ')}</b>")
        for name, evaluation in named.items():
            for line in evaluation.by(*names).to_dict("records"):
                values = [_value(line[one]) for one in names]
                key = (names, *values)
                if key not in at:
                    at[key] = len(labels)
                    labels.append(", ".join(values) or "all answers")
                lines[name][key] = line
    return labels, at, lines


def _value(value: Any) -> str:
    return "none" if value is None or value != value else f"{value:g}" if isinstance(value, float) else str(value)
