"""The question of `CrossComposition` in English: records to look up by one thing and to report another of, in context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headlab.errors import HeadlabError

from .contexts import Answer, Context, Span
from .sampling import Sampler, possible_lines, shortage
from .templates import Sentences, Task, compile_task, possible_tasks
from .words import read_lexicon

FACTORS = ("relation", "looked_up", "reported", "negation", "order")
TRIES = 10_000  # to find a line that was not there yet


class InContextTasks:
    """Texts of solved examples and scored ones, for pretrained models; what is looked up is crossed with what is reported.

    Every line states some records and asks for one. The task
    "possession/person>kind/is/plain" (look the person up, report the kind), two examples before one scored line:

    >>> tasks = InContextTasks(shots=2, scored=1)
    >>> print(tasks.sample(1, "possession/person>kind/is/plain")[0].text)
    Walter has some wine. Anna has grapes. Alice has an accordion. Walter has a kind of drink.
    Victor has a couch. Oliver has a plum. Nancy has trousers. Nancy has a kind of clothing.
    Adam has a taxi. Brian has a bomb. Sophie has a plum. Adam has a kind of vehicle.
    <BLANKLINE>

    `names` lists the tasks as `relation/looked_up>reported/negation/order`:

    - relation: possession (a person's thing and its kind), city (and country), use (a tool's), adjective (and opposite),
      time (and the one before or after: hours, days, months, years), and odd (which of several words is not like the
      others, with no people; looked up by the "difference", or as what is not the word or not related to it).
    - looked up, reported: the person or their gender; the item or what it is related to.
    - negation: "is", or "not": the record that does *not* have what is looked up; the others share it.
    - order: "plain" (the person first), or "swapped".

    Difficulty is the number of relations away from copying: one more if something related is looked up (a kind, a
    gender) and one more if something related is reported. Negation and order do not count.

    Args:
        relations, looked_up, reported, negation, order: keep only the tasks with this value, or one of these.
        shots: solved examples before the scored ones, on their own lines; 0 or more.
        scored: scored lines in every context.
        records: facts on every line; at least 2, for the odd one out at least 3.
        lexicon: your own words and sentence patterns, as a TOML file or a mapping of its form; see
            `synthetic_tasks.language.words.read_lexicon`.
        seed: what contexts are drawn by, together with the task's name.

    Raises:
        HeadlabError: no task is left, too many records for the words, or a lexicon that does not hold what it should.
    """

    def __init__(
        self,
        relations: str | Iterable[str] | None = None,
        looked_up: str | Iterable[str] | None = None,
        reported: str | Iterable[str] | None = None,
        negation: str | Iterable[str] | None = None,
        order: str | Iterable[str] | None = None,
        *,
        shots: int = 2,
        scored: int = 6,
        records: int = 3,
        lexicon: str | Path | Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("shots", shots, 0), ("scored", scored, 1), ("records", records, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise HeadlabError(f"{name} must be a whole number of at least {least}, not {value!r}")
        self.shots, self.scored, self.records, self.seed = shots, scored, records, seed
        self.people, families = read_lexicon(lexicon)
        filters = dict(zip(FACTORS, (relations, looked_up, reported, negation, order), strict=True))
        self._tasks = {task.name: task for task in _filtered(possible_tasks(families), filters)}
        for task in self._tasks.values():
            if lack := shortage(task, self.people, records):
                raise HeadlabError(f"{task.name}: {lack}")
        self._compiled: dict[str, tuple[Sentences, ...]] = {}

    @property
    def names(self) -> list[str]:
        """Every task."""
        return list(self._tasks)

    def lines(self, task: str) -> int:
        """How many different lines a task has."""
        return possible_lines(self._task(task), self.people, self.records)

    def sample(self, n: int, task: str | None = None) -> list[Context]:
        """Sampler `n` contexts of a task, or of every task in turn.

        No scored line of a task occurs twice. Over them, all answers are as frequent as each other (kinds and genders
        where those are reported), and so are the positions of the right record, as far as the counts allow. The same seed
        gives the same contexts; the first of a longer sample are those of a shorter one.

        Raises:
            HeadlabError: an unknown task, or more contexts than its words allow.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise HeadlabError(f"n must be a whole number of at least 1, not {n!r}")
        if task is None:
            return [context for name in self._tasks for context in self.sample(n, name)]
        found = self._task(task)
        lines = self.lines(task)
        if n * self.scored + self.shots > lines // 2:  # beyond, drawing would be neither quick nor balanced
            most = max(0, (lines // 2 - self.shots) // self.scored)
            raise HeadlabError(
                f"{task} has {lines:,} different lines, and at most half of them are drawn: that is {most:,} contexts of "
                f"{self.scored} scored lines, not {n:,}; give more words (lexicon), or ask for fewer"
            )
        if task not in self._compiled:
            self._compiled[task] = tuple(compile_task(found, self.people, v) for v in range(len(found.variants)))
        return _sample(
            found, self._compiled[task], Sampler(found, self.people, self.records, self.seed), n, self.shots, self.scored
        )

    def _task(self, name: str) -> Task:
        if name not in self._tasks:
            some = ", ".join(list(self._tasks)[:3])
            raise HeadlabError(f"unknown task {name!r}; `names` lists all {len(self._tasks)}, such as {some}")
        return self._tasks[name]


def _filtered(tasks: list[Task], filters: Mapping[str, str | Iterable[str] | None]) -> list[Task]:
    for factor, given in filters.items():
        if given is None:
            continue
        wanted = [given] if isinstance(given, str) else list(given)
        known = dict.fromkeys(task.factors[factor] for task in tasks)
        if not wanted:
            raise HeadlabError(f"an empty list for the {factor} leaves no tasks; possible here: {', '.join(known)}")
        for value in wanted:
            if value not in known:
                raise HeadlabError(f"no task has the {factor} {value!r}; possible here: {', '.join(known)}")
        tasks = [task for task in tasks if task.factors[factor] in wanted]
    return tasks


def _sample(task: Task, compiled: Sequence[Sentences], sampler: Sampler, n: int, shots: int, scored: int) -> list[Context]:
    factors, name, difficulty = task.factors, task.name, task.difficulty
    by_person, tells_person, negated = task.by_person, task.tells_person, task.negated
    seen: set[str] = set()
    contexts = []
    for _ in range(n):
        sentences = compiled[sampler.variant()]
        facts, heads, words = sentences.facts, sentences.heads, sentences.words
        lines: list[str] = []
        answers = []
        start = 0
        for number in range(shots + scored):
            sampler.new_line(number < shots)
            for attempt in range(TRIES):
                people, items, right = sampler.records(attempt)
                looked: list[Any] = people if by_person else items
                told: list[Any] = people if tells_person else items
                key = told[right]
                # with "not", what is looked up is what all the other records share
                head = heads[looked[1 if negated and right == 0 else 0 if negated else right]]
                stated = [facts[item][0] + person + facts[item][1] for person, item in zip(people, items, strict=True)]
                query = f"{head}{sentences.before[key]}"
                line = f"{' '.join(stated)} {query}{words[key]}{sentences.after[key]}"
                if line not in lines and (number < shots or line not in seen):
                    break
            else:
                raise HeadlabError(f"{name}: found no new line in {TRIES:,} tries after {len(seen):,}: give more words")
            lines.append(line)
            if number >= shots:
                seen.add(line)
                choices = tuple(dict.fromkeys([words[one] for one in told]))
                record, person, item = _places(sentences, start, stated, right, people[right], items[right])
                at = start + sum(map(len, stated)) + len(stated)
                end = at + len(query)
                answers.append(
                    Answer(
                        words[key],
                        (end, end + len(words[key])),
                        choices,
                        (at, at + len(query.rstrip())),
                        record,
                        person if by_person else item,
                        person if tells_person else item,
                    )
                )
            start += len(line) + 1
        contexts.append(Context(name, "\n".join(lines) + "\n", tuple(answers), factors, difficulty))
    return contexts


def _places(
    sentences: Sentences, start: int, stated: list[str], right: int, name: str, item: int
) -> tuple[Span, Span, Span]:
    """The right record, its person and its item, on a line that begins at `start`."""
    record = start + sum(map(len, stated[:right])) + right
    first, _, at, before_person = sentences.facts[item]
    person = record + len(first)
    at += record if before_person else person + len(name)
    return (record, record + len(stated[right])), (person, person + len(name)), (at, at + sentences.lengths[item])
