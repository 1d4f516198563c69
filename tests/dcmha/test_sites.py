"""Importance, ablation, masks, curves and pruning at the sites that only composed heads have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

import headlab as hl
from headlab.dcmha import PLACES, SITES, Compose, attach
from headlab.models import access
from tests.helpers import zoo

MODELS = ["dcformer-mha", "dcformer-gqa", "dcformer-mqa", "dcpythia", "dcformer-plain"]
SOME = ["output", "head", "scores", "probabilities", "pre_base", "pre_query", "post_query_gate", "post_key", "post_key_gate"]


def double(name: str) -> torch.nn.Module:
    return zoo.build(name).double()


def loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of an example's real tokens."""
    logits = model(**batch).logits.double().log_softmax(-1)[:, :-1]
    real = batch["attention_mask"][:, 1:].bool()
    picked = logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0].masked_fill(~real, 0)
    return -picked.sum(1) / real.sum(1)


def branches(names: list[str], sites: list[str]) -> list[tuple[str, str]]:
    """Models and sites, without the branches that a model does not have."""
    pairs = []
    for name in names:
        places = zoo.ZOO[name]().model.layers[0].self_attn.compose.places
        pairs += [(name, site) for site in sites if site not in PLACES or site in places]
    return pairs


@contextmanager
def by_hand(model: torch.nn.Module, site: str, layer: int, gates: Tensor) -> Iterator[None]:
    """What a gate at a site means, written out on the tensors themselves: gates [head] of one layer."""
    compose = [module for module in model.modules() if isinstance(module, Compose)][layer]
    handles = []

    def times(tap: str, sites: tuple[str, ...]) -> None:
        if site in sites:
            hook = lambda _, __, out: out * gates[:, None, None]  # noqa: E731
            handles.append(compose.taps[tap].register_forward_hook(hook))

    times("scores_raw", ("scores", "head"))
    times("pattern_raw", ("probabilities", "head"))
    if site in ("output", "head"):
        o_proj = model.model.layers[layer].self_attn.o_proj
        d_head = model.config.head_dim
        pre = lambda _, args: (args[0] * gates.repeat_interleave(d_head),)  # noqa: E731
        handles.append(o_proj.register_forward_pre_hook(pre))
    if site in compose.places:
        if site.endswith("_base"):
            handles.append(compose.taps[site].register_forward_hook(lambda _, __, out: out * gates))
        else:
            tap = site if site.endswith("_gate") else f"{site}_w2"
            handles.append(compose.taps[tap].register_forward_hook(lambda _, __, out: out * gates))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", MODELS)
def test_a_gate_means_what_it_says(name: str, site: str) -> None:
    model, batch = double(name), zoo.batch_for(name)
    if site in PLACES and site not in model.model.layers[0].self_attn.compose.places:
        with pytest.raises(hl.HeadlabError, match=f"no layer of the model has anything to remove at the site '{site}'"):
            hl.heads(model, site)
        return
    gates = [torch.rand(6, dtype=torch.float64) for _ in range(3)]
    for layer in range(3):
        only = [gate if i == layer else torch.ones(6) for i, gate in enumerate(gates)]
        with torch.no_grad():
            with hl.masked(model, only, site=site):
                ours = model(**batch).logits
            with by_hand(model, site, layer, gates[layer]):
                expected = model(**batch).logits
            assert not torch.equal(expected, model(**batch).logits)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(ours[real], expected[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "site"), branches(["dcformer-mha", "dcpythia"], SOME))
