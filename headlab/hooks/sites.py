"""Reading and editing what heads carry, at the place where it enters the output projection.

On a plain model the site is the input of the output projection; on a bridge it is `hook_z`, because with
`use_attn_result` TransformerLens never calls the projection. A forward pass in which a hooked site did not fire is an
error, never a silent no-op.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..errors import HeadlabError
from ..models.access import bare_model, rows
from ..models.attention_modules import Attention, bare, submodule


@dataclass(frozen=True)
class Pass:
    """What is known of the forward pass under way when a site fires."""

    positions: Tensor  # [batch, pos], counted among real tokens from the start of the sequence
    tokens: Tensor | None  # [batch, pos], where the model was given token numbers
    real: Tensor  # [batch, pos], False for padding
    first: bool  # False for a further step on a key-value cache


Edit = Callable[[Attention, Tensor, Pass], Tensor | None]
"""`edit(attention, z, run)`: z is [batch, pos, slot, d_head]; what it returns, if anything, takes the place of z.

At the sites that only composed heads have, z is a gate of 1 for every head, [batch, pos, slot, 1]."""

_replaying: ContextVar[str | None] = ContextVar("replaying", default=None)


_hooked: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many contexts each model is in


def is_hooked(model: nn.Module) -> bool:
    """Whether the model is inside `at_sites` right now."""
    return _hooked.get(bare_model(model), 0) > 0


@contextmanager
def replaying(path: str) -> Iterator[None]:
    """Inside, the attention module at `path` and what is below it are replayed from memory, edits and all: they are not
    edited once more, and need not fire."""
    token = _replaying.set(path)
    try:
        yield
    finally:
        _replaying.reset(token)


@contextmanager
def at_sites(model: nn.Module, edit: Edit, wanted: Sequence[Attention] | None = None) -> Iterator[None]:
    """Call `edit` at the sites of these attention modules (by default all that have heads) in every forward pass.

    Nested contexts run in the order in which they were entered. The model is restored in any case.

    Raises:
        HeadlabError: a forward pass ended and a site had not fired.
    """
    root = bare_model(model)
    hooked = [row for row in (rows(model) if wanted is None else wanted) if row.slots]
    owners: dict[nn.Module, _Surroundings] = {}
    with ExitStack() as hooks:
        _hooked[root] = _hooked.get(root, 0) + 1
        hooks.callback(lambda: _hooked.update({root: _hooked[root] - 1}))
        for row in hooked:
            owner = _owner(root, row)
            around = owners[owner] if owner in owners else owners.setdefault(owner, _Surroundings(owner))
            around.awaited.add(row.path)
            hooks.callback(_hook_site(row, around, edit).remove)
        for around in owners.values():
            hooks.callback(around.owner.register_forward_pre_hook(around.begin, with_kwargs=True).remove)
            hooks.callback(around.owner.register_forward_hook(around.end).remove)
        yield


def first_broken(model: nn.Module, run: Callable[[], object]) -> str:
    """In words, the first head in forward order whose output is not finite when `run` runs the model."""
    broken: list[str] = []

    def look(row: Attention, z: Tensor, _: Pass) -> None:
        bad = (~z.isfinite()).any(-1).any(0).any(0)  # [slot]
        broken.extend(str(head) for head, slot in zip(row.heads, row.head_slots, strict=True) if bad[slot])

    with torch.no_grad(), at_sites(model, look):
        run()
    if broken:
        return f"head {broken[0]} was the first whose output was so"
    return "the outputs of all heads are finite, so it appeared after them"


class _Surroundings:
    """The innermost model around some sites: an encoder, a decoder. It sees where a forward pass begins and ends."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.run: Pass | None = None
        self.awaited: set[str] = set()
        self.fired: set[str] = set()
        self.signature = inspect.signature(owner.forward)

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.fired.clear()
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        tokens = given.get("input_ids")
        main = tokens if tokens is not None else given.get("inputs_embeds")
        if main is None:
            raise HeadlabError(f"{type(self.owner).__name__} was given neither input_ids nor inputs_embeds")
        n_batch, n_pos = main.shape[:2]
        cache = given.get("past_key_values")
        seen = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        mask = padding = given.get("attention_mask")
        if not isinstance(padding, Tensor) or padding.ndim != 2 or padding.shape[1] < seen + n_pos:
            padding = torch.ones(n_batch, seen + n_pos, device=main.device)
        positions = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, seen : seen + n_pos]
        real = padding[:, seen : seen + n_pos].bool()
        if isinstance(mask, Mapping):
            mask = next(iter(mask.values()))  # one for each kind of layer
        if isinstance(mask, Tensor) and mask.ndim == 4:  # [batch, 1, pos, key], as generation makes for a static cache
            if seen == 0 and mask.shape[2] == n_pos:
                real = (mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0).diagonal(dim1=1, dim2=2)
            if (numbered := given.get("position_ids")) is not None:
                positions = numbered.expand(n_batch, n_pos)
        self.run = Pass(positions, tokens, real, first=seen == 0)

    def end(self, *_: Any) -> None:
        if (silent := self.awaited - self.fired) and _replaying.get() is None:
            raise HeadlabError(
                f"the forward pass did not go through {', '.join(sorted(silent))}: nothing was read or edited there, "
                "so its result is not what was asked for (was a layer skipped, or the model compiled before?)"
            )


def _owner(root: nn.Module, row: Attention) -> nn.Module:
    names = row.path.split(".")
    for depth in range(len(names) - 1, 0, -1):
        module = bare(submodule(root, ".".join(names[:depth])))
        if isinstance(module, PreTrainedModel):
            return module
    return root


def _hook_site(row: Attention, around: _Surroundings, edit: Edit) -> torch.utils.hooks.RemovableHandle:
    n_slots, d_head = len(row.slots), row.d_head if row.site == "output" else 1

    def fire(flat: Tensor) -> Tensor:
        around.fired.add(row.path)
        if _replaying.get() == row.path:
            return flat
        assert around.run is not None
        edited = edit(row, flat.reshape(*flat.shape[:2], n_slots, d_head), around.run)
        return flat if edited is None else edited.reshape(flat.shape)

    if row.site != "output":  # of composed heads: what passes there are gates
        return row.compose.sites[row.site].register_forward_hook(lambda _, __, ones: fire(ones))
    if (hook_z := getattr(row.module, "hook_z", None)) is not None:  # a bridge
        return hook_z.register_forward_hook(lambda _, __, output: fire(output))
    projection = row.projection(row.family.o)
    return projection.register_forward_pre_hook(lambda _, args: (fire(args[0]), *args[1:]))
