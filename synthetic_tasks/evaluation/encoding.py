"""Contexts as tokens: where answers, and all that they follow from, stand among a model's tokens."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headlab.data.batches import IGNORED, data_fingerprint
from headlab.errors import HeadlabError
from headlab.models.access import bare_model
from headlab.models.access import tokenizer as tokenizer_of

from ..language.contexts import Answer, Context, Span

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedAnswer:
    """Where an answer and what it follows from stand: tokens, from the first to the one after the last.

    Attributes:
        span: of the answer, from the white space before it on where that has tokens of its own; at least one token stands
            before it.
        lead: how many tokens of white space it begins with.
        choices: the tokens of every choice, as they would be instead of the answer.
        query, record, matched, reported: the tokens that share a character with these parts of the text.
    """

    span: Span
    lead: int
    choices: tuple[Ids, ...]
    query: Span
    record: Span | None = None
    matched: Span | None = None
    reported: Span | None = None

    @property
    def length(self) -> int:
        return self.span[1] - self.span[0]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A context's tokens, with what the tokenizer adds by itself (a first token, say), and its answers among them."""

    ids: Ids
    answers: tuple[EncodedAnswer, ...]


def encode(contexts: Iterable[Context], tokenizer: Any) -> list[Encoded]:
    """Tokens of contexts, and where everything stands among them.

    An answer's tokens hold it and nothing else, but for the white space before it on its line. Choices are tokenized between
    the word before the answer and the character after it; where that gives the answer itself other tokens than it has in the
    text, in the whole text instead.

    Args:
        contexts: at least one, each with answers.
        tokenizer: a fast one of transformers, which knows the characters of every token.

    Raises:
        HeadlabError: no contexts, or one without answers; a span that does not hold its answer; an answer that is not among
            its choices; a tokenizer that knows no characters, joins part of an answer with what is beside it, leaves nothing
            before the first answer, or gives two choices the same tokens.
    """
    contexts = list(contexts)
    if not contexts:
        raise HeadlabError("there are no contexts: expected at least one")
    if not getattr(tokenizer, "is_fast", False):
        raise HeadlabError(
            f"{type(tokenizer).__name__} has no offsets (which characters its tokens stand for): use a fast tokenizer"
        )
    for number, context in enumerate(contexts):
        _check(context, number)
    choices = _Choices(tokenizer)
    encoded = []
    for number, (context, text) in enumerate(zip(contexts, _tokenize(tokenizer, contexts), strict=True)):
        answers = tuple(_encode(answer, text, choices, f"context {number}") for answer in context.answers)
        encoded.append(Encoded(text.ids, answers))
    return encoded


def _check(context: Context, number: int) -> None:
    if not context.answers:
        raise HeadlabError(f"context {number} (task {context.task!r}) has no answers to score")
    for answer in context.answers:
        (begin, end), found = answer.span, context.text[slice(*answer.span)]
        if not answer.text.strip() or found != answer.text:
            raise HeadlabError(
                f"context {number} has {found!r} at characters {begin} to {end}, not the answer {answer.text!r}"
            )
        if answer.text not in answer.choices:
            raise HeadlabError(
                f"context {number}: the answer {answer.text!r} is not among its {len(answer.choices)} choices"
            )


