from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import tokenizers
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import headlab as hl
from headlab.data.batches import count_examples, data_fingerprint, describe_data, prepare, real_tokens
from headlab.data.losses import check_losses, loss_name, own_loss
from headlab.dcmha import attach
from tests.helpers import zoo

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d", "e"]
IDS = torch.arange(3, 15).view(3, 4)


@pytest.fixture
def tokenizer() -> hf.PreTrainedTokenizerFast:
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", padding_side="left")


@pytest.fixture
def with_tokenizer(tmp_path: Path, tokenizer: hf.PreTrainedTokenizerFast) -> hf.PreTrainedModel:
    zoo.build("llama-gqa").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return hl.load(tmp_path)


def message(error: pytest.ExceptionInfo[hl.HeadlabError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([], "there are no batches"),
        (iter(()), "there are no batches"),
        ({"input_ids": IDS}, r"put it in \[...\]"),
        ("a text", r"put it in \[...\]"),
        ([IDS], "batch 0 is not a dict with input_ids"),
        ([{"input_ids": IDS}, "a text"], "batch 1 is not a dict with input_ids"),
        ([{"attention_mask": IDS}], "batch 0 is not a dict with input_ids"),
        ([{"input_ids": IDS}, {"input_ids": IDS[:0]}], r"batch 1 is empty: input_ids has the shape \(0, 4\)"),
        ([{"input_ids": IDS[:, :0]}], r"batch 0 is empty: .*\(3, 0\)"),
        ([{"input_ids": IDS[0]}], r"\(4,\), not \[batch, pos\]"),
        ([{"input_ids": [["a", "b"]]}], "batch 0 is not made of tensors"),
        ([{"input_ids": [[1, 2], [3]]}], "batch 0 is not made of tensors"),
        (
            [{"input_ids": torch.ones(2, 62, dtype=torch.long)}],
            "batch 0 is 62 tokens long, but the model's context is 61",
        ),
        (
            [{"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])}],
            "batch 0 has an example without a single real token",
        ),
        (["a b c"], "brings no tokenizer"),
    ],
)
def test_bad_batches(batches: Any, expected: str) -> None:
    with pytest.raises(hl.HeadlabError, match=expected) as caught:
        prepare(zoo.build("llama-gqa"), batches)
    message(caught)


def test_good_batches_become_dicts_of_tensors() -> None:
    model = zoo.build("gpt2")
    one = {"input_ids": IDS.tolist(), "labels": IDS.numpy()}
    prepared = prepare(model, (batch for batch in (one, UserDict(one), {"inputs_embeds": torch.ones(2, 61, 35)})))
    assert [type(batch) for batch in prepared] == [dict] * 3
    for batch in prepared[:2]:
        assert torch.equal(batch["input_ids"], IDS)
        assert torch.equal(batch["labels"], IDS)
    assert count_examples(prepared) == 3 + 3 + 2


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_context_is_what_the_model_takes(name: str) -> None:
    model = zoo.build(name)
    longest = {"roberta": 60}.get(name, 61)
    batch = {"input_ids": torch.full((1, longest), 5)} | ({"decoder_input_ids": IDS[:1]} if name == "t5" else {})
    with torch.no_grad():
        assert torch.isfinite(model(**prepare(model, [batch])[0])[0]).all()
    if not name.startswith("t5"):
        with pytest.raises(hl.HeadlabError, match=f"{longest + 1} tokens long, but the model's context is {longest}"):
            prepare(model, [{"input_ids": torch.full((1, longest + 1), 5)}])


def test_the_context_of_what_is_made_of_roberta() -> None:
    """It counts positions from after its padding, whatever was made of it."""
    plain, composed = zoo.build("roberta"), attach(zoo.build("roberta"))
    pruned = [hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L0H1", "L2H3"])) for model in (plain, composed)]
    for model in (composed, *pruned):
        with pytest.raises(hl.HeadlabError, match="61 tokens long, but the model's context is 60"):
            prepare(model, [{"input_ids": torch.full((1, 61), 5)}])


def test_strings_are_padded_on_the_right(with_tokenizer: hf.PreTrainedModel) -> None:
    texts = ["a b c", "d", *["e a"] * 7]
    first, second = prepare(with_tokenizer, texts)
    assert first["input_ids"][:2].tolist() == [[4, 5, 6], [7, 2, 2]]
    assert first["attention_mask"][:2].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert first["input_ids"].shape == (8, 3)
    assert second["input_ids"].tolist() == [[8, 4]]
    with pytest.raises(hl.HeadlabError, match="without a single real token"):
        prepare(with_tokenizer, ["a", ""])
    with pytest.raises(hl.HeadlabError, match="is empty"):
        prepare(with_tokenizer, [""])
    with pytest.raises(hl.HeadlabError, match="62 tokens long"):
        prepare(with_tokenizer, ["a " * 62])


def test_a_tokenizer_that_cannot_pad(tmp_path: Path, tokenizer: hf.PreTrainedTokenizerFast) -> None:
    zoo.build("llama-gqa").save_pretrained(tmp_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(hl.HeadlabError, match="no token to pad with"):
        prepare(hl.load(tmp_path), ["a b", "c"])


def test_strings_for_a_bridge_leave_its_tokenizer_as_it_is(with_tokenizer: hf.PreTrainedModel) -> None:
    bridge = hl.bridge(with_tokenizer)
    side = bridge.tokenizer.padding_side
    [batch] = prepare(bridge, ["a b c", "d"])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert bridge.tokenizer.padding_side == side


def test_text_is_cut_into_examples(tokenizer: hf.PreTrainedTokenizerFast) -> None:
    text = " ".join("abcde"[i % 5] for i in range(17))
    batches = hl.text_batches(tokenizer, text, examples=5, length=3, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 3), (2, 3), (1, 3)]
    flat = torch.cat([batch["input_ids"].flatten() for batch in batches])
    assert flat.tolist() == [4 + i % 5 for i in range(15)]
    assert all(batch["attention_mask"].all() for batch in batches)
    assert count_examples(hl.text_batches(tokenizer, text, examples=99, length=4)) == 4
    with pytest.raises(hl.HeadlabError, match="17 tokens, fewer than one example of 18"):
        hl.text_batches(tokenizer, text, length=18)


def test_real_tokens_of_every_stack() -> None:
    mask, labels = torch.tensor([[1, 1, 0], [0, 1, 1]]), torch.tensor([[7, -100], [7, 7]])
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": mask, "labels": labels}
    for stack in ("", "enc"):
        assert real_tokens(batch, stack).tolist() == [[True, True, False], [False, True, True]]
        assert real_tokens({"inputs_embeds": torch.ones(2, 3, 5)}, stack).all()
    for stack in ("dec", "cross"):
        assert real_tokens(batch, stack).tolist() == [[True, False], [True, True]]
        assert real_tokens(batch | {"decoder_attention_mask": 1 - mask}, stack).tolist() == [[0, 0, 1], [1, 0, 0]]
        assert real_tokens({"input_ids": torch.ones(2, 3), "decoder_input_ids": labels}, stack).tolist() == [
            [1, 1],
            [1, 1],
        ]
        assert torch.equal(real_tokens(batch | {"labels": torch.tensor([1, 2])}, stack), mask.bool())


def test_shapes_in_signatures_are_checked_in_tests() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        real_tokens({"input_ids": IDS, "attention_mask": torch.ones(2, 3, 5)})


def one(batch: dict[str, Tensor], i: int, real_only: bool = False) -> dict[str, Tensor]:
    example = {name: value[i : i + 1] for name, value in batch.items()}
    if real_only:
        real = example.pop("attention_mask").bool()
        example = {name: value[real][None] if value.shape == real.shape else value for name, value in example.items()}
    return example


@pytest.mark.parametrize("name", zoo.WITH_LOSS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_own_loss_is_that_of_each_example_alone(name: str, padded: bool) -> None:
    model, batch = zoo.build(name), zoo.batch_for(name, padded=padded)
    with torch.no_grad():
        losses = own_loss(model, batch)
        for i in range(zoo.BATCH):
            example = one(batch, i, real_only=True)
            theirs = model(**({"labels": example["input_ids"]} | example)).loss
            assert losses[i].item() == pytest.approx(theirs.item(), abs=2e-5)


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_own_loss_with_padding_on_the_left_and_with_labels(name: str) -> None:
    model, batch = zoo.build(name), zoo.batch_for(name)
    batch = {key: value.flip(-1) for key, value in batch.items()}
    assert not batch["attention_mask"][:, 0].all()
    labels = batch["input_ids"].clone()
    labels[0, 3:5] = -100
    labelled = batch | {"labels": labels}
    with torch.no_grad():
        ours, ours_labelled = own_loss(model, batch), own_loss(model, labelled)
        for i in range(zoo.BATCH):
            example, start = one(labelled, i), int(batch["attention_mask"][i].argmax())
            example["labels"][:, : start + 1] = -100
            assert ours_labelled[i].item() == pytest.approx(model(**example).loss.item(), abs=2e-5)
            example["labels"][:, start + 1 :] = batch["input_ids"][i, start + 1 :]
            assert ours[i].item() == pytest.approx(model(**example).loss.item(), abs=2e-5)


TASKS = {
    "regression": (hf.BertForSequenceClassification, 1, {"labels": torch.tensor([0.5, -1.0, 2.0, 0.0])}),
    "regression of two": (hf.BertForSequenceClassification, 2, {"labels": torch.randn(4, 2)}),
    "several answers": (hf.BertForSequenceClassification, 3, {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 1]] * 2)}),
    "one answer": (hf.BertForSequenceClassification, 3, {"labels": torch.tensor([2, 0, 1, 2])}),
    "tokens": (
        hf.BertForTokenClassification, 3,
        {"labels": torch.tensor([[2, 0, 1, 1, 2, 0, -100], [-100] * 6 + [1]] * 2)},
    ),
    "question": (
        hf.BertForQuestionAnswering, 2,
        {"start_positions": torch.tensor([0, 1, 2, 6]), "end_positions": torch.tensor([3, 1, 3, 6])},
    ),
    "decoder": (hf.LlamaForSequenceClassification, 3, {"labels": torch.tensor([2, 0, 1, 2])}),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_own_loss_of_other_tasks(task: str) -> None:
    kind, n, labels = TASKS[task]
    options = zoo._LLAMA if kind is hf.LlamaForSequenceClassification else zoo._BERT
    config = kind.config_class(**options, num_labels=n, problem_type="regression" if "regression" in task else None)
    model, batch = kind(config).eval(), zoo.batch_for("bert") | labels
    with torch.no_grad():
        losses = own_loss(model, batch)
        assert losses.shape == (4,)
        assert model.config.problem_type == config.problem_type
        for i in range(4):
            assert losses[i].item() == pytest.approx(model(**one(batch, i)).loss.item(), abs=2e-6)


def test_losses_that_cannot_be() -> None:
    batch = zoo.batch_for("bert")
    with pytest.raises(hl.HeadlabError, match="BertModel has no loss of its own: pass loss="):
        own_loss(zoo.build("bert"), batch)
    with pytest.raises(hl.HeadlabError, match="BertForMaskedLM needs labels"):
        own_loss(zoo.build("bert-mlm"), batch)
    with pytest.raises(hl.HeadlabError, match="no token to predict"):
        own_loss(zoo.build("bert-mlm"), batch | {"labels": torch.full((4, 7), -100)})
    with pytest.raises(hl.HeadlabError, match="no token to predict"):
        own_loss(zoo.build("gpt2"), {"input_ids": IDS[:, :1]})
    answers = {"start_positions": torch.tensor([0, 0, 0, 0]), "end_positions": torch.tensor([3, 3, 7, 3])}
    with pytest.raises(hl.HeadlabError, match="needs start_positions and end_positions"):
        own_loss(hf.BertForQuestionAnswering(hf.BertConfig(**zoo._BERT)), batch)
    with pytest.raises(hl.HeadlabError, match="outside its example's tokens"):
        own_loss(hf.BertForQuestionAnswering(hf.BertConfig(**zoo._BERT)), batch | answers)


def test_losses_are_one_number_per_example() -> None:
    losses = torch.ones(3)
    assert check_losses(losses, {"input_ids": IDS}) is losses
    for wrong, named in ((torch.ones(()), r"\(\)"), (torch.ones(3, 4), r"\(3, 4\)"), (1.0, "float")):
        with pytest.raises(hl.HeadlabError, match=rf"shape \(3,\), not {named}"):
            check_losses(wrong, {"input_ids": IDS})
    assert loss_name(None) == "own"
    assert loss_name(own_loss).endswith("own_loss")


BATCH = {"input_ids": IDS, "weight": torch.ones(3, dtype=torch.bfloat16)}


@given(st.integers(0, 2), st.integers(0, 3), st.integers(-5, 5).filter(bool))
def test_any_change_of_the_data_changes_its_fingerprint(row: int, column: int, step: int) -> None:
    changed = IDS.clone()
    changed[row, column] += step
    assert data_fingerprint([BATCH | {"input_ids": changed}]) != data_fingerprint([BATCH])


def test_fingerprints_of_data() -> None:
    base = data_fingerprint([BATCH])
    assert len(base) == 12
    assert data_fingerprint([{name: BATCH[name].clone() for name in reversed(BATCH)}]) == base
    others = [
        [], [BATCH, BATCH], [{"input_ids": IDS}], [BATCH | {"input_ids": IDS.int()}],
        [BATCH | {"input_ids": IDS.view(4, 3)}],
        [{"tokens": IDS, "weight": BATCH["weight"]}], [BATCH | {"weight": -BATCH["weight"]}],
    ]  # fmt: skip
    assert len({base, *map(data_fingerprint, others)}) == 1 + len(others)
    described = describe_data([zoo.batch_for("bert"), zoo.batch_for("bert")])
    assert (described["examples"], described["tokens"]) == (8, 2 * (28 - 2 - 3))
