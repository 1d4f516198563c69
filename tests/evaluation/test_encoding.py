"""Contexts as tokens, for tokenizers that keep, cut or lead with white space, against tokenizing prefixes of the text."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import headlab as hl
from headlab.data.batches import IGNORED
from headlab.errors import HeadlabError
from synthetic_tasks import Answer, Context
from synthetic_tasks.evaluation.encoding import answer_batches, encode, pad, pad_token
from tests.helpers import zoo

PEOPLE = ("Ann", "Bob", "Zoë", "Lisa")
THINGS = ("tea", "figs", "a fox", "coffee", "çay", "teapot")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def make_context(seed: int, n_lines: int = 2, choices=THINGS) -> Context:
    """Lines `Ann has tea. Bob has figs. >. Ann has tea`, the first of them solved."""
    draw = random.Random(seed)
    text, answers = "", []
    for i in range(n_lines):
        people, things = draw.sample(PEOPLE, 2), draw.sample(choices, 2)
        which = draw.randrange(2)
        start = len(text)
        facts = [f"{person} has {thing}" for person, thing in zip(people, things, strict=True)]
        text += ". ".join(facts) + ". >. "
        record = (start + which * len(facts[0] + ". "), start + which * len(facts[0] + ". ") + len(facts[which]))
        query = (len(text), len(text) + len(f"{people[which]} has"))
        text += f"{people[which]} has "
        span = (len(text), len(text) + len(things[which]))
        text += things[which] + "\n"
        matched = (record[0], record[0] + len(people[which]))
        reported = (record[1] - len(things[which]), record[1])
        if i:
            answers.append(Answer(things[which], span, choices, query, record, matched, reported))
    factors = {"relation": draw.choice(["own", "like"]), "order": "plain"}
    return Context(f"t{seed % 3}", text.rstrip("\n"), tuple(answers), factors, 0)


def make_tokenizer(kind: str, bos: bool = False, padding: bool = True, things=THINGS) -> PreTrainedTokenizerFast:
    """A small subword tokenizer whose tokens hold the space before a word (`bytes`, `sentence`), show it outside their
    characters (`trimmed`) or have it apart (`split`)."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind in ("bytes", "trimmed"):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    elif kind == "sentence":
        lines, spaces = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")
        made.pre_tokenizer = pre_tokenizers.Sequence([lines, spaces])
    else:
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=zoo.VOCAB, special_tokens=SPECIAL, show_progress=False)
    words = [make_context(i, 5, things[:4]).text for i in range(30)] + [" ".join((*PEOPLE, *things)) + "\n"]
    made.train_from_iterator(words, trainer)
    if kind == "trimmed":
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if padding else {})
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


KINDS = ["bytes", "trimmed", "sentence", "split"]
TOKENIZERS = {(kind, bos): make_tokenizer(kind, bos) for kind in KINDS for bos in (False, True)}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6))
def test_answers_are_where_prefixes_of_the_text_say(kind, bos, seed):
    tokenizer, context = TOKENIZERS[kind, bos], make_context(seed, 4)
    (encoded,) = encode([context], tokenizer)
    assert list(encoded.ids) == tokenizer(context.text)["input_ids"]
    first = int(bos)
    for answer, found in zip(context.answers, encoded.answers, strict=True):
        before = context.text[: answer.span[0]]
        start = first + len(tokenizer(before.rstrip(), add_special_tokens=False)["input_ids"])  # the space goes with it
        end = first + len(tokenizer(context.text[: answer.span[1]], add_special_tokens=False)["input_ids"])
        assert found.span == (start, end)
        assert found.lead == (kind == "split")
        assert found.choices[THINGS.index(answer.text)] == encoded.ids[start:end]
        for choice, tokens in zip(THINGS, found.choices, strict=True):
            whole = tokenizer(before + choice + context.text[answer.span[1] :])["input_ids"]
            assert tuple(whole[start : start + len(tokens)]) == tokens  # the tokens before it are the same
            rest = len(encoded.ids) - end
            assert len(whole) == start + len(tokens) + rest
        offsets = tokenizer(context.text, return_offsets_mapping=True)["offset_mapping"]
        for name in ("query", "record", "matched", "reported"):
            part = set(range(*getattr(answer, name)))
            assert list(range(*getattr(found, name))) == [i for i, token in enumerate(offsets) if part & set(range(*token))]


def test_some_answers_have_several_tokens_and_some_one():
    for kind in KINDS:
        lengths = [
            a.length for e in encode([make_context(i, 4) for i in range(20)], TOKENIZERS[kind, False]) for a in e.answers
        ]
        assert min(lengths) == 1 + (kind == "split") < max(lengths)


