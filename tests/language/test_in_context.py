"""`InContextTasks`: every line is solved again from its text alone, by what this file knows of words and calendars."""

from __future__ import annotations

import calendar
import doctest
import re
import tomllib
from collections import Counter
from importlib.resources import files
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headlab.errors import HeadlabError
from synthetic_tasks.language import in_context as language
from synthetic_tasks.language.contexts import Answer, Context
from synthetic_tasks.language.in_context import InContextTasks
from synthetic_tasks.language.sampling import Sampler, possible_lines, shortage
from synthetic_tasks.language.templates import possible_tasks
from synthetic_tasks.language.words import read_lexicon


def raw(name: str) -> dict[str, Any]:
    return tomllib.loads((files("synthetic_tasks.language") / "lexicon" / f"{name}.toml").read_text(encoding="utf-8"))


HOURS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
RINGS = [HOURS, list(calendar.day_name), list(calendar.month_name)[1:]]
GENDER = {name: gender for gender, names in raw("people")["words"].items() for name in names}
ITEMS: dict[str, dict[str, dict[str, str]]] = {}  # by relation: what is asked -> word -> value
for _relation, _item, _related in (("possession", "thing", "kind"), ("city", "city", "country"), ("use", "tool", "use")):
    bare = {re.sub("^(a|an|some) ", "", word): group for group, words in raw(_relation)["words"].items() for word in words}
    ITEMS[_relation] = {_item: {word: word for word in bare}, _related: bare}
_opposite = {a: b for pair in raw("adjective")["pairs"] for a, b in (pair, pair[::-1])}
ITEMS["adjective"] = {"adjective": {word: word for word in _opposite}, "opposite": _opposite}
_years = [str(year) for year in range(1981, 2021)]
_next = {word: ring[(i + 1) % len(ring)] for ring in RINGS for i, word in enumerate(ring)} | {
    y: str(int(y) + 1) for y in _years
}
_last = {word: ring[i - 1] for ring in RINGS for i, word in enumerate(ring)} | {y: str(int(y) - 1) for y in _years}
ITEMS["time"] = {"time": {word: word for word in _next}, "before": _next, "after": _last}


def found(words: Any, text: str) -> list[str]:
    """Which of the words stand in the text, in its order."""
    return [word for word in dict.fromkeys(re.findall(r"\w+", text)) if word in words]


def only(words: list[str]) -> str:
    assert len(words) == 1, words
    return words[0]


def values(relation: str, looked_up: str, reported: str) -> dict[str, dict[str, str]]:
    """What each word of a line says, by factor."""
    family = (
        next(known for known in ITEMS.values() if looked_up in known or reported in known)
        if relation == "odd"
        else ITEMS.get(relation, {})
    )
    return {"person": {name: name for name in GENDER}, "gender": GENDER, **family}


def solve(line: str, context: Context) -> tuple[list[dict[str, str]], list[int], str]:
    """The line's records (as sentence, person, item), which of them are right, and what the query says before the answer."""
    f = context.factors
    *facts, query = re.findall(r"[^.]+\.", line)
    family = values(f["relation"], f["looked_up"], f["reported"])
    words = next(iter(value for key, value in family.items() if key not in ("person", "gender")))
    records = []
    for fact in facts:
        record = {"text": fact.strip(), "item": only(found(words, fact.replace(" one is ", " ")))}
        if f["relation"] != "odd":
            record["person"] = only(found(GENDER, fact))
        records.append(record)

    def told(record: dict[str, str], what: str) -> str:
        return family[what][record["person" if what in ("person", "gender") else "item"]]

    query = query.strip()
    if f["looked_up"] == "difference":
        counts = Counter(record["item"] for record in records)
        right = [i for i, record in enumerate(records) if counts[record["item"]] == 1]
    else:
        lookups = set(family[f["looked_up"]].values())
        frame = re.sub("^The one (who|that) ", "", query)
        key = found(lookups, frame)[:1]  # an answer of the same sort stands last
        same = [told(record, f["looked_up"]) == only(key) for record in records]
        assert (" not " in query) == (f["negation"] == "not")
        right = [i for i, hit in enumerate(same) if hit != (f["negation"] == "not")]
    return [record | {"answer": told(record, f["reported"])} for record in records], right, query


