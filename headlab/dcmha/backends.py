"""Attention with composed heads: one function, and backends that compute it.

    scores = q k^T * scale -> compose (pre) -> mask -> softmax -> compose (post) -> times v

A backend is a function of one `Problem`; `BACKENDS` names them. `eager` computes everything at once and passes every
tensor through the taps of the maps; `chunked` goes through the queries in blocks and keeps nothing of a block for the
backward pass but its inputs, so that memory grows with the length of the text and not with its square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import HeadlabError
from .branches import STAGES
from .compose import Compose, Constants, Sides

BLOCK = 128  # queries at a time, in the chunked backend


@dataclass(frozen=True)
class Visible:
    """Which keys every query sees. Query t stands at position `past + t` among the keys.

    Attributes:
        past: how many keys come before the first query.
        causal: no query sees a later key.
        window: how many keys a query sees, itself included; None: all of them.
        real: False for keys that are padding.
        seen: any other mask, True where a key is seen.
    """

    past: int | Tensor = 0
    causal: bool = True
    window: int | None = None
    real: Bool[Tensor, "batch key"] | None = None
    seen: Bool[Tensor, "batch _ query key"] | None = None

    def block(self, start: int, stop: int, n_keys: int, device: torch.device) -> tuple[slice, Tensor | None]:
        """For queries start to stop: a range of keys that holds all they see, and which of these each one sees."""
        first, last = 0, n_keys
        if isinstance(self.past, int):
            last = min(n_keys, self.past + stop) if self.causal else n_keys
            first = max(0, self.past + start - self.window + 1) if self.window is not None else 0
        keys = slice(first, last)
        mask = None
        if self.causal or self.window is not None:
            queries = torch.arange(start, stop, device=device)[:, None] + self.past
            distance = queries - torch.arange(first, last, device=device)  # [query, key]
            mask = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
            if self.window is not None:
                mask = mask & (distance < self.window)
            mask = mask[None, None]
        real = self.real
        if real is not None and real.shape[1] < n_keys:  # a cache of fixed size has places that no token has taken yet
            real = F.pad(real, (0, n_keys - real.shape[1]))
        for other in (
            None if real is None else real[:, None, None, keys],
            None if self.seen is None else self.seen[:, :, start:stop, keys],
        ):
            if other is not None:
                mask = other if mask is None else mask & other
        return keys, mask


@dataclass(frozen=True)
class Problem:
    """One layer's attention, as a backend gets it."""

    q: Float[Tensor, "batch source query d_head"]
    k: Float[Tensor, "batch source key d_head"]
    v: Float[Tensor, "batch output key d_value"]
    compose: Compose
    query: Sides  # `pre_query` and `post_query` of these queries
    key: Sides  # `pre_key` and `post_key` of these keys
    gates: dict[str, Tensor]  # by site, [batch, head, query, 1]
    visible: Visible
    scale: float
    dropout: float = 0.0


def attend(
    problem: Problem, backend: str = "eager"
) -> tuple[Float[Tensor, "batch query output d_value"], Float[Tensor, "batch output query key"] | None]:
    """What every head carries, and (from `eager`) the composed pattern, whose rows need not sum to 1.

    A query that sees no key gets zeros.
    """
    name = "eager" if problem.compose.tapped() else check_backend(backend)
    z, pattern = BACKENDS[name](problem)
    if "output" in problem.gates:
        z = z * problem.gates["output"]
    return z.transpose(1, 2), pattern


def eager(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """All queries and keys at once."""
    return _block(problem, problem.compose.constants(), 0, problem.q.shape[2])


def chunked(problem: Problem) -> tuple[Tensor, None]:
    """Block by block of queries; in training every block is computed again for its gradient."""
    n_queries, constants = problem.q.shape[2], problem.compose.constants()
    z = []
    for start in range(0, n_queries, BLOCK):
        stop = min(start + BLOCK, n_queries)
        if torch.is_grad_enabled():
            rng = problem.dropout > 0
            z.append(checkpoint(_z, problem.q, problem, constants, start, stop, use_reentrant=False, preserve_rng_state=rng))
        else:
            z.append(_z(problem.q, problem, constants, start, stop))
    return torch.cat(z, 2), None


Backend = Callable[[Problem], tuple[Tensor, Tensor | None]]
BACKENDS: dict[str, Backend] = {"eager": eager, "chunked": chunked}


def check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise HeadlabError(f"the backend is one of {', '.join(map(repr, BACKENDS))}, not {name!r}")
    return name


def _z(_: Tensor, problem: Problem, constants: Constants, start: int, stop: int) -> Tensor:
    # `checkpoint` restores the random state, which dropout needs, of the devices of the tensors it is given: the first one
    return _block(problem, constants, start, stop)[0]


def _block(problem: Problem, constants: Constants, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """z and the composed pattern of some queries: [batch, output, query, d_value] and [batch, output, query, key]."""
    compose, taps = problem.compose, problem.compose.taps
    rows, whole = slice(start, stop), stop - start == problem.q.shape[2]
    keys, mask = problem.visible.block(start, stop, problem.k.shape[2], problem.q.device)
    if whole:  # taps get every key, and the masked ones as well
        keys, mask = _all_keys(keys, mask, problem.k.shape[2])
    gates = {site: gate[:, :, rows] for site, gate in problem.gates.items()}
    pre, post = ((problem.query[f"{stage}_query"].at(rows), problem.key[f"{stage}_key"].at(keys)) for stage in STAGES)
    scores = problem.q[:, :, rows] @ problem.k[:, :, keys].transpose(-1, -2) * problem.scale
    scores = taps["scores_raw"](scores)
    if "scores" in gates:
        scores = scores * gates["scores"]
    scores = taps["scores"](compose.mix("pre", scores, *pre, gates, constants))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    pattern = F.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(problem.v.dtype)
    if mask is not None:
        pattern = pattern.masked_fill(~mask, 0)  # also where a query sees nothing at all
    pattern = taps["pattern_raw"](pattern)
    if "probabilities" in gates:
        pattern = pattern * gates["probabilities"]
    pattern = taps["pattern"](compose.mix("post", pattern, *post, gates, constants))
    weights = F.dropout(pattern, problem.dropout) if problem.dropout else pattern
    return weights @ problem.v[:, :, keys], pattern


def _all_keys(keys: slice, mask: Tensor | None, n_keys: int) -> tuple[slice, Tensor | None]:
    if (keys.start, keys.stop) == (0, n_keys):
        return keys, mask
    assert mask is not None  # a range of keys comes from a causal mask or a window
    return slice(0, n_keys), F.pad(mask, (keys.start, n_keys - keys.stop))
