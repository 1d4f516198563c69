"""Which people and which words stand on a line: drawn so that exactly one record is right, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from math import factorial, perm
from random import Random
from typing import Generic, Literal, TypeVar

from .templates import Task
from .words import People, WordFamily

Persons = Literal["none", "any", "same", "other genders", "one other gender", "mixed"]
Items = Literal["any", "same word", "same group"]
T = TypeVar("T")


def persons_mode(task: Task) -> Persons:
    """Who the people of the other records are."""
    if task.odd:
        return "none"
    if task.looked_up == "person":
        return "same" if task.negated else "any"
    if task.looked_up == "gender":
        return "one other gender" if task.negated else "other genders"
    return "mixed" if task.reported == "gender" else "any"


def items_mode(task: Task) -> Items:
    """What the other records hold. Words of other groups, so that nothing else is related to what the right one is; or,
    where they share what is looked up, the same word, or words related to the same."""
    if task.looked_up == "difference" or (task.negated and task.looked_up == task.family.item):
        return "same word"
    return "same group" if task.negated and task.looked_up in task.family.related else "any"


def shortage(task: Task, people: People, records: int) -> str | None:
    """Why there are too few words for so many records, if so."""
    if task.odd and records < 3:
        return f"the odd one out needs at least 3 records, not {records}; or leave it out (relations=...)"
    pools = _group_sizes(task.family)
    least = min(len(pool) for pool in pools)
    needed = records if items_mode(task) == "any" else 2
    if least < needed:
        words = "words" if max(map(max, pools)) == 1 else f"groups of words (by {task.family.related[0]})"
        return f"{records} records need {needed} {words} of {task.family.item}, but there are {least}"
    genders, mode = _gender_sizes(people), persons_mode(task)
    n = sum(genders)
    for size in genders:
        others = {
            "none": records,
            "any": n - 1,
            "same": (n - 1) * records,
            "other genders": n - size,
            "one other gender": max(other for other in _without(genders, size)),
            "mixed": n - 1,
        }[mode]
        if others < records - 1:
            return f"{records} records need {records - 1} more names beside the right one ({mode}), but there are {others}"
    return None


def possible_lines(task: Task, people: People, records: int) -> int:
    """How many different lines there are: positions of the right record x people x items x sentence patterns."""
    k = records - 1  # the others
    genders = _gender_sizes(people)
    n = sum(genders)
    ways: dict[Persons, Callable[[], int]] = {
        "none": lambda: 1,
        "any": lambda: perm(n, records),
        "same": lambda: n * (n - 1),
        "other genders": lambda: sum(size * perm(n - size, k) for size in genders),
        "one other gender": lambda: sum(
            a * perm(b, k) for i, a in enumerate(genders) for j, b in enumerate(genders) if i != j
        ),
        "mixed": lambda: sum(size * (perm(n - 1, k) - perm(size - 1, k)) for size in genders),
    }
    persons = ways[persons_mode(task)]()
    items, mode = 0, items_mode(task)
    for pool in _group_sizes(task.family):
        if mode == "any":
            items += factorial(records) * _elementary(pool, records)
        elif mode == "same word":
            items += sum(pool) ** 2 - sum(size * size for size in pool)
        else:
            within = [_ways_within(size, k) for size in pool]
            items += sum(pool) * sum(within) - sum(size * way for size, way in zip(pool, within, strict=True))
    return records * persons * items * len(task.variants)


def _ways_within(size: int, k: int) -> int:
    return perm(size, k) if size >= k else size**k


def _elementary(sizes: Sequence[int], k: int) -> int:
    """In how many ways one word each can be taken from k different groups."""
    ways = [1] + [0] * k
    for size in sizes:
        for j in range(k, 0, -1):
            ways[j] += ways[j - 1] * size
    return ways[k]


def _group_sizes(family: WordFamily) -> list[list[int]]:
    """Of every pool."""
    by_pool = [list(items) for _, items in groupby(family.items, key=lambda item: item.pool)]
    return [[len(list(items)) for _, items in groupby(pool, key=lambda item: item.group)] for pool in by_pool]


def _gender_sizes(people: People) -> list[int]:
    genders = list(people.group.values())
    return [genders.count(gender) for gender in dict.fromkeys(genders)]


def _without(sizes: list[int], one: int) -> list[int]:
    at = sizes.index(one)
    return sizes[:at] + sizes[at + 1 :]


class Deck(Generic[T]):
    """Draws without replacement from groups in turn, shuffled anew when all are drawn: each as often as the others."""

    def __init__(self, groups: Sequence[Sequence[T]], rng: Random) -> None:
        self.groups = groups
        self.rng = rng
        self.order: list[int] = []
        self.left: list[list[T]] = [[] for _ in groups]

    def draw(self) -> T:
        if not self.order:
            self.order = list(range(len(self.groups)))
            self.rng.shuffle(self.order)
        at = self.order.pop()
        if not self.left[at]:
            self.left[at] = list(self.groups[at])
            self.rng.shuffle(self.left[at])
        return self.left[at].pop()


class _Right:
    """What the right records are: their people, items and positions, each balanced."""

    def __init__(self, sampler: Sampler, task: Task, rng: Random) -> None:
        names, numbers = list(sampler.genders), list(range(len(task.family.items)))
        by_gender = [
            [name for name in names if sampler.genders[name] == gender] for gender in dict.fromkeys(sampler.genders.values())
        ]
        by_group = [list(group) for _, group in groupby(numbers, key=lambda i: task.family.items[i].group)]
        self.person = Deck(by_gender if task.reported == "gender" else [names], rng)
        self.item = Deck(by_group if task.reported in task.family.related else [numbers], rng)
        self.position = Deck([list(range(sampler.n))], rng)


class Sampler:
    """The records of one line after another."""

    def __init__(self, task: Task, people: People, records: int, seed: int) -> None:
        self.n, self.rng = records, Random(f"{seed}/{task.name}")
        self.genders = people.group
        self.persons_mode, self.items_mode = persons_mode(task), items_mode(task)
        self.names = list(people.group)
        genders = list(dict.fromkeys(people.group.values()))
        self.of_gender = {g: [name for name in self.names if people.group[name] == g] for g in genders}
        self.not_of = {g: [name for name in self.names if people.group[name] != g] for g in genders}
        items = task.family.items
        self.groups = [item.group for item in items]
        pools: dict[int, list[int]] = {}
        members: dict[int, list[int]] = {}
        for number, item in enumerate(items):
            pools.setdefault(item.pool, []).append(number)
            members.setdefault(item.group, []).append(number)
        self.pools = [pools[item.pool] for item in items]
        self.members = [members[item.group] for item in items]
        self.scored, self.shots = _Right(self, task, self.rng), _Right(self, task, self.rng)
        self.variants = Deck([list(range(len(task.variants)))], self.rng)
        self.nobody = [""] * records
        self.person, self.item, self.position = "", 0, 0

    def variant(self) -> int:
        return self.variants.draw()

    def new_line(self, shot: bool) -> None:
        """Choose the right record of the next line."""
        right = self.shots if shot else self.scored
        self.person = "" if self.persons_mode == "none" else right.person.draw()
        self.item, self.position = right.item.draw(), right.position.draw()

    def records(self, attempt: int = 0) -> tuple[list[str], list[int], int]:
        """People and items of the line's records, in their order, and which is right.

        Each attempt draws the others anew; once few lines with this position, then with this item, seem to be left, those
        are drawn anew as well.
        """
        if attempt >= 8:
            self.position = self.rng.randrange(self.n)
        if attempt >= 32:
            self.item = self.rng.randrange(len(self.groups))
        items = self._other_items()
        items.insert(self.position, self.item)
        if self.persons_mode == "none":
            return self.nobody, items, self.position
        people = self._other_people()
        people.insert(self.position, self.person)
        return people, items, self.position

    def _other_people(self) -> list[str]:
        mode, right, k = self.persons_mode, self.person, self.n - 1
        if mode == "same":
            return self._distinct(self.names, 1, right) * k
        if mode == "any":
            return self._distinct(self.names, k, right)
        gender = self.genders[right]
        if mode == "other genders":
            return self._distinct(self.not_of[gender], k, right)
        if mode == "one other gender":
            large = [g for g, names in self.of_gender.items() if g != gender and len(names) >= k]
            return self._distinct(self.of_gender[self.rng.choice(large)], k, right)
        while True:
            people = self._distinct(self.names, k, right)
            if any(self.genders[person] != gender for person in people):
                return people

    def _distinct(self, pool: list[str], k: int, right: str) -> list[str]:
        random, size = self.rng.random, len(pool)
        if 2 * k >= size:
            return self.rng.sample([name for name in pool if name != right], k)
        found: list[str] = []
        while len(found) < k:
            name = pool[int(random() * size)]
            if name != right and name not in found:
                found.append(name)
        return found

    def _other_items(self) -> list[int]:
        random, groups, k = self.rng.random, self.groups, self.n - 1
        pool = self.pools[self.item]
        size = len(pool)
        found: list[int] = []
        taken = {groups[self.item]}
        while len(found) < (k if self.items_mode == "any" else 1):
            one = pool[int(random() * size)]
            if groups[one] not in taken:
                taken.add(groups[one])
                found.append(one)
        if self.items_mode == "same word":
            return found * k
        if self.items_mode == "same group":
            members = self.members[found[0]]
            return self.rng.sample(members, k) if len(members) >= k else self.rng.choices(members, k=k)
        return found
