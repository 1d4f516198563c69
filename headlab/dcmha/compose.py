"""The Compose function of DCMHA: heads recombined by a map that depends on the query and the key.

A map C(i, j) of shape [head from, head to] mixes the scores of a layer's heads before the softmax (stage `pre`), another
one its probabilities after it (stage `post`):

    C(i, j) = I + W_b + sum_r q1_r(i) q2_r(i)^T + diag(g_q(i)) + sum_r k1_r(j) k2_r(j)^T + diag(g_k(j))

The five branches beside the identity are `base` (W_b), `query` and `key` (low rank), `query_gate` and `key_gate`
(diagonal). All of them read the same input; maps of pairs are never formed unless they are asked for (`Compose.dense`).
Source: Improving Transformers with Dynamically Composable Multi-Head Attention (arXiv 2405.08553, ICML 2024) and its
public training code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import HeadlabError
from .branches import DYNAMIC, PLACES, SCORE_TAPS, SITES, STAGES, check_rank, heads_per_group, places_of

EPS = 1e-6  # of the norm of w1 over heads


@dataclass(frozen=True)
class Side:
    """What tokens bring to the maps of one stage, as queries or as keys; None where there is no such branch."""

    w1: Float[Tensor, "batch pos rank source"] | None = None
    w2: Float[Tensor, "batch pos rank target"] | None = None
    gate: Float[Tensor, "batch pos target"] | None = None

    def at(self, positions: Any) -> Side:
        """The same for some positions (a slice, or anything that indexes them)."""
        return Side(*(None if x is None else x[:, positions] for x in (self.w1, self.w2, self.gate)))


Sides = dict[str, Side]
"""By `pre_query`, `pre_key`, `post_query`, `post_key`."""


@dataclass(frozen=True)
class Constants:
    """What maps depend on beside the tokens, as it was when the layer ran.

    Blocks of queries that are computed again for their gradient see the same, whatever `scale` and hooks say by then.
    """

    scale: Mapping[str, float]
    base: Mapping[str, Float[Tensor, "source target"]]  # by stage


@dataclass(frozen=True)
class _Block:
    """One group of heads at one stage: a block on the diagonal of the map."""

    group: int
    sources: slice
    targets: slice
    shared: tuple[list[int], list[int]] | None  # where the same heads stand in both; None: everywhere the same


class Weight(nn.Module):
    """A tensor of weights of its own (TransformerLens keeps what is called `weight` in a registered module).

    `std` is the spread of fresh weights; who initialises a whole model, module by module, has to respect it.
    """

    def __init__(self, *shape: int, std: float) -> None:
        super().__init__()
        self.weight, self.std = nn.Parameter(torch.empty(shape)), std


class Projection(nn.Linear):
    """A linear map without bias, whose fresh weights have a spread (`std`) of their own too."""

    def __init__(self, n_in: int, n_out: int, std: float) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.std = std


class Compose(nn.Module):
    """The maps of one attention layer.

    Args:
        d_model: width of the layer's (normed) input, from which the maps follow.
        n_heads: heads of the layer; `groups` of them are mixed among themselves only.
        rank: of the low-rank branches.
        groups: number of groups; maps are block-diagonal.
        branches: which of `BRANCHES`, for both stages, or of `PLACES`, for one (published: all but `base`).
        stages: where heads are composed: `pre`, `post`, both, or nowhere (plain multi-head attention).
        residual: whether the identity is part of the map.
        hidden: width of the hidden layer that makes the low-rank factors; by default 2 * rank * heads in a group.

    Attributes:
        scale: a factor for every branch, 1 at first: `compose.scale["pre_query"] = 0` switches one off (see `scaled`).
        ratio: query heads per key-value head; whoever owns the maps sets it.
        joined: whether one projection makes queries, keys and values, so that all three are there for the same heads.
        kept: the heads (original numbers) whose `scores`, `probabilities` and `output` are there; pruning shortens them.
        taps: modules through which tensors pass, to hook (scores and patterns: in the eager backend).
        sites: modules that are called with ones `[batch, pos, head, 1]` when hooked, and whose result are gates.

    Raises:
        HeadlabError: heads that do not fit the groups, a rank above the heads in a group, an unknown branch or stage.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        rank: int = 2,
        groups: int = 1,
        branches: Sequence[str] = DYNAMIC,
        stages: Sequence[str] = STAGES,
        residual: bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.n_heads, self.groups, self.residual = d_model, n_heads, groups, residual
        self.places = places_of(branches, stages)
        per_group = heads_per_group(n_heads, groups)
        self.rank = check_rank(rank, per_group, self.places)
        self.per_group = per_group
        self.hidden = 2 * rank * per_group if hidden is None else hidden
        self.ratio, self.joined = 1, False
        self.kept = {name: list(range(n_heads)) for name in ("scores", "probabilities", "output")}
        self.scale = dict.fromkeys(PLACES, 1.0)
        self.taps = nn.ModuleDict({name: nn.Identity() for name in (*SCORE_TAPS, *self._factor_names())})
        self.sites = nn.ModuleDict({site: nn.Identity() for site in SITES if site != "output"})
        low_rank, gated, based = self._of("query", "key"), self._of("query_gate", "key_gate"), self._of("base")
        if low_rank:
            hidden, spread = self.hidden, sqrt(1 / self.hidden) * 2 / (per_group + rank) * 0.01
            self.dw1 = Projection(d_model, len(low_rank) * groups * hidden, std=sqrt(2 / (d_model + hidden)))
            self.qkw = Weight(len(low_rank), groups, hidden, 2 * rank, per_group, std=spread)
        if gated:
            self.dd = Projection(d_model, len(gated) * n_heads, std=sqrt(2 / (d_model + per_group)) * 0.005)
        if based:
            self.base = Weight(len(based), groups, per_group, per_group, std=0.1 / sqrt(per_group))
        self.initialise()

    def extra_repr(self) -> str:
        return f"heads={self.n_heads}, rank={self.rank}, groups={self.groups}, branches={', '.join(self.places) or 'none'}"

    def _of(self, *branches: str) -> list[str]:
        """The places of these branches that there are, in the order in which their weights lie."""
        return [place for place in self.places if place.split("_", 1)[1] in branches]

    def _factor_names(self) -> list[str]:
        names = []
        for place in self.places:
            low_rank = place.endswith(("_query", "_key"))
            names += [f"{place}_w1", f"{place}_w2"] if low_rank else [place]
        return names

    def initialise(self, identity: bool = False) -> None:
        """Draw fresh weights as the public training code does: maps start next to the identity.

        With `identity`, gates and w2 are exactly zero, w1 as published: maps are the identity and still learn. A base is
        zero, or, where the identity is no part of the map, the identity itself.

        Raises:
            HeadlabError: they cannot start as the identity, for it is no part of the map and a stage has no base.
        """
        for name, module in self.named_children():
            if isinstance(module, (Weight, Projection)):
                nn.init.normal_(module.weight, std=0.0 if identity and name in ("dd", "base") else module.std)
        if not identity:
            return
        with torch.no_grad():
            if self._of("query", "key"):
                self.qkw.weight[..., self.rank :, :] = 0
            if not self.residual:
                if len(based := self._of("base")) < len(STAGES):
                    raise HeadlabError(
                        "without the residual identity, maps start as the identity only where both stages have a base, but "
                        f"they have {', '.join(based) or 'none'}"
                    )
                self.base.weight.copy_(torch.eye(self.per_group).expand_as(self.base.weight))

    @property
    def trivial(self) -> bool:
        """Whether every map is the identity whatever the input: this is plain multi-head attention."""
        return not self.places and self.residual

    # --- from tokens to factors

    def forward(self, x: Float[Tensor, "batch pos d_model"], only: str = "") -> Sides:
        """What every token brings to the maps, as query and as key; x is what the layer's q, k and v are made of.

        With `only` (`query` or `key`) just that: where the queries are other tokens than the keys.
        """
        values: dict[str, dict[str, Tensor]] = {f"{stage}_{side}": {} for stage in STAGES for side in ("query", "key")}
        low_rank, gated = (
            [place for place in self._of(*branches) if only in place]
            for branches in (("query", "key"), ("query_gate", "key_gate"))
        )
        if low_rank:
            hidden = F.gelu(self._projected(self.dw1, x, low_rank, self._of("query", "key")))
            hidden = hidden.unflatten(-1, (self.groups, self.hidden))
            weight = self.qkw.weight if not only else self.qkw.weight[self._rows(low_rank, self._of("query", "key"))]
            w = torch.einsum("btcgk,cgkrm->btcrgm", hidden, weight)  # r: the ranks of w1, then those of w2
            w1, w2 = w.split(self.rank, dim=3)
            # the norm is over all heads of a group, pruned ones too: they are left out only after it
            w1 = F.rms_norm(w1, (self.per_group,), eps=EPS)
            for i, place in enumerate(low_rank):
                values[place]["w1"] = self.taps[f"{place}_w1"](w1[:, :, i].flatten(3)[..., self._sources(place)])
                values[place]["w2"] = self.taps[f"{place}_w2"](w2[:, :, i].flatten(3)[..., self._targets(place)])
        if gated:
            gates = torch.tanh(self._projected(self.dd, x, gated, self._of("query_gate", "key_gate")))
            for i, place in enumerate(gated):
                gate = self.taps[place](gates[:, :, i, self._targets(place)])
                values[place.removesuffix("_gate")]["gate"] = gate
        return {name: Side(**parts) for name, parts in values.items()}

    def _projected(self, layer: nn.Linear, x: Tensor, wanted: list[str], places: list[str]) -> Tensor:
        """What a projection says for some of the places it is for, [batch, pos, place, number]."""
        if wanted == places:
            return layer(x).unflatten(-1, (len(places), -1))
        rows = layer.weight.unflatten(0, (len(places), -1))[self._rows(wanted, places)].flatten(0, 1)
        return F.linear(x, rows).unflatten(-1, (len(wanted), -1))

    @staticmethod
    def _rows(wanted: list[str], places: list[str]) -> slice:
        """Where some of the places stand among all: those of queries, or of keys, are every other one."""
        at = [places.index(place) for place in wanted]
        return slice(at[0], at[-1] + 1, at[1] - at[0] if len(at) > 1 else 1)

    def _sources(self, place: str) -> Any:
        heads = self.kept["scores" if place.startswith("pre") else "probabilities"]
        return slice(None) if len(heads) == self.n_heads else heads

    def _targets(self, place: str) -> Any:
        heads = self.kept["probabilities" if place.startswith("pre") else "output"]
        return slice(None) if len(heads) == self.n_heads else heads

    @property
    def key_numbers(self) -> int:
        """How many numbers a token brings as a key, which a cache has to keep beside its key and value."""
        n_scores, n_maps, n_outputs = (len(heads) for heads in self.kept.values())
        sizes = {"pre": (n_scores, n_maps), "post": (n_maps, n_outputs)}
        low_rank = sum(self.rank * sum(sizes[place.split("_")[0]]) for place in self._of("key"))
        return low_rank + sum(sizes[place.split("_")[0]][1] for place in self._of("key_gate"))

    def pack(self, sides: Sides) -> Float[Tensor, "batch pos number"]:
        """What the tokens bring as keys, in one tensor; only where there are such numbers."""
        return torch.cat([x.flatten(2) for x in self._key_parts(sides)], -1)

    def _key_parts(self, sides: Sides) -> Iterator[Tensor]:
        for stage in STAGES:
            side = sides[f"{stage}_key"]
            yield from (x for x in (side.w1, side.w2, side.gate) if x is not None)

    def unpack(self, numbers: Float[Tensor, "batch pos number"]) -> Sides:
        """The key sides that `pack` has put into one tensor."""
        n_scores, n_maps, n_outputs = (len(heads) for heads in self.kept.values())
        sides, start = {}, 0
        for stage, source, target in (("pre", n_scores, n_maps), ("post", n_maps, n_outputs)):
            parts: dict[str, Tensor] = {}
            sizes = []
            if f"{stage}_key" in self.places:
                sizes += [("w1", self.rank * source, source), ("w2", self.rank * target, target)]
            if f"{stage}_key_gate" in self.places:
                sizes += [("gate", target, target)]
            for name, size, last in sizes:
                part = numbers[..., start : start + size]
                parts[name] = part if name == "gate" else part.unflatten(-1, (self.rank, last))
                start += size
            sides[f"{stage}_key"] = Side(**parts)
        return sides

    # --- applying the maps

    def mix(
        self,
        stage: str,
        a: Float[Tensor, "batch source query key"],
        query: Side,
        key: Side,
        gates: Mapping[str, Tensor] | None = None,
        constants: Constants | None = None,
    ) -> Float[Tensor, "batch target query key"]:
        """Scores or probabilities, composed. Factor by factor: nothing of the size of a map per pair is formed.

        Args:
            stage: `pre` or `post`.
            a: what is composed, for these queries and keys.
            query, key: the sides of the same queries and keys.
            gates: by place, factors [batch, target, query, 1] for what a branch adds.
            constants: scales and base maps of an earlier call of `constants`; by default those of now.
        """
        gates, constants = gates or {}, constants or self.constants((stage,))
        parts = [
            self._mixed(stage, block, a[:, block.sources], query, key, gates, constants) for block in self._blocks(stage)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def constants(self, stages: Sequence[str] = STAGES) -> Constants:
        """Scales and base maps as they are now."""
        base = {stage: self.base_map(stage) for stage in stages if f"{stage}_base" in self.places}
        return Constants(dict(self.scale), base)

    def _mixed(
        self,
        stage: str,
        block: _Block,
        a: Tensor,
        query: Side,
        key: Side,
        gates: Mapping[str, Tensor],
        constants: Constants,
    ) -> Tensor:
        same = _spread(a, block)
        total = same if self.residual else torch.zeros_like(same)
        for place, part in self._parts(stage, block, a, same, query, key, constants):
            if constants.scale[place] != 1:
                part = part * constants.scale[place]
            if place in gates:
                part = part * gates[place][:, block.targets]
            total = total + part
        return total

    def _parts(
        self, stage: str, block: _Block, a: Tensor, same: Tensor, query: Side, key: Side, constants: Constants
    ) -> Iterator[tuple[str, Tensor]]:
        """What every branch adds, [batch, target, query, key]; `same` is `a` where the targets' own heads stand."""
        if (place := f"{stage}_base") in self.places:
            yield place, torch.einsum("bmts,mn->bnts", a, constants.base[stage][block.sources, block.targets])
        for side, factors, pos in (("query", query, "t"), ("key", key, "s")):
            if factors.w1 is not None and factors.w2 is not None:
                hidden = torch.einsum(f"bmts,b{pos}rm->brts", a, factors.w1[..., block.sources])
                yield f"{stage}_{side}", torch.einsum(f"brts,b{pos}rn->bnts", hidden, factors.w2[..., block.targets])
            if factors.gate is not None:
                gate = factors.gate[..., block.targets].transpose(1, 2)  # [batch, target, pos]
                yield f"{stage}_{side}_gate", same * (gate[..., None] if side == "query" else gate[:, :, None])

    def base_map(self, stage: str) -> Float[Tensor, "source target"]:
        """W_b of a stage, with zeros between groups."""
        weight = self.base.weight[self._of("base").index(f"{stage}_base")]
        dense = torch.block_diag(*weight) if self.groups > 1 else weight[0]
        return self.taps[f"{stage}_base"](dense[self._sources(stage)][:, self._targets(stage)])

    def _blocks(self, stage: str) -> list[_Block]:
        sources, targets = self.ends(stage)
        blocks = []
        for group in range(self.groups):
            heads = range(group * self.per_group, (group + 1) * self.per_group)
            rows, columns = ([i for i, head in enumerate(ends) if head in heads] for ends in (sources, targets))
            here, there = [sources[i] for i in rows], [targets[i] for i in columns]
            both = sorted(set(here) & set(there))
            shared = None if here == there else ([here.index(h) for h in both], [there.index(h) for h in both])
            blocks.append(_Block(group, _run(rows), _run(columns), shared))
        return blocks

    def ends(self, stage: str) -> tuple[list[int], list[int]]:
        """The heads that a stage's maps lead from and to, by original number."""
        names = ("scores", "probabilities") if stage == "pre" else ("probabilities", "output")
        return self.kept[names[0]], self.kept[names[1]]

    # --- dense maps, on request

    def branch_maps(
        self, stage: str, query: Side, key: Side
    ) -> dict[str, Float[Tensor, "batch pos source target"] | Float[Tensor, "source target"]]:
        """The parts of the maps C(i, j) of a stage, for pairs: `query` and `key` hold one position for each pair.

        The identity and the base, which are the same for every pair, come as [source, target].
        """
        sources, targets = (torch.tensor(ends, device=self.empty().device) for ends in self.ends(stage))
        same = (sources[:, None] == targets).to(self.empty().dtype)
        within = sources[:, None] // self.per_group == targets // self.per_group
        maps = {"identity": same} if self.residual else {}
        if (place := f"{stage}_base") in self.places:
            maps["base"] = self.scale[place] * self.base_map(stage)
        for branch, side in (("query", query), ("key", key)):
            if side.w1 is not None and side.w2 is not None:
                low_rank = torch.einsum("bprm,bprn->bpmn", side.w1, side.w2) * within
                maps[branch] = self.scale[f"{stage}_{branch}"] * low_rank
            if side.gate is not None:
                maps[f"{branch}_gate"] = self.scale[f"{stage}_{branch}_gate"] * side.gate[:, :, None] * same
        return maps

    def dense(self, stage: str, query: Side, key: Side) -> Float[Tensor, "*pairs source target"]:
        """The maps C(i, j) of a stage for pairs of a query and a key, [batch, pos, source, target] where they differ."""
        sources, targets = self.ends(stage)
        parts = self.branch_maps(stage, query, key).values()
        return sum(parts, self.empty().new_zeros(len(sources), len(targets)))

    def empty(self) -> Tensor:
        """An empty tensor with the weights' dtype and device."""
        return next((p.detach().new_empty(0) for p in self.parameters()), torch.empty(0))

    # --- gates and pruning

    def spread(self, x: Float[Tensor, "batch kv pos d"], what: str) -> Float[Tensor, "batch head pos d"]:
        """Keys or values, one for every head whose `scores` or `output` (`what`) is there.

        Of the key-value heads, only those are there that some of these heads read.
        """
        wanted, present = [head // self.ratio for head in self.kept[what]], self.groups_held(what)
        return x if wanted == present else x[:, [present.index(group) for group in wanted]]

    def held(self, what: str) -> list[int]:
        """The heads whose queries (`scores`) or values (`output`) are computed."""
        return sorted({*self.kept["scores"], *self.kept["output"]}) if self.joined else self.kept[what]

    def groups_held(self, what: str) -> list[int]:
        """The key-value heads whose keys (`scores`) or values (`output`) are computed."""
        return sorted({head // self.ratio for head in self.held(what)})

    def heads_at(self, site: str) -> list[int]:
        """The heads (original numbers) that can be removed at a site; none where that branch is missing."""
        if site == "head":
            return sorted(set().union(*self.kept.values()))
        if site in self.kept:
            return self.kept[site]
        return self.ends(site.split("_")[0])[1] if site in self.places else []

    def gates(self, x: Float[Tensor, "batch pos ..."]) -> dict[str, Float[Tensor, "batch head pos 1"]]:
        """The gates that hooks on the sites ask for, by site; `head` is passed on to the three sites it consists of."""
        found: dict[str, Tensor] = {}
        for site, point in self.sites.items():
            if point._forward_hooks or point._forward_pre_hooks:
                ones = x.new_ones(*x.shape[:2], len(self.heads_at(site)), 1)
                found[site] = point(ones).transpose(1, 2)
        if (whole := found.pop("head", None)) is not None:
            heads = self.heads_at("head")
            for site, kept in self.kept.items():
                gate = whole[:, [heads.index(head) for head in kept]]
                found[site] = found[site] * gate if site in found else gate
        return found

    def tapped(self) -> bool:
        """Whether anything listens to scores or patterns, which only the eager backend has as a whole."""
        return any(self.taps[name]._forward_hooks or self.taps[name]._forward_pre_hooks for name in SCORE_TAPS)

    def _adding(self, place: str) -> Tensor:
        """The weights without which a branch adds nothing, as a view: [group, head of the group that it adds to, ...]."""
        branch = place.split("_", 1)[1]
        if branch == "base":
            return self.base.weight[self._of("base").index(place)].movedim(-1, 1)
        if branch in ("query", "key"):
            return self.qkw.weight[self._of("query", "key").index(place), ..., self.rank :, :].movedim(-1, 1)  # makes w2
        gates = self._of("query_gate", "key_gate")
        return self.dd.weight.view(len(gates), self.groups, self.per_group, -1)[gates.index(place)]

    @torch.no_grad()
    def silence(self, place: str, heads: Iterable[int]) -> None:
        """Let a branch add nothing to these composed heads any more, by zeros in its weights."""
        for head in heads:
            self._adding(place)[divmod(head, self.per_group)] = 0

    @torch.no_grad()
    def beyond_identity(self) -> dict[str, float]:
        """How far maps are from the identity: for each place that is, the largest weight that would have to be zero."""
        found = {}
        for place in self.places:
            weight = self._adding(place)
            if place.endswith("_base") and not self.residual:
                weight = weight - torch.eye(self.per_group, dtype=weight.dtype, device=weight.device)
            if far := float(weight.abs().max()):
                found[place] = far
        return found

    def narrow(self, kept: Mapping[str, Sequence[int]], places: Sequence[str]) -> None:
        """Keep only these heads and branches, in place. The factors' weights stay whole: the norm over heads needs them."""
        dropped = [place for place in self.places if place not in places]
        for names, layer, per in (
            (("query", "key"), "qkw", 1),
            (("query", "key"), "dw1", self.groups * self.hidden),
            (("query_gate", "key_gate"), "dd", self.n_heads),
            (("base",), "base", 1),
        ):
            before = self._of(*names)
            left = [i for i, place in enumerate(before) if place not in dropped]
            if len(left) == len(before):
                continue
            if not left:
                delattr(self, layer)
                continue
            module = getattr(self, layer)
            weight = module.weight.detach().unflatten(0, (len(before), per))[left].flatten(0, 1)
            module.weight = nn.Parameter(weight.contiguous(), requires_grad=module.weight.requires_grad)
            if isinstance(module, nn.Linear):
                module.out_features = len(weight)
        self.places = tuple(place for place in self.places if place in places)
        self.kept = {name: list(heads) for name, heads in kept.items()}
        self.taps = nn.ModuleDict({name: self.taps[name] for name in (*SCORE_TAPS, *self._factor_names())})


def _run(indices: list[int]) -> slice:
    """Neighbouring indices as a slice."""
    return slice(indices[0], indices[-1] + 1) if indices else slice(0, 0)


def _spread(a: Tensor, block: _Block) -> Tensor:
    """`a` with every head at its place among the targets; zeros for targets that are no source."""
    if block.shared is None:
        return a
    here, there = block.shared
    out = a.new_zeros(a.shape[0], block.targets.stop - block.targets.start, *a.shape[2:])
    return out.index_copy(1, torch.tensor(there, device=a.device, dtype=torch.long), a[:, here])


@contextmanager
def scaled(model: nn.Module, **scales: float) -> Iterator[None]:
    """Run a model with branches of every layer scaled inside the block: `scaled(model, pre_query=0, post_base=0.5)`.

    Raises:
        HeadlabError: the model has no composition, an unknown branch, or a scale outside [0, 1].
    """
    found = [module for module in model.modules() if isinstance(module, Compose)]
    if not found:
        raise HeadlabError(f"{type(model).__name__} has no composable heads; headlab.dcmha.attach gives it some")
    if unknown := [name for name in scales if name not in PLACES]:
        raise HeadlabError(f"no branch is called {', '.join(unknown)}; the branches are {', '.join(PLACES)}")
    if bad := [f"{name}={value}" for name, value in scales.items() if not 0 <= value <= 1]:
        raise HeadlabError(f"a scale is from 0 to 1, not {', '.join(bad)}")
    before = [dict(compose.scale) for compose in found]
    for compose in found:
        compose.scale.update(scales)
    try:
        yield
    finally:
        for compose, scale in zip(found, before, strict=True):
            compose.scale.update(scale)
