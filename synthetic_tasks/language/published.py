"""The published in-context tasks of DCFormer (Xiao et al. 2024, arXiv 2405.08553), read from their file.

The file is not part of this package: 74 tasks of 12 contexts, one JSON object a line with `task_id` and `texts`; a text has
two solved examples and six whose answers stand in brackets, as in `Ruth has a kind of [ vehicle ]`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

from headlab.errors import HeadlabError

from .contexts import Answer, Context, Span

_PERSON_AND_ITEM = ("person", "related"), ("related", "person"), ("person", "item"), ("item", "person")
_BLOCKS = (  # first task, relation, what is (looked up, reported) in each group of four tasks
    (0, "possession", _PERSON_AND_ITEM),
    (16, "city", _PERSON_AND_ITEM),
    (32, "use", _PERSON_AND_ITEM[:2]),
    (40, "adjective", _PERSON_AND_ITEM[:2]),
    (48, "time", _PERSON_AND_ITEM[:2]),
)
_FIRST_ODD = 56
_ODD_REPORTED = (
    "item",
    "related",
    "item",
    "related",
    "item",
    "related",
    "related",
    "related",
    "related",
)  # by pair of tasks


def published_tasks(source: str | Path, timeout: float = 30.0) -> list[Context]:
    """Read the task file from a path, or from an http(s) or file address.

    Brackets are taken out of the text, with the white space inside them, so that scored lines look like solved ones; spans
    point into the text that is left. Empty lines before the first line and after the last one go too: the model sees the
    first example at once, after whatever its tokenizer begins with.

    The `choices` of an answer are the distinct answers of its task in the file, sorted. `query` is the part of the line from
    its last full stop to the answer. Records and items are not marked in the file, so these spans are None.

    `factors` and `difficulty` go by the number in `task_id`, task0 to task73 (others have none):

    * relation: possession (and kind), city (and country), use, adjective (and opposite), time (and neighbour), odd
      (one out).
    * looked_up: what the query is matched by: `person`; `item`, the thing or city as it stands in the text; `related`, its
      kind, country, use, opposite or neighbour; `odd`, the one unlike the others.
    * reported: `item`, `related` or `person`.
    * negation: `yes` where the query says "not".
    * order: `plain` ("Ruth has a taxi") or `swapped` ("The taxi is Ruth's"). For odd one out, `plain` asks "Which is not
      X?" and `swapped` asks "Which is different?", so that there negation and order are the same thing.
    * difficulty: how many of looked_up and reported are `related`; 0 is copying.

    Tasks 2k and 2k + 1 tell the same facts in both orders.

    Raises:
        HeadlabError: the source cannot be read or fetched (within `timeout` seconds), is empty, or has a line that does not
            parse (with its number).

    >>> contexts = published_tasks("synthetic_dataset.jsonl")  # doctest: +SKIP
    """
    name = str(source)
    drafts = [
        _parse(line, f"{name}, line {number}")
        for number, line in enumerate(_read(source, timeout).split("\n"), 1)
        if line.strip()
    ]
    if not drafts:
        raise HeadlabError(f"{name} is empty: expected one JSON object with task_id and texts a line")
    choices: dict[str, set[str]] = {}
    for draft in drafts:
        choices.setdefault(draft.task, set()).update(draft.text[slice(*span)] for span, _ in draft.answers)
    by_task = {task: tuple(sorted(found)) for task, found in choices.items()}
    return [draft.finished(by_task[draft.task]) for draft in drafts]


@dataclass
class _Draft:
    """A context whose task's other answers are not known yet."""

    task: str
    text: str
    answers: list[tuple[Span, Span]]  # of the answer, of its query

    def finished(self, choices: tuple[str, ...]) -> Context:
        answers = tuple(Answer(self.text[slice(*span)], span, choices, query) for span, query in self.answers)
        factors = task_factors(self.task)
        related = [factors["looked_up"], factors["reported"]].count("related") if factors else None
        return Context(self.task, self.text, answers, factors, related)


def task_factors(task: str) -> dict[str, str]:
    """What a published task is made of, by its name; nothing for a name outside task0 to task73."""
    match = re.fullmatch(r"task(\d{1,9})", task, re.ASCII)
    number = int(match[1]) if match else -1
    pair = (number - _FIRST_ODD) // 2
    if number < 0 or pair >= len(_ODD_REPORTED):
        return {}
    order = "swapped" if number % 2 else "plain"
    if number >= _FIRST_ODD:
        negation = "no" if number % 2 else "yes"
        named = {"relation": "odd", "looked_up": "odd", "reported": _ODD_REPORTED[pair]}
    else:
        first, relation, groups = next(block for block in reversed(_BLOCKS) if number >= block[0])
        looked_up, reported = groups[(number - first) // 4]
        negation = "no" if number % 4 >= 2 else "yes"
        named = {"relation": relation, "looked_up": looked_up, "reported": reported}
    return named | {"negation": negation, "order": order}


def _read(source: str | Path, timeout: float) -> str:
    try:
        if isinstance(source, str) and urlsplit(source).scheme in ("http", "https", "file"):
            with urlopen(source, timeout=timeout) as response:
                data: bytes = response.read()
        else:
            data = Path(source).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeadlabError(f"{source} is not a text file in UTF-8 (byte {error.start})") from None
    except (OSError, ValueError, HTTPException) as error:  # URLError and time-outs are OSErrors, a bad address a ValueError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error or type(error).__name__
        raise HeadlabError(f"cannot read the task file {source}: {reason}") from error


def _parse(line: str, where: str) -> _Draft:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise HeadlabError(f"{where} is not JSON ({error.msg} at character {error.colno})") from None
    task, marked = (row.get("task_id"), row.get("texts")) if isinstance(row, dict) else (None, None)
    if not isinstance(task, str) or not isinstance(marked, str) or not task:
        raise HeadlabError(f'{where} has no "task_id" and "texts" that are strings')
    text, answers = "", []
    for example in marked.strip().split("\n"):
        begin = len(text)  # of the line in the text
        query = begin  # where the part not yet told by an answer begins
        parts = re.split(r"([\[\]])", example)  # text, mark, text, mark ... text
        marks = parts[1::2]
        if marks != ["[", "]"] * (len(marks) // 2):
            raise HeadlabError(f"{where} has brackets that do not pair up in {example!r}: expected [ answer ]")
        for i in range(0, len(parts) - 1, 4):
            answer = parts[i + 2].strip()
            if not answer:
                raise HeadlabError(f"{where} has an empty answer in {example!r}: expected [ answer ]")
            text += parts[i]
            stop = text.rfind(". ", query)
            asked = len(text[query:].rstrip()) + query
            span = (len(text), len(text) + len(answer))
            answers.append((span, (min(stop + 2 if stop >= 0 else query, asked), asked)))
            text, query = text + answer, span[1]
        text += parts[-1] + "\n"
    if not answers:
        raise HeadlabError(f"{where} has no answer in brackets: expected [ answer ]")
    return _Draft(task, text.removesuffix("\n"), answers)
