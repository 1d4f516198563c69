"""Composable heads attached to other models: nothing changes at first, everything learns, and dumb loops agree."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from math import sqrt
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import headlab as hl
from headlab.dcmha import BRANCHES, PLACES, Compose, DCFormerConfig, DCFormerForCausalLM, attach, backends, detach, scaled
from headlab.models.attention_modules import attentions
from headlab.models.families import families
from tests.helpers import zoo
from tests.helpers.dcmha_loop import Maps
from tests.helpers.surgical import in_steps, near, prompt

SOME = ["gpt2", "neox", "llama-mha", "llama-gqa", "llama-mqa", "bert-mlm", "vit"]
MORE = ["llama-bias", "mistral", "qwen2", "qwen3", "gemma3", "granite", "bert", "bert-classifier", "bert-decoder", "roberta",
        "electra"]  # fmt: skip
CAUSAL = ["gpt2", "neox", "llama-mha", "llama-gqa", "llama-mqa"]
AUTO = {"bert-mlm": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification"}
LOW_RANK = [place for place in PLACES if place.endswith(("_query", "_key"))]
GATES = [place for place in PLACES if place.endswith("_gate")]
_VIT = {
    "hidden_size": 35, "num_hidden_layers": zoo.LAYERS, "num_attention_heads": 5, "intermediate_size": 59, "num_labels": 11,
    "image_size": 12, "patch_size": 4, "num_channels": 2,
}  # fmt: skip
OWN = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT)),
    "bert-decoder": lambda: hf.BertLMHeadModel(hf.BertConfig(**zoo._BERT, is_decoder=True)),
    "gpt2-classifier": lambda: hf.GPT2ForSequenceClassification(
        hf.GPT2Config(**zoo._COMMON, n_embd=35, n_layer=zoo.LAYERS, n_head=5, n_positions=61, n_inner=59, num_labels=3)
    ),
}


def build(name: str) -> hf.PreTrainedModel:
    """A tiny random model with transformers' eager attention."""
    with patch.dict(zoo.ZOO, OWN):
        model = zoo.build(name)
    model.set_attn_implementation("eager")
    return model


