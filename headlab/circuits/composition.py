"""Composition between heads: how much of what an earlier head writes is read by a later one, from the weights alone.

For an earlier head with the OV circuit A = W_V W_O and a later reader B of the residual stream (rows of x times B), the
score is |A B| / (|A| |B|) in Frobenius norms, between 0 and 1. Source: Elhage et al., A Mathematical Framework for
Transformer Circuits (2021), "Virtual weights and the residual stream". B is W_Q W_K^T (Q-composition), its transpose (K),
W_V W_O (V), or in models with composable heads what the later layer's maps read with (M).

Nothing of size d_model x d_model is formed. With W_V = Q R and Q^T Q = I, |W_V X| = |R X|, so the outer factor on either
side shrinks to a triangle of d_head x d_head, and what is left for all pairs of two layers is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isnan, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..choices import Norm
from ..errors import HeadlabError
from ..models.access import bare_model, describe, rows
from ..models.attention_modules import Attention, bare, weight_blocks
from ..models.norms import approximate, circuits_of, gain, norm_before
from ..results import Result
from ..tables import Head, read_heads, write_heads

if TYPE_CHECKING:
    import pandas as pd

KINDS = {"Q": "queries", "K": "keys", "V": "values", "M": "maps"}


@dataclass(frozen=True, order=True)
class MapReader:
    """What a branch of a layer's composition maps reads the residual stream with."""

    row: int
    layer: int
    place: str  # pre_query, post_key_gate ...
    stack: str = ""

    def __str__(self) -> str:
        return f"{self.stack}{'.' if self.stack else ''}L{self.layer} {self.place}"


Reader = Head | MapReader


class Pair(NamedTuple):
    """An earlier head, a later reader, their score, and its ratio to the random baseline."""

    source: Head
    reader: Reader
    score: float
    ratio: float

    def __str__(self) -> str:
        return f"{self.source} -> {self.reader} {self.score:.3g} ({self.ratio:.1f} x random)"


class _TensorLike:
    """Indexing, comparisons, torch functions and methods of the tensor `scores`, as TransformerLens' scores have them."""

    scores: Tensor

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*_tensors(args), **_tensors(kwargs or {}))

    def __getitem__(self, key: Any) -> Tensor:
        return self.scores[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in dir(Tensor):  # never for what is not there yet (copy, pickle)
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.scores, name)

    def __gt__(self, other: Any) -> Tensor:
        return self.scores > _tensors(other)

    def __lt__(self, other: Any) -> Tensor:
        return self.scores < _tensors(other)

    def __ge__(self, other: Any) -> Tensor:
        return self.scores >= _tensors(other)

    def __le__(self, other: Any) -> Tensor:
        return self.scores <= _tensors(other)

    def __eq__(self, other: object) -> Any:
        return self.scores == _tensors(other)

    def __ne__(self, other: object) -> Any:
        return self.scores != _tensors(other)

    __hash__ = object.__hash__


def _tensors(value: Any) -> Any:
    """The same with every `_TensorLike` in it replaced by its tensor."""
    if isinstance(value, _TensorLike):
        return value.scores
    if isinstance(value, dict):
        return {key: _tensors(item) for key, item in value.items()}
    return type(value)(map(_tensors, value)) if type(value) in (list, tuple) else value


