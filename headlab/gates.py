"""Multiplying heads by gates: masks, what stands in for a removed head, and recording what heads carry.

A gate of 1 leaves a head as it is; a gate of 0 removes it. Without a fill the removed head's output is zero at its site:
its value bias goes with it, the output projection's own bias stays (Michel et al. 2019, section 2.3, xi).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from .data.batches import Batches, describe_data, prepare, real_tokens
from .data.losses import forward
from .errors import HeadlabError
from .looking import Look, at_patterns
from .models.access import describe, evaluating, fingerprint, head_rows, rows
from .models.attention_modules import Attention, weight_blocks
from .results import FORMAT, Result, read_tensors, write
from .scores import Head, HeadMask
from .sites import Pass, at_sites

Gates = HeadMask | Sequence[Any] | Tensor
"""A mask; or one row of gates per layer, `[head]` or `[batch, head]`; or all in one tensor, `[..., all heads]`."""


@contextmanager
def masked(model: nn.Module, mask: Gates, fill: Fill | None = None, site: str = "output") -> Iterator[None]:
    """Run the model with heads removed (or multiplied by gates in between) inside the block.

    Args:
        model: a plain model or a bridge; it is restored in any case. Works under `generate` with a key-value cache.
        mask: a `HeadMask`, or gates; a row of shape [batch, head] gates every example differently. Masks nest.
        fill: what stands in for a removed head; by default zero.
        site: where a head is removed. `output`, its output: in plain attention that is the head, and the only site. Where
            heads are composed (DCMHA) also `scores`: its scores, before they are mixed; `probabilities`: its attention
            probabilities, before they are mixed; `head`: all three; or `pre_query`, `post_key_gate` ... (`dcmha.PLACES`):
            what one branch at one stage adds to the composed head.

    Raises:
        HeadlabError: the mask or fill is of the wrong shape or was made for another model; or, while running, a site
            did not fire.

    >>> with masked(model, HeadMask.without(heads(model), ["L3H5"])):  # doctest: +SKIP
    ...     logits = model(**batch).logits
    """
    check_fill(model, fill, site)
    found = rows(model, site)
    gates = _gates(model, mask, site)
    wanted = [row for row in found if not bool((gates[row.row] == 1).all())]
    stand_in = None if fill is None else StandIn(fill)
    by_slot_of: dict[int, Tensor] = {}  # made at the first pass, on the device of z

    def gate(row: Attention, z: Tensor, run: Pass) -> Tensor:
        by_head = gates[row.row]
        if by_head.ndim == 2 and len(by_head) != len(z):
            raise HeadlabError(f"there are gates for {len(by_head)} examples, but the batch has {len(z)}")
        if row.row not in by_slot_of or by_head.requires_grad or by_slot_of[row.row].dtype != z.dtype:
            by_slot_of[row.row] = _by_slot(row, by_head, z)
        by_slot = by_slot_of[row.row]
        return z * by_slot if stand_in is None else z * by_slot + (1 - by_slot) * stand_in(row, z, run)

    with at_sites(model, gate, wanted):
        yield


@torch.inference_mode(mode=False)  # a later pass may be for gradients
def _by_slot(row: Attention, gates: Tensor, z: Tensor) -> Tensor:
    """Gates of heads, [head] or [batch, head], as gates of slots that multiply z, [batch or 1, 1, slot, 1]."""
    by_slot = torch.ones(*gates.shape[:-1], len(row.slots), dtype=z.dtype)
    by_slot[..., row.places] = gates.to("cpu", z.dtype)
    return by_slot.view(-1, 1, len(row.slots), 1).to(z.device)


def check_fill(model: nn.Module, fill: Fill | None, site: str) -> None:
    """Raise `HeadlabError` unless the fill (if any) is one for this model and site."""
    if fill is None:
        return
    if site != "output":
        raise HeadlabError(f"a fill stands in for a head's output, so there is none for the site {site!r}: leave it out")
    fill.check(model)


def _gates(model: nn.Module, mask: Gates, site: str) -> list[Tensor]:
    """One tensor of gates per row, `[head]` or `[batch, head]`."""
    heads = head_rows(model, site)
    lengths = [len(row) for row in heads]
    if isinstance(mask, HeadMask):
        mask.check(heads, fingerprint(model) if "model" in mask.record else None)
        return [torch.from_numpy(row) for row in mask.rows]
    if isinstance(mask, Tensor):
        if mask.ndim == 0 or mask.shape[-1] != sum(lengths):
            raise HeadlabError(f"the gates have the shape {tuple(mask.shape)}, but the model has {sum(lengths)} heads")
        mask = list(mask.split(lengths, dim=-1))
    gates = [row if isinstance(row, Tensor) else torch.from_numpy(np.asarray(row, dtype=np.float64)) for row in mask]
    if [row.shape[-1] if row.ndim in (1, 2) else None for row in gates] != lengths:
        shapes = [tuple(row.shape) for row in gates]
        raise HeadlabError(f"the gates have the shapes {shapes}, but the model has rows of {lengths} heads")
    return gates


@dataclass(frozen=True, eq=False)
class Fill(Result):
    """What stands in for removed heads, measured on data.

    Attributes:
        how: `mean`, `mean per position` or `resample`.
        values: a row per attention module: [head, d_head], or [pos, head, d_head], or [example, pos, head, d_head].
        lengths: for resampling, how many tokens each example has, `[example]` per row.
        keys: for resampling, a number per example that its tokens determine, `[example]` per row.
    """

    kind = "fill"
    how: str
    values: tuple[Tensor, ...]
    lengths: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def constant(self) -> bool:
        """Whether it is one vector per head, so that a pruned model can have it in its output bias."""
        return self.how == "mean"

    def check(self, model: nn.Module) -> None:
        """Raise `HeadlabError` unless the fill was measured on this model."""
        shapes = [tuple(value.shape[-2:]) for value in self.values]
        expected = [(len(row.heads), row.d_head) for row in rows(model)]
        if shapes != expected:
            raise HeadlabError(f"the fill has rows of (heads, d_head) = {shapes}, but the model has {expected}")
        made_for, this = self.record["model"]["fingerprint"], fingerprint(model)
        if made_for != this:
            raise HeadlabError(f"the fill was measured on another model (fingerprint {made_for}; this one is {this})")

    def save(self, path: str | Path) -> Path:
        """Write the fill to a safetensors file, in one step. Returns the path."""
        groups = {"values": self.values, "lengths": self.lengths, "keys": self.keys}
        tensors = {f"{name}.{i}": t.contiguous() for name, group in groups.items() for i, t in enumerate(group)}
        meta = {"headlab": str(FORMAT), "kind": self.kind, "how": self.how, "record": json.dumps(self.record)}
        return write(path, lambda temporary: save_file(tensors, temporary, metadata=meta))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a fill from its safetensors file."""
        meta, tensors = read_tensors(path, cls.kind, "is not a fill")

        def group(name: str) -> tuple[Tensor, ...]:
            n = sum(key.startswith(f"{name}.") for key in tensors)
            return tuple(tensors[f"{name}.{i}"] for i in range(n))

        return cls(meta["how"], group("values"), group("lengths"), group("keys"), json.loads(meta["record"]))


