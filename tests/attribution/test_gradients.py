"""Gradient scores against finite differences, and against gradients taken with plain hooks one example at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import headlab as hl
from headlab.models.access import head_rows
from tests.helpers import zoo
from tests.helpers.float64 import build64, loss64

Rows = list[np.ndarray]
REDUCTIONS = ["token", "example", "batch", "signed"]
SITES = ("attn.c_proj", "attention.dense", "self_attn.o_proj", "attention.output.dense", "Attention.o")


def output_projections(model: nn.Module) -> list[nn.Module]:
    """Found by name, in the order encoder, decoder, cross-attention."""
    found = [(name, module) for name, module in model.named_modules() if name.endswith(SITES)]
    return [module for _, module in sorted(found, key=lambda item: ("EncDec" in item[0], "decoder" in item[0]))]


def n_heads(model: nn.Module) -> int:
    return model.config.num_attention_heads


def examples_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Batches of one without padding."""
    found = []
    for i in range(len(batch["input_ids"])):
        real = batch["attention_mask"][i].bool()
        example = {"input_ids": batch["input_ids"][i][real][None]}
        if "labels" in batch:
            labels = batch["labels"][i]
            if labels.ndim and len(labels) == len(real):
                labels = labels[real]
            example["labels"] = labels[labels != -100][None] if labels.ndim else labels[None]
        found.append(example)
    return found


