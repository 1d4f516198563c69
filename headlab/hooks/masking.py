"""Multiplying heads by gates: masks, and gates in between.

A gate of 1 leaves a head as it is; a gate of 0 removes it. Without a fill the removed head's output is zero at its site:
its value bias goes with it, the output projection's own bias stays (Michel et al. 2019, section 2.3, xi).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import HeadlabError
from ..models.access import fingerprint, head_rows, rows
from ..models.attention_modules import Attention
from ..scores import HeadMask
from .fills import Fill, StandIn, check_fill
from .sites import Pass, at_sites

Gates = HeadMask | Sequence[Any] | Tensor
"""A mask; or one row of gates per layer, `[head]` or `[batch, head]`; or all in one tensor, `[..., all heads]`."""


@contextmanager
def masked(model: nn.Module, mask: Gates, fill: Fill | None = None, site: str = "output") -> Iterator[None]:
    """Run the model with heads removed (or multiplied by gates in between) inside the block.

    Args:
        model: a plain model or a bridge; it is restored in any case. Works under `generate` with a key-value cache.
        mask: a `HeadMask`, or gates; a row of shape [batch, head] gates every example differently. Masks nest.
        fill: what stands in for a removed head; by default zero.
        site: where a head is removed. `output`, its output: in plain attention that is the head, and the only site. Where
            heads are composed (DCMHA) also `scores`: its scores, before they are mixed; `probabilities`: its attention
            probabilities, before they are mixed; `head`: all three; or `pre_query`, `post_key_gate` ... (`dcmha.PLACES`):
            what one branch at one stage adds to the composed head.

    Raises:
        HeadlabError: the mask or fill is of the wrong shape or was made for another model; or, while running, a site
            did not fire.

    >>> with masked(model, HeadMask.without(heads(model), ["L3H5"])):  # doctest: +SKIP
    ...     logits = model(**batch).logits
    """
    check_fill(model, fill, site)
    found = rows(model, site)
    gates = _gates(model, mask, site)
    wanted = [row for row in found if not bool((gates[row.row] == 1).all())]
    stand_in = None if fill is None else StandIn(fill)
    by_slot_of: dict[int, Tensor] = {}  # made at the first pass, on the device of z

    def gate(row: Attention, z: Tensor, run: Pass) -> Tensor:
        by_head = gates[row.row]
        if by_head.ndim == 2 and len(by_head) != len(z):
            raise HeadlabError(f"there are gates for {len(by_head)} examples, but the batch has {len(z)}")
        if row.row not in by_slot_of or by_head.requires_grad or by_slot_of[row.row].dtype != z.dtype:
            by_slot_of[row.row] = by_slot(row, by_head, z)
        return gated(z, by_slot_of[row.row], None if stand_in is None else stand_in(row, z, run))

    with at_sites(model, gate, wanted):
        yield


def gated(z: Tensor, gates: Tensor, stand_in: Tensor | None) -> Tensor:
    """What a gate does: z * xi + stand_in * (1 - xi), where nothing stands in: z * xi. Gates are those of `by_slot`."""
    return z * gates if stand_in is None else z * gates + (1 - gates) * stand_in


@torch.inference_mode(mode=False)  # a later pass may be for gradients
def by_slot(row: Attention, gates: Tensor, z: Tensor) -> Tensor:
    """Gates of heads, [head] or [batch, head], as gates of slots that multiply z, [batch or 1, 1, slot, 1]."""
    found = torch.ones(*gates.shape[:-1], len(row.slots), dtype=z.dtype)
    found[..., row.head_slots] = gates.to("cpu", z.dtype)
    return found.view(-1, 1, len(row.slots), 1).to(z.device)


def _gates(model: nn.Module, mask: Gates, site: str) -> list[Tensor]:
    """One tensor of gates per row, `[head]` or `[batch, head]`."""
    heads = head_rows(model, site)
    lengths = [len(row) for row in heads]
    if isinstance(mask, HeadMask):
        mask.check(heads, fingerprint(model) if "model" in mask.record else None)
        return [torch.from_numpy(row) for row in mask.rows]
    if isinstance(mask, Tensor):
        if mask.ndim == 0 or mask.shape[-1] != sum(lengths):
            raise HeadlabError(f"the gates have the shape {tuple(mask.shape)}, but the model has {sum(lengths)} heads")
        mask = list(mask.split(lengths, dim=-1))
    gates = [row if isinstance(row, Tensor) else torch.from_numpy(np.asarray(row, dtype=np.float64)) for row in mask]
    if [row.shape[-1] if row.ndim in (1, 2) else None for row in gates] != lengths:
        shapes = [tuple(row.shape) for row in gates]
        raise HeadlabError(f"the gates have the shapes {shapes}, but the model has rows of {lengths} heads")
    return gates
