"""Composable heads for other models: any Hugging Face model with plain or grouped attention that headlab describes.

`attach` gives every attention module of a model maps (`Compose`), as its submodule `compose`, and has its attention
computed with them, by a function that transformers knows as the attention implementation `headlab_composed`. The maps
start as the identity, so that at first the model computes exactly what it did with its `eager` implementation; only a
query that sees no key at all (padding) now gets zeros.

The model becomes one of a class of its own, `ComposedLlamaForCausalLM`, whose config has one more field, `composed`: the
arguments of `attach`. It saves and reloads like any other once `headlab.dcmha` is imported.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.generic import TransformersKwargs

from ..errors import HeadlabError
from ..models.attention_modules import Attention, attentions, width_in
from ..models.families import families
from ..models.variants import PRUNED, Variant, base_of
from .backends import Problem, Visible, attend, check_backend
from .branches import BRANCHES, STAGES
from .cache import remember
from .compose import Compose, Sides

IMPLEMENTATION = "headlab_composed"
COMPOSED = "composed_"  # how the model type of a model with attached maps begins: composed_llama
# what attention functions are given beside what they compute with, and may leave aside (masks know of windows)
IGNORED = {*TransformersKwargs.__annotations__, "sliding_window", "use_cache", "cache_position", "token_type_ids"}
UNSEEN = -1e4  # a mask adds as much or less to what is not seen


def attach(
    model: PreTrainedModel,
    *,
    rank: int = 2,
    groups: int = 1,
    branches: Sequence[str] = BRANCHES,
    stages: Sequence[str] = STAGES,
    residual: bool = True,
    hidden: int | None = None,
    backend: str = "eager",
) -> PreTrainedModel:
    """Give a model composable heads, in place.

    Maps start as the identity: base, gates and w2 are zero and w1 as published, so that the model computes what it did
    and yet every branch learns. Train it like any other model; `detach` takes maps off that are the identity.

    Args:
        model: a Hugging Face model, a decoder or an encoder.
        rank, groups, branches, stages, hidden: of the maps, see `Compose`; by default all five branches at both stages.
        residual: whether the identity is part of the maps; without it, they start with a base that is the identity.
        backend: how attention is computed, `eager` or `chunked`; later `model.config.composed["backend"]`.

    Returns:
        The same model.

    Raises:
        HeadlabError: the model has composable heads already, or its attention does something that attention with
            composed heads does not compute (cross-attention, position biases, soft-capped scores, sinks); options that do
            not fit its heads; it is pruned; or headlab has no description of it. The model is then as it was.
    """
    options = {
        "rank": rank, "groups": groups, "branches": list(branches), "stages": list(stages), "residual": residual,
        "hidden": hidden, "backend": check_backend(backend),
    }  # fmt: skip
    _install(_check(model), options)
    COMPOSING.enter(model, options)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the maps that `attach` has given to a model off again, where they are the identity; in place.

    Returns:
        The same model, of its original class, with the attention implementation it had.

    Raises:
        HeadlabError: some maps are not exactly the identity, so that the model would compute something else; or there are
            none that `attach` has given to it.
    """
    _check_model(model)
    if not _composed(model):
        own = " (those of its own architecture stay)" if _has_maps(model) else ""
        raise HeadlabError(f"this {type(model).__name__} has no composable heads that attach has given to it{own}")
    if model.config.model_type.startswith(PRUNED):
        raise HeadlabError("this model is pruned, with maps between the heads that are left: they cannot be taken off")
    rows = attentions(model)
    off = {row.row: far for row in rows if (far := row.compose.beyond_identity())}
    if off:
        layers = (f"layer {row} ({', '.join(f'{place} {far[place]:.2g}' for place in far)})" for row, far in off.items())
        raise HeadlabError(
            "these maps are not the identity, so that without them the model would compute something else; the largest "
            f"weights that would have to be zero: {', '.join(layers)}"
        )
    for row in rows:
        row.core.__class__ = base_of(type(row.core))
        del row.core.compose
    before = model.__dict__.pop("attention_before_attach")
    COMPOSING.leave(model)
    model.set_attn_implementation(before)
    return model


# --- building


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise HeadlabError(f"expected a Hugging Face model, not a {type(model).__name__}")


