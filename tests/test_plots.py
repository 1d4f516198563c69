from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
import torch

import headlab as hl
from headlab import plots
from headlab.dcmha.compose import Side
from headlab.dcmha.factors import StageMaps
from headlab.dcmha.maps import CompositionMaps, composition_maps
from headlab.speed import shapes
from synthetic_tasks import Evaluation

from . import zoo


@pytest.fixture(scope="module")
def scores() -> hl.HeadScores:
    return hl.importance(zoo.build("llama-gqa"), [zoo.batch_for("llama-gqa")])


@pytest.fixture(scope="module")
def exact() -> hl.AblationScores:
    return hl.ablation(zoo.build("llama-gqa"), [zoo.batch_for("llama-gqa")])


def test_heads_shows_every_number_where_its_head_is(scores: hl.HeadScores) -> None:
    figure = plots.heads(scores)
    np.testing.assert_allclose(figure.data[0].z, np.stack(scores.rows))
    assert "L1H2" in figure.data[0].text[1][2]
    assert f"{scores.rows[1][2]:.4g}" in figure.data[0].text[1][2]


def test_heads_of_a_pruned_model_stand_under_their_original_number() -> None:
    model = zoo.build("t5")
    mask = hl.HeadMask.without(hl.heads(model), ["enc.L1H0", "enc.L1H3", *(f"dec.L0H{i}" for i in range(5))])
    small = hl.prune(model, mask)
    figure = plots.heads(hl.importance(small, method="random"))
    drawn = ~np.isnan(np.array(figure.data[0].z, dtype=float))
    np.testing.assert_array_equal(drawn, np.stack(mask.rows).astype(bool))
    assert figure.data[0].y[0] == "enc 0"
    assert figure.data[0].y[-1] == "cross 1"


def test_signed_numbers_are_centred_on_zero(exact: hl.AblationScores, scores: hl.HeadScores) -> None:
    assert exact.flat.min() < 0
    assert plots.heads(exact).data[0].zmid == 0
    assert plots.heads(scores).data[0].zmid is None
    assert "significant" in plots.heads(exact).data[0].text[0][0]


def test_a_mask_can_be_drawn(scores: hl.HeadScores) -> None:
    assert set(np.ravel(plots.heads(scores.keep(0.5)).data[0].z)) == {0.0, 1.0}


def test_curves_have_lines_and_bands(scores: hl.HeadScores) -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    curve = hl.pruning_curve(model, scores, [batch], (0.5, 1.0))
    figure = plots.curves({"Taylor": curve})
    band, line = figure.data
    np.testing.assert_allclose(line.x, 100 * curve.fractions)
    np.testing.assert_allclose(line.y, curve.rises)
    assert line.text[1] == "9 of 18 heads removed"
    bounds = curve.intervals()
    assert bounds is not None
    np.testing.assert_allclose(band.y[:3], bounds[:, 1])
    np.testing.assert_allclose(band.y[3:], bounds[::-1, 0])


def test_a_metric_has_no_band(scores: hl.HeadScores) -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    curve = hl.pruning_curve(model, scores, [batch], (0.5,), metric=lambda m, b: 0.25)
    figure = plots.curves({"Taylor": curve})
    assert len(figure.data) == 1
    assert figure.layout.yaxis.title.text == "change of metric"


def test_scores_against_exact_ablation(scores: hl.HeadScores, exact: hl.AblationScores) -> None:
    figure = plots.against(scores, exact)
    np.testing.assert_allclose(figure.data[0].x, scores.flat)
    np.testing.assert_allclose(figure.data[0].y, exact.flat)
    assert f"{scores.rank_correlation(exact):.2f}" in figure.layout.title.text
    with pytest.raises(hl.HeadlabError, match="rows of"):
        plots.against(scores, hl.importance(zoo.build("gpt2"), method="random"))


def test_timing_bars() -> None:
    model = zoo.build("llama-gqa")
    small = hl.prune(model, hl.importance(model, method="random").keep(0.5))
    result = hl.timing({"dense": model, "pruned": small}, shapes(model, [(1, 3), (2, 5)]), repeats=2)
    figure = plots.timing(result)
    assert [bar.name for bar in figure.data] == ["dense", "pruned"]
    assert list(figure.data[0].x) == ["1 x 3", "2 x 5"]
    np.testing.assert_allclose(figure.data[1].y, [line["ms"] for line in result.lines if line["model"] == "pruned"])


@pytest.fixture(scope="module")
def maps() -> CompositionMaps:
    return composition_maps(zoo.build("dcformer-mha"), zoo.batch_for("dcformer-mha"))