def test_importance_is_the_derivative_to_the_gate(name: str, site: str) -> None:
    model, batch = double(name), zoo.batch_for(name)
    scores = hl.importance(model, [batch], loss=loss, reduction="signed", site=site)
    assert scores.record["site"] == site
    step = 1e-5
    heads = hl.heads(model, site)
    for index in (0, 7, 17):
        losses = []
        for sign in (1, -1):
            gates = torch.ones(len(heads), dtype=torch.float64)
            gates[index] += sign * step
            with torch.no_grad(), hl.masked(model, gates, site=site):
                losses.append(loss(model, batch).mean())
        derivative = (losses[0] - losses[1]) / (2 * step)
        assert scores.flat[index] == pytest.approx(-derivative.item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("reduction", ["token", "example", "batch"])
def test_a_head_is_one_gate_at_three_places(reduction: str) -> None:
    """The gradients of the three are added before any absolute value is taken."""
    model, batch = double("dcformer-gqa"), zoo.batch_for("dcformer-gqa")
    whole = hl.importance(model, [batch], loss=loss, reduction=reduction, site="head").flat
    parts = [
        hl.importance(model, [batch], loss=loss, reduction=reduction, site=site).flat
        for site in ("scores", "probabilities", "output")
    ]
    assert (whole <= sum(parts) + 1e-12).all()
    assert (whole < sum(parts) - 1e-9).any()
    signed = [
        hl.importance(model, [batch], loss=loss, reduction="signed", site=site).flat
        for site in ("scores", "probabilities", "output", "head")
    ]
    np.testing.assert_allclose(signed[3], sum(signed[:3]), atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("site", ["scores", "probabilities", "head", "post_key"])
def test_backends_agree_at_every_site(backend: str, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headlab.dcmha.backends.BLOCK", 3)
    model, batch = double("dcformer-mha"), zoo.batch_for("dcformer-mha")
    expected = hl.importance(model, [batch], site=site).flat
    model.config.backend = backend
    np.testing.assert_allclose(hl.importance(model, [batch], site=site).flat, expected, atol=1e-12)


@pytest.mark.parametrize("keep_one", [False, True])
@pytest.mark.parametrize(("name", "site"), branches(["dcformer-mha", "dcformer-gqa", "dcpythia"], SOME))
def test_ablation_is_the_loss_without_the_head(name: str, site: str, keep_one: bool) -> None:
    model, batch = double(name), zoo.batch_for(name)
    scores = hl.ablation(model, [batch], loss=loss, site=site, keep_one=keep_one, heads_per_pass=2)
    assert scores.record["site"] == site
    heads = hl.heads(model, site)
    with torch.no_grad():
        clean = loss(model, batch)
        for index in (1, 8, 16):
            gone = [h for h in heads if h.row == heads[index].row and (h.index != heads[index].index) == keep_one]
            with hl.masked(model, hl.HeadMask.without(heads, gone), site=site):
                change = (loss(model, batch) - clean).mean().item()
            found = np.concatenate(scores.columns["change"])[index]
            assert found == pytest.approx(change, abs=1e-10)


@pytest.mark.parametrize("site", ["scores", "head", "pre_query"])
def test_a_curve_at_a_site(site: str, tmp_path: Path) -> None:
    model, batch = zoo.build("dcformer-gqa"), zoo.batch_for("dcformer-gqa")
    scores = hl.importance(model, [batch], site=site)
    curve = hl.pruning_curve(model, scores, [batch], (0, 0.5, 1), site=site, log=tmp_path / "log.jsonl")
    assert curve.record["site"] == site
    mask = scores.keep(0.5)
    with torch.no_grad(), hl.masked(model, mask, site=site):
        expected = hl.own_loss(model, batch).mean().item()
    assert curve.values[1] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(hl.HeadlabError, match="another"):
        hl.pruning_curve(model, scores, [batch], (0, 0.5, 1), site="output", log=tmp_path / "log.jsonl")


MASKS = {"some": 0.4, "few": 0.8, "none": 1.0}


@pytest.mark.parametrize("share", MASKS)
@pytest.mark.parametrize(("name", "site"), branches(MODELS, [*SOME, "pre_key_gate", "post_base"]))
def test_the_pruned_model_computes_what_the_masked_one_does(name: str, site: str, share: str, tmp_path: Path) -> None:
    model, batch = double(name), zoo.batch_for(name)
    mask = random_mask(hl.heads(model, site), MASKS[share])
    before = access.fingerprint(model)
    small = hl.prune(model, mask, site=site)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        with hl.masked(model, mask, site=site):
            expected = model(**batch).logits[real]
        found = small(**batch).logits[real]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert access.fingerprint(model) == before
    hl.save_pruned(small, tmp_path / "small")
    opened = hl.load(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(opened(**batch).logits[real], found, rtol=0, atol=0)
    assert type(opened) is type(small)


def random_mask(heads: list[hl.Head], share: float, seed: int = 0) -> hl.HeadMask:
    draws = np.random.default_rng(seed).random(len(heads))
    return hl.HeadMask.without(heads, [head for head, draw in zip(heads, draws, strict=True) if draw < share])


@pytest.mark.parametrize(("name", "site"), branches(MODELS, ["output", "scores", "head", "post_query"]))
def test_a_pruned_model_generates_as_the_masked_one(name: str, site: str) -> None:
    model = double(name)
    ids = zoo.batch_for(name, padded=False)["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = random_mask(hl.heads(model, site), 0.6)
    with hl.masked(model, mask, site=site):
        expected = model.generate(**batch, **options)
    small = hl.prune(model, mask, site=site)
    assert torch.equal(small.generate(**batch, **options), expected)
    assert torch.equal(small.generate(**batch, **options, use_cache=False), expected)


def test_what_goes_with_which_half() -> None:
    model = zoo.build("dcformer-gqa")  # 6 heads on 3 key-value heads of 10, width 42
    heads = hl.heads(model)
    gone = [head for head in heads if head.layer == 1 and head.index in (0, 1, 5)]
    mask = hl.HeadMask.without(heads, gone)
    shapes = {}
    for site in ("scores", "output", "head"):
        attention = hl.prune(model, mask, site=site).model.layers[1].self_attn
        shapes[site] = [getattr(attention, f"{x}_proj").weight.shape for x in "qkvo"]
    assert shapes["scores"] == [(30, 42), (20, 42), (30, 42), (42, 60)]
    assert shapes["output"] == [(60, 42), (30, 42), (20, 42), (42, 30)]
    assert shapes["head"] == [(30, 42), (20, 42), (20, 42), (42, 30)]
    half = hl.kept(hl.prune(model, mask, site="scores"))
    assert half[["heads", "slots", "groups", "values"]].to_numpy().tolist() == [[6, 6, 3, 3], [6, 3, 2, 3], [6, 6, 3, 3]]
    assert [str(h) for h in hl.heads(hl.prune(model, mask, site="scores"), "scores") if h.layer == 1] == [
        "L1H2", "L1H3", "L1H4",
    ]  # fmt: skip


def test_plain_heads_go_as_a_whole() -> None:
    """Without composition a head's scores are of use to itself alone."""
    model = zoo.build("dcformer-plain")
    gone = [head for head in hl.heads(model) if head.index in (2, 3)]
    attention = hl.prune(model, hl.HeadMask.without(hl.heads(model), gone)).model.layers[0].self_attn
    assert [getattr(attention, f"{x}_proj").weight.shape for x in "qkvo"] == [(40, 42), (40, 42), (40, 42), (42, 40)]


def test_a_branch_without_heads_is_gone() -> None:
    model = zoo.build("dcformer-mha")
    heads = hl.heads(model, "pre_query")
    gone = [head for head in heads if head.layer == 2]
    small = hl.prune(model, hl.HeadMask.without(heads, gone), site="pre_query")
    compose = small.model.layers[2].self_attn.compose
    assert "pre_query" not in compose.places
    assert "pre_query" in small.model.layers[1].self_attn.compose.places
    assert compose.qkw.weight.shape[0] == 3
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_pruning_twice() -> None:
    """First some outputs, then some scores, then some heads wholly; each time what the mask does."""
    model, batch = double("dcformer-mha"), zoo.batch_for("dcformer-mha")
    real = batch["attention_mask"].bool()
    for seed, site in enumerate(("output", "scores", "head", "post_base", "probabilities")):
        mask = random_mask(hl.heads(model, site), 0.3, seed)
        small = hl.prune(model, mask, site=site)
        with torch.no_grad(), hl.masked(model, mask, site=site):
            expected = model(**batch).logits[real]
        with torch.no_grad():
            torch.testing.assert_close(small(**batch).logits[real], expected, rtol=0, atol=1e-10)
        model = small
    scores = hl.importance(model, [batch], site="head")
    assert [len(row) for row in scores.rows] == [len(row) for row in access.head_rows(model, "head")]


def test_a_mean_stands_in_for_an_output() -> None:
    model, batch = double("dcformer-gqa"), zoo.batch_for("dcformer-gqa")
    fill = hl.fill(model, [batch])
    mask = random_mask(hl.heads(model), 0.5)
    with torch.no_grad(), hl.masked(model, mask, fill):
        expected = model(**batch).logits
    small = hl.prune(model, mask, fill)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(small(**batch).logits[real], expected[real], rtol=0, atol=1e-6)  # means are float32
    for call in (
        lambda: hl.prune(model, mask, fill, site="scores"),
        lambda: hl.importance(model, [batch], fill=fill, site="head"),
        lambda: hl.ablation(model, [batch], fill=fill, site="scores"),
        lambda: hl.pruning_curve(model, hl.importance(model, [batch]), [batch], fill=fill, site="probabilities"),
        lambda: hl.masked(model, mask, fill, site="pre_key").__enter__(),
    ):
        with pytest.raises(hl.HeadlabError, match="stands in for a head's output"):
            call()


@pytest.mark.parametrize("site", ["output", "scores", "head"])
def test_magnitude_at_a_site(site: str) -> None:
    model = zoo.build("dcformer-gqa")
    scores = hl.importance(model, method="magnitude", site=site)
    attention = model.model.layers[1].self_attn
    q, k, v = (getattr(attention, f"{x}_proj").weight.double() for x in "qkv")
    o = attention.o_proj.weight.double()
    head, kv = 3, 1
    parts = {
        "scores": [q[30:40], k[10:20]],
        "output": [v[10:20], o[:, 30:40]],
    }
    parts["head"] = parts["scores"] + parts["output"]
    expected = sum(part.square().sum() for part in parts[site]).sqrt().item()
    assert scores.rows[1][head] == pytest.approx(expected)
    assert kv == hl.heads(model)[6 + head].group
    with pytest.raises(hl.HeadlabError, match="no weights of its own at the site 'pre_query'"):
        hl.importance(model, method="magnitude", site="pre_query")


def test_sites_that_are_not_there() -> None:
    plain, composed = zoo.build("llama-gqa"), zoo.build("dcpythia")
    batch = zoo.batch_for("dcpythia")
    for model, site, message in (
        (plain, "scores", "has one site, 'output', not 'scores'"),
        (composed, "score", "composed heads have the sites output, head, scores"),
    ):
        mask = hl.HeadMask([np.ones(6)] * 3)
        for call in (
            lambda m=model, s=site: hl.importance(m, [batch], site=s),
            lambda m=model, s=site: hl.importance(m, method="random", site=s),
            lambda m=model, s=site: hl.ablation(m, [batch], site=s),
            lambda m=model, s=site, k=mask: hl.prune(m, k, site=s),
            lambda m=model, s=site, k=mask: hl.masked(m, k, site=s).__enter__(),
            lambda m=model, s=site: hl.heads(m, s),
        ):
            with pytest.raises(hl.HeadlabError, match=message):
                call()


ATTACHED = ["gpt2", "neox", *zoo.MHA_GQA_MQA, "bert-mlm", "mistral"]


def attached(name: str) -> torch.nn.Module:
    """A model of another kind with composable heads that really mix."""
    model = attach(zoo.build(name), groups=1)
    generator = torch.Generator().manual_seed(3)
    for path, parameter in model.named_parameters():
        if ".compose." in path:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


@pytest.mark.parametrize("share", MASKS)
@pytest.mark.parametrize("site", ["output", "scores", "probabilities", "head", "pre_query", "post_base"])
@pytest.mark.parametrize("name", ATTACHED)
def test_attached_heads_are_pruned_as_they_are_masked(name: str, site: str, share: str, tmp_path: Path) -> None:
    model, batch = attached(name), zoo.batch_for(name)
    mask = random_mask(hl.heads(model, site), MASKS[share])
    small = hl.prune(model, mask, site=site)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        with hl.masked(model, mask, site=site):
            expected = model(**batch).logits[real]
        found = small(**batch).logits[real]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    hl.save_pruned(small, tmp_path / "small")
    opened = hl.load(tmp_path / "small")
    assert type(opened).__name__.startswith("PrunedComposed")
    with torch.no_grad():
        torch.testing.assert_close(opened(**batch).logits[real], found, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama-gqa"])
def test_pruned_attached_models_generate_as_the_masked_ones(name: str) -> None:
    model = attached(name)
    ids = zoo.batch_for(name, padded=False)["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for site in ("output", "scores", "head"):
        mask = random_mask(hl.heads(model, site), 0.6)
        with hl.masked(model, mask, site=site):
            expected = model.generate(**batch, **options)
        small = hl.prune(model, mask, site=site)
        assert torch.equal(small.generate(**batch, **options), expected)
        assert torch.equal(small.generate(**batch, **options, use_cache=False), expected)


def test_what_a_joined_projection_keeps() -> None:
    """GPT-2 makes queries, keys and values at once, so it keeps them for every head of which either half is left."""
    model = attached("gpt2")  # 5 heads of 7, width 35
    heads = hl.heads(model)
    small = hl.prune(model, hl.HeadMask.without(heads, [h for h in heads if h.index < 2]), site="scores")
    assert small.transformer.h[0].attn.c_attn.weight.shape == (35, 3 * 35)
    again = hl.prune(small, hl.HeadMask.without(heads, [h for h in heads if h.index in (1, 4)]), site="output")
    attention = again.transformer.h[0].attn
    assert attention.c_attn.weight.shape == (35, 3 * 4 * 7)  # head 1 is gone with both halves
    assert attention.c_proj.weight.shape == (3 * 7, 35)


def test_attached_image_models_are_pruned_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=30, num_hidden_layers=2, num_attention_heads=5, intermediate_size=37, image_size=8, patch_size=4
    )
    model = attach(hf.ViTForImageClassification(config)).eval()
    heads = hl.heads(model)
    small = hl.prune(model, hl.HeadMask.without(heads, heads[1:3]), site="head")
    pictures = {"pixel_values": torch.randn(3, 3, 8, 8)}
    o_proj = model.vit.layers[0].attention.o_proj
    zero = lambda _, args: (args[0].unflatten(-1, (5, 6)).index_fill(2, torch.tensor([1, 2]), 0).flatten(2),)  # noqa: E731
    with torch.no_grad():
        handle = o_proj.register_forward_pre_hook(zero)  # the maps are the identity, so this is what is left of a head
        expected = model(**pictures).logits
        handle.remove()
        torch.testing.assert_close(small(**pictures).logits, expected, rtol=0, atol=1e-6)
        hl.save_pruned(small, tmp_path / "small")
        torch.testing.assert_close(hl.load(tmp_path / "small")(**pictures).logits, expected, rtol=0, atol=1e-6)


def test_a_class_that_no_auto_class_opens(tmp_path: Path) -> None:
    config = hf.GPT2Config(n_embd=30, n_layer=2, n_head=3, vocab_size=17, n_positions=9, bos_token_id=1, eos_token_id=2)
    model = attach(hf.GPT2DoubleHeadsModel(config))
    model.save_pretrained(tmp_path / "whole")
    assert type(hl.load(tmp_path / "whole")) is type(model)
    small = hl.prune(model, hl.HeadMask([[1, 1, 0], [1, 1, 1]]), site="head")
    hl.save_pruned(small, tmp_path / "small")
    assert type(hl.load(tmp_path / "small")) is type(small)
