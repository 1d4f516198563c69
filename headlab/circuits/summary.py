"""All heads' circuits in numbers: how large, how many-sided, whether the head copies, and what distance does to it.

Everything is computed from factors: of W_Q W_K^T and W_V W_O through the R of their QR decompositions, of the full circuit
W_E W_V W_O W_U through W_O W_U W_E W_V, whose eigenvalues are the same but for zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..choices import Circuit, Norm
from ..errors import HeadlabError
from ..models.access import describe, rows
from ..models.attention_modules import Attention
from ..models.norms import approximate, circuits_of
from ..models.positions import angles, is_rotary, turned
from ..models.projections import Projections
from ..scores import HeadScores
from ..tables import Head, HeadColumns, Heads, read_heads
from .tokens import Moments, Vocabulary, moments_of, parts, vocabulary_of

TOP = 8  # singular values kept per circuit
DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128)
SINGULAR = ("qk_singular", "ov_singular")


@dataclass(frozen=True, eq=False, repr=False)
class CircuitTable(HeadColumns):
    """Numbers of every head's circuits. NaN is a number that a head does not have; `why` says so. The `columns`:

        `qk_frobenius`, `qk_spectral`, `ov_frobenius`, `ov_spectral`: norms of W_Q W_K^T (before any rotation) and W_V W_O.
        `qk_rank`, `ov_rank`: the effective rank (sum of singular values)^2 / sum of their squares, from 1 to d_head.
        `copying`: sum of the eigenvalues of W_E W_V W_O W_U over the sum of their sizes, from -1 to 1 (Elhage et al. 2021,
            "A Mathematical Framework for Transformer Circuits"); `ov_positive`: the share of them with a positive real
            part.
        `content_1` ... `content_128` (rotary models): |QK(0)|^2 / (|QK(0)|^2 + |QK(d) - QK(0)|^2), the share of content
            in the QK circuit at distance d.
        `token_token`, `token_position`, `position_token`, `position_position` (learned positions): the shares of
            `score_parts`, query first.
        `qk_s1` ..., `ov_s1` ...: the largest singular values, at most 8.

    Attributes:
        exact: row by row, whether the circuits are all there is to a head.
        why: and if not, or where a number is missing, why.
    """

    kind = "circuits"
    exact: tuple[tuple[bool, ...], ...] = ()
    why: tuple[tuple[str, ...], ...] = ()

    def singular_values(self, circuit: Circuit) -> list[str]:
        """The columns of a circuit's singular values, the largest first."""
        return [name for name in self.columns if re.fullmatch(rf"{circuit}_s\d+", name)]

    def scores(self, name: str) -> HeadScores:
        """One of the numbers as scores, to draw, compare or rank by.

        Raises:
            HeadlabError: there is no such number, or not for every head.
        """
        values = self.values(name)
        for row, heads in enumerate(self.heads):
            for i, head in enumerate(heads):
                if np.isnan(values[row][i]):
                    raise HeadlabError(
                        f"{name} is not known of every head, {head} for one ({self.why[row][i]}): use to_frame()"
                    )
        return HeadScores(values, self.heads, self.record | {"method": name})

    def top(self, k: int = 10, by: str = "copying") -> list[tuple[Head, float]]:
        """The k heads with the largest value of a number, the largest first; heads without it are left out."""
        return super().top(k, by)

    def _told(self, row: int, i: int) -> dict[str, Any]:
        return super()._told(row, i) | {"exact": self.exact[row][i], "why": self.why[row][i]}

    def _body(self) -> dict[str, Any]:
        return super()._body() | {"exact": self.exact, "why": self.why}

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> CircuitTable:
        if "lines" in body:  # as version 0.1.0 has it: a line per head
            return cls._of_lines(tuple(map(read_heads, body["heads"])), body["lines"], record)
        body |= {name: tuple(map(tuple, body[name])) for name in ("exact", "why")}
        return super()._from_body(body, record)

    @classmethod
    def _of_lines(cls, heads: Heads, lines: Sequence[Mapping[str, Any]], record: dict[str, Any]) -> CircuitTable:
        """From a dict per head, in the order of the heads; singular values are lists in it."""
        names = dict.fromkeys(name for line in lines for name in line if name not in ("exact", "why"))
        found: dict[str, list[float]] = {
            name: [_number(line.get(name)) for line in lines] for name in names if name not in SINGULAR
        }
        for name in SINGULAR:
            longest = max(len(line.get(name) or ()) for line in lines)
            for i in range(longest):
                values = ((line.get(name) or ()) for line in lines)
                found[f"{name[:4]}{i + 1}"] = [of[i] if i < len(of) else np.nan for of in values]
        columns = {name: _in_rows(np.array(values), heads) for name, values in found.items()}
        exact, why = (tuple(map(tuple, _in_rows([line[name] for line in lines], heads))) for name in ("exact", "why"))
        return cls(heads, columns, {}, record, exact, why)

    def __repr__(self) -> str:
        return f"CircuitTable({sum(map(len, self.heads))} heads in {len(self.heads)} rows, norm={self.record.get('norm')!r})"


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _in_rows(values: Any, heads: Heads) -> tuple[Any, ...]:
    """One value per head, row by row."""
    ends = np.cumsum([len(row) for row in heads])
    return tuple(values[end - len(row) : end] for row, end in zip(heads, ends, strict=True))


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
    return CircuitTable._of_lines(heads, lines, {"method": "circuits", "model": describe(model), "norm": norm})


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


def _spectra(circuit: Circuit, small: Float[Tensor, "head n m"]) -> list[dict[str, Any]]:
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
