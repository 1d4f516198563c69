from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import headlab as hl
from headlab import plots
from synthetic_tasks.probes.models import KINDS


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
    assert list(names) == ["chance", "MHA, decay 0.1", "MHA, decay 0.5", "DCMHA (all branches)"]
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