class StandIn:
    """A fill at work in one context: `stand_in(row, z, run)` is what would take the place of z, of the same shape."""

    def __init__(self, fill: Fill) -> None:
        self.fill = fill
        self.chosen: dict[str, Tensor] = {}  # which measured example, by the tokens of an example's first pass

    def __call__(self, row: Attention, z: Tensor, run: Pass) -> Tensor:
        by_slot = torch.zeros_like(z)
        by_slot[:, :, row.places] = self._by_head(row, run).to(z)
        return by_slot

    def _by_head(self, row: Attention, run: Pass) -> Tensor:
        """To be broadcast to [batch, pos, head, d_head]."""
        values = self.fill.values[row.row].to(run.positions.device)
        if self.fill.how == "mean":
            return values
        if self.fill.how == "mean per position":
            if (longest := int(run.positions.max()) + 1) > len(values):
                raise HeadlabError(f"the fill was measured at {len(values)} positions, but the input has {longest}")
            return values[run.positions]
        chosen = self._choose(row, run).to(values.device)  # [batch]
        lengths = self.fill.lengths[row.row].to(values.device)[chosen]
        return values[chosen[:, None], run.positions % lengths[:, None]]

    def _choose(self, row: Attention, run: Pass) -> Tensor:
        if row.path not in self.chosen or run.first:
            keys = self.fill.keys[row.row].tolist()
            draws = [_draw(key, keys, self.fill.record["seed"]) for key in example_keys(run)]
            self.chosen[row.path] = torch.tensor(draws)
        if len(chosen := self.chosen[row.path]) != len(run.positions):
            raise HeadlabError(f"the batch changed from {len(chosen)} to {len(run.positions)} examples within a generation")
        return chosen


