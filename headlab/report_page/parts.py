"""What the page is made of: files that were read, and the columns, panels, prompts and figures that they add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Plot = Callable[[], Any]  # makes a plotly figure


@dataclass(frozen=True)
class Item:
    """One file that was read."""

    path: Path
    kind: str
    result: Any
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Column:
    """A number or a word per head, by the head's name; heads that are not in `values` have none."""

    label: str
    source: str
    values: Mapping[str, float | str]


@dataclass(frozen=True)
class Line:
    """A line of a head's panel: a text, and perhaps the head that a click leads to and a number."""

    text: str
    head: str | None = None
    value: float | None = None


@dataclass(frozen=True)
class Panel:
    """A block of lines for every head. Panels with the same title stand together."""

    title: str
    label: str
    source: str
    lines: Mapping[str, list[Line]]


@dataclass(frozen=True)
class Prompt:
    """All heads' attention patterns on one prompt: by head, weights [query, key], and which tokens these are."""

    name: str
    source: str
    tokens: Mapping[str, list[str]]  # by stack
    sides: Mapping[str, tuple[str, str]]  # by head, the stacks of its queries and keys
    patterns: Mapping[str, np.ndarray]


@dataclass
class Part:
    """What one result adds."""

    columns: list[Column] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    figures: list[tuple[str, Plot]] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)  # head -> the key-value head that it reads
    heads: set[str] = field(default_factory=set)  # that the result speaks of
    left_out: list[str] = field(default_factory=list)  # what would be too large for the page, and what draws it
