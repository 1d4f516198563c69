from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import headlab as hl
from headlab.attention.roles import Roles, roles
from headlab.attention.similarity import Similarity, similarity
from headlab.models.access import heads
from headlab.plots import attention as plots
from tests.helpers import zoo


@pytest.fixture(scope="module")
def ragged() -> Roles:
    model = zoo.build("gpt2")
    gone = ["L1H0", "L1H3", *(f"L2H{i}" for i in range(5))]
    found = roles(hl.prune(model, hl.HeadMask.without(heads(model), gone)), sequences=2, length=12)
    for name in ("previous", "duplicate", "first", "positional", "self", "induction"):
        for row in found.columns[name]:
            row[:] = 0
    found.columns["previous"][0][2] = 0.75
    found.columns["duplicate"][1][1] = 0.5  # L1H2
    found.columns["first"][1][1] = 0.9
    return found


@pytest.fixture(scope="module")
def alike() -> Similarity:
    return similarity(zoo.build("t5"), [zoo.batch_for("t5")], clusters=2)


def test_roles_stand_where_their_heads_are(ragged: Roles) -> None:
    figure = plots.roles(ragged)
    cells = figure.data[0]
    drawn = np.array(cells.z, dtype=float)
    np.testing.assert_array_equal(np.isnan(drawn), [[0] * 5, [1, 0, 0, 1, 0], [1] * 5])
    assert drawn[0, 2] == 3  # previous, the third of the roles
    assert drawn[1, 2] == 2  # duplicate comes before first
    assert (drawn[0, [0, 1, 3, 4]] == 0).all()
    assert "<b>L1H2</b> duplicate, first" in cells.text[1][2]
    assert "previous 0.75" in cells.text[0][2]
    assert " nats" in cells.text[0][0]
    assert "nan" not in "".join(cells.text.flatten())
    assert list(cells.y) == ["0", "1", "2"]


def test_the_legend_counts_heads_by_main_role(ragged: Roles) -> None:
    names = [trace.name for trace in plots.roles(ragged).data[1:]]
    assert names == ["duplicate (1)", "previous (1)", "none of these (6)"]


def test_colours_of_cells_are_those_of_the_legend(ragged: Roles) -> None:
    figure = plots.roles(ragged)
    cells, steps = figure.data[0], figure.data[0].colorscale
    for trace, value in ((figure.data[1], 2), (figure.data[2], 3), (figure.data[3], 0)):
        at = (value - cells.zmin) / (cells.zmax - cells.zmin)
        inside = [colour for (a, colour), (b, _) in pairwise(steps) if a <= at <= b and a != b]
        assert inside == [trace.marker.color]


def test_what_was_not_measured_is_said(ragged: Roles) -> None:
    said = plots.roles(ragged).layout.annotations[0].text
    assert said == "not measured on this data or model: next, delimiter, rare"


def test_heads_of_every_stack_are_on_the_map(alike: Similarity) -> None:
    figure = plots.similarity(alike)
    assert [note.text for note in figure.layout.annotations] == ["encoder", "decoder", "cross-attention"]
    assert [trace.name for trace in figure.data] == [f"cluster {n} ({alike.clusters.count(n)})" for n in range(6)]
    assert sum(len(trace.x) for trace in figure.data) == len(alike.heads)
    near, value = alike.nearest("enc.L0H0", 1)[0]
    assert f"<b>enc.L0H0</b>, cluster 0<br>nearest: {near}, {value:.3g} nats" in figure.data[0].text
    np.testing.assert_array_equal(figure.data[0].x[0], alike.points[0, 0])


def test_the_map_can_be_coloured_by_layer(alike: Similarity) -> None:
    figure = plots.similarity(alike, "layer")
    assert len(figure.data) == 3
    assert list(figure.data[0].marker.color) == [head.layer for head in alike.heads if head.stack == "enc"]
    assert [trace.marker.showscale for trace in figure.data] == [True, False, False]


def test_the_matrix_has_every_pair(alike: Similarity) -> None:
    figure = plots.similarity_matrix(alike)
    np.testing.assert_allclose(np.array(figure.data[0].z, dtype=float), alike.distances, atol=6e-5)
    assert list(figure.data[0].x) == list(figure.data[0].y) == [str(head) for head in alike.heads]
    assert "different stacks" in figure.layout.annotations[0].text
    assert not plots.similarity_matrix(similarity(zoo.build("gpt2"), [zoo.batch_for("gpt2")])).layout.annotations


def test_nothing_left_is_an_empty_figure() -> None:
    model = zoo.build("gpt2")
    bare = hl.prune(model, hl.HeadMask.without(heads(model), heads(model)))
    nothing = similarity(bare, [zoo.batch_for("gpt2")])
    assert not plots.similarity(nothing).data
    assert plots.similarity_matrix(nothing).data[0].z.size == 0
    assert len(plots.roles(roles(bare, sequences=2, length=12)).data) == 1
