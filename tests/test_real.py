"""The whole path on real pretrained models: SmolLM2 (grouped queries) and MiniLM (an encoder, and a classifier from it)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import headlab as hl
from benchmarks import real
from benchmarks.study import encoded, mean_state

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real")]
Batches = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedModel:
    return hl.load(real.smollm2())


@pytest.fixture(scope="module")
def texts() -> dict[str, Batches]:
    tokenizer = AutoTokenizer.from_pretrained(real.smollm2())
    return {name: hl.text_batches(tokenizer, text, examples=8) for name, text in real.licence_texts().items()}


def test_smollm2_is_what_it_should_be(smollm2: PreTrainedModel, texts: dict[str, Batches]) -> None:
    heads = hl.heads(smollm2)
    assert len(heads) == 270
    assert {head.d_head for head in heads} == {64}
    assert [head.group for head in heads[:9]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with torch.inference_mode():
        loss = hl.own_loss(smollm2, texts["GPL-3.0"][0]).mean()
    assert loss < 4.5  # of 10.8 by guessing


def test_smollm2_scores_agree_with_exact_ablation(smollm2: PreTrainedModel, texts: dict[str, Batches]) -> None:
    batches = texts["Apache-2.0"][:1]
    exact = hl.ablation(smollm2, batches)
    signed = hl.importance(smollm2, batches, reduction="signed")
    assert signed.rank_correlation(exact) > 0.6
    assert abs(hl.importance(smollm2, method="random").rank_correlation(exact)) < 0.2
    for head in (hl.heads(smollm2)[8], hl.heads(smollm2)[135]):
        mask = hl.HeadMask.without(hl.heads(smollm2), [head])
        with torch.inference_mode(), hl.masked(smollm2, mask):
            removed = hl.own_loss(smollm2, batches[0]).double()
        with torch.inference_mode():
            change = (removed - hl.own_loss(smollm2, batches[0]).double()).mean().item()
        assert exact.columns["change"][head.row][head.index] == pytest.approx(change, abs=1e-5)


def test_smollm2_curves_in_taylor_order_lie_far_below_random(smollm2: PreTrainedModel, texts: dict[str, Batches]) -> None:
    scores = hl.importance(smollm2, texts["Apache-2.0"])
    testing = texts["GPL-3.0"]
    taylor = hl.pruning_curve(smollm2, scores, testing, (0.1, 0.3, 0.5))
    random = hl.pruning_curve(smollm2, hl.importance(smollm2, method="random"), testing, (0.1, 0.3, 0.5))
    assert taylor.rises[1] < 0.4
    assert taylor.rises[2] < 1
    assert (taylor.rises[1:] < random.rises[1:]).all()


@pytest.mark.parametrize(("unit", "gqa"), [("head", "pad"), ("head", "ungroup"), ("group", "pad")])
def test_smollm2_pruned_computes_what_masked_did(
    unit: str, gqa: str, smollm2: PreTrainedModel, texts: dict[str, Batches], tmp_path: Path
) -> None:
    mask = hl.importance(smollm2, texts["Apache-2.0"][:1]).keep(0.5, unit=unit)
    small = hl.prune(smollm2, mask, gqa=gqa)
    hl.save_pruned(small, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    batch = texts["GPL-3.0"][0]
    prompt = batch["input_ids"][:2, :11]
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 2}
    with torch.inference_mode():
        with hl.masked(smollm2, mask):
            logits, tokens = smollm2(**batch).logits, smollm2.generate(prompt, **options)
        difference = (small(**batch).logits - logits).abs().max()
        assert difference < 1e-5 * logits.abs().max()  # sums of other lengths differ in float32's last digits
        assert torch.equal(small.generate(prompt, **options), tokens)
    left = hl.kept(small)
    assert left["heads"].sum() == 135
    assert left["groups"].sum() == (45 if unit == "group" else left["groups"].sum())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in smollm2.parameters())


def test_minilm_keeps_its_word_similarity_without_a_fifth_of_its_heads(tmp_path: Path) -> None:
    model, tokenizer = hl.load(real.minilm()), AutoTokenizer.from_pretrained(real.minilm())
    pairs = real.wordsim353()
    assert real.wordsim_spearman(model, tokenizer, pairs) == pytest.approx(0.729, abs=0.005)
    first, second = (dict(tokenizer([p[i] for p in pairs], padding=True, return_tensors="pt")) for i in range(2))
    batch = first | {"other_ids": second["input_ids"], "other_mask": second["attention_mask"]}

    def dissimilarity(m: torch.nn.Module, b: dict[str, Tensor]) -> Tensor:
        one, other = mean_state(m, b["input_ids"], b["attention_mask"]), mean_state(m, b["other_ids"], b["other_mask"])
        return 1 - torch.cosine_similarity(one, other)

    scores = hl.importance(model, [batch], loss=dissimilarity)
    mask = scores.keep(0.8)
    small = hl.prune(model, mask)
    assert len(hl.heads(small)) == 58
    kept = real.wordsim_spearman(small, tokenizer, pairs)
    assert kept > 0.69
    with hl.masked(model, mask):
        assert real.wordsim_spearman(model, tokenizer, pairs) == pytest.approx(kept, abs=1e-6)


def test_a_real_classifier_shrinks(tmp_path: Path) -> None:
    folder = real.sentence_classifier()
    model, tokenizer = hl.load(folder), AutoTokenizer.from_pretrained(folder)
    texts, labels = real.held_out_sentences()
    texts, labels = texts[:300], labels[:300]
    whole = real.classifier_accuracy(model, tokenizer, texts, labels)
    assert whole > 0.8
    train_texts, train_labels = real.labelled_sentences()
    scoring = [encoded(tokenizer, train_texts[i : i + 32], train_labels[i : i + 32]) for i in range(0, 128, 32)]
    exact = hl.ablation(model, scoring[:2])
    assert exact.columns["p"][0].shape == (12,)
    assert np.isfinite(exact.flat).all()
    mask = hl.importance(model, scoring).keep(0.6)
    hl.save_pruned(hl.prune(model, mask), tmp_path / "small", tokenizer)
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    accuracy = real.classifier_accuracy(small, AutoTokenizer.from_pretrained(tmp_path / "small"), texts, labels)
    assert accuracy > 0.7
    with hl.masked(model, mask):
        assert real.classifier_accuracy(model, tokenizer, texts, labels) == pytest.approx(accuracy)
