"""A backend of `headlab.dcmha.attention` for one query and many short sequences: sums of products.

What the eager backend computes as matrix products would be one tiny product for every sequence and head, here 100,000 at
a time, of one row each; a GPU spends most of its time beginning them.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from headlab.dcmha.attention import BACKENDS, Problem
from headlab.dcmha.compose import Compose, Side


def fits(problem: Problem) -> bool:
    """Whether this backend computes a problem: one query that sees everything; all heads, in one group; no gates."""
    compose, visible = problem.compose, problem.visible
    everything = not visible.causal and visible.window is None and visible.real is None and visible.seen is None
    whole = compose.groups == 1 and all(len(heads) == compose.n_heads for heads in compose.kept.values())
    return problem.q.shape[2] == 1 and everything and whole and not problem.gates and not problem.dropout


def single(problem: Problem) -> tuple[Tensor, None]:
    """z [batch, head, 1, d_head]; the pattern is not kept."""
    compose, query, key = problem.compose, problem.query, problem.key
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))  # [batch, pos, head, d_head], as it lies
    scores = _mixed(compose, "pre", (q * k).sum(-1) * problem.scale, query["pre_query"], key["pre_key"])
    pattern = _mixed(compose, "post", scores.softmax(1), query["post_query"], key["post_key"])
    z = (pattern[..., None] * v).sum(1, keepdim=True)
    return z.transpose(1, 2), None


def _mixed(
    compose: Compose, stage: str, a: Float[Tensor, "batch key head"], query: Side, key: Side
) -> Float[Tensor, "batch key head"]:
    total = a if compose.residual else 0 * a
    if (place := f"{stage}_base") in compose.places:
        total = total + compose.scale[place] * (a.flatten(0, 1) @ compose.base_map(stage)).view_as(a)
    for side, factors in (("query", query), ("key", key)):  # a query's are [batch, 1, ...], the keys' [batch, key, ...]
        if factors.w1 is not None and factors.w2 is not None:
            hidden = (a[:, :, None] * factors.w1).sum(-1, keepdim=True)  # [batch, key, rank, 1]
            total = total + compose.scale[f"{stage}_{side}"] * (hidden * factors.w2).sum(2)
        if factors.gate is not None:
            total = total + compose.scale[f"{stage}_{side}_gate"] * a * factors.gate
    return total


BACKENDS["single"] = single
