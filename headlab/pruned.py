"""Pruned models as ordinary Hugging Face models: they build their smaller modules before any weight is loaded.

Importing this module (or `headlab.surgery`) registers a pruned counterpart of every described model type with
`AutoConfig` and `AutoModel*`, so that `from_pretrained` opens what `save_pretrained` wrote. The counterpart's config
has one more field, `headlab`: the heads left in every attention module, and which output projections have a bias.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.pytorch_utils import Conv1D

from .errors import HeadlabError
from .families import PRUNED, Attention, Family, Groups, attentions, families, transposed, weight_blocks


def narrow(model: nn.Module, attention: Attention, groups: Groups, bias: bool) -> None:
    """Shrink one attention module to the heads in `groups`, weights and bookkeeping together, in place.

    Args:
        model: a plain model, in which `attention` was found.
        groups: what is left: original key-value head -> original query heads (None: a slot of zeros).
        bias: whether the output projection has a bias afterwards (a new one is zero).
    """
    family, core, d_head = attention.family, attention.core, attention.d_head
    slot_of = {head: slot for slot, head in enumerate(attention.slots) if head is not None}
    kv_of = {head: kv for kv, (_, heads) in enumerate(attention.groups) for head in heads if head is not None}
    slots = [None if head is None else slot_of[head] for _, heads in groups for head in heads]
    kv = [next(kv_of[head] for head in heads if head is not None) for _, heads in groups]

    for path, blocks in family.blocks(slots, kv, len(attention.slots), len(attention.groups)).items():
        if attention.slots:
            _put(attention.module, path, _take(attention.projection(path), blocks, d_head, "out"))
    output = _take(attention.projection(family.o), slots, d_head, "in", bias)
    _put(attention.module, family.o, output)
    counts = {"slots": len(slots), "width": len(slots) * d_head, "ratio": len(slots) // max(len(kv), 1)}
    for name, meaning in family.counts.items():
        setattr(core, name, counts[meaning])
    if family.shared_bias:
        core.__class__ = NarrowT5Attention  # the same module, but it slices the bias that layers share
    elif not slots:
        core = EmptyAttention(family, d_head, getattr(core, "layer_idx", None), None if family.core else output)
        _put(model, ".".join(filter(None, (attention.path, family.core))), core)
    core.headlab_groups = groups


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
    places = [place for place, i in enumerate(blocks) if i is not None]
    weight = old.new_zeros(len(blocks), *old.shape[1:])
    weight[places] = old[picked]
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
            values[places] = old_bias.detach().unflatten(0, (-1, d_head))[picked]
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


def shrink(model: nn.Module, groups: Sequence[Groups], bias: Sequence[bool]) -> None:
    """Shrink every attention module of a plain model to these heads, in place."""
    rows = attentions(model)
    if not len(rows) == len(groups) == len(bias):
        raise HeadlabError(f"the pruned config describes {len(groups)} attention modules, but the model has {len(rows)}")
    for attention, left, has_bias in zip(rows, groups, bias, strict=True):
        had_bias = attention.projection(attention.family.o).bias is not None
        slices_bias = not attention.family.shared_bias or isinstance(attention.core, NarrowT5Attention)
        if (attention.groups, had_bias) != (left, has_bias) or not slices_bias:
            narrow(model, attention, left, has_bias)


def freeze(groups: Any) -> Groups:
    """Groups as they come out of JSON, as tuples."""
    return tuple((group, tuple(heads)) for group, heads in groups)


@functools.cache
def config_class(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The config class of pruned models of a kind, registered with `AutoConfig`."""
    if base.model_type.startswith(PRUNED):
        return base

    def __post_init__(self: PretrainedConfig, **kwargs: Any) -> None:
        base.__post_init__(self, **kwargs)
        _register_models(type(self), base)  # type: ignore[arg-type]  # mypy takes no class for hashable

    body = {
        "model_type": PRUNED + base.model_type,
        "headlab": None,
        "__annotations__": {"headlab": dict | None},
        "__post_init__": __post_init__,
        "__module__": __name__,
        "__doc__": f"{base.__name__} of a model without some of its heads: `headlab` lists what is left.",
    }
    made: type[PretrainedConfig] = type(f"Pruned{base.__name__}", (base,), body)
    AutoConfig.register(made.model_type, made, exist_ok=True)
    return made


@functools.cache
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of pruned models that compute what `base` does."""
    base_config: Any = base.config_class
    if base_config.model_type.startswith(PRUNED):
        return base

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        if config.headlab is None:
            raise HeadlabError(f"{type(self).__name__} needs a config that says which heads are left; hl.prune makes it")
        shrink(self, [freeze(row) for row in config.headlab["groups"]], config.headlab["bias"])

    body = {
        "config_class": config_class(base_config),
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"{base.__name__} with fewer heads; made by `headlab.prune`.",
    }
    return type(f"Pruned{base.__name__}", (base,), body)


@functools.cache
def _register_models(pruned_config: type[PretrainedConfig], base_config: type[PretrainedConfig]) -> None:
    """Tell every AutoModel class of its pruned counterpart; on first use, for it imports the modelling code."""
    for name in modeling_auto.__dict__:
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and base_config in mapping:
            found = mapping[base_config]
            base = found[0] if isinstance(found, tuple) else found
            if base.config_class is base_config:  # JevForDecision opens Qwen 2, but with a config of its own
                auto.register(pruned_config, model_class(base), exist_ok=True)


for _family in families():
    for _model_type in _family.model_types:
        if _model_type in CONFIG_MAPPING:
            config_class(CONFIG_MAPPING[_model_type])  # type: ignore[arg-type]  # mypy takes no class for hashable
