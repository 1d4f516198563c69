"""The made-up language, the models trained on it, and the study of sixteen heads in small."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig

import headlab as hl
from benchmarks import sequence, sixteen, sixteen_report
from benchmarks.language import DOMAINS, LABELS, Clause, Language, NounPhrase, Sentence
from benchmarks.sequence import Size, accuracy, bleu, corpus_bleu, cut, examples, train, wrong
from headlab.studies.checkpoints import checkpoint_folders

TINY = Size(d_model=24, d_ff=47, layers=2, heads=3, batch=31, lr=5e-3, pool=200, masked=2, texts=100)
SMALL = {"vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 47}
LANGUAGE = Language()


# --- the language


def test_a_sentence_and_its_translation() -> None:
    language = Language()
    language.double, language.meaning = {7: 81}, list(range(80))
    language.verb_meaning, language.adjective_meaning, language.odd_verbs = list(range(40)), list(range(40)), {3}
    language.gender = [i % 3 for i in range(90)]
    boys, dog = NounPhrase(4, many=True, adjectives=(1, 2)), NounPhrase(7)
    first = Clause(boys, 3, dog, NounPhrase(5), negated=True)
    second = Clause(NounPhrase(4, many=True, pronoun=True), 2, dog)
    sentence = Sentence(1, first, 1, second, tense_last=True)
    said = "many a1 a2 n4 not v3 the n7 near the n5 because they v2 the n7 when1"
    assert " ".join(language.say(sentence)) == said
    meant = "PRO1 N7 OBJ1 V2 T1 SUBJ1PL J1 N5 AT2 N4 PL A2 AGREE1 A1 AGREE1 N81 OBJ0 NO V3 T1 SUBJ1PL"
    assert " ".join(language.translate(sentence)) == meant
    alone = dataclasses.replace(sentence, joint=None, second=None, tense_last=False)
    assert language.say(alone)[0] == "when1"
    assert " ".join(language.translate(alone)) == meant.partition(" J1 ")[2]
    both = dataclasses.replace(sentence, joint=0)
    assert language.translate(both)[-6:] == ["PRO1", "N7", "OBJ1", "V2", "T1", "SUBJ1PL"]


@given(st.integers(0, 10**9), st.sampled_from(DOMAINS))
def test_every_sentence_has_one_translation_of_known_words(seed: int, domain: str) -> None:
    sentence = LANGUAGE.draw(random.Random(seed), domain)
    assert sentence == LANGUAGE.draw(random.Random(seed), domain)
    said, meant = LANGUAGE.say(sentence), LANGUAGE.translate(sentence)
    assert set(said) | set(meant) <= set(LANGUAGE.words)
    kinds = [Counter(word[0] for word in words if word[1:].isdigit()) for words in (said, meant)]
    for small, large in (("a", "A"), ("v", "V"), ("n", "N")):
        assert kinds[0][small] == kinds[1][large]
    assert said.count("not") == meant.count("NO")
    nouns = {int(word[1:]) for word in said if word[0] == "n" and word[1:].isdigit()}
    assert all(n < 48 if domain == "tales" else n >= 32 for n in nouns)


@given(st.integers(0, 10**9), st.sampled_from(DOMAINS))
def test_a_claim_is_labelled_by_what_it_changes(seed: int, domain: str) -> None:
    rng = random.Random(seed)
    sentence = LANGUAGE.draw(rng, domain)
    words, label = LANGUAGE.claim(rng, sentence, domain)
    clauses = [clause for clause in (sentence.first, sentence.second) if clause]
    bare = [
        Clause(NounPhrase(c.subject.noun, c.subject.many), c.verb, NounPhrase(c.object.noun, c.object.many)) for c in clauses
    ]
    same, opposite = (
        [
            LANGUAGE.say(Sentence(sentence.tense, dataclasses.replace(short, negated=whole.negated != turned)))
            for short, whole in zip(bare, clauses, strict=True)
        ]
        for turned in (False, True)
    )
    if LABELS[label] == "follows":
        assert words in same
    elif LABELS[label] == "contradicts":
        assert words in opposite
    else:
        assert words not in same + opposite


# --- examples


@pytest.mark.parametrize("task", ["translator", "classifier"])
def test_examples_are_the_same_every_time_and_in_one_part_only(task: str) -> None:
    parts = {part: examples(task, part, 300) for part in ("train", "choose", "test")}
    again = examples(task, "test", 300)
    assert all(torch.equal(again[name], value) for name, value in parts["test"].items())
    rows = {part: {tuple(t for t in row if t) for row in batch["input_ids"].tolist()} for part, batch in parts.items()}
    assert [len(found) for found in rows.values()] == [300] * 3
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["choose"]
    assert not rows["test"] & rows["choose"]
    batch = parts["train"]
    assert batch["input_ids"].shape[1] <= sequence.LONGEST
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    assert ((batch["input_ids"] == 1).sum(-1) == 1).all()
    if task == "translator":
        assert ((batch["labels"] == 1).sum(-1) == 1).all()
    else:
        assert min(batch["labels"].bincount().tolist()) > 60
    assert not torch.equal(examples(task, "test", 9, domain="tales")["input_ids"][:, 1:5], again["input_ids"][:9, 1:5])


def test_cut_leaves_out_padding_only() -> None:
    batch = examples("translator", "test", 50)
    parts = cut(batch, 20)
    assert [len(part["labels"]) for part in parts] == [20, 20, 10]
    tokens = [t for part in parts for row in part["input_ids"].tolist() for t in row if t]
    assert tokens == [t for row in batch["input_ids"].tolist() for t in row if t]
    assert all(part["input_ids"][:, -1].any() and (part["labels"][:, -1] != -100).any() for part in parts)


# --- measures


def test_bleu() -> None:
    assert corpus_bleu([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]]) == pytest.approx(100)
    assert corpus_bleu([[1, 2, 3]], [[4, 5, 6]]) == 0
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples; as long as it should be
    assert corpus_bleu([[1, 2, 3, 4, 9]], [[1, 2, 3, 4, 5]]) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert corpus_bleu([[1, 2, 3, 4]], [[1, 2, 3, 4, 5]]) == pytest.approx(100 * 2.718281828 ** (1 - 5 / 4))
    assert corpus_bleu([[1, 1, 1, 1], [2, 3, 4, 5]], [[1, 2, 2, 2], [2, 3, 4, 5]]) == pytest.approx(
        100 * (5 / 8 * 3 / 6 * 2 / 4 * 1 / 2) ** 0.25
    )


class Fixed(torch.nn.Module):
    """Says what it is told to."""

    def __init__(self, said: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.functional.one_hot(said, 30).float()

    def forward(self, **_: torch.Tensor) -> Fixed:
        return self

    def generate(self, **_: object) -> torch.Tensor:
        return torch.cat([torch.zeros(len(self.logits), 1, dtype=torch.long), self.logits.argmax(-1)], 1)


def test_wrong_tokens_and_answers() -> None:
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
    model = Fixed(torch.tensor([[5, 9, 7, 1], [8, 1, 4, 4]]))
    assert wrong(model, {"labels": labels}).tolist() == [25, 0]
    assert accuracy(model, [{"labels": labels}]) == 87.5
    assert wrong(Fixed(torch.tensor([2, 0])), {"labels": torch.tensor([2, 1])}).tolist() == [0, 100]
    batch = {"input_ids": labels, "attention_mask": labels, "labels": torch.tensor([[5, 6, 7, 8, 1], [8, 9, 5, 6, 1]])}
    said = torch.tensor([[5, 6, 7, 8, 1, 0], [8, 9, 5, 6, 1, 3]])
    assert bleu(Fixed(said), [batch]) == pytest.approx(100)


# --- training and the study

OPTIONS = ["--device=cpu", "--steps=12", "--examples=10", "--batch-size=10", "--repeats=1"]
OPTIONS += [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]


def drawn(figure: go.Figure, docs: Path, name: str, caption: str) -> str:
    """A figure's data, without the seconds that a browser needs for a picture of it."""
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    (docs / "figures" / f"{name}.json").write_text(figure.to_json())
    return f"![{caption}](figures/{name}.json)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, once, by the command."""
    out = tmp_path_factory.mktemp("sixteen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sixteen_report, "picture", drawn)
        patch.setattr(sixteen, "SPEED_BATCHES", (1, 2))
        patch.setattr(sequence, "LONGEST", 40)
        patch.setattr(sixteen, "FRACTIONS", (0.5, 1.0))
        patch.setattr(sequence, "SHARES", (0.5, 1.0))
        patch.setattr(sixteen, "BertConfig", partial(BertConfig, **SMALL))
        sixteen.main(["all", f"--out={out}", f"--docs={out / 'docs'}", *OPTIONS])
    return out


def test_training_learns_and_saves_on_the_way(tmp_path: Path) -> None:
    model = train("classifier", tmp_path / "run", 40, TINY)
    folders = checkpoint_folders(tmp_path / "run")
    assert [path.name for path in folders] == [f"step-{n:05d}" for n in (2, 4, 6, 10, 20, 30, 40)]
    batch = examples("classifier", "train", 100)
    losses = [float(hl.own_loss(hl.load(str(path)), batch).detach().mean()) for path in (folders[0], folders[-1])]
    assert losses[1] < losses[0]
    assert losses[1] == pytest.approx(float(hl.own_loss(model, batch).detach().mean()), rel=1e-4)
    again = train("classifier", tmp_path / "again", 40, TINY)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_training_that_ends_early_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "SHARES", (0.5, 1.0))
    whole = sequence.fit

    def stopped(*args: Any) -> None:
        whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(sequence, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        train("translator", tmp_path / "translator", 2, TINY)
    assert not list(tmp_path.iterdir())


def test_a_classifier_begins_with_what_it_learned_from_masked_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = []
    monkeypatch.setattr(sequence, "fit", lambda model, pool, steps, *_: fitted.append((model, len(pool["labels"]), steps)))
    classifier = train("classifier", tmp_path / "classifier", 7, TINY)
    (guesses, *of_guesses), (trained, *of_training) = fitted
    assert (of_guesses, of_training) == ([100, 2], [200, 7])
    assert trained is classifier
    encoder, start = guesses.bert.state_dict(), classifier.bert.state_dict()
    assert {name.partition(".")[0] for name in start.keys() - encoder.keys()} == {"pooler"}
    assert all(torch.equal(start[name], value) for name, value in encoder.items())
    fitted.clear()
    train("translator", tmp_path / "translator", 7, TINY)
    assert [steps for *_, steps in fitted] == [7]


def test_words_are_masked_and_guessed() -> None:
    batch, mask = examples("classifier", "train", 400), LANGUAGE.number["<mask>"]
    seen: dict[str, torch.Tensor] = {}

    def model(ids: torch.Tensor, **given: torch.Tensor) -> Fixed:
        seen.update(given, ids=ids)
        fixed = Fixed(torch.zeros(1, dtype=torch.long))
        fixed.loss = torch.tensor(3.0)
        return fixed

    torch.manual_seed(0)
    assert sequence.masked_loss(model, batch) == 3  # type: ignore[arg-type]
    asked = seen["labels"] != -100
    assert torch.equal(asked, seen["ids"] == mask)
    assert torch.equal(torch.where(asked, seen["labels"], seen["ids"]), batch["input_ids"])
    assert seen["labels"][asked].min() > mask
    words = batch["input_ids"] > mask
    assert float(asked.sum() / words.sum()) == pytest.approx(1 / 7, abs=0.01)
    assert torch.equal(seen["attention_mask"], batch["attention_mask"])


def test_the_study_is_complete(run: Path) -> None:
    both = {
        "one-off", "alone", "alone-choose", "taylor", "one-off-choose", "curve-taylor", "curve-ablation", "curve-random",
        "profile", "one-off-tales", "one-off-reports", "domains-ablation", "domains-importance", "timing", "one-off-loss",
        "one-off-loss-tales", "one-off-loss-reports", "domains-loss",
    }  # fmt: skip
    expected = {f"{task}-{name}" for task in sixteen.TASKS for name in both}
    expected |= {f"translator-curve-{stack}" for stack in ("enc", "dec", "cross")}
    assert {path.stem for path in (run / "results").glob("*.json")} == expected | {"bert-base-timing"}
    assert len(hl.Result.load(run / "results" / "translator-one-off.json").rows) == 6  # type: ignore[attr-defined]


def test_the_page_tells_what_was_measured(run: Path) -> None:
    page = (run / "docs" / "sixteen.md").read_text()
    for title in ("One head off", "All but one head", "apart", "Two domains", "Over the course", "Speed at half"):
        assert title in page
    scores = hl.AblationScores.load(run / "results" / "translator-one-off.json")
    table = page[page.index("| cross-attention, layer") :].splitlines()
    assert table[2].split("|")[4].strip().rstrip("*") == f"{0.0 - scores.columns['change'][4][2]:+.2f}"
    for name in ("translator-stacks", "classifier-training", "classifier-domains-ablation"):
        assert list((run / "docs" / "figures").glob(f"sixteen-{name}.*"))


def test_what_is_there_is_not_made_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ablation", "pruning_curve", "stack_curves", "correlate", "timing"):
        monkeypatch.setattr(hl, name, lambda *_, **__: pytest.fail("measured again"))
    for name in ("train", "profile"):
        monkeypatch.setattr(sixteen, name, lambda *_, **__: pytest.fail("made again"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    sixteen.main(["train", f"--out={run}", *OPTIONS])
    sixteen.main(["study", f"--out={run}", *OPTIONS])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("option", "said"), [("--steps=13", "steps 12"), ("--pool=201", "pool 200"), ("--examples=9", "examples 10")]
)
def test_a_run_is_not_mixed_with_another(run: Path, option: str, said: str) -> None:
    with pytest.raises(hl.HeadlabError, match=f"was begun with {said}: give the same options"):
        sixteen.main(["all", f"--out={run}", *OPTIONS, option])


def test_a_page_of_what_is_there(run: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    name = "classifier-domains-ablation.json"
    (tmp_path / "results" / name).write_bytes((run / "results" / name).read_bytes())
    page = sixteen_report.write_report(tmp_path / "results", tmp_path / "docs").read_text()
    assert "Two domains" in page
    assert "One head off" not in page