def check(context: Context, shots: int, scored: int, n_records: int) -> list[int]:
    """Everything that a context promises. Returns which record was right, in the scored lines."""
    f, text = context.factors, context.text
    assert text.endswith(".\n")
    lines = text[:-1].split("\n")
    assert len(lines) == shots + scored == len(set(lines))
    assert len(context.answers) == scored
    assert list(f) == ["relation", "looked_up", "reported", "negation", "order"]
    assert context.task == f"{f['relation']}/{f['looked_up']}>{f['reported']}/{f['negation']}/{f['order']}"
    related = {"gender", "kind", "country", "use", "opposite", "before", "after"}
    assert context.difficulty == (f["looked_up"] in related) + (f["reported"] in related)
    places = []
    start = 0
    for number, line in enumerate(lines):
        records, right, query = solve(line, context)
        assert len(records) == n_records
        assert len(right) == 1
        record = records[right[0]]
        ending = line.removesuffix(".").removesuffix(" o'clock")
        assert ending.endswith(f" {record['answer']}")
        if number >= shots:
            places.append(right[0])
            check_answer(context.answers[number - shots], text, start, line, records, record, query, f)
        start += len(line) + 1
    return places


def check_answer(answer: Answer, text: str, start: int, line: str, records: Any, record: Any, query: str, f: Any) -> None:
    def at(span: tuple[int, int] | None) -> str:
        assert span is not None
        assert start <= span[0] < span[1] <= start + len(line)
        return text[slice(*span)]

    assert answer.text == record["answer"] == at(answer.span)
    assert text[answer.span[1] : start + len(line)] in (".", " o'clock.")
    assert query.startswith(at(answer.query))
    assert text[answer.query[1] : answer.span[0]] == " "
    assert answer.query[0] == start + line.rindex(query)  # it may repeat a fact: that is copying
    assert at(answer.record) == record["text"]
    for span, what in ((answer.matched, f["looked_up"]), (answer.reported, f["reported"])):
        side = "person" if what in ("person", "gender") else "item"
        assert at(span) == record[side]
        assert answer.record[0] <= span[0] < span[1] <= answer.record[1]  # type: ignore[index]
        assert not (text[span[0] - 1] + text[span[1]]).isalnum()  # type: ignore[index]
    assert list(answer.choices) == list(dict.fromkeys(one["answer"] for one in records))
    assert len(answer.choices) >= 2
    if f["relation"] != "odd" and f["reported"] != "gender" and (f["looked_up"], f["negation"]) != ("kind", "not"):
        shared = f["negation"] == "not" and (f["looked_up"] in ("person", "gender")) == (
            f["reported"] in ("person", "gender")
        )
        assert shared or len(answer.choices) == len(records)


@pytest.fixture(scope="module")
def tasks() -> InContextTasks:
    return InContextTasks()


def test_every_task_has_exactly_one_right_answer_and_right_spans(tasks: InContextTasks) -> None:
    assert len(tasks.names) == len(set(tasks.names)) == 286
    for context in tasks.sample(3):
        check(context, 2, 6, 3)


