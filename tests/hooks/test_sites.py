from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import headlab as hl
from headlab.hooks.sites import Pass, at_sites, is_hooked, replaying
from headlab.models.access import rows
from tests.helpers import zoo


@contextmanager
def inputs_of(model: nn.Module, paths: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What enters some modules of a plain model, by hooks of torch alone."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: seen[path].append(args[0].clone()))
        for path in paths
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def run(model: nn.Module, name: str, **more: Any) -> Tensor:
    with torch.no_grad():
        return getattr(model, "original_model", model)(**zoo.batch_for(name, labels=False), **more)[0]


def zs(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What headlab reads at every site."""
    seen: dict[str, list[Tensor]] = {row.path: [] for row in rows(model)}

    def read(row: Any, z: Tensor, _: Pass) -> None:
        seen[row.path].append(z.clone())

    with at_sites(model, read):
        run(model, name)
    assert all(len(found) == 1 for found in seen.values())
    return {path: found[0] for path, found in seen.items()}


@pytest.mark.parametrize("name", zoo.ALL)
def test_a_site_is_what_enters_the_output_projection(name: str) -> None:
    model = zoo.build(name)
    sites = {row.path: row.heads[0].site for row in rows(model)}
    with inputs_of(model, list(sites.values())) as seen:
        run(model, name)
    found = zs(model, name)
    assert list(found) == list(sites)
    for row in rows(model):
        z = found[row.path]
        n_pos = 5 if row.stack in ("dec", "cross") else zoo.POS
        assert z.shape == (zoo.BATCH, n_pos, len(row.heads), row.d_head)
        assert torch.equal(z.flatten(2), seen[sites[row.path]][0])


@pytest.mark.parametrize("name", zoo.BRIDGED)
def test_a_bridge_has_the_same_sites(name: str) -> None:
    model = zoo.build(name)
    plain, bridged = zs(model, name), zs(hl.bridge(model), name)
    assert list(plain) == list(bridged)
    for path in plain:
        assert torch.allclose(plain[path], bridged[path], atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_sites_of_a_bridge_fire_where_its_output_projection_is_never_called(name: str) -> None:
    model = zoo.build(name)
    bridge = hl.bridge(model)
    bridge.set_use_attn_result(True)
    plain, bridged = zs(model, name), zs(bridge, name)
    for path in plain:
        assert torch.allclose(plain[path], bridged[path], atol=1e-5)

    def zero(row: Any, z: Tensor, _: Pass) -> Tensor:
        return torch.zeros_like(z)

    with at_sites(model, zero), at_sites(bridge, zero):
        edited = run(bridge, name)
        assert torch.allclose(edited, run(model, name), atol=1e-5)
    assert not torch.allclose(edited, run(model, name), atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "bert-mlm", "t5"])
def test_nested_edits_run_in_the_order_in_which_they_were_entered(name: str) -> None:
    for model in (zoo.build(name), hl.bridge(zoo.build(name))):
        seen: list[Tensor] = []
        first_row = rows(model)[:1]
        with (
            at_sites(model, lambda _, z, __, seen=seen: seen.append(z), first_row),
            at_sites(model, lambda _, z, __: z + 1, first_row),
            at_sites(model, lambda _, z, __: z * 2, first_row),
            at_sites(model, lambda _, z, __, seen=seen: seen.append(z), first_row),
        ):
            twice = run(model, name)
        assert torch.equal(seen[1], (seen[0] + 1) * 2)
        with at_sites(model, lambda _, z, __: (z + 1) * 2, first_row):
            assert torch.equal(run(model, name), twice)
        with at_sites(model, lambda _, z, __: z * 2 + 1, first_row):
            assert not torch.allclose(run(model, name), twice, atol=1e-4)


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_model_is_restored_after_an_error(name: str) -> None:
    model = zoo.build(name)
    before, hooks = run(model, name), hooks_of(model)

    def fail(*_: Any) -> None:
        raise KeyError("stop")

    assert not is_hooked(model)
    with at_sites(model, lambda _, z, __: z * 0), at_sites(model, fail), pytest.raises(KeyError, match="stop"):
        run(model, name)
    with pytest.raises(KeyError, match="stop"), at_sites(model, fail):
        run(model, name)
    with at_sites(model, fail):
        assert is_hooked(model)
    assert not is_hooked(model)
    assert hooks_of(model) == hooks
    assert torch.equal(run(model, name), before)


def test_a_bridge_is_restored_after_an_error() -> None:
    bridge = hl.bridge(zoo.build("llama-gqa"))
    before, hooks = run(bridge, "llama-gqa"), hooks_of(bridge)
    with pytest.raises(ZeroDivisionError), at_sites(bridge, lambda _, z, __: 1 / 0):
        run(bridge, "llama-gqa")
    assert hooks_of(bridge) == hooks
    assert torch.equal(run(bridge, "llama-gqa"), before)


def test_an_error_while_hooking_leaves_no_hook() -> None:
    model = zoo.build("llama-gqa")
    broken = list(rows(model))
    del broken[2].module.o_proj
    with pytest.raises(AttributeError), at_sites(model, lambda *_: None, broken):
        pytest.fail("the block must not begin")
    assert hooks_of(model) == 0
    assert not is_hooked(model)


SKIPPED = {
    "llama-gqa": "model.layers.1",
    "gpt2": "transformer.h.1",
    "bert-mlm": "bert.encoder.layer.1",
    "t5": "decoder.block.1",
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_site_that_does_not_fire_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(name)
    block = model.get_submodule(SKIPPED[name])

    def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, None, None) if name == "t5" else hidden_states

    monkeypatch.setattr(block, "forward", skip)
    run(model, name)
    silent = [row.path for row in rows(model) if row.path.startswith(f"{SKIPPED[name]}.")]
    assert silent
    with at_sites(model, lambda *_: None), pytest.raises(hl.HeadlabError) as caught:
        run(model, name)
    assert all(path in str(caught.value) for path in silent)
    assert "\n" not in str(caught.value)
    others = [row for row in rows(model) if row.path not in silent]
    with at_sites(model, lambda *_: None, others):
        run(model, name)
    with at_sites(model, lambda *_: None), replaying(silent[0]):
        run(model, name)


def test_every_pass_has_to_fire_not_only_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama-gqa")
    with at_sites(model, lambda *_: None):
        run(model, "llama-gqa")
        monkeypatch.setattr(model.model.layers[1], "forward", lambda hidden_states, *args, **kwargs: hidden_states)
        with pytest.raises(hl.HeadlabError, match=r"did not go through model\.layers\.1\.self_attn"):
            run(model, "llama-gqa")


def test_what_is_replayed_is_not_edited_again() -> None:
    model = zoo.build("llama-gqa")
    before = run(model, "llama-gqa")
    paths: list[str] = []

    def edit(row: Any, z: Tensor, _: Pass) -> Tensor:
        paths.append(row.path)
        return z * 0 if row.layer == 1 else z

    with at_sites(model, edit), replaying("model.layers.1.self_attn"):
        assert torch.equal(run(model, "llama-gqa"), before)
    assert paths == ["model.layers.0.self_attn", "model.layers.2.self_attn"]


def passes(model: nn.Module, row: int, call: Any) -> list[Pass]:
    seen: list[Pass] = []
    with torch.no_grad(), at_sites(model, lambda _, __, run: seen.append(run), rows(model)[row : row + 1]):
        call()
    return seen


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("positional", [False, True], ids=["by name", "by place"])
def test_positions_count_real_tokens(left: bool, positional: bool) -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    if left:
        batch = {name: value.flip(-1) for name, value in batch.items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    [seen] = passes(model, 1, lambda: model(ids, mask) if positional else model(**batch))
    assert torch.equal(seen.tokens, ids)
    assert torch.equal(seen.real, mask.bool())
    assert seen.first
    for i in range(zoo.BATCH):
        assert seen.positions[i][mask[i].bool()].tolist() == list(range(int(mask[i].sum())))


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_passes_of_a_generation_on_a_static_cache(name: str, attention: str) -> None:
    model, batch = zoo.build(name), {key: value.flip(-1) for key, value in zoo.batch_for(name).items()}
    model.set_attn_implementation(attention)
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": False,
        "eos_token_id": None,
        "cache_implementation": "static",
    }
    seen = passes(model, 0, lambda: model.generate(**batch, **options))
    real, lengths = batch["attention_mask"].bool(), batch["attention_mask"].sum(-1)
    assert torch.equal(seen[0].real, real)
    assert all(run.real.shape == (zoo.BATCH, 1) and run.real.all() for run in seen[1:])
    for i in range(zoo.BATCH):
        assert seen[0].positions[i][real[i]].tolist() == list(range(lengths[i]))
        assert [int(run.positions[i]) for run in seen[1:]] == [lengths[i], lengths[i] + 1]


def test_passes_of_a_generation() -> None:
    model, batch = zoo.build("llama-gqa"), {name: value.flip(-1) for name, value in zoo.batch_for("llama-gqa").items()}
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    seen = passes(model, 0, lambda: model.generate(**batch, **options))
    assert [run.first for run in seen] == [True, False, False]
    lengths = batch["attention_mask"].sum(-1)
    assert [run.positions.shape[1] for run in seen] == [zoo.POS, 1, 1]
    assert torch.equal(seen[1].positions[:, 0], lengths)
    assert torch.equal(seen[2].positions[:, 0], lengths + 1)
    seen = passes(model, 0, lambda: model.generate(**batch, **options, use_cache=False))
    assert [run.positions.shape[1] for run in seen] == [zoo.POS, zoo.POS + 1, zoo.POS + 2]
    assert all(run.first for run in seen)


def test_stacks_of_an_encoder_decoder_see_their_own_tokens() -> None:
    model, batch = zoo.build("t5"), zoo.batch_for("t5", labels=False)
    for row, tokens, real in (
        (0, batch["input_ids"], batch["attention_mask"].bool()),
        (3, batch["decoder_input_ids"], torch.ones(4, 5, dtype=torch.bool)),
        (5, batch["decoder_input_ids"], torch.ones(4, 5, dtype=torch.bool)),
    ):
        [seen] = passes(model, row, lambda: model(**batch))
        assert torch.equal(seen.tokens, tokens)
        assert torch.equal(seen.real, real)
    mask = torch.tensor([[1, 1, 1, 1, 1]] * 3 + [[1, 1, 0, 0, 0]])
    [seen] = passes(model, 5, lambda: model(**batch, decoder_attention_mask=mask))
    assert torch.equal(seen.real, mask.bool())


def test_embeddings_instead_of_tokens() -> None:
    model = zoo.build("bert")
    embeds = model.embeddings.word_embeddings(zoo.batch_for("bert")["input_ids"]).detach()
    [seen] = passes(model, 0, lambda: model(inputs_embeds=embeds))
    assert seen.tokens is None
    assert seen.positions.tolist() == [list(range(zoo.POS))] * zoo.BATCH


def test_a_model_that_is_given_no_tokens() -> None:
    model = zoo.build("bert")
    with (
        at_sites(model, lambda *_: None),
        pytest.raises(hl.HeadlabError, match="BertModel was given neither input_ids"),
    ):
        model(attention_mask=torch.ones(2, 3))


def test_a_batch_of_conversations_on_one_cache() -> None:
    model = zoo.build("llama-gqa")
    cache = hf.DynamicCache(config=model.config)
    ids = zoo.batch_for("llama-gqa", padded=False)["input_ids"]
    seen = passes(model, 0, lambda: (model(ids[:, :4], past_key_values=cache), model(ids[:, 4:], past_key_values=cache)))
    assert [run.positions[0].tolist() for run in seen] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [run.first for run in seen] == [True, False]
