"""Attention patterns, seen layer by layer while the model runs.

Nothing is stored: whoever looks gets one layer's pattern, and it is gone before the next layer computes. Roles, similarity
and pictures of heads all look through `at_patterns`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from ..errors import HeadlabError
from ..models.access import bare_model, rows, without_dropout
from ..models.attention_modules import Attention
from .sites import Pass, at_sites

EAGER = "eager"  # the one attention implementation that has its pattern as a whole
_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True, eq=False)
class Look:
    """One layer's attention in one forward pass. It shares memory with the model's own tensors: do not edit it in place.

    Attributes:
        pattern: probabilities after the softmax, and after soft caps and masks, heads in the order of `row.heads`. Where
            heads are composed (DCMHA): what multiplies the values, after the post maps; rows need not sum to 1.
        raw: where heads are composed, the softmax itself, before the post maps, for the heads that have probabilities
            (`row.at("probabilities").heads`: others than those of `pattern` once the model is pruned); else `pattern`.
        scores: what the softmax was taken of (composed, if heads are: after the pre maps), for the heads of `raw`; -inf
            where a query does not see the key. None unless asked for.
        run: the forward pass: the queries' positions, and which of them are real. Queries that are padding have patterns
            like any other, which mean nothing.
    """

    pattern: Float[Tensor, "batch head query key"]
    raw: Float[Tensor, "batch raw query key"]
    scores: Float[Tensor, "batch raw query key"] | None
    run: Pass


See = Callable[[Attention, Look], object]


@contextmanager
def at_patterns(
    model: nn.Module, see: See, wanted: Sequence[Attention] | None = None, *, scores: bool = False
) -> Iterator[None]:
    """Call `see(attention, look)` for these attention modules (by default all that have heads) in every forward pass.

    It is called once per module and pass, while that layer computes, in the order of computation. Inside the block
    dropout is off and attention is computed by the `eager` implementation (sdpa and flash have no pattern); both are as
    they were afterwards, in any case. Tensors are detached from the graph.

    Args:
        model: a plain model or a bridge, with plain or composed heads (DCMHA).
        see: gets the module and the `Look`; nothing of it stays alive unless `see` keeps it.
        wanted: attention modules from `models.access.rows(model)`.
        scores: whether `Look.scores` is wanted too.

    Raises:
        HeadlabError: a forward pass ended and a module had not shown its pattern (or its scores).
    """
    root = bare_model(model)
    looked = [row for row in (rows(model) if wanted is None else wanted) if row.slots]
    passes = _Passes()
    with ExitStack() as hooks:
        hooks.enter_context(without_dropout(model))
        if any(row.compose is None for row in looked):
            hooks.enter_context(_eager(root))
        softmax = hooks.enter_context(_Softmax()) if scores else None
        hooks.enter_context(at_sites(model, passes.computed, looked))
        for row in looked:
            for handle in _hook(row, see, passes, softmax):
                hooks.callback(handle.remove)
        hooks.callback(root.register_forward_pre_hook(passes.begin, with_kwargs=True).remove)
        hooks.callback(root.register_forward_hook(passes.end).remove)
        yield


class _Passes:
    """What is known of the forward pass under way."""

    def __init__(self) -> None:
        self.runs: dict[str, Pass] = {}  # of modules whose heads are computed, but which have not returned yet
        self.wanted = True  # whether whoever runs the model wants the patterns that it returns

    def begin(self, root: Any, _: Any, kwargs: Mapping[str, Any]) -> None:
        self.runs.clear()  # the pass before may have failed half-way
        asked = kwargs.get("output_attentions")
        self.wanted = bool(root.config.output_attentions if asked is None else asked)

    def computed(self, row: Attention, _: Tensor, run: Pass) -> None:
        self.runs[row.path] = run

    def end(self, *_: Any) -> None:
        self.wanted = True
        if self.runs:
            names = ", ".join(sorted(self.runs))
            raise HeadlabError(f"{names} ran, but not as a module that was called, so the patterns there were not seen")


def _hook(
    row: Attention, see: See, passes: _Passes, softmax: _Softmax | None
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    taps: dict[str, Tensor] = {}

    def look(_: nn.Module, __: Any, output: Any) -> None:
        if (run := passes.runs.pop(row.path, None)) is None:
            return  # replayed from memory, which nobody asked to see; if a site was passed by, at_sites says so
        if row.compose is None:
            pattern = raw = _returned(row, output)
            _forget(row.module, pattern)
        else:
            pattern, raw = taps.pop("pattern"), taps.pop("pattern_raw")
        scores = None if softmax is None else softmax.taken(row, raw)
        if row.compose is None and row.head_slots != list(range(len(row.slots))):  # padding, or groups in another order
            pattern = raw = pattern[:, row.head_slots]
            scores = None if scores is None else scores[:, row.head_slots]
        see(row, Look(pattern, raw, scores, run))

    def drop(_: nn.Module, __: Any, output: Any) -> Any:
        """Or else some models hold on to a layer's pattern until the next one is there."""
        return None if passes.wanted or not isinstance(output, tuple) else (*output[:-1], None)

    yield row.module.register_forward_hook(look, prepend=True)  # before any `drop`, also where contexts are nested
    yield row.module.register_forward_hook(drop)
    if row.compose is not None:
        for name in ("pattern_raw", "pattern"):
            tap = row.compose.taps[name]
            yield tap.register_forward_hook(lambda _, __, output, name=name: taps.update({name: output.detach()}))


def _returned(row: Attention, output: Any) -> Tensor:
    """The pattern among what a module returns: the last of it, in every family of transformers."""
    last = output[-1] if isinstance(output, tuple) else None
    if not isinstance(last, Tensor) or last.ndim != 4 or last.shape[1] != len(row.slots):
        found = f"a tensor of shape {tuple(last.shape)}" if isinstance(last, Tensor) else "none"
        raise HeadlabError(
            f"{row.path} ({type(row.core).__name__}) should return its attention pattern, [batch, {len(row.slots)} heads, "
            f"query, key], but it returned {found}: it has no eager implementation whose patterns could be seen"
        )
    return last.detach()


def _forget(module: nn.Module, pattern: Tensor) -> None:
    """Some components of TransformerLens keep the last pattern, and so all layers' would pile up."""
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor) and value.data_ptr() == pattern.data_ptr():
            setattr(module, name, None)


class _Softmax(TorchFunctionMode):
    """Keeps what the latest softmax over [batch, head, query, key] was taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAXES:
            given = args[0] if args else kwargs["input"]
            if given.ndim == 4:
                self.latest = given.detach()
        return func(*args, **kwargs)

    def taken(self, row: Attention, pattern: Tensor) -> Tensor:
        """The scores that belong to a pattern, which are then forgotten here."""
        scores, self.latest = self.latest, None
        if scores is None or scores.shape != pattern.shape:
            raise HeadlabError(f"{row.path} ({type(row.core).__name__}) took no softmax of scores that could be seen")
        return scores.masked_fill(scores <= torch.finfo(scores.dtype).min / 2, -torch.inf)


@contextmanager
def _eager(root: nn.Module) -> Iterator[None]:
    """Attention by the eager implementation, in every part of the model."""
    found = (vars(module).get("config") for module in root.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = {"": EAGER}  # this config alone, not those inside it
        yield
    finally:
        for config, name in before:
            config._attn_implementation = {"": name}
