"""A small made-up language, its translation into another one, and questions about its sentences.

In the target language verbs go last, adjectives behind their nouns, a subordinate clause first; adjectives, cases and verbs
agree with the gender that the *target* noun has in the lexicon; the tense stands in one adverb at either end of the
sentence and marks every verb; pronouns take the gender of what they stand for; some nouns mean another thing beside
another verb. Two domains share verbs and grammar and differ in nouns, adjectives and constructions.

    when1 many a16 a15 n26 not v19 the a6 n22 and they v9 many n46
    N10 PL A15 AGREE2 A26 AGREE2 N49 A26 AGREE2 OBJ2 NO V14 T1 SUBJ2PL J0 PRO2 N76 PL OBJ2 V28 T1 SUBJ2PL
"""

from __future__ import annotations

import random
from dataclasses import dataclass

DOMAINS = ("tales", "reports")
LABELS = ("follows", "contradicts", "neither")
PAD, END, START, BETWEEN, MASK = "<pad>", "</s>", "<s>", "|", "<mask>"
Words = list[str]


@dataclass(frozen=True)
class NounPhrase:
    noun: int
    many: bool = False
    adjectives: tuple[int, ...] = ()
    pronoun: bool = False  # said as "it" or "they"; the noun is what it stands for


@dataclass(frozen=True)
class Clause:
    """Who does what to whom."""

    subject: NounPhrase
    verb: int
    object: NounPhrase
    place: NounPhrase | None = None
    negated: bool = False


@dataclass(frozen=True)
class Sentence:
    tense: int
    first: Clause
    joint: int | None = None  # the conjunction before the second clause
    second: Clause | None = None
    tense_last: bool = False


