from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

import headlab as hl
from headlab.dcmha.maps import composition_maps
from headlab.hooks.patterns import Look, at_patterns
from headlab.models.access import bare_model, rows
from headlab.models.attention_modules import Attention
from tests.helpers import zoo


def looks(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> dict[int, Look]:
    """What is seen in one forward pass, by row."""
    seen: dict[int, Look] = {}

    def see(row: Attention, look: Look) -> None:
        assert row.row not in seen
        seen[row.row] = look

    with torch.no_grad(), at_patterns(model, see, **options):
        bare_model(model)(**batch)
    return seen


@contextmanager
def eager(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    if before != "headlab_composed":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def returned(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The patterns that transformers itself returns, in the order of rows."""
    with torch.no_grad(), eager(model):
        output = model(**batch, output_attentions=True)
    if "encoder_attentions" in output:
        return [*output.encoder_attentions, *output.decoder_attentions, *output.cross_attentions]
    return list(output.attentions)


@pytest.mark.parametrize("name", zoo.ALL)
def test_patterns_are_those_that_the_eager_model_returns(name: str) -> None:
    model, batch = zoo.build(name).double(), zoo.batch_for(name, labels=False)
    implementation = model.config._attn_implementation
    expected = returned(model, batch)
    assert model.config._attn_implementation == implementation
    seen = looks(model, batch, scores=True)
    assert sorted(seen) == list(range(len(expected))) == [row.row for row in rows(model)]
    for row, pattern in enumerate(expected):
        look = seen[row]
        torch.testing.assert_close(look.pattern, pattern, rtol=0, atol=0)
        assert not look.pattern.requires_grad
        assert look.scores is not None
        sees = look.scores.isfinite().any(-1)  # not a query that is padding before the first key, as composed heads have
        again = look.scores.softmax(-1)
        torch.testing.assert_close(again[sees], look.raw[sees], rtol=0, atol=1e-6)  # many models take it in float32
        assert (look.raw[look.scores == -torch.inf] == 0).all()
        if name not in zoo.COMPOSED:
            assert look.raw is look.pattern
        if rows(model)[row].stack in ("", "enc"):
            assert look.run.real.equal(batch["attention_mask"].bool())
            padding = ~look.run.real[:, None, None].expand_as(look.pattern)
            assert (look.pattern[padding] == 0).all()


@pytest.mark.parametrize("name", [*zoo.BRIDGED, "dcformer-gqa", "dcpythia"])
def test_bridges_show_what_their_models_show(name: str) -> None:
    model, batch = zoo.build(name).double(), zoo.batch_for(name, labels=False)
    whole, bridged = looks(model, batch, scores=True), looks(hl.bridge(model), batch, scores=True)
    assert whole.keys() == bridged.keys()
    for row, look in whole.items():
        for field in ("pattern", "raw", "scores"):
            ours, theirs = getattr(look, field), getattr(bridged[row], field)
            torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-7 if name == "neox" else 1e-12)  # float32 inside


@pytest.mark.parametrize("name", ["dcformer-mha", "dcformer-gqa", "dcformer-mqa"])
def test_composed_patterns_are_raw_ones_through_the_post_maps(name: str) -> None:
    model, batch = zoo.build(name), zoo.batch_for(name, padded=False)
    maps = composition_maps(model, batch)
    for row, look in looks(model, batch).items():
        torch.testing.assert_close(look.raw.sum(-1), torch.ones(zoo.BATCH, 6, zoo.POS))
        assert (look.pattern.sum(-1) - 1).abs().max() > 0.1
        for example, query, key in ((0, 6, 3), (3, 4, 4), (2, 5, 1)):
            mixed = look.raw[example, :, query, key] @ maps.dense(row, "post", query, key, example)
            torch.testing.assert_close(look.pattern[example, :, query, key], mixed)


def test_scores_are_queries_times_keys() -> None:
    model, batch = zoo.build("gpt2").double(), zoo.batch_for("gpt2", padded=False)
    seen = looks(model, batch, scores=True)
    body = model.transformer
    x = body.h[0].ln_1(body.wte(batch["input_ids"]) + body.wpe.weight[: zoo.POS])
    q, k, _ = (part.unflatten(-1, (5, 7)) for part in body.h[0].attn.c_attn(x).split(35, -1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 7**0.5
    hidden = torch.ones(zoo.POS, zoo.POS).triu(1).bool()
    torch.testing.assert_close(seen[0].scores, scores.masked_fill(hidden, -torch.inf).detach())
    assert looks(model, batch)[0].scores is None


def test_soft_caps_are_in_the_scores() -> None:
    model, batch = zoo.build("gemma2"), zoo.batch_for("gemma2", padded=False)
    free = looks(model, batch, scores=True)[0].scores
    model.config.attn_logit_softcapping = 0.1
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.1
    capped = looks(model, batch, scores=True)[0].scores
    assert free is not None
    assert capped is not None
    visible = free.isfinite()
    assert free[visible].abs().max() > 0.1 > capped[visible].abs().max()


@pytest.mark.parametrize("bridged", [False, True], ids=["plain", "bridge"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma3", "dcformer-gqa", "bert-mlm", "t5"])
def test_one_layer_is_gone_before_the_next_one_is_seen(name: str, bridged: bool) -> None:
    model: Any = zoo.build(name)
    model = hl.bridge(model) if bridged else model
    memory: list[weakref.ref[Any]] = []
    at_once = []

    def see(_: Attention, look: Look) -> None:
        memory.append(weakref.ref(look.pattern.untyped_storage()))
        at_once.append(sum(ref() is not None for ref in memory))

    batch = zoo.batch_for(name, labels=False)
    with torch.no_grad(), at_patterns(model, see):
        bare_model(model)(**batch)
    assert at_once == [1] * len(rows(model))
    assert not any(ref() is not None for ref in memory)
    kept = []
    with torch.no_grad(), at_patterns(model, lambda row, look: (see(row, look), kept.append(look.pattern))):
        bare_model(model)(**batch)
    assert at_once[len(rows(model)) :] == list(range(1, len(rows(model)) + 1))  # so it would have been noticed


@pytest.mark.parametrize("name", ["llama-gqa", "dcformer-mqa", "bert-classifier", "t5"])
def test_the_model_is_as_it_was_also_after_an_error(name: str) -> None:
    model, batch = zoo.build(name).train(), zoo.batch_for(name, labels=False)
    list(model.modules())[3].training = False
    before = [(module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    implementation = model.config._attn_implementation
    parts = [module.config for module in model.modules() if hasattr(module, "config")]

    def fail(row: Attention, look: Look) -> None:
        assert not any(module.training for module in model.modules())
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"), at_patterns(model, fail, scores=True):
        model(**batch)
    assert before == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert {part._attn_implementation for part in parts} == {implementation}
    assert len(looks(model, batch)) == len(rows(model))  # and it still runs
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager", "flex_attention"])
def test_any_implementation_is_eager_inside_and_comes_back(implementation: str) -> None:
    model, batch = zoo.build("t5").double(), zoo.batch_for("t5", labels=False)
    expected = returned(model, batch)
    with eager(model), torch.no_grad():
        logits = model(**batch).logits
    parts = [model.config, model.encoder.config, model.decoder.config]
    for part in parts:
        part._attn_implementation = implementation
    parts[1]._attn_implementation = "sdpa"
    seen: dict[int, Tensor] = {}
    with torch.no_grad(), at_patterns(model, lambda row, look: seen.update({row.row: look.pattern})):
        assert [part._attn_implementation for part in parts] == ["eager"] * 3
        torch.testing.assert_close(model(**batch).logits, logits, rtol=0, atol=0)
    assert [part._attn_implementation for part in parts] == [implementation, "sdpa", implementation]
    for row, pattern in enumerate(expected):
        assert seen[row].equal(pattern)


def test_dropout_is_off() -> None:
    model = zoo.build("t5")
    batch = zoo.batch_for("t5", labels=False)
    still = looks(model, batch)
    for row, look in looks(model.train(), batch).items():
        assert look.pattern.equal(still[row].pattern)


@pytest.mark.parametrize("name", zoo.ALL)
def test_one_token(name: str) -> None:
    model = zoo.build(name)
    batch = {"input_ids": torch.tensor([[7]])}
    if name == "t5":
        batch["decoder_input_ids"] = torch.tensor([[5]])
    for row, look in looks(model, batch, scores=True).items():
        assert look.pattern.shape == look.raw.shape == (1, len(rows(model)[row].heads), 1, 1)
        torch.testing.assert_close(look.raw, torch.ones_like(look.raw))
        assert look.scores is not None
        assert look.scores.isfinite().all()


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gpt2", "dcformer-gqa", "t5"])
def test_generation_shows_a_row_of_the_pattern_at_a_time(name: str) -> None:
    model = zoo.build(name).double()
    ids = zoo.batch_for(name, padded=False)["input_ids"]
    steps: dict[int, list[Tensor]] = {row.row: [] for row in rows(model)}
    with at_patterns(model, lambda row, look: steps[row.row].append(look.pattern)):
        out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    batch = {"input_ids": ids, "decoder_input_ids": out[:, :-1]} if name == "t5" else {"input_ids": out[:, :-1]}
    for row, look in looks(model, batch).items():
        if rows(model)[row].stack == "enc":
            assert [x.shape[2] for x in steps[row]] == [zoo.POS]
            continue
        assert [x.shape[2] for x in steps[row][1:]] == [1, 1, 1]
        n = look.pattern.shape[2]
        for before, last in enumerate(reversed(steps[row][1:])):
            whole = look.pattern[:, :, n - 1 - before]
            width = last.shape[3]  # a cache keeps no more keys than a window
            part = whole if rows(model)[row].stack == "cross" else whole[..., n - before - width : n - before]
            torch.testing.assert_close(last[:, :, 0], part, rtol=0, atol=1e-6)


RAGGED = {
    "llama-gqa": ["L0H0", "L0H2", "L0H3", "L1H4", "L2H0", "L2H1", "L2H2", "L2H3", "L2H4"],
    "llama-mqa": ["L0H5", "L2H0", "L2H3"],
    "gpt2": ["L0H1", *(f"L1H{i}" for i in range(5)), "L2H0", "L2H4"],
    "dcformer-gqa": ["L0H1", "L2H0", "L2H4"],
    "bert": ["L0H1", *(f"L1H{i}" for i in range(5)), "L2H0"],
    "t5": ["enc.L0H0", "enc.L0H3", *(f"dec.L0H{i}" for i in range(5)), "cross.L1H2"],
}


@pytest.mark.parametrize("name", RAGGED)
def test_pruned_models_show_the_heads_that_are_left(name: str) -> None:
    model, batch = zoo.build(name).double(), zoo.batch_for(name, labels=False)
    mask = hl.HeadMask.without(hl.heads(model), RAGGED[name])
    pruned = hl.prune(model, mask)
    with hl.masked(model, mask):
        whole = looks(model, batch, scores=True)
    seen = looks(pruned, batch, scores=True)
    assert [row.row for row in rows(pruned) if row.heads] == sorted(seen)
    for row in rows(pruned):
        if row.heads:
            left = [head.index for head in row.heads]
            look, before = seen[row.row], whole[row.row]
            torch.testing.assert_close(look.pattern, before.pattern[:, left], rtol=0, atol=1e-6)
            raw = [head.index for head in row.at("probabilities").heads] if row.compose is not None else left
            torch.testing.assert_close(look.raw, before.raw[:, raw], rtol=0, atol=1e-6)
            torch.testing.assert_close(look.scores, before.scores[:, raw], rtol=0, atol=1e-6)
    if name == "llama-gqa":
        assert any(None in row.slots for row in rows(pruned))  # padding is left out


def test_a_mask_around_it_is_in_what_is_seen() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    plain = looks(model, batch)
    with hl.masked(model, hl.HeadMask.without(hl.heads(model), ["L0H1"])):
        masked = looks(model, batch)
    assert masked[0].pattern.equal(plain[0].pattern)
    assert not masked[1].pattern.allclose(plain[1].pattern)


def test_only_some_modules_and_nested() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    whole = looks(model, batch)
    outer: dict[int, Tensor] = {}
    with at_patterns(model, lambda row, look: outer.update({row.row: look.pattern})):
        some = looks(model, batch, wanted=rows(model)[1:2], scores=True)
        assert model.config._attn_implementation == "eager"
    assert list(some) == [1]
    assert sorted(outer) == [0, 1, 2]
    assert some[1].pattern.equal(whole[1].pattern)
    assert all(outer[row].equal(look.pattern) for row, look in whole.items())


@pytest.mark.parametrize("name", ["llama-gqa", "dcformer-mha", "t5"])
def test_who_asks_for_the_patterns_of_transformers_still_gets_them(name: str) -> None:
    model, batch = zoo.build(name), zoo.batch_for(name, labels=False)
    seen: list[Tensor] = []
    field = "encoder_attentions" if name == "t5" else "attentions"
    with torch.no_grad(), at_patterns(model, lambda _, look: seen.append(look.pattern)):
        given = [model(**batch, output_attentions=True)[field]]
        if name != "t5":  # whose parts have configs of their own
            model.config.output_attentions = True
            given.append(model(**batch)[field])
    for number, patterns in enumerate(given):
        first = seen[number * len(rows(model)) :]
        assert len(patterns) == zoo.LAYERS
        assert all(theirs.equal(ours) for theirs, ours in zip(patterns, first, strict=False))


def test_modules_that_show_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = zoo.build("llama-gqa")
    batch = zoo.batch_for("llama-gqa")
    forward = model.model.layers[1].self_attn.forward
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda *a, **k: (forward(*a, **k)[0], None))
    with pytest.raises(hl.HeadlabError, match=r"model.layers.1.self_attn \(LlamaAttention\) should .* returned none"):
        looks(model, batch)
    wrong = torch.zeros(4, 5, 7, 7)
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda *a, **k: (forward(*a, **k)[0], wrong))
    with pytest.raises(hl.HeadlabError, match=r"6 heads, query, key\], but it returned a tensor of shape \(4, 5, 7, 7\)"):
        looks(model, batch)
    monkeypatch.undo()
    monkeypatch.setattr(LlamaAttention, "__call__", lambda self, *a, **k: self.forward(*a, **k))
    with pytest.raises(hl.HeadlabError, match=r"layers.0.self_attn, .* ran, but not as a module that was called"):
        looks(model, batch)
    monkeypatch.undo()
    assert model.config._attn_implementation == "sdpa"
    assert len(looks(model, batch)) == 3


def test_scores_that_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = zoo.build("gpt2"), zoo.batch_for("gpt2")
    attention: Any = model.transformer.h[0].attn
    forward = attention.forward

    def other(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        torch.zeros(1, 1, 1, 2).softmax(-1)
        return output

    monkeypatch.setattr(attention, "forward", other)
    with pytest.raises(hl.HeadlabError, match=r"h.0.attn \(GPT2Attention\) took no softmax of scores"):
        looks(model, batch, scores=True)
    assert len(looks(model, batch)) == 3


@settings(max_examples=15)
@given(st.sampled_from(zoo.MHA_GQA_MQA), st.integers(1, 3), st.integers(1, 9), st.integers(0, 8))
def test_probabilities_of_any_batch(name: str, n_batch: int, n_pos: int, n_pad: int) -> None:
    model = zoo.build(name)
    ids = torch.from_numpy(np.random.default_rng(n_pos).integers(3, zoo.VOCAB, (n_batch, n_pos)))
    mask = torch.ones_like(ids)
    mask[-1, : min(n_pad, n_pos - 1)] = 0  # on the left
    for look in looks(model, {"input_ids": ids, "attention_mask": mask}).values():
        real = look.run.real
        assert real.equal(mask.bool())
        assert look.pattern.shape == (n_batch, 6, n_pos, n_pos)
        by_query = look.pattern.transpose(1, 2)[real]  # [real query, head, key]
        torch.testing.assert_close(by_query.sum(-1), torch.ones(len(by_query), 6))
        queries = torch.arange(n_pos).expand(n_batch, n_pos)[real]
        assert (by_query[(torch.arange(n_pos) > queries[:, None])[:, None].expand_as(by_query)] == 0).all()