def test_distances_of_maps_are_stacked_by_branch(maps: CompositionMaps) -> None:
    figure = plots.maps(maps)
    frame = maps.to_frame()
    for column, stage in enumerate(("pre", "post")):
        lines = frame[frame["stage"] == stage]
        *bars, total = [trace for trace in figure.data if trace.xaxis == ("x2" if column else "x")]
        assert [bar.name for bar in bars] == ["base", "query, low rank", "query gate", "key, low rank", "key gate"]
        assert all(list(bar.x) == [0, 1, 2] for bar in bars)
        np.testing.assert_allclose(bars[2].y, lines["distance"] * lines["query_gate"])
        np.testing.assert_allclose(sum(np.array(bar.y) for bar in bars), lines["distance"])
        np.testing.assert_allclose(total.y, lines["distance"])
        assert f"{100 * lines['key'].iloc[1]:.3g} %" in bars[3].text[1]
        assert f"{100 * lines['explained_by_query'].iloc[2]:.3g} % explained by the query" in total.text[2]
    assert figure.layout.barmode == "relative"
    assert len([trace for trace in figure.data if trace.showlegend]) == 6


def test_only_branches_that_are_there_are_drawn() -> None:
    model = zoo.build("dcformer-mqa")  # without the identity
    figure = plots.maps(composition_maps(model, zoo.batch_for("dcformer-mqa")))
    assert [trace.name for trace in figure.data if trace.showlegend] == [
        "identity left out", "query, low rank", "key gate", "distance",
    ]  # fmt: skip


def test_mean_maps_of_a_layer(maps: CompositionMaps) -> None:
    figure = plots.maps(maps, layer=2)
    for stage, heat in zip(("pre", "post"), figure.data, strict=True):
        difference = maps.mean(2, stage).numpy() - np.eye(6)
        np.testing.assert_allclose(heat.z, difference)
        assert list(heat.x) == list(heat.y) == list("012345")
        assert heat.text[3][5] == f"from L2H3 to L2H5: {difference[3, 5]:.2g}"
        assert heat.coloraxis == "coloraxis"
    scale = figure.layout.coloraxis
    largest = max(np.abs(heat.z).max() for heat in figure.data)
    assert (scale.cmin, scale.cmid, scale.cmax) == pytest.approx((-largest, 0, largest))
    assert figure.layout.yaxis.autorange == figure.layout.yaxis2.autorange == "reversed"
    assert (figure.layout.yaxis.scaleanchor, figure.layout.yaxis2.scaleanchor) == ("x", "x2")
    with pytest.raises(hl.HeadlabError, match="no composition maps of layer 3"):
        plots.maps(maps, 3)


def test_maps_of_a_pruned_layer_have_the_original_heads_on_their_axes(maps: CompositionMaps) -> None:
    layer, same = maps.stack[1], torch.ones(2, 2) / 2
    nothing = Side()
    pre = StageMaps((0, 4), (1, 4), 3, True, same, nothing, nothing)
    post = StageMaps((1, 4), (), 3, True, None, nothing, nothing)
    pruned = CompositionMaps((replace(layer, stages={"pre": pre, "post": post}),))
    figure = plots.maps(pruned, 1)
    assert list(figure.data[0].y) == ["0", "4"]
    assert list(figure.data[0].x) == ["1", "4"]
    np.testing.assert_allclose(figure.data[0].z, [[0.5, 0.5], [0.5, 0.5]])
    assert figure.data[0].text[0][1] == "from L1H0 to L1H4: 0.5"
    assert np.size(figure.data[1].z) == 0
    assert len(plots.maps(pruned).data) == 4  # the base and the distance, twice


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
    few = Evaluation(tuple(row for row in evaluation(1).rows if row["task"] in ("t1", "t3")))
    figure = plots.tasks({"few": few, "all": evaluation(0)}, "task")
    labels = list(figure.layout.yaxis.ticktext)
    assert labels == ["t1", "t3", "t0", "t2", "t4"]
    assert [labels[round(y)] for y in figure.data[0].y] == ["t1", "t3"]
    assert [labels[round(y)] for y in figure.data[1].y] == ["t0", "t1", "t2", "t3", "t4"]
    check_points(figure.data[1], evaluation(0).by("task"), "all")


def test_many_tasks_make_a_taller_figure() -> None:
    rows = [row | {"task": f"t{i}"} for i in range(74) for row in evaluation(0).rows[:3]]
    assert plots.tasks(Evaluation(tuple(rows)), "task").layout.height > 74 * 16


def test_tasks_of_nothing() -> None:
    for nothing in ({"evaluation": {}}, {"measure": []}, {"by": []}):
        with pytest.raises(hl.HeadlabError, match="nothing to draw"):
            plots.tasks(**({"evaluation": evaluation(0)} | nothing))
    with pytest.raises(hl.HeadlabError, match="one or more of all, first, choice, not 'any'"):
        plots.tasks(evaluation(0), measure=["all", "any"])


