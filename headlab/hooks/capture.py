"""Recording what heads carry and where they look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from ..choices import check
from ..errors import HeadlabError
from ..models.access import rows
from ..models.attention_modules import Attention, weight_blocks
from ..tables import Head
from .patterns import Look, at_patterns
from .sites import Pass, at_sites

What = Literal["scores", "pattern", "z", "result"]


@contextmanager
def capture(
    model: nn.Module,
    heads: Sequence[Head] | None = None,
    what: What = "z",
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Mapping[Head, list[Tensor]]]:
    """Record what heads carry or where they look, one tensor per head and forward pass.

    Args:
        model: a plain model or a bridge.
        heads: which heads; by default all.
        what: `z`, the head's output at its site, [batch, pos, d_head]; `result`, what it adds to the residual stream,
            [batch, pos, d_model] (the output projection's bias belongs to no head); `pattern`, its attention pattern, or
            `scores`, what the softmax is taken of, [batch, query, key] (see `patterns.Look`: dropout is then off inside).
        reduce: applied at once to every tensor, so that the whole need not be kept.

    Raises:
        HeadlabError: there is no such head, or no such thing to record; or, while running, it was not to be had.

    >>> with capture(model, hl.heads(model)[:1], "z", reduce=lambda z: z.norm(dim=-1)) as acts:  # doctest: +SKIP
    ...     model(**batch)
    """
    check("what", what, What)
    site = "probabilities" if what == "scores" else "output"  # composed heads may have the one and not the other
    found = [row for row in rows(model) if row.slots]
    known = {row.row: (row if row.compose is None else row.at(site)).heads for row in found}
    every = [head for row in found for head in known[row.row]]
    acts: dict[Head, list[Tensor]] = {head: [] for head in (every if heads is None else heads)}
    if unknown := [str(head) for head in acts if head not in every]:
        raise HeadlabError(f"the model has no heads {', '.join(unknown)}; hl.heads(model) lists them")

    def keep(row: Attention, of: Callable[[int], Tensor]) -> None:
        for i, head in enumerate(known[row.row]):
            if head in acts:
                whole = of(i).detach()
                value = whole if reduce is None else reduce(whole)
                shared = value.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                acts[head].append(value.clone() if shared else value)  # a view would keep what all heads have

    def carried(row: Attention, z: Float[Tensor, "batch pos slot d_head"], _: Pass) -> None:
        if what == "z":
            return keep(row, lambda i: z[:, :, row.head_slots[i]])
        blocks = weight_blocks(row.projection(row.family.o), row.d_head, "in")  # [slot, d_head, d_model]
        return keep(row, lambda i: z[:, :, row.head_slots[i]] @ blocks[row.head_slots[i]])

    def seen(row: Attention, look: Look) -> None:
        values = look.pattern if look.scores is None else look.scores
        keep(row, lambda i: values[:, i])

    wanted = [row for row in found if any(head in acts for head in known[row.row])]
    if what in ("z", "result"):
        recording = at_sites(model, carried, wanted)
    else:
        recording = at_patterns(model, seen, wanted, scores=what == "scores")
    with recording:
        yield acts
