"""Pruning curves against a loop that masks by hand, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headlab as hl
from headlab.models.access import head_rows
from tests.helpers import zoo

FRACTIONS = [0.0, 0.21, 0.5, 0.77, 1.0]


def some_scores(model: nn.Module, seed: int = 0) -> hl.HeadScores:
    return hl.importance(model, method="random", seed=seed)


def batches_of(name: str) -> list[dict[str, Tensor]]:
    second = {key: value[:3] for key, value in zoo.batch_for(name, seed=1).items()}
    return [zoo.batch_for(name), second]


def losses_without(model: nn.Module, gone: set[str], batches: list[dict[str, Tensor]], fill: Any = None) -> np.ndarray:
    mask = hl.HeadMask([[str(head) not in gone for head in row] for row in head_rows(model)])
    with torch.no_grad(), hl.masked(model, mask, fill):
        return torch.cat([hl.own_loss(model, batch) for batch in batches]).double().numpy()


def least(scores: hl.HeadScores, n: int, group_size: int = 1) -> list[str]:
    """The names of the heads in the n units with the lowest sums, lowest first."""
    units = []
    for row, heads in zip(scores.values, scores.heads, strict=True):
        for start in range(0, len(row), group_size):
            names = [str(head) for head in heads[start : start + group_size]]
            units.append((float(sum(row[start : start + group_size])), names))
    units.sort()
    return [name for _, names in units[:n] for name in names]


@pytest.mark.parametrize("name", zoo.WITH_LOSS)
@pytest.mark.parametrize("with_fill", [False, True])
def test_every_step_against_a_mask_by_hand(name: str, with_fill: bool) -> None:
    model, batches = zoo.build(name), batches_of(name)
    scores, n = some_scores(model), len(hl.heads(model))
    fill = hl.fill(model, batches) if with_fill else None
    curve = hl.pruning_curve(model, scores, batches, FRACTIONS, fill=fill)
    assert curve.n_heads == n
    for step, fraction in enumerate(FRACTIONS):
        gone = least(scores, round(fraction * n))
        assert curve.removed[step] == gone
        assert curve.fractions[step] == len(gone) / n
        np.testing.assert_allclose(curve.losses[step], losses_without(model, set(gone), batches, fill), atol=1e-5)
    assert curve.losses.shape == (5, 7)
    np.testing.assert_allclose(curve.values, curve.losses.mean(1))
    np.testing.assert_allclose(curve.rises, curve.values - curve.values[0])
    assert len({round(value, 4) for value in curve.values}) == 5


@pytest.mark.parametrize(("name", "group_size"), [("llama-mha", 1), ("llama-gqa", 2), ("llama-mqa", 6)])
def test_whole_groups(name: str, group_size: int) -> None:
    model, batches = zoo.build(name), batches_of(name)
    scores = some_scores(model)
    n_groups = zoo.LAYERS * 6 // group_size
    curve = hl.pruning_curve(model, scores, batches, [0.3, 0.5, 1], unit="group")
    for step, fraction in enumerate([0, 0.3, 0.5, 1]):
        gone = least(scores, round(fraction * n_groups), group_size)
        assert sorted(curve.removed[step]) == sorted(gone)
        np.testing.assert_allclose(curve.losses[step], losses_without(model, set(gone), batches), atol=1e-5)


@pytest.mark.parametrize("name", [*zoo.MHA_GQA_MQA, "bert-mlm", "t5"])
@pytest.mark.parametrize("with_fill", [False, True])
def test_an_order_found_again_at_every_step(name: str, with_fill: bool) -> None:
    model, batches = zoo.build(name), batches_of(name)
    fill = hl.fill(model, batches) if with_fill else None
    curve = hl.pruning_curve(model, lambda m: hl.importance(m, batches, fill=fill), batches, [0.2, 0.4, 0.6], fill=fill)
    n = len(hl.heads(model))
    gone: list[str] = []
    for step, fraction in enumerate([0, 0.2, 0.4, 0.6]):
        mask = hl.HeadMask.without(hl.heads(model), gone)
        with hl.masked(model, mask, fill):
            scores = hl.importance(model, batches, fill=fill)
        named = {
            str(h): s for hs, row in zip(scores.heads, scores.values, strict=True) for h, s in zip(hs, row, strict=True)
        }
        left = sorted(set(named) - set(gone), key=lambda head: named[head])
        gone = gone + left[: round(fraction * n) - len(gone)]
        assert curve.removed[step] == gone
        np.testing.assert_allclose(curve.losses[step], losses_without(model, set(gone), batches, fill), atol=1e-5)
    assert curve.record["reestimated"]
    once = hl.pruning_curve(model, hl.importance(model, batches, fill=fill), batches, [0.2, 0.4, 0.6], fill=fill)
    assert once.removed[:2] == curve.removed[:2]
    assert once.removed[3] != curve.removed[3]
    assert not once.record["reestimated"]


def accuracy(model: nn.Module, batches: list[Any]) -> float:
    right = [(model(**b).logits[:, :-1].argmax(-1) == b["input_ids"][:, 1:]).float().mean() for b in batches]
    return torch.stack(right).mean().item()


def test_a_metric_of_the_whole_corpus() -> None:
    model, batches = zoo.build("llama-gqa"), batches_of("llama-gqa")
    scores = some_scores(model)
    seen = []

    def metric(m: nn.Module, given: list[Any]) -> float:
        seen.append(len(given))
        return float(m(**given[0]).logits.abs().mean())

    curve = hl.pruning_curve(model, scores, batches, [0.5, 1], metric=metric)
    assert seen == [2, 2, 2]
    for step, fraction in enumerate([0, 0.5, 1]):
        mask = hl.HeadMask.without(hl.heads(model), least(scores, round(fraction * 18)))
        with torch.no_grad(), hl.masked(model, mask):
            assert curve.values[step] == pytest.approx(model(**batches[0]).logits.abs().mean().item(), rel=1e-5)
    assert curve.intervals() is None
    assert list(curve.to_frame()) == ["fraction", "removed", "value", "change"]
    assert (curve.record["metric"].split(".")[-1], curve.record["loss"]) == ("metric", None)
    assert hl.pruning_curve(model, scores, batches, [1], metric=accuracy).values.shape == (2,)


def test_a_loss_of_ones_own() -> None:
    model, batches = zoo.build("llama-gqa"), batches_of("llama-gqa")
    curve = hl.pruning_curve(model, some_scores(model), batches, [0.5], loss=lambda m, b: 2 * hl.own_loss(m, b))
    own = hl.pruning_curve(model, some_scores(model), batches, [0.5])
    np.testing.assert_allclose(curve.values, 2 * own.values, rtol=1e-6)


@settings(max_examples=20, derandomize=True)
@given(st.lists(st.floats(0, 1), max_size=5))
def test_fractions_are_sorted_and_begin_with_the_whole_model(fractions: list[float]) -> None:
    model = _TINY
    curve = hl.pruning_curve(model, some_scores(model), _BATCH, fractions, loss=lambda m, b: torch.zeros(1))
    expected = sorted({0.0, *fractions})
    assert [len(names) for names in curve.removed] == [round(fraction * 18) for fraction in expected]
    for fewer, more in zip(curve.removed, curve.removed[1:], strict=False):
        assert more[: len(fewer)] == fewer


_TINY = zoo.build("llama-gqa")
_BATCH = [{"input_ids": torch.tensor([[5, 6, 7]])}]


def test_bad_input() -> None:
    model, batches = zoo.build("llama-gqa"), batches_of("llama-gqa")
    scores = some_scores(model)
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(hl.HeadlabError, match=f"between 0 and 1, not {bad}"):
            hl.pruning_curve(model, scores, batches, [0.5, bad])
    with pytest.raises(hl.HeadlabError, match="a loss or a metric, not both"):
        hl.pruning_curve(model, scores, batches, loss=hl.own_loss, metric=accuracy)
    with pytest.raises(hl.HeadlabError, match="made for another model"):
        hl.pruning_curve(zoo.build("llama-gqa", seed=1), scores, batches)
    with pytest.raises(hl.HeadlabError, match="but the model has 3 x 5"):
        hl.pruning_curve(zoo.build("gpt2"), scores, batches)
    with pytest.raises(hl.HeadlabError, match="unit is"):
        hl.pruning_curve(model, scores, batches, unit="layer")
    with pytest.raises(hl.HeadlabError, match="NaN or infinite"):
        hl.pruning_curve(model, scores, batches, metric=lambda m, b: float("nan"))
    with pytest.raises(hl.HeadlabError, match="one number per example"):
        hl.pruning_curve(model, scores, batches, loss=lambda m, b: hl.own_loss(m, b).sum())


def made_curve(seed: int = 0, steps: int = 4, examples: int = 13) -> hl.Curve:
    losses = np.random.default_rng(seed).normal(size=(steps, examples)) + np.arange(steps)[:, None]
    removed = [[f"L0H{i}" for i in range(2 * step)] for step in range(steps)]
    return hl.Curve(removed, losses.mean(1), losses, n_heads=12, record={"model": {"class": "Made"}})


def test_area_by_hand() -> None:
    curve = hl.Curve([[], ["a"], ["a", "b", "c", "d"]], np.array([2.0, 3.0, 7.0]), np.zeros(0), n_heads=8)
    by_hand = (1 / 8 * (0 + 1) / 2 + 3 / 8 * (1 + 5) / 2) / (4 / 8)
    assert curve.area == pytest.approx(by_hand)
    assert hl.Curve([[]], np.array([2.0]), np.zeros(0), n_heads=8).area == 0


def test_intervals_are_paired_percentiles() -> None:
    curve = made_curve(examples=40)
    rng, bounds = np.random.default_rng(99), []
    for step in range(4):
        differences = curve.losses[step] - curve.losses[0]
        means = sorted(float(np.mean([differences[i] for i in rng.integers(40, size=40)])) for _ in range(4000))
        bounds.append([means[100], means[3899]])
    np.testing.assert_allclose(curve.intervals(), bounds, atol=0.05)
    assert np.array_equal(curve.intervals(), curve.intervals())
    assert curve.intervals()[0].tolist() == [0, 0]
    assert made_curve(examples=1).intervals() is None


def test_a_table_with_a_line_per_step() -> None:
    curve = made_curve()
    frame = curve.to_frame()
    assert frame["removed"].tolist() == [0, 2, 4, 6]
    np.testing.assert_allclose(frame["fraction"], [0, 1 / 6, 1 / 3, 1 / 2])
    np.testing.assert_allclose(frame["change"], frame["value"] - frame["value"][0])
    assert np.array_equal(frame[["low", "high"]].to_numpy(), curve.intervals())
    assert curve.top(2) == sorted(zip(frame["fraction"], frame["change"], strict=True), key=lambda step: step[1])[:2]


@pytest.mark.parametrize("metric", [None, accuracy])
def test_save_and_load(metric: Any, tmp_path: Path) -> None:
    model, batches = zoo.build("llama-gqa"), batches_of("llama-gqa")
    curve = hl.pruning_curve(model, some_scores(model), batches, [0.3, 0.9], metric=metric)
    for again in (hl.Curve.load(curve.save(tmp_path / "curve.json")), hl.Result.load(tmp_path / "curve.json")):
        assert isinstance(again, hl.Curve)
        assert again.removed == curve.removed
        assert again.values.tolist() == curve.values.tolist()
        assert again.losses.tolist() == curve.losses.tolist()
        assert (again.n_heads, again.area) == (curve.n_heads, curve.area)
        assert again.record["order"] == curve.record["order"]
        assert str(again.to_frame()) == str(curve.to_frame())


class _Killed:
    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return hl.own_loss(model, batch)


@pytest.mark.parametrize("again", [False, True])
def test_a_killed_run_goes_on(again: bool, tmp_path: Path) -> None:
    model, batches = zoo.build("llama-gqa"), batches_of("llama-gqa")
    scores: Any = (lambda m: hl.importance(m, batches)) if again else some_scores(model)
    whole = hl.pruning_curve(model, scores, batches, FRACTIONS, loss=_Killed(10**6), log=tmp_path / "whole")
    log = tmp_path / "log"
    for at in (0, 1, 2, 3, 5):
        with pytest.raises(KeyboardInterrupt):
            hl.pruning_curve(model, scores, batches, FRACTIONS, loss=_Killed(at), log=log)
        assert not any(module._forward_pre_hooks for module in model.modules())
    data = (tmp_path / "whole").read_bytes()
    assert data.startswith(log.read_bytes())
    for cut in (len(log.read_bytes()), 0, 5, len(data) // 2, len(data) - 1, len(data)):
        log.write_bytes(data[:cut])
        resumed = hl.pruning_curve(model, scores, batches, FRACTIONS, loss=_Killed(10**6), log=log)
        assert log.read_bytes() == data
        assert resumed.removed == whole.removed
        assert resumed.losses.tolist() == whole.losses.tolist()


def test_another_computations_log_is_an_error(tmp_path: Path) -> None:
    model, batches, log = zoo.build("llama-gqa"), batches_of("llama-gqa"), tmp_path / "log"
    scores = some_scores(model)
    hl.pruning_curve(model, scores, batches, [0.5], log=log)
    data = log.read_bytes()
    for differs, call in {
        "order": {"scores": some_scores(model, seed=1)},
        "data": {"batches": batches[:1]},
        "fractions": {"fractions": [0.5, 0.7]},
        "unit": {"unit": "group"},
        "fill": {"fill": hl.fill(model, batches)},
        "metric": {"metric": accuracy},
        "reestimated": {"scores": lambda m: some_scores(m)},
    }.items():
        arguments: dict[str, Any] = {"scores": scores, "batches": batches, "fractions": [0.5]} | call
        with pytest.raises(hl.HeadlabError, match=f"another computation.*{differs}"):
            hl.pruning_curve(model, log=log, **arguments)
    assert log.read_bytes() == data


@pytest.mark.parametrize(("name", "unit"), [("llama-gqa", "head"), ("llama-gqa", "group"), ("t5", "head")])
def test_scores_without_labels(name: str, unit: str, tmp_path: Path) -> None:
    model, batches, log = zoo.build(name), batches_of(name), tmp_path / "log"
    scores, others = some_scores(model), some_scores(model, seed=1)
    curve = hl.pruning_curve(model, hl.HeadScores(scores.rows), batches, [0.5], unit=unit, log=log)
    assert curve.removed == hl.pruning_curve(model, scores, batches, [0.5], unit=unit).removed
    with pytest.raises(hl.HeadlabError, match=r"another computation.*ranking"):
        hl.pruning_curve(model, hl.HeadScores(others.rows), batches, [0.5], unit=unit, log=log)


@pytest.mark.parametrize("name", ["llama-gqa", "t5"])
def test_plain_equals_bridge(name: str) -> None:
    model, batches = zoo.build(name), batches_of(name)
    plain, bridged = (hl.pruning_curve(m, some_scores(model), batches, [0.5]) for m in (model, hl.bridge(model)))
    assert plain.removed == bridged.removed
    np.testing.assert_allclose(plain.losses, bridged.losses, atol=1e-5)


def test_top_puts_the_highest_metric_first() -> None:
    steps = [[], ["L0H0"], ["L0H0", "L0H1"]]
    loss = hl.Curve(steps, np.array([1.0, 1.5, 1.2]), np.zeros(0), 2)
    metric = hl.Curve(steps, np.array([0.9, 0.8, 0.4]), np.zeros(0), 2, {"metric": "accuracy"})
    assert [fraction for fraction, _ in loss.top(3)] == [0, 1, 0.5]
    assert [fraction for fraction, _ in metric.top(3)] == [0, 0.5, 1]
