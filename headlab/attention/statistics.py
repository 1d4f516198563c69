"""What is measured of an attention pattern, as functions of tensors; and the sums that are kept of it.

A pattern is [batch, head, query, key], with padding on the right (see `aligned`). A query that sees a single key has no
choice, and is not counted anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

MARKS = ("first", "previous", "self", "next", "duplicate", "induction", "delimiter", "rare")
SHAPE = ("entropy", "relative_entropy", "confidence", "distance")  # of rows that sum to 1


@dataclass(frozen=True, eq=False)
class Text:
    """What stands at the queries or keys of a batch, padding on the right.

    Attributes:
        real: False for padding.
        tokens: their numbers, where there are any.
        rarity: a number for every token, lower for rarer ones.
        delimiter: True for punctuation and the like.
        end: True for the symbol that ends a text, whose weight `confidence` leaves out.
    """

    real: Bool[Tensor, "batch pos"]
    tokens: Int[Tensor, "batch pos"] | None = None
    rarity: Int[Tensor, "batch pos"] | None = None
    delimiter: Bool[Tensor, "batch pos"] | None = None
    end: Bool[Tensor, "batch pos"] | None = None


def right_padded(real: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"] | None:
    """The order of positions that has padding on the right; None where it is there already."""
    if (real[:, :-1] >= real[:, 1:]).all():
        return None
    return (~real).long().argsort(dim=-1, stable=True)


def aligned(
    pattern: Float[Tensor, "batch head query key"],
    queries: Int[Tensor, "batch query"] | None,
    keys: Int[Tensor, "batch key"] | None,
) -> Float[Tensor, "batch head query key"]:
    """A pattern in float32 or more, its queries and keys in these orders."""
    pattern = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    if queries is not None:
        pattern = pattern.take_along_dim(queries[:, None, :, None], 2)
    if keys is not None:
        pattern = pattern.take_along_dim(keys[:, None, None, :], 3)
    return pattern


def visible(
    pattern: Float[Tensor, "batch head query key"],
    queries: Bool[Tensor, "batch query"],
    keys: Bool[Tensor, "batch key"],
    same: bool,
) -> Bool[Tensor, "batch query key"]:
    """Which keys a real query can see: the real ones, and in self-attention (`same`) those of them that lie at a distance
    at which some head of the layer puts weight for some query. So causal layers and windows need no description."""
    both = queries[:, :, None] & keys[:, None, :]
    if not same:
        return both
    used = ((pattern.amax(1) > 0) & both).any(0).nonzero()  # [pair, 2]
    if not len(used):
        return both
    distances = used[:, 0] - used[:, 1]
    distance = offsets(pattern.shape[2], pattern.shape[3], pattern.device)
    return both & (distance >= distances.min()) & (distance <= distances.max())


def offsets(n_queries: int, n_keys: int, device: torch.device) -> Int[Tensor, "query key"]:
    """How far before the query a key lies."""
    return torch.arange(n_queries, device=device)[:, None] - torch.arange(n_keys, device=device)


def marked(seen: Bool[Tensor, "batch query key"], keys: Text, same: bool) -> Bool[Tensor, "batch query key mark"]:
    """The keys that each of `MARKS` looks for, of those that a query sees."""
    distance = offsets(seen.shape[1], seen.shape[2], seen.device)
    position = torch.arange(seen.shape[2], device=seen.device)
    later = position > 0  # weight on the first token is called `first`
    found = torch.zeros(*seen.shape, len(MARKS), dtype=torch.bool, device=seen.device)

    def mark(name: str, where: Tensor) -> None:
        found[..., MARKS.index(name)] = where & seen

    mark("first", position == 0)
    if same:
        for name, wanted in (("previous", 1), ("self", 0), ("next", -1)):
            mark(name, distance == wanted)
        if keys.tokens is not None:
            equal = keys.tokens[:, :, None] == keys.tokens[:, None, :]  # [batch, query, key]
            mark("duplicate", equal & (distance > 0))
            mark("induction", F.pad(equal[:, :, :-1], (1, 0)) & (distance > 0))
    if keys.delimiter is not None:
        mark("delimiter", (keys.delimiter & later)[:, None])
    if keys.rarity is not None:
        rarity = keys.rarity[:, None].expand_as(seen).masked_fill(~(seen & later), torch.iinfo(torch.long).max)
        mark("rare", (rarity == rarity.amin(-1, keepdim=True)) & later)
    return found


def attended(
    pattern: Float[Tensor, "batch head query key"], weights: Float[Tensor, "batch query key mark"]
) -> Float[Tensor, "batch head query mark"]:
    """The weight that each head puts on the marked keys."""
    return (pattern.transpose(1, 2) @ weights).transpose(1, 2)


def entropy(pattern: Float[Tensor, "*shape key"]) -> Float[Tensor, "*shape"]:
    """In nats, of rows that sum to 1."""
    return torch.special.entr(pattern).sum(-1)


class Ratios:
    """Means over the queries of all examples, with standard errors over examples, from running sums in float64.

    A mean is a ratio of two sums over examples (of values, and of queries counted), for examples differ in length; its
    error is that of a ratio estimator (Cochran, Sampling Techniques, 1977, section 2.11; without the finite correction).
    """

    def __init__(self, n_heads: int, n_names: int) -> None:
        self.examples = np.zeros(n_names)
        self.v, self.vv, self.vn = (np.zeros((n_heads, n_names)) for _ in range(3))
        self.n, self.nn = np.zeros(n_names), np.zeros(n_names)

    def add(self, values: Float[Tensor, "batch head query name"], counted: Bool[Tensor, "batch query name"]) -> None:
        """Values of some examples, of which those of the counted queries are added."""
        weights = counted.to(values.dtype)
        v = torch.einsum("bhqn,bqn->bhn", values, weights).double().cpu().numpy()
        n = counted.sum(1).double().cpu().numpy()  # [batch, name]
        self.examples += (n > 0).sum(0)
        self.v += v.sum(0)
        self.vv += (v**2).sum(0)
        self.vn += (v * n[:, None]).sum(0)
        self.n += n.sum(0)
        self.nn += (n**2).sum(0)

    @property
    def means(self) -> np.ndarray:
        """[head, name]; NaN where no query was counted."""
        return self.v / np.where(self.n > 0, self.n, np.nan)

    @property
    def errors(self) -> np.ndarray:
        """[head, name]; NaN with fewer than two examples."""
        means, examples = self.means, np.where(self.examples > 1, self.examples, np.nan)
        squares = np.maximum(self.vv - 2 * means * self.vn + means**2 * self.nn, 0)
        return np.sqrt(squares * examples / (examples - 1)) / np.where(self.n > 0, self.n, np.nan)


class ByDistance:
    """How much of a pattern's variance over all visible pairs of query and key lies between distances (eta squared)."""

    def __init__(self, n_heads: int) -> None:
        self.longest = 1
        self.sums = np.zeros((n_heads, 1))  # [head, distance], from `1 - longest` up
        self.squares = np.zeros(n_heads)
        self.pairs = np.zeros(1)

    def add(self, pattern: Float[Tensor, "batch head query key"], seen: Bool[Tensor, "batch query key"]) -> None:
        """A pattern that is 0 wherever `seen` is False."""
        if (more := max(seen.shape[1:]) - self.longest) > 0:
            self.longest += more
            self.sums, self.pairs = np.pad(self.sums, ((0, 0), (more, more))), np.pad(self.pairs, more)
        at = (offsets(seen.shape[1], seen.shape[2], seen.device) + self.longest - 1).flatten()
        sums = torch.zeros(self.sums.shape, dtype=torch.float64, device=pattern.device)
        self.sums += sums.index_add_(1, at, pattern.sum(0).flatten(1).double()).cpu().numpy()
        self.squares += torch.linalg.vector_norm(pattern, dim=(0, 2, 3)).double().square().cpu().numpy()
        pairs = torch.zeros(self.pairs.shape, dtype=torch.float64, device=pattern.device)
        self.pairs += pairs.index_add_(0, at, seen.sum(0).flatten().double()).cpu().numpy()

    @property
    def explained(self) -> np.ndarray:
        """[head]; NaN where a pattern does not vary."""
        n = self.pairs.sum()
        if not n:
            return np.full(len(self.sums), np.nan)
        mean = self.sums.sum(1) / n
        total = self.squares - n * mean**2
        between = (self.sums**2 / np.where(self.pairs > 0, self.pairs, 1)).sum(1) - n * mean**2
        varies = total > 1e-6 * self.squares  # what float32 leaves of a uniform pattern is no variance
        return np.where(varies, between / np.where(varies, total, 1), np.nan)


