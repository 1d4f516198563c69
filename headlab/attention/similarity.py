"""Which heads attend alike: distances between the patterns of all heads, clusters, and a map in two dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.batches import Batch, Batches, describe_data, prepare, real_tokens
from ..data.losses import forward
from ..errors import HeadlabError
from ..hooks.patterns import Look, at_patterns
from ..models.access import bare_model, describe, evaluating, rows
from ..models.attention_modules import Attention
from ..results import Result
from ..tables import Head, read_heads, write_heads

if TYPE_CHECKING:
    import pandas as pd

ROOM = 2**28  # bytes of sampled patterns that are kept at a time
CACHED = 2**18  # numbers of a pattern that are compared at a time, for a processor's cache to hold them


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(Result):
    """How differently heads attend, as made by `similarity`.

    Attributes:
        heads: all heads, in order.
        distances: [head, head], the mean Jensen-Shannon divergence in nats, from 0 (the same pattern) to log 2 (no key in
            common); NaN between stacks (encoder, decoder, cross), whose queries or keys are not the same.
        clusters: of every head, numbered in the order of their first heads; heads of different stacks are never in one.
        points: [head, 2], a map on which the distance between heads of one stack is about the root of their divergence.
        record: how it was made.
    """

    kind = "similarity"
    heads: tuple[Head, ...]
    distances: Float[np.ndarray, "head head"]
    clusters: tuple[int, ...]
    points: Float[np.ndarray, "head 2"]
    record: dict[str, Any] = field(default_factory=dict)

    def nearest(self, head: Head | str, k: int = 5) -> list[tuple[Head, float]]:
        """The k heads that attend most like this one, with their divergences.

        Raises:
            HeadlabError: there is no such head.
        """
        names = [str(one) for one in self.heads]
        if str(head) not in names:
            raise HeadlabError(f"there is no head {head} here, but {len(names)} from {names[0]} to {names[-1]}")
        own = names.index(str(head))
        others = [i for i in np.argsort(self.distances[own], kind="stable") if i != own]
        return [(self.heads[i], float(self.distances[own, i])) for i in others if not np.isnan(self.distances[own, i])][:k]

    def top(self, k: int = 10) -> list[tuple[Head, Head, float]]:
        """The k pairs of heads that attend most alike, with their divergences."""
        first, second = np.triu_indices(len(self.heads), 1)
        values = self.distances[first, second]
        order = [i for i in np.argsort(values, kind="stable")[:k] if not np.isnan(values[i])]
        return [(self.heads[first[i]], self.heads[second[i]], float(values[i])) for i in order]

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per head: cluster, point on the map, and the nearest head."""
        import pandas as pd

        lines = []
        for i, head in enumerate(self.heads):
            close = self.nearest(head, 1)
            x, y = (float(value) for value in self.points[i])
            line = head.columns | {"cluster": self.clusters[i], "x": x, "y": y}
            line |= {"nearest": str(close[0][0]) if close else "", "divergence": close[0][1] if close else np.nan}
            lines.append(line)
        return pd.DataFrame(lines)

    def _body(self) -> dict[str, Any]:
        upper = self.distances[np.triu_indices(len(self.heads), 1)]
        return {
            "heads": write_heads(self.heads),
            "distances": [None if np.isnan(x) else x for x in upper.tolist()],
            "clusters": list(self.clusters),
            "places": self.points.tolist(),
        }

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        heads = read_heads(body["heads"])
        distances = np.zeros((len(heads), len(heads)))
        distances[np.triu_indices(len(heads), 1)] = np.array(body["distances"], dtype=float)
        points = np.array(body["places"], dtype=float).reshape(len(heads), 2)
        return cls(heads, distances + distances.T, tuple(body["clusters"]), points, record)

    def __repr__(self) -> str:
        return f"Similarity({len(self.heads)} heads in {len(set(self.clusters))} clusters)"


