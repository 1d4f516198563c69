"""The projections of one attention module, head by head, as factors of the residual stream: rows of x times a matrix.

Where projections are joined, transposed, grouped, pruned or composed is settled here, by the module's description, so that
whoever reads circuits sees `W_Q [d_model, d_head]` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .attention_modules import Attention, weight_blocks, width_out

Part = Literal["q", "k", "v", "o"]


@dataclass(frozen=True, eq=False)
class Projections:
    """What the heads of one attention module multiply with. No gradients; views where the model's layout allows it.

    Attributes:
        q, k, v: [block, d_model, d_head]; o: [block, d_head, d_model]. A block is a query head, or a key-value head.
        biases: of `q`, `k`, `v` [block, d_head] and of `o` [d_model], where there are any.
        searching: for every head that has scores, its blocks of q and of k; by the head's original number.
        carrying: for every head that has an output, its blocks of v and of o.
    """

    q: Float[Tensor, "query d_model d_head"]
    k: Float[Tensor, "key d_model d_head"]
    v: Float[Tensor, "value d_model d_head"]
    o: Float[Tensor, "output d_head d_model"]
    biases: Mapping[Part, Tensor]
    searching: Mapping[int, tuple[int, int]]
    carrying: Mapping[int, tuple[int, int]]


def projections(row: Attention) -> Projections:
    """The projections of an attention module; the query, key and value biases with them.

    A head that pruning left without scores or without output (composed heads only) is missing from `searching` or
    `carrying`. A module without heads has none of either.
    """
    family, compose = row.family, row.compose
    plain = {head: (slot, kv) for slot, head, kv in _slots(row) if head is not None}
    searching, carrying = plain, {head: (kv, slot) for head, (slot, kv) in plain.items()}
    n_slots, keys, values = len(row.slots), len(row.groups), len(row.groups)
    if compose is not None and row.slots:
        queries, outputs = compose.held("scores"), compose.kept["output"]
        read, carried = compose.groups_held("scores"), compose.groups_held("output")
        searching = {head: (queries.index(head), read.index(head // compose.ratio)) for head in compose.kept["scores"]}
        carrying = {head: (carried.index(head // compose.ratio), slot) for slot, head in enumerate(outputs)}
        n_slots, keys, values = len(queries), len(read), len(carried)
    output = row.projection(family.o)
    found: dict[Part, Tensor] = {}
    biases: dict[Part, Tensor] = {}
    parts: tuple[tuple[Part, int], ...] = (("q", n_slots), ("k", keys), ("v", values))
    for part, n_blocks in parts:
        projection = row.projection(getattr(family, part)) if row.slots else None
        if projection is None:
            found[part] = output.weight.new_zeros(0, width_out(output), row.d_head)
            continue
        blocks = _range([family.block(part, i, n_slots, keys) for i in range(n_blocks)])
        found[part] = weight_blocks(projection, row.d_head, "out").detach()[blocks].transpose(1, 2)
        if projection.bias is not None:
            biases[part] = projection.bias.detach().unflatten(0, (-1, row.d_head))[blocks]
    found["o"] = weight_blocks(output, row.d_head, "in").detach()
    if output.bias is not None:
        biases["o"] = output.bias.detach()
    return Projections(**found, biases=biases, searching=searching, carrying=carrying)


def _range(blocks: list[int]) -> slice:
    """Blocks as a slice, which gives a view: in every layout they are evenly apart."""
    step = blocks[1] - blocks[0] if len(blocks) > 1 else 1
    return slice(blocks[0], blocks[-1] + 1, step) if blocks else slice(0, 0)


def _slots(row: Attention) -> list[tuple[int, int | None, int]]:
    """Query slot, the head in it, and the key-value head it reads."""
    pairs = [(head, kv) for kv, (_, heads) in enumerate(row.groups) for head in heads]
    return [(slot, head, kv) for slot, (head, kv) in enumerate(pairs)]


def wide(x: Tensor) -> Tensor:
    """In float32 at least: half precision has too few digits for products of factors."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