def their_loss(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    """What transformers itself says the loss of one example is (in float32 always)."""
    return model(**{"labels": example["input_ids"], **example}).loss


@contextmanager
def leaves(model: nn.Module) -> Iterator[list[Tensor]]:
    """Every output projection's input times a leaf of ones, `[batch, pos, head]`."""
    made: list[Tensor] = []
    handles = []
    for projection in output_projections(model):

        def times(_: nn.Module, args: tuple[Any, ...]) -> Tensor:
            z = args[0].unflatten(-1, (n_heads(model), -1))
            made.append(torch.ones(z.shape[:3], dtype=z.dtype, requires_grad=True))
            return (z * made[-1][..., None]).flatten(2)

        handles.append(projection.register_forward_pre_hook(times))
    yield made
    for handle in handles:
        handle.remove()


def gradients_alone(model: nn.Module, example: dict[str, Tensor]) -> list[np.ndarray]:
    """dL/dxi of one example, `[pos, head]` per row in the order of the rows."""
    with leaves(model) as made:
        losses = their_loss(model, example)
    in_order_of_use = [gradient[0].numpy() for gradient in torch.autograd.grad(losses, made)]
    if not model.config.is_encoder_decoder:
        return in_order_of_use
    n_enc = model.config.num_layers
    return in_order_of_use[:n_enc] + in_order_of_use[n_enc::2] + in_order_of_use[n_enc + 1 :: 2]


def dumb_scores(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[dict[str, Rows], int, list[int]]:
    """Sums over examples by reduction; and by what they may be divided: examples, and tokens per row."""
    n_rows = len(output_projections(model))
    totals = {reduction: [np.zeros(n_heads(model)) for _ in range(n_rows)] for reduction in REDUCTIONS}
    n_examples, n_tokens = 0, [0] * n_rows
    for batch in batches:
        of_batch = [np.zeros(n_heads(model)) for _ in range(n_rows)]
        for example in examples_of(batch):
            n_examples += 1
            for row, gradient in enumerate(gradients_alone(model, example)):
                n_tokens[row] += len(gradient)
                of_batch[row] += gradient.sum(0)
                totals["example"][row] += abs(gradient.sum(0))
                for token in gradient:
                    totals["token"][row] += abs(token)
        for row in range(n_rows):
            totals["batch"][row] += abs(of_batch[row])
            totals["signed"][row] -= of_batch[row]
    return totals, n_examples, n_tokens


def close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Equal, up to `rtol` of the largest number."""
    size = max(abs(x) for row in expected for x in row)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * size)


def two_batches(name: str) -> list[dict[str, Tensor]]:
    second = {key: value[:3] for key, value in zoo.batch_for(name, seed=1).items()}
    return [zoo.batch_for(name), second]


@pytest.mark.parametrize("name", zoo.WITH_LOSS)
def test_reductions_against_one_example_at_a_time(name: str) -> None:
    model, batches = zoo.build(name).double(), two_batches(name)
    totals, n, _ = dumb_scores(model, batches)
    for reduction in REDUCTIONS:
        scores = hl.importance(model, batches, reduction=reduction)
        close(scores.values, [row / n for row in totals[reduction]])
        assert scores.heads == head_rows(model)


@pytest.mark.parametrize("name", ["llama-gqa", "bert-mlm", "t5"])
@pytest.mark.parametrize("denominator", ["tokens", "published"])
def test_denominators(name: str, denominator: str) -> None:
    model, batches = zoo.build(name).double(), two_batches(name)
    totals, n_examples, n_tokens = dumb_scores(model, batches)
    last = {"llama-gqa": [2], "bert-mlm": [2], "t5": [2, 4, 6]}[name]
    divisors = [n_examples if denominator == "published" and row in last else n for row, n in enumerate(n_tokens)]
    assert len(set(divisors)) > 1 or denominator == "tokens"
    scores = hl.importance(model, batches, reduction="token", denominator=denominator)
    close(scores.values, [total / n for total, n in zip(totals["token"], divisors, strict=True)])


@pytest.mark.parametrize("name", [*zoo.MHA_GQA_MQA, "gpt2", "bert-classifier", "t5"])
@pytest.mark.parametrize("kind", [None, "mean", "mean per position", "resample"])
def test_gradients_against_finite_differences_of_gates(name: str, kind: str | None) -> None:
    model, batch = build64(name), zoo.batch_for(name)
    options = {"mean": {}, "mean per position": {"per_position": True}, "resample": {"kind": "resample"}}
    fill = None if kind is None else hl.fill(model, [batch], **options[kind])
    rows = head_rows(model)
    step = 1e-6  # T5's relu has kinks
    expected: Rows = []
    for row in range(len(rows)):
        per_head = []
        for head in range(len(rows[row])):
            sides = []
            for gate in (1 + step, 1 - step):
                gates = [np.ones(len(r)) for r in rows]
                gates[row][head] = gate
                with torch.no_grad(), hl.masked(model, gates, fill):
                    sides.append(loss64(model, batch))
            per_head.append((sides[0] - sides[1]).numpy() / (2 * step))
        expected.append(np.array(per_head).T)  # [example, head]
    signed = hl.importance(model, [batch], reduction="signed", loss=loss64, fill=fill)
    close(signed.values, [-row.mean(0) for row in expected], rtol=1e-6)
    by_example = hl.importance(model, [batch], reduction="example", loss=loss64, fill=fill)
    close(by_example.values, [abs(row).mean(0) for row in expected], rtol=1e-6)


@pytest.mark.parametrize("name", zoo.MHA_GQA_MQA)
def test_signed_predicts_what_removal_costs(name: str) -> None:
    model, batches = zoo.build(name), two_batches(name)
    fill = hl.fill(model, batches)
    signed = hl.importance(model, batches, reduction="signed", fill=fill)
    exact = hl.ablation(model, batches, fill=fill)
    assert spearmanr(signed.flat, exact.flat).statistic > 0.5


def test_normalize() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    raw = hl.importance(model, [batch]).values
    close(hl.importance(model, [batch], normalize="layer").values, [r / np.sqrt((r**2).sum()) for r in raw])
    low, high = min(map(min, raw)), max(map(max, raw))
    close(hl.importance(model, [batch], normalize="minmax").values, [(r - low) / (high - low) for r in raw])


PRECISE = [*zoo.MHA_GQA_MQA, "gpt2", "bert-mlm", "bert-classifier", "t5"]
PADDED_LEFT = [*zoo.MHA_GQA_MQA, "gpt2", "bert-mlm", "t5"]  # a classifier reads its answer off the first position


@pytest.mark.parametrize(("name", "left"), [(n, True) for n in PADDED_LEFT] + [(n, False) for n in zoo.WITH_LOSS])
def test_padding_never_counts(name: str, left: bool) -> None:
    model, batch = build64(name), zoo.batch_for(name, padded=False)
    padded = dict(batch)
    for key, garbage in (("input_ids", torch.randint(3, zoo.VOCAB, (4, 3))), ("attention_mask", 0), ("labels", -100)):
        if key in batch and batch[key].ndim == 2:
            columns = torch.zeros(4, 3, dtype=torch.long) + garbage
            before = left and not (name == "t5" and key == "labels")
            padded[key] = torch.cat([columns, batch[key]] if before else [batch[key], columns], 1)
    if left and name != "t5":  # whoever pads on the left says where positions start
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for reduction in ("token", "signed"):
        options = {"reduction": reduction, "denominator": "tokens", "loss": loss64}
        more, less = hl.importance(model, [padded], **options), hl.importance(model, [batch], **options)
        close(more.values, less.values, rtol=1e-6 if name not in PRECISE else 1e-10)


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_padding_does_not_count_even_where_the_loss_reads_it(reduction: str) -> None:
    model, batch = build64("llama-gqa"), zoo.batch_for("llama-gqa")

    def all_positions(m: nn.Module, b: Any) -> Tensor:
        return m(**b).logits.square().mean((1, 2))

    with leaves(model) as made:
        losses = all_positions(model, batch)
    real = batch["attention_mask"][..., None]
    gradients = [gradient * real for gradient in torch.autograd.grad(losses.sum(), made)]
    assert real.sum() < real.numel()
    expected = [g.abs().sum((0, 1)) if reduction == "token" else g.sum(1).abs().sum(0) for g in gradients]
    scores = hl.importance(model, [batch], loss=all_positions, reduction=reduction)
    close(scores.values, [row.numpy() / zoo.BATCH for row in expected])


def test_how_batches_are_cut_does_not_matter() -> None:
    model, batch = zoo.build("llama-gqa").double(), zoo.batch_for("llama-gqa")
    cut = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    whole = hl.importance(model, [batch])
    close(hl.importance(model, cut).values, whole.values)
    assert not np.allclose(hl.importance(model, cut, reduction="batch").flat, whole.flat)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = zoo.build("bert-mlm").train()
    model.bert.encoder.layer[1].eval()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def loss(m: nn.Module, batch: Any) -> Tensor:
        assert not any(p.requires_grad for p in m.parameters())
        assert not any(module.training for module in m.modules())
        losses = hl.own_loss(m, batch)
        if fails:
            raise KeyboardInterrupt
        return losses

    try:
        hl.importance(model, [zoo.batch_for("bert-mlm")], loss=loss)
        assert not fails
    except KeyboardInterrupt:
        assert fails
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bert-mlm", "t5"])
def test_plain_equals_bridge(name: str) -> None:
    model, batch = zoo.build(name), zoo.batch_for(name)
    bridge = hl.bridge(model)
    close(hl.importance(bridge, [batch]).values, hl.importance(model, [batch]).values, rtol=1e-4)
    bridge.cfg.use_attn_result = name in ("gpt2", "llama-gqa")
    close(hl.importance(bridge, [batch]).values, hl.importance(model, [batch]).values, rtol=1e-4)


def test_a_loss_of_ones_own_may_run_the_model_more_than_once() -> None:
    model, first, second = (zoo.build("llama-gqa").double(), *two_batches("llama-gqa"))
    second = zoo.batch_for("llama-gqa", seed=1)
    shorter = {key: value[:, :6] for key, value in second.items()}

    def both(m: nn.Module, batch: Any) -> Tensor:
        return hl.own_loss(m, batch) + 3 * hl.own_loss(m, shorter)

    totals: Rows = [np.zeros(6) for _ in range(zoo.LAYERS)]
    for one, other in zip(examples_of(first), examples_of(shorter), strict=True):
        for row, (g, h) in enumerate(zip(gradients_alone(model, one), gradients_alone(model, other), strict=True)):
            totals[row] += abs(g.sum(0) + 3 * h.sum(0))
    close(hl.importance(model, [first], loss=both).values, [row / zoo.BATCH for row in totals])


def test_bad_options() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    with pytest.raises(hl.HeadlabError, match=r"one number per example, a tensor of shape \(4,\), not \(\)"):
        hl.importance(model, [batch], loss=lambda m, b: hl.own_loss(m, b).mean())
    with pytest.raises(hl.HeadlabError, match="not float"):
        hl.importance(model, [batch], loss=lambda m, b: hl.own_loss(m, b).mean().item())
    for options in ({"method": "tailor"}, {"reduction": "sum"}, {"denominator": "heads"}, {"normalize": "l2"}):
        with pytest.raises(hl.HeadlabError, match=next(iter(options))):
            hl.importance(model, [batch], **options)
    with pytest.raises(hl.HeadlabError, match="needs batches"):
        hl.importance(model)
    other = hl.fill(zoo.build("llama-gqa", seed=1), [batch])
    with pytest.raises(hl.HeadlabError, match="another model"):
        hl.importance(model, [batch], fill=other)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    with pytest.raises(hl.HeadlabError, match=r"batches of different sizes, \[1, 3\]"):
        hl.importance(model, [batch], loss=lambda m, _: torch.cat([hl.own_loss(m, half) for half in halves]))
    with pytest.raises(hl.HeadlabError, match="detached"):
        hl.importance(model, [batch], loss=lambda m, b: hl.own_loss(m, b).detach())
