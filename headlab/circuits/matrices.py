"""What a head looks for and what it carries: its QK and its OV circuit, as TransformerLens' factored matrices.

Definitions: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; for a row vector x of the residual
stream, scores are x_query W_Q W_K^T x_key^T (without biases and not yet divided by sqrt(d_head)), and a head carries
x_key W_V W_O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from ..choices import Norm
from ..errors import HeadlabError
from ..models.access import fingerprint, rows
from ..models.attention_modules import Attention
from ..models.norms import circuits_of
from ..models.positions import angles, turned
from ..models.projections import Projections

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix

    from ..dcmha.maps import CompositionMaps


class ComposedCircuit(NamedTuple):
    """An effective head of a model with composed heads: the scores of one head carry what another one carries."""

    qk: FactoredMatrix  # of the head that the scores come from
    ov: FactoredMatrix  # of the head whose output it is
    weight: float  # how strongly, on average over the texts of the maps


def qk(
    model: nn.Module, layer: int, head: int, *, norm: Norm = "raw", distance: int | None = None, stack: str = ""
) -> FactoredMatrix:
    """The QK circuit W_Q W_K^T of a head, [d_model, d_model]; row: what the query holds, column: what the key holds.

    Args:
        model: a plain model or a bridge (but not one in compatibility mode).
        layer, head: the original numbers, also in pruned models.
        norm: `raw` weights, which are TransformerLens' values, or `fold`: with the gains of the norms on the way (and
            without the mean that LayerNorm takes away). Either way the norm's division by the length is left out.
        distance: with the rotation of rotary models, for a key this many tokens before the query. At 0 that is what the
            head looks for whatever the place (content); the change from there to d is what the distance adds.
        stack: `enc`, `dec` or `cross` in an encoder-decoder.

    Raises:
        HeadlabError: there is no such head (or it has no scores left), or no rotation to put in.

    >>> hl.qk(model, 1, 4).norm()  # doctest: +SKIP
    tensor(31.2)
    """
    row = find_row(model, layer, stack)
    found = circuits_of(model, row, norm)
    return factored(*qk_factors(model, row, found, head, distance))


def ov(model: nn.Module, layer: int, head: int, *, norm: Norm = "raw", stack: str = "") -> FactoredMatrix:
    """The OV circuit W_V W_O of a head, [d_model, d_model]: what it reads at a key, and what it writes at the query.

    Arguments and errors are those of `qk`.
    """
    row = find_row(model, layer, stack)
    return factored(*ov_factors(row, circuits_of(model, row, norm), head))


def composed_circuit(
    model: nn.Module,
    maps: CompositionMaps,
    layer: int,
    head_from: int,
    head_to: int,
    *,
    norm: Norm = "raw",
    distance: int | None = None,
) -> ComposedCircuit:
    """The effective head "QK of `head_from` with OV of `head_to`" of a DCMHA model.

    Its weight is the mean over the visible pairs of the texts in `maps` of (C_pre C_post)[from, to], see
    `CompositionMaps.effective`.

    Raises:
        HeadlabError: the maps are of another model, or there is no such head.
    """
    made_for = maps.record.get("model", {}).get("fingerprint")
    if made_for not in (None, mine := fingerprint(model)):
        raise HeadlabError(f"the maps were read from another model (fingerprint {made_for}; this one is {mine})")
    search, carry = qk(model, layer, head_from, norm=norm, distance=distance), ov(model, layer, head_to, norm=norm)
    sources, targets = maps.heads(layer, "pre")[0], maps.heads(layer, "post")[1]
    weight = maps.mean_effective(layer)[sources.index(head_from), targets.index(head_to)]
    return ComposedCircuit(search, carry, float(weight))


def find_row(model: nn.Module, layer: int, stack: str = "") -> Attention:
    """The attention module of a layer, or an error that names those there are."""
    found = rows(model)
    stacks = list(dict.fromkeys(row.stack for row in found))
    if stack not in stacks:
        given = f"the model has no stack {stack!r}" if stack else "the model has several stacks"
        choice = f"say stack={' or '.join(map(repr, stacks))}" if stacks != [""] else "leave stack out"
        raise HeadlabError(f"{given}: {choice}")
    layers = {row.layer: row for row in found if row.stack == stack}
    if layer not in layers:
        raise HeadlabError(f"there is no layer {layer!r}{_of(stack)}: the layers are 0 to {max(layers)}")
    return layers[layer]


def qk_factors(
    model: nn.Module, row: Attention, found: Projections, head: int, distance: int | None = None
) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, "d_head d_model"]]:
    """The two factors of a head's QK circuit."""
    i, j = _blocks(found.searching, row, head, "scores")
    q, k = found.q[i], found.k[j]
    if distance is not None:
        at = angles(model, row, [0, distance], q)
        q, k = turned(q, at, 1), turned(k, at, 0)
    return q, k.T


def ov_factors(
    row: Attention, found: Projections, head: int
) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, "d_head d_model"]]:
    """The two factors of a head's OV circuit."""
    i, j = _blocks(found.carrying, row, head, "an output")
    return found.v[i], found.o[j]


def _blocks(there: Mapping[int, tuple[int, int]], row: Attention, head: int, what: str) -> tuple[int, int]:
    if isinstance(head, bool) or head not in there:
        name = f"layer {row.layer}{_of(row.stack)}"
        has = f"its heads are {', '.join(map(str, sorted(there)))}" if there else "nothing is left of its heads"
        raise HeadlabError(f"{name} has no head {head!r} with {what}: {has}")
    return there[head]


def _of(stack: str) -> str:
    return f" of stack {stack!r}" if stack else ""


def factored(left: Tensor, right: Tensor) -> FactoredMatrix:
    """Two factors as TransformerLens has them."""
    from transformer_lens import FactoredMatrix

    return FactoredMatrix(left, right)
