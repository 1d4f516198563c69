"""Which probes are compared: a study is a list of points, one for every kind, size and seed; `STUDIES` names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ..symbolic import LEVELS, CrossComposition
from .models import KINDS, ProbeForSequenceClassification, probe_config
from .training import Recipe, Run

MATCHED = "matched"
"""An MHA with so many heads that it has as many parameters as the DCMHA of the same point, or more."""


@dataclass(frozen=True)
class Size:
    """What the studies vary around, and how long probes are trained."""

    features: int
    values: int
    records: int
    d_model: int
    heads: int
    d_head: int
    recipes: Mapping[str, Recipe]
    """`binding`, `conflict`, `first` (conflict, an MLP on the query), `pairs` (so, for MHA with two heads for each pair)."""


FULL = Size(
    features=8, values=16, records=12, d_model=128, heads=8, d_head=16,
    recipes={
        "binding": Recipe(steps=3500, warm=0.1, hold=0.75, weight_decay=0.1),
        "conflict": Recipe(steps=5000, warm=0.1, hold=0.8, weight_decay=0.5, average=0.5),
        "first": Recipe(steps=3500, warm=0.1, hold=0.8, weight_decay=0.7, average=0.4),
        "pairs": Recipe(steps=10_000, lr=3e-3, warm=0.1, hold=0.5),
    },
)  # fmt: skip
SMALL = Size(
    features=7, values=8, records=7, d_model=64, heads=7, d_head=8,
    recipes={
        "binding": Recipe(steps=4000, batch=256, lr=4e-3, warm=0.1, hold=0.5),
        "conflict": Recipe(steps=3000, batch=256, lr=4e-3, warm=0.1, hold=0.5, weight_decay=0.3, average=0.3),
        "first": Recipe(steps=2500, batch=256, lr=4e-3, warm=0.1, hold=0.5, weight_decay=0.3, average=0.3),
        "pairs": Recipe(steps=12_000, batch=256, lr=4e-3, warm=0.1, hold=0.5),
    },
)  # fmt: skip
SIZES = {"full": FULL, "small": SMALL}


@dataclass(frozen=True)
class Point:
    """One run in a study: what it is called there and at how many heads it is drawn."""

    label: str
    heads: int
    run: Run


def point(
    size: Size, level: str, label: str, seed: int, *, heads: int = 0, recipe: Recipe | None = None, **changes: Any
) -> Point:
    """A point of a study.

    Args:
        size: what is not said otherwise.
        label: a kind of `KINDS`, or `matched`.
        heads: of the point (a `matched` MHA has more).
        recipe: by default the size's, for the level and what else is asked for.
        changes: fields of `CrossComposition` or of `ProbeConfig`.
    """
    sizes = {"n_features": size.features, "n_values": size.values, "n_records": size.records}
    for_task = {name: value for name, value in changes.items() if name in CrossComposition.__dataclass_fields__}
    task = CrossComposition(level=level, seed=seed, **(sizes | for_task))  # type: ignore[arg-type]
    heads = heads or size.heads
    given = {"hidden_size": size.d_model, "head_dim": size.d_head}
    given |= {name: value for name, value in changes.items() if name not in for_task}
    usual = size.recipes["first" if given.get("first") else level]
    kind, own = label, heads
    if label == MATCHED:
        kind, own = "mha", heads_of_matched(replace(task, seed=0), heads, tuple(sorted(given.items())))
    return Point(label, heads, Run(task, kind, {"num_attention_heads": own} | given, recipe or usual))


@cache
def heads_of_matched(task: CrossComposition, heads: int, sizes: tuple[tuple[str, Any], ...]) -> int:
    """The fewest heads with which an MHA has as many parameters as a DCMHA of `heads`."""

    def parameters(kind: str, heads: int) -> int:
        with torch.device("meta"):
            probe = ProbeForSequenceClassification(probe_config(task, kind, num_attention_heads=heads, **dict(sizes)))
        return sum(p.numel() for p in probe.parameters())

    goal, found = parameters("dcmha", heads), heads
    while parameters("mha", found) < goal:
        found += 1
    return found


# --- the studies

MAIN = ("mha", MATCHED, "static", "low_rank", "dcmha")


def main(size: Size, seeds: Iterable[int]) -> list[Point]:
    """The main figure: both levels; the level conflict as it is, and with an MLP on the query before attention.

    There heads are twice as many as features; the control is an MHA with two heads for every combination, and that MLP.
    """
    found = []
    for seed in seeds:
        found += [point(size, "binding", label, seed) for label in ("mha", MATCHED, "static", "dcmha")]
        found += [point(size, "conflict", label, seed) for label in ("mha", "low_rank")]
        found += [point(size, "conflict", label, seed, **_first(size)) for label in ("low_rank", "dcmha")]
        found.append(_pairs(size, seed))
    return found


def _pairs(size: Size, seed: int, times: int = 2, **changes: Any) -> Point:
    """An MHA with `times` heads for every combination, an MLP on the query, and the recipe with which it fits best."""
    heads = times * size.features * (size.features - 1)
    return point(size, "conflict", "mha", seed, heads=heads, first=True, recipe=replace(size.recipes["pairs"], **changes))


def _first(size: Size) -> dict[str, Any]:
    """With an MLP on the query before attention."""
    return {"heads": 2 * size.heads, "first": True}


def kinds(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Every kind, on the level conflict with an MLP on the query."""
    found = []
    for seed in seeds:
        for label in ("mha", MATCHED, *(kind for kind in KINDS if kind != "mha")):
            found += [point(size, "binding", label, seed), point(size, "conflict", label, seed, **_first(size))]
    return found


