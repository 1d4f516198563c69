"""What stands in for a removed head: its mean output, or another example's."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import Batches, describe_data, prepare, real_tokens
from ..data.losses import forward
from ..errors import HeadlabError
from ..models.access import describe, evaluating, fingerprint, rows
from ..models.attention_modules import Attention
from ..results import TensorResult
from .sites import Pass, at_sites


@dataclass(frozen=True, eq=False)
class Fill(TensorResult):
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

    def _parts(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        groups = {"values": self.values, "lengths": self.lengths, "keys": self.keys}
        return {"how": self.how}, {f"{name}.{i}": t for name, group in groups.items() for i, t in enumerate(group)}

    @classmethod
    def _from_parts(cls, texts: dict[str, str], tensors: dict[str, Tensor], record: dict[str, Any]) -> Self:
        def group(name: str) -> tuple[Tensor, ...]:
            n = sum(key.startswith(f"{name}.") for key in tensors)
            return tuple(tensors[f"{name}.{i}"] for i in range(n))

        return cls(texts["how"], group("values"), group("lengths"), group("keys"), record)


def check_fill(model: nn.Module, fill: Fill | None, site: str) -> None:
    """Raise `HeadlabError` unless the fill (if any) is one for this model and site."""
    if fill is None:
        return
    if site != "output":
        raise HeadlabError(f"a fill stands in for a head's output, so there is none for the site {site!r}: leave it out")
    fill.check(model)


class StandIn:
    """A fill at work in one context: `stand_in(row, z, run)` is what would take the place of z, of the same shape."""

    def __init__(self, fill: Fill) -> None:
        self.fill = fill
        self.chosen: dict[str, Tensor] = {}  # which measured example, by the tokens of an example's first pass

    def __call__(self, row: Attention, z: Tensor, run: Pass) -> Tensor:
        by_slot = torch.zeros_like(z)
        by_slot[:, :, row.head_slots] = self._by_head(row, run).to(z)
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
    """A number per example that its real tokens determine (its number in the batch, where there are no tokens)."""
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
        outputs = z.detach()[:, :, row.head_slots][real].double().cpu()  # [token, head, d_head]
        at = run.positions[real].cpu() if per_position else torch.zeros(len(outputs), dtype=torch.long)
        missing = max(0, int(at.max()) + 1 - len(counts[row.row]))
        sums[row.row] = torch.cat([sums[row.row], sums[row.row].new_zeros(missing, *outputs.shape[1:])])
        counts[row.row] = torch.cat([counts[row.row], counts[row.row].new_zeros(missing)])
        sums[row.row].index_add_(0, at, outputs)
        counts[row.row].index_add_(0, at, torch.ones(len(at), dtype=torch.float64))

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
        for example, its_real, key in zip(z.detach()[:, :, row.head_slots], real, example_keys(run), strict=True):
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
