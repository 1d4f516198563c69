"""Physical pruning: a mask becomes a model whose projections really are smaller, and which computes what the masked one did.

Importing this module also tells transformers of pruned models: `AutoModel*.from_pretrained` opens them afterwards. Those
with composed heads it opens after `import headlab.surgery`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..choices import Policy, check
from ..data.batches import Batches, prepare, real_tokens
from ..data.losses import forward
from ..errors import HeadlabError
from ..hooks.fills import Fill, check_fill
from ..hooks.masking import masked
from ..hooks.sites import is_hooked
from ..models.access import bare_copy, bare_model, evaluating, fingerprint, head_rows, probe_batch, rows
from ..models.attention_modules import Attention, Groups, grouped, weight_blocks
from ..results import building
from ..scores import HeadMask
from . import narrowed
from .narrowed import Left

if TYPE_CHECKING:
    import pandas as pd


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
        site: where heads are composed (DCMHA), what is removed: the `output` (values go), the `scores` (queries and keys
            go), the whole `head`, or any other site of `masked`. The factors of the maps stay whole: they are normalised
            over all heads.

    Returns:
        An ordinary Hugging Face model (`save_pretrained`, `generate`, training). Head labels stay the original ones;
        `hl.kept(small)` says what is left where.

    Raises:
        HeadlabError: a mask or fill for another model, a fill that is not constant, a bridge in compatibility mode,
            uneven groups under `strict`.
    """
    check_fill(model, fill, site)
    check("gqa", gqa, Policy)
    if is_hooked(model):
        raise HeadlabError("the model is being masked or captured right now: leave that block before you prune it")
    plain = bare_copy(model)
    mask.check(head_rows(plain, site), fingerprint(plain))
    if fill is not None and not fill.constant:
        raise HeadlabError(
            f"a fill of kind {fill.how!r} depends on the input, so no smaller model can hold it: "
            "prune with a constant one (hl.fill(model, batches)) or with zeros (fill=None)"
        )
    gone = [
        {head.index for head, keep in zip(row.heads, mask.rows[row.row], strict=True) if not keep}
        for row in rows(plain, site)
    ]
    found = rows(plain)
    added = [None if fill is None else _folded(row, fill.values[row.row], gone[row.row]) for row in found]
    left = [
        _left(row, gone[row.row], gqa) if row.compose is None else _left_composed(row, gone[row.row], site) for row in found
    ]
    left = [replace(what, bias=True) if extra is not None else what for what, extra in zip(left, added, strict=True)]
    before = getattr(plain.config, "headlab", None) or {"before": [[len(r.heads), len(r.groups)] for r in found]}

    small = copy.deepcopy(plain)
    for row in rows(small):
        if row.compose is not None:
            _silence(row, gone[row.row], site, left[row.row])
    narrowed.PRUNING.enter(small, narrowed.to_config(left) | {"before": before["before"]})
    narrowed.shrink(small, left)
    for row, extra in zip(rows(small), added, strict=True):
        if extra is not None:
            bias = row.projection(row.family.o).bias
            bias.data = (bias.double() + extra).to(bias.dtype)
    return small


@torch.inference_mode()
def deviation(
    small: nn.Module,
    model: nn.Module,
    mask: HeadMask,
    fill: Fill | None = None,
    site: str = "output",
    batches: Batches | None = None,
) -> float:
    """How far a pruned model is from what surgery promises: the largest difference of an output (a logit, or a number of the
    last hidden state) at a real token, between it and the whole model under the mask.

    Args:
        small: what `prune(model, mask, fill, site=site)` gave, or what was saved of it and opened again.
        model, mask, fill, site: what it was made of.
        batches: what both are run on; by default a few tokens.

    Raises:
        HeadlabError: bad batches, a mask or fill of another model, or models whose outputs have different shapes.

    >>> hl.deviation(hl.load("my-small-model"), model, mask)  # doctest: +SKIP
    4.8e-07
    """
    largest = 0.0
    with evaluating(model), evaluating(small):
        for batch in prepare(model, [probe_batch(model)] if batches is None else batches):
            with masked(model, mask, fill, site):
                expected = _answer(forward(model, batch))
            found = _answer(forward(small, {name: value.to(bare_model(small).device) for name, value in batch.items()}))
            if found.shape != expected.shape:
                shapes = f"{tuple(found.shape)} and not {tuple(expected.shape)}"
                raise HeadlabError(f"the smaller model's output is {shapes}, so it was not pruned from this one")
            difference = (found.to(expected.device) - expected).abs()
            real = real_tokens(batch, "dec" if bare_model(model).config.is_encoder_decoder else "")
            if difference.ndim == 3 and difference.shape[:2] == real.shape:  # [batch, pos, ...]: not of a classifier
                difference = difference[real]
            largest = max(largest, float(difference.max()))
    return largest


