from __future__ import annotations

import re
from html import unescape

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import headlab as hl
from headlab.attention.prompts import Pattern, attention_patterns
from headlab.plots.prompts import pattern
from headlab.tables import Head
from tests.helpers import zoo

TOKENS = (" cat", "<b>x</b>", "\n", " ", "$a$", " cat", "a" * 40)


def made(n: int, tokens: tuple[str, ...] = TOKENS) -> Pattern:
    """Random patterns of n heads, six a layer."""
    generator = torch.Generator().manual_seed(n)
    heads = tuple(Head(i // 6, i // 6, i % 6) for i in range(n))
    values = {head: torch.rand(len(tokens), len(tokens), generator=generator).tril().half() for head in heads}
    return Pattern(heads, values, {}, {"": tokens})


def test_a_heatmap_per_head() -> None:
    found = made(18)
    figure = pattern(found, ["L0H3", "L2H5"])
    assert [title.text for title in figure.layout.annotations] == ["L0H3", "L2H5"]
    for name, heat in zip(["L0H3", "L2H5"], figure.data, strict=True):
        np.testing.assert_allclose(heat.z, found.of(name), atol=1e-4)
        assert f"<b>{name}</b><br>query %{{y}}<br>key %{{x}}<br>%{{z:.3f}}" in heat.hovertemplate
        assert heat.x == heat.y
        assert len(set(heat.x)) == 7  # equal tokens stay apart
    assert figure.layout.yaxis.autorange == figure.layout.yaxis2.autorange == "reversed"
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax) == (0, pytest.approx(max(float(found.of(name).max()) for name in ("L0H3", "L2H5"))))
    assert scale.colorbar.title.text == "probability"
    assert figure.layout.title.text == "Attention patterns"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("key", "query")


def test_tokens_are_shown_as_text() -> None:
    labels = pattern(made(1)).data[0].y
    assert labels[1] == "&lt;b&gt;x&lt;/b&gt; (1)"
    assert labels[4] == "&#36;a&#36; (4)"  # no formula
    assert [unescape(label) for label in labels] == [
        "cat (0)", "<b>x</b> (1)", "\\n (2)", "' ' (3)", "$a$ (4)", "cat (5)", f"{'a' * 15}… (6)",
    ]  # fmt: skip
    assert not re.search(r"[<>$]", "".join(labels))


def test_the_first_heads_unless_others_are_asked_for() -> None:
    found = made(30)
    figure = pattern(found)
    assert len(figure.data) == 12
    assert figure.layout.title.text == "Attention patterns (the first 12 of 30 heads)"
    assert len(pattern(found, found.heads).data) == 30
    assert pattern(found, "L4H1").layout.annotations[0].text == "L4H1"
    with pytest.raises(hl.HeadlabError, match="no pattern of L9H0"):
        pattern(found, ["L9H0"])
    with pytest.raises(hl.HeadlabError, match="at least one head"):
        pattern(found, [])


def test_only_outer_axes_have_tokens_where_all_are_alike() -> None:
    figure = pattern(made(5))  # three and two
    shown = [
        [getattr(figure.layout, f"{axis}{i or ''}").showticklabels for i in ("", 2, 3, 4, 5)] for axis in ("xaxis", "yaxis")
    ]
    assert shown == [[False, False, True, True, True], [True, False, False, True, False]]


@pytest.mark.parametrize(("n", "length"), [(1, 1), (1, 90), (2, 7), (4, 1), (7, 90), (20, 7)])
def test_figures_of_any_size(n: int, length: int) -> None:
    figure = pattern(made(n, tuple(f"token{i}" for i in range(length))), made(n).heads)
    assert len(figure.data) == n
    assert figure.layout.width <= 2600
    assert figure.layout.height / figure.layout.width < 5


def test_composed_patterns() -> None:
    model = zoo.build("dcformer-mha")
    found = attention_patterns(model, {key: value[:1] for key, value in zoo.batch_for("dcformer-mha").items()})
    composed, raw = pattern(found), pattern(found, raw=True)
    assert composed.layout.title.text.startswith("Attention patterns after the post maps")
    assert raw.layout.title.text.startswith("Attention patterns before the post maps")
    scale = composed.layout.coloraxis
    assert scale.cmin == -scale.cmax < 0
    assert (scale.cmid, scale.colorbar.title.text) == (0, "weight")
    assert raw.layout.coloraxis.cmin == 0
    np.testing.assert_allclose(composed.data[3].z, found.of("L0H3"), atol=1e-4)
    np.testing.assert_allclose(raw.data[3].z, found.of("L0H3", raw=True), atol=1e-4)
    with pytest.raises(hl.HeadlabError, match="not composed"):
        pattern(made(2), raw=True)


def test_an_encoder_decoder() -> None:
    batch = {key: value[:1] for key, value in zoo.batch_for("t5").items()}
    found = attention_patterns(zoo.build("t5"), batch)
    figure = pattern(found, ["enc.L0H0", "dec.L1H3", "cross.L1H3"])
    assert [np.shape(heat.z) for heat in figure.data] == [(7, 7), (5, 5), (5, 7)]
    assert figure.layout.xaxis2.showticklabels
    assert figure.layout.yaxis2.showticklabels


def test_holes_are_grey_and_named() -> None:
    found = made(3)
    broken = found.values[found.heads[1]]
    broken[4, 2] = torch.nan
    broken[5, 2] = torch.inf
    figure: go.Figure = pattern(found)
    assert figure.layout.title.text == "Attention patterns (2 pairs without a number are grey)"
    assert np.isnan(figure.data[1].z).sum() == 2
    assert np.isfinite(figure.layout.coloraxis.cmax)
