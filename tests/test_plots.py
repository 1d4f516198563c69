from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
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
