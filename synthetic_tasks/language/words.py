"""Words and sentence patterns of `InContextTasks`: those of the folder `lexicon/`, and the user's own, checked."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any

from headlab.errors import HeadlabError

ORDERS = ("plain", "swapped")
SHIPPED = ("possession", "city", "use", "adjective", "time")
_SOURCES = ("words", "pairs", "series")
_FRAMES = ("who", "that", "difference")

Pattern = tuple[tuple[str, str], ...]
"""A sentence in parts: text, and the placeholder after it (empty after the last)."""


@dataclass(frozen=True, slots=True)
class Item:
    """A word of a family, and what it is related to."""

    word: str
    group: int  # words of one group share all that they are related to: the things of a kind
    pool: int  # one line takes its words from one pool: the days of the week, the months
    related: tuple[str, ...]  # in the order of the family's `related`
    forms: Mapping[str, str]  # what stands for further placeholders beside it: {a}, {is}, {unit}


@dataclass(frozen=True, slots=True)
class Patterns:
    """Sentence patterns that go together."""

    facts: Mapping[str, Pattern]  # by word order
    clauses: Mapping[str, tuple[Pattern, Pattern]]  # by what they name: as it is, and with "not"


@dataclass(frozen=True, slots=True)
class WordFamily:
    """A relation: its words, and how it is said of people (`patterns`) and of the words alone (`odd`)."""

    name: str
    item: str
    related: tuple[str, ...]
    items: tuple[Item, ...]
    patterns: tuple[Patterns, ...]
    odd: tuple[Patterns, ...]

    @property
    def one_to_one(self) -> bool:
        """Whether each word is related to words that no other is related to: opposites, neighbours."""
        return self.items[-1].group == len(self.items) - 1


@dataclass(frozen=True, slots=True)
class People:
    """Names by group, and the clauses and frames that all relations share."""

    group: Mapping[str, str]  # of every name
    clauses: Mapping[str, tuple[Pattern, Pattern]]
    who: str
    that: str
    difference: str


def read_lexicon(own: str | Path | Mapping[str, Any] | None = None) -> tuple[People, dict[str, WordFamily]]:
    """The people and the relations: the shipped ones, and over them the user's own.

    Args:
        own: a TOML file or a mapping of its form. A table `people`, `possession`, `city`, `use`, `adjective` or `time`
            replaces what it names of the shipped one; any other table is a new relation. The shipped files in
            `synthetic_tasks/language/lexicon/` show the form: `item` and `related` name the words; `words` (groups), `pairs`
            (opposites) or `series` (neighbours) hold them; `patterns` and `odd` are the sentences.

    Raises:
        HeadlabError: the file cannot be read; a word is repeated, has two kinds or is also a name; too few words; a
            pattern is missing or names an unknown placeholder.
    """
    shipped = {name: _shipped(name) for name in ("people", *SHIPPED)}
    given = _given(own)
    for name, table in given.items():
        if not isinstance(table, Mapping):
            raise HeadlabError(f"the lexicon's {name} must be a table, not {type(table).__name__}")
        below = dict(shipped.get(name, {}))
        if any(source in table for source in _SOURCES):
            below = {key: value for key, value in below.items() if key not in _SOURCES}
        shipped[name] = below | dict(table)
    people = _people(shipped.pop("people"))
    families = {name: _family(name, table) for name, table in shipped.items()}
    _check_together(people, families)
    return people, families


def _shipped(name: str) -> dict[str, Any]:
    return tomllib.loads((files(__package__) / "lexicon" / f"{name}.toml").read_text(encoding="utf-8"))


def _given(own: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if own is None or isinstance(own, Mapping):
        return own or {}
    try:
        return tomllib.loads(Path(own).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HeadlabError(f"cannot read the lexicon {own}: {error}") from None


def _people(table: Mapping[str, Any]) -> People:
    _known_keys("people", table, {"words", "person", "gender", *_FRAMES})
    groups = _groups("people", table.get("words"), "names")
    names: dict[str, str] = {}
    for group, words in groups.items():
        for word in words:
            if word in names:
                raise HeadlabError(f"people: the name {word!r} stands twice, under {names[word]!r} and {group!r}")
            names[word] = group
    clauses = {what: _clause("people", what, table, set()) for what in ("person", "gender")}
    frames = [_word(f"people.{key}", table.get(key)) for key in _FRAMES]
    return People(names, clauses, *frames)


def _family(name: str, table: Mapping[str, Any]) -> WordFamily:
    _known_keys(name, table, {"item", "related", "articles", "patterns", "odd", *_SOURCES})
    if "/" in name or name == "odd":
        raise HeadlabError(f"a relation cannot be called {name!r}: task names use '/', and 'odd' is the odd one out")
    item = _word(f"{name}.item", table.get("item"))
    named = table.get("related")
    related = tuple(_word(name, word) for word in ([named] if isinstance(named, str) else _list(name, "related", named)))
    if len({item, *related, "person", "gender", "difference"}) != 4 + len(related):
        raise HeadlabError(f"{name}: item and related need different names (and not person, gender, difference)")
    sources = [source for source in _SOURCES if source in table]
    if len(sources) != 1:
        raise HeadlabError(f"{name}: expected one of words, pairs and series, not {sources or 'none'}")
    wanted = 2 if sources == ["series"] else 1
    if len(related) != wanted:
        raise HeadlabError(f"{name}: {sources[0]} need {wanted} names in related, not {len(related)}")
    make = {"words": _from_groups, "pairs": _from_pairs, "series": _from_series}[sources[0]]
    items = make(name, table[sources[0]], bool(table.get("articles", False)))
    seen: dict[str, Item] = {}
    for one in items:
        if other := seen.get(one.word):
            if one.related == other.related:
                raise HeadlabError(f"{name}: the word {one.word!r} stands twice")
            raise HeadlabError(
                f"{name}: the word {one.word!r} has more than one {related[0]}: {other.related[0]!r} and {one.related[0]!r}"
            )
        seen[one.word] = one
    for word in {word for one in items for word in one.related} if sources == ["words"] else ():
        if word in seen:
            raise HeadlabError(f"{name}: {word!r} is both a {item} and a {related[0]}")
    forms = set(items[0].forms)
    patterns = {
        key: tuple(_patterns(f"{name}.{key}", one, (item, *related), forms, key == "odd") for one in _list(name, key, given))
        for key, given in (("patterns", table.get("patterns")), ("odd", table.get("odd")))
    }
    for key, several in patterns.items():
        for order in ORDERS:
            if len({one.facts[order] for one in several}) < len(several):
                raise HeadlabError(f"{name}.{key}: two patterns have the same {order!r} sentence")
    return WordFamily(name, item, related, items, patterns["patterns"], patterns["odd"])


def _from_groups(name: str, table: Any, articles: bool) -> tuple[Item, ...]:
    items = []
    for number, (kind, words) in enumerate(_groups(name, table, "words").items()):
        for entry in words:
            word, forms = _article(entry) if articles else (entry, {})
            items.append(Item(word, number, 0, (kind,), forms))
    return tuple(items)


def _article(entry: str) -> tuple[str, dict[str, str]]:
    """A thing as one has it: "an orange", "some tea", "jeans" (several)."""
    first, _, rest = entry.partition(" ")
    if first in ("a", "an", "some") and rest:
        return rest, {"a": f"{first} ", "is": "is"}
    return entry, {"a": "", "is": "are"}


def _from_pairs(name: str, pairs: Any, _: bool) -> tuple[Item, ...]:
    items: list[Item] = []
    for pair in _list(name, "pairs", pairs):
        words = [_word(name, word) for word in _list(name, "a pair", pair)]
        if len(words) != 2:
            raise HeadlabError(f"{name}: a pair needs 2 words, not {len(words)}: {words}")
        for word, opposite in (words, words[::-1]):
            items.append(Item(word, len(items), 0, (opposite,), {}))
    return tuple(items)


def _from_series(name: str, series: Any, _: bool) -> tuple[Item, ...]:
    items: list[Item] = []
    keys: set[str] = set()
    for pool, table in enumerate(_list(name, "series", series)):
        if not isinstance(table, Mapping):
            raise HeadlabError(f"{name}: a series is a table with words, not {type(table).__name__}")
        words = [_word(name, word) for word in _list(name, "words", table.get("words"))]
        ring = bool(table.get("ring", False))
        if len(words) < 4:
            raise HeadlabError(f"{name}: a series needs at least 4 words, not {len(words)}: {words}")
        if len(set(words)) < len(words):
            twice = next(word for word in words if words.count(word) > 1)
            raise HeadlabError(f"{name}: the word {twice!r} stands twice in a series")
        extra = {key: value for key, value in table.items() if key not in ("words", "ring")}
        if any(not isinstance(value, str) for value in extra.values()) or (pool and set(extra) != keys):
            raise HeadlabError(f"{name}: all series need texts for the same placeholders, as the first has {sorted(keys)}")
        keys = set(extra)
        forms = extra | {key.capitalize(): value[:1].upper() + value[1:] for key, value in extra.items()}
        for at in range(0 if ring else 1, len(words) if ring else len(words) - 1):
            around = (words[(at + 1) % len(words)], words[at - 1])
            items.append(Item(words[at], len(items), pool, around, forms))
    return tuple(items)


def _patterns(name: str, table: Any, words: tuple[str, ...], forms: set[str], odd: bool) -> Patterns:
    if not isinstance(table, Mapping):
        raise HeadlabError(f"{name}: expected a table of sentence patterns, not {type(table).__name__}")
    _known_keys(name, table, {*ORDERS, *words})
    needed = (words[0],) if odd else ("person", words[0])
    facts = {}
    for order in ORDERS:
        if order not in table:
            raise HeadlabError(f"{name}: the pattern {order!r} is missing")
        facts[order] = _parse(name, order, table[order], needed, forms)
    about_words = forms - {"a", "is"}  # they would give away the word that is asked for
    return Patterns(facts, {word: _clause(name, word, table, about_words) for word in words})


def _clause(name: str, word: str, table: Mapping[str, Any], forms: set[str]) -> tuple[Pattern, Pattern]:
    if word not in table:
        raise HeadlabError(f"{name}: the pattern {word!r} is missing")
    both = _list(name, word, table[word])
    if len(both) != 2 or both[0] == both[1]:
        raise HeadlabError(f"{name}: {word!r} needs two different clauses, one as it is and one with 'not'")
    is_, not_ = (_parse(name, word, text, (word,), forms) for text in both)
    return is_, not_


def _parse(name: str, key: str, text: Any, needed: tuple[str, ...], forms: set[str]) -> Pattern:
    if not isinstance(text, str) or "\n" in text:
        raise HeadlabError(f"{name}: the pattern {key!r} must be one line of text, not {text!r}")
    try:
        parts = [(before, field or "") for before, field, _, _ in Formatter().parse(text)]
    except ValueError as error:
        raise HeadlabError(f"{name}: the pattern {text!r} is not well formed: {error}") from None
    found = [field for _, field in parts if field]
    for field in found:
        if field not in needed and field not in forms:
            known = ", ".join(f"{{{one}}}" for one in (*needed, *sorted(forms)))
            raise HeadlabError(f"{name}: unknown placeholder {{{field}}} in {text!r}; known here: {known}")
    for field in needed:
        if found.count(field) != 1:
            raise HeadlabError(f"{name}: {{{field}}} must stand once in {text!r}, not {found.count(field)} times")
    return tuple(parts)


def _groups(name: str, table: Any, what: str) -> dict[str, list[str]]:
    if not isinstance(table, Mapping):
        raise HeadlabError(f"{name}: words must be a table of lists, by what their words have in common")
    groups = {_word(name, key): [_word(name, word) for word in _list(name, key, words)] for key, words in table.items()}
    if len(groups) < 2:
        raise HeadlabError(f"{name}: at least 2 groups of {what} are needed, not {len(groups)}")
    return groups


def _list(name: str, key: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise HeadlabError(f"{name}: {key} must be a list with something in it, not {value!r}")
    return value


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value or value != value.strip() or any(mark in value for mark in "{}\n"):
        raise HeadlabError(f"{name}: expected a word (without braces or spaces around it), not {value!r}")
    return value


def _known_keys(name: str, table: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(str(key) for key in table if key not in known):
        raise HeadlabError(f"{name}: unknown key {unknown[0]!r} in the lexicon; known: {', '.join(sorted(known))}")


def _check_together(people: People, families: Mapping[str, WordFamily]) -> None:
    taken: dict[str, str] = {}
    for family in families.values():
        for word in (family.item, *family.related):
            if other := taken.get(word):
                raise HeadlabError(f"the relations {other} and {family.name} both call something {word!r}: rename one")
            taken[word] = family.name
        for one in family.items:
            for word in (one.word, *one.related):
                if word in people.group:
                    raise HeadlabError(f"{family.name}: the word {word!r} is also the name of a person")
