from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from headlab.errors import HeadlabError
from headlab.results import Result
from headlab.scores import HeadMask, HeadRows, HeadScores
from headlab.tables import Head, by_row

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)
ROWS = st.lists(st.lists(NUMBERS, min_size=0, max_size=5), min_size=1, max_size=5).filter(lambda rows: any(rows))
PAIR_OF_SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
RECORD = {"method": "taylor", "model": {"class": "Llama", "name": None, "fingerprint": "0123456789ab"}}


def grouped(rows: list[list[float]], per_group: int, **more: object) -> HeadScores:
    """Scores with labels in which `per_group` neighbours share a key-value head."""
    heads = tuple(
        tuple(Head(r, r, i, group=i // per_group, d_head=7) for i in range(len(row))) for r, row in enumerate(rows)
    )
    return HeadScores(tuple(np.array(row) for row in rows), heads, **more)


def kept(mask: HeadMask) -> set[tuple[int, int]]:
    return {(r, i) for r, row in enumerate(mask.rows) for i, value in enumerate(row) if value == 1.0}


def best(rows: list[list[float]], n: int) -> set[tuple[int, int]]:
    """By selection, one at a time: the best that is left; of several equal ones the last."""
    left = [(value, r, i) for r, row in enumerate(rows) for i, value in enumerate(row)]
    chosen = set()
    for _ in range(n):
        top = max(left, key=lambda item: item)
        left.remove(top)
        chosen.add(top[1:])
    return chosen


def test_a_head_says_its_name() -> None:
    assert str(Head(row=4, layer=1, index=3)) == "L1H3"
    assert str(Head(row=4, layer=1, index=3, stack="cross")) == "cross.L1H3"


def test_by_row_sorts_heads_and_leaves_empty_rows() -> None:
    a, b, c = Head(0, 0, 1), Head(0, 0, 0), Head(2, 2, 0)
    assert by_row([c, a, b]) == ((b, a), (), (c,))
    assert by_row([b], n_rows=3) == ((b,), (), ())
    assert by_row([]) == ()


def test_rows_become_float64_arrays_whatever_they_were() -> None:
    scores = HeadScores(([1, 2], np.array([3], dtype=np.float32), []), columns={"standard error": ([1, 1], [2], [])})
    assert [row.dtype for row in scores.values] == [np.float64] * 3
    assert [row.dtype for row in scores.columns["standard error"]] == [np.float64] * 3
    assert scores.flat.tolist() == [1, 2, 3]
    assert len(scores) == 3
    assert [[str(head) for head in row] for row in scores.labels] == [["L0H0", "L0H1"], ["L1H0"], []]
    assert HeadScores(()).flat.tolist() == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((np.zeros((2, 3)),), r"one 1-D row of numbers per layer.*\(2, 3\)"),
        ((1.0, 2.0), r"one 1-D row"),
        (([1.0, math.nan],), "NaN"),
        (([math.inf],), "infinity"),
    ],
)
@pytest.mark.parametrize("kind", [HeadScores, HeadMask])
def test_rows_that_cannot_be(kind: type[HeadRows], rows: tuple, message: str) -> None:
    with pytest.raises(HeadlabError, match=message):
        kind(rows)


def test_labels_have_to_fit_the_numbers() -> None:
    with pytest.raises(HeadlabError, match=r"\[1, 1\] heads in the rows, but \[2, 1\] numbers"):
        HeadScores(([1.0, 2.0], [3.0]), heads=((Head(0, 0, 0),), (Head(1, 1, 0),)))


def test_a_mask_holds_nothing_between_kept_and_removed() -> None:
    with pytest.raises(HeadlabError, match=r"0 \(removed\) and 1 \(kept\)"):
        HeadMask(([1.0, 0.5],))


def test_a_mask_lists_what_it_keeps_and_removes() -> None:
    mask = HeadMask(([1, 1, 0], [1, 0, 1]))
    assert [str(head) for head in mask.kept] == ["L0H0", "L0H1", "L1H0", "L1H2"]
    assert [str(head) for head in mask.removed] == ["L0H2", "L1H1"]
    assert repr(mask) == "HeadMask(4 of 6 heads kept, rows 2 x 3)"
    assert repr(HeadMask(([1, 1], [0]))) == "HeadMask(2 of 3 heads kept, rows [2, 1])"


def test_without_takes_heads_and_names() -> None:
    heads = [Head(r, r % 2, i, stack) for r, stack in enumerate(["enc", "enc", "dec"]) for i in range(2)]
    mask = HeadMask.without(heads, [heads[0], "dec.L0H1"])
    assert [row.tolist() for row in mask.rows] == [[0, 1], [1, 1], [1, 0]]
    assert mask.removed == [heads[0], heads[5]]
    with pytest.raises(HeadlabError, match=r"no heads named L9H9, dec\.L7H0"):
        HeadMask.without(heads, ["dec.L7H0", "enc.L0H0", "L9H9"])