def batch_for(name: str, labels: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        batch = {"pixel_values": torch.randn(zoo.BATCH, 2, 12, 12, generator=generator)}
        return batch | ({"labels": torch.tensor([0, 2, 1, 7])} if labels else {})
    batch = zoo.batch_for(name, labels=labels)
    if labels and "labels" not in batch:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def perturbed(model: hf.PreTrainedModel, seed: int = 0, size: float = 0.3) -> hf.PreTrainedModel:
    """The model with maps far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    for compose in maps_of(model):
        for parameter in compose.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = size * noise.to(parameter.dtype)
    return model


def maps_of(model: nn.Module) -> list[Compose]:
    return [module for module in model.modules() if isinstance(module, Compose)]


def outputs(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **options)[0]


def generated(model: nn.Module, start: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    found = model.generate(
        **start, max_new_tokens=6, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


# --- at first


@pytest.mark.parametrize("name", [*SOME, *MORE])
def test_at_first_nothing_changes(name: str) -> None:
    model, batch = build(name), batch_for(name)
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True, output_attentions=True)
        found = attach(model)(**batch, output_hidden_states=True, output_attentions=True)
    assert (found[0] - before[0]).abs().max() == 0
    for what in ("hidden_states", "attentions"):
        assert len(found[what]) == len(before[what]) >= zoo.LAYERS
        assert all(torch.equal(one, other) for one, other in zip(found[what], before[what], strict=True))


@pytest.mark.parametrize("name", [*CAUSAL, "bert-decoder", "qwen3"])
def test_at_first_generation_is_the_same(name: str) -> None:
    start = prompt(name)  # padded on the left
    model = build(name)
    tokens, logits = generated(model, start)
    found, ours = generated(attach(model), start)
    assert torch.equal(found, tokens)
    assert torch.equal(ours, logits)


def test_at_first_nothing_changes_in_training_with_dropout() -> None:
    config = hf.LlamaConfig(**zoo._LLAMA, num_key_value_heads=3, attention_dropout=0.3)
    model, batch = hf.LlamaForCausalLM(config).train(), batch_for("llama-gqa", labels=True)
    model.set_attn_implementation("eager")
    torch.manual_seed(5)
    before = model(**batch).logits
    attach(model)
    torch.manual_seed(5)
    assert torch.equal(model(**batch).logits, before)
    assert not torch.equal(model(**batch).logits, before)
    assert torch.equal(outputs(model.eval(), batch), outputs(model, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_at_first_nothing_changes_in_half_precision(dtype: torch.dtype) -> None:
    model, batch = build("llama-gqa").to(dtype), batch_for("llama-gqa")
    before = outputs(model, batch)
    attach(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(outputs(model, batch), before)
    found = outputs(perturbed(model, size=0.1), batch)
    assert (found - outputs(model.float(), batch)).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_hidden_states_and_patterns_can_be_asked_for_afterwards(name: str) -> None:
    model = attach(build(name))
    with torch.no_grad():
        found = model(**batch_for(name), output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == zoo.LAYERS + 1
    assert [pattern.shape[1] for pattern in found.attentions] == [5, 5, 5]


def test_what_a_user_has_as_default_changes_by_rounding_only() -> None:
    model, batch = zoo.build("gpt2"), batch_for("gpt2")
    assert model.config._attn_implementation == "sdpa"
    before = outputs(model, batch)
    near(outputs(attach(model), batch), before)


@pytest.mark.parametrize(
    "options",
    [
        {"residual": False},
        {"residual": False, "branches": ["base"], "groups": 3},
        {"stages": []},
        {"branches": ["pre_key", "post_query_gate"], "rank": 1, "groups": 2, "hidden": 5},
    ],
)
def test_at_first_nothing_changes_whatever_the_options(options: dict[str, Any]) -> None:
    model, batch = build("llama-gqa"), batch_for("llama-gqa")
    before = outputs(model, batch)
    assert torch.equal(outputs(attach(model, **options), batch), before)


# --- learning


def pieces(compose: Compose) -> dict[str, Tensor]:
    """The weights of every branch at every stage."""
    found = {f"{place}": weight for place, weight in zip(GATES, compose.dd.weight.chunk(len(GATES)), strict=True)}
    for i, place in enumerate(place for place in PLACES if place.endswith("base")):
        found[place] = compose.base.weight[i]
    for i, place in enumerate(LOW_RANK):
        found[f"{place} w1"] = compose.qkw.weight[i, :, :, : compose.rank]
        found[f"{place} w2"] = compose.qkw.weight[i, :, :, compose.rank :]
        found[f"{place} dw1"] = compose.dw1.weight.chunk(len(LOW_RANK))[i]
    return found


@pytest.mark.parametrize("name", SOME)
def test_every_branch_learns(name: str) -> None:
    model = attach(build(name)).train()
    batch, first = batch_for(name, labels=True), outputs(model.eval(), batch_for(name))
    start = [{key: x.detach().clone() for key, x in pieces(compose).items()} for compose in maps_of(model)]
    for compose in start:
        for key, x in compose.items():
            assert bool(x.any()) == key.endswith("w1"), key  # also dw1
    optimizer = torch.optim.SGD([p for compose in maps_of(model) for p in compose.parameters()], lr=1.0)
    for step in range(4):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if step == 0:
            assert all(bool(compose.dd.weight.grad.any()) for compose in maps_of(model))
            assert all(bool(compose.base.weight.grad.any()) for compose in maps_of(model))
            assert all(bool(compose.qkw.weight.grad[..., compose.rank :, :].any()) for compose in maps_of(model))
        optimizer.step()
    assert len(start) == zoo.LAYERS
    for compose, was in zip(maps_of(model), start, strict=True):
        still = [key for key, x in pieces(compose).items() if torch.equal(x, was[key])]
        assert still == []
    assert (outputs(model, batch_for(name)) - first).abs().max() > 1e-3


def test_the_whole_model_trains() -> None:
    model, batch = attach(build("gpt2")), batch_for("gpt2", labels=True)
    model(**batch).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert bool(model.transformer.h[0].attn.c_attn.weight.grad.any())


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_gradients_are_slopes(backend: str) -> None:
    model = perturbed(attach(build("gpt2"), backend=backend)).double()
    x, direction = torch.randn(2, 3, 7, 35, dtype=torch.float64)
    x.requires_grad_()
    (model(inputs_embeds=x).logits ** 2).sum().backward()
    with torch.no_grad():
        above, below = ((model(inputs_embeds=x + step * direction).logits ** 2).sum() for step in (1e-6, -1e-6))
    torch.testing.assert_close((x.grad * direction).sum(), (above - below) / 2e-6, rtol=1e-6, atol=0)


# --- against loops


class Spy:
    """Transformers' eager attention, which keeps what it was given in the first layer."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        self.given = self.given or {"q": query, "k": key, "v": value, "scale": scaling}
        n = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(n, 1), value.repeat_interleave(n, 1)
        scores = query @ key.transpose(-1, -2) * scaling
        pattern = (scores if mask is None else scores + mask).softmax(-1)
        return (pattern @ value).transpose(1, 2), pattern


def first_layer(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Spy, dict[str, Tensor]]:
    """What attention in the first layer of the plain model is made of; x is the input of its queries' projection."""
    spy, row, found = Spy(), attentions(model)[0], {}
    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", eager_mask)
    hook = row.projection(row.family.q).register_forward_pre_hook(lambda _, args: found.update(x=args[0]))
    model.set_attn_implementation("spy")
    outputs(model, batch)
    model.set_attn_implementation("eager")
    hook.remove()
    return spy, found


def looped(model: nn.Module, spy: Spy, x: Tensor, example: int, seen: np.ndarray) -> np.ndarray:
    """z of one example in the first layer, [query, head, d_head]; `seen` is [query, key]."""
    compose, options = maps_of(model)[0], model.config.composed
    weights = {name: parameter.detach().numpy() for name, parameter in compose.named_parameters()}
    maps = Maps(weights, compose.n_heads, frozenset(compose.places), options["rank"], options["groups"], options["residual"])
    tokens = list(x[example].numpy())
    pre, post = maps.whole("pre", tokens, tokens), maps.whole("post", tokens, tokens)
    q, k, v = (spy.given[name][example].numpy() for name in "qkv")
    shared = len(q) // len(k)
    out = np.zeros((len(tokens), len(q), v.shape[-1]))
    for i in range(len(tokens)):
        keys = [j for j in range(len(tokens)) if seen[i, j]]
        raw = [[q[h, i] @ k[h // shared, j] * spy.given["scale"] for h in range(len(q))] for j in keys]
        scores = np.array([np.array(raw[row]) @ pre[i][j] for row, j in enumerate(keys)])
        exp = np.exp(scores - scores.max(0))
        pattern = exp / exp.sum(0)
        for row, j in enumerate(keys):
            composed = pattern[row] @ post[i][j]
            for h in range(len(q)):
                out[i, h] += composed[h] * v[h // shared, j]
    return out


def seen_by(name: str, batch: dict[str, Tensor], example: int, n_pos: int) -> np.ndarray:
    seen = np.ones((n_pos, n_pos), dtype=bool)
    if "attention_mask" in batch:
        seen &= batch["attention_mask"][example].numpy().astype(bool)
    return np.tril(seen) if name in (*CAUSAL, "bert-decoder") else seen


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in [*SOME, "bert-decoder"]),
        ("llama-gqa", {"groups": 2, "rank": 3}),
        ("llama-mqa", {"branches": ["query", "pre_key_gate", "post_base"], "rank": 1}),
        ("gpt2", {"residual": False, "hidden": 3}),
        ("bert-mlm", {"stages": ["post"], "rank": 5}),
        ("neox", {"groups": 5, "rank": 1}),
    ],
)
def test_like_loops(name: str, options: dict[str, Any]) -> None:
    model, batch = build(name).double(), batch_for(name)
    batch = {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}
    if name == "llama-mha":  # what q, k and v are made of is also what maps are made of
        hidden = model.model.layers[0].self_attn
        hidden.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"hidden_states": kwargs["hidden_states"] * 0.7}), with_kwargs=True
        )
    spy, made_of = first_layer(model, batch)
    perturbed(attach(model, **options))
    row, found = attentions(model)[0], []
    row.projection(row.family.o).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    outputs(model, batch)
    for example in (0, 2):
        seen = seen_by(name, batch, example, made_of["x"].shape[1])
        expected = looped(model, spy, made_of["x"], example, seen)
        np.testing.assert_allclose(found[0][example].numpy(), expected.reshape(len(expected), -1), rtol=0, atol=1e-11)


