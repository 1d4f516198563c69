"""Attention of one query over short sequences, many at a time, without keys and values.

The score of a head for a token is q . (W_K x) = (W_K^T q) . x, and what the head carries is W_V of the tokens' mean,
weighted by its pattern. With one query, going round keys and values that way is two small products instead of two
projections of every token. The maps are applied as sums of products: as matrix products they would be one tiny product for
every sequence, and a GPU would spend its time beginning them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headlab.dcmha.compose import Compose, Side, Sides


def flat(layer: nn.Module, x: Float[Tensor, "batch pos n_in"]) -> Float[Tensor, "batch pos n_out"]:
    """A linear layer, given all tokens in one axis: with the weights of many runs, vmap makes one product per run of it,
    and not one per sequence."""
    if _watched(layer):  # who listens expects [batch, pos, ...]
        return layer(x)
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def fits(compose: Compose, *layers: nn.Module) -> bool:
    """Whether `attended` computes what these maps say: all heads are there, in one group, and nobody listens or sets gates.

    `layers` are those that it goes around: nobody may listen to them either.
    """
    inside = [*layers, compose, *compose.sites.values(), *compose.taps.values()]
    whole = compose.groups == 1 and all(len(heads) == compose.n_heads for heads in compose.kept.values())
    return whole and not any(map(_watched, inside))


def attended(
    compose: Compose,
    q: Float[Tensor, "batch head d_head"],
    w_k: Float[Tensor, "head d_head d_model"],
    w_v: Float[Tensor, "head d_head d_model"],
    x: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch head d_head"]:
    """What the heads carry to the last position, from all of them."""
    sought = torch.einsum("bhd,hdm->bhm", q * q.shape[-1] ** -0.5, w_k)  # [batch, head, d_model]
    query, key = _sides(compose, x[:, -1:], "query"), _sides(compose, x, "key")
    scores = _mixed(compose, "pre", x @ sought.transpose(1, 2), query["pre_query"], key["pre_key"])  # [batch, key, head]
    pattern = _mixed(compose, "post", scores.softmax(1), query["post_query"], key["post_key"])
    return torch.einsum("bhm,hdm->bhd", pattern.transpose(1, 2) @ x, w_v)


def _sides(compose: Compose, x: Float[Tensor, "batch pos d_model"], only: str) -> Sides:
    """What the tokens bring to the maps as queries or as keys; all in one axis, as in `flat`."""
    found = compose(x.flatten(0, 1)[None], only)
    return {
        name: Side(*(None if part is None else part[0].unflatten(0, x.shape[:2]) for part in (s.w1, s.w2, s.gate)))
        for name, s in found.items()
    }


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
