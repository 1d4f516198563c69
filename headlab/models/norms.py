"""What norms do to the circuits of heads: their gains, folded into the projections, and where that is not the whole story.

A norm divides a token's vector by its length, which no circuit can hold, and multiplies it with a gain, which one can;
LayerNorm takes the mean away first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..choices import Norm, check
from ..errors import HeadlabError
from .access import bare_model, is_folded, rows
from .attention_modules import Attention, bare, submodule
from .projections import Projections, projections, wide

_BEFORE = ("input_layernorm", "ln_1", "layer_norm", "layernorm_before")  # beside the attention module
_FINAL = ("norm", "ln_f", "final_layer_norm")  # beside the layers


@dataclass(frozen=True, eq=False)
class Gain:
    """The linear part of a norm: x -> (x less its mean, if it `centres`) * weight."""

    weight: Float[Tensor, " d"]
    centres: bool

    def before(self, weight: Float[Tensor, "*block d n"]) -> Float[Tensor, "*block d n"]:
        """The projection that does to x what `weight` does to the normed x."""
        found = self.weight[:, None].to(weight) * weight
        return found - found.mean(-2, keepdim=True) if self.centres else found

    def after(self, weight: Float[Tensor, "*block n d"]) -> Float[Tensor, "*block n d"]:
        """The projection whose output is that of `weight`, normed."""
        found = weight - weight.mean(-1, keepdim=True) if self.centres else weight
        return found * self.weight.to(weight)


def gain(norm: nn.Module) -> Gain:
    """The linear part of a LayerNorm or an RMS norm. Gemma's norms store what is added to 1."""
    weight: Any = norm.weight
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return Gain(weight + 1 if type(norm).__name__.startswith("Gemma") else weight, isinstance(norm, nn.LayerNorm))


def _beside(model: nn.Module, path: str, names: tuple[str, ...]) -> nn.Module | None:
    """The module of one of these names in the same parent as `path`, without TransformerLens' component around it."""
    parent = bare(submodule(bare_model(model), path.rpartition(".")[0]))
    return next((bare(found) for name in names if (found := parent._modules.get(name)) is not None), None)


def norm_before(model: nn.Module, row: Attention) -> nn.Module | None:
    """The norm that queries read through (keys and values too, except in cross-attention); None if none is known."""
    return _beside(model, row.path, _BEFORE)


def norm_after(model: nn.Module, row: Attention) -> nn.Module | None:
    """The norm between attention's output and the residual stream, which Gemma 2 and 3 have."""
    if _beside(model, row.path, ("pre_feedforward_layernorm",)) is None:
        return None  # elsewhere the module of this name stands before the MLP
    return _beside(model, row.path, ("post_attention_layernorm",))


def final_norm(model: nn.Module, row: Attention) -> nn.Module | None:
    """The norm after the last layer of an attention module's stack; None if there is none (post-norm models)."""
    names = row.path.split(".")
    layers = next((i for i, name in enumerate(names) if name.isdigit()), 0)
    return _beside(model, ".".join(names[:layers]), _FINAL)


def _of_heads(row: Attention) -> dict[Literal["q", "k"], nn.Module]:
    """The norms of queries and keys, head by head (Qwen 3, Gemma 3, some DCMHA models)."""
    found = {"q": getattr(row.core, "q_norm", None), "k": getattr(row.core, "k_norm", None)}
    return {part: bare(norm) for part, norm in found.items() if isinstance(norm, nn.Module)}  # type: ignore[misc]


def circuits_of(model: nn.Module, row: Attention, norm: Norm) -> Projections:
    """The projections of an attention module, in float32 at least; with `fold` the gain of every norm on the way is in them.

    Folded are the norm before attention (in cross-attention, for keys and values, the encoder's last one), those of
    queries and keys, and one between attention and the stream.

    Raises:
        HeadlabError: an unknown `norm`, or a bridge in compatibility mode.
    """
    check("norm", norm, Norm)
    if is_folded(model):
        raise HeadlabError(
            "this bridge is in compatibility mode, so its weights are no longer the model's: give the model itself, "
            "with norm='fold' if gains should be in the circuits"
        )
    found = projections(row)
    found = replace(found, q=wide(found.q), k=wide(found.k), v=wide(found.v), o=wide(found.o))
    if norm == "raw" or not row.slots:
        return found
    q, k, v, o = found.q, found.k, found.v, found.o
    queries = norm_before(model, row)
    source = queries if row.stack != "cross" else _encoder_norm(model)
    if queries is not None:
        q = gain(queries).before(q)
    if source is not None:
        k, v = gain(source).before(k), gain(source).before(v)
    within = _of_heads(row)
    if "q" in within and within["q"].weight.shape == q.shape[-1:]:
        q = gain(within["q"]).after(q)
    if "k" in within and within["k"].weight.shape == k.shape[-1:]:
        k = gain(within["k"]).after(k)
    if (last := norm_after(model, row)) is not None:
        o = gain(last).after(o)
    return replace(found, q=q, k=k, v=v, o=o)


def _encoder_norm(model: nn.Module) -> nn.Module | None:
    encoder = next((row for row in rows(model) if row.stack == "enc"), None)
    return None if encoder is None else final_norm(model, encoder)


def approximate(model: nn.Module, row: Attention) -> list[str]:
    """Why the circuits of a module's heads are only approximate; nothing where they are exact.

    Exact means: up to biases and to the division by its length that a token's vector undergoes in the norm before
    attention, scores are the QK circuit (at the distance of the pair, in rotary models) and outputs the OV circuit.
    """
    found = []
    if norm_before(model, row) is None:
        inside = any(isinstance(module, nn.LayerNorm) for module in bare(row.module).modules())
        found.append("the stream is normed after attention (post-norm)" if inside else "no norm before attention is known")
    if norms := list(_of_heads(row)):
        found.append(f"{' and '.join({'q': 'queries', 'k': 'keys'}[part] for part in norms)} are normed in every head")
    if (cap := getattr(row.core, "attn_logit_softcapping", None)) is not None:
        found.append(f"scores are soft-capped at {cap:g}")
    if row.family.shared_bias and row.stack != "cross":
        found.append("scores have a relative position bias")
    if norm_after(model, row) is not None:
        found.append("a norm stands between attention and the stream")
    if row.compose is not None and row.compose.places:
        found.append("heads are composed with each other")
    return found