def words(text, answer, choices=None, **spans):
    at = text.rindex(answer)
    return Context("t", text, (Answer(answer, (at, at + len(answer)), choices or (answer,), (0, max(0, at - 1)), **spans),))


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words between spaces, whatever they are made of."""
    made = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["?", "has", "tea", "tea!", "(tea", "Ann", "to\nfu"])}, "?")
    )
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (words("Ann has tea!", "tea"), "answer 'tea' .characters 8 to 11. cannot .* token 'tea!' .characters 8 to 12."),
        (words("Ann has (tea", "tea"), "answer 'tea' .characters 9 to 12. cannot .* token '\\(tea' .characters 8 to 12."),
        (words("Ann has tea\n", "tea"), "cannot be told"),
        (words("tea has", "tea"), "nothing stands before the answer 'tea'"),
        (words("Ann has tea", "tea", ("figs", "fox")), "'tea' is not among its 2 choices"),
        (words("Ann has tea", "tea", ("figs", "tea", "fox")), "gives the choices 'figs' and 'fox' the same tokens"),
        (words("Ann has  ", " "), "not the answer ' '"),
        (Context("t", "Ann has tea", (Answer("tea", (7, 10), ("tea",), (0, 7)),)), "has ' te' at characters 7 to 10"),
        (Context("t7", "Ann has tea", ()), "context 0 .task 't7'. has no answers"),
    ],
)
def test_contexts_that_cannot_be_encoded(context, message):
    with pytest.raises(HeadlabError, match=message):
        encode([context], joining_tokenizer())


def test_a_choice_that_cannot_be_aligned_is_named():
    made = Tokenizer(models.WordLevel({"?": 0, "Ann": 1, "has": 2, "tea": 3, "!": 4, "figs!": 5}, "?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("figs!|\\w+|!"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    with pytest.raises(HeadlabError, match=r"context 0: the choice 'figs' .* token 'figs!'"):
        encode([words("Ann has tea!", "tea", ("tea", "figs"))], tokenizer)


@pytest.mark.parametrize("trim", [False, True])
def test_a_space_apart_before_digits_belongs_to_the_answer(trim):
    """As in tokenizers that keep digits apart: `May` begins with its space, `2012` is a space, then digits."""
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(["?", "Ġ", "M", "a", "y", "2", "1", "0", "Ma", "May", "ĠMay"])},
                                [("M", "a"), ("Ma", "y"), ("Ġ", "May")], unk_token="?"))  # fmt: skip
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    if trim:
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    choices = ("2012", "May", "1")
    for text, answer, ids in (("May 2012", "2012", (1, 5, 7, 6, 5)), ("2 May", "May", (10,))):
        (encoded,) = encode([words(text, answer, choices)], tokenizer)
        (found,) = encoded.answers
        assert found.span == (1, 1 + len(ids))
        assert encoded.ids[1:] == ids
        assert found.lead == (answer == "2012")
        assert found.choices == ((1, 5, 7, 6, 5), (10,), (1, 6))


def test_no_contexts_and_no_offsets():
    with pytest.raises(HeadlabError, match="no contexts"):
        encode([], TOKENIZERS["bytes", False])

    class Slow:
        is_fast = False

    with pytest.raises(HeadlabError, match=r"Slow has no offsets .* fast tokenizer"):
        encode([make_context(0)], Slow())
    with pytest.raises(HeadlabError, match="batch_size must be at least 1, not 0"):
        answer_batches([make_context(0)], TOKENIZERS["bytes", False], 0)


def test_choices_in_the_whole_text_where_words_around_them_are_not_enough():
    # a tokenizer for which the first word of a text is another token
    made = Tokenizer(models.WordLevel({"?": 0, "^": 1, "Ann": 2, "has": 3, "tea": 4, "figs": 5, "^has": 6, "^tea": 7}, "?"))
    made.normalizer = normalizers.Replace(Regex("^has tea$|^has figs$"), "? ?")
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    (encoded,) = encode([words("Ann has tea", "tea", ("figs", "tea"))], tokenizer)
    assert encoded.ids == (2, 3, 4)
    assert encoded.answers[0].choices == ((5,), (4,))


@pytest.mark.parametrize("padding", [True, False])
def test_batches_are_padded_on_the_right_and_label_answers_only(padding):
    tokenizer = make_tokenizer("bytes", bos=True, padding=padding)
    assert pad_token(tokenizer) == (0 if padding else 2)
    contexts = [make_context(seed, n) for seed, n in enumerate([2, 4, 3, 2, 2])]
    batches = answer_batches(contexts, tokenizer, 2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    rows = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]
    for context, encoded, row in zip(contexts, encode(contexts, tokenizer), rows, strict=True):
        n = len(encoded.ids)
        assert row["input_ids"][:n].tolist() == tokenizer(context.text)["input_ids"]
        assert row["attention_mask"].tolist() == [1] * n + [0] * (len(row["input_ids"]) - n)
        labelled = {i for answer in encoded.answers for i in range(*answer.span)}
        for i, label in enumerate(row["labels"].tolist()):
            assert label == (row["input_ids"][i] if i in labelled else IGNORED)


def test_pad_takes_any_token():
    encoded = encode([make_context(0), make_context(1, 3)], TOKENIZERS["bytes", False])
    batch = pad(encoded, 7)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()


def test_importance_and_pruning_run_on_answers():
    tokenizer, model = TOKENIZERS["bytes", True], zoo.build("llama-gqa")
    contexts = [make_context(i) for i in range(4)]
    batches = answer_batches(contexts, tokenizer, 3)
    scores = hl.importance(model, batches)
    flat = np.concatenate(scores.values)
    assert len(flat) == 18
    assert (flat > 0).all()
    curve = hl.pruning_curve(model, scores, batches, fractions=[0.0, 0.5])
    (encoded,) = encode(contexts[:1], tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
    (answer,) = encoded.answers
    by_hand = -sum(float(logits[i - 1, encoded.ids[i]]) for i in range(*answer.span)) / answer.length
    with torch.no_grad():
        ours = hl.own_loss(model, answer_batches(contexts, tokenizer, 4)[0])
    assert float(ours[0]) == pytest.approx(by_hand, rel=1e-5)
    assert len(curve.to_frame()) == 2
