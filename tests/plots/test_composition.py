from __future__ import annotations

import numpy as np
import pytest
import torch

import headlab as hl
from headlab.circuits.composition import CompositionScores, composition_scores, map_composition
from headlab.errors import HeadlabError
from headlab.plots.composition import composition_graph, composition_matrix
from tests.helpers import surgical, zoo


@pytest.fixture(scope="module")
def ragged() -> CompositionScores:
    model = zoo.build("llama-gqa")
    return composition_scores(hl.prune(model, surgical.random_mask(model, 4)), "K")


def test_matrix_names_pairs_and_marks_layers(ragged: CompositionScores) -> None:
    figure = composition_matrix(ragged)
    heat = figure.data[0]
    assert list(heat.y) == list(heat.x) == list(map(str, ragged.sources))
    np.testing.assert_array_equal(heat.z, ragged.values)
    np.testing.assert_allclose(heat.customdata, ragged.values / ragged.baseline)
    assert "%{y} -> %{x}" in heat.hovertemplate
    layers = [head.layer for head in ragged.sources]
    edges = [i - 0.5 for i in range(1, len(layers)) if layers[i] != layers[i - 1]]
    assert [shape.x0 for shape in figure.layout.shapes if shape.yref == "y domain"] == edges
    assert [shape.y0 for shape in figure.layout.shapes if shape.xref == "x domain"] == edges
    assert list(figure.layout.xaxis.ticktext) == [f"L{layer}" for layer in ragged.layer_indices]
    assert heat.zmin == 0
    assert heat.zmax == pytest.approx(ragged.top(1)[0].score)
    assert "no score" not in figure.layout.title.text


def test_matrix_says_where_scores_are_missing() -> None:
    model = zoo.build("llama-mha")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[10:20] = 0
    figure = composition_matrix(composition_scores(model, "Q"))
    assert "6 of 108 pairs have no score" in figure.layout.title.text


def test_graph_draws_the_strongest_pairs(ragged: CompositionScores) -> None:
    figure = composition_graph(ragged, above=1.0, k=5)
    pairs = ragged.top(5)
    *edges, nodes = figure.data
    told = [edge.text[0] for edge in edges][::-1]
    assert all(f"<b>{p.source} -> {p.reader}</b>" in text for p, text in zip(pairs, told, strict=True))
    for pair, edge in zip(pairs, edges[::-1], strict=True):
        assert (edge.x[0], edge.x[-1]) == (pair.source.layer, pair.reader.layer)
        assert (edge.y[0], edge.y[-1]) == pytest.approx((pair.source.index, pair.reader.index))  # type: ignore[union-attr]
    assert edges[-1].line.width > edges[0].line.width
    assert [(x, y) for x, y in zip(nodes.x, nodes.y, strict=True)] == [(h.layer, h.index) for h in ragged.sources]
    place = ragged.sources.index(pairs[0].source)
    assert f"feeds {pairs[0].reader} {pairs[0].score:.3g}" in nodes.text[place]
    assert "the 5 strongest pairs" in figure.layout.title.text


def test_graph_without_edges_says_so(ragged: CompositionScores) -> None:
    figure = composition_graph(ragged, above=100)
    assert len(figure.data) == 1
    assert "no pair scores more than 100 x random" in figure.layout.title.text
    with pytest.raises(HeadlabError, match="1 or more, not 0"):
        composition_graph(ragged, k=0)


def test_maps_are_readers_of_their_own() -> None:
    scores = map_composition(zoo.build("dcformer-mha"))
    heat = composition_matrix(scores).data[0]
    assert (len(heat.y), len(heat.x)) == (18, 24)
    assert heat.x[-1] == "L2 post_key_gate"
    figure = composition_graph(scores, above=0)
    heads, maps = figure.data[-2:]
    assert (len(heads.x), len(maps.x)) == (18, 24)
    assert min(maps.y) > max(heads.y)
    assert list(figure.layout.yaxis.ticktext)[-8:] == [end.place for end in scores.readers][:8]  # type: ignore[union-attr]
