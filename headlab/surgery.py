"""Physical pruning: a mask becomes a model whose projections really are smaller, and which computes what the masked one did.

Importing this module also registers pruned models with transformers: afterwards `AutoModel*.from_pretrained` opens them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import pruned
from .errors import HeadlabError
from .families import Attention, Groups, weight_blocks
from .gates import Fill, check_site
from .models import fingerprint, head_rows, restored, rows
from .results import building
from .scores import HeadMask
from .sites import is_hooked

if TYPE_CHECKING:
    import pandas as pd

Policy = Literal["pad", "ungroup", "strict"]


def prune(
    model: nn.Module, mask: HeadMask, fill: Fill | None = None, gqa: Policy = "pad", site: str = "output"
) -> PreTrainedModel:
    """A new, smaller model that computes what `model` computes under `mask`; `model` stays as it was.

    Args:
        model: a plain model, a pruned one, or a bridge (a clean copy is restored first).
        mask: which heads stay; any mask will do.
        fill: constant means (`hl.fill(...)`), folded into the output projection's bias; by default zero.
        gqa: where the groups left in a layer keep unequal numbers of query heads: `pad` with query heads of zeros (the
            cache stays small), `ungroup` (each query head gets its own copy of keys and values), or `strict`: raise.

    Returns:
        An ordinary Hugging Face model (`save_pretrained`, `generate`, training). Head labels stay the original ones;
        `hl.kept(small)` says what is left where.

    Raises:
        HeadlabError: a mask or fill for another model, a fill that is not constant, a bridge in compatibility mode,
            uneven groups under `strict`.
    """
    check_site(site)
    if gqa not in ("pad", "ungroup", "strict"):
        raise HeadlabError(f"gqa is 'pad', 'ungroup' or 'strict', not {gqa!r}")
    if is_hooked(model):
        raise HeadlabError("the model is being masked or captured right now: leave that block before you prune it")
    plain = restored(model)
    found = rows(plain)
    mask.check(head_rows(plain), fingerprint(plain))
    if fill is not None:
        fill.check(plain)
        if not fill.constant:
            raise HeadlabError(
                f"a fill of kind {fill.how!r} depends on the input, so no smaller model can hold it: "
                "prune with a constant one (hl.fill(model, batches)) or with zeros (fill=None)"
            )
    kept = [{h.index for h, keep in zip(r.heads, mask.rows[r.row], strict=True) if keep} for r in found]
    groups = [_regroup(row, left, gqa) for row, left in zip(found, kept, strict=True)]
    added = [None if fill is None else _folded(row, fill.values[row.row], kept[row.row]) for row in found]
    before = getattr(plain.config, "headlab", None) or {"before": [[len(r.heads), len(r.groups)] for r in found]}

    small = copy.deepcopy(plain)
    config = small.config
    # The classes change in place: submodules share this config, and the model keeps what was set on it.
    config.__class__ = pruned.config_class(type(config))  # type: ignore[arg-type]  # mypy takes no class for hashable
    config.headlab = {
        "groups": groups,
        "bias": [a is not None or r.projection(r.family.o).bias is not None for r, a in zip(found, added, strict=True)],
        "before": before["before"],
    }
    small.__class__ = pruned.model_class(type(small))  # type: ignore[arg-type]  # mypy takes no class for hashable
    pruned.shrink(small, groups, config.headlab["bias"])
    for row, extra in zip(rows(small), added, strict=True):
        if extra is not None:
            bias = row.projection(row.family.o).bias
            bias.data = (bias.double() + extra).to(bias.dtype)
    return small


def _regroup(row: Attention, kept: set[int], gqa: Policy) -> Groups:
    """The heads left, by key-value head, in equal numbers: groups without a query head go, uneven ones as `gqa` says."""
    left = [(group, tuple(h for h in heads if h in kept)) for group, heads in row.groups]
    left = [(group, heads) for group, heads in left if heads]
    sizes = {len(heads) for _, heads in left}
    if len(sizes) < 2:
        return tuple(left)
    if gqa == "strict":
        raise HeadlabError(
            f"{row.path}: the mask leaves {[len(heads) for _, heads in left]} query heads to its key-value heads; choose "
            "gqa='pad' or 'ungroup', or a mask of whole groups (scores.keep(..., unit='group'))"
        )
    if gqa == "ungroup":
        return tuple((group, (head,)) for group, heads in left for head in heads)
    return tuple((group, heads + (None,) * (max(sizes) - len(heads))) for group, heads in left)


def _folded(row: Attention, means: Tensor, kept: set[int]) -> Tensor | None:
    """What the removed heads' means add to the residual stream, [d_model] in float64; None where no head goes."""
    gone = [i for i, head in enumerate(row.heads) if head.index not in kept]
    if not gone:
        return None
    weight = weight_blocks(row.projection(row.family.o), row.d_head, "in").detach()  # [slot, d_head, d_model]
    slots = [row.places[i] for i in gone]
    return torch.einsum("hd,hdm->m", means[gone].to(weight.device).double(), weight[slots].double())


@dataclass(frozen=True)
class Kept:
    """What pruning left of one attention module, and what there was."""

    stack: str
    layer: int
    heads: int
    heads_before: int
    slots: int  # query heads that are computed, padding included
    groups: int  # key-value heads that are computed and cached
    groups_before: int


def kept(model: PreTrainedModel) -> pd.DataFrame:
    """What is left of a pruned model, one line per attention module: heads, query slots and key-value groups.

    >>> hl.kept(small)[["heads", "slots", "groups"]].sum()  # doctest: +SKIP
    """
    import pandas as pd

    found = rows(model)
    before = (getattr(model.config, "headlab", None) or {}).get("before")
    before = before or [[len(row.heads), len(row.groups)] for row in found]
    return pd.DataFrame(
        Kept(row.stack, row.layer, len(row.heads), n_heads, len(row.slots), len(row.groups), n_groups)
        for row, (n_heads, n_groups) in zip(found, before, strict=True)
    )


def save_pruned(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """`save_pretrained` in one step: the folder appears when it is whole. Open it with `hl.load(folder)`.

    Raises:
        HeadlabError: the folder holds something already, or cannot be written.
    """
    with building(folder) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return Path(folder)
