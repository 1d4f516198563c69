"""Texts with questions in them: what `InContextTasks` makes, `published_tasks` reads and `evaluate` scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Span = tuple[int, int]
"""Characters of a context's text, from the first to the one after the last."""
Fact = Literal["record", "matched", "reported"]
"""What an answer follows from: spans of an `Answer`, by their names."""
Part = Literal[Fact, "query"]
"""And what asks for it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One scored answer of a context, and where in the text everything stands that it follows from.

    Attributes:
        text: the answer, as it stands in the text at `span`.
        span: of the answer.
        choices: the possible answers, this one among them.
        query: what asks, up to the answer.
        record: the fact that the query asks about; None where it is not known (in the published file).
        matched: the item of the record that the query looks for (what QK has to find).
        reported: the item of the record that the answer follows from (what OV has to carry).
    """

    text: str
    span: Span
    choices: tuple[str, ...]
    query: Span
    record: Span | None = None
    matched: Span | None = None
    reported: Span | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """One text: solved examples, then scored ones, each on its line, all with their answers.

    Attributes:
        task: its name; contexts of one task differ in their words only.
        text: the whole text.
        answers: the scored answers, in the order of the text.
        factors: what the task is made of, by name: relation, looked_up, reported, negation, order.
        difficulty: how many relations lie between the text and the answer; 0 is copying; None where it is not known.
    """

    task: str
    text: str
    answers: tuple[Answer, ...]
    factors: Mapping[str, str] = field(default_factory=dict)
    difficulty: int | None = None
