"""Heads, and tables of them: what is said of every head, in rows as heads stand in the model. numpy only, no model needed.

There is one row per attention module: encoder layers first, then decoder layers, then cross-attention. Rows may differ in
length, because a pruned model has fewer heads in some layers than in others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .errors import HeadlabError
from .results import Result

if TYPE_CHECKING:
    import pandas as pd

Rows = tuple[np.ndarray, ...]
"""A number for every head: one array per row."""


WHICH_HEAD = ("head", "stack", "layer", "index", "group")
"""The columns of a table that say which head a line is of."""


@dataclass(frozen=True, order=True)
class Head:
    """One attention head. In a pruned model its labels stay those of the original."""

    row: int  # which row of scores and masks it stands in
    layer: int  # within its stack
    index: int  # within its layer
    stack: str = ""  # "enc", "dec" or "cross" in an encoder-decoder, else empty
    group: int = 0  # the key-value head it reads
    d_head: int = 0
    site: str = ""  # the module whose input its output is part of

    @property
    def columns(self) -> dict[str, Any]:
        """Which head it is, as the first columns of a table say it."""
        return dict(zip(WHICH_HEAD, (str(self), self.stack, self.layer, self.index, self.group), strict=True))

    def __str__(self) -> str:
        return f"{self.stack}{'.' if self.stack else ''}L{self.layer}H{self.index}"


Heads = tuple[tuple[Head, ...], ...]  # one tuple per row


def by_row(heads: Iterable[Head], n_rows: int | None = None) -> Heads:
    """Heads in rows; `n_rows` counts the last rows too if they are empty."""
    heads = sorted(heads)
    last = max((head.row for head in heads), default=-1) + 1
    return tuple(tuple(head for head in heads if head.row == row) for row in range(max(last, n_rows or 0)))


def write_heads(heads: Iterable[Head]) -> list[dict[str, Any]]:
    """Heads as JSON has them."""
    return [vars(head) for head in heads]


def read_heads(written: Iterable[Mapping[str, Any]]) -> tuple[Head, ...]:
    """The other way round."""
    return tuple(Head(**head) for head in written)


class HeadTable(Result):
    """A result with a line for every head: a kind says which heads these are, and what is told of each."""

    @property
    def labels(self) -> Heads:
        """The heads, row by row."""
        raise NotImplementedError

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per head."""
        import pandas as pd

        return pd.DataFrame(
            head.columns | self._told(row, i) for row, heads in enumerate(self.labels) for i, head in enumerate(heads)
        )

    def _told(self, row: int, i: int) -> dict[str, Any]:
        """What the columns of the table say of the i-th head of a row."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class HeadColumns(HeadTable):
    """Several numbers per head, by name; NaN where one is not defined for a head, or nothing was there to measure it on.

    Attributes:
        heads: one tuple per row; of composed heads (DCMHA) those with an output or probabilities.
        columns: by name, one array per row.
        errors: standard errors over examples, where there are any; NaN with fewer than two examples.
        record: how it was made; under `notes` what could not be measured, and why.
    """

    heads: Heads
    columns: dict[str, Rows]
    errors: dict[str, Rows] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> Heads:
        return self.heads

    def values(self, name: str) -> Rows:
        """One number for every head, one array per row.

        Raises:
            HeadlabError: there is no such number.
        """
        if name not in self.columns:
            raise HeadlabError(f"there is no number {name!r} here, but {', '.join(self.columns)}")
        return self.columns[name]

    def known(self, name: str) -> bool:
        """Whether every head has this number."""
        return not any(np.isnan(row).any() for row in self.values(name))

    def top(self, k: int, by: str) -> list[tuple[Head, float]]:
        """The k heads with the largest of these numbers, the largest first; heads without it are left out."""
        pairs = [
            (head, float(value))
            for labels, row in zip(self.heads, self.values(by), strict=True)
            for head, value in zip(labels, row, strict=True)
            if not np.isnan(value)
        ]
        return sorted(pairs, key=lambda pair: -pair[1])[:k]

    def _told(self, row: int, i: int) -> dict[str, Any]:
        """The numbers; standard errors are the columns that end in `_se`."""
        told = {}
        for name, found in self.columns.items():
            told[name] = float(found[row][i])
            if name in self.errors:
                told[f"{name}_se"] = float(self.errors[name][row][i])
        return told

    def _body(self) -> dict[str, Any]:
        numbers = {"columns": _written(self.columns), "errors": _written(self.errors)}
        return {"heads": list(map(write_heads, self.heads))} | numbers

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        heads = tuple(map(read_heads, body.pop("heads")))
        columns, errors = _read(body.pop("columns")), _read(body.pop("errors"))
        return cls(heads, columns, errors, record, **body)


def _written(columns: Mapping[str, Rows]) -> dict[str, Any]:
    """As JSON has it: without NaN."""
    return {name: [[None if np.isnan(x) else float(x) for x in row] for row in found] for name, found in columns.items()}


def _read(columns: Mapping[str, Any]) -> dict[str, Rows]:
    return {name: tuple(np.array(row, dtype=float) for row in found) for name, found in columns.items()}
