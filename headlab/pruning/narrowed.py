"""Pruned models as ordinary Hugging Face models: they build their smaller modules before any weight is loaded.

Importing this module registers a pruned counterpart of every described model type with `AutoConfig` and `AutoModel*`, so
that `from_pretrained` opens what `save_pretrained` wrote; `headlab.loading` adds those of models with composed heads. The
counterpart's config has one more field, `headlab`: the heads left in every attention module, and which output projections
have a bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.pytorch_utils import Conv1D

from ..errors import HeadlabError
from ..models.attention_modules import Attention, Groups, attentions, transposed, weight_blocks
from ..models.families import Family, families
from ..models.variants import PRUNED, Variant


@dataclass(frozen=True)
class Left:
    """What pruning leaves of one attention module.

    Attributes:
        groups: original key-value head -> original query heads (None: a slot of zeros).
        bias: whether the output projection has a bias (a new one is zero).
        composed: where heads are composed (DCMHA): those whose `scores`, `probabilities` and `output` are left, and the
            `places` of the branches that are; `groups` are then those of the output.
    """

    groups: Groups
    bias: bool
    composed: Mapping[str, Sequence[Any]] | None = None


def there(attention: Attention) -> Left:
    """What is there of an attention module now."""
    compose = attention.compose
    composed = None if compose is None else {**compose.kept, "places": list(compose.places)}
    return Left(attention.groups, attention.projection(attention.family.o).bias is not None, composed)


def narrow(model: nn.Module, attention: Attention, left: Left) -> None:
    """Shrink one attention module to what is left, weights and bookkeeping together, in place.

    `model` is the plain model in which `attention` was found.
    """
    family, core, d_head = attention.family, attention.core, attention.d_head
    if attention.compose is not None and left.groups:
        picks = _composed_picks(attention.compose, left.composed or {})
    else:
        picks = _picks(attention, left)
    for path, blocks in family.blocks(picks.slots, picks.keys, picks.values, picks.n_slots, picks.n_kv).items():
        if attention.slots:
            _put(attention.module, path, _take(attention.projection(path), blocks, d_head, "out"))
    output = _take(attention.projection(family.o), picks.outputs, d_head, "in", left.bias)
    _put(attention.module, family.o, output)
    n_slots, n_kv = len(picks.slots), len(picks.keys)
    counts = {"slots": n_slots, "width": n_slots * d_head, "ratio": n_slots // max(n_kv, 1)}
    for name, meaning in family.counts.items():
        setattr(core, name, counts[meaning])
    if family.shared_bias:
        core.__class__ = NarrowT5Attention  # the same module, but it slices the bias that layers share
    elif not left.groups:
        core = EmptyAttention(family, d_head, getattr(core, "layer_idx", None), None if family.core else output)
        _put(model, ".".join(filter(None, (attention.path, family.core))), core)
    if attention.compose is None:
        core.headlab_groups = left.groups


@dataclass(frozen=True)
class _Picks:
    """Which query slots, keys, values and outputs stay, as indices among those there are; and how many there are."""

    slots: Sequence[int | None]
    keys: Sequence[int]
    values: Sequence[int]
    outputs: Sequence[int | None]
    n_slots: int
    n_kv: int


def _picks(attention: Attention, left: Left) -> _Picks:
    slot_of = {head: slot for slot, head in enumerate(attention.slots) if head is not None}
    kv_of = {head: kv for kv, (_, heads) in enumerate(attention.groups) for head in heads if head is not None}
    slots = [None if head is None else slot_of[head] for _, heads in left.groups for head in heads]
    kv = [next(kv_of[head] for head in heads if head is not None) for _, heads in left.groups]
    return _Picks(slots, kv, kv, slots, len(attention.slots), len(attention.groups))


def _composed_picks(compose: Any, kept: Mapping[str, Sequence[Any]]) -> _Picks:
    """The picks where heads are composed; the maps are narrowed as well."""
    before = (compose.held("scores"), compose.groups_held("scores"), compose.groups_held("output"), compose.kept["output"])
    compose.narrow({name: kept[name] for name in compose.kept}, kept["places"])
    after = (compose.held("scores"), compose.groups_held("scores"), compose.groups_held("output"), compose.kept["output"])
    slots, keys, values, outputs = ([was.index(i) for i in now] for was, now in zip(before, after, strict=True))
    return _Picks(slots, keys, values, outputs, len(before[0]), len(before[1]))


def _take(
    projection: Any,
    blocks: Sequence[int | None],
    d_head: int,
    side: Literal["in", "out"],
    bias: bool | None = None,
) -> nn.Module:
    """A projection with only these blocks of d_head rows (`out`) or columns (`in`), in this order; None gives zeros.

    `bias` says whether the result has one (by default as before). No heads at all leave an `nn.Linear` of width 0.
    """
    old, old_bias = weight_blocks(projection, d_head, side).detach(), projection.bias  # [block, d_head, other side]
    picked = [i for i in blocks if i is not None]
    filled = [at for at, i in enumerate(blocks) if i is not None]
    weight = old.new_zeros(len(blocks), *old.shape[1:])
    weight[filled] = old[picked]
    weight = weight.flatten(0, 1)
    has_bias = old_bias is not None if bias is None else bias
    conv = transposed(projection) and bool(blocks)  # Conv1D cannot have width 0
    new = Conv1D(1, 1) if conv else nn.Linear(1, 1, bias=has_bias, device="meta")
    n_in, n_out = (weight.shape[1], weight.shape[0]) if side == "out" else weight.shape
    if conv:
        new.nx, new.nf = n_in, n_out
    else:
        new.in_features, new.out_features = n_in, n_out
    stored = weight if (side == "in") == conv else weight.T
    new.weight = nn.Parameter(stored.contiguous(), requires_grad=projection.weight.requires_grad)
    if has_bias:
        if old_bias is None:
            values = weight.new_zeros(n_out)
        elif side == "in":
            values = old_bias.detach().clone()
        else:
            values = old_bias.new_zeros(len(blocks), d_head)
            values[filled] = old_bias.detach().unflatten(0, (-1, d_head))[picked]
        new.bias = nn.Parameter(values.flatten(), requires_grad=projection.weight.requires_grad)
    return new


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


class EmptyAttention(nn.Module):
    """What is left of a layer without heads: the output projection's bias, and its place in the key-value cache.

    transformers takes the length of a cache from the first layer of each kind, so an empty layer has to count tokens
    like any other: it writes one number per token.
    """

    def __init__(self, family: Family, d_head: int, layer_idx: int | None, output: nn.Module | None) -> None:
        super().__init__()
        self.headlab_family, self.headlab_groups, self.layer_idx = family, (), layer_idx
        setattr(self, family.d_head, d_head)
        if output is not None:  # else it stands beside this module
            setattr(self, family.o, output)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        hidden = args[0] if args else kwargs["hidden_states"]  # [batch, pos, d_model]
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        _count_tokens(cache, self.layer_idx, hidden, kwargs.get("encoder_hidden_states"))
        z = hidden.new_zeros(*hidden.shape[:-1], 0)
        output = getattr(self, self.headlab_family.o, None) if not self.headlab_family.core else None
        return (z if output is None else output(z)), None


def _count_tokens(
    cache: Cache | None, layer_idx: int | None, hidden: torch.Tensor, encoded: torch.Tensor | None = None
) -> int:
    """Write one number per token into a layer's cache; how many keys the layer has then.

    What cross-attention reads, `encoded`, is counted once, in a cache of its own.
    """
    read = hidden if encoded is None else encoded  # [batch, pos, d_model]
    if cache is None or layer_idx is None:
        return read.shape[1]
    if isinstance(cache, EncoderDecoderCache):
        if encoded is not None and cache.is_updated.get(layer_idx):
            return read.shape[1]
        if encoded is not None:
            cache.is_updated[layer_idx] = True
        cache = cache.self_attention_cache if encoded is None else cache.cross_attention_cache
    dummy = read.new_zeros(read.shape[0], 1, read.shape[1], 1)
    keys, _ = cache.update(dummy, dummy, layer_idx)
    return keys.shape[-2]


class NarrowT5Attention(T5Attention):
    """T5 attention with fewer heads (or none): it takes its rows of the bias that layers share, and hands on all of it."""

    headlab_groups: tuple[tuple[int, tuple[int, ...]], ...]  # no padding: every head has its own keys
    layer_idx: int

    def compute_bias(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._shared = super().compute_bias(*args, **kwargs)  # [1, all heads, query, key]
        return self._shared[:, self._rows]

    @property
    def _rows(self) -> list[int]:
        return [head for _, heads in self.headlab_groups for head in heads]

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if key_value_states is not None:
            position_bias = None  # cross-attention has none: every layer makes zeros for its own heads
        if not self._rows:
            return self._empty(hidden_states, key_value_states, position_bias, past_key_values)
        own = None if position_bias is None else position_bias[:, self._rows]
        output, own, weights = super().forward(
            hidden_states, mask, key_value_states, own, past_key_values=past_key_values, **kwargs
        )
        shared = self.__dict__.pop("_shared", own)  # made just now, if this layer owns the bias
        return output, shared if position_bias is None else position_bias, weights

    def _empty(
        self,
        hidden: torch.Tensor,
        key_value_states: torch.Tensor | None,
        position_bias: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        output = self.o(hidden.new_zeros(*hidden.shape[:-1], 0))
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        seen = seen.clone() if isinstance(seen, torch.Tensor) else seen  # a static cache counts on in place
        keys = _count_tokens(cache, self.layer_idx, hidden, key_value_states)
        if key_value_states is not None:
            return output, None, None
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = super().compute_bias(hidden.shape[1], keys, device=hidden.device, past_seen_tokens=seen)
        return output, position_bias, None


def shrink(model: nn.Module, left: Sequence[Left]) -> None:
    """Shrink every attention module of a plain model to what is left, in place."""
    rows = attentions(model)
    if len(rows) != len(left):
        raise HeadlabError(f"the pruned config describes {len(left)} attention modules, but the model has {len(rows)}")
    for attention, what in zip(rows, left, strict=True):
        slices_bias = not attention.family.shared_bias or isinstance(attention.core, NarrowT5Attention)
        if there(attention) != what or not slices_bias:
            narrow(model, attention, what)


def to_config(left: Sequence[Left]) -> dict[str, Any]:
    """What is left, as the field `headlab` of a config says it."""
    return {name: [getattr(what, name) for what in left] for name in ("groups", "bias", "composed")}


def from_config(field: Mapping[str, Any]) -> list[Left]:
    """The other way round, also out of JSON."""
    groups = [tuple((group, tuple(heads)) for group, heads in row) for row in field["groups"]]
    composed = field.get("composed") or [None] * len(groups)
    return [Left(*what) for what in zip(groups, field["bias"], composed, strict=False)]


def _build(model: Any) -> None:
    if model.config.headlab is None:
        raise HeadlabError(f"{type(model).__name__} needs a config that says which heads are left; hl.prune makes it")
    shrink(model, from_config(model.config.headlab))


PRUNING = Variant("Pruned", PRUNED, "headlab", _build, about="without some of its heads", home=__name__)
PRUNING.announce(model_type for family in families() for model_type in family.model_types)