def similarity(model: nn.Module, batches: Batches, *, queries: int = 256, clusters: int = 8, seed: int = 0) -> Similarity:
    """How differently all heads of a model attend: the Jensen-Shannon divergence of their patterns, averaged over queries.

    It is measured as Clark et al. 2019 (arXiv:1906.04341, section 6) do, for the same query of each pair of heads, on a
    sample of the real queries (that see more than one key); on these it is exact. Heads of different layers are compared
    too, without keeping patterns: a batch's sampled rows of all heads are kept until they are compared, in 256 MiB at most
    (a batch whose sample needs more runs several times), or in those of one query, if a single one needs more.

    Composed heads (DCMHA) are compared by their raw patterns, the softmax itself: only these are distributions.

    Args:
        model: a plain model or a bridge, left as it was.
        batches: as for `importance`.
        queries: how many queries are sampled, in each stack; all if there are fewer.
        clusters: in how many clusters heads are put, in each stack: average linkage over the roots of the divergences
            (which are a metric), as for the map, which scikit-learn's SMACOF makes from classical scaling.
        seed: of the sample.

    Raises:
        HeadlabError: bad batches or options; no query that sees two keys.
    """
    for name, value in (("queries", queries), ("clusters", clusters)):
        if value < 1:
            raise HeadlabError(f"{name} must be at least 1, not {value}")
    data = prepare(model, batches)
    stacks: dict[str, list[Attention]] = {}
    for row in rows(model):
        if row.slots:
            stacks.setdefault(row.stack, []).append(row)
    heads: list[Head] = []
    blocks: list[np.ndarray] = []
    labels: list[int] = []
    points: list[np.ndarray] = []
    counts: dict[str, int] = {}
    for stack, members in stacks.items():
        own = [head for row in members for head in _compared(row)]
        sample = _sample(data, stack, queries, seed)
        found = _divergences(model, data, members, sample, len(own))
        heads += own
        counts[stack or "all"] = len(sample)
        blocks.append(found)
        before = max(labels, default=-1) + 1
        labels += [before + label for label in _clusters(np.sqrt(found), clusters)]
        points.append(_map(np.sqrt(found)))
    distances = np.full((len(heads), len(heads)), np.nan)
    start = 0
    for block in blocks:
        distances[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    record = {"model": describe(model), "data": describe_data(data), "queries": counts, "clusters": clusters, "seed": seed}
    return Similarity(tuple(heads), distances, tuple(labels), np.concatenate([*points, np.zeros((0, 2))]), record)


def divergences(patterns: Float[Tensor, "head query key"]) -> Float[Tensor, "head head"]:
    """The Jensen-Shannon divergences of all pairs of heads, summed over queries; in float64.

    That of p and q is the entropy of (p + q) / 2, less the mean of the entropies of p and q.
    """
    n_heads = len(patterns)
    flat = patterns.flatten(1)
    flat = flat[:, (flat != 0).any(0)]  # the keys that no head attends to add nothing
    mixed, single = flat.new_zeros(n_heads, n_heads, dtype=torch.float64), flat.new_zeros(n_heads, dtype=torch.float64)
    for part in flat.split(max(1, CACHED // n_heads), 1):  # [head, column]
        single += _nats(part)
        for head in range(n_heads - 1):
            mixed[head, head + 1 :] += _nats((part[head + 1 :] + part[head]).mul_(0.5))
    found = (mixed - (single[:, None] + single) / 2).triu(1).clamp(min=0)
    return found + found.T


def _nats(p: Float[Tensor, "head column"]) -> Float[Tensor, " head"]:
    """The entropies' sum; by logarithms rather than `entr`, which is slow on a CPU."""
    return -(p.clamp(min=torch.finfo(p.dtype).tiny).log_().mul_(p)).sum(-1)


Query = tuple[int, int, int]
"""Batch, example, position."""


def _compared(row: Attention) -> tuple[Head, ...]:
    return row.heads if row.compose is None else row.at("probabilities").heads


def _sample(data: list[Batch], stack: str, n: int, seed: int) -> list[Query]:
    """Real queries drawn from all of them, the first of an example apart (in causal layers it sees one key only)."""
    found = []
    for number, batch in enumerate(data):
        real = real_tokens(batch, stack)
        first = real.long().cumsum(-1) == 1
        found += [(number, int(example), int(pos)) for example, pos in (real & ~first).nonzero().tolist()]
    if not found:
        raise HeadlabError("no example has two tokens, so no head has a choice of what to attend to: give longer texts")
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(found), size=min(n, len(found)), replace=False)
    return [found[i] for i in sorted(chosen)]


def _divergences(
    model: nn.Module, data: list[Batch], members: list[Attention], sample: list[Query], n_heads: int
) -> np.ndarray:
    """Mean divergences [head, head] over the sampled queries."""
    total = np.zeros((n_heads, n_heads))
    parts = list(_parts(data, members[0].stack, sample, n_heads))
    with evaluating(model), torch.inference_mode():
        for number, wanted in tqdm(parts, desc=f"similarity {members[0].stack}".strip(), unit="pass", disable=None):
            kept: list[Tensor] = []
            examples, positions = torch.tensor(wanted, device=bare_model(model).device).T

            def see(row: Attention, look: Look) -> None:
                rows_of = look.raw[examples, :, positions].transpose(0, 1)  # noqa: B023  # [head, query, key]
                kept.append(rows_of.to(torch.promote_types(rows_of.dtype, torch.float32)))  # noqa: B023

            with at_patterns(model, see, members):
                forward(model, data[number])
            total += divergences(torch.cat(kept)).cpu().numpy()
    if not np.isfinite(total).all():
        raise HeadlabError("a pattern holds NaN, so heads cannot be compared: look at the model's weights and the batches")
    return np.round(total / len(sample), 7)  # so that what is saved is what was there


def _parts(data: list[Batch], stack: str, sample: list[Query], n_heads: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The sampled queries batch by batch, in parts whose patterns have room."""
    for number, batch in enumerate(data):
        wanted = [(example, pos) for one, example, pos in sample if one == number]
        longest = max(real_tokens(batch, name).shape[1] for name in ("", stack))
        size = max(1, ROOM // (4 * n_heads * longest))
        for start in range(0, len(wanted), size):
            yield number, wanted[start : start + size]


def _clusters(distances: np.ndarray, n: int) -> list[int]:
    """Clusters by average linkage, numbered from 0 in the order in which they first appear."""
    from sklearn.cluster import AgglomerativeClustering

    if len(distances) < 2:
        return [0] * len(distances)
    found = AgglomerativeClustering(min(n, len(distances)), metric="precomputed", linkage="average").fit_predict(distances)
    order = list(dict.fromkeys(found.tolist()))
    return [order.index(label) for label in found.tolist()]


def _map(distances: np.ndarray) -> np.ndarray:
    """Points [head, 2] at about these distances: classical scaling, improved by SMACOF."""
    from sklearn.manifold import smacof

    n = len(distances)
    if n < 3 or not distances.any():
        points = np.zeros((n, 2))
        points[1:, 0] = distances[0, 1:]
        return points
    squares = distances**2
    centred = squares - squares.mean(0) - squares.mean(1, keepdims=True) + squares.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    vectors = vectors[:, [-1, -2]]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), [0, 1]])  # eigenvectors have no sign of their own
    start = vectors * np.sqrt(values[[-1, -2]].clip(1e-12))
    points, _ = smacof(distances, n_components=2, init=start, n_init=1, random_state=0, normalized_stress=False)
    return np.round(points, 7)