@settings(max_examples=25)
@given(st.data(), st.integers(2, 6), st.integers(0, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_other_sizes(data: Any, records: int, shots: int, scored: int, seed: int) -> None:
    relations = ["possession", "city", "use", "adjective", "time"] + ["odd"] * (records > 2)
    drawn = InContextTasks(relations, records=records, shots=shots, scored=scored, seed=seed)
    name = data.draw(st.sampled_from(drawn.names))
    for context in drawn.sample(10, name):
        assert context.task == name
        check(context, shots, scored, records)


def spread(counts: Counter[Any], size: int) -> int:
    return max(counts.values()) - (min(counts.values()) if len(counts) == size else 0)


def test_answers_and_places_are_balanced(tasks: InContextTasks) -> None:
    for name in tasks.names:
        contexts = tasks.sample(12, name)
        f = contexts[0].factors
        counts = Counter(answer.text for context in contexts for answer in context.answers)
        known = values(f["relation"], f["looked_up"], f["reported"])[f["reported"]]
        assert spread(counts, len(set(known.values()))) <= 1, (name, counts)
        places = Counter(place for context in contexts for place in check(context, 2, 6, 3))
        assert spread(places, 3) == 0, (name, places)


def test_what_is_looked_up_is_balanced_too(tasks: InContextTasks) -> None:
    contexts = tasks.sample(40, "possession/kind>person/is/plain")
    assert spread(Counter(c.text[slice(*a.matched)] for c in contexts for a in c.answers if a.matched), 80) <= 1
    contexts = tasks.sample(40, "city/person>country/not/swapped")
    assert spread(Counter(c.text[slice(*a.reported)] for c in contexts for a in c.answers if a.reported), 54) <= 2


def lines_of(contexts: list[Context]) -> list[str]:
    return [line for context in contexts for line in context.text.split("\n")[2:-1]]


def test_thousands_of_distinct_lines(tasks: InContextTasks) -> None:
    assert min(tasks.lines(name) for name in tasks.names) // 2 >= 3000 + 2
    smallest = {name.split("/")[0]: name for name in sorted(tasks.names, key=tasks.lines, reverse=True)}
    assert len(smallest) == 6
    for name in smallest.values():
        lines = lines_of(tasks.sample(500, name))
        assert len(lines) == len(set(lines)) == 3000


def test_contexts_follow_from_seed_and_task(tasks: InContextTasks) -> None:
    name = "use/use>person/not/plain"
    long = tasks.sample(9, name)
    assert tasks.sample(4, name) == long[:4] == InContextTasks("use").sample(4, name)
    assert InContextTasks(seed=1).sample(4, name) != long[:4]
    all_of_them = InContextTasks("use", negation="not").sample(2)
    assert [c.task for c in all_of_them] == [n for n in InContextTasks("use", negation="not").names for _ in range(2)]
    assert all_of_them[:2] == tasks.sample(2, all_of_them[0].task)


def test_filters_narrow() -> None:
    tasks = InContextTasks(
        ["possession", "odd"], looked_up="kind", reported=("thing", "kind"), negation="not", order="plain"
    )
    assert tasks.names == ["possession/kind>thing/not/plain", "odd/kind>thing/not/plain", "odd/kind>kind/not/plain"]


def test_facts_are_needed(tasks: InContextTasks) -> None:
    """Nothing is asked that follows from the query alone: the opposite of sad is happy, whoever is happy."""
    assert "adjective/opposite>adjective/not/plain" in tasks.names
    assert not {"adjective/opposite>adjective/is/plain", "time/before>time/is/swapped"} & set(tasks.names)
    assert "possession/kind>thing/is/plain" in tasks.names


def test_articles_and_plurals(tasks: InContextTasks) -> None:
    relations = InContextTasks(["possession", "use", "odd"])
    text = "".join(context.text for context in relations.sample(15))
    articles = set(re.findall(r"\b(an?) (\w+)", text))
    assert len(articles) > 90
    for article, word in articles:
        assert article == ("an" if word[0] in "aeiou" else "a"), word
    text = re.sub(r"The one [^.]+\.", "", text)  # "the one that is not the jeans is"
    for word in ("jeans", "trousers", "socks", "grapes", "scissors", "headphones", "chopsticks"):
        assert not re.search(rf"\b(an?|some|is) {word}\b|\b{word} is\b", text), word
        assert re.search(rf"\b{word} are\b|are {word}\b", text)
    assert not re.search(r"[{}]|  | \.", text)


def test_the_lexicon_has_variety() -> None:
    assert Counter(GENDER.values()) == {"woman": 24, "man": 24}
    sizes = {name: [len(words) for words in raw(name)["words"].values()] for name in ("possession", "city", "use")}
    assert sizes == {"possession": [8] * 10, "city": [3] * 18, "use": [3] * 18}
    assert len(raw("adjective")["pairs"]) == 24
    series = raw("time")["series"]
    assert [one["words"] for one in series] == [*RINGS, [str(year) for year in range(1980, 2022)]]
    assert not any(name.endswith("s") for name in GENDER)  # "Mary's"


TINY: dict[str, Any] = {
    "people": {"words": {"woman": ["Ada", "Eve", "Ida"], "man": ["Bob", "Tom"]}},
    "possession": {"words": {"animal": ["a cat", "an ox", "a pig"], "fruit": ["a fig", "a kiwi"], "tree": ["an oak"]}},
    "adjective": {"pairs": [["good", "bad"], ["new", "used"]]},
    "time": {"series": [{"on": "on", "unit": "step", "suffix": "", "words": list("ABCDEF")}]},
}


@pytest.mark.parametrize("records", [2, 3])
def test_lines_are_counted_right(records: int) -> None:
    """Against a search through all records that there are, by the rules as they are told, and against many draws."""
    people, families = read_lexicon(TINY)
    counted = 0
    tasks = [
        t for t in possible_tasks(families) if t.family.name in ("possession", "adjective", "time") and t.order == "plain"
    ]
    for task in tasks:
        if shortage(task, people, records):
            continue
        sampler = Sampler(task, people, records, 0)
        lines = possible_lines(task, people, records)
        persons, items, more = set(), set(), 500
        for _ in range(3000):
            sampler.new_line(False)
            names, numbers, right = sampler.records()
            assert numbers[right] == sampler.item
            persons.add((right, *names))
            items.add((right, *numbers))
            more -= lines == (found := len(task.variants) * len(persons) * len(items) // records)
            if not more:  # all that were counted have come long since, and nothing else
                break
        assert lines == found, task.name
        counted += 1
    assert counted > 60


def test_lines_are_counted_right_by_hand() -> None:
    tasks = InContextTasks(["possession"], records=2, shots=0, scored=1, lexicon=TINY)
    two_kinds = 2 * (3 * 2 + 3 * 1 + 2 * 1)  # ordered pairs of things of two kinds
    names = len(list(permutations("abcde", 2)))
    assert tasks.lines("possession/person>thing/is/plain") == 2 * names * two_kinds * 2  # places, people, things, patterns
    assert tasks.lines("possession/gender>thing/is/plain") == 2 * (2 * 3 * 2) * two_kinds * 2


def test_half_of_all_lines_can_be_drawn_and_no_more() -> None:
    tasks = InContextTasks(["odd"], looked_up="difference", shots=1, scored=5, lexicon=TINY)
    name = "odd/difference>kind/is/plain"
    lines = 3 * (6 * 6 - 9 - 4 - 1) * 2
    assert tasks.lines(name) == lines == 132
    most = (lines // 2 - 1) // 5
    drawn = [line for context in tasks.sample(most, name) for line in context.text.split("\n")[1:-1]]
    assert len(set(drawn)) == len(drawn) == 5 * most
    with pytest.raises(HeadlabError, match=rf"132 different lines.*{most} contexts of 5 scored lines, not {most + 1}"):
        tasks.sample(most + 1, name)


def test_own_words_and_patterns(tmp_path: Any) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        """
[trade]
item = "job"
related = "field"
articles = true
[trade.words]
health = ["a nurse", "a surgeon", "a midwife"]
law = ["a judge", "an attorney", "a notary"]
food = ["a baker", "a cook", "a waiter"]
[[trade.patterns]]
plain = "{person} became {a}{job}."
swapped = "The {job} now: {person}."
job = ["became the {job}", "did not become the {job}"]
field = ["works in '{field}' today", "does not work in '{field}' today"]
[[trade.odd]]
plain = "Here {is} {a}{job}."
swapped = "The {job} {is} here."
job = ["is the {job}", "is not the {job}"]
field = ["works in '{field}'", "does not work in '{field}'"]
"""
    )
    tasks = InContextTasks("trade", lexicon=path)
    assert len(tasks.names) == 40
    answer, text = (context := tasks.sample(1, "trade/person>field/not/plain")[0]).answers[0], context.text
    assert text[slice(*answer.span)] == answer.text in ("health", "law", "food")
    assert text[slice(*answer.query)].endswith("does not work in '")
    assert text[answer.span[1] :].startswith("' today.\n")
    assert "odd/difference>field/is/plain" in InContextTasks(lexicon=path).names
    shipped, own = InContextTasks("city").sample(3), InContextTasks("city", lexicon=path).sample(3)
    assert shipped == own


def own(**tables: Any) -> dict[str, Any]:
    return tables


def patterns(**changed: Any) -> list[dict[str, Any]]:
    table = raw("city")["patterns"][0] | changed
    return [{key: value for key, value in table.items() if value is not None}]


def groups(**more: Any) -> dict[str, Any]:
    return {"words": {"Peru": ["Lima", "Cusco"], "Chile": ["Santiago"], "Cuba": ["Havana"], **more}}


@pytest.mark.parametrize(
    ("lexicon", "message"),
    [
        (own(city={"patterns": patterns(plain="{person}: {town}.")}), r"unknown placeholder \{town\}.*here: \{person\}"),
        (own(city={"patterns": patterns(plain="{person} lives here.")}), r"\{city\} must stand once .* not 0 times"),
        (own(city={"patterns": patterns(city=["in {city}", "{city}{city}"])}), r"\{city\} must stand once .* not 2 times"),
        (own(city={"patterns": patterns(plain="{person lives in {city}.")}), "not well formed"),
        (own(city={"patterns": patterns(swapped=None)}), "city.patterns: the pattern 'swapped' is missing"),
        (own(city={"patterns": patterns(country=None)}), "the pattern 'country' is missing"),
        (own(city={"patterns": patterns(city=["in {city}"])}), "two different clauses"),
        (own(city={"patterns": patterns() * 2}), "two patterns have the same 'plain' sentence"),
        (own(city={"patterns": []}), "patterns must be a list with something in it"),
        (own(city=groups(Spain=["Lima"])), "'Lima' has more than one country: 'Peru' and 'Spain'"),
        (own(city=groups(Spain=["Leon", "Leon"])), "'Leon' stands twice"),
        (own(city=groups(Spain=["Cuba"])), "'Cuba' is both a city and a country"),
        (own(city=groups(Spain=["Paul"])), "'Paul' is also the name of a person"),
        (own(city=groups(Spain=[])), "Spain must be a list with something in it"),
        (own(city=groups(Spain=[" Leon"])), "expected a word .* not ' Leon'"),
        (own(city={"words": {"Spain": ["Leon"]}}), "at least 2 groups of words are needed, not 1"),
        (own(city={"words": {"Spain": ["Leon"], "Peru": ["Lima", "Cusco"]}}), "3 records need 3 groups .*there are 2"),
        (own(city={"towns": 3}), "unknown key 'towns'"),
        (own(city=3), "must be a table, not int"),
        (own(city={**groups(), "pairs": [["a", "b"]]}), "expected one of words, pairs and series"),
        (own(city={"item": "thing", "patterns": patterns(), **groups()}), "city.patterns: unknown key 'city'"),
        (own(people={"words": {"woman": ["Ada"], "man": ["Bob"]}}), "3 records need 2 more names .* but there are 1"),
        (own(people={"words": {"woman": ["Ada", "Bob"], "man": ["Bob"]}}), "'Bob' stands twice, under 'woman' and 'man'"),
        (own(adjective={"pairs": [["good", "bad", "ugly"]]}), "a pair needs 2 words, not 3"),
        (own(adjective={"pairs": [["good", "bad"], ["good", "evil"]]}), "has more than one opposite: 'bad' and 'evil'"),
        (own(time={"series": [{"words": ["a", "b", "c"]}]}), "at least 4 words, not 3"),
        (own(time={"series": [{"words": list("abca")}]}), "'a' stands twice in a series"),
        (own(time={"series": [{"words": list("abcdef")}]}), r"unknown placeholder \{on\}"),
        (own(time={"series": [{"on": "x", "words": list("abcd")}, {"words": list("efgh")}]}), "the same placeholders"),
        (own(odd=raw("city")), "cannot be called 'odd'"),
        (own(town=raw("city")), "both call something 'city'"),
    ],
)  # fmt: skip
def test_bad_lexicons(lexicon: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadlabError, match=message) as caught:
        InContextTasks(lexicon=lexicon)
    assert "\n" not in str(caught.value)


def test_unreadable_lexicons(tmp_path: Any) -> None:
    (tmp_path / "bad.toml").write_text("x = [")
    for name in ("none.toml", "bad.toml"):
        with pytest.raises(HeadlabError, match=f"cannot read the lexicon .*{name}"):
            InContextTasks(lexicon=tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"records": 1}, "records must be a whole number of at least 2, not 1"),
        ({"records": 2}, "odd one out needs at least 3 records, not 2"),
        ({"records": 8}, "8 records need 8 words of time, but there are 7"),
        ({"records": 19, "relations": "city"}, "19 records need 19 groups .* but there are 18"),
        ({"records": 26, "relations": "possession", "looked_up": "kind", "negation": "not", "reported": "person"}, None),
        (
            {"records": 50, "relations": "possession", "looked_up": "kind", "negation": "not"},
            "49 more names .* there are 47",
        ),
        ({"records": 26, "relations": "adjective", "looked_up": "gender"}, "25 more names .* there are 24"),
        ({"shots": -1}, "shots must be a whole number of at least 0, not -1"),
        ({"scored": 0}, "scored must be a whole number of at least 1, not 0"),
        ({"scored": 2.5}, "scored must be a whole number"),
        ({"relations": "size"}, "no task has the relation 'size'; possible here: possession, city, use"),
        ({"relations": "city", "looked_up": "kind"}, "looked_up 'kind'; possible here: person, gender, city, country"),
        ({"negation": "no"}, "possible here: is, not"),
        ({"order": []}, "an empty list for the order leaves no tasks"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str | None) -> None:
    if message is None:
        context = InContextTasks(**options).sample(1)[0]
        check(context, 2, 6, options["records"])
        return
    with pytest.raises(HeadlabError, match=message):
        InContextTasks(**options)


def test_bad_samples(tasks: InContextTasks) -> None:
    with pytest.raises(HeadlabError, match="unknown task 'city'; `names` lists all 286, such as possession/"):
        tasks.sample(1, "city")
    with pytest.raises(HeadlabError, match="n must be a whole number of at least 1, not 0"):
        tasks.sample(0)


def test_the_docstring_shows_a_drawn_context() -> None:
    ran = doctest.testmod(language)
    assert ran.attempted == 2
    assert ran.failed == 0