def _check(model: PreTrainedModel) -> PreTrainedModel:
    """The model, if heads can be made composable in it."""
    _check_model(model)
    name, config = type(model).__name__, model.config
    if _has_maps(model):
        raise HeadlabError(f"this {name} has composable heads already")
    if config.model_type.startswith(PRUNED):
        raise HeadlabError("this model is pruned: attach composable heads to the whole model, and prune it then")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise HeadlabError(f"{name} has cross-attention (an encoder and a decoder), which headlab does not compose")
    for row in attentions(model):
        if does := _does_more(row):
            raise HeadlabError(f"{row.path} ({type(row.core).__name__}) {does}, which composed attention does not compute")
        if row.core.config is not config:
            raise HeadlabError(f"{row.path} has another config than the {name} around it, where maps could not be saved")
        weight = row.projection(row.family.q).weight
        if weight.device.type == "meta" or not weight.is_floating_point():
            raise HeadlabError(
                f"{row.path} has weights of {weight.dtype} on {weight.device}: maps need weights in memory, that are "
                "floating-point numbers"
            )
    return model


def _does_more(row: Attention) -> str | None:
    """What an attention module does beyond scores, mask, softmax and values, as far as it shows before a pass."""
    if row.family.shared_bias:
        return "adds a position bias to its scores"
    if getattr(row.core, "attn_logit_softcapping", None) is not None:
        return f"caps its scores at {row.core.attn_logit_softcapping}"
    if getattr(row.core, "sinks", None) is not None:
        return "has attention sinks"
    return None


def _has_maps(model: nn.Module) -> bool:
    return any(isinstance(module, Compose) for module in model.modules())


def _composed(model: nn.Module) -> bool:
    return any(isinstance(module, ComposedAttention) for module in model.modules())


def _build(model: Any) -> None:
    """Maps for a model that has just been made; its weights are loaded afterwards."""
    if getattr(model.config, "composed", None) is None:
        raise HeadlabError(f"{type(model).__name__} needs a config that describes its maps; headlab.dcmha.attach makes it")
    _install(model, model.config.composed)


def _install(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Put maps into every attention module. Whatever can fail comes first."""
    rows = attentions(model)
    maps = [_maps(row, options) for row in rows]
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise HeadlabError(f"{type(model).__name__} lets nobody choose how its attention is computed, so it is not composed")
    model.attention_before_attach = before
    for row, compose in zip(rows, maps, strict=True):
        core, plain = row.core, row.core.__class__
        core.compose = compose.train(core.training)
        core.__class__ = _composed_class(plain)


def _maps(row: Attention, options: dict[str, Any]) -> Compose:
    """Maps of one layer that are the identity."""
    projection = row.projection(row.family.q)
    arguments = {name: value for name, value in options.items() if name != "backend"}
    with torch.device(projection.weight.device):
        compose = Compose(width_in(projection), len(row.slots), **arguments)
        compose.ratio, compose.joined = len(row.slots) // len(row.groups), row.family.joined is not None
        compose.initialise(identity=True)
    return compose.to(projection.weight.dtype)


class ComposedModel:
    """What models with attached maps do differently from those they are made of."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but maps that are missing are an error (transformers would start with arbitrary ones)."""
        wants_info = kwargs.pop("output_loading_info", False)
        opener: Any = super()
        model, info = opener.from_pretrained(*args, output_loading_info=True, **kwargs)
        if missing := sorted(key for key in info["missing_keys"] if ".compose." in key):
            raise HeadlabError(f"{model.config._name_or_path} lacks the tensors {', '.join(missing)}")
        return (model, info) if wants_info else model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        backend = model.config.composed["backend"]
        if backend != "eager" and kwargs.get("output_attentions", model.config.output_attentions):
            raise HeadlabError(
                f'the {backend!r} backend has no attention patterns: set model.config.composed["backend"] = "eager"'
            )
        called: Any = super()
        return called.__call__(*args, **kwargs)


COMPOSING = Variant(
    "Composed", COMPOSED, "composed", _build, about="with composable heads", home=__name__, mixins=(ComposedModel,)
)


# --- computing


class ComposedAttention(nn.Module):
    """An attention module with maps. Made by `attach`, which changes the module's class to one that has this as a base."""

    compose: Compose
    config: Any
    headlab_run: _Pass | None = None  # the forward pass under way

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]  # [batch, pos, d_model]; q, k and v are made of it
        self.headlab_run = run = _Pass(self.compose, x)
        try:
            output = super().forward(*map(run.watch, args), **{name: run.watch(value) for name, value in kwargs.items()})
        finally:
            self.headlab_run = None
        if not run.attended:
            raise HeadlabError(
                f"attention was computed by {self.config._attn_implementation!r}, which does not compose heads: call "
                f"model.set_attn_implementation({IMPLEMENTATION!r}), or headlab.dcmha.detach(model) first"
            )
        return output


@functools.cache
def _composed_class(base: Any) -> Any:
    # the same name, for descriptions (`headlab.models.families`) go by it: its projections are those of the base
    return type(base.__name__, (ComposedAttention, base), {"__module__": __name__, "__doc__": base.__doc__})