def test_a_group_is_worth_the_sum_of_its_heads() -> None:
    scores = grouped([[1, 2, 8, -1], [4, 0, 3, 3]], per_group=2)
    units = scores.units("group")
    assert [[str(head) for head in members] for members, _ in units] == [
        ["L0H0", "L0H1"], ["L1H0", "L1H1"], ["L1H2", "L1H3"], ["L0H2", "L0H3"],
    ]  # fmt: skip
    assert [value for _, value in units] == [3, 4, 6, 7]
    assert [[str(head) for head in members] for members, _ in scores.units()][:3] == [["L0H3"], ["L1H1"], ["L0H0"]]
    with pytest.raises(HeadlabError, match="'head' or 'group', not 'layer'"):
        scores.units("layer")


def test_top_gives_the_best_first() -> None:
    scores = HeadScores(([0.5, 3.0], [2.0, -9.0]))
    assert [(str(head), value) for head, value in scores.top(3)] == [("L0H1", 3.0), ("L1H0", 2.0), ("L0H0", 0.5)]
    assert len(scores.top(99)) == 4
    assert "L0H1 3, L1H0 2, L0H0 0.5" in repr(scores)


def test_frames_have_a_line_per_head() -> None:
    scores = grouped([[1, 2], [3]], per_group=2, columns={"p": ([0.1, 0.2], [0.3])})
    frame = scores.to_frame()
    assert list(frame.columns) == ["head", "stack", "layer", "index", "group", "score", "p"]
    assert frame["head"].tolist() == ["L0H0", "L0H1", "L1H0"]
    assert frame["score"].tolist() == [1, 2, 3]
    assert frame["p"].tolist() == [0.1, 0.2, 0.3]
    assert HeadMask(([1, 0],)).to_frame()["kept"].tolist() == [True, False]


def test_rank_correlation_is_spearmans() -> None:
    a, b = grouped([[1, 5, 2], [9, 0]], 1), grouped([[3, 4, 4], [8, -1]], 1)
    assert a.rank_correlation(b) == pytest.approx(spearmanr([1, 5, 2, 9, 0], [3, 4, 4, 8, -1]).statistic)
    assert a.rank_correlation(HeadScores(tuple(-row for row in a.rows))) == pytest.approx(-1)
    with pytest.raises(HeadlabError, match="rows"):
        a.rank_correlation(HeadScores(([1.0, 2.0],)))


def test_keep_by_count_by_share_and_nothing() -> None:
    scores = HeadScores(([1.0, 6.0, 3.0], [2.0, 5.0, 4.0]))
    assert kept(scores.keep(2)) == {(0, 1), (1, 1)}
    assert kept(scores.keep(0.5)) == {(0, 1), (1, 1), (1, 2)}
    assert kept(scores.keep(0)) == set()
    assert kept(scores.keep(0.0)) == set()
    assert len(scores.keep(1.0).kept) == 6
    assert kept(scores.keep(np.int64(1))) == {(0, 1)}
    assert kept(scores.keep(1)) == {(0, 1)}


def test_keep_per_layer() -> None:
    scores = HeadScores(([10.0, 11.0, 12.0, 13.0], [1.0, 2.0]))
    assert kept(scores.keep(0.5, per_layer=True)) == {(0, 2), (0, 3), (1, 1)}
    assert kept(scores.keep(1, per_layer=True)) == {(0, 3), (1, 1)}
    assert kept(scores.keep(0.5)) == {(0, 1), (0, 2), (0, 3)}


def test_keep_leaves_some_units_in_every_layer() -> None:
    scores = HeadScores(([10.0, 11.0, 12.0], [1.0, 2.0], [3.0]))
    assert kept(scores.keep(2)) == {(0, 1), (0, 2)}
    assert kept(scores.keep(3, at_least=1)) == {(0, 2), (1, 1), (2, 0)}
    assert kept(scores.keep(0, at_least=2)) == {(0, 1), (0, 2), (1, 0), (1, 1), (2, 0)}


def test_keep_whole_groups() -> None:
    scores = grouped([[1, 2, 8, -1], [4, 0, 3, 3]], per_group=2)
    assert kept(scores.keep(0.5, unit="group")) == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert kept(scores.keep(1, unit="group", per_layer=True)) == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert kept(scores.keep(3, unit="group")) == {(0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)}


