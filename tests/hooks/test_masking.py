from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headlab as hl
from headlab.models.access import describe, head_rows
from tests.helpers import zoo
from tests.helpers.float64 import build64

GENERATING = [*zoo.CAUSAL, "t5"]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def logits(model: nn.Module, name: str, **more: Tensor) -> Tensor:
    with torch.no_grad():
        return getattr(model, "original_model", model)(**(zoo.batch_for(name, labels=False) | more))[0]


def random_gates(model: nn.Module, seed: int, low: float = 0, high: float = 1) -> list[np.ndarray]:
    """Masks by default: about half of the heads, in every row some and in no row all."""
    draw = np.random.default_rng(seed)
    gates = [draw.permutation([low, high, *draw.choice([low, high], len(row) - 2)]) for row in head_rows(model)]
    assert all(row.any() for row in gates)
    return gates


def scaled(model: nn.Module, gates: list[Any]) -> nn.Module:
    """A copy whose output projections read every head times its gate."""
    model = copy.deepcopy(model)
    for row, row_gates in zip(head_rows(model), gates, strict=True):
        for head, gate in zip(row, row_gates, strict=True):
            projection, d = model.get_submodule(head.site), head.d_head
            inputs = slice(head.index * d, (head.index + 1) * d)
            with torch.no_grad():
                if isinstance(projection, hf.pytorch_utils.Conv1D):
                    projection.weight[inputs] *= float(gate)
                else:
                    projection.weight[:, inputs] *= float(gate)
    return model


@pytest.mark.parametrize("name", zoo.ALL)
def test_masked_heads_are_as_if_their_part_of_the_output_projection_were_zero(name: str) -> None:
    model = build64(name)
    gates = random_gates(model, seed=1)
    dense = logits(model, name)
    with hl.masked(model, hl.HeadMask(gates)):
        ours = logits(model, name)
    theirs = logits(scaled(model, gates), name)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert not torch.allclose(ours, dense, atol=1e-3)
    assert torch.equal(logits(model, name), dense)


@pytest.mark.parametrize("name", zoo.ALL)
def test_every_head_can_go_at_once_and_none(name: str) -> None:
    model = build64(name)
    for gate in (0, 1):
        gates = [np.full(len(row), gate) for row in head_rows(model)]
        expected = logits(scaled(model, gates), name)
        with hl.masked(model, hl.HeadMask(gates)):
            assert torch.allclose(logits(model, name), expected, atol=1e-6)
    with hl.masked(model, hl.HeadMask([np.ones(len(row)) for row in head_rows(model)])):
        untouched = logits(model, name)
    assert torch.equal(untouched, logits(model, name))


@settings(max_examples=10)
@given(st.data())
@pytest.mark.parametrize("name", zoo.MHA_GQA_MQA)
def test_any_gates(name: str, data: st.DataObject) -> None:
    model = build64(name)
    gates = [data.draw(st.lists(st.floats(-2, 2), min_size=6, max_size=6)) for _ in range(zoo.LAYERS)]
    expected = logits(scaled(model, gates), name)
    for given_gates in (gates, torch.tensor(gates, dtype=torch.float64).flatten(), np.array(gates)):
        with hl.masked(model, given_gates):
            assert torch.allclose(logits(model, name), expected, atol=1e-6)


@pytest.mark.parametrize("name", zoo.ALL)
def test_a_value_bias_goes_and_the_bias_of_the_output_projection_stays(name: str) -> None:
    model = zoo.build(name)
    first = head_rows(model)[0]
    projection = model.get_submodule(first[0].site)
    seen = []
    with hl.masked(model, hl.HeadMask.without(hl.heads(model), first)):
        hook = projection.register_forward_hook(lambda _, __, output: seen.append(output))
        logits(model, name)
        hook.remove()
    bias = projection.bias if projection.bias is not None else torch.zeros(seen[0].shape[-1])
    assert torch.equal(seen[0], bias.expand_as(seen[0]))
    assert (bias != 0).all() == (
        name in ("gpt2", "neox", "llama-bias", "dcpythia") or name.startswith(("bert", "roberta", "electra"))
    )


