"""The composition maps of texts, kept as factors, and their means over visible pairs.

A map is a constant plus a part of the query plus a part of the key. So sums over the keys that a query sees are
differences of running sums, and means over all pairs follow exactly from what single tokens bring.

A *visible pair* is a real query and a real key that it attends to: in a causal model no later one, in a local layer none
outside the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .branches import BRANCHES
from .compose import Side

PARTS = ("identity", *BRANCHES)
SIDES = ("query", "key")
FACTORS = ("w1", "w2", "gate")
STEADY = 1e-12  # maps whose variance is a smaller share than this of their mean square only vary by rounding


@dataclass(frozen=True, eq=False)
class StageMaps:
    """The maps of one layer and stage, with the run-time scales of the branches multiplied in.

    Attributes:
        sources, targets: the heads that the maps lead from and to, by original number (in pruned models not the same).
        per_group: heads of the same `head // per_group` are mixed with each other.
        residual: whether the identity is part of the maps.
        base: W_b, if there is one.
        query, key: what every token brings as query and as key; `batch` is the example.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    per_group: int
    residual: bool
    base: Float[Tensor, "source target"] | None
    query: Side
    key: Side

    @cached_property
    def same(self) -> Float[Tensor, "source target"]:
        """The identity: 1 where both are the same head."""
        return self._equal(1)

    @cached_property
    def within(self) -> Float[Tensor, "source target"]:
        """1 where both heads are in one group."""
        return self._equal(self.per_group)

    def _equal(self, divisor: int) -> Tensor:
        sources, targets = (torch.tensor(x, dtype=torch.long) // divisor for x in (self.sources, self.targets))
        return (sources[:, None] == targets).double()

    def of(self, side: str) -> list[str]:
        """The branches of a side that there are."""
        factors = getattr(self, side)
        low_rank, gate = ([name] * (x is not None) for name, x in ((side, factors.w1), (f"{side}_gate", factors.gate)))
        return low_rank + gate

    def constant(self, part: str) -> Float[Tensor, "source target"]:
        """The identity or the base: parts that are the same for every pair."""
        if part == "identity":
            return self.same * self.residual
        return torch.zeros_like(self.same) if self.base is None else self.base.double()

    def tokens(self, branch: str, example: int, positions: Any = slice(None)) -> Float[Tensor, "pos source target"]:
        """What single tokens of an example add to the maps by a branch of a side."""
        side = self.query if branch.startswith("query") else self.key
        parts = (side.w1, side.w2, side.gate)
        w1, w2, gate = (cast("Any", x if x is None else x[example, positions].double()) for x in parts)
        if branch.endswith("_gate"):
            return gate[:, None] * self.same
        return torch.einsum("prm,prn->pmn", w1, w2) * self.within

    def total(self, branch: str, example: int, weights: Float[Tensor, " pos"]) -> Float[Tensor, "source target"]:
        """The same, summed over tokens with weights; no map of a token is formed."""
        side = self.query if branch.startswith("query") else self.key
        w1, w2, gate = (cast("Any", x if x is None else x[example].double()) for x in (side.w1, side.w2, side.gate))
        if branch.endswith("_gate"):
            return (weights @ gate) * self.same
        return torch.einsum("p,prm,prn->mn", weights, w1, w2) * self.within

    def whole(self, side: str, example: int, n_pos: int) -> Float[Tensor, "pos source target"]:
        """What the tokens of an example bring by all branches of a side."""
        nothing = self.same.new_zeros(n_pos, *self.same.shape)
        return sum((self.tokens(branch, example) for branch in self.of(side)), nothing)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything there is, by name: `base`, `query.w1` ..."""
        if self.base is not None:
            yield "base", self.base
        for side in SIDES:
            factors = ((name, getattr(getattr(self, side), name)) for name in FACTORS)
            yield from ((f"{side}.{name}", x) for name, x in factors if x is not None)


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """One layer: its two stages, and what its queries see.

    Attributes:
        layer: its number.
        causal: no query sees a later key.
        window: how many keys a query sees, itself included; None: all of them.
        real: which tokens are real.
    """

    layer: int
    causal: bool
    window: int | None
    real: Bool[Tensor, "example pos"]
    stages: dict[str, StageMaps]

    def pairs(self) -> list[Pairs]:
        """The visible pairs of every example."""
        n_pos = self.real.shape[1]
        queries = torch.arange(n_pos)
        first = torch.zeros_like(queries) if self.window is None else (queries - self.window + 1).clamp(min=0)
        stop = queries + 1 if self.causal else torch.full_like(queries, n_pos)
        return [Pairs(real, first, stop) for real in self.real]


@dataclass(frozen=True, eq=False)
class Pairs:
    """The visible pairs of one example: a real query sees the real keys from `first` to before `stop`."""

    real: Bool[Tensor, " pos"]
    first: Int[Tensor, " pos"]
    stop: Int[Tensor, " pos"]

    def sums(self, x: Float[Tensor, "pos ..."]) -> Float[Tensor, "pos ..."]:
        """For every query the sum of x over the keys that it sees; zero for padding."""
        real = self.real.view(-1, *[1] * (x.ndim - 1))
        running = torch.cat([x.new_zeros(1, *x.shape[1:]), (x * real).cumsum(0)])
        return (running[self.stop] - running[self.first]) * real

    @cached_property
    def keys(self) -> Float[Tensor, " pos"]:
        """How many keys each query sees."""
        return self.sums(torch.ones(len(self.real), dtype=torch.float64))

    @cached_property
    def queries(self) -> Float[Tensor, " pos"]:
        """By how many queries each key is seen."""
        begun = torch.zeros(len(self.real) + 1, dtype=torch.float64)
        seeing = self.real.double()
        begun.index_add_(0, self.first, seeing).index_add_(0, self.stop, -seeing)
        return begun.cumsum(0)[:-1] * self.real


@dataclass(frozen=True, eq=False)
class Moments:
    """Means over visible pairs: of every part of the maps, and of the inner products of the parts of C - I.

    `products` is in the order of `PARTS`; `explained` is the share of the variation that the query explains.
    """

    means: dict[str, Float[Tensor, "source target"]]
    products: Float[Tensor, "part part"]
    explained: float


def moments(maps: StageMaps, examples: Sequence[Pairs]) -> Moments:
    """Exact, in float64. Products are those of the means and, apart, of what differs from them: so a variation that is
    small beside the mean is not lost."""
    n_pairs = sum(float(pairs.keys.sum()) for pairs in examples)
    means = {part: maps.constant(part) if part in PARTS[:2] else torch.zeros_like(maps.same) for part in PARTS}
    for side in SIDES:
        for branch in maps.of(side):
            weights = [pairs.keys if side == "query" else pairs.queries for pairs in examples]
            means[branch] = sum((maps.total(branch, e, w) for e, w in enumerate(weights)), means[branch]) / n_pairs
    differing = torch.stack([means[part] - maps.same * (part == "identity") for part in PARTS])
    products = torch.einsum("amn,bmn->ab", differing, differing)
    queries, keys = maps.of("query"), maps.of("key")
    spread = torch.zeros(len(queries) + len(keys), len(queries) + len(keys), dtype=torch.float64)
    unexplained = 0.0
    for example, pairs in enumerate(examples):
        q, k = (_centred(maps, branches, means, example, len(pairs.real)) for branches in (queries, keys))
        seen = pairs.sums(k)  # [query, key branch, source * target]
        cross = torch.einsum("pax,pbx->ab", q, seen)
        of_query, of_key = (torch.einsum("p,pax,pbx->ab", w, x, x) for w, x in ((pairs.keys, q), (pairs.queries, k)))
        spread += torch.cat([torch.cat([of_query, cross], 1), torch.cat([cross.T, of_key], 1)])
        explained = seen.sum(1).square().sum(-1) / pairs.keys.clamp(min=1)
        unexplained += float(of_key.sum() - explained.sum())
    spread, unexplained = spread / n_pairs, unexplained / n_pairs
    at = torch.tensor([PARTS.index(branch) for branch in (*queries, *keys)], dtype=torch.long)
    products[at[:, None], at] += spread
    variation, steady = float(spread.sum()), STEADY * float(products[at[:, None], at].sum())
    share = 1.0 if variation <= steady else min(max(1 - unexplained / variation, 0.0), 1.0)
    return Moments(means, products, share)


def _centred(
    maps: StageMaps, branches: Sequence[str], means: Mapping[str, Tensor], example: int, n_pos: int
) -> Float[Tensor, "pos branch entry"]:
    parts = [(maps.tokens(branch, example) - means[branch]).flatten(1) for branch in branches]
    return torch.stack(parts, 1) if parts else torch.zeros(n_pos, 0, maps.same.numel(), dtype=torch.float64)


def mean_product(first: StageMaps, second: StageMaps, examples: Sequence[Pairs]) -> Float[Tensor, "source target"]:
    """The mean over visible pairs of the matrix product of two stages' maps, exact, in float64."""
    total = torch.zeros(len(first.sources), len(second.targets), dtype=torch.float64)
    for example, pairs in enumerate(examples):
        n_pos, real = len(pairs.real), pairs.real.double()
        # C(i, j) = P(i) + K(j), where P is everything but what the key brings
        p1, p2 = (m.constant("identity") + m.constant("base") + m.whole("query", example, n_pos) for m in (first, second))
        k1, k2 = (m.whole("key", example, n_pos) for m in (first, second))
        for weights, one, other in (
            (pairs.keys, p1, p2),
            (real, p1, pairs.sums(k2)),
            (real, pairs.sums(k1), p2),
            (pairs.queries, k1, k2),
        ):
            total += torch.einsum("p,pmx,pxn->mn", weights, one, other)
    return total / sum(float(pairs.keys.sum()) for pairs in examples)