def _draw(key: int, keys: list[int], seed: int) -> int:
    """A measured example other than the one with this key, the same one whenever it is asked for."""
    others = [i for i, other in enumerate(keys) if other != key]
    return others[int(np.random.default_rng([seed, key]).integers(len(others)))]


def example_keys(run: Pass) -> list[int]:
    """A number per example that its real tokens determine (its place in the batch, where there are no tokens)."""
    if run.tokens is None:
        return list(range(len(run.positions)))
    pairs = zip(run.tokens.cpu(), run.real.cpu(), strict=True)
    return [zlib.crc32(tokens[real].contiguous().numpy().tobytes()) for tokens, real in pairs]


def fill(
    model: nn.Module,
    batches: Batches,
    kind: Literal["mean", "resample"] = "mean",
    per_position: bool = False,
    seed: int = 0,
) -> Fill:
    """Measure what stands in for removed heads: their mean output over real tokens, or other examples' outputs.

    Args:
        model: a plain model or a bridge.
        batches: the data to measure on.
        kind: `mean`, or `resample`: example by example another one's output, the same position (starting over where that
            one is shorter), drawn by `seed` and the example's own tokens.
        per_position: a mean for every position, counted among real tokens.

    Raises:
        HeadlabError: bad batches; fewer than two different examples to draw from.
    """
    if kind not in ("mean", "resample") or (per_position and kind != "mean"):
        raise HeadlabError(f"kind is 'mean' (per_position or not) or 'resample', not {kind!r} with {per_position=}")
    data = prepare(model, batches)
    how = kind if not per_position else "mean per position"
    found = rows(model)
    record = {"method": how, "seed": seed, "model": describe(model), "data": describe_data(data)}
    if kind == "resample":
        return _resample(model, data, found, record)
    sums = [torch.zeros(0, len(row.heads), row.d_head, dtype=torch.float64) for row in found]
    counts = [torch.zeros(0, dtype=torch.float64) for _ in found]

    def add(row: Attention, z: Tensor, run: Pass, real: Tensor) -> None:
        outputs = z.detach()[:, :, row.places][real].double().cpu()  # [token, head, d_head]
        places = run.positions[real].cpu() if per_position else torch.zeros(len(outputs), dtype=torch.long)
        missing = max(0, int(places.max()) + 1 - len(counts[row.row]))
        sums[row.row] = torch.cat([sums[row.row], sums[row.row].new_zeros(missing, *outputs.shape[1:])])
        counts[row.row] = torch.cat([counts[row.row], counts[row.row].new_zeros(missing)])
        sums[row.row].index_add_(0, places, outputs)
        counts[row.row].index_add_(0, places, torch.ones(len(places), dtype=torch.float64))

    _run(model, data, add)
    means = [(s / n[:, None, None]).float() for s, n in zip(sums, counts, strict=True)]
    values = tuple(
        mean if per_position else mean.sum(0)
        for mean in means  # one position, or none where a row has no heads
    )
    return Fill(how, values, record=record)