# --- backends


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bert-mlm", "vit"])
def test_backends_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BLOCK", 3)
    model, batch = perturbed(attach(build(name), backend="chunked")).double(), batch_for(name, labels=True)
    found = model(**batch)
    found.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.config.composed["backend"] = "eager"
    expected = model(**batch)
    expected.loss.backward()
    near(found.logits, expected.logits, atol=1e-6)  # norms and rotary positions are in float32
    for one, other in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SOME)
def test_chunked_has_no_patterns(name: str) -> None:
    model, batch = attach(build(name), backend="chunked"), batch_for(name)
    with pytest.raises(hl.HeadlabError, match=r"the 'chunked' backend has no attention patterns: set model.config.composed"):
        model(**batch, output_attentions=True)
    assert outputs(model, batch, output_attentions=False).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, batch = perturbed(attach(build(name))).train(), batch_for(name, labels=True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert all(compose.qkw.weight.grad.any() for compose in maps_of(model))


# --- caches


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in [*CAUSAL, "bert-decoder", "qwen3", "gemma3"]),
        *((name, {"num_beams": 3}) for name in ["gpt2", "llama-gqa"]),
        *((name, {"cache_implementation": "static"}) for name in ["neox", "llama-mqa", "qwen3"]),
    ],
)
def test_generation_with_a_cache(name: str, options: dict[str, Any]) -> None:
    model, start = perturbed(attach(build(name))), prompt(name)
    tokens, logits = generated(model, start, **options)
    slow = {key: value for key, value in options.items() if key != "cache_implementation"}
    found, expected = generated(model, start, use_cache=False, **slow)
    assert torch.equal(tokens, found)
    near(logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", [*CAUSAL, "mistral", "qwen3"])
def test_a_text_in_several_steps(name: str) -> None:
    model, ids = perturbed(attach(build(name))), torch.randint(3, zoo.VOCAB, (2, 11))
    near(in_steps(model, ids, (4, 3, 1, 3)), outputs(model, {"input_ids": ids}), atol=1e-4)


def test_other_kinds_of_caches() -> None:
    model, ids = perturbed(attach(build("gpt2"))), torch.randint(3, zoo.VOCAB, (2, 11))
    expected = outputs(model, {"input_ids": ids})
    for cache in (EncoderDecoderCache(DynamicCache(), DynamicCache()), StaticCache(model.config, max_cache_len=17)):
        steps = [outputs(model, {"input_ids": part}, past_key_values=cache) for part in ids.split((5, 1, 5), dim=1)]
        near(torch.cat(steps, 1), expected, atol=1e-4)
        assert cache.get_seq_length() == 11


def test_what_a_cache_holds() -> None:
    heads, d_head, ids = 5, 7, torch.tensor([[3, 4, 5]])
    for branches, width in (
        (BRANCHES, d_head + 2 * (2 * 2 * heads + heads) / heads),  # two stages: w1 and w2 of rank 2, and a gate
        (["base", "query", "query_gate"], d_head),
    ):
        cache = DynamicCache()
        outputs(attach(build("gpt2"), branches=branches), {"input_ids": ids}, past_key_values=cache)
        assert cache.layers[0].keys.shape == (1, heads, 3, width)
        assert cache.layers[0].values.shape == (1, heads, 3, d_head)


def test_a_cache_of_another_model() -> None:
    model, ids = build("gpt2"), torch.tensor([[3, 4, 5]])
    cache = model(input_ids=ids).past_key_values
    with pytest.raises(hl.HeadlabError, match="cache is of another model"):
        attach(model)(input_ids=ids, past_key_values=cache)


# --- masks


def test_masks_of_a_users_own() -> None:
    model, batch = perturbed(attach(build("gpt2"))), batch_for("gpt2")
    expected = outputs(model, batch)
    seen = torch.ones(zoo.POS, zoo.POS).tril().bool() & batch["attention_mask"][:, None, None].bool()
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added, added.clamp(min=-1e4), added.masked_fill(~seen, -torch.inf)):
        assert torch.equal(outputs(model, {"input_ids": batch["input_ids"], "attention_mask": mask}), expected)
    with pytest.raises(hl.HeadlabError, match="mask adds other numbers than 0"):
        model(input_ids=batch["input_ids"], attention_mask=added.clamp(min=-3))


