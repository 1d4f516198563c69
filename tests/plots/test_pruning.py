from __future__ import annotations

import numpy as np
import pytest

import headlab as hl
from headlab import plots
from headlab.pruning.timing import shapes
from tests.helpers import zoo


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


def test_heads_that_are_gone_are_told_in_the_title_and_layers_keep_their_number() -> None:
    model = zoo.build("llama-gqa")
    whole = hl.importance(model, method="random")
    assert plots.heads(whole).layout.title.text == "Heads by random"
    gone = [head for head in hl.heads(model) if head.layer == 1 or str(head) == "L2H0"]
    figure = plots.heads(hl.importance(hl.prune(model, hl.HeadMask.without(hl.heads(model), gone)), method="random"))
    assert list(figure.data[0].y) == ["0", "1", "2"]
    assert figure.layout.title.text == "Heads by random<br><sup>grey: no such head in the model (7)</sup>"


def test_only_the_models_own_loss_is_in_nats(exact: hl.AblationScores) -> None:
    assert plots.heads(exact).data[0].colorbar.title.text == "change of<br>loss (nats)"
    other = hl.AblationScores(exact.rows, exact.heads, exact.record | {"loss": "mine"}, exact.columns)
    assert plots.heads(other).data[0].colorbar.title.text == "change of loss"


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


def test_the_curves_of_stacks_are_shares_of_stacks() -> None:
    model = zoo.build("t5")
    random = hl.importance(model, method="random")
    whole = hl.pruning_curve(model, random, [zoo.batch_for("t5")], (0.5,))
    by_stack = hl.stack_curves(model, random, [zoo.batch_for("t5")], (0.5,))
    titles = [plots.curves(drawn).layout.xaxis.title.text for drawn in (by_stack, {"all": whole}, {"all": whole} | by_stack)]
    assert titles == [
        "heads of the stack removed (%)", "heads removed (%)", "heads removed (%), of the model or of the stack"
    ]  # fmt: skip


def test_names_are_text(scores: hl.HeadScores) -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    curve = hl.pruning_curve(model, scores, [batch], (0.5,))
    line = plots.curves({"<a href='x'>%{y}</a>": curve}).data[-1]
    assert line.name.startswith("&lt;a href='x'&gt;%&#123;y}&lt;/a&gt; (area")
    assert "<a" not in line.hovertemplate
    bar = plots.timing(hl.timing({"<b>": model}, [batch], repeats=1)).data[0]
    assert bar.name == "&lt;b&gt;"


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
    assert list(figure.data[0].marker.color) == [layer for layer in range(3) for _ in range(6)]
    with pytest.raises(hl.HeadlabError, match="rows of"):
        plots.against(scores, hl.importance(zoo.build("gpt2"), method="random"))


def test_stacks_have_their_colours() -> None:
    model, batch = zoo.build("t5"), zoo.batch_for("t5")
    taylor, exact = hl.importance(model, [batch]), hl.ablation(model, [batch])
    figure = plots.against(taylor, exact)
    assert [(trace.name, len(trace.x)) for trace in figure.data] == [("enc", 15), ("dec", 10), ("cross", 10)]
    assert len({trace.marker.color for trace in figure.data}) == 3
    for trace in figure.data:
        at = [str(head) for row in exact.labels for head in row].index(trace.text[1])
        assert (trace.x[1], trace.y[1]) == (taylor.flat[at], exact.flat[at])


def test_timing_bars() -> None:
    model = zoo.build("llama-gqa")
    small = hl.prune(model, hl.importance(model, method="random").keep(0.5))
    result = hl.timing({"dense": model, "pruned": small}, shapes(model, [(1, 3), (2, 5)]), repeats=2)
    figure = plots.timing(result)
    assert [bar.name for bar in figure.data] == ["dense", "pruned"]
    assert list(figure.data[0].x) == ["1 x 3", "2 x 5"]
    np.testing.assert_allclose(figure.data[1].y, [line["ms"] for line in result.lines if line["model"] == "pruned"])
