from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import headlab as hl
from headlab import plots
from synthetic_tasks import Evaluation


def evaluation(seed: int) -> Evaluation:
    """Five tasks of three relations, four contexts each, with chance between 1/2 and 1/4; some contexts without factors."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(20):
        task = number // 4
        factors = {"relation": ("city", "odd", "use")[task % 3], "order": ("plain", "swapped")[task % 2]}
        for place in range(3):
            right = {name: bool(rng.random() < 0.5) for name in ("all", "first", "choice")}
            rows.append(
                {"context": number, "task": f"t{task}", "difficulty": task % 2 if task < 4 else None}
                | {"factors": factors if task < 4 else {}, "place": place, "answer": "x", "tokens": 1}
                | right
                | {"chance": 1 / (2 + task % 3), "logprob": -1.5}
            )
    return Evaluation(tuple(rows))


def check_points(trace: go.Scatter, lines: pd.DataFrame, measure: str) -> None:
    """A trace shows these accuracies and intervals, in per cent."""
    np.testing.assert_allclose(trace.x, 100 * lines[measure])
    np.testing.assert_allclose(np.add(trace.x, trace.error_x.array), 100 * lines[f"{measure}_high"])
    np.testing.assert_allclose(np.subtract(trace.x, trace.error_x.arrayminus), 100 * lines[f"{measure}_low"])


def test_tasks_by_a_factor() -> None:
    found = evaluation(0)
    figure = plots.tasks(found, "order")
    [trace] = figure.data
    lines = found.by("order")
    check_points(trace, lines, "all")
    np.testing.assert_allclose(trace.y, range(3))
    axis = figure.layout.yaxis
    assert list(axis.tickvals) == [0, 1, 2]
    assert list(axis.ticktext) == ["plain", "swapped", "none"]
    assert axis.range[0] > axis.range[1]  # from the top down
    assert axis.title.text == "order"
    assert "24 answers in 8 contexts" in trace.text[0]
    low, high = 100 * lines["all_low"][1], 100 * lines["all_high"][1]
    assert trace.text[1].startswith("<b>swapped</b> whole answer<br>")
    assert f"(95 %: {low:.1f} to {high:.1f})" in trace.text[1]


def test_tasks_of_several_models_by_several_measures() -> None:
    found = {"whole": evaluation(0), "pruned": evaluation(1)}
    figure = plots.tasks(found, "task", ["all", "choice"])
    names = [trace.name for trace in figure.data]
    assert names == [
        "whole, whole answer", "whole, among the choices", "chance among the choices",
        "pruned, whole answer", "pruned, among the choices", "chance among the choices",
    ]  # fmt: skip
    points = [figure.data[i] for i in (0, 1, 3, 4)]
    for trace, (name, measure) in zip(points, [(n, m) for n in found for m in ("all", "choice")], strict=True):
        check_points(trace, found[name].by("task"), measure)
        assert trace.marker.symbol == {"all": "circle", "choice": "square"}[measure]
    assert points[0].marker.color == points[1].marker.color != points[2].marker.color
    for choice, chance in ((1, 2), (4, 5)):
        assert figure.data[chance].y == figure.data[choice].y
        np.testing.assert_allclose(figure.data[chance].x, [50, 100 / 3, 25, 50, 100 / 3])
    assert [trace.showlegend for trace in figure.data] == [None, None, True, None, None, False]
    heights = np.array([trace.y for trace in points])  # [series, task]: beside each other, within half a row of their task
    assert (np.diff(heights, axis=0) > 0.1).all()
    np.testing.assert_allclose(heights.mean(0), range(5), atol=1e-9)
    assert np.abs(heights - np.arange(5)).max() < 0.5


def test_tasks_by_one_factor_after_the_other() -> None:
    found = evaluation(0)
    figure = plots.tasks(found, ["relation", "difficulty", ("relation", "order")], "choice")
    labels = list(figure.layout.yaxis.ticktext)
    assert labels == [
        "<b>relation</b>", "city", "odd", "use", "none", "<b>difficulty</b>", "0", "1", "none", "<b>relation and order</b>",
        "city, plain", "odd, swapped", "use, plain", "city, swapped", "none, none",
    ]  # fmt: skip
    check_points(
        figure.data[0], pd.concat([found.by("relation"), found.by("difficulty"), found.by("relation", "order")]), "choice"
    )
    assert [labels[round(y)] for y in figure.data[0].y] == [label for label in labels if "<b>" not in label]


def test_a_value_that_one_evaluation_lacks_leaves_a_gap() -> None:
    few = Evaluation(tuple(row for row in evaluation(1).lines if row["task"] in ("t1", "t3")))
    figure = plots.tasks({"few": few, "all": evaluation(0)}, "task")
    labels = list(figure.layout.yaxis.ticktext)
    assert labels == ["t1", "t3", "t0", "t2", "t4"]
    assert [labels[round(y)] for y in figure.data[0].y] == ["t1", "t3"]
    assert [labels[round(y)] for y in figure.data[1].y] == ["t0", "t1", "t2", "t3", "t4"]
    check_points(figure.data[1], evaluation(0).by("task"), "all")


def test_many_tasks_make_a_taller_figure() -> None:
    rows = [row | {"task": f"t{i}"} for i in range(74) for row in evaluation(0).lines[:3]]
    assert plots.tasks(Evaluation(tuple(rows)), "task").layout.height > 74 * 16


def test_tasks_of_nothing() -> None:
    for nothing in ({"evaluation": {}}, {"measure": []}, {"by": []}):
        with pytest.raises(hl.HeadlabError, match="nothing to draw"):
            plots.tasks(**({"evaluation": evaluation(0)} | nothing))
    with pytest.raises(hl.HeadlabError, match="one or more of all, first, choice, not 'any'"):
        plots.tasks(evaluation(0), measure=["all", "any"])
