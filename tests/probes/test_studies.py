"""Every study makes points that can be trained, each of them once, and its matched attention is matched."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from headlab.errors import HeadlabError
from synthetic_tasks.probes import studies
from synthetic_tasks.probes.benchmark import described, identity
from synthetic_tasks.probes.models import KINDS, ProbeForSequenceClassification, probe_config
from synthetic_tasks.probes.studies import AXES, FULL, MATCHED, SMALL, STUDIES, Point, Size, heads_of_matched, point
from synthetic_tasks.probes.training import Run
from synthetic_tasks.symbolic import LEVELS

SIZES = pytest.mark.parametrize("size", [FULL, SMALL], ids=["full", "small"])
EVERY = pytest.mark.parametrize("name", STUDIES)


def parameters(run: Run) -> int:
    with torch.device("meta"):
        probe = ProbeForSequenceClassification(probe_config(run.task, run.kind, **run.sizes))
    return sum(p.numel() for p in probe.parameters())


@SIZES
@EVERY
def test_every_point_can_be_made_and_is_there_once(name: str, size: Size) -> None:
    points = STUDIES[name](size, range(2))
    assert points
    built: set[str] = set()
    for at in points:
        assert at.label in {*KINDS, MATCHED}
        assert at.run.kind == ("mha" if at.label == MATCHED else at.label)
        assert at.run.task.level in LEVELS
        assert len(at.run.task.trained_pairs) + at.run.task.n_held_out == at.run.task.n_pairs
        if at.label != MATCHED:
            assert at.run.sizes["num_attention_heads"] == at.heads
        if at.run.shape not in built:
            built.add(at.run.shape)
            assert parameters(at.run) > 0
    assert {at.run.task.seed for at in points} == {0, 1}
    per_seed = [{identity_without_seed(at) for at in points if at.run.task.seed == seed} for seed in (0, 1)]
    assert per_seed[0] == per_seed[1]
    once = Counter((at.label, at.heads, identity(at.run)) for at in points)
    assert max(once.values()) == 1
    told = Counter(repr(described(at)) for at in points)  # what tells points apart in the results
    assert max(told.values()) == 1


def identity_without_seed(at: Point) -> tuple[str, int, str]:
    return at.label, at.heads, identity(replace(at.run, task=replace(at.run.task, seed=0)))


@SIZES
def test_matched_attention_has_as_many_parameters_and_one_head_fewer_would_not(size: Size) -> None:
    checked: set[tuple[Any, ...]] = set()
    for name in ("main", "kinds", "heads"):
        for at in STUDIES[name](size, [0]):
            if at.label != MATCHED or (at.run.shape, at.heads) in checked:
                continue
            checked.add((at.run.shape, at.heads))
            own = at.run.sizes["num_attention_heads"]
            composed = replace(at.run, kind="dcmha", sizes=at.run.sizes | {"num_attention_heads": at.heads})
            fewer = replace(at.run, sizes=at.run.sizes | {"num_attention_heads": own - 1})
            assert parameters(at.run) >= parameters(composed) > parameters(fewer)
            assert own > at.heads
    assert len(checked) >= 5


def test_the_heads_of_matched_attention_do_not_depend_on_the_seed() -> None:
    heads = {point(SMALL, "binding", MATCHED, seed).run.sizes["num_attention_heads"] for seed in range(3)}
    sizes = (("head_dim", SMALL.d_head), ("hidden_size", SMALL.d_model))
    assert heads == {heads_of_matched(point(SMALL, "binding", "mha", 0).run.task, SMALL.heads, sizes)}


@SIZES
def test_the_main_study(size: Size) -> None:
    points = studies.main(size, range(5))
    assert {at.run.task.seed for at in points} == set(range(5))
    pairs = size.features * (size.features - 1)
    for seed in range(5):
        found = {
            (at.run.task.level, at.label, at.heads, bool(at.run.sizes.get("first")))
            for at in points
            if at.run.task.seed == seed
        }
        binding = {("binding", label, size.heads, False) for label in ("mha", MATCHED, "static", "dcmha")}
        plain = {("conflict", label, size.heads, False) for label in ("mha", "low_rank")}
        first = {("conflict", label, 2 * size.heads, True) for label in ("low_rank", "dcmha")}
        assert found == binding | plain | first | {("conflict", "mha", 2 * pairs, True)}
    assert len(points) == 45
    for at in points:
        usual = "first" if at.run.sizes.get("first") else at.run.task.level
        assert at.run.recipe == size.recipes["pairs" if at.heads == 2 * pairs else usual]
        assert at.run.task.held_out == 0.3
        assert not at.run.task.shared_values


def test_every_kind_is_compared_on_both_levels() -> None:
    points = studies.kinds(SMALL, [0])
    for level, first in (("binding", None), ("conflict", True)):
        labels = [at.label for at in points if at.run.task.level == level and at.run.sizes.get("first") == first]
        assert set(labels) == {*KINDS, MATCHED}


@SIZES
@pytest.mark.parametrize("name", AXES)
def test_an_axis_is_a_column_that_varies_in_its_study(name: str, size: Size) -> None:
    rows = [described(at) for at in STUDIES[name](size, [0])]
    assert len({row[name] for row in rows}) >= 3
    if name == "heads":
        return
    assert all(len({row[other] for row in rows}) == 1 for other in AXES if other != name)
    by_kind = {kind: sorted(row[name] for row in rows if row["kind"] == kind) for kind in ("mha", "static", "dcmha")}
    assert by_kind["mha"] == by_kind["static"] == by_kind["dcmha"]
    assert len(by_kind["mha"]) * 3 == len(rows)


@SIZES
def test_what_studies_share_is_the_same_run(size: Size) -> None:
    ids = {name: {identity(at.run) for at in STUDIES[name](size, [0])} for name in STUDIES}
    for label in ("mha", "static", "dcmha"):
        usual = identity(point(size, "binding", label, 0).run)
        for name in ("main", "kinds", "heads", "features", "records", "d_head", "held_out"):
            assert usual in ids[name], (label, name)
        for name in ("control", "layers", "recipes"):
            assert usual not in ids[name]
    alone = ids["main"] - ids["kinds"]  # those of the level conflict without an MLP, and heads for every pair
    without = {identity(point(size, "conflict", label, 0).run) for label in ("mha", "low_rank")}
    assert alone > without
    assert len(alone) == 3
    assert ids["main"] & ids["recipes"] == alone - {identity(point(size, "conflict", "mha", 0).run)}
    assert not ids["shared"] & ids["main"]


def test_small_studies_vary_what_they_say() -> None:
    for at in studies.control(SMALL, [0]):
        assert at.run.task.n_held_out == 0
    assert {at.run.task.shared_values for at in studies.shared(SMALL, [0])} == {True}
    changes = [(at.run.sizes.get("num_hidden_layers"), at.run.sizes.get("mlp")) for at in studies.layers(SMALL, [0])]
    assert set(changes) == {(2, None), (None, True)}
    for name in ("layers", "features", "records", "d_head", "held_out"):
        assert {at.run.task.seed for at in STUDIES[name](SMALL, range(5))} == {0, 1, 2}
    assert {at.run.sizes.get("rank") for at in studies.recipes(FULL, [0])} == {None, 4}


def test_a_point_takes_changes_of_the_task_and_of_the_probe() -> None:
    at = point(SMALL, "conflict", "key", 3, heads=7, n_records=4, shared_values=True, rank=1, mlp=True, head_dim=3)
    assert (at.label, at.heads, at.run.kind) == ("key", 7, "key")
    task = at.run.task
    assert (task.n_features, task.n_values, task.n_records, task.seed, task.shared_values) == (7, 8, 4, 3, True)
    assert at.run.sizes == {"num_attention_heads": 7, "hidden_size": 64, "head_dim": 3, "rank": 1, "mlp": True}
    assert at.run.recipe == SMALL.recipes["conflict"]
    with pytest.raises(HeadlabError, match="n_records is 9, but the 8 values"):
        point(SMALL, "binding", "mha", 0, n_records=9)
