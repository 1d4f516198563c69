"""Scores (a number for every head) and masks (kept or removed). numpy only, no model needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from .choices import Unit, check
from .errors import HeadlabError
from .tables import Head, Heads, HeadTable, Rows, by_row, read_heads, write_heads


@dataclass(frozen=True, eq=False)
class HeadRows(HeadTable):
    """Numbers in rows, labelled with heads where they are known; what scores and masks have in common."""

    rows: Rows
    heads: Heads | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = tuple(np.asarray(row, dtype=np.float64) for row in self.rows)
        if any(row.ndim != 1 for row in rows):
            shapes = [row.shape for row in rows]
            raise HeadlabError(f"expected one 1-D row of numbers per layer, but the rows have the shapes {shapes}")
        if not all(np.isfinite(row).all() for row in rows):
            raise HeadlabError("a row holds NaN or infinity: every head needs a finite number")
        object.__setattr__(self, "rows", rows)
        if self.heads is not None and (lengths := [len(row) for row in self.heads]) != [len(row) for row in rows]:
            raise HeadlabError(f"there are {lengths} heads in the rows, but {[len(row) for row in rows]} numbers")

    @property
    def labels(self) -> Heads:
        """The heads, named by row and number if nothing better is known."""
        if self.heads is not None:
            return self.heads
        return tuple(tuple(Head(r, r, i, group=i) for i in range(len(row))) for r, row in enumerate(self.rows))

    @property
    def flat(self) -> np.ndarray:
        """All numbers in one array, `[head]`."""
        return np.concatenate(self.rows) if self.rows else np.zeros(0)

    def __len__(self) -> int:
        return sum(len(row) for row in self.rows)

    def check(self, heads: Heads, model: str | None = None) -> None:
        """Raise `HeadlabError` unless these rows fit a model with these heads (and, where both are known, this model)."""
        what = type(self).__name__
        mine, theirs = [len(row) for row in self.rows], [len(row) for row in heads]
        if mine != theirs:
            raise HeadlabError(f"the {what} has rows of {_lengths(mine)} heads, but the model has {_lengths(theirs)}")
        made_for = self.record.get("model", {}).get("fingerprint")
        if model is not None and made_for not in (None, model):
            name = self.record["model"].get("name") or self.record["model"].get("class")
            raise HeadlabError(
                f"the {what} was made for another model ({name}, fingerprint {made_for}; this one is {model}): "
                f"make it for this model, or pass its bare rows (headlab.{what}(x.rows)) if you mean to carry it over"
            )

    def _body(self) -> dict[str, Any]:
        heads = None if self.heads is None else list(map(write_heads, self.heads))
        return {"heads": heads, "rows": [row.tolist() for row in self.rows]}

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        heads = body.pop("heads")
        labelled = None if heads is None else tuple(map(read_heads, heads))
        return cls(heads=labelled, record=record, **body)


@dataclass(frozen=True, eq=False)
class HeadMask(HeadRows):
    """Which heads stay: 1 kept, 0 removed. `HeadMask([[1, 1, 0], [1, 0, 1]])` is a mask for two layers of three heads."""

    kind = "mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not np.isin(row, (0.0, 1.0)).all() for row in self.rows):
            raise HeadlabError("a mask holds 0 (removed) and 1 (kept) only")

    @classmethod
    def without(cls, heads: Iterable[Head], removed: Iterable[Head | str]) -> HeadMask:
        """Keep all of `heads` but `removed`, given as heads or by name: `HeadMask.without(hl.heads(m), ["L3H5"])`."""
        rows, names = by_row(heads), {str(head) for head in removed}
        if unknown := names - {str(head) for row in rows for head in row}:
            raise HeadlabError(f"the model has no heads named {', '.join(sorted(unknown))}; hl.heads(model) lists them")
        return cls(tuple(np.array([str(head) not in names for head in row], dtype=float) for row in rows), rows)

    @property
    def kept(self) -> list[Head]:
        return [h for row, keep in zip(self.labels, self.rows, strict=True) for h, k in zip(row, keep, strict=True) if k]

    @property
    def removed(self) -> list[Head]:
        return sorted({head for row in self.labels for head in row} - set(self.kept))

    def _told(self, row: int, i: int) -> dict[str, Any]:
        return {"kept": bool(self.rows[row][i])}

    def __repr__(self) -> str:
        return f"HeadMask({len(self.kept)} of {len(self)} heads kept, rows {_lengths([len(r) for r in self.rows])})"


@dataclass(frozen=True, eq=False)
class HeadScores(HeadRows):
    """One number per head; a higher score always means keep. `columns` holds further numbers per head, in rows too."""

    kind = "scores"
    columns: dict[str, Rows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        columns = {name: tuple(np.asarray(row, dtype=np.float64) for row in rows) for name, rows in self.columns.items()}
        object.__setattr__(self, "columns", columns)

    @property
    def values(self) -> Rows:
        """One 1-D array per row."""
        return self.rows

    def units(self, unit: Unit = "head") -> list[tuple[tuple[Head, ...], float]]:
        """What is removed together, with its score, the least important first; ties in the order of the heads.

        A unit is a head, or the heads that read one key-value head. A group's score is the sum of its heads' scores.
        """
        check("unit", unit, Unit)
        if unit == "group" and self.heads is None:
            raise HeadlabError("these scores do not know which heads share a key-value head: give them heads=")
        groups: dict[tuple[int, int], list[tuple[Head, float]]] = {}
        for labels, values in zip(self.labels, self.rows, strict=True):
            for i, (head, value) in enumerate(zip(labels, values, strict=True)):
                key = (head.row, head.group if unit == "group" else i)
                groups.setdefault(key, []).append((head, float(value)))
        units = [(tuple(h for h, _ in members), sum(v for _, v in members)) for members in groups.values()]
        return sorted(units, key=lambda item: item[1])

    def keep(self, amount: float | int, unit: Unit = "head", per_layer: bool = False, at_least: int = 0) -> HeadMask:
        """The mask that keeps the most important units.

        Args:
            amount: how many units stay: a share of them (a float in [0, 1]) or a count (an int).
            unit: `head`, or `group` for whole key-value groups.
            per_layer: apply `amount` to every layer by itself, rather than to the whole model.
            at_least: units of every layer that stay in any case (Michel et al.'s `--at_least_x_heads_per_layer`).

        Raises:
            HeadlabError: `amount` is outside [0, 1], or more units than there are.
        """
        units = self.units(unit)
        layers = [[u for u in units if u[0][0].row == row] for row in range(len(self.rows))]
        pools = layers if per_layer else [units]
        protected = {u[0] for layer in layers for u in layer[len(layer) - min(at_least, len(layer)) :]}
        removed: set[Head] = set()
        for pool in pools:
            gone = [members for members, _ in pool if members not in protected]
            for members in gone[: len(pool) - _count(amount, len(pool), unit)]:
                removed.update(members)
        rows = tuple(np.array([head not in removed for head in row], dtype=float) for row in self.labels)
        options = {"amount": amount, "unit": unit, "per_layer": per_layer, "at_least": at_least}
        return HeadMask(rows, self.heads, {"model": self.record.get("model", {}), "scores": self.record, "keep": options})

    def top(self, k: int = 10) -> list[tuple[Head, float]]:
        """The k most important heads with their scores, the best first."""
        return [(members[0], score) for members, score in self.units()[::-1][:k]]

    def rank_correlation(self, other: HeadScores) -> float:
        """Spearman's rank correlation with other scores of the same heads; NaN where all scores of either are equal."""
        from scipy.stats import spearmanr

        other.check(self.labels)
        if min(np.ptp(self.flat), np.ptp(other.flat)) == 0:
            return float("nan")
        return float(spearmanr(self.flat, other.flat).statistic)

    def _told(self, row: int, i: int) -> dict[str, Any]:
        return {"score": self.rows[row][i]} | {name: rows[row][i] for name, rows in self.columns.items()}

    def _body(self) -> dict[str, Any]:
        columns = {name: [row.tolist() for row in rows] for name, rows in self.columns.items()}
        return super()._body() | {"columns": columns}

    def __repr__(self) -> str:
        best = ", ".join(f"{head} {score:.3g}" for head, score in self.top(3))
        return f"HeadScores({self.record.get('method', 'scores')}, {len(self)} heads, top: {best})"


def _count(amount: float | int, n: int, unit: str) -> int:
    """How many of n units `amount` means."""
    if isinstance(amount, bool) or not isinstance(amount, (int, float, np.integer, np.floating)):
        raise HeadlabError(f"the amount to keep is a share in [0, 1] or a count, not {amount!r}")
    if isinstance(amount, (int, np.integer)):
        if not 0 <= amount <= n:
            raise HeadlabError(f"cannot keep {amount} of {n} {unit}s")
        return int(amount)
    if not 0 <= amount <= 1:
        raise HeadlabError(f"the share to keep is between 0 and 1, not {amount}; a count is written as an int")
    return n - round((1 - amount) * n)


def _lengths(lengths: Sequence[int]) -> str:
    """`30 x 9`, or the lengths one by one."""
    return f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else "[" + ", ".join(map(str, lengths)) + "]"
