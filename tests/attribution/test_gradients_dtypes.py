"""Gradient scores of half-precision models, of broken ones, of pruned ones; and what they hold in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import headlab as hl
from headlab.models.access import head_rows
from tests.helpers import zoo

D_HEAD = 10  # of the Llamas
VALUE = "model.layers.1.self_attn.v_proj"


def carried(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What goes into every output projection, and the gradient of the summed loss to it."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].retain_grad()
        inputs.append(args[0])

    handles = [layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
    hl.own_loss(model, batch).sum().backward()
    for handle in handles:
        handle.remove()
    return [(z.detach(), z.grad) for z in inputs]


@pytest.mark.parametrize("name", zoo.MHA_GQA_MQA)
def test_bfloat16_products_are_summed_in_float32(name: str) -> None:
    batch = zoo.batch_for(name)
    half = zoo.build(name).bfloat16()
    scores = hl.importance(half, [batch], reduction="token")
    for row, (z, gradient) in zip(scores.values, carried(half, batch), strict=True):
        assert z.dtype == gradient.dtype == torch.bfloat16
        products = (z.double() * gradient.double()).unflatten(-1, (-1, D_HEAD))  # [batch, pos, head, d_head]
        gates = products.sum(-1)[batch["attention_mask"].bool()]
        np.testing.assert_allclose(row, gates.abs().sum(0).numpy() / zoo.BATCH, rtol=1e-5)


@pytest.mark.parametrize("name", [*zoo.MHA_GQA_MQA, "gpt2", "bert-mlm", "t5"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.05)])
def test_half_precision_comes_close(name: str, dtype: torch.dtype, tolerance: float) -> None:
    batch = zoo.batch_for(name)
    whole = hl.importance(zoo.build(name), [batch])
    half = hl.importance(zoo.build(name).to(dtype), [batch])
    assert 0 < np.linalg.norm(half.flat - whole.flat) < tolerance * np.linalg.norm(whole.flat)
    assert half.record["model"]["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("name", "head"), [("llama-mha", 4), ("llama-gqa", 1), ("llama-mqa", 0)])
def test_weights_that_overflow_name_the_first_head(name: str, head: int) -> None:
    model = zoo.build(name).half()
    weight = model.get_submodule(VALUE).weight.data
    weight[D_HEAD * head : D_HEAD * (head + 1)] = 3e4
    first = {"llama-mha": "L1H4", "llama-gqa": "L1H2", "llama-mqa": "L1H0"}[name]
    with pytest.raises(hl.HeadlabError, match=f"loss of batch 0 is NaN or infinite; head {first} was the first"):
        hl.importance(model, [zoo.batch_for(name)])


def test_a_broken_output_names_its_batch() -> None:
    model, fine = zoo.build("llama-mha"), zoo.batch_for("llama-mha")
    bad = zoo.batch_for("llama-mha", seed=1)

    def break_values(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if len(output) == 3:
            output = output.unflatten(-1, (-1, D_HEAD)).clone()
            output[2, 1, 3] = float("nan")
            output = output.flatten(-2)
        return output

    model.get_submodule(VALUE).register_forward_hook(break_values)
    bad = {key: value[:3] for key, value in bad.items()}
    with pytest.raises(hl.HeadlabError, match=r"batch 2 is NaN or infinite; head L1H3 was the first"):
        hl.importance(model, [fine, fine, bad, bad])


def test_a_broken_loss_with_whole_heads_says_so() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    with pytest.raises(hl.HeadlabError, match="outputs of all heads are finite, so it appeared after them"):
        hl.importance(model, [batch], loss=lambda m, b: hl.own_loss(m, b) * float("inf"))


class _Break(torch.autograd.Function):
    """Nothing on the way forward; on the way back one head's gradient is lost."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, head: int) -> Tensor:
        ctx.head = head
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.unflatten(-1, (-1, D_HEAD)).clone()
        gradient[2, 1, ctx.head] = float("inf")
        return gradient.flatten(-2), None


