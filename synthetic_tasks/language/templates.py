"""Sentences with known places: patterns and words put together once, so that drawing a line only joins strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .words import Pattern, Patterns, People, WordFamily

Fact = tuple[str, str, int, bool]
"""Text before the person, text after, where the item begins in its part, and whether that is the first part."""


@dataclass(frozen=True, slots=True)
class Task:
    """One question: which record to find (by what), and what to say of it.

    `looked_up` and `reported` are "person", "gender", the family's item or something related to it, and "difference".
    """

    relation: str
    looked_up: str
    reported: str
    negated: bool
    order: str
    family: WordFamily

    @property
    def name(self) -> str:
        return f"{self.relation}/{self.looked_up}>{self.reported}/{self.negation}/{self.order}"

    @property
    def negation(self) -> str:
        return "not" if self.negated else "is"

    @property
    def odd(self) -> bool:
        """Whether no people occur."""
        return self.relation == "odd"

    @property
    def by_person(self) -> bool:
        """Whether the record is found by its person."""
        return self.looked_up in ("person", "gender")

    @property
    def tells_person(self) -> bool:
        return self.reported in ("person", "gender")

    @property
    def difficulty(self) -> int:
        related = ("gender", *self.family.related)
        return (self.looked_up in related) + (self.reported in related)

    @property
    def factors(self) -> dict[str, str]:
        return {
            "relation": self.relation,
            "looked_up": self.looked_up,
            "reported": self.reported,
            "negation": self.negation,
            "order": self.order,
        }

    @property
    def variants(self) -> tuple[Patterns, ...]:
        return self.family.odd if self.odd else self.family.patterns


@dataclass(frozen=True, slots=True)
class Sentences:
    """A task in one choice of patterns. Items are known by their number, people by name.

    A line is its facts, then `heads[key] + before[told]` (the query), the answer `words[told]`, `after[told]`; `key` and
    `told` are a person or an item, whichever the task looks up and reports.
    """

    facts: tuple[Fact, ...]  # by item
    lengths: tuple[int, ...]  # of the items
    heads: Mapping[str | int, str]
    before: Mapping[str | int, str]
    after: Mapping[str | int, str]
    words: Mapping[str | int, str]


def possible_tasks(families: Mapping[str, WordFamily]) -> list[Task]:
    """Every task, in a fixed order: by relation, looked up, reported, negation, order."""
    tasks = []
    for family in families.values():
        items = (family.item, *family.related)
        pairs = [(found, told) for found in ("person", "gender") for told in items]
        pairs += [("gender", "person")]
        pairs += [(found, told) for found in items for told in ("person", "gender")]
        pairs += [(found, family.item) for found in family.related]
        tasks += [
            Task(family.name, found, told, negated, order, family)
            for found, told in pairs
            for negated in (False, True)
            for order in ("plain", "swapped")
            # "the opposite of sad is" needs no facts: what is related to one word only names it
            if negated or not (found in family.related and told == family.item and family.one_to_one)
        ]
    for family in families.values():
        items = (family.item, *family.related)
        tasks += [
            Task("odd", found, told, found != "difference", order, family)
            for found in ("difference", *items)
            for told in items
            for order in ("plain", "swapped")
        ]
    return tasks


def compile_task(task: Task, people: People, variant: int) -> Sentences:
    """Put the task's patterns and words together."""
    family, patterns = task.family, task.variants[variant]
    facts = tuple(_fact(patterns.facts[task.order], family, number) for number in range(len(family.items)))
    same_side = not task.odd and task.by_person == task.tells_person
    # "the one that is an animal is the fox" speaks of the words alone, as the odd one out does
    clauses = {**(family.odd[variant % len(family.odd)] if same_side else patterns).clauses, **people.clauses}
    names, numbers = list(people.group), range(len(family.items))
    not_in_answer = task.negated and task.looked_up == "person"  # else in what is looked up
    before, after, words = {}, {}, {}
    for key in names if task.tells_person else numbers:
        word, rest = _word_and_forms(family, people, task.reported, key)
        parts = _around(clauses[task.reported][not_in_answer], task.reported, rest)
        words[key], before[key], after[key] = word, f" {parts[0]}", f"{parts[1]}."
    frame = people.who if task.by_person or task.tells_person else people.that
    heads: dict[str | int, str] = {}
    for key in names if task.by_person else numbers:
        if task.looked_up == "difference":
            heads[key] = f"{frame} {people.difference}"
        elif task.looked_up == "person":
            heads[key] = str(key)
        else:
            word, rest = _word_and_forms(family, people, task.looked_up, key)
            heads[key] = f"{frame} {word.join(_around(clauses[task.looked_up][task.negated], task.looked_up, rest))}"
    return Sentences(facts, tuple(len(item.word) for item in family.items), heads, before, after, words)


def _word_and_forms(family: WordFamily, people: People, what: str, key: str | int) -> tuple[str, Mapping[str, str]]:
    if isinstance(key, str):
        return (key if what == "person" else people.group[key]), {}
    item = family.items[key]
    return (item.word if what == family.item else item.related[family.related.index(what)]), item.forms


def _around(pattern: Pattern, what: str, forms: Mapping[str, str]) -> tuple[str, str]:
    """The text before and after the one place that stays open."""
    sides = ["", ""]
    side = 0
    for text, field in pattern:
        sides[side] += text
        if field == what:
            side = 1
        elif field:
            sides[side] += forms[field]
    return sides[0], sides[1]


def _fact(pattern: Pattern, family: WordFamily, number: int) -> Fact:
    item = family.items[number]
    sides, side, at, first = ["", ""], 0, 0, True
    for text, field in pattern:
        sides[side] += text
        if field == "person":
            side = 1
        elif field == family.item:
            at, first = len(sides[side]), side == 0
            sides[side] += item.word
        elif field:
            sides[side] += item.forms[field]
    return sides[0], sides[1], at, first