class LayerSums:
    """Everything that is kept of one attention module's patterns."""

    def __init__(self, n_raw: int, n_heads: int, composed: bool) -> None:
        self.raw, self.positional = Ratios(n_raw, len(MARKS) + len(SHAPE)), ByDistance(n_raw)
        self.composed = Ratios(n_heads, len(MARKS) + 1) if composed else None
        self.composed_positional = ByDistance(n_heads)

    def add(
        self,
        raw: Float[Tensor, "batch raw query key"],
        composed: Float[Tensor, "batch head query key"] | None,
        seen: Bool[Tensor, "batch query key"],
        marks: Bool[Tensor, "batch query key mark"],
        keys: Text,
        same: bool,
    ) -> None:
        """One batch's patterns, aligned; `composed` where it is another one than `raw`."""
        choices = seen.sum(-1)  # [batch, query]
        counted = choices > 1
        marks = marks & counted[:, :, None, None]
        has = marks.any(2)  # [batch, query, mark]
        weights = marks.to(raw.dtype)
        rows = counted[:, None, :, None]
        raw = raw.where(rows, 0)
        distance = offsets(seen.shape[1], seen.shape[2], seen.device).abs().to(raw.dtype)
        if same:  # the distance rides along, as one more mark
            weights = torch.cat([weights, distance[None, :, :, None].expand(len(raw), -1, -1, 1)], -1)
        values = attended(raw, weights)
        nats = entropy(raw)
        kept = raw if keys.end is None or not keys.end.any() else raw.masked_fill(keys.end[:, None, None], 0)
        shape = [nats, nats / choices.clamp(min=2).log()[:, None], kept.amax(-1)]
        if not same:
            shape.append(torch.zeros_like(nats))
        values = torch.cat([values[..., : len(MARKS)], torch.stack(shape, -1), values[..., len(MARKS) :]], -1)
        of_shape = counted[..., None].repeat(1, 1, len(SHAPE))
        of_shape[..., -1] &= same
        self.raw.add(values, torch.cat([has, of_shape], -1))
        if same:
            self.positional.add(raw, seen & counted[..., None])
        if composed is None:
            return
        assert self.composed is not None
        composed = composed.where(rows, 0)
        values = torch.cat([attended(composed, weights[..., : len(MARKS)]), composed.sum(-1, keepdim=True)], -1)
        self.composed.add(values, torch.cat([has, counted[..., None]], -1))
        if same:
            self.composed_positional.add(composed, seen & counted[..., None])

    def columns(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The numbers of every head by name, and their standard errors."""
        names: tuple[str, ...] = (*MARKS, *SHAPE)
        means, errors = (dict(zip(names, x.T, strict=True)) for x in (self.raw.means, self.raw.errors))
        means["positional"] = self.positional.explained
        if self.composed is not None:
            names = tuple(f"composed_{name}" for name in (*MARKS, "sum"))
            for found, x in ((means, self.composed.means), (errors, self.composed.errors)):
                found.update(zip(names, x.T, strict=True))
            means["composed_positional"] = self.composed_positional.explained
        return means, errors