def test_an_attention_module_by_itself() -> None:
    model = perturbed(attach(build("gpt2")))
    attn, x = model.transformer.h[0].attn, torch.randn(2, 7, 35)
    causal = torch.ones(1, 1, 7, 7).tril().bool()
    with torch.no_grad():
        assert torch.equal(attn(x)[0], attn(x, attention_mask=causal)[0])
        everything = attn(x, attention_mask=torch.ones(1, 1, 1, 7).bool())[0]
        assert torch.equal(attn(x, is_causal=False)[0], everything)
        assert not torch.equal(attn(x)[0], everything)
        encoder = perturbed(attach(build("bert"))).encoder.layer[0].attention
        full = torch.ones(1, 1, 7, 7).bool()
        near(encoder(x)[0], encoder(x, attention_mask=full)[0])


class Duck:
    """Something that keeps keys and values, but is no cache of transformers."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def update(self, k: Tensor, v: Tensor, _: int) -> tuple[Tensor, Tensor]:
        self.kept = [torch.cat(pair, 2) for pair in zip(self.kept, (k, v), strict=True)] if self.kept else [k, v]
        return self.kept[0], self.kept[1]


def test_an_attention_module_by_itself_with_a_cache() -> None:
    model = perturbed(attach(build("gpt2")))
    attn, x = model.transformer.h[0].attn, torch.randn(2, 7, 35)
    with torch.no_grad():
        cache, duck, expected = DynamicCache(), Duck(), attn(x)[0]
        parts = [part.contiguous() for part in x.split((3, 4), 1)]
        near(torch.cat([attn(part, past_key_values=cache)[0] for part in parts], 1), expected)
        near(attn(x, past_key_values=duck)[0], expected)
        with pytest.raises(hl.HeadlabError, match="has 14 keys, but maps know of 7 tokens"):
            attn(x, past_key_values=duck)


# --- never silently without composition


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bert-mlm", "vit"])
@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_another_attention_implementation_is_an_error(name: str, other: str) -> None:
    model, batch = perturbed(attach(build(name))), batch_for(name)
    expected = outputs(model, batch)
    model.set_attn_implementation(other)
    with pytest.raises(hl.HeadlabError, match=f"computed by '{other}', which does not compose heads"):
        model(**batch)
    model.set_attn_implementation("headlab_composed")
    assert torch.equal(outputs(model, batch), expected)


def test_our_implementation_needs_maps() -> None:
    model = build("gpt2")
    model.set_attn_implementation("headlab_composed")
    with pytest.raises(hl.HeadlabError, match="GPT2Attention has no composable heads"):
        model(**batch_for("gpt2"))


def test_what_attention_is_asked_for_must_be_known() -> None:
    model, batch = attach(build("llama-mha")), batch_for("llama-mha")
    with pytest.raises(hl.HeadlabError, match="asks its attention for s_aux, which"):
        model(**batch, s_aux=torch.ones(6))
    expected = outputs(model, batch)
    assert torch.equal(outputs(model, batch, s_aux=None, num_items_in_batch=3), expected)


def test_an_error_leaves_nothing_behind() -> None:
    model, batch = attach(build("llama-mha")), batch_for("llama-mha")
    with pytest.raises(hl.HeadlabError, match="s_aux"):
        model(**batch, s_aux=torch.ones(6))
    assert model.model.layers[0].self_attn.headlab_run is None
    outputs(model, batch)
    assert model.model.layers[0].self_attn.headlab_run is None


# --- saving, copying, detaching


def test_branches_can_be_switched_off() -> None:
    model, batch = build("llama-gqa"), batch_for("llama-gqa")
    before = outputs(model, batch)
    perturbed(attach(model))
    assert (outputs(model, batch) - before).abs().max() > 0.01
    with scaled(model, **dict.fromkeys(PLACES, 0)):
        assert torch.equal(outputs(model, batch), before)


def test_sites_can_be_hooked() -> None:
    model, batch = perturbed(attach(build("llama-gqa"))), batch_for("llama-gqa")
    with scaled(model, post_query=0):
        expected = outputs(model, batch)
    for compose in maps_of(model):
        compose.sites["post_query"].register_forward_hook(lambda _, __, ones: 0 * ones)
    assert torch.equal(outputs(model, batch), expected)


def test_a_copy_is_independent() -> None:
    model, batch = perturbed(attach(build("gpt2"))), batch_for("gpt2")
    assert not any(module.training for module in model.modules())
    expected = outputs(model, batch)
    other = copy.deepcopy(model)
    assert torch.equal(outputs(other, batch), expected)
    perturbed(other, seed=1)
    assert not torch.equal(outputs(other, batch), expected)
    assert torch.equal(outputs(model, batch), expected)


RELOAD = """
import json, sys
import headlab.dcmha
import transformers
from safetensors.torch import load_file, save_file

