from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import headlab as hl
from headlab import plots
from headlab.dcmha.compose import Side
from headlab.dcmha.factors import StageMaps
from headlab.dcmha.maps import CompositionMaps, composition_maps
from tests.helpers import zoo


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
    layer, same = maps.by_layer[1], torch.ones(2, 2) / 2
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


def test_a_grid_of_maps_at_pairs_of_tokens(maps: CompositionMaps) -> None:
    figure = plots.map_grid(maps, 1, "pre", queries=[2, 4], keys=[0, 3, 4])
    drawn = [(2, 0), (4, 0), (4, 3), (4, 4)]  # the model is causal
    assert len(figure.data) == len(drawn)
    for heat, (query, key) in zip(figure.data, drawn, strict=True):
        np.testing.assert_allclose(heat.z, maps.dense(1, "pre", query, key).numpy() - np.eye(6), atol=1e-6)
    titles = [note.text for note in figure.layout.annotations]
    assert titles[0] == "query 2, key 0"
    assert titles[-1] == "query 4, key 4"
    assert len(plots.map_grid(maps, 2).data) == 10  # four places, evenly over seven tokens: 0, 2, 4, 6
    with pytest.raises(hl.HeadlabError, match="layers are 0, 1, 2"):
        plots.map_grid(maps, 9)
    with pytest.raises(hl.HeadlabError, match="at least one query and one key"):
        plots.map_grid(maps, 1, queries=[])
    with pytest.raises(hl.HeadlabError, match="there is no query 77"):
        plots.map_grid(maps, 1, queries=[77], keys=[0])


def test_what_every_branch_adds(maps: CompositionMaps) -> None:
    figure = plots.map_branches(maps, 0, "post")
    names = ["base", "query, low rank", "query gate", "key, low rank", "key gate"]
    assert [note.text for note in figure.layout.annotations] == names
    for heat, branch in zip(figure.data, ("base", "query", "query_gate", "key", "key_gate"), strict=True):
        np.testing.assert_allclose(heat.z, maps.mean(0, "post", branch).numpy())
    sums = sum(np.array(heat.z) for heat in figure.data) + maps.mean(0, "post", "identity").numpy()
    np.testing.assert_allclose(sums, maps.mean(0, "post").numpy(), atol=1e-5)
    with pytest.raises(hl.HeadlabError, match="a stage is"):
        plots.map_branches(maps, 0, "middle")


def test_without_plotly_a_figure_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("plotly", "headlab.plots"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(hl.HeadlabError, match="figures are drawn by plotly, which is not installed: pip install plotly"):
        importlib.import_module("headlab.plots")