@dataclass(frozen=True, eq=False, repr=False)
class CompositionScores(_TensorLike, Result):
    """Composition scores of every earlier head with every later reader. Has what TransformerLens' class of this name has:
    `scores`, `layer_indices`, `head_labels`, and it can be used like the tensor `scores`.

    Attributes:
        what: `Q`, `K`, `V` or `M`.
        sources: the heads that write, in order; readers: the heads (or branches of maps) that read, in order.
        values: the scores; NaN where the reader is in no later layer, and where either matrix is zero.
        d_model: width of the residual stream.
        record: the model, the norm, and why the circuits are only approximate (`approximate`), if they are.
    """

    kind = "composition"
    what: str
    sources: tuple[Head, ...]
    readers: tuple[Reader, ...]
    values: Float[Tensor, "source reader"]
    d_model: int
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def baseline(self) -> float:
        """The score to expect by chance, 1 / sqrt(d_model).

        If U is a random rotation of the residual stream, the mean of |A U B|^2 is |A|^2 |B|^2 / d_model, whatever A and B
        are: U mixes the directions evenly. So this is the root mean square score of the same two matrices when nothing
        aligns them, and that of fresh, independent weights.
        """
        return 1 / sqrt(self.d_model)

    @property
    def layer_indices(self) -> list[int]:
        """The layers that have heads, in order: what the first and third axes of `scores` stand for."""
        return sorted({end.layer for end in (*self.sources, *self.readers)})

    @property
    def head_labels(self) -> list[str]:
        """A label for every index along the first two axes of `scores`; of heads that are not there too."""
        stack = f"{self.sources[0].stack}." if self.sources and self.sources[0].stack else ""
        return [f"{stack}L{layer}H{index}" for layer in self.layer_indices for index in range(self._shape[0])]

    @property
    def _places(self) -> list[str]:
        """The branches of maps that read, in order; none if heads read."""
        return list(dict.fromkeys(reader.place for reader in self.readers if isinstance(reader, MapReader)))

    @property
    def _shape(self) -> tuple[int, int]:
        """How many indices a layer has along the axes of sources and of readers in `scores`."""
        indices = [head.index for head in self.sources], [head.index for head in self.readers if isinstance(head, Head)]
        if self.what == "M":
            return max(indices[0], default=-1) + 1, len(self._places)
        return (max(indices[0] + indices[1], default=-1) + 1,) * 2

    @cached_property
    def scores(self) -> Float[Tensor, "source_layer source reader_layer reader"]:  # type: ignore[override]
        """The scores as TransformerLens lays them out: zero where the reader is in no later layer, NaN for a head that is
        not there (pruned). For maps, the last axis is the branch."""
        layers = {layer: i for i, layer in enumerate(self.layer_indices)}
        places, (n_sources, n_readers) = self._places, self._shape
        dense = torch.full((len(layers), n_sources, len(layers), n_readers), torch.nan)
        at = [layers[head.layer] * n_sources + head.index for head in self.sources]
        to = [
            layers[end.layer] * n_readers + (end.index if isinstance(end, Head) else places.index(end.place))
            for end in self.readers
        ]
        dense.view(len(layers) * n_sources, -1)[torch.tensor(at)[:, None], torch.tensor(to)] = self.values
        order = torch.arange(len(layers))
        return torch.where(order[:, None, None, None] < order[:, None], dense, 0.0)

    def top(self, k: int = 10) -> list[Pair]:
        """The k pairs with the highest scores, the best first."""
        flat = self.values.flatten().nan_to_num(-1)
        best = flat.topk(min(k, int((flat >= 0).sum())))
        ends = (divmod(pair, len(self.readers)) for pair in best.indices.tolist())
        return [
            Pair(self.sources[i], self.readers[j], score, score / self.baseline)
            for (i, j), score in zip(ends, best.values.tolist(), strict=True)
        ]

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per pair of a head and a later reader; `ratio` is that of the score to the baseline."""
        import pandas as pd

        kept = [
            (i, j) for i, a in enumerate(self.sources) for j, b in enumerate(self.readers) if a.layer < b.layer
        ]  # a zero matrix has its line too, and no score
        sources, readers = [self.sources[i] for i, _ in kept], [self.readers[j] for _, j in kept]
        score = self.values[[i for i, _ in kept], [j for _, j in kept]].double().numpy()
        which = "place" if self.what == "M" else "index"
        return pd.DataFrame(
            {
                "source": list(map(str, sources)),
                "source_layer": [head.layer for head in sources],
                "source_index": [head.index for head in sources],
                "reader": list(map(str, readers)),
                "reader_layer": [reader.layer for reader in readers],
                f"reader_{which}": [getattr(reader, which) for reader in readers],
                "score": score,
                "ratio": score / self.baseline,
            }
        )

    def _body(self) -> dict[str, Any]:
        values = [[None if isnan(value) else value for value in row] for row in self.values.tolist()]
        ends = {"sources": write_heads(self.sources), "readers": [vars(end) for end in self.readers]}
        return {"what": self.what, "d_model": self.d_model, **ends, "values": values}

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        reader = MapReader if body["what"] == "M" else Head
        sources, readers = read_heads(body["sources"]), tuple(reader(**x) for x in body["readers"])
        numbers = [[torch.nan if value is None else value for value in row] for row in body["values"]]
        values = torch.tensor(numbers, dtype=torch.float32).reshape(len(sources), len(readers))
        return cls(body["what"], sources, readers, values, body["d_model"], record)

    def __repr__(self) -> str:
        best = ", ".join(map(str, self.top(3)))
        return f"CompositionScores({self.what}, {len(self.sources)} heads, random {self.baseline:.3g}, top: {best})"


def composition_scores(model: nn.Module, kind: str, norm: Norm = "raw", stack: str = "") -> CompositionScores:
    """Composition scores of all pairs of a head and a head of a later layer.

    The values are those of TransformerLens' `all_composition_scores`. Pruned models have them for the heads that are
    there, and in models with composable heads a head is a source with its own W_V W_O, and a reader with its own W_Q W_K^T.

    Args:
        model: a plain model or a bridge.
        kind: `Q`, `K` or `V`: what the later head reads for.
        norm: `raw`, the weights as they are (TransformerLens' values); or `fold`: with the gains of the norms on the way, of
            both heads, and without the mean that LayerNorm takes away (see `norms.circuits_of`).
        stack: in an encoder-decoder, which self-attention: `enc` or `dec`. Scores between the two would mean nothing.

    Raises:
        HeadlabError: there is no such kind, norm or stack; no head is left; a bridge in compatibility mode.

    >>> composition_scores(model, "K").top(1)[0]  # doctest: +SKIP
    """
    if kind not in ("Q", "K", "V"):
        raise HeadlabError(f"kind is 'Q', 'K' or 'V', not {kind!r}; of composition maps, see map_composition")
    with torch.no_grad():
        layers = [_layer(model, row, norm, kind) for row in _stream(model, stack)]
        return _scores(model, kind, norm, layers)


def map_composition(model: nn.Module, norm: Norm = "raw") -> CompositionScores:
    """M-composition: how strongly every head feeds the composition maps of later layers, branch by branch.

    The maps of DCMHA read the residual stream as queries, keys and values do. What a branch reads with, M, is its rows of
    `dw1` (the hidden layer that the low-rank factors are made of, for all heads) or of `dd` (one for each head's gate);
    what follows is not linear and is no part of the score |W_V W_O M| / (|W_V W_O| |M|). A base map reads nothing.

    Args:
        model: DCFormer, DCPythia or a model with attached composition, plain or as a bridge.
        norm: `raw` or `fold`, see `composition_scores`.

    Raises:
        HeadlabError: the model has no composed heads, or none whose maps depend on the tokens; see `composition_scores`.
    """
    with torch.no_grad():
        layers = [_map_layer(model, row, norm) for row in _stream(model, "")]
        if not any(layer.ends for layer in layers):
            name = type(bare_model(model)).__name__
            raise HeadlabError(f"{name} has no composition maps that read the stream; headlab.dcmha.attach gives it some")
        return _scores(model, "M", norm, layers)


@dataclass(frozen=True)
class _Layer:
    """What one layer writes into the stream and reads from it."""

    row: Attention
    heads: Sequence[Head]
    writes: Float[Tensor, "source number d_model"]
    ends: Sequence[Reader]
    reads: Float[Tensor, "column d_model"]
    widths: Sequence[int]  # columns of each reader


def _stream(model: nn.Module, stack: str) -> list[Attention]:
    """The attention modules along one residual stream."""
    every = rows(model)
    streams = [name for name in dict.fromkeys(row.stack for row in every) if name != "cross"]
    if stack not in streams:
        if streams == [""]:
            raise HeadlabError(f"the model has one stack of layers only: leave out stack={stack!r}")
        raise HeadlabError(
            f"stack is {' or '.join(map(repr, streams))}, not {stack!r}: an encoder-decoder has two residual streams, heads "
            "compose within one (cross-attention writes into one what it reads from the other)"
        )
    return [row for row in every if row.stack == stack]


def _triangle(weight: Float[Tensor, "block long short"]) -> Float[Tensor, "block rank short"]:
    """R with |W X| = |R X| for any X."""
    return torch.linalg.qr(weight, mode="r").R


def _layer(model: nn.Module, row: Attention, norm: Norm, kind: str) -> _Layer:
    """A layer whose heads read queries, keys or values."""
    if not row.slots:  # pruning left it without heads
        nothing = weight_blocks(row.projection(row.family.o), row.d_head, "in")[:0]
        return _Layer(row, (), nothing, (), nothing.flatten(0, 1), ())
    found = circuits_of(model, row, norm)
    carrying = [found.carrying[head] for head in sorted(found.carrying)]
    searching = [found.searching[head] for head in sorted(found.searching)]
    values, outputs = zip(*carrying, strict=True)
    writes = _triangle(found.v)[list(values)] @ found.o[list(outputs)]
    first, second, pairs = {
        "Q": (found.q, found.k, searching),
        "K": (found.k, found.q, [(kv, slot) for slot, kv in searching]),
        "V": (found.v, found.o.mT, carrying),
    }[kind]
    readers = row.heads if kind == "V" or row.compose is None else row.at("scores").heads
    reads = _triangle(second)[[j for _, j in pairs]] @ first.mT[[i for i, _ in pairs]]
    return _Layer(row, row.heads, writes, readers, reads.flatten(0, 1), [reads.shape[1]] * len(readers))


def _map_layer(model: nn.Module, row: Attention, norm: Norm) -> _Layer:
    """A layer whose composition maps read, branch by branch."""
    source, compose, weights = _layer(model, row, norm, "V"), row.compose, dict[str, Tensor]()
    if compose is None or not row.slots:
        return replace(source, ends=(), reads=source.reads[:0], widths=())
    low_rank = [place for place in compose.places if place.endswith(("_query", "_key"))]
    gates = [place for place in compose.places if place.endswith("_gate")]
    for name, places in (("dw1", low_rank), ("dd", gates)):
        if places:
            layer: Any = bare(getattr(compose, name))
            weights |= zip(places, layer.weight.to(source.reads.dtype).chunk(len(places)), strict=True)
    for place in gates:  # there is a row for every head, of which some may be pruned
        weights[place] = weights[place][compose.ends(place.split("_")[0])[1]]
    places = [place for place in compose.places if place in weights]
    before = norm_before(model, row) if norm == "fold" else None
    reads = [weights[place] if before is None else gain(before).before(weights[place].T).T for place in places]
    ends = [MapReader(row.row, row.layer, place, row.stack) for place in places]
    joined = torch.cat([source.reads[:0], *reads])
    return replace(source, ends=ends, reads=joined, widths=[len(weight) for weight in reads])


def _scores(model: nn.Module, what: str, norm: Norm, layers: Sequence[_Layer]) -> CompositionScores:
    sources = tuple(head for layer in layers for head in layer.heads)
    readers = tuple(end for layer in layers for end in layer.ends)
    if not sources:
        raise HeadlabError("the model has no heads left, so there is nothing to compose")
    values = torch.full((len(sources), len(readers)), torch.nan)
    norms = [_norms(layer) for layer in layers]
    top = right = 0
    for i, (layer, (written, _)) in enumerate(zip(layers, norms, strict=True)):
        right += len(layer.ends)
        left = right
        for later, (_, read) in zip(layers[i + 1 :], norms[i + 1 :], strict=True):
            block = slice(top, top + len(layer.heads)), slice(left, left + len(later.ends))
            if layer.heads and later.ends:
                values[block] = (_products(layer, later) / (written[:, None] * read)).cpu().float()
            left += len(later.ends)
        top += len(layer.heads)
    notes = list(dict.fromkeys(note for layer in layers for note in approximate(model, layer.row)))
    record = {"model": describe(model), "norm": norm, "exact": not notes, "approximate": notes}
    return CompositionScores(what, sources, readers, values, layers[0].writes.shape[-1], record)


def _products(layer: _Layer, later: _Layer) -> Float[Tensor, "source reader"]:
    """The norms |A B| for the heads of one layer and the readers of a later one."""
    n_heads, number, _ = layer.writes.shape
    squares = (layer.writes.flatten(0, 1) @ later.reads.T).square_()
    return _by_reader(squares.view(n_heads, number, -1).sum(1), later).sqrt()


def _norms(layer: _Layer) -> tuple[Float[Tensor, " source"], Float[Tensor, " reader"]]:
    written = layer.writes.square().sum((1, 2)).sqrt()
    return written, _by_reader(layer.reads.square().sum(1)[None], layer)[0].sqrt()


def _by_reader(columns: Float[Tensor, "source column"], layer: _Layer) -> Float[Tensor, "source reader"]:
    """The sums over each reader's columns."""
    owners = torch.arange(len(layer.ends)).repeat_interleave(torch.tensor(layer.widths, dtype=torch.long))
    return columns.new_zeros(len(columns), len(layer.ends)).index_add_(1, owners.to(columns.device), columns)