for folder, auto in json.loads(sys.argv[1]):
    model, batch = getattr(transformers, auto).from_pretrained(folder), load_file(folder + "/../batch.safetensors")
    save_file({"logits": model(**batch).logits.detach()}, folder + "/../found.safetensors")
"""


def test_a_fresh_process_opens_them_with_auto_classes(tmp_path: Path) -> None:
    expected, folders = {}, []
    for name in ("gpt2", "llama-gqa", "vit"):
        model, batch = perturbed(attach(build(name), rank=1)), batch_for(name)
        model.save_pretrained(tmp_path / name / "model")
        save_file(batch, tmp_path / name / "batch.safetensors")
        expected[name] = outputs(model, batch)
        folders.append((str(tmp_path / name / "model"), AUTO.get(name, "AutoModelForCausalLM")))
    environment = os.environ | {"PYTHONPATH": str(Path(hl.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error::FutureWarning", "-c", RELOAD, json.dumps(folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, logits in expected.items():
        near(load_file(tmp_path / name / "found.safetensors")["logits"], logits)


@pytest.mark.parametrize("name", [*SOME, "bert", "bert-classifier", "gpt2-classifier"])
def test_saving_and_reloading(name: str, tmp_path: Path) -> None:
    batch = batch_for(name)
    model = perturbed(attach(build(name), groups=1, branches=["pre_base", "key", "post_query_gate"], backend="chunked"))
    model.save_pretrained(tmp_path)
    again = hl.load(tmp_path)
    assert type(again) is type(model)
    assert type(again).__name__ == f"Composed{type(build(name)).__name__}"
    assert again.config.model_type == f"composed_{build(name).config.model_type}"
    assert again.config.composed == model.config.composed
    assert again.config._attn_implementation == "headlab_composed"
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(outputs(again, batch), outputs(model, batch))


def test_the_body_opens_alone(tmp_path: Path) -> None:
    model, batch = perturbed(attach(build("llama-gqa"))), batch_for("llama-gqa")
    model.save_pretrained(tmp_path)
    body = hf.AutoModel.from_pretrained(tmp_path)
    assert type(body).__name__ == "ComposedLlamaModel"
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(outputs(body, batch), expected)


def test_a_checkpoint_without_some_maps(tmp_path: Path) -> None:
    model = attach(build("llama-gqa"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.self_attn.compose.dd.weight"
    save_file({key: x for key, x in tensors.items() if key != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(hl.HeadlabError, match=f"lacks the tensors {lost}$"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_must_describe_maps() -> None:
    config = type(attach(build("gpt2")).config)(n_embd=35, n_layer=1, n_head=5)
    with pytest.raises(hl.HeadlabError, match="ComposedGPT2LMHeadModel needs a config that describes its maps"):
        hf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in SOME), ("llama-gqa", {"stages": []}), ("gpt2", {"residual": False, "groups": 5, "rank": 1})],
)
def test_detaching(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, batch = build(name), batch_for(name)
    model.set_attn_implementation("sdpa")
    expected, plain, config = outputs(model, batch), copy.deepcopy(model), model.config
    attach(model, **options).save_pretrained(tmp_path / "composed")
    again = hl.load(tmp_path / "composed")
    for attached in (model, again):
        detached = detach(attached)
        assert detached is attached
        assert type(detached) is type(plain)
        assert type(detached.config) is type(config)
        assert detached.config._attn_implementation == "sdpa"
        assert "composed" not in detached.config.to_dict()
        assert maps_of(detached) == []
        assert [type(module) for module in detached.modules()] == [type(module) for module in plain.modules()]
        assert detached.state_dict().keys() == plain.state_dict().keys()
        assert not hasattr(detached, "attention_before_attach")
        assert torch.equal(outputs(detached, batch), expected)
    model.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["architectures"] == [type(plain).__name__]
    assert torch.equal(outputs(hl.load(tmp_path / "plain"), batch), expected)
    assert torch.equal(outputs(attach(detach(attach(model))), batch), outputs(attach(plain), batch))


def one_weight(compose: Compose, place: str) -> Tensor:
    """One weight that has to be zero where a branch adds nothing (a view)."""
    if place in GATES:
        return compose.dd.weight.data.unflatten(0, (len(GATES), -1))[GATES.index(place), -1, -1]
    if place in LOW_RANK:
        return compose.qkw.weight.data[LOW_RANK.index(place), -1, -1, -1, -1]
    return compose.base.weight.data[["pre_base", "post_base"].index(place), 0, -1, 0]


@pytest.mark.parametrize("place", PLACES)
def test_maps_that_are_not_the_identity_stay(place: str) -> None:
    model, batch = attach(build("llama-gqa")), batch_for("llama-gqa")
    one_weight(maps_of(model)[1], place).fill_(0.25)
    expected = outputs(model, batch)
    with pytest.raises(hl.HeadlabError, match=rf"have to be zero: layer 1 \({place} 0\.25\)$"):
        detach(model)
    assert torch.equal(outputs(model, batch), expected)
    one_weight(maps_of(model)[1], place).fill_(0)
    maps_of(model)[1].qkw.weight.data[..., :2, :] = 1  # w1 does not matter where w2 is zero
    assert maps_of(detach(model)) == []


def test_a_base_without_the_identity_stays() -> None:
    model = attach(build("llama-gqa"), residual=False, groups=2, branches=["base"])
    maps_of(model)[2].base.weight.data[1, 1, 2, 2] = 0.75
    with pytest.raises(hl.HeadlabError, match=r"layer 2 \(post_base 0\.25\)$"):
        detach(model)


@pytest.mark.parametrize(
    ("name", "site"), [("llama-gqa", "output"), ("gpt2", "scores"), ("neox", "scores"), ("neox", "output")]
)
def test_pruned_maps_stay(name: str, site: str) -> None:
    model, batch = perturbed(attach(build(name)), size=0.1), batch_for(name)
    heads = hl.heads(model, site)
    mask = hl.HeadMask.without(heads, [heads[1], heads[-1]])
    small = hl.prune(model, mask, site=site)
    assert type(small).__name__ == f"Pruned{type(model).__name__}"
    assert small.config.model_type == f"headlab_{model.config.model_type}"
    with hl.masked(model, mask, site=site):
        near(outputs(small, batch), outputs(model, batch))
    with pytest.raises(hl.HeadlabError, match="pruned"):
        detach(small)


# --- what is refused


def state(model: Any) -> tuple[Any, ...]:
    config = getattr(model, "config", None)
    return type(model), type(config), getattr(config, "_attn_implementation", None), [*model.state_dict()]


def pruned() -> hf.PreTrainedModel:
    model = build("llama-mha")
    return hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L0H0"]))


def changed(layer: int, name: str, value: Any) -> hf.PreTrainedModel:
    model = build("llama-mha")
    setattr(model.model.layers[layer].self_attn, name, value)
    return model


_TINY = {"vocab_size": 11, "hidden_size": 10, "num_hidden_layers": 1, "num_attention_heads": 5}
REFUSED = {
    "groups": (lambda: build("llama-mha"), {"groups": 4}, "6 heads cannot be composed in 4 groups"),
    "rank": (lambda: build("llama-mha"), {"rank": 4, "groups": 2}, r"rank is from 1 to .* \(3\), not 4"),
    "no rank": (lambda: build("llama-mha"), {"rank": 0}, r"rank is from 1 to .* \(6\), not 0"),
    "branch": (lambda: build("gpt2"), {"branches": ["queries"]}, "no branch or stage is called 'queries'"),
    "stage": (lambda: build("gpt2"), {"stages": ["mid"]}, "no branch or stage is called 'mid'"),
    "backend": (lambda: build("gpt2"), {"backend": "flash"}, "backend is one of 'eager', 'chunked', not 'flash'"),
    "no identity": (
        lambda: build("gpt2"), {"residual": False, "branches": ["pre_base", "query"]},
        "both stages have a base, but they have pre_base$",
    ),
    "twice": (lambda: attach(build("gpt2")), {}, "ComposedGPT2LMHeadModel has composable heads already"),
    "dcformer": (
        lambda: DCFormerForCausalLM(DCFormerConfig(**_TINY)), {}, "DCFormerForCausalLM has composable heads already",
    ),
    "t5": (lambda: build("t5"), {}, "T5ForConditionalGeneration has cross-attention"),
    "t5 encoder": (lambda: build("t5-encoder"), {}, "T5Attention.* adds a position bias to its scores"),
    "gemma 2": (lambda: build("gemma2"), {}, r"layers.0.self_attn \(Gemma2Attention\) caps its scores at 50.0, which"),
    "cross": (
        lambda: hf.BertLMHeadModel(hf.BertConfig(**zoo._BERT, is_decoder=True, add_cross_attention=True)), {},
        "BertLMHeadModel has cross-attention",
    ),
    "unknown": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**_TINY, word_embed_proj_dim=10)), {},
        "no description of the attention module .*OPTAttention",
    ),
    "pruned": (pruned, {}, "pruned: attach .* and prune it then"),
    "no model": (lambda: nn.Linear(2, 3), {}, "expected a Hugging Face model, not a Linear"),
    "sinks": (lambda: changed(2, "sinks", nn.Parameter(torch.zeros(6))), {}, "layers.2.self_attn .* has attention sinks"),
    "offloaded": (lambda: build("gpt2").to("meta"), {}, "h.0.attn has weights of torch.float32 on meta: maps need"),
    "configs": (lambda: changed(1, "config", build("llama-mha").config), {}, "layers.1.self_attn has another config"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, options, message = REFUSED[case]
    model: Any = make()
    before = state(model)
    with pytest.raises(hl.HeadlabError, match=message):
        attach(model, **options)
    assert state(model) == before


def test_fixed_implementations_are_refused() -> None:
    model = build("gpt2")
    with (
        patch.object(type(model), "_can_set_attn_implementation", lambda _: False),
        pytest.raises(hl.HeadlabError, match="lets nobody choose how its attention is computed"),
    ):
        attach(model)
    assert maps_of(model) == []


def test_what_was_not_attached_cannot_be_detached() -> None:
    with pytest.raises(hl.HeadlabError, match=r"GPT2LMHeadModel has no composable heads that attach has given to it$"):
        detach(build("gpt2"))
    with pytest.raises(hl.HeadlabError, match="those of its own architecture stay"):
        detach(DCFormerForCausalLM(DCFormerConfig(**_TINY)))
    with pytest.raises(hl.HeadlabError, match="expected a Hugging Face model"):
        detach(nn.Linear(2, 3))


def test_vit_has_a_description() -> None:
    [family] = [family for family in families() if family.name == "vit"]
    model = build("vit")
    assert [len(row.heads) for row in attentions(model)] == [5, 5, 5]
    assert {row.family for row in attentions(model)} == {family}


def test_a_fresh_model_of_an_attached_config_starts_at_the_identity() -> None:
    model = attach(zoo.build("llama-gqa"), rank=3)
    fresh = hf.AutoModelForCausalLM.from_config(model.config)
    assert type(fresh) is type(model)
    first = fresh.model.layers[0].self_attn.compose
    assert first.dw1.weight.std().item() == pytest.approx(sqrt(2 / (42 + first.hidden)), rel=0.1)  # as published
    assert type(detach(fresh)) is hf.LlamaForCausalLM