class Language:
    """The lexicon, the same for everybody: what words there are, what they mean, and of which gender that is."""

    NOUNS, VERBS, ADJECTIVES, GENDERS, TENSES, DOUBLE = 80, 40, 40, 3, 3, 10
    JOINTS = ("and", "because", "although")  # from the second on, the clause behind it comes first in the translation

    def __init__(self) -> None:
        draw = random.Random(20190525)
        self.gender = [draw.randrange(self.GENDERS) for _ in range(self.NOUNS + self.DOUBLE)]
        self.meaning = draw.sample(range(self.NOUNS), self.NOUNS)  # of a noun: another number in the target language
        self.double = {noun: self.NOUNS + i for i, noun in enumerate(draw.sample(range(self.NOUNS), self.DOUBLE))}
        self.odd_verbs = set(draw.sample(range(self.VERBS), self.VERBS // 2))  # beside which those have their other meaning
        self.verb_meaning = draw.sample(range(self.VERBS), self.VERBS)
        self.adjective_meaning = draw.sample(range(self.ADJECTIVES), self.ADJECTIVES)
        small = ["the", "many", "it", "they", "not", "near", *self.JOINTS, *(f"when{i}" for i in range(self.TENSES))]
        here = [f"{kind}{i}" for kind, n in (("n", self.NOUNS), ("v", self.VERBS), ("a", self.ADJECTIVES)) for i in range(n)]
        genders = range(self.GENDERS)
        there = [f"N{i}" for i in range(self.NOUNS + self.DOUBLE)] + [f"V{i}" for i in range(self.VERBS)]
        there += [f"A{i}" for i in range(self.ADJECTIVES)] + [f"T{i}" for i in range(self.TENSES)] + ["NO", "PL"]
        there += [f"{what}{g}" for what in ("AGREE", "OBJ", "AT", "PRO") for g in genders]
        there += [f"SUBJ{g}{n}" for g in genders for n in ("", "PL")] + [f"J{i}" for i in range(len(self.JOINTS))]
        self.words = [PAD, END, START, BETWEEN, MASK, *small, *here, *there]
        self.number = {word: i for i, word in enumerate(self.words)}

    # --- drawing

    def draw(self, rng: random.Random, domain: str) -> Sentence:
        reports = domain == "reports"
        first = self._clause(rng, domain, None)
        joint = rng.randrange(len(self.JOINTS)) if rng.random() < (0.7 if reports else 0.4) else None
        second = None if joint is None else self._clause(rng, domain, first.subject)
        return Sentence(rng.randrange(self.TENSES), first, joint, second, rng.random() < (0.7 if reports else 0.3))

    def _clause(self, rng: random.Random, domain: str, before: NounPhrase | None) -> Clause:
        subject = self._noun_phrase(rng, domain)
        if before is not None and rng.random() < 0.6:
            subject = NounPhrase(before.noun, before.many, pronoun=True)
        place = self._noun_phrase(rng, domain) if rng.random() < (0.5 if domain == "reports" else 0.25) else None
        return Clause(subject, rng.randrange(self.VERBS), self._noun_phrase(rng, domain), place, rng.random() < 0.25)

    def _noun_phrase(self, rng: random.Random, domain: str) -> NounPhrase:
        low, high = self._range(self.NOUNS, domain)
        first, last = self._range(self.ADJECTIVES, domain)
        n = rng.choices((0, 1, 2), (4, 4, 2) if domain == "tales" else (6, 3, 1))[0]
        return NounPhrase(rng.randrange(low, high), rng.random() < 0.35, tuple(rng.sample(range(first, last), n)))

    @staticmethod
    def _range(n: int, domain: str) -> tuple[int, int]:
        """Which of n words a domain uses, from one number up to another; a fifth is common to both."""
        return (0, round(0.6 * n)) if domain == "tales" else (round(0.4 * n), n)

    # --- the source language

    def say(self, sentence: Sentence) -> Words:
        words = self._say(sentence.first)
        if sentence.second is not None and sentence.joint is not None:
            words += [self.JOINTS[sentence.joint], *self._say(sentence.second)]
        tense = [f"when{sentence.tense}"]
        return words + tense if sentence.tense_last else tense + words

    def _say(self, clause: Clause) -> Words:
        place = ["near", *self._say_noun(clause.place)] if clause.place else []
        verb = ["not"] * clause.negated + [f"v{clause.verb}"]
        return [*self._say_noun(clause.subject), *verb, *self._say_noun(clause.object), *place]

    @staticmethod
    def _say_noun(phrase: NounPhrase) -> Words:
        if phrase.pronoun:
            return ["they" if phrase.many else "it"]
        return ["many" if phrase.many else "the", *(f"a{i}" for i in phrase.adjectives), f"n{phrase.noun}"]

    # --- the target language

    def translate(self, sentence: Sentence) -> Words:
        first = self._clause_there(sentence.first, sentence.first.verb, sentence.tense)
        if sentence.second is None or sentence.joint is None:
            return first
        second = self._clause_there(sentence.second, sentence.first.verb, sentence.tense)
        joint = [f"J{sentence.joint}"]
        return first + joint + second if sentence.joint == 0 else second + joint + first

    def _clause_there(self, clause: Clause, verb_of_subject: int, tense: int) -> Words:
        """Place, subject, object, negation, verb with tense and subject; each noun before its adjectives, cases last."""
        place = self._noun_there(clause.place, clause.verb, "AT") if clause.place else []
        if clause.subject.pronoun:  # stands for the subject of the first clause, as it was meant there
            gender = self.gender[self._meant(clause.subject.noun, verb_of_subject)]
            subject = [f"PRO{gender}"]
        else:
            gender = self.gender[self._meant(clause.subject.noun, clause.verb)]
            subject = self._noun_there(clause.subject, clause.verb, "")
        verb = ["NO"] * clause.negated + [f"V{self.verb_meaning[clause.verb]}", f"T{tense}"]
        verb.append(f"SUBJ{gender}{'PL' if clause.subject.many else ''}")
        return place + subject + self._noun_there(clause.object, clause.verb, "OBJ") + verb

    def _noun_there(self, phrase: NounPhrase, verb: int, case: str) -> Words:
        meant = self._meant(phrase.noun, verb)
        gender = self.gender[meant]
        words = [f"N{meant}"] + ["PL"] * phrase.many
        for adjective in reversed(phrase.adjectives):
            words += [f"A{self.adjective_meaning[adjective]}", f"AGREE{gender}"]
        return words + ([f"{case}{gender}"] if case else [])

    def _meant(self, noun: int, verb: int) -> int:
        return self.double[noun] if noun in self.double and verb in self.odd_verbs else self.meaning[noun]

    # --- a question about a sentence

    def claim(self, rng: random.Random, sentence: Sentence, domain: str) -> tuple[Words, int]:
        """A simpler sentence about one clause of another one, and whether it follows from it (`LABELS`)."""
        clauses = [clause for clause in (sentence.first, sentence.second) if clause is not None]
        clause, label = rng.choice(clauses), rng.randrange(len(LABELS))
        subject, object_, verb, tense = clause.subject, clause.object, clause.verb, sentence.tense
        negated = clause.negated
        if LABELS[label] == "contradicts":
            negated = not negated
        elif LABELS[label] == "neither":
            low, high = self._range(self.NOUNS, domain)
            other = NounPhrase(
                rng.choice([n for n in range(low, high) if n not in (subject.noun, object_.noun)]), object_.many
            )
            what = rng.randrange(5)
            if what == 0:
                subject = other
            elif what == 1:
                object_ = other
            elif what == 2:
                verb = rng.choice([v for v in range(self.VERBS) if v not in {c.verb for c in clauses}])
            elif what == 3 and subject.noun != object_.noun:
                subject, object_ = object_, subject
            elif what == 3:  # the same noun twice: turned round, it might still follow
                object_ = other
            else:
                tense = (tense + rng.randrange(1, self.TENSES)) % self.TENSES
        bare = [NounPhrase(phrase.noun, phrase.many) for phrase in (subject, object_)]
        return self.say(Sentence(tense, Clause(bare[0], verb, bare[1], None, negated))), label