def test_a_broken_gradient_names_head_and_batch() -> None:
    model, batch = zoo.build("llama-mha"), zoo.batch_for("llama-mha")
    runs = []

    def loss(m: nn.Module, b: Any) -> Tensor:
        runs.append(b)
        projection = m.model.layers[1].self_attn.o_proj  # hooked after headlab, so the gradient comes here first
        hook = projection.register_forward_pre_hook(lambda _, args: _Break.apply(args[0], 4) if len(runs) == 2 else None)
        losses = hl.own_loss(m, b)
        hook.remove()
        return losses

    with pytest.raises(hl.HeadlabError, match="infinity in batch 1: the gradient at head L1H4 was the first"):
        hl.importance(model, [batch, batch, batch], loss=loss)


def test_float16_gradients_that_vanish_give_advice() -> None:
    model, batch = zoo.build("llama-gqa").half(), zoo.batch_for("llama-gqa")
    with pytest.raises(hl.HeadlabError, match=r"in model\.layers\.0\.self_attn is exactly zero.*bfloat16.*scale the loss"):
        hl.importance(model, [batch], loss=lambda m, b: 1e-7 * hl.own_loss(m, b))


def test_one_silent_layer_is_an_error_in_float16_only() -> None:
    batch = zoo.batch_for("llama-gqa")
    model = zoo.build("llama-gqa")
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    scores = hl.importance(model, [batch])
    assert scores.values[1].tolist() == [0] * 6
    assert all([*scores.values[0], *scores.values[2]])
    with pytest.raises(hl.HeadlabError, match=r"model\.layers\.1\.self_attn is exactly zero"):
        hl.importance(model.half(), [batch])


def held(n_heads: int) -> int:
    """Bytes that autograd keeps for the backward pass, of a model with 60 numbers in all heads together."""
    config = hf.LlamaConfig(
        vocab_size=zoo.VOCAB, hidden_size=42, intermediate_size=59, num_hidden_layers=zoo.LAYERS,
        num_attention_heads=n_heads, num_key_value_heads=n_heads, head_dim=60 // n_heads,
    )  # fmt: skip
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    model = hf.LlamaForCausalLM(config)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hl.importance(model, [zoo.batch_for("llama-mha", padded=False)])
    return total


def test_memory_does_not_grow_with_heads() -> None:
    few, many = held(2), held(6)
    a_number_per_head_and_token = (6 - 2) * zoo.LAYERS * zoo.BATCH * zoo.POS * 4
    assert few > 100 * a_number_per_head_and_token / 4
    assert many - few <= 2 * a_number_per_head_and_token  # the gates, and what attention sums over keys


@pytest.mark.parametrize("name", [*zoo.MHA_GQA_MQA, "gpt2", "bert-mlm", "t5"])
@pytest.mark.parametrize("gqa", ["pad", "ungroup"])
def test_pruned_models_are_scored_as_the_masked_model(name: str, gqa: Any) -> None:
    model, batch = zoo.build(name), zoo.batch_for(name)
    rows = head_rows(model)
    keep = [np.arange(len(row)) % 5 < 3 for row in rows]
    keep[1][:] = False  # a whole layer goes
    keep[2][1] = False
    mask = hl.HeadMask(keep, rows)
    with hl.masked(model, mask):
        expected = hl.importance(model, [batch])
    found = hl.importance(hl.prune(model, mask, gqa=gqa), [batch])
    assert [len(row) for row in found.values] == [int(row.sum()) for row in keep]
    assert [str(head) for row in found.heads for head in row] == [str(head) for head in mask.kept]
    left = np.concatenate([row[kept] for row, kept in zip(expected.values, keep, strict=True)])
    np.testing.assert_allclose(found.flat, left, rtol=1e-3, atol=1e-5 * left.max())


def test_a_model_without_heads_has_no_scores() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    bare = hl.prune(model, hl.HeadMask([[0] * 6] * 3))
    assert [len(row) for row in hl.importance(bare, [batch]).values] == [0, 0, 0]
    assert [len(row) for row in hl.ablation(bare, [batch]).values] == [0, 0, 0]


def test_a_layer_that_is_masked_has_zero_gradients_without_an_error() -> None:
    model, batch = zoo.build("llama-gqa").half(), zoo.batch_for("llama-gqa")
    mask = hl.HeadMask.without(hl.heads(model), [f"L1H{i}" for i in range(6)])
    with hl.masked(model, mask):
        scores = hl.importance(model, [batch])
    assert (scores.values[1] == 0).all()
    assert (scores.values[0] > 0).all()
