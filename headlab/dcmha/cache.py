"""What tokens bring to the maps as keys, in an ordinary key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from ..errors import HeadlabError
from .compose import Compose, Sides


def remember(cache: Cache, layer: int, compose: Compose, k: Tensor, v: Tensor, sides: Sides) -> tuple[Tensor, Tensor, Sides]:
    """Add tokens to a key-value cache, and get keys, values and key sides of all tokens so far.

    What a token brings to the maps as a key goes into further channels of its keys, so that it is reordered, cropped and
    copied along with them.

    Raises:
        HeadlabError: the cache is of another model.
    """
    d_head, numbers = k.shape[-1], compose.key_numbers
    n_kv = k.shape[1]
    extra = -(-numbers // n_kv)  # channels per key-value head
    if numbers:
        packed = F.pad(compose.pack(sides), (0, extra * n_kv - numbers)).to(k.dtype)
        k = torch.cat([k, packed.unflatten(-1, (n_kv, extra)).transpose(1, 2)], -1)
    _check_cache(cache, layer, k, v)
    k, v = cache.update(k, v, layer)
    keys = sides
    if numbers:
        packed = k[..., d_head:].transpose(1, 2).flatten(2)[..., :numbers]
        keys, k = compose.unpack(packed), k[..., :d_head]
    return k, v, keys


def check_layers(cache: Cache, n_layers: int) -> None:
    """Raise `HeadlabError` if a cache has layers, but not as many as the model."""
    if (found := len(getattr(cache, "layers", []))) not in (0, n_layers):
        raise HeadlabError(f"the cache is of another model: it has {found} layers, but this model has {n_layers}")


def _check_cache(cache: Cache, layer: int, k: Tensor, v: Tensor) -> None:
    layers = getattr(cache, "layers", [])
    if layer >= len(layers) or getattr(layers[layer], "keys", None) is None or layers[layer].keys.numel() == 0:
        return
    for name, new in (("keys", k), ("values", v)):
        old = getattr(layers[layer], name)
        mine, theirs = ((x.shape[0], x.shape[1], x.shape[3]) for x in (new, old))
        if mine != theirs:
            raise HeadlabError(
                f"the cache is of another model or batch: layer {layer} has {name} of (batch, heads, channels) = {theirs}, "
                f"but this model makes {mine}"
            )
