"""Positions in QK circuits: the rotation of rotary models, and learned position embeddings."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import HeadlabError
from .access import bare_model
from .attention_modules import Attention, bare

Angles = tuple[Tensor, Tensor]
"""cos and sin, [position, features that turn]."""


def is_rotary(model: nn.Module, row: Attention) -> bool:
    """Whether queries and keys of this attention module are rotated (SmolLM3 leaves some layers out)."""
    if row.stack == "cross" or not getattr(row.core, "use_rope", True):
        return False
    return row.family.angles is not None or _module(model) is not None


def _module(model: nn.Module) -> nn.Module | None:
    """The model's rotary module; the first one is the text model's."""
    return next((m for m in bare_model(model).modules() if type(m).__name__.endswith("RotaryEmbedding")), None)


def angles(model: nn.Module, row: Attention, distances: list[int], like: Tensor) -> Angles:
    """cos and sin at these positions, as the model's own rotary module makes them, its scaling included.

    A scaling that depends on the length of the text (`dynamic`, `longrope`) is that of a text which ends at the largest.

    Raises:
        HeadlabError: the module's heads are not rotated, or a distance is not a whole number of 0 or more.
    """
    if odd := [d for d in distances if isinstance(d, bool) or not isinstance(d, int) or d < 0]:
        raise HeadlabError(f"a distance is a whole number of tokens, 0 or more, not {odd[0]!r}")
    if not is_rotary(model, row):
        raise HeadlabError(
            f"{row.path} has no rotary positions, so its QK circuit is the same at every distance: leave distance out"
        )
    positions = torch.tensor([distances], device=like.device)
    if row.family.angles is not None:
        cos, sin = row.family.angles(row.core.config, positions, like.dtype)
        return cos[0, 0], sin[0, 0]
    module: Any = copy.deepcopy(_module(model))  # a scaling that depends on the length is kept in the module
    more = {"layer_type": row.core.config.layer_types[row.core.layer_idx]} if hasattr(module, "layer_types") else {}
    cos, sin = module(like, positions, **more)
    return cos[0], sin[0]


def turned(x: Float[Tensor, "*block d_model d_head"], at: Angles, i: int) -> Float[Tensor, "*block d_model d_head"]:
    """A projection to queries or keys, rotated by the i-th of these angles (halves turn against each other)."""
    return rotate(x, at[0][i].to(x), at[1][i].to(x))


def learned_positions(model: nn.Module) -> Float[Tensor, "pos d_model"] | None:
    """The learned embedding of every position a text can have, where the model has one as wide as its stream."""
    for name, module in bare_model(model).named_modules():
        found = bare(module)
        if name.rpartition(".")[2] in ("wpe", "position_embeddings") and isinstance(found, nn.Embedding):
            first = 0 if found.padding_idx is None else found.padding_idx + 1  # RoBERTa counts from after its padding
            fits = found.embedding_dim == bare_model(model).config.get_text_config().hidden_size
            return found.weight.detach()[first:] if fits else None
    return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first features of every head (x: [batch, head, pos, d_head], cos: [batch, 1, pos, 2n])."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin  # in the dtype of cos and sin
    return torch.cat([turned.to(x.dtype), rest], -1)