def test_a_mask_remembers_the_scores_and_the_model() -> None:
    mask = HeadScores(([1.0, 2.0],), record=RECORD).keep(1)
    assert mask.record["model"] == RECORD["model"]
    assert mask.record["scores"] == RECORD
    assert mask.record["keep"] == {"amount": 1, "unit": "head", "per_layer": False, "at_least": 0}


@pytest.mark.parametrize("amount", [-0.1, 1.1, -1, 7, math.nan, True, "half", None])
def test_amounts_that_cannot_be_kept(amount: object) -> None:
    with pytest.raises(HeadlabError, match=r"keep|share"):
        HeadScores(([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])).keep(amount)


@given(ROWS, st.floats(0, 1))
def test_keep_keeps_the_right_number_and_the_most_important(rows: list[list[float]], share: float) -> None:
    n = sum(map(len, rows))
    mask = HeadScores(tuple(rows)).keep(share)
    assert abs(len(mask.kept) - share * n) <= 0.5 + 1e-9
    assert kept(mask) == best(rows, len(mask.kept))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 16))
def test_ties_are_removed_in_the_order_of_the_heads(rows: list[list[float]], count: int) -> None:
    count = min(count, sum(map(len, rows)))
    assert kept(HeadScores(tuple(rows)).keep(count)) == best(rows, count)


@given(ROWS, PAIR_OF_SHARES, st.booleans(), st.sampled_from(["head", "group"]), st.integers(0, 2))
def test_who_keeps_more_keeps_what_was_kept(rows, shares, per_layer, unit, at_least) -> None:
    scores = grouped(rows, per_group=2)
    fewer, more = (scores.keep(share, unit=unit, per_layer=per_layer, at_least=at_least) for share in shares)
    assert kept(fewer) <= kept(more)


@given(ROWS, st.floats(0, 1))
def test_groups_stay_or_go_as_a_whole(rows: list[list[float]], share: float) -> None:
    mask = grouped(rows, per_group=2).keep(share, unit="group")
    for row in mask.rows:
        for first in range(0, len(row), 2):
            assert len(set(row[first : first + 2])) == 1


@given(ROWS, st.floats(0, 1), st.integers(0, 3))
def test_at_least_counts_in_every_layer(rows: list[list[float]], share: float, at_least: int) -> None:
    mask = HeadScores(tuple(rows)).keep(share, at_least=at_least)
    assert all(row.sum() >= min(at_least, len(row)) for row in mask.rows)


@given(rows=ROWS)
def test_scores_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]]) -> None:
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    scores = grouped(rows, 2, columns={"p": tuple(np.sqrt(np.abs(row)) / 3 for row in map(np.array, rows))}, record=RECORD)
    scores.save(path)
    for back in (HeadScores.load(path), Result.load(path)):
        assert isinstance(back, HeadScores)
        assert [row.tolist() for row in back.rows] == [row.tolist() for row in scores.rows]
        assert [row.tolist() for row in back.columns["p"]] == [row.tolist() for row in scores.columns["p"]]
        assert back.heads == scores.heads
        assert back.record == RECORD


def test_a_mask_comes_back_without_labels_too(tmp_path) -> None:
    HeadMask(([1, 0], [])).save(tmp_path / "mask.json")
    back = HeadMask.load(tmp_path / "mask.json")
    assert [row.tolist() for row in back.rows] == [[1, 0], []]
    assert back.heads is None
    with pytest.raises(HeadlabError, match="holds a mask, but a scores was expected"):
        HeadScores.load(tmp_path / "mask.json")


def test_check_names_both_shapes_and_both_models() -> None:
    model_heads = grouped([[1, 2], [3, 4]], 1).heads
    scores = HeadScores(([1.0, 2.0], [3.0, 4.0]), record=RECORD)
    scores.check(model_heads)
    scores.check(model_heads, "0123456789ab")
    HeadScores(scores.rows).check(model_heads, "ffffffffffff")
    with pytest.raises(
        HeadlabError, match=r"Llama, fingerprint 0123456789ab; this one is ffffffffffff.*HeadScores\(x.rows\)"
    ):
        scores.check(model_heads, "ffffffffffff")
    with pytest.raises(HeadlabError, match="HeadMask has rows of 2 x 3 heads, but the model has 2 x 2"):
        HeadMask(([1, 1, 1], [1, 1, 1])).check(model_heads)
    with pytest.raises(HeadlabError, match=r"rows of \[2, 1\] heads, but the model has 2 x 2"):
        HeadMask(([1, 1], [1])).check(model_heads)


def test_equal_scores_have_no_rank_correlation() -> None:
    varied, equal = HeadScores([[1.0, 2.0], [3.0]]), HeadScores([[1.0, 1.0], [1.0]])
    assert math.isnan(varied.rank_correlation(equal))
    assert math.isnan(equal.rank_correlation(varied))
    assert varied.rank_correlation(varied) == 1
