"""Correlation of scores on two data sets, and one stack of an encoder-decoder at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import headlab as hl
from headlab.studies.correlation import Correlation, correlate
from tests.helpers import zoo

EVERY = ["gpt2", *zoo.MHA_GQA_MQA, "dcformer-mha", "bert-classifier", "t5"]
numbers = st.floats(-1e6, 1e6, allow_subnormal=False)


def slow_pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = (math.fsum(v) / len(v) for v in (x, y))
    both = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return both / math.sqrt(math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y))


def slow_ranks(x: list[float]) -> list[float]:
    """Ties share their mean rank."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=17))
def test_coefficients_are_those_of_the_formulas(pairs: list[tuple[int, int]]) -> None:
    x, y = ([float(pair[i]) for pair in pairs] for i in range(2))
    found = correlate(hl.HeadScores([x]), hl.HeadScores([y]))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert (found.r, found.rho) == (None, None)
        return
    assert found.r == pytest.approx(slow_pearson(x, y), abs=1e-9)
    assert found.rho == pytest.approx(slow_pearson(slow_ranks(x), slow_ranks(y)), abs=1e-9)


def test_p_is_the_share_of_shuffles_that_correlate_as_well() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = 0.3 * x + rng.normal(size=40)
    line = correlate(hl.HeadScores([x]), hl.HeadScores([y])).lines[0]
    draws = np.array([np.corrcoef(x, rng.permutation(y))[0, 1] for _ in range(4_000)])
    assert line["p"] == pytest.approx((abs(draws) >= abs(line["r"])).mean(), abs=0.02)
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    draws = np.array([np.corrcoef(ranks[0], rng.permutation(ranks[1]))[0, 1] for _ in range(4_000)])
    assert line["rho_p"] == pytest.approx((abs(draws) >= abs(line["rho"])).mean(), abs=0.02)


@pytest.mark.parametrize("name", EVERY)
def test_ablation_on_two_data_sets(name: str) -> None:
    model = zoo.build(name)
    one, other = (hl.ablation(model, [zoo.batch_for(name, seed)]) for seed in (0, 1))
    found = correlate(one, other, ("news", "tales"))
    assert found.r == pytest.approx(np.corrcoef(one.flat, other.flat)[0, 1])
    assert found.lines[0]["heads"] == len(one)
    expected = ["all heads"]
    if name == "t5":
        expected += ["enc", "dec", "cross", *(f"enc.L{i}" for i in range(3)), "dec.L0", "dec.L1", "cross.L0", "cross.L1"]
    else:
        expected += ["L0", "L1", "L2"]
    assert [line["over"] for line in found.lines] == expected
    assert found.lines[-1]["r"] == pytest.approx(np.corrcoef(one.rows[-1], other.rows[-1])[0, 1])
    if name == "t5":
        dec = [
            np.concatenate([row for row, h in zip(s.rows, s.labels, strict=True) if h[0].stack == "dec"])
            for s in (one, other)
        ]
        assert found.lines[2]["r"] == pytest.approx(np.corrcoef(*dec)[0, 1])
    assert found.record["first"]["data"] != found.record["second"]["data"]
    assert found.record["model"]["fingerprint"] == one.record["model"]["fingerprint"]


def test_a_ragged_model_with_an_empty_layer() -> None:
    model = zoo.build("t5")
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["enc.L1H0", *(f"dec.L0H{i}" for i in range(5))]))
    scores = [hl.importance(small, [zoo.batch_for("t5", seed)]) for seed in (0, 1)]
    found = correlate(*scores)
    by_name = {line["over"]: line for line in found.lines}
    assert by_name["row 3"] == {"over": "row 3", "heads": 0, "r": None, "p": None, "rho": None, "rho_p": None}
    assert by_name["enc.L1"]["heads"] == 4
    assert by_name["dec"]["heads"] == 5


