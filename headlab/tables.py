"""Tables of heads: what is said of every head, in rows as they stand in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .errors import HeadlabError
from .results import Result
from .scores import Head, Heads, Rows

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class HeadTable(Result):
    """Several numbers per head, by name; NaN where one is not defined for a head, or nothing was there to measure it on.

    Attributes:
        heads: one tuple per attention module; of composed heads (DCMHA) those with an output or probabilities.
        columns: by name, one array per attention module.
        errors: standard errors over examples, where there are any; NaN with fewer than two examples.
        record: how it was made; under `notes` what could not be measured, and why.
    """

    heads: Heads
    columns: dict[str, Rows]
    errors: dict[str, Rows] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def values(self, name: str) -> Rows:
        """One number for every head, one array per attention module.

        Raises:
            HeadlabError: there is no such number.
        """
        if name not in self.columns:
            raise HeadlabError(f"there is no number {name!r} here, but {', '.join(self.columns)}")
        return self.columns[name]

    def top(self, k: int, name: str) -> list[tuple[Head, float]]:
        """The k heads with the largest of these numbers, the largest first; heads without it are left out."""
        pairs = [
            (head, float(value))
            for labels, row in zip(self.heads, self.values(name), strict=True)
            for head, value in zip(labels, row, strict=True)
            if not np.isnan(value)
        ]
        return sorted(pairs, key=lambda pair: -pair[1])[:k]

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per head; standard errors are the columns that end in `_se`."""
        import pandas as pd

        return pd.DataFrame(
            {"head": str(head), "stack": head.stack, "layer": head.layer, "index": head.index, "group": head.group}
            | self._told(row, place)
            for row, labels in enumerate(self.heads)
            for place, head in enumerate(labels)
        )

    def _told(self, row: int, place: int) -> dict[str, Any]:
        told = {}
        for name, found in self.columns.items():
            told[name] = float(found[row][place])
            if name in self.errors:
                told[f"{name}_se"] = float(self.errors[name][row][place])
        return told

    def _body(self) -> dict[str, Any]:
        return {
            "heads": [[vars(head) for head in row] for row in self.heads],
            "columns": _written(self.columns),
            "errors": _written(self.errors),
        }

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        heads = tuple(tuple(Head(**head) for head in row) for row in body.pop("heads"))
        columns, errors = _read(body.pop("columns")), _read(body.pop("errors"))
        return cls(heads, columns, errors, record, **body)


def _written(columns: Mapping[str, Rows]) -> dict[str, Any]:
    """As JSON has it: without NaN."""
    return {name: [[None if np.isnan(x) else float(x) for x in row] for row in found] for name, found in columns.items()}


def _read(columns: Mapping[str, Any]) -> dict[str, Rows]:
    return {name: tuple(np.array(row, dtype=float) for row in found) for name, found in columns.items()}