def heads(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Accuracy against the number of heads; on the level conflict with an MLP on the query."""
    found = []
    for seed in seeds:
        for times in (0.5, 1, 2, 4):
            found += [point(size, "binding", label, seed, heads=int(times * size.heads)) for label in MAIN]
        found += [point(size, "binding", label, seed, heads=8 * size.heads) for label in ("mha", "static")]
        for times in (0.5, 1, 2, 4):
            count = int(times * size.heads)
            found += [
                point(size, "conflict", label, seed, heads=count, first=True) for label in ("static", "low_rank", "dcmha")
            ]
    return found


def features(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Accuracy against the number of features."""
    return _along("n_features", (max(3, size.features // 2), size.features, 3 * size.features // 2), size, seeds)


def records(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Accuracy against the number of records."""
    return _along("n_records", (2, size.records // 2, size.records, size.values), size, seeds)


def d_head(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Accuracy against the size of a head."""
    return _along("head_dim", (size.d_head // 2, size.d_head, 2 * size.d_head, 4 * size.d_head), size, seeds)


def held_out(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Accuracy against the share of combinations held out."""
    return _along("held_out", (0.1, 0.3, 0.5, 0.7), size, seeds)


def _along(name: str, values: Iterable[Any], size: Size, seeds: Iterable[int]) -> list[Point]:
    """One size of many values, on the level binding, for three seeds."""
    return [
        point(size, "binding", label, seed, **{name: value})
        for value in values
        for seed in list(seeds)[:3]
        for label in ("mha", "static", "dcmha")
    ]


def shared(size: Size, seeds: Iterable[int]) -> list[Point]:
    """One vocabulary of answers for all features, so that nothing is won by carrying the whole record."""
    return [
        point(size, level, label, seed, shared_values=True, **(_first(size) if level == "conflict" else {}))
        for level in LEVELS
        for seed in seeds
        for label in ("mha", "static", "low_rank", "dcmha")
    ]


def layers(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Two layers, or an MLP behind attention; three seeds."""
    return [
        point(size, "binding", label, seed, **change)
        for change in ({"num_hidden_layers": 2}, {"mlp": True})
        for seed in list(seeds)[:3]
        for label in ("mha", "dcmha")
    ]


def recipes(size: Size, seeds: Iterable[int]) -> list[Point]:
    """What the level conflict needs. Dynamic maps, to learn how to combine and not every pair by heart: decay, the mean of
    the weights, a long plateau, more heads. Plain attention, to fit at all: heads for every pair, a rate that suits it.
    """
    usual = size.recipes["conflict"]
    own, last = usual.weight_decay, replace(usual, average=0.0)
    changes: list[dict[str, Any]] = [{"recipe": replace(usual, weight_decay=rate)} for rate in (0.1, own, 0.7)]
    changes += [{"recipe": replace(last, weight_decay=rate)} for rate in (0.1, own)]
    changes += [{"recipe": replace(last, warm=0.3, hold=0.0)}, {"heads": 2 * size.heads}, {"rank": 4}]
    found = [
        point(size, "conflict", label, seed, **change)
        for change in changes
        for seed in seeds
        for label in ("low_rank", "dcmha")
    ]
    plain: list[dict[str, Any]] = [{"times": 1}, {}, {"weight_decay": 0.1}, {"lr": 2 * size.recipes["pairs"].lr / 3}]
    return found + [_pairs(size, seed, **change) for change in plain for seed in list(seeds)[:3]]


def control(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Nothing held out: the same task is no problem for plain attention."""
    return [
        point(size, "binding", label, seed, heads=times * size.heads, held_out=0.0)
        for times in (1, 2, 4)
        for seed in seeds
        for label in ("mha", "dcmha")
    ]


STUDIES: Mapping[str, Callable[[Size, Iterable[int]], list[Point]]] = {
    study.__name__: study
    for study in (main, kinds, heads, features, records, d_head, held_out, shared, layers, recipes, control)
}


AXES = ("heads", "features", "records", "d_head", "held_out")
"""Studies that vary what is called so in their results."""