def test_points_and_the_heads_that_change_most() -> None:
    found = correlate(hl.HeadScores([[1.0, 2.0, 3.0], [4.0]]), hl.HeadScores([[1.0, 2.0, 9.0], [0.0]]))
    table = found.points().set_index("head")
    assert table.loc["L1H0", ["first", "second", "first_rank", "second_rank"]].tolist() == [4.0, 0.0, 1.0, 4.0]
    assert [(str(head), change) for head, change in found.top(1)] == [("L1H0", 3.0)]
    assert len(found.top(99)) == 4


def test_what_is_not_defined_is_none_in_json_and_nan_in_the_table(tmp_path: Path) -> None:
    found = correlate(hl.HeadScores([[1.0, 1.0, 1.0], [1.0, 1.0]]), hl.HeadScores([[1.0, 2.0, 3.0], [4.0, 7.0]]))
    assert found.r is None
    assert found.to_frame()[["r", "p", "rho", "rho_p"]].isna().all(axis=None)
    again = Correlation.load(found.save(tmp_path / "x.json"))
    assert again.lines == found.lines
    assert "undefined" in repr(again)


def test_saved_and_read_back(tmp_path: Path) -> None:
    model = zoo.build("t5")
    found = correlate(*(hl.importance(model, [zoo.batch_for("t5", seed)]) for seed in (0, 1)), names=("a", "b"))
    again = Correlation.load(found.save(tmp_path / "x.json"))
    assert (again.lines, again.names, again.heads) == (found.lines, found.names, found.heads)
    assert again.to_frame().equals(found.to_frame())
    assert again.points().equals(found.points())


def test_scores_of_different_kinds_are_refused() -> None:
    model, batch = zoo.build("dcformer-gqa"), zoo.batch_for("dcformer-gqa")
    output, scores = hl.importance(model, [batch]), hl.importance(model, [batch], site="scores")
    with pytest.raises(hl.HeadlabError, match="one has site output, the other site scores"):
        correlate(output, scores)
    assert correlate(scores, scores).rho == pytest.approx(1)
    gone, alone = (hl.ablation(zoo.build("gpt2"), [zoo.batch_for("gpt2")], keep_one=one) for one in (False, True))
    with pytest.raises(hl.HeadlabError, match="one has keep_one False, the other keep_one True"):
        correlate(gone, alone)
    gpt2, data = zoo.build("gpt2"), [zoo.batch_for("gpt2")]
    with pytest.raises(hl.HeadlabError, match="one has fill zero, the other fill mean"):
        correlate(gone, hl.ablation(gpt2, data, fill=hl.fill(gpt2, data)))
    with pytest.raises(hl.HeadlabError, match="one has method ablation, the other method taylor"):
        correlate(gone, hl.importance(gpt2, data))
    with pytest.raises(hl.HeadlabError, match="both data sets are called 'a'"):
        correlate(gone, gone, ("a", "a"))


def test_scores_of_different_models_or_heads_are_refused() -> None:
    gpt2, other = zoo.build("gpt2"), zoo.build("gpt2", seed=1)
    scores = hl.importance(gpt2, method="random")
    with pytest.raises(hl.HeadlabError, match="different models"):
        correlate(scores, hl.importance(other, method="random"))
    with pytest.raises(hl.HeadlabError, match=r"one has \[5, 5, 5\] in its layers, the other \[6, 6, 6\]"):
        correlate(scores, hl.importance(zoo.build("llama-gqa"), method="random"))
    masks = [
        hl.HeadMask.without(hl.heads(gpt2), [f"L{i}H{i}" for i in range(3)]),
        hl.HeadMask.without(hl.heads(gpt2), ["L0H1", "L1H1", "L2H2"]),
    ]
    bare = [hl.importance(hl.prune(gpt2, mask), method="random") for mask in masks]
    bare = [hl.HeadScores(s.rows, s.heads) for s in bare]
    with pytest.raises(hl.HeadlabError, match="L0H1 where the other has L0H0"):
        correlate(*bare)


# --- one stack
