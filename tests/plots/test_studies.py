from __future__ import annotations

import numpy as np
import pytest

import headlab as hl
from headlab.plots import studies
from headlab.pruning.curves import Curve
from headlab.studies.checkpoints import Profile, profile
from headlab.studies.correlation import correlate
from tests.helpers import zoo


def scores(name: str, seed: int) -> hl.HeadScores:
    return hl.importance(zoo.build(name), [zoo.batch_for(name, seed)])


def test_a_point_per_head_coloured_by_layer() -> None:
    one, other = scores("llama-gqa", 0), scores("llama-gqa", 1)
    result = correlate(one, other, ("news", "tales"))
    figure = studies.correlation(result)
    (points,) = figure.data
    np.testing.assert_array_equal(points.x, one.flat)
    np.testing.assert_array_equal(points.y, other.flat)
    assert list(points.text[:2]) == ["L0H0", "L0H1"]
    assert list(points.marker.color) == [layer for layer in range(3) for _ in range(6)]
    assert points.marker.colorbar.title.text == "layer"
    assert figure.layout.xaxis.title.text == "importance (Taylor), news"
    assert f"r = {result.r:.2f}" in figure.layout.title.subtitle.text
    assert f"rho = {result.rho:.2f}" in figure.layout.title.subtitle.text
    best = int(np.argmax(one.flat))
    assert points.customdata[best][0] == 1
    for told in ("news %{x", "tales %{y", "%{text}", "rank %{customdata[0]"):
        assert told in points.hovertemplate


def test_stacks_of_a_ragged_encoder_decoder_have_their_colours() -> None:
    model = zoo.build("t5")
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["enc.L1H0", *(f"dec.L0H{i}" for i in range(5))]))
    result = correlate(*(hl.ablation(small, [zoo.batch_for("t5", seed)]) for seed in (0, 1)))
    figure = studies.correlation(result)
    assert [(trace.name, len(trace.x)) for trace in figure.data] == [("enc", 14), ("dec", 5), ("cross", 10)]
    assert len({trace.marker.color for trace in figure.data}) == 3
    assert figure.layout.yaxis.title.text == "change of loss on removal, second data"


@pytest.mark.parametrize(("p", "told"), [(0.0004, "p < 0.001"), (0.0421, "p = 0.042"), (None, "p not defined")])
def test_p_is_told(p: float | None, told: str) -> None:
    assert studies._p(p) == told


def test_names_are_text() -> None:
    result = correlate(scores("gpt2", 0), scores("gpt2", 1), ("<b>news</b> %{x}", "$a$"))
    figure = studies.correlation(result)
    for told in (figure.layout.xaxis.title.text, figure.data[0].hovertemplate):
        assert "&lt;b&gt;news&lt;/b&gt; %&#123;x}" in told
    assert figure.layout.yaxis.title.text.endswith(", &#36;a&#36;")
    figure = studies.profile(made([[1.0, 0.0]], "<i>run</i> %{y} 1"))
    assert figure.data[0].name.startswith("&lt;i&gt;run&lt;/i&gt;")
    assert "<b>&lt;i&gt;run&lt;/i&gt; %&#123;y}" in figure.data[0].hovertemplate


def test_an_undefined_correlation_is_said() -> None:
    figure = studies.correlation(correlate(hl.HeadScores([[1.0, 2.0]]), hl.HeadScores([[1.0, 3.0]])))
    assert "not defined" in figure.layout.title.subtitle.text
    assert list(figure.data[0].x) == [1.0, 2.0]


def test_a_curve_per_checkpoint() -> None:
    models = [(f"step-{1000 * i}", zoo.build("llama-gqa", seed=i)) for i in range(3)]
    result = profile(models, [zoo.batch_for("llama-gqa")], fractions=(0.5, 1.0))
    figure = studies.profile(result)
    assert [trace.name.split(" (")[0] for trace in figure.data] == ["step 0", "step 1,000", "step 2,000"]
    for trace, values, curve in zip(figure.data, result.relative, result.curves, strict=True):
        np.testing.assert_allclose(trace.x, [0, 50, 100])
        np.testing.assert_allclose(trace.y, values)
        np.testing.assert_allclose(trace.customdata, curve.values)
    assert figure.data[0].text[1] == "9 of 18 heads removed"
    assert figure.layout.yaxis.title.text == "rise of the loss (nats)"
    assert len({trace.line.color for trace in figure.data}) == 3


def made(values: list[list[float]], name: str = "epoch") -> Profile:
    removed = [["L0H0"] * i for i in range(len(values[0]))]
    curves = [Curve(removed, np.array(row), np.zeros(0), len(row) - 1) for row in values]
    return Profile([f"{name} {i}" for i in range(len(values))], [], curves, {"metric": "bleu"})


def test_a_metric_is_drawn_as_per_cent_of_its_own_and_a_hole_is_said() -> None:
    figure = studies.profile(made([[0.0, 0.0, 0.0], [20.0, 15.0, 5.0]]))
    np.testing.assert_allclose(figure.data[1].y, [100, 75, 25])
    assert np.isnan(figure.data[0].y).all()
    assert "no curve for epoch 0" in figure.layout.title.subtitle.text
    assert figure.data[1].name == "epoch 1 (20)"
    assert "%" in figure.layout.yaxis.title.text
    assert len(studies.profile(made([[20.0, 15.0]])).data) == 1
