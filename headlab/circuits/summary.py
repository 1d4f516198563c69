"""All heads' circuits in numbers: how large, how many-sided, whether the head copies, and what distance does to it.

Everything is computed from factors: of W_Q W_K^T and W_V W_O through the R of their QR decompositions, of the full circuit
W_E W_V W_O W_U through W_O W_U W_E W_V, whose eigenvalues are the same but for zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import HeadlabError
from ..models.access import describe, rows
from ..models.attention_modules import Attention
from ..models.norms import Norm, approximate, circuits_of
from ..models.positions import angles, is_rotary, turned
from ..models.projections import Projections
from ..results import Result
from ..scores import Head, Heads, HeadScores
from .tokens import Moments, Vocabulary, moments_of, parts, vocabulary_of

if TYPE_CHECKING:
    import pandas as pd

TOP = 8  # singular values kept per circuit
DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128)
Spectrum = Literal["qk", "ov"]


@dataclass(frozen=True, eq=False)
class CircuitTable(Result):
    """Numbers of every head's circuits. None (NaN in tables) is a number that a head does not have; `why` says so.

    `lines` has a dict per head, in the order of `heads`:
        `qk_frobenius`, `qk_spectral`, `ov_frobenius`, `ov_spectral`: norms of W_Q W_K^T (before any rotation) and W_V W_O.
        `qk_rank`, `ov_rank`: the effective rank (sum of singular values)^2 / sum of their squares, from 1 to d_head.
        `qk_singular`, `ov_singular`: the largest singular values, at most 8.
        `copying`: sum of the eigenvalues of W_E W_V W_O W_U over the sum of their sizes, from -1 to 1 (Elhage et al. 2021,
            "A Mathematical Framework for Transformer Circuits"); `ov_positive`: the share of them with a positive real
            part.
        `content_1` ... `content_128` (rotary models): |QK(0)|^2 / (|QK(0)|^2 + |QK(d) - QK(0)|^2), the share of content
            in the QK circuit at distance d.
        `token_token`, `token_position`, `position_token`, `position_position` (learned positions): the shares of
            `score_parts`, query first.
        `exact`, `why`: whether the circuits are all there is to it, and if not, why.
    """

    kind = "circuits"
    heads: Heads
    lines: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """The names of the numbers that every head has one of."""
        return [name for name in self.lines[0] if name not in ("qk_singular", "ov_singular", "exact", "why")]

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per head; singular values are the columns `qk_s1` ... and `ov_s1` ..."""
        import pandas as pd

        lines = []
        for head, numbers in zip(self._flat(), self.lines, strict=True):
            line = {"head": str(head), "stack": head.stack, "layer": head.layer, "index": head.index, "group": head.group}
            line |= {name: _number(numbers[name]) for name in self.columns}
            for circuit in ("qk", "ov"):
                found = numbers[f"{circuit}_singular"] or []
                line |= {f"{circuit}_s{i + 1}": value for i, value in enumerate(found)}
            lines.append(line | {"exact": numbers["exact"], "why": numbers["why"]})
        frame = pd.DataFrame(lines)
        last = ["exact", "why"]
        return frame[[name for name in frame if name not in last] + last]

    def scores(self, name: str) -> HeadScores:
        """One of the numbers as scores, to draw, compare or rank by.

        Raises:
            HeadlabError: there is no such number, or not for every head.
        """
        values = iter(self._values(name))
        found = tuple(np.array([next(values) for _ in row]) for row in self.heads)
        for head, numbers in zip(self._flat(), self.lines, strict=True):
            if numbers[name] is None:
                raise HeadlabError(f"{name} is not known of every head, {head} for one ({numbers['why']}): use to_frame()")
        return HeadScores(found, self.heads, self.record | {"method": name})

    def top(self, k: int = 10, by: str = "copying") -> list[tuple[Head, float]]:
        """The k heads with the largest value of a number, the largest first; heads without it are left out."""
        known = [(h, v) for h, v in zip(self._flat(), self._values(by), strict=True) if not np.isnan(v)]
        return sorted(known, key=lambda item: -item[1])[:k]

    def _values(self, name: str) -> list[float]:
        if name not in self.columns:
            raise HeadlabError(f"the table has no number {name!r} of each head: there are {', '.join(self.columns)}")
        return [_number(line[name]) for line in self.lines]

    def _flat(self) -> list[Head]:
        return [head for row in self.heads for head in row]

    def _body(self) -> dict[str, Any]:
        return {"heads": [[vars(head) for head in row] for row in self.heads], "lines": self.lines}

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> CircuitTable:
        return cls(tuple(tuple(Head(**head) for head in row) for row in body["heads"]), body["lines"], record)

    def __repr__(self) -> str:
        return f"CircuitTable({len(self.lines)} heads in {len(self.heads)} rows, norm={self.record.get('norm')!r})"


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def circuit_table(model: nn.Module, norm: Norm = "fold") -> CircuitTable:
    """The circuits of every head in numbers (see `CircuitTable`), from the weights alone.

    Args:
        model: a plain model or a bridge (but not one in compatibility mode).
        norm: `fold` or `raw`, see `qk`.

    Raises:
        HeadlabError: no head is left in the model; an unknown `norm`.
    """
    found = rows(model)
    heads = tuple(_heads(row) for row in found)
    if not any(heads):
        raise HeadlabError("the model has no attention heads left")
    around: dict[str, tuple[Vocabulary, Tensor | None, Moments | None]] = {}
    lines: list[dict[str, Any]] = []
    for row, labels in zip(tqdm(found, desc="circuits", unit="layer", disable=None), heads, strict=True):
        if row.stack not in around:
            vocabulary = vocabulary_of(model, row, norm)
            around[row.stack] = vocabulary, vocabulary.around(), moments_of(model, row, vocabulary)
        lines += _row_lines(model, row, labels, norm, *around[row.stack])
    names = list(dict.fromkeys(name for line in lines for name in line if name not in ("exact", "why")))
    names += ["exact", "why"]  # last, and the same for every head, those of layers without rotation too
    lines = [{name: line.get(name) for name in names} for line in lines]
    record = {"method": "circuits", "model": describe(model), "norm": norm}
    return CircuitTable(heads, lines, record)