@dataclass(frozen=True, slots=True)
class _Text:
    """A text and its tokens; `positions` are those that stand for characters, from `starts` to `ends`."""

    text: str
    ids: Ids
    positions: list[int]
    starts: list[int]
    ends: list[int]

    def overlapping(self, span: Span) -> Span:
        """The tokens that share a character with a span."""
        first, end = bisect_right(self.ends, span[0]), bisect_left(self.starts, span[1])
        if first >= end:
            at = self.positions[first] if first < len(self.positions) else len(self.ids)
            return at, at
        return self.positions[first], self.positions[end - 1] + 1

    def holding(self, span: Span, what: str) -> tuple[Span, int]:
        """The tokens of an answer: those that hold it and nothing else, after those of white space only that lead up to it
        on its line. And how many are the latter: a tokenizer may have a space apart before a digit and not before a letter,
        so that a model begins to answer with it."""
        first, end = bisect_right(self.ends, span[0]), bisect_left(self.starts, span[1])
        if first >= end:
            raise HeadlabError(f"{what} (characters {span[0]} to {span[1]}) is in no token")
        for i in (first, end - 1):
            begin, stop = self.starts[i], self.ends[i]
            if self.text[begin : span[0]].strip() or stop > span[1]:
                raise HeadlabError(
                    f"{what} (characters {span[0]} to {span[1]}) cannot be told from what is beside it: the token "
                    f"{self.text[begin:stop]!r} (characters {begin} to {stop}) holds part of both; use another tokenizer"
                )
        after = first  # the token before this one is of something else
        while after > 0 and _SPACE.fullmatch(self.text, self.starts[after - 1], self.ends[after - 1]):
            after -= 1
        start = self.positions[after - 1] + 1 if after else self.positions[0]
        return (start, self.positions[end - 1] + 1), self.positions[first] - start


def _tokenize(tokenizer: Any, given: Sequence[Context | str], special: bool = True) -> list[_Text]:
    texts = [item if isinstance(item, str) else item.text for item in given]
    found = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=special, verbose=False)
    tokenized = []
    for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
        # what the tokenizer adds, and parts of a word that it keeps apart from their characters, have no width
        real = [(position, *offset) for position, offset in enumerate(offsets) if offset[0] < offset[1]]
        positions, starts, ends = (list(column) for column in zip(*real, strict=True)) if real else ([], [], [])
        tokenized.append(_Text(text, tuple(ids), positions, starts, ends))
    return tokenized


def _encode(answer: Answer, text: _Text, choices: _Choices, where: str) -> EncodedAnswer:
    span, lead = text.holding(answer.span, f"{where}: the answer {answer.text!r}")
    if span[0] == 0:
        raise HeadlabError(f"{where}: nothing stands before the answer {answer.text!r} that a model could tell it from")
    parts = {
        name: None if (part := getattr(answer, name)) is None else text.overlapping(part)
        for name in ("record", "matched", "reported")
    }
    tokens = choices.tokens(answer, text, text.ids[slice(*span)], where)
    return EncodedAnswer(span, lead, tokens, text.overlapping(answer.query), **parts)


class _Choices:
    """The tokens of choices, remembered by what stands around them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[tuple[str, str, tuple[str, ...]], tuple[Ids, ...]] = {}

    def tokens(self, answer: Answer, text: _Text, gold: Ids, where: str) -> tuple[Ids, ...]:
        begin, end = answer.span
        before = _LAST_WORD.search(text.text, 0, begin)[0]  # type: ignore[index]  # it matches the empty string
        after = _NEXT.match(text.text, end)[0]  # type: ignore[index]
        key = (before, after, answer.choices)
        if key not in self.known:
            self.known[key] = self._between(before, after, answer.choices, where, special=False)
        found, at = self.known[key], answer.choices.index(answer.text)
        if found[at] != gold:
            found = self._between(text.text[:begin], text.text[end:], answer.choices, where, special=True)
        if len(set(found)) < len(found):
            twice = next(ids for ids in found if found.count(ids) > 1)
            names = [repr(choice) for choice, ids in zip(answer.choices, found, strict=True) if ids == twice]
            raise HeadlabError(f"{where}: the tokenizer gives the choices {' and '.join(names)} the same tokens")
        return found

    def _between(self, before: str, after: str, choices: tuple[str, ...], where: str, special: bool) -> tuple[Ids, ...]:
        tokenized = _tokenize(self.tokenizer, [before + choice + after for choice in choices], special)
        spans = [(len(before), len(before) + len(choice)) for choice in choices]
        found = zip(tokenized, spans, choices, strict=True)
        return tuple(
            text.ids[slice(*text.holding(span, f"{where}: the choice {choice!r}")[0])] for text, span, choice in found
        )


_LAST_WORD = re.compile(r"\S*\s*\Z")
_NEXT = re.compile(r"\s*\S?")
_SPACE = re.compile(r"[^\S\n]+")


def pad_token(tokenizer: Any) -> int:
    """A token to pad with; which one matters to no result, for padding is masked."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in found if token is not None)


