"""A pruned model computes what the masked model computes, and is as small as it should be."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headlab as hl
from headlab.models.access import head_rows, rows
from tests.helpers import zoo
from tests.helpers.surgical import (
    ATOL,
    ATTENTION,
    GENERATES,
    MORE,
    build,
    generated,
    in_steps,
    near,
    outputs,
    prompt,
    random_mask,
    same_generation,
    without_rows,
)

PAIRS = [(name, attention) for name in ATTENTION for attention in ATTENTION[name]]


def check(model: nn.Module, name: str, mask: hl.HeadMask, fill: hl.Fill | None = None, gqa: Any = "pad") -> nn.Module:
    """Masked and pruned agree, forward and step by step in a generation."""
    batch, small = zoo.batch_for(name, labels=False), hl.prune(model, mask, fill, gqa=gqa)
    assert hl.deviation(small, model, mask, fill, batches=[batch]) <= ATOL
    if name in GENERATES:
        with hl.masked(model, mask, fill):
            tokens, logits = generated(model, prompt(name))
        same_generation(small, tokens, logits, prompt(name))
    return small


@pytest.mark.parametrize(("name", "attention"), PAIRS)
@pytest.mark.parametrize(("gqa", "with_fill"), [("pad", False), ("ungroup", True)])
def test_masked_equals_pruned(name: str, attention: str, gqa: str, with_fill: bool) -> None:
    model = build(name, attention)
    fill = hl.fill(model, [zoo.batch_for(name, labels=False)]) if with_fill else None
    mask = random_mask(model, seed=len(name) + with_fill)
    assert 0 < len(mask.kept) < len(mask)
    check(model, name, mask, fill, gqa)


@pytest.mark.parametrize("name", [*zoo.MHA_GQA_MQA, "t5", "bert-classifier", "dcformer-gqa"])
def test_deviation_is_the_largest_difference_at_real_tokens(name: str) -> None:
    model, batch = build(name), zoo.batch_for(name)
    mask = random_mask(model, seed=3)
    small = hl.prune(model, mask)
    assert hl.deviation(small, model, mask) <= ATOL
    row = next(row for row in rows(small) if row.slots)
    row.projection(row.family.o).weight.data *= 1.25
    with torch.no_grad():
        found = small(**batch).logits
        with hl.masked(model, mask):
            expected = model(**batch).logits
    largest = 0.0
    for example in range(zoo.BATCH):
        real = batch["labels"][example] != -100 if name == "t5" else batch["attention_mask"][example].bool()
        difference = (found[example].double() - expected[example].double()).abs()
        largest = max(largest, float((difference if name == "bert-classifier" else difference[real]).max()))
    assert largest > 1e-3
    assert hl.deviation(small, model, mask, batches=[batch]) == pytest.approx(largest, rel=1e-5)


def test_deviation_of_models_that_do_not_belong_together() -> None:
    model = build("llama-gqa")
    mask = random_mask(model, seed=3)
    with pytest.raises(hl.HeadlabError, match="was not pruned from this one"):
        hl.deviation(build("bert"), model, mask)
    with pytest.raises(hl.HeadlabError, match="but the model has"):
        hl.deviation(model, build("gpt2"), mask)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), PAIRS)
@settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), gqa=st.sampled_from(["pad", "ungroup"]), with_fill=st.booleans())
def test_masked_equals_pruned_for_any_mask(name: str, attention: str, seed: int, gqa: str, with_fill: bool) -> None:
    model = build(name, attention)
    if name in zoo.COMPOSED:  # random maps amplify rounding, at times to 1.1e-5 in float32
        model = model.double()
    fill = hl.fill(model, [zoo.batch_for(name, labels=False)]) if with_fill else None
    check(model, name, random_mask(model, seed), fill, gqa)


@pytest.mark.parametrize("name", [*zoo.ALL, *MORE])
def test_every_layer_may_lose_all_heads(name: str) -> None:
    model = build(name)
    n_rows = len(head_rows(model))
    fill = hl.fill(model, [zoo.batch_for(name, labels=False)])
    for gone in [(row,) for row in range(n_rows)] + [tuple(range(n_rows))]:
        small = check(model, name, without_rows(model, *gone), fill if gone == (1,) else None)
        assert {head.row for head in hl.heads(small)} == set(range(n_rows)) - set(gone)
        assert hl.kept(small)["slots"].tolist() == [
            0 if row in gone else len(head_rows(model)[row]) for row in range(n_rows)
        ]


@pytest.mark.parametrize("name", [*zoo.MHA_GQA_MQA, "gpt2", "bert", "t5"])
def test_one_head_of_every_layer_in_turn(name: str) -> None:
    model = build(name)
    for row in head_rows(model):
        check(model, name, hl.HeadMask.without(hl.heads(model), [row[row[0].row % len(row)]]))


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "llama-gqa", "gpt2", "mistral"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_several_tokens_a_step_on_a_half_filled_cache(name: str, attention: str) -> None:
    model = build(name, attention)
    ids = torch.randint(3, zoo.VOCAB, (2, 9))
    for gone in [(0,), (1,), (2,), (0, 1), (0, 1, 2)]:
        mask = without_rows(model, *gone)
        small = hl.prune(model, mask)
        for steps in [(3, 4, 1, 1), (1, 6, 2), (9,)]:
            with hl.masked(model, mask):
                near(in_steps(small, ids, steps), in_steps(model, ids, steps))
                near(in_steps(small, ids, steps), outputs(model, {"input_ids": ids}))


@pytest.mark.parametrize("name", GENERATES)
def test_a_static_cache(name: str) -> None:
    model = build(name)
    for gone in range(len(head_rows(model))):
        mask = without_rows(model, gone)
        with hl.masked(model, mask):
            tokens, logits = generated(model, prompt(name), cache_implementation="static")
        same_generation(hl.prune(model, mask), tokens, logits, prompt(name), cache_implementation="static")


@pytest.mark.parametrize("name", ["llama-gqa", "t5"])
def test_a_beam_search_sorts_the_cache_of_an_empty_layer_too(name: str) -> None:
    model = build(name)
    mask = without_rows(model, len(head_rows(model)) - 1)
    with hl.masked(model, mask):
        tokens = model.generate(**prompt(name), max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(
        hl.prune(model, mask).generate(**prompt(name), max_new_tokens=6, num_beams=3, do_sample=False), tokens
    )


def test_cross_attention_of_bert() -> None:
    encoder, decoder = hf.BertConfig(**zoo._BERT), hf.BertConfig(**zoo._BERT, is_decoder=True, add_cross_attention=True)
    model = hf.EncoderDecoderModel(hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.update(decoder_start_token_id=1, bos_token_id=1, pad_token_id=0)
    start = {key: value for key, value in zoo.batch_for("bert-mlm").items() if key != "labels"}
    for gone in range(9):
        mask = without_rows(model, gone)
        with hl.masked(model, mask):
            tokens, logits = generated(model, start)
        same_generation(hl.prune(model, mask), tokens, logits, start)


def attention_size(name: str, slots: int, groups: int) -> int:
    """How many numbers an attention module without the output bias has, by hand."""
    if name == "gpt2":
        return (35 + 1) * 3 * 7 * slots + 7 * slots * 35
    if name == "neox":
        return (40 + 1) * 3 * 8 * slots + 8 * slots * 40
    if name.startswith(("bert", "roberta", "electra")):
        return 3 * (35 + 1) * 7 * slots + 7 * slots * 35
    if name.startswith("t5"):
        return 4 * 37 * 7 * slots
    bias = name in ("llama-bias", "qwen2")
    norms = 2 * 10 if name in ("qwen3", "gemma3") and slots else 0
    return (42 + bias) * 10 * (slots + 2 * groups) + 10 * slots * 42 + norms


@pytest.mark.parametrize("name", [name for name in zoo.ALL if name not in zoo.COMPOSED])
@pytest.mark.parametrize("gqa", ["pad", "ungroup"])
def test_sizes_by_hand(name: str, gqa: str) -> None:
    model, sizes = build(name), set()
    for seed in range(5):
        mask = random_mask(model, seed)
        small = hl.prune(model, mask, gqa=gqa)
        expected = sum(parameter.numel() for parameter in model.parameters())
        for row, keep in zip(head_rows(model), mask.rows, strict=True):
            left = [int(keep[[head.group == g for head in row]].sum()) for g in {head.group for head in row}]
            left = [n for n in left if n]
            even = len(set(left)) < 2
            groups = len(left) if even or gqa == "pad" else sum(left)
            slots = sum(left) if even or gqa == "ungroup" else len(left) * max(left)
            expected += attention_size(name, slots, groups)
            expected -= attention_size(name, len(row), len({head.group for head in row}))
        assert sum(parameter.numel() for parameter in small.parameters()) == expected
        sizes.add(expected)
    assert len(sizes) > 2


def test_shapes_of_projections() -> None:
    model = build("llama-bias")  # two groups of three
    small = hl.prune(model, hl.HeadMask([[1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1], [1] * 6]))
    parts = [[getattr(layer.self_attn, f"{part}_proj") for part in "qkvo"] for layer in small.model.layers]
    shapes = [[tuple(projection.weight.shape) for projection in layer] for layer in parts]
    assert shapes[0] == [(40, 42), (20, 42), (20, 42), (42, 40)]  # heads 0 and 1, head 4 and a slot of zeros
    assert shapes[1] == [(30, 42), (10, 42), (10, 42), (42, 30)]
    assert shapes[2] == [(60, 42), (20, 42), (20, 42), (42, 60)]
    assert [[len(projection.bias) for projection in layer] for layer in parts] == [[s[0] for s in row] for row in shapes]
    (q, _, _, o), dense = parts[0], model.model.layers[0].self_attn.q_proj
    picked = [*range(20), *range(40, 50)]
    assert torch.equal(q.weight[:30], dense.weight[picked])
    assert torch.equal(q.bias[:30], dense.bias[picked])
    assert not any(padding.any() for padding in (q.weight[30:], q.bias[30:], o.weight[:, 30:]))


def test_uneven_groups_keep_labels_and_slots() -> None:
    model = build("llama-gqa")
    mask = hl.HeadMask([[0, 1, 0, 0, 1, 1], [1] * 6, [0] * 6], head_rows(model))
    for gqa, slots, groups in (("pad", [4, 6, 0], [2, 3, 0]), ("ungroup", [3, 6, 0], [3, 3, 0])):
        small = hl.prune(model, mask, gqa=gqa)
        assert hl.heads(small) == mask.kept
        report = hl.kept(small)
        assert report["heads"].tolist() == [3, 6, 0]
        assert report["heads_before"].tolist() == [6, 6, 6]
        assert report["slots"].tolist() == slots
        assert report["groups"].tolist() == groups
        assert report["groups_before"].tolist() == [3, 3, 3]
    assert hl.kept(model)["heads"].tolist() == [6, 6, 6]


def test_the_cache_is_as_small_as_the_groups() -> None:
    model = build("llama-gqa")
    mask = hl.HeadMask([[0, 1, 0, 0, 1, 1], [1] * 6, [0] * 6])
    for gqa, heads in (("pad", [2, 3, 1]), ("ungroup", [3, 3, 1])):
        cache = hl.prune(model, mask, gqa=gqa)(torch.ones(2, 5, dtype=torch.long)).past_key_values
        assert [layer.keys.shape[1] for layer in cache.layers] == heads


def test_strict_names_the_module() -> None:
    model = build("llama-gqa")
    uneven = hl.HeadMask([[1] * 6, [1, 1, 0, 1, 0, 0], [1] * 6])
    with pytest.raises(hl.HeadlabError, match=r"model\.layers\.1\.self_attn: the mask leaves \[2, 1\] query heads"):
        hl.prune(model, uneven, gqa="strict")
    even = hl.HeadMask([[1] * 6, [1, 0, 0, 0, 0, 1], [0] * 6])
    assert hl.kept(hl.prune(model, even, gqa="strict"))["slots"].tolist() == [6, 2, 0]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_input_stays_as_it_was(name: str) -> None:
    model, batch = build(name).train(), zoo.batch_for(name, labels=False)
    before, kind, config = copy.deepcopy(model.state_dict()), type(model), copy.deepcopy(model.config)
    kinds = [type(module) for module in model.modules()]
    small = hl.prune(model, random_mask(model, 3), hl.fill(model, [batch]))
    for parameter in small.parameters():
        parameter.data.fill_(7.0)
    assert_same(model.state_dict(), before)
    assert (type(model), [type(module) for module in model.modules()]) == (kind, kinds)
    assert (type(model.config), model.config.to_dict()) == (type(config), config.to_dict())
    assert model.training


@pytest.mark.parametrize("name", [*zoo.MHA_GQA_MQA, "gpt2", "bert", "t5"])
@pytest.mark.parametrize("gqa", ["pad", "ungroup"])
def test_pruning_twice_is_pruning_once(name: str, gqa: str) -> None:
    model, batch = build(name), zoo.batch_for(name, labels=False)
    first = hl.HeadMask([np.arange(len(row)) != 2 for row in head_rows(model)], head_rows(model))
    small = hl.prune(model, first, gqa=gqa)
    second = hl.HeadMask.without(hl.heads(small), [str(head) for head in hl.heads(small) if head.index in (0, 4)])
    smaller = hl.prune(small, second)
    both = hl.HeadMask.without(hl.heads(model), first.removed + second.removed)
    assert hl.heads(smaller) == both.kept
    with hl.masked(model, both):
        expected = outputs(model, batch)
    near(outputs(smaller, batch), expected)
    assert hl.kept(smaller)["heads_before"].tolist() == [len(row) for row in head_rows(model)]
    assert type(smaller) is type(small)


def test_a_padded_model_is_pruned_again() -> None:
    model, batch = build("llama-gqa"), zoo.batch_for("llama-gqa")
    padded = hl.prune(model, hl.HeadMask([[1, 0, 1, 1, 0, 0], [1] * 6, [1, 0, 1, 1, 1, 1]]))
    assert hl.kept(padded)["slots"].tolist() == [4, 6, 6]
    ungrouped = hl.prune(padded, hl.HeadMask([np.ones(len(row)) for row in head_rows(padded)]), gqa="ungroup")
    assert hl.kept(ungrouped)["slots"].tolist() == [3, 6, 5]
    assert hl.kept(ungrouped)["groups"].tolist() == [3, 3, 5]
    near(outputs(ungrouped, batch), outputs(padded, batch))
    for gone in ("L0H0", "L0H2", "L0H3", "L2H5"):
        check(padded, "llama-gqa", hl.HeadMask.without(hl.heads(padded), [gone]), hl.fill(padded, [batch]))


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma3", "bert-mlm", "t5"])
def test_a_bridge_is_pruned_like_its_model(name: str) -> None:
    model = build(name)
    mask, fill = random_mask(model, 5), hl.fill(model, [zoo.batch_for(name, labels=False)])
    bridge = hl.bridge(model)
    plain, bridged = hl.prune(model, mask, fill), hl.prune(bridge, mask, fill)
    assert type(plain) is type(bridged)
    assert_same(bridged.state_dict(), plain.state_dict())
    near(outputs(bridged, zoo.batch_for(name, labels=False)), outputs(plain, zoo.batch_for(name, labels=False)))
    assert isinstance(bridge.original_model, type(model))


def test_a_bridge_with_folded_weights_is_an_error() -> None:
    bridge = hl.bridge(build("gpt2"))
    bridge.enable_compatibility_mode()
    with pytest.raises(hl.HeadlabError, match="compatibility mode"):
        hl.prune(bridge, without_rows(bridge, 0))


def test_bad_input() -> None:
    model, batch = build("llama-gqa"), zoo.batch_for("llama-gqa")
    mask, other = random_mask(model, 1), zoo.build("llama-gqa", seed=1)
    with pytest.raises(hl.HeadlabError, match="leave that block"), hl.masked(model, mask):
        hl.prune(model, mask)
    with pytest.raises(hl.HeadlabError, match="leave that block"), hl.capture(model):
        hl.prune(model, mask)
    with pytest.raises(hl.HeadlabError, match="made for another model"):
        hl.prune(other, hl.importance(model, [batch]).keep(0.5))
    with pytest.raises(hl.HeadlabError, match="but the model has 3 x 6"):
        hl.prune(model, hl.HeadMask([[1] * 5] * 3))
    with pytest.raises(hl.HeadlabError, match="measured on another model"):
        hl.prune(other, mask, hl.fill(model, [batch]))
    with pytest.raises(hl.HeadlabError, match="'pad', 'ungroup' or 'strict', not 'even'"):
        hl.prune(model, mask, gqa="even")
    with pytest.raises(hl.HeadlabError, match="has one site"):
        hl.prune(model, mask, site="pattern")
    for options, how in (({"per_position": True}, "mean per position"), ({"kind": "resample"}, "resample")):
        with pytest.raises(hl.HeadlabError, match=f"a fill of kind '{how}' depends on the input"):
            hl.prune(model, mask, hl.fill(model, [batch], **options))
    assert type(hl.prune(model, mask)).__name__ == "PrunedLlamaForCausalLM"