@pytest.mark.parametrize("name", ["gpt2", *zoo.MHA_GQA_MQA, "gemma3", "bert-classifier", "t5"])
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "one tensor"])
def test_gates_of_each_example_are_as_each_example_alone(name: str, flat: bool) -> None:
    model = zoo.build(name)
    by_example = [random_gates(model, seed, 0.25, 1.5) for seed in range(zoo.BATCH)]
    gates = [torch.tensor(np.stack(rows)) for rows in zip(*by_example, strict=True)]
    with hl.masked(model, torch.cat(gates, -1) if flat else gates):
        together = logits(model, name)
    batch = zoo.batch_for(name, labels=False)
    for i in range(zoo.BATCH):
        alone = logits(scaled(model, by_example[i]), name, **{key: value[i : i + 1] for key, value in batch.items()})
        assert torch.allclose(together[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bert", "t5"])
def test_masks_nest(name: str) -> None:
    model = zoo.build(name)
    first, second = random_gates(model, 1), random_gates(model, 2, 0.5, 1)
    both = [a * b for a, b in zip(first, second, strict=True)]
    expected, outer = logits(scaled(model, both), name), logits(scaled(model, first), name)
    with hl.masked(model, first):
        with hl.masked(model, second):
            assert torch.allclose(logits(model, name), expected, atol=1e-5)
        assert torch.allclose(logits(model, name), outer, atol=1e-5)
    assert torch.equal(logits(model, name), logits(zoo.build(name), name))


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_model_is_restored_after_an_error(name: str) -> None:
    model = zoo.build(name)
    with pytest.raises(IndexError), hl.masked(model, random_gates(model, 1)):
        logits(model, name, input_ids=torch.full((zoo.BATCH, zoo.POS), zoo.VOCAB))
    assert torch.equal(logits(model, name), logits(zoo.build(name), name))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", GENERATING)
def test_masks_hold_in_generation_with_and_without_cache(name: str) -> None:
    model = zoo.build(name)
    gates = random_gates(model, 3)
    batch = {key: value.flip(-1) for key, value in zoo.batch_for("llama-gqa").items()}
    with hl.masked(model, hl.HeadMask(gates)):
        cached = model.generate(**batch, **GREEDY)
        uncached = model.generate(**batch, **GREEDY, use_cache=False)
    assert torch.equal(cached, uncached)
    assert torch.equal(cached, scaled(model, gates).generate(**batch, **GREEDY))
    assert not torch.equal(cached, model.generate(**batch, **GREEDY))


@pytest.mark.parametrize("name", zoo.BRIDGED)
def test_a_bridge_gives_the_same_numbers(name: str) -> None:
    model = zoo.build(name)
    bridge, gates = hl.bridge(model), random_gates(model, 4, 0, 0.75)
    heads = [hl.heads(model)[i] for i in (0, 7, -1)]
    with hl.masked(model, gates), hl.capture(model, heads, "result") as plain:
        theirs = logits(model, name)
    with hl.masked(bridge, gates), hl.capture(bridge, heads, "result") as bridged:
        ours = logits(bridge, name)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for head in heads:
        assert torch.allclose(plain[head][0], bridged[head][0], atol=1e-5)
    assert torch.allclose(logits(bridge, name), logits(model, name), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = zoo.build("llama-gqa").to(dtype)
    gates = random_gates(model, 1)
    with hl.masked(model, gates):
        ours = logits(model, "llama-gqa")
    assert ours.dtype == dtype
    assert torch.allclose(ours, logits(scaled(model, gates), "llama-gqa"), atol=2e-2)


def test_gates_have_gradients() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    gates = torch.full((18,), 0.5, requires_grad=True)
    with hl.masked(model, gates):
        model(**batch).logits.square().sum().backward()
    assert (gates.grad != 0).all()


def test_a_mask_holds_for_passes_of_every_kind() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    gates = random_gates(model, 1)
    expected = logits(scaled(model, gates), "llama-gqa")
    with hl.masked(model, gates):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(model(**batch).logits.float(), expected, atol=0.1)
        with torch.inference_mode():
            first = model(**batch).logits
        second = model(**batch).logits
        second.sum().backward()
    assert torch.allclose(first, expected, atol=1e-5)
    assert torch.allclose(second, expected, atol=1e-5)
    assert model.model.embed_tokens.weight.grad.any()


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        (hl.HeadMask([[1, 0, 1]] * 3), "HeadMask has rows of 3 x 3 heads, but the model has 3 x 6"),
        (hl.HeadMask([[1] * 6] * 2), "2 x 6 heads, but the model has 3 x 6"),
        ([[1.0] * 5] * 3, r"\[\(5,\), \(5,\), \(5,\)\], but the model has rows of \[6, 6, 6\] heads"),
        ([1.0] * 18, r"\(\)"),
        (torch.ones(17), r"the shape \(17,\), but the model has 18 heads"),
        (torch.ones(()), r"the shape \(\), but the model has 18 heads"),
        (torch.ones(4, 3, 18), r"\(4, 3, 6\)"),
    ],
)
def test_gates_of_the_wrong_shape(gates: Any, expected: str) -> None:
    with pytest.raises(hl.HeadlabError, match=expected), hl.masked(zoo.build("llama-gqa"), gates):
        pytest.fail("the block must not begin")


def test_gates_for_another_number_of_examples() -> None:
    model = zoo.build("llama-gqa")
    with (
        pytest.raises(hl.HeadlabError, match="gates for 3 examples, but the batch has 4"),
        hl.masked(model, torch.zeros(3, 18)),
    ):
        logits(model, "llama-gqa")


def test_a_mask_for_another_model() -> None:
    model, other = zoo.build("llama-gqa"), zoo.build("llama-gqa", seed=1)
    mask = hl.HeadScores(random_gates(model, 1), record={"model": describe(model)}).keep(0.5)
    with (
        pytest.raises(hl.HeadlabError, match=r"made for another model.*headlab\.HeadMask\(x\.rows\)"),
        hl.masked(other, mask),
    ):
        pytest.fail("the block must not begin")
    with hl.masked(model, mask), hl.masked(model.bfloat16(), mask), hl.masked(other, hl.HeadMask(mask.rows)):
        pass


def test_plain_attention_has_one_site() -> None:
    model = zoo.build("llama-gqa")
    with (
        pytest.raises(hl.HeadlabError, match="one site, 'output', not 'scores'"),
        hl.masked(model, [[1] * 6] * 3, site="scores"),
    ):
        pytest.fail("the block must not begin")


@pytest.mark.parametrize("name", zoo.ALL)
def test_results_of_all_heads_and_the_bias_make_the_attention_output(name: str) -> None:
    model = build64(name)
    outputs: dict[str, Tensor] = {}
    sites = [row[0].site for row in head_rows(model)]
    hooks = [
        model.get_submodule(site).register_forward_hook(lambda _, __, output, site=site: outputs.update({site: output}))
        for site in sites
    ]
    with hl.capture(model, what="result") as results, hl.capture(model) as zs:
        logits(model, name)
    for hook in hooks:
        hook.remove()
    assert list(results) == list(zs) == hl.heads(model)
    for row, site in zip(head_rows(model), sites, strict=True):
        bias = model.get_submodule(site).bias
        total = sum(results[head][0] for head in row) + (0 if bias is None else bias)
        assert torch.allclose(total, outputs[site], atol=1e-10)
        assert all(zs[head][0].shape == (*outputs[site].shape[:2], head.d_head) for head in row)


def test_capture_of_some_heads_pass_by_pass_reduced() -> None:
    model = zoo.build("gpt2")
    wanted = [hl.heads(model)[i] for i in (11, 2)]
    with (
        hl.capture(model, [*wanted, wanted[0]]) as whole,
        hl.capture(model, wanted, reduce=lambda z: z.norm(dim=-1)) as norms,
    ):
        logits(model, "gpt2")
        logits(model, "gpt2", input_ids=torch.full((4, 7), 9))
    assert list(whole) == wanted
    for head in wanted:
        assert [tuple(z.shape) for z in whole[head]] == [(4, 7, 7)] * 2
        assert not torch.equal(whole[head][0], whole[head][1])
        assert all(torch.equal(a.norm(dim=-1), b) for a, b in zip(whole[head], norms[head], strict=True))


def test_capture_sees_what_a_mask_around_it_leaves() -> None:
    model = zoo.build("llama-gqa")
    head = hl.heads(model)[3]
    with hl.masked(model, hl.HeadMask.without(hl.heads(model), [head])), hl.capture(model, [head]) as acts:
        logits(model, "llama-gqa")
    assert not acts[head][0].any()


def test_capture_of_what_is_not_there() -> None:
    model = zoo.build("llama-gqa")
    for heads, what, expected in (
        (hl.heads(zoo.build("gpt2"))[:2], "z", "the model has no heads L0H0, L0H1"),
        (None, "weather", "'z' or 'result', not 'weather'"),
    ):
        with pytest.raises(hl.HeadlabError, match=expected), hl.capture(model, heads, what):
            pytest.fail("the block must not begin")