def _answer(output: Any) -> Tensor:
    """What a model says: logits, or what comes first where there are none; a loss is not meant."""
    return (output.logits if "logits" in output else output[0]).double()


def _left(row: Attention, gone: set[int], gqa: Policy) -> Left:
    """What is left of plain attention without some heads."""
    return replace(narrowed.there(row), groups=_regroup(row, {head.index for head in row.heads} - gone, gqa))


def _left_composed(row: Attention, gone: set[int], site: str) -> Left:
    """What is left where heads are composed: also without what nothing reads any more."""
    compose = row.compose
    removed = {"head": ("scores", "probabilities", "output")}.get(site, (site,))
    kept = {what: [h for h in heads if not (what in removed and h in gone)] for what, heads in compose.kept.items()}
    places = [place for place in compose.places if not (place == site and gone >= set(compose.heads_at(site)))]
    # without a branch, a stage hands every head on as it is: to itself or to nobody
    if compose.residual and not any(place.startswith("post") for place in places):
        both = [head for head in kept["output"] if head in kept["probabilities"]]
        kept["probabilities"] = kept["output"] = both
    if compose.residual and not any(place.startswith("pre") for place in places):
        kept["scores"] = [head for head in kept["scores"] if head in kept["probabilities"]]
    if not kept["output"] or not kept["probabilities"]:
        return replace(narrowed.there(row), groups=(), composed=None)
    if not kept["scores"]:  # a place for the keys in the cache; `_silence` makes its scores zero
        kept["scores"] = compose.kept["scores"][:1]
    return replace(narrowed.there(row), groups=grouped(kept["output"], compose.ratio), composed={**kept, "places": places})


def _silence(row: Attention, gone: set[int], site: str, left: Left) -> None:
    """Zeros in the weights of what is removed and yet has its place in the smaller model."""
    compose = row.compose
    if left.composed is None:
        return
    if site in left.composed["places"]:
        compose.silence(site, gone)
    if site in ("scores", "head"):
        queries = weight_blocks(row.projection(row.family.q), row.d_head, "out")
        bias = row.projection(row.family.q).bias
        for head in gone & set(left.composed["scores"]):
            slot = compose.held("scores").index(head)
            block = row.family.block("q", slot, len(compose.held("scores")), len(compose.groups_held("scores")))
            queries.data[block] = 0
            if bias is not None:
                bias.data.unflatten(0, (-1, row.d_head))[block] = 0


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


def _folded(row: Attention, means: Tensor, removed: set[int]) -> Tensor | None:
    """What the removed heads' means add to the residual stream, [d_model] in float64; None where no head goes."""
    gone = [i for i, head in enumerate(row.heads) if head.index in removed]
    if not gone:
        return None
    weight = weight_blocks(row.projection(row.family.o), row.d_head, "in").detach()  # [slot, d_head, d_model]
    slots = [row.head_slots[i] for i in gone]
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
    values: int  # the same, of values: composed heads may have scores and no output, or the other way round


def kept(model: PreTrainedModel) -> pd.DataFrame:
    """What is left of a pruned model, one line per attention module: heads, query slots and key-value groups.

    >>> hl.kept(small)[["heads", "slots", "groups"]].sum()  # doctest: +SKIP
    """
    import pandas as pd

    found = rows(model)
    before = (getattr(model.config, "headlab", None) or {}).get("before")
    before = before or [[len(row.heads), len(row.groups)] for row in found]
    return pd.DataFrame(
        Kept(row.stack, row.layer, len(row.heads), n_heads, *_computed(row, "scores"), n_groups, _computed(row, "output")[1])
        for row, (n_heads, n_groups) in zip(found, before, strict=True)
    )


def _computed(row: Attention, half: str) -> tuple[int, int]:
    """How many query slots and key-value heads are computed for the scores, or for the output."""
    if row.compose is None:
        return len(row.slots), len(row.groups)
    return len(row.compose.held(half)), len(row.compose.groups_held(half))


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