def _heads(row: Attention) -> tuple[Head, ...]:
    """The heads with an output, and those of composed heads that have only scores left."""
    known = {head.index: head for head in row.heads}
    if row.compose is not None and row.slots:
        for i in row.compose.kept["scores"]:
            site = f"{row.path}.{row.family.o}"
            known.setdefault(i, Head(row.row, row.layer, i, row.stack, i // row.compose.ratio, row.d_head, site))
    return tuple(known[i] for i in sorted(known))


def _row_lines(
    model: nn.Module,
    row: Attention,
    labels: Sequence[Head],
    norm: Norm,
    vocabulary: Vocabulary,
    around: Tensor | None,
    moments: Moments | None,
) -> list[dict[str, Any]]:
    if not labels:
        return []
    circuits = circuits_of(model, row, norm)
    searching = dict(zip(circuits.searching, _search(model, row, circuits, moments), strict=True))
    carrying = dict(zip(circuits.carrying, _carry(circuits, vocabulary, around), strict=True))
    blank_search, blank_carry = (dict.fromkeys(next(iter(side.values()), {})) for side in (searching, carrying))
    inexact = approximate(model, row)
    common = [*inexact, *(vocabulary.why if around is None or inexact else ())]
    lines = []
    for head in labels:
        why = list(common)
        if head.index not in searching:
            why.append("no scores are left of the head")
        if head.index not in carrying:
            why.append("no output is left of the head")
        line = searching.get(head.index, blank_search) | carrying.get(head.index, blank_carry)
        lines.append(line | {"exact": not inexact, "why": "; ".join(why)})
    return lines


def _search(model: nn.Module, row: Attention, found: Projections, moments: Moments | None) -> list[dict[str, Any]]:
    """What is said of the QK circuit of every head that has scores."""
    if not found.searching:
        return []
    slots, keys = (list(blocks) for blocks in zip(*found.searching.values(), strict=True))
    q, k = (torch.linalg.qr(part.double()).R for part in (found.q, found.k))  # [block, d_head, d_head]
    q, k = q[slots], k[keys]
    lines = _spectra("qk", q @ k.mT)
    if is_rotary(model, row):
        at = angles(model, row, [0, *DISTANCES], found.q)
        k = turned(k, at, 0).mT
        content = turned(q, at, 0) @ k
        size = content.square().sum((-2, -1))
        for i, distance in enumerate(DISTANCES, 1):
            moved = (turned(q, at, i) @ k - content).square().sum((-2, -1))
            for line, share in zip(lines, (size / (size + moved)).tolist(), strict=True):
                line[f"content_{distance}"] = _known(share)
    if moments is not None:
        for line, slot, key in zip(lines, slots, keys, strict=True):
            variances = {name: std**2 for name, std in parts(moments, found.q[slot], found.k[key]).items()}
            total = sum(variances.values())
            line |= {name: variance / total if total > 0 else None for name, variance in variances.items()}
    return lines


def _carry(found: Projections, vocabulary: Vocabulary, around: Tensor | None) -> list[dict[str, Any]]:
    """What is said of the OV circuit of every head that has an output."""
    if not found.carrying:
        return []
    values, slots = (list(blocks) for blocks in zip(*found.carrying.values(), strict=True))
    v, o = found.v.double(), found.o.double()
    left, right = torch.linalg.qr(v).R[values], torch.linalg.qr(o.mT).R[slots]
    lines = _spectra("ov", left @ right.mT)
    scores: list[tuple[float | None, float | None]] = [(None, None)] * len(lines)
    if around is not None:
        scores = list(map(copying, torch.linalg.eigvals(vocabulary.through(o)[slots] @ around @ v[values])))
    for line, (score, positive) in zip(lines, scores, strict=True):
        line |= {"copying": score, "ov_positive": positive}
    return lines


def copying(eigenvalues: Complex[Tensor, " n"]) -> tuple[float | None, float | None]:
    """The copying score, and the share of eigenvalues with a positive real part; zeros, up to rounding, do not count."""
    sizes = eigenvalues.abs()
    if not sizes.max() > 0:
        return None, None
    positive = eigenvalues.real[sizes > 1e-10 * sizes.max()] > 0
    return float(eigenvalues.real.sum() / sizes.sum()), float(positive.double().mean())


def _spectra(circuit: Spectrum, small: Float[Tensor, "head n m"]) -> list[dict[str, Any]]:
    """Norms, rank and singular values of circuits, given matrices with the same singular values."""
    lines = []
    for values in torch.linalg.svdvals(small):
        size = values.norm()
        line: dict[str, Any] = {f"{circuit}_frobenius": float(size), f"{circuit}_spectral": float(values[0])}
        line[f"{circuit}_rank"] = _known(float(values.sum() ** 2 / size**2))
        lines.append(line | {f"{circuit}_singular": values[:TOP].tolist()})
    return lines


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None
