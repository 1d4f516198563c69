"""Composition maps read out of a forward pass: which head's scores and probabilities reach which head, and how strongly.

What is kept of a pass are the factors that tokens bring to the maps; a map is made when it is asked for. Means and
distances are over all visible pairs of a query and a key, and exact (see `factors.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import Batch, Batches, describe_data, prepare, real_tokens
from ..data.losses import forward
from ..errors import HeadlabError
from ..models.access import describe, evaluating, rows, tokenizer
from ..models.attention_modules import Attention, bare
from ..results import TensorResult
from .branches import STAGES
from .compose import Compose, Side, Sides
from .factors import FACTORS, PARTS, SIDES, LayerMaps, Moments, StageMaps, mean_product, moments

if TYPE_CHECKING:
    import pandas as pd


class Link(NamedTuple):
    """Scores of one head that reach the output of another one of the same layer."""

    layer: int
    source: int
    target: int
    weight: float

    def __str__(self) -> str:
        return f"L{self.layer}H{self.source} -> L{self.layer}H{self.target} {self.weight:.3g}"


@dataclass(frozen=True, eq=False)
class CompositionMaps(TensorResult):
    """Composition maps of texts. A map is [head from, head to], in float32; `heads` says which heads these are.

    `layer` is the number of a layer (of `layers`); `stage` is `pre` (scores) or `post` (probabilities); `query`, `key`
    and `example` are positions in the input, from its end if negative. All pairs of real tokens have maps, those that
    attention masks as well; means are over the visible ones. Every method raises `HeadlabError` where there is no such
    layer, stage, branch, example or token.

    Attributes:
        by_layer: what was read, layer by layer.
        record: how it was made: the model, the data, and the tokens (as text, where the model has a tokenizer).
    """

    kind = "maps"
    by_layer: tuple[LayerMaps, ...]
    record: dict[str, Any] = field(default_factory=dict)
    _found: dict[tuple[int, str], Moments] = field(default_factory=dict, init=False, repr=False)

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers."""
        return [layer.layer for layer in self.by_layer]

    def heads(self, layer: int, stage: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The heads that the rows (from) and columns (to) of a map stand for, by original number."""
        maps = self._stage(layer, stage)
        return maps.sources, maps.targets

    # --- maps

    def dense(self, layer: int, stage: str, query: int, key: int, example: int = 0) -> Float[Tensor, "head_from head_to"]:
        """The map C(i, j): entry [m, n] is the weight with which head m enters the composed head n."""
        return self._whole(layer, stage, query, key, example).float()

    def branch(
        self, layer: int, stage: str, branch: str, query: int, key: int, example: int = 0
    ) -> Float[Tensor, "head_from head_to"]:
        """The part of C(i, j) that is the identity, or of a branch; zeros where the model has no such branch."""
        return self._part(layer, stage, _known(branch), query, key, example).float()

    def mean(self, layer: int, stage: str, branch: str | None = None) -> Float[Tensor, "head_from head_to"]:
        """The mean map over all visible pairs of all examples, or that of one branch."""
        means = self._moments(layer, stage).means
        chosen = PARTS if branch is None else [_known(branch)]
        return torch.stack([means[part] for part in chosen]).sum(0).float()

    def effective(self, layer: int, query: int, key: int, example: int = 0) -> Float[Tensor, "head_from head_to"]:
        """The weight E[m, n] of every effective head "QK of m with OV of n" at one pair: E = C_pre(i, j) C_post(i, j).

        This is a definition: the scores of head m enter the probability map p with weight C_pre[m, p], and that enters
        the output of head n with weight C_post[p, n]; summed over p. The softmax in between is passed over, so E weighs
        paths and is no derivative. Rows are the heads with scores, columns those with outputs.
        """
        pre, post = (self._whole(layer, stage, query, key, example) for stage in STAGES)
        return (pre @ post).float()

    def mean_effective(self, layer: int) -> Float[Tensor, "head_from head_to"]:
        """The mean of `effective` over all visible pairs: of the products, which is not the product of the means."""
        pre, post = (self._stage(layer, stage) for stage in STAGES)
        return mean_product(pre, post, self._layer(layer).pairs()).float()

    def links(self) -> list[Link]:
        """All links between different heads, the strongest first, by the size of their mean effective weight."""
        links = []
        for layer in self.layers:
            sources, targets = self.heads(layer, "pre")[0], self.heads(layer, "post")[1]
            for m, weights in zip(sources, self.mean_effective(layer).tolist(), strict=True):
                links += [Link(layer, m, n, weight) for n, weight in zip(targets, weights, strict=True) if m != n]
        return sorted(links, key=lambda link: -abs(link.weight))

    def top(self, k: int = 10) -> list[Link]:
        """The k strongest of the `links`."""
        return self.links()[:k]

    # --- how far from the identity, and what makes the maps vary

    def distance(self, layer: int, stage: str, branch: str | None = None) -> float:
        """How far maps are from the identity: the root mean square over visible pairs of |C - I| / sqrt(heads to).

        So it is the length of what a composed head gets, per unit of each head, beside itself. With `branch`: of that
        branch alone (the identity's part of C - I is zero, or -I in maps without the identity).
        """
        products = self._moments(layer, stage).products
        square = products.sum() if branch is None else products.diagonal()[PARTS.index(_known(branch))]
        return sqrt(max(float(square), 0.0) / max(len(self._stage(layer, stage).targets), 1))

    def share(self, layer: int, stage: str, branch: str) -> float:
        """The share of a branch B in |C - I|^2: the mean of <B, C - I> over the mean of |C - I|^2.

        The shares of the five branches and the identity sum to 1; that of a branch which others undo is negative. All
        are 0 where every map is the identity.
        """
        products = self._moments(layer, stage).products
        square = float(products.sum())
        return float(products[PARTS.index(_known(branch))].sum()) / square if square > 0 else 0.0

    def explained_by_query(self, layer: int, stage: str) -> float:
        """How much of the maps' variation over visible pairs the query alone explains, from 0 to 1.

        It is 1 - E|C(i, j) - mean over j of C(i, j)|^2 / E|C(i, j) - mean of C|^2; 1 also where maps do not vary at
        all, for then the query leaves nothing open.
        """
        return self._moments(layer, stage).explained

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per layer and stage; the columns of branches hold their shares (see `share`)."""
        import pandas as pd

        lines = []
        for layer in self.layers:
            for stage in STAGES:
                heads_from, heads_to = map(len, self.heads(layer, stage))
                line: dict[str, Any] = {"layer": layer, "stage": stage, "heads_from": heads_from, "heads_to": heads_to}
                line["distance"] = self.distance(layer, stage)
                line |= {part: self.share(layer, stage, part) for part in PARTS}
                lines.append(line | {"explained_by_query": self.explained_by_query(layer, stage)})
        return pd.DataFrame(lines)

    def weights(self) -> pd.DataFrame:
        """The mean maps as a table, with one line per layer, stage, head from and head to."""
        import pandas as pd

        return pd.DataFrame(
            {"layer": layer, "stage": stage, "from": m, "to": n, "weight": weight}
            for layer in self.layers
            for stage in STAGES
            for m, row in zip(self.heads(layer, stage)[0], self.mean(layer, stage).tolist(), strict=True)
            for n, weight in zip(self.heads(layer, stage)[1], row, strict=True)
        )

    # --- saving

    def _parts(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        layers = []
        for i, layer in enumerate(self.by_layer):
            tensors[f"{i}.real"] = layer.real.clone()
            stages = {}
            for stage, maps in layer.stages.items():
                stages[stage] = (maps.sources, maps.targets, maps.per_group, maps.residual)
                tensors |= {f"{i}.{stage}.{name}": x for name, x in maps.tensors()}
            layers.append({"layer": layer.layer, "causal": layer.causal, "window": layer.window, "stages": stages})
        return {"layers": json.dumps(layers)}, tensors

    @classmethod
    def _from_parts(cls, texts: dict[str, str], tensors: dict[str, Tensor], record: dict[str, Any]) -> Self:
        by_layer = []
        for i, about in enumerate(json.loads(texts["layers"])):
            stages = {}
            for stage, (sources, targets, per_group, residual) in about.pop("stages").items():
                start = f"{i}.{stage}"
                query, key = (Side(*(tensors.get(f"{start}.{side}.{name}") for name in FACTORS)) for side in SIDES)
                ends = tuple(sources), tuple(targets)
                stages[stage] = StageMaps(*ends, per_group, residual, tensors.get(f"{start}.base"), query, key)
            by_layer.append(LayerMaps(**about, real=tensors[f"{i}.real"], stages=stages))
        return cls(tuple(by_layer), record)

    def __repr__(self) -> str:
        real = self.by_layer[0].real
        return f"CompositionMaps({len(self.by_layer)} layers, {len(real)} examples, {int(real.sum())} tokens)"

    # --- inside

    def _layer(self, layer: int) -> LayerMaps:
        for found in self.by_layer:
            if found.layer == layer:
                return found
        names = ", ".join(map(repr, self.layers))
        raise HeadlabError(f"there are no composition maps of layer {layer!r}: the layers are {names}")

    def _stage(self, layer: int, stage: str) -> StageMaps:
        found = self._layer(layer)
        if stage not in STAGES:
            raise HeadlabError(f"a stage is {' or '.join(map(repr, STAGES))}, not {stage!r}")
        return found.stages[stage]

    def _part(self, layer: int, stage: str, part: str, query: int, key: int, example: int) -> Tensor:
        maps, real = self._stage(layer, stage), self._layer(layer).real
        n_examples, n_pos = real.shape
        for name, at, n in (("example", example, n_examples), ("query", query, n_pos), ("key", key, n_pos)):
            if not -n <= at < n:
                raise HeadlabError(f"there is no {name} {at}: the maps are of {n_examples} examples of {n_pos} tokens")
            if name != "example" and not real[example, at]:
                raise HeadlabError(f"{name} {at} of example {example} is padding, whose maps mean nothing")
        if part not in maps.of("query") + maps.of("key"):
            return maps.constant(part) if part in PARTS[:2] else torch.zeros_like(maps.same)
        return maps.tokens(part, example, [query if part.startswith("query") else key])[0]

    def _whole(self, layer: int, stage: str, *pair: int) -> Tensor:
        return torch.stack([self._part(layer, stage, part, *pair) for part in PARTS]).sum(0)

    def _moments(self, layer: int, stage: str) -> Moments:
        maps = self._stage(layer, stage)
        if (layer, stage) not in self._found:
            self._found[layer, stage] = moments(maps, self._layer(layer).pairs())
        return self._found[layer, stage]


def _known(part: str) -> str:
    if part not in PARTS:
        raise HeadlabError(f"no branch is called {part!r}: there are {', '.join(PARTS)}")
    return part


def composition_maps(model: nn.Module, tokens: Tensor | Batch | str | Batches) -> CompositionMaps:
    """Read the composition maps of a model on texts, by one forward pass per batch.

    Args:
        model: DCFormer, DCPythia or a model with attached composition, plain or as a bridge. Branches that are scaled at
            the moment (`scaled`) are so in the maps; masks on the sites of heads and branches are no part of them.
        tokens: token numbers, [batch, pos]; or a batch, a dict with `input_ids` (and `attention_mask`); or a text, or a
            list of texts, for the model's tokenizer; or a list of batches. In the result all have the length of the
            longest.

    Raises:
        HeadlabError: the model has no composed heads, or the batches are bad (see `data.batches.prepare`).

    >>> maps = composition_maps(model, torch.arange(7)[None])  # doctest: +SKIP
    >>> maps.dense(2, "post", query=6, key=3).shape  # doctest: +SKIP
    torch.Size([16, 16])
    """
    found = [row for row in rows(model) if row.compose is not None]
    if not found:
        raise HeadlabError(f"{type(model).__name__} has no composable heads; headlab.dcmha.attach gives it some")
    if isinstance(tokens, Tensor):
        tokens = {"input_ids": tokens}
    data = prepare(model, [tokens] if isinstance(tokens, (str, Mapping)) else tokens)  # type: ignore[arg-type]
    if odd := [tuple(mask.shape) for batch in data if (mask := batch.get("attention_mask")) is not None and mask.ndim != 2]:
        raise HeadlabError(f"an attention_mask of composition maps says which tokens are real, [batch, pos], not {odd[0]}")
    passes: list[list[Sides]] = [[] for _ in found]
    with evaluating(model), torch.no_grad(), _reading(found, passes):
        for number, batch in enumerate(data, 1):
            forward(model, batch)
            for row, sides in zip(found, passes, strict=True):
                if len(sides) != number:
                    raise HeadlabError(
                        f"a forward pass went {len(sides) - number + 1} times through the maps of {row.path}, not once"
                    )
        by_layer = tuple(_layer_maps(row, sides, data) for row, sides in zip(found, passes, strict=True))
    record = {"model": describe(model), "data": describe_data(data), "tokens": _texts(model, data)}
    scales = {row.path: changed for row in found if (changed := _changed(row.compose))}
    return CompositionMaps(by_layer, record | ({"scale": scales} if scales else {}))


@contextmanager
def _reading(found: Iterable[Attention], passes: Iterable[list[Sides]]) -> Iterator[None]:
    """Inside, what tokens bring to the maps of every layer is kept, in float32 on the CPU."""

    def reader(sides: list[Sides]) -> Any:
        return lambda _, __, output: sides.append({name: Side(*map(_kept, _factors(x))) for name, x in output.items()})

    handles = [row.compose.register_forward_hook(reader(sides)) for row, sides in zip(found, passes, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _factors(side: Side) -> list[Tensor | None]:
    return [getattr(side, name) for name in FACTORS]


def _kept(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to("cpu", torch.float32, copy=True)


def _layer_maps(row: Attention, passes: list[Sides], data: list[Batch]) -> LayerMaps:
    compose: Compose = row.compose
    stages = {}
    for stage in STAGES:
        sides = []
        for name in SIDES:
            w1, w2, gate = map(_joined, zip(*(_factors(sides[f"{stage}_{name}"]) for sides in passes), strict=True))
            low_rank, gated = (compose.scale[f"{stage}_{branch}"] for branch in (name, f"{name}_gate"))
            sides.append(Side(w1, None if w2 is None else w2 * low_rank, None if gate is None else gate * gated))
        place = f"{stage}_base"
        base = _kept(compose.base_map(stage) * compose.scale[place]) if place in compose.places else None
        sources, targets = compose.ends(stage)
        stages[stage] = StageMaps(tuple(sources), tuple(targets), compose.per_group, compose.residual, base, *sides)
    real = _joined([real_tokens(batch).cpu() for batch in data])
    return LayerMaps(row.layer, *_sight(row), real, stages)


def _sight(row: Attention) -> tuple[bool, int | None]:
    """Whether a layer is causal, and its window."""
    core: Any = bare(row.core)
    if (windows := getattr(core.config, "windows", None)) is not None:  # DCFormer and DCPythia
        return True, windows[core.layer_idx]
    causal, window = core.is_causal, getattr(core, "sliding_window", getattr(core.config, "sliding_window", None))
    if window is not None and not causal:
        raise HeadlabError(f"{row.path} sees a window of {window} to both sides: means of such maps are not supported")
    return causal, window


def _joined(parts: Iterable[Tensor | None]) -> Any:
    """Batches of different lengths as one tensor [example, pos, ...], with zeros on the right; None if there are none."""
    given = [x for x in parts if x is not None]
    if not given:
        return None
    longest = max(x.shape[1] for x in given)
    return torch.cat([F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) for x in given])


def _texts(model: nn.Module, data: list[Batch]) -> list[Any] | None:
    """The real tokens of every example: as text, or as numbers where there is no tokenizer; None without either."""
    if any("input_ids" not in batch for batch in data):
        return None
    examples = (pair for batch in data for pair in zip(batch["input_ids"], real_tokens(batch), strict=True))
    numbers = [ids[real].tolist() for ids, real in examples]
    words = tokenizer(model)
    return numbers if words is None else [words.convert_ids_to_tokens(example) for example in numbers]


def _changed(compose: Compose) -> dict[str, float]:
    return {place: compose.scale[place] for place in compose.places if compose.scale[place] != 1}
