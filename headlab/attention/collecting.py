"""Running a model and measuring its patterns layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.batches import Batch, real_tokens
from ..data.losses import forward
from ..data.tokens import Tokens
from ..hooks.patterns import Look, at_patterns
from ..models.access import evaluating
from ..models.attention_modules import Attention
from ..tables import Head, Heads, Rows
from .induction import Copying
from .statistics import LayerSums, Text, aligned, marked, right_padded, visible

DELIMITERS = frozenset(".,;:!?\n")


def measured(
    model: nn.Module,
    found: Sequence[Attention],
    tokens: Tokens,
    data: list[Batch],
    what: str,
    copying: Copying | None = None,
) -> tuple[Heads, dict[str, Rows], dict[str, Rows]]:
    """Run the model over the data: the heads of its attention modules `found`, their numbers and standard errors."""
    watch = _Watch(found, tokens, data)
    beside: AbstractContextManager[None] = nullcontext() if copying is None else copying.watching(model)
    with evaluating(model), torch.inference_mode(), at_patterns(model, watch.see, found), beside:
        for batch in tqdm(data, desc=what, unit="batch", disable=None):
            watch.begin(batch)
            forward(model, batch)
    heads: list[tuple[Head, ...]] = []
    columns: list[dict[str, np.ndarray]] = []
    errors: list[dict[str, np.ndarray]] = []
    for row in watch.rows:
        raw_heads = _raw_heads(row)
        heads.append(tuple(sorted({*row.heads, *raw_heads})))
        own, own_errors = watch.sums[row.row].columns()
        if copying is not None:
            own["copying"], own_errors["copying"] = copying.of(row)
        for numbers, kept in ((own, columns), (own_errors, errors)):
            here = {}
            for name, values in numbers.items():
                measured = row.heads if name.startswith(("composed_", "copying")) else raw_heads
                by_head = dict(zip(measured, values, strict=True))
                here[name] = np.array([by_head.get(head, np.nan) for head in heads[-1]], dtype=float)
            kept.append(here)
    table, error_table = (_by_name(rows_of, heads) for rows_of in (columns, errors))
    return tuple(heads), table, error_table


def holes(columns: dict[str, Rows]) -> list[str]:
    """A note on what no head has a number for."""
    empty = [name for name, found in columns.items() if all(np.isnan(row).all() for row in found)]
    return [f"nothing in this data or model to measure {', '.join(empty)} on"] if empty else []


def _by_name(columns: list[dict[str, np.ndarray]], heads: list[tuple[Head, ...]]) -> dict[str, Rows]:
    names = dict.fromkeys(name for found in columns for name in found)
    holes = [np.full(len(row), np.nan) for row in heads]
    return {name: tuple(found.get(name, hole) for found, hole in zip(columns, holes, strict=True)) for name in names}


def _raw_heads(row: Attention) -> tuple[Head, ...]:
    return row.heads if row.compose is None or not row.slots else row.at("probabilities").heads


class _Watch:
    """Adds up, while a model runs over batches, what is measured of its patterns."""

    def __init__(self, found: Sequence[Attention], tokens: Tokens, data: list[Batch]) -> None:
        self.rows = found
        self.sums = {row.row: LayerSums(len(_raw_heads(row)), len(row.heads), row.compose is not None) for row in found}
        ids = _ids(data)
        self.rarity = _rarity(ids, tokens)
        self.delimiters = torch.tensor(sorted(_delimiters(ids, tokens)), dtype=torch.long, device=tokens.device)
        self.ends = torch.tensor(sorted(tokens.ends), dtype=torch.long, device=tokens.device)
        self.batch: Batch = {}
        self.marks: list[tuple[str, Tensor, Tensor]] = []

    def begin(self, batch: Batch) -> None:
        self.batch = batch
        self.marks = []

    def see(self, row: Attention, look: Look) -> None:
        same = row.stack != "cross"
        real = queries = real_tokens(self.batch, row.stack)
        tokens = look.run.tokens
        if real.shape != look.run.real.shape:
            real = queries = look.run.real
        if not same:
            real, tokens = real_tokens(self.batch), self.batch.get("input_ids")
        to_query, to_key = right_padded(queries), right_padded(real)
        keys, queries = self._text(real, tokens, to_key), _sorted(queries, to_query)
        raw = aligned(look.raw, to_query, to_key)
        seen = visible(raw, queries, keys.real, same)
        composed = None if row.compose is None else aligned(look.pattern, to_query, to_key)
        self.sums[row.row].add(raw, composed, seen, self._marks(row.stack, seen, keys, same), keys, same)

    def _text(self, real: Tensor, tokens: Tensor | None, order: Tensor | None) -> Text:
        if tokens is None:
            return Text(_sorted(real, order))
        real, tokens = _sorted(real, order), _sorted(tokens, order)
        ends = torch.isin(tokens, self.ends)
        ends[:, 0] = False  # where GPT-2 has the same symbol, it begins a text
        return Text(real, tokens, self.rarity[tokens], torch.isin(tokens, self.delimiters), ends)

    def _marks(self, stack: str, seen: Tensor, keys: Text, same: bool) -> Tensor:
        """Most layers of a batch see the same keys, and share the marks."""
        for name, others, marks in self.marks:
            if name == stack and torch.equal(others, seen):
                return marks
        self.marks.append((stack, seen, marked(seen, keys, same)))
        return self.marks[-1][2]


def _sorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.take_along_dim(order, 1)


def _ids(data: Iterable[Batch]) -> Tensor:
    """Every real token of the data, of encoders and decoders."""
    found = [torch.zeros(0, dtype=torch.long)]
    for batch in data:
        if "input_ids" in batch:
            found.append(batch["input_ids"][real_tokens(batch)].cpu())
        for name in ("decoder_input_ids", "labels"):
            if name in batch and batch[name].ndim == 2 and not batch[name].is_floating_point():
                found.append(batch[name][real_tokens(batch, "dec")].cpu())
    return torch.cat([ids.flatten().long() for ids in found])


def _rarity(ids: Tensor, tokens: Tokens) -> Tensor:
    """By token number, lower for rarer ones: how often it stands in the data, and then how late in the vocabulary."""
    counts = torch.bincount(ids, minlength=tokens.embedded)
    return (counts * tokens.embedded - torch.arange(tokens.embedded)).to(tokens.device)


def _delimiters(ids: Tensor, tokens: Tokens) -> set[int]:
    """The numbers of tokens that separate texts or their parts."""
    found = set(tokens.special)
    if tokens.words is not None:
        for number in ids.unique().tolist():
            text = str(tokens.words.decode([number])).strip(" ")
            if text and set(text) <= DELIMITERS:
                found.add(number)
    return found