def _resample(model: nn.Module, data: list[dict[str, Tensor]], found: Sequence[Attention], record: dict[str, Any]) -> Fill:
    outputs: list[list[Tensor]] = [[] for _ in found]  # per row, per example: [pos, head, d_head]
    keys: list[list[int]] = [[] for _ in found]

    def keep(row: Attention, z: Tensor, run: Pass, real: Tensor) -> None:
        for example, its_real, key in zip(z.detach()[:, :, row.places], real, example_keys(run), strict=True):
            if key not in keys[row.row] and its_real.any():
                keys[row.row].append(key)
                outputs[row.row].append(example[its_real].float().cpu())

    _run(model, data, keep)
    if any(len(row) < 2 for row, attention in zip(keys, found, strict=True) if attention.slots):
        raise HeadlabError("there are fewer than two different examples: no example has another to draw from")
    values = tuple(
        torch.nn.utils.rnn.pad_sequence(row, batch_first=True) if row else torch.zeros(1, 1, 0, attention.d_head)
        for row, attention in zip(outputs, found, strict=True)
    )
    lengths = tuple(torch.tensor([len(example) for example in row], dtype=torch.long) for row in outputs)
    return Fill("resample", values, lengths, tuple(torch.tensor(row, dtype=torch.long) for row in keys), record)


def _run(model: nn.Module, data: list[dict[str, Tensor]], edit: Callable[[Attention, Tensor, Pass, Tensor], None]) -> None:
    """Forward passes over the data, for what `edit(row, z, run, real)` sees; `real` knows the labels' padding too."""
    batch: dict[str, Tensor] = {}

    def see(row: Attention, z: Tensor, run: Pass) -> None:
        real = real_tokens(batch, row.stack)
        edit(row, z, run, real if real.shape == run.real.shape else run.real)

    with evaluating(model), torch.inference_mode(), at_sites(model, see):
        for batch in data:
            forward(model, batch)


@contextmanager
def capture(
    model: nn.Module,
    heads: Sequence[Head] | None = None,
    what: Literal["z", "result", "scores", "pattern"] = "z",
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Mapping[Head, list[Tensor]]]:
    """Record what heads carry or where they look, one tensor per head and forward pass.

    Args:
        model: a plain model or a bridge.
        heads: which heads; by default all.
        what: `z`, the head's output at its site, [batch, pos, d_head]; `result`, what it adds to the residual stream,
            [batch, pos, d_model] (the output projection's bias belongs to no head); `pattern`, its attention pattern, or
            `scores`, what the softmax is taken of, [batch, query, key] (see `looking.Look`: dropout is then off inside).
        reduce: applied at once to every tensor, so that the whole need not be kept.

    Raises:
        HeadlabError: there is no such head, or no such thing to record; or, while running, it was not to be had.

    >>> with capture(model, hl.heads(model)[:1], "z", reduce=lambda z: z.norm(dim=-1)) as acts:  # doctest: +SKIP
    ...     model(**batch)
    """
    if what not in ("z", "result", "scores", "pattern"):
        raise HeadlabError(f"what is 'scores', 'pattern', 'z' or 'result', not {what!r}")
    site = "probabilities" if what == "scores" else "output"  # composed heads may have the one and not the other
    found = [row for row in rows(model) if row.slots]
    known = {row.row: (row if row.compose is None else row.at(site)).heads for row in found}
    every = [head for row in found for head in known[row.row]]
    acts: dict[Head, list[Tensor]] = {head: [] for head in (every if heads is None else heads)}
    if unknown := [str(head) for head in acts if head not in every]:
        raise HeadlabError(f"the model has no heads {', '.join(unknown)}; hl.heads(model) lists them")

    def keep(row: Attention, of: Callable[[int], Tensor]) -> None:
        for i, head in enumerate(known[row.row]):
            if head in acts:
                whole = of(i).detach()
                value = whole if reduce is None else reduce(whole)
                shared = value.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                acts[head].append(value.clone() if shared else value)  # a view would keep what all heads have

    def carried(row: Attention, z: Float[Tensor, "batch pos slot d_head"], _: Pass) -> None:
        if what == "z":
            return keep(row, lambda i: z[:, :, row.places[i]])
        blocks = weight_blocks(row.projection(row.family.o), row.d_head, "in")  # [slot, d_head, d_model]
        return keep(row, lambda i: z[:, :, row.places[i]] @ blocks[row.places[i]])

    def seen(row: Attention, look: Look) -> None:
        values = look.pattern if look.scores is None else look.scores
        keep(row, lambda i: values[:, i])

    wanted = [row for row in found if any(head in acts for head in known[row.row])]
    if what in ("z", "result"):
        recording = at_sites(model, carried, wanted)
    else:
        recording = at_patterns(model, seen, wanted, scores=what == "scores")
    with recording:
        yield acts
