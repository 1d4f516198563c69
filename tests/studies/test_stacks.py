from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headlab as hl
from headlab.pruning.curves import pruning_curve
from headlab.studies.stacks import only, stack_curves
from tests.helpers import zoo
from tests.studies.test_correlation import numbers


def test_only_keeps_the_order_in_the_stack_and_puts_the_others_last() -> None:
    scores = hl.importance(zoo.build("t5"), [zoo.batch_for("t5")])
    for stack in ("enc", "dec", "cross"):
        order = [members[0] for members, _ in only(scores, stack).units()]
        n = sum(head.stack == stack for head in order)
        assert order[:n] == [members[0] for members, _ in scores.units() if members[0].stack == stack]
        assert all(head.stack != stack for head in order[n:])


@settings(deadline=None, max_examples=40)
@given(st.lists(numbers, min_size=6, max_size=6))
def test_no_score_is_above_the_heads_kept(values: list[float]) -> None:
    heads = tuple(tuple(hl.Head(r, 0, i, stack, group=i // 2) for i in range(3)) for r, stack in enumerate(("enc", "dec")))
    found = only(hl.HeadScores((values[:3], values[3:]), heads), "dec")
    for unit, n in (("head", 3), ("group", 2)):
        units = found.units(unit)  # type: ignore[arg-type]
        assert [members[0].stack for members, _ in units] == ["dec"] * n + ["enc"] * n
        assert units[n - 1][1] < units[n][1]


def test_only_of_something_else_is_refused() -> None:
    with pytest.raises(hl.HeadlabError, match="stacks are cross, dec, enc"):
        only(hl.importance(zoo.build("t5"), method="random"), "encoder")
    with pytest.raises(hl.HeadlabError, match="no encoder-decoder"):
        only(hl.importance(zoo.build("gpt2"), method="random"), "enc")


def test_stack_curves_remove_heads_of_one_stack(tmp_path: Path) -> None:
    model, batch = zoo.build("t5"), zoo.batch_for("t5")
    scores = hl.importance(model, [batch])
    found = stack_curves(model, scores, [batch], (0.2, 0.5, 1.0), log=tmp_path / "curve.log.jsonl")
    assert list(found) == ["enc", "dec", "cross"]
    for stack, curve in found.items():
        n = 15 if stack == "enc" else 10
        order = [members[0] for members, _ in scores.units() if members[0].stack == stack]
        assert [len(names) for names in curve.removed] == [0, n // 5, round(n / 2), n]
        np.testing.assert_allclose(curve.fractions, [0, 0.2, round(n / 2) / n, 1])
        for names, value in zip(curve.removed, curve.values, strict=True):
            assert names == [str(head) for head in order[: len(names)]]
            with hl.masked(model, hl.HeadMask.without(hl.heads(model), names)), torch.inference_mode():
                assert value == pytest.approx(float(hl.own_loss(model, batch).mean()), rel=1e-5)
        assert curve.record["stack"] == stack
        assert curve.record["fractions"] == curve.fractions.tolist()
    logs = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(logs) == ["curve-cross.log.jsonl", "curve-dec.log.jsonl", "curve-enc.log.jsonl"]
    again = stack_curves(model, scores, [batch], (0.2, 0.5, 1.0), log=tmp_path / "curve.log.jsonl")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == logs
    np.testing.assert_array_equal(again["dec"].values, found["dec"].values)


def test_stack_curves_with_scores_made_anew_and_a_metric() -> None:
    model, batch = zoo.build("t5"), zoo.batch_for("t5")
    calls: list[Any] = []

    def scores(m: torch.nn.Module) -> hl.HeadScores:
        calls.append(m)
        return hl.importance(m, [batch])

    found = stack_curves(model, scores, iter([batch]), (0.5, 1.0), metric=lambda m, b: float(hl.own_loss(m, b[0]).mean()))
    assert all(name.startswith("cross") for name in found["cross"].removed[-1])
    assert len(calls) == 3 * 2  # at first, and before the step that follows a removal
    whole = pruning_curve(model, only(hl.importance(model, [batch]), "enc"), [batch], (15 / 35,))
    assert found["enc"].values[-1] == pytest.approx(whole.values[-1], rel=1e-5)  # all of a stack, in any order


def test_stack_curves_of_one_stack_are_refused() -> None:
    with pytest.raises(hl.HeadlabError, match="use pruning_curve"):
        stack_curves(zoo.build("gpt2"), hl.importance(zoo.build("gpt2"), method="random"), [zoo.batch_for("gpt2")])
    with pytest.raises(hl.HeadlabError, match="between 0 and 1"):
        stack_curves(zoo.build("t5"), hl.importance(zoo.build("t5"), method="random"), [zoo.batch_for("t5")], (1.5,))