class Runs:
    """What trained probes look like to a figure."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame

    def to_frame(self) -> pd.DataFrame:
        return self.frame


def probe_runs(**changes: Any) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    fixed = {"d_head": 16, "features": 8, "values": 16, "records": 8, "held_out": 0.25, "shared_values": False, "mlp": False}
    fixed |= {"layers": 1, "weight_decay": 0.1, "steps": 3000, "mapped_seen": np.nan, "mapped_test": 0.5} | changes
    rows = [
        {"level": level, "kind": kind, "heads": heads, "first": first, "seed": seed, "parameters": 1000 * heads + len(kind)}
        | fixed
        | {"seen": 0.9 + 0.1 * rng.random(), "test": rng.random(), "chance": 1 / 16}
        for level, first in (("conflict", True), ("binding", False), ("conflict", False))
        for kind in ("dcmha", "mha")
        for heads in (16, 2, 8)
        for seed in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


PANELS = [("binding", False), ("conflict", False), ("conflict", True)]


def test_probes_against_heads() -> None:
    frame = probe_runs()
    figure = plots.probes(Runs(frame))
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["level binding", "level conflict, no MLP first", "level conflict, MLP on the query first"]
    for number, (level, first) in enumerate(PANELS):
        chance, *traces = [t for t in figure.data if t.xaxis == ("x", "x2", "x3")[number]]
        assert (chance.name, list(chance.x), list(chance.y)) == ("chance", [2, 8, 16], [6.25] * 3)
        assert [t.name for t in traces if t.name] == ["MHA", "DCMHA (all branches)"]
        for (dotted, line), kind in zip((traces[:2], traces[2:]), ("mha", "dcmha"), strict=True):
            own = frame[(frame["level"] == level) & (frame["first"] == first) & (frame["kind"] == kind)]
            expected = own.groupby("heads")[["seen", "test"]].agg(["mean", "min", "max"]) * 100
            assert list(dotted.x) == list(line.x) == [2, 8, 16]
            np.testing.assert_allclose(dotted.y, expected["seen", "mean"])
            np.testing.assert_allclose(line.y, expected["test", "mean"])
            np.testing.assert_allclose(np.add(line.y, line.error_y.array), expected["test", "max"])
            np.testing.assert_allclose(np.subtract(line.y, line.error_y.arrayminus), expected["test", "min"])
            assert dotted.line.dash == "dot"
            assert dotted.line.color == line.line.color == plots.PROBES[kind][1]
            assert line.showlegend == (number == 0)
            middle = own[own["heads"] == 8]
            assert f"{8000 + len(kind):,} parameters" in line.text[1]
            assert "unseen " + ", ".join(f"{100 * v:.1f}" for v in middle["test"]) + " %" in line.text[1]
            assert "trained " + ", ".join(f"{100 * v:.1f}" for v in middle["seen"]) + " %" in line.text[1]
        axis = figure.layout[f"xaxis{number + 1 if number else ''}"]
        assert (axis.type, list(axis.tickvals), axis.title.text) == ("log", [2, 8, 16], "heads")


def test_probes_that_differ_at_one_x_have_their_own_lines() -> None:
    frame = pd.concat([probe_runs(), probe_runs(weight_decay=0.5).query("kind == 'mha'")])
    names = dict.fromkeys(trace.name for trace in plots.probes(Runs(frame)).data if trace.name)
    assert list(names) == ["chance", "MHA, weight decay 0.1", "MHA, weight decay 0.5", "DCMHA (all branches)"]
    co_varying = frame.assign(steps=100 * frame["heads"])  # what goes with x does not split a line
    assert dict.fromkeys(trace.name for trace in plots.probes(Runs(co_varying)).data if trace.name) == names
    several = plots.probes(Runs(probe_runs()), x="d_head")
    assert {"MHA, 2 heads", "MHA, 8 heads", "MHA, 16 heads"} < {trace.name for trace in several.data}
    assert several.layout.xaxis.type is None
    assert several.layout.xaxis.title.text == "d head"


def test_probes_with_nothing_held_out_show_what_was_trained() -> None:
    frame = probe_runs().query("level == 'binding'").assign(test=np.nan)
    _, dotted, line, *_ = plots.probes(Runs(frame.assign(test=None))).data
    assert np.isnan(np.array(line.y, dtype=float)).all()
    assert np.isfinite(np.array(dotted.y, dtype=float)).all()
    assert [note.text for note in plots.probes(Runs(frame)).layout.annotations] == ["level binding"]
    dots, *_ = plots.probe_kinds(Runs(frame.assign(test=None, mapped_seen=None))).data
    assert np.isnan(np.array(dots.x, dtype=float)).all()
    assert "unseen" not in dots.text[0].replace("map, unseen", "")


def test_probes_bad_input() -> None:
    for x in ("kind", "mlp", "nonsense", "seed"):
        with pytest.raises(hl.HeadlabError, match=f"x is one of heads, d_head, .*steps, parameters, not '{x}'"):
            plots.probes(Runs(probe_runs()), x)
    for draw in (plots.probes, plots.probe_kinds):
        with pytest.raises(hl.HeadlabError, match="no runs to draw"):
            draw(Runs(probe_runs().iloc[:0]))


def test_probe_kinds_has_a_dot_per_run() -> None:
    frame = probe_runs().query("heads != 2")
    figure = plots.probe_kinds(Runs(frame))
    for number, (level, first) in enumerate(PANELS):
        unseen, trained, chance = [t for t in figure.data if t.yaxis == ("y", "y2", "y3")[number]]
        axis = figure.layout[f"yaxis{number + 1 if number else ''}"]
        own = frame[(frame["level"] == level) & (frame["first"] == first)]
        rows = own.groupby(["kind", "heads"])
        order = rows["test"].mean().sort_values(ascending=False).index
        names = {"mha": "MHA", "dcmha": "DCMHA (all branches)"}
        assert list(axis.ticktext) == [f"{names[k]}, {h} heads ({1000 * h + len(k):,} parameters)" for k, h in order]
        assert axis.range[0] > axis.range[1]
        for place, key in enumerate(order):
            runs = rows.get_group(key)
            here = [i for i, y in enumerate(unseen.y) if y == place]
            np.testing.assert_allclose([unseen.x[i] for i in here], 100 * runs["test"])
            np.testing.assert_allclose([trained.x[i] for i in here], 100 * runs["seen"])
            assert {unseen.marker.color[i] for i in here} == {plots.PROBES[key[0]][1]}
            assert "right link in the map, unseen 50.0 %" in unseen.text[here[0]]
            assert "in the map, trained" not in unseen.text[here[0]]  # it is not known
        assert unseen.y == trained.y == chance.y
        assert set(chance.x) == {6.25}
        assert trained.marker.symbol == "circle-open"


def test_kinds_are_told_apart() -> None:
    from synthetic_tasks.probes import KINDS

    assert set(KINDS) | {"matched"} == set(plots.PROBES)
    for column in range(3):
        assert len({row[column] for row in plots.PROBES.values()}) == len(plots.PROBES)
    figure = plots.probes(Runs(probe_runs().assign(kind="mine")))
    assert {trace.name for trace in figure.data if trace.name} == {"chance", "mine"}


def test_feature_maps() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(3, 5)), rng.random((3, 5))
    figure = plots.feature_map([("one", first, (2, 4)), ("two", torch.tensor(second), (0, 1)), ("three", second, None)])
    for heat, matrix in zip(figure.data, (first, second, second), strict=True):
        np.testing.assert_allclose(heat.z, matrix, rtol=1e-6)
        assert list(heat.y) == ["p0", "p1", "p2"]
        assert list(heat.x) == ["a0", "a1", "a2", "a3", "a4"]
    frames = [(s.xref, s.yref, s.x0, s.x1, s.y0, s.y1) for s in figure.layout.shapes]
    assert frames == [("x", "y", 3.5, 4.5, 1.5, 2.5), ("x2", "y2", 0.5, 1.5, -0.5, 0.5)]
    assert [note.text for note in figure.layout.annotations] == ["one", "two", "three"]
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax) == pytest.approx((-np.abs(first).max(), max(first.max(), -first.min(), second.max())))
    assert plots.feature_map([("two", second, None)]).layout.coloraxis.cmin == 0
    many = plots.feature_map([(str(i), second, (1, 1)) for i in range(6)])
    assert [(s.xref, s.yref) for s in many.layout.shapes][4:] == [("x5", "y5"), ("x6", "y6")]
    assert many.layout.yaxis5.scaleanchor == "x5"


def test_feature_maps_bad_input() -> None:
    for maps in ([("q", np.eye(3), (3, 0))], [("q", np.eye(3), (0, -1))], [("q", np.ones(3), None)]):
        with pytest.raises(hl.HeadlabError, match=r"q: expected a matrix \[looked up, reported\]"):
            plots.feature_map(maps)
    with pytest.raises(hl.HeadlabError, match="no maps to draw"):
        plots.feature_map([])


def test_drawing_needs_no_network_and_changes_no_setting(
    scores: hl.HeadScores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plotly.io.renderers.default, plotly.io.templates.default

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a figure asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    figure = plots.heads(scores)
    assert isinstance(figure, go.Figure)
    page = plots.save_html(figure, tmp_path / "heads.html").read_text(encoding="utf-8")
    assert "<script src=" not in page
    assert before == (plotly.io.renderers.default, plotly.io.templates.default)
