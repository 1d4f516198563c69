"""The search for attention modules in a model, and the heads that each one holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ..errors import HeadlabError
from ..tables import Head
from .families import Family, family_of

Groups = tuple[tuple[int, tuple[int | None, ...]], ...]
"""The heads of one attention module as they lie in its weights: for every key-value head its original number and the
original numbers of the query heads that read it; None is a padding slot (a query head of zeros)."""


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention module found in a model, plain or bridged, and the heads it holds (at a site, see `at`)."""

    row: int
    layer: int
    stack: str
    path: str
    module: nn.Module
    family: Family
    groups: Groups
    d_head: int
    site: str = "output"

    @property
    def slots(self) -> tuple[int | None, ...]:
        """The original number of the head in each query slot, in the order of the site; None is padding."""
        return tuple(head for _, heads in self.groups for head in heads)

    @property
    def head_slots(self) -> list[int]:
        """For each head, in the order of `heads`, its slot."""
        slots = self.slots
        return sorted((i for i, head in enumerate(slots) if head is not None), key=lambda i: slots[i] or 0)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads, by their original number."""
        owner = {head: group for group, heads in self.groups for head in heads}
        site = f"{self.path}.{self.family.o}"
        indices = sorted(head for head in self.slots if head is not None)
        return tuple(Head(self.row, self.layer, i, self.stack, owner[i], self.d_head, site) for i in indices)

    @property
    def core(self) -> Any:
        """The module that computes the heads' outputs; `Any`, for torch does not know its attributes."""
        return submodule(self.module, self.family.core)

    @property
    def compose(self) -> Any:
        """The maps of an attention with composed heads (`headlab.dcmha.Compose`); None in plain attention."""
        found = getattr(bare(self.core), "compose", None)
        return None if found is None else bare(found)

    def at(self, site: str) -> Attention:
        """The same module with the heads that can be removed at a site: `output`, or what composed heads have beside it.

        Raises:
            HeadlabError: there is no such site here.
        """
        if site == self.site:
            return self
        if not self.groups and self.compose is None:
            return replace(self, site=site)  # pruning left nothing of it
        if self.compose is None:
            raise HeadlabError(f"plain attention, as in {self.path}, has one site, 'output', not {site!r}")
        if site not in ("output", *self.compose.sites):
            raise HeadlabError(f"composed heads have the sites output, {', '.join(self.compose.sites)}, but not {site!r}")
        return replace(self, groups=grouped(self.compose.heads_at(site), self.compose.ratio), site=site)

    def projection(self, path: str) -> Any:
        """A projection of the module as it was before any bridge: an `nn.Linear`, a `Conv1D` or the like."""
        return bare(submodule(self.module, path))


def bare(module: nn.Module) -> nn.Module:
    """A module without the TransformerLens component that may wrap it."""
    while (original := module._modules.get("_original_component")) is not None:
        module = original
    return module


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path, looking through TransformerLens components."""
    for name in filter(None, path.split(".")):
        module = getattr(bare(module), name)
    return module


def attentions(root: nn.Module) -> tuple[Attention, ...]:
    """Every attention module of a model: encoder layers, then decoder layers, then cross-attention.

    Raises:
        HeadlabError: a module looks like attention but has no description, or there is no attention at all.
    """
    found = list(_described(root, ""))
    if not found:
        raise HeadlabError(f"found no attention module in {type(root).__name__}; {_HOW}")
    stacks = [_stack(path, family) for path, _, family in found]
    order = [name for name in ("enc", "dec", "cross") if name in stacks]
    rows: list[Attention] = []
    for stack in order:
        members = [item for item, name in zip(found, stacks, strict=True) if name == stack]
        for layer, (path, module, family) in enumerate(members):
            groups, d_head = _layout(module, family, path)
            rows.append(Attention(len(rows), layer, stack if len(order) > 1 else "", path, module, family, groups, d_head))
    return tuple(rows)


_HOW = (
    "describe it with hl.register(hl.Family(name, attention=(class name,), q=..., k=..., v=..., o=..., d_head=...)), see "
    "help(hl.Family)"
)


def _described(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, Family]]:
    """Attention modules below `module`, depth first; an undescribed one is an error."""
    original = bare(module)
    if (family := family_of(original)) is not None:
        yield path, module, family
        return
    any_below = False
    for child_name, child in original.named_children():
        for item in _described(child, f"{path}.{child_name}".lstrip(".")):
            any_below = True
            yield item
    name = type(original).__name__
    if "Attention" in name and not any_below and any(True for _ in original.parameters()):
        raise HeadlabError(f"found no description of the attention module {path or 'itself'} ({name}); {_HOW}")


def _stack(path: str, family: Family) -> str:
    """`enc`, `dec` or `cross`, from where the module stands."""
    names = path.split(".")
    if names[-1] in family.cross:
        return "cross"
    return "enc" if "encoder" in names and "decoder" not in names else "dec"


def _layout(module: nn.Module, family: Family, path: str) -> tuple[Groups, int]:
    """Read groups and head size off the weights (a pruned module says itself which heads it holds)."""
    core = bare(submodule(module, family.core))
    d_head = getattr(core, family.d_head, None)
    if not isinstance(d_head, int):
        raise HeadlabError(f"{path} ({type(bare(module)).__name__}) has no whole number {family.d_head!r}; {_HOW}")
    if (wrapped := getattr(core, "compose", None)) is not None:
        compose: Any = bare(wrapped)
        return grouped(compose.heads_at("output"), compose.ratio), d_head
    if (groups := getattr(core, "headlab_groups", None)) is not None:
        return groups, d_head
    if family.joined and getattr(core, "is_cross_attention", False):
        raise HeadlabError(f"{path} is cross-attention, whose queries have a projection of their own; {_HOW}")
    n_slots = width_in(bare(submodule(module, family.o))) // d_head
    n_kv = n_slots if family.joined == "heads" else width_out(bare(submodule(module, family.v))) // d_head
    if family.joined == "blocks":
        n_kv = (n_kv - n_slots) // 2
    if n_kv < 1 or n_slots % n_kv:
        raise HeadlabError(f"{path} has {n_slots} query heads on {n_kv} key-value heads, which headlab cannot group")
    ratio = n_slots // n_kv
    return tuple((g, tuple(range(g * ratio, (g + 1) * ratio))) for g in range(n_kv)), d_head


def grouped(heads: Sequence[int], ratio: int) -> Groups:
    """Heads by the key-value head they read, of which each serves `ratio` neighbouring heads."""
    return tuple((g, tuple(h for h in heads if h // ratio == g)) for g in sorted({h // ratio for h in heads}))


def transposed(projection: nn.Module) -> bool:
    """Whether the weight is stored as [in, out], as in GPT-2's Conv1D, and not as [out, in]."""
    return type(projection).__name__ == "Conv1D"


def width_in(projection: Any) -> int:
    return projection.weight.shape[0 if transposed(projection) else 1]


def width_out(projection: Any) -> int:
    return projection.weight.shape[1 if transposed(projection) else 0]


def weight_blocks(projection: Any, d_head: int, side: Literal["in", "out"]) -> torch.Tensor:
    """The weight as [block, d_head, other side], a block per head on the given side (a view)."""
    weight = projection.weight if transposed(projection) == (side == "in") else projection.weight.T
    return weight.unflatten(0, (-1, d_head))
