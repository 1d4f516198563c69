"""What scores are compared with: the size of a head's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from torch import nn

from ..errors import HeadlabError
from ..models.access import is_folded, rows
from ..models.attention_modules import Attention, weight_blocks


def magnitudes(model: nn.Module, site: str) -> list[np.ndarray]:
    """The l2 norm of every head's weights in q, k, v and output projection, row by row; shared ones count for each head."""
    if is_folded(model):
        raise HeadlabError("magnitudes are taken of the model's own weights, but this bridge is in compatibility mode")
    values = []
    for row in rows(model, site):
        squares = [
            sum(
                float(weight_blocks(row.projection(path), row.d_head, side)[block].detach().double().square().sum())
                for path, block, side in _weights_of(row, head.index)
            )
            for head in row.heads
        ]
        values.append(np.sqrt(squares))
    return values


def _weights_of(row: Attention, head: int) -> Iterator[tuple[str, int, Literal["in", "out"]]]:
    """The projections that hold a head's weights, and which of their blocks: at the row's site, if heads are composed."""
    family, compose = row.family, row.compose
    if compose is None:
        groups = [group for group, _ in row.groups]
        halves = [("qkvo", row.slots, groups)]
        kv = next(group for group, heads in row.groups if head in heads)
    else:
        kv = head // compose.ratio
        both = {"scores": "qk", "output": "vo"}
        if row.site not in ("head", *both):
            raise HeadlabError(f"a head has no weights of its own at the site {row.site!r}: choose output, scores or head")
        wanted = [half for half in both if row.site in ("head", half) and head in compose.kept[half]]
        halves = [(both[half], compose.held(half), compose.groups_held(half)) for half in wanted]
    for parts, slots, groups in halves:
        for part in parts:
            if part == "o":
                yield family.o, (slots if compose is None else compose.kept["output"]).index(head), "in"
            else:
                at = slots.index(head) if part == "q" else groups.index(kv)
                yield getattr(family, part), family.block(part, at, len(slots), len(groups)), "out"