def pad(encoded: Sequence[Encoded], padding: int) -> dict[str, Tensor]:
    """One batch, padded on the right: `input_ids`, `attention_mask` and `labels` (the answers' tokens), [batch, pos]."""
    longest = max(len(context.ids) for context in encoded)
    ids = torch.full((len(encoded), longest), padding)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, context in enumerate(encoded):
        ids[row, : len(context.ids)] = torch.tensor(context.ids)
        mask[row, : len(context.ids)] = 1
        for answer in context.answers:
            labels[row, slice(*answer.span)] = ids[row, slice(*answer.span)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def answer_batches(contexts: Iterable[Context], tokenizer: Any, batch_size: int = 8) -> list[dict[str, Tensor]]:
    """Batches in the order of the contexts whose loss is that of the answers alone, for `hl.importance`, `hl.ablation` ...

    Returns:
        Dicts of `input_ids`, `attention_mask` and `labels`, [batch, pos]; labels are ignored outside the answers.

    Raises:
        HeadlabError: as `encode`.

    >>> scores = hl.importance(model, answer_batches(contexts, tokenizer))  # doctest: +SKIP
    """
    check_size(batch_size)
    encoded = encode(contexts, tokenizer)
    padding = pad_token(tokenizer)
    return [pad(encoded[i : i + batch_size], padding) for i in range(0, len(encoded), batch_size)]


def check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise HeadlabError(f"batch_size must be at least 1, not {batch_size}")


# --- what goes into a model


def prepare(model: nn.Module, contexts: Sequence[Context], tokenizer: Any) -> tuple[list[Encoded], int]:
    """The contexts' tokens, checked against the model, and a token to pad with."""
    root = bare_model(model)
    name, config = type(root).__name__, getattr(root, "config", None)
    if not name.endswith(("ForCausalLM", "LMHeadModel")) or getattr(config, "is_encoder_decoder", False):
        raise HeadlabError(f"{name} is no causal language model: these contexts are for models that predict the next token")
    if not contexts:
        raise HeadlabError("there are no contexts: expected at least one")
    if tokenizer is None and (tokenizer := tokenizer_of(model)) is None:
        raise HeadlabError("no tokenizer lies beside the model: give tokenizer=")
    encoded = encode(contexts, tokenizer)
    text = root.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    for number, context in enumerate(encoded):
        if longest is not None and len(context.ids) > longest:
            raise HeadlabError(f"context {number} has {len(context.ids)} tokens, but the model takes {longest} at most")
        if (largest := max(context.ids)) >= text.vocab_size:
            raise HeadlabError(
                f"context {number} has the token {largest}, but the model knows {text.vocab_size}: is it its tokenizer?"
            )
    return encoded, pad_token(tokenizer)


def describe_contexts(encoded: Sequence[Encoded]) -> dict[str, Any]:
    """What the record says about the data: the same whatever the batches are."""
    answers = [answer for context in encoded for answer in context.answers]
    choices = [torch.tensor([*tokens, -1]) for answer in answers for tokens in answer.choices]
    batches = [pad([context], 0) for context in encoded]
    return {
        "fingerprint": data_fingerprint([*batches, {"choices": torch.cat(choices)}]),
        "examples": len(encoded),
        "answers": len(answers),
        "tokens": sum(len(context.ids) for context in encoded),
    }


def plan(encoded: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Which contexts go through the model together: such of like length, the longest first."""
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].ids), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def inputs(model: nn.Module, batch: Sequence[Encoded], padding: int) -> dict[str, Tensor]:
    device = bare_model(model).device
    return {name: value.to(device) for name, value in pad(batch, padding).items() if name != "labels"}
