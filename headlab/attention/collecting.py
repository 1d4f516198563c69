"""Running a model and measuring its patterns layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.batches import Batch, real_tokens
from ..data.losses import forward
from ..hooks.patterns import Look, at_patterns
from ..models.access import bare_model, evaluating, rows, tokenizer
from ..models.attention_modules import Attention, bare
from ..tables import Head, Heads, Rows
from .induction import Copying, special_tokens
from .statistics import LayerSums, Text, aligned, marked, right_padded, visible

DELIMITERS = frozenset(".,;:!?\n")


def measured(
    model: nn.Module, data: list[Batch], what: str, copying: Copying | None = None
) -> tuple[Heads, dict[str, Rows], dict[str, Rows]]:
    """Run the model over the data: heads, their numbers and standard errors."""
    watch = _Watch(model, data)
    beside: AbstractContextManager[None] = nullcontext() if copying is None else copying.watching(model)
    with evaluating(model), torch.inference_mode(), at_patterns(model, watch.see), beside:
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
        for found, kept in ((own, columns), (own_errors, errors)):
            here = {}
            for name, values in found.items():
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

    def __init__(self, model: nn.Module, data: list[Batch]) -> None:
        self.rows = rows(model)
        self.sums = {row.row: LayerSums(len(_raw_heads(row)), len(row.heads), row.compose is not None) for row in self.rows}
        self.rarity = _rarity(model, data)
        self.delimiters, self.ends = _delimiters(model, data)
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


def _rarity(model: nn.Module, data: Iterable[Batch]) -> Tensor:
    """By token number, lower for rarer ones: how often it stands in the data, and then how late in the vocabulary."""
    root = bare_model(model)
    ids = _ids(data)
    embeddings: Any = bare(root.get_input_embeddings())
    n_tokens = embeddings.weight.shape[0]
    counts = torch.bincount(ids, minlength=n_tokens)
    return (counts * n_tokens - torch.arange(n_tokens)).to(root.device)


def _delimiters(model: nn.Module, data: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """The numbers of tokens that separate texts or their parts, and of those that end a text."""
    special, words = special_tokens(model), tokenizer(model)
    found = set(special)
    if words is not None:
        for number in _ids(data).unique().tolist():
            text = str(words.decode([number])).strip(" ")
            if text and set(text) <= DELIMITERS:
                found.add(number)
    config: Any = bare_model(model).config.get_text_config()
    ends = [getattr(owner, name, None) for owner in (config, words) for name in ("eos_token_id", "sep_token_id")]
    flat = {n for end in ends if end is not None for n in (end if isinstance(end, (list, tuple)) else [end])}
    separating, ending = (
        torch.tensor(sorted(ids), dtype=torch.long, device=bare_model(model).device) for ids in (found, flat)
    )
    return separating, ending
