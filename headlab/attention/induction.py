"""Random tokens that come twice, on which induction shows, and how much heads copy there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.tokens import Tokens
from ..errors import HeadlabError
from ..hooks.sites import Pass, at_sites
from ..models.access import bare_model, is_folded
from ..models.attention_modules import Attention, bare
from ..models.norms import final_norm, gain, norm_after
from ..models.projections import projections
from .statistics import Ratios

RANDOM_BATCH = 8  # sequences that go through the model at once


def repeated(tokens: Tokens, sequences: int, length: int, seed: int) -> tuple[list[Batch], list[str]]:
    """Batches of sequences whose second half repeats the first, which is random; and notes.

    Raises:
        HeadlabError: no sequences, or too short ones; fewer than two tokens to draw from.
    """
    if sequences < 1:
        raise HeadlabError(f"sequences must be at least 1, not {sequences}")
    notes = []
    if tokens.context is not None and tokens.context < length:
        even = tokens.context // 2 * 2
        notes.append(f"random sequences have {even} tokens instead of {length}, for the model takes no more")
        length = tokens.context
    if (period := length // 2) < 3:
        raise HeadlabError(f"repeated random tokens need a length of at least 6, not {length}")
    usable = torch.tensor([number for number in range(tokens.known) if number not in tokens.special])
    if len(usable) < 2:
        raise HeadlabError(f"the vocabulary has {len(usable)} tokens that are not special: too few to draw at random")
    generator = torch.Generator().manual_seed(seed)
    if len(usable) >= period:
        drawn = [torch.randperm(len(usable), generator=generator)[:period] for _ in range(sequences)]
    else:
        notes.append(f"random tokens come more than twice, for there are only {len(usable)} to draw from")
        drawn = [torch.randint(len(usable), (period,), generator=generator) for _ in range(sequences)]
    ids = usable[torch.stack(drawn)].repeat(1, 2)  # [sequence, pos]
    return [dict.fromkeys(tokens.inputs, part) for part in ids.split(RANDOM_BATCH)], notes


class Copying:
    """How far heads raise the logit of the token that follows in repeated sequences, by the direct path.

    The logits that a head writes are z W_O, times the final norm's gain, times the unembedding. What is kept of them is
    how many standard deviations, over the vocabulary, the logit of the following token lies above their mean; the final
    norm's division by the length drops out. It is exact, and no vector of logits is formed: their mean and variance follow
    from the unembedding's.
    """

    def __init__(self, model: nn.Module, found: Sequence[Attention], period: int) -> None:
        self.period = period
        self.sums: dict[int, Ratios] = {}
        self.written: dict[int, tuple[Tensor, Tensor]] = {}
        self.watched: list[Attention] = []
        unembedding = bare_model(model).get_output_embeddings()
        if unembedding is None or is_folded(model):
            return
        module: Any = bare(unembedding)
        self.unembedding: Tensor = module.weight.detach()  # [vocabulary, d_model]
        wide = torch.promote_types(self.unembedding.dtype, torch.float32)
        self.mean = self.unembedding.mean(0, dtype=wide)
        spread = sum(
            (part.to(wide) - self.mean).T @ (part.to(wide) - self.mean) for part in self.unembedding.split(8192)
        ) / len(self.unembedding)
        for row in found:
            norm = final_norm(model, row)
            if norm is None or row.stack == "enc" or not row.slots:
                continue
            held = projections(row)
            o = held.o[[held.carrying[head.index][1] for head in row.heads]].to(wide)  # [head, d_head, d_model]
            if (after := norm_after(model, row)) is not None:
                o = gain(after).after(o)
            o = gain(norm).after(o)
            self.written[row.row] = o, o @ spread @ o.transpose(1, 2)
            self.sums[row.row] = Ratios(len(row.heads), 1)
            self.watched.append(row)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, every forward pass over repeated sequences is measured."""
        with at_sites(model, self._see, self.watched):
            yield

    def _see(self, row: Attention, z: Tensor, run: Pass) -> None:
        assert run.tokens is not None
        o, spread = self.written[row.row]
        queries = slice(self.period, 2 * self.period - 1)
        z = z[:, queries, row.head_slots].to(o.dtype)  # [batch, query, head, d_head]
        raised = self.unembedding[run.tokens[:, self.period + 1 :]].to(o.dtype) - self.mean  # [batch, query, d_model]
        logits = (torch.einsum("bqd,hed->bqhe", raised, o) * z).sum(-1)
        deviation = torch.einsum("bqhe,hef,bqhf->bqh", z, spread, z).clamp(min=0).sqrt()
        scores = torch.where(
            deviation > 0, logits / deviation.where(deviation > 0, 1), 0
        )  # what writes nothing copies nothing
        values = scores.transpose(1, 2)[..., None]  # [batch, head, query, 1]
        self.sums[row.row].add(values, torch.ones_like(values[:, 0], dtype=torch.bool))

    def of(self, row: Attention) -> tuple[np.ndarray, np.ndarray]:
        """The mean over queries for every head, and its standard error over sequences; NaN where there is no direct path."""
        if row.row not in self.sums:
            return np.full(len(row.heads), np.nan), np.full(len(row.heads), np.nan)
        sums = self.sums[row.row]
        return sums.means[:, 0], sums.errors[:, 0]