class _Pass:
    """One forward pass through an attention module: what its tokens bring to the maps."""

    def __init__(self, compose: Compose, x: Tensor) -> None:
        self.compose, self.x = compose, x
        self.query = compose(x)
        self.key: Sides = self.query  # of all tokens, where earlier ones are in a cache
        self.attended = False

    def watch(self, value: Any) -> Any:
        """A key-value cache that also keeps key sides; anything else as it is."""
        if isinstance(value, EncoderDecoderCache):
            watched: Any = copy.copy(value)
            watched.self_attention_cache = _Watched(value.self_attention_cache, self)
            return watched
        return _Watched(value, self) if isinstance(value, Cache) else value


class _Watched:
    """A key-value cache, as an attention module with maps sees it."""

    def __init__(self, cache: Cache, run: _Pass) -> None:
        self._cache, self._run = cache, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        run = self._run
        k, v, run.key = remember(self._cache, layer_idx, run.compose, key_states, value_states, run.query)
        return k, v


def composed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention implementation `headlab_composed`.

    Args:
        module: the attention module.
        query, key, value: [batch, head or key-value head, pos, d_head].
        attention_mask: [batch, 1 or head, query, key], True (or 0) where a key is seen, False (or hugely negative) else.
        scaling: of the scores; by default d_head ** -0.5.
        dropout: share of the probabilities, after composition.
        is_causal: whether no query sees a later key, where there is no mask; by default what the module says.

    Returns:
        What every head carries, [batch, pos, head, d_head], and the composed pattern (from the eager backend).
    """
    run = getattr(module, "headlab_run", None)
    if not isinstance(module, ComposedAttention) or run is None:
        raise HeadlabError(
            f"{type(module).__name__} has no composable heads, so it cannot use the attention implementation "
            f"{IMPLEMENTATION!r}: headlab.dcmha.attach(model) gives it some"
        )
    if more := [name for name, x in kwargs.items() if name not in IGNORED and x is not None and x is not False]:
        raise HeadlabError(
            f"{type(module).__name__} asks its attention for {', '.join(more)}, which composed attention does not compute"
        )
    for side in run.key.values():
        if any(part is not None and part.shape[1] != key.shape[2] for part in (side.w1, side.w2, side.gate)):
            raise HeadlabError(
                f"{type(module).__name__} has {key.shape[2]} keys, but maps know of {run.x.shape[1]} tokens: keys made of "
                "anything but the module's input (cross-attention) are not composed"
            )
    run.attended = True
    compose = module.compose
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", False))
    problem = Problem(
        q=_queries(compose, query),
        k=_spread(compose, key, "scores"),
        v=_spread(compose, value, "output"),
        compose=compose,
        query=run.query,
        key=run.key,
        gates=compose.gates(run.x),
        visible=_visible(attention_mask, query.shape[2], key.shape[2], is_causal),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
    )
    return attend(problem, module.config.composed["backend"])


def _queries(compose: Compose, q: Tensor) -> Tensor:
    """Those of the heads that have scores (from a joined projection, there may be others)."""
    wanted, present = compose.kept["scores"], compose.held("scores")
    return q if wanted == present else q[:, [present.index(head) for head in wanted]]


def _spread(compose: Compose, x: Tensor, what: str) -> Tensor:
    """Keys or values, one for every head; in memory as transformers lays them out, else products differ in the last bit."""
    if len(compose.kept[what]) < compose.n_heads:
        return compose.spread(x, what)
    return x[:, :, None].expand(-1, -1, compose.ratio, -1, -1).flatten(1, 2)


def _visible(mask: Tensor | None, n_queries: int, n_keys: int, causal: bool) -> Visible:
    """Which keys every query sees: those that the mask says, or all (that are no later)."""
    if mask is None:
        return Visible(past=n_keys - n_queries, causal=causal)
    seen = mask
    if mask.dtype != torch.bool:  # a user's own; those that transformers makes for us are boolean
        seen = mask == 0
        if bool((mask.masked_fill(seen, UNSEEN) > UNSEEN).any()):
            raise HeadlabError(
                "the attention mask adds other numbers than 0 (seen) and huge negative ones (not seen) to the scores; such "
                "a bias is not what composed attention computes"
            )
    return Visible(causal=False, seen=seen.expand(*seen.shape[:2], n_queries, n_keys))


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask as transformers makes it for its eager attention, but boolean; None where every query sees every key."""
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})


AttentionInterface.register(IMPLEMENTATION, composed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
COMPOSING.announce(model_type for family in families() for model_type in family.model_types)
