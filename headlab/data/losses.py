"""Losses: a model's own on a batch, and what holds for any."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import HeadlabError
from ..models.access import bare_model
from .batches import IGNORED, Batch, count_examples, real_tokens

Loss = Callable[[nn.Module, Batch], Tensor]
"""`loss(model, batch)` gives one number per example, `[batch]`."""
Metric = Callable[[nn.Module, list[Batch]], float]
"""`metric(model, batches)` gives one number for the whole corpus; a higher one is better."""


def loss_name(loss: Loss | Metric | None) -> str:
    """How a record names a loss."""
    return "own" if loss is None else getattr(loss, "__qualname__", type(loss).__name__)


def check_losses(losses: Tensor, batch: Batch) -> Tensor:
    """The losses, if they are one number per example of the batch; else an error."""
    n = count_examples([batch])
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise HeadlabError(f"loss(model, batch) must give one number per example, a tensor of shape ({n},), not {found}")
    return losses


def forward(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch, without what only a loss needs: with labels, transformers edits a config."""
    root = bare_model(model)
    makes_input = type(root).__name__.endswith(("ForConditionalGeneration", "EncoderDecoderModel"))  # from labels
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if makes_input or name not in _LABELS}
    if "use_cache" in inspect.signature(root.forward).parameters:
        inputs["use_cache"] = False  # nothing follows that would read it
    return root(**inputs)


def own_loss(model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
    """The model's own loss, one number per example: the mean over the example's real tokens that have a label.

    Causal models predict `labels`, or the input itself if there are none; other models need `labels`.

    Raises:
        HeadlabError: the model has no loss of its own, or the batch no labels; the message says what to pass.
    """
    root = bare_model(model)
    kind = loss_kind(model)
    if kind != "ForCausalLM" and not all(name in batch for name in _NEEDED[kind]):
        raise HeadlabError(f"a batch for {type(root).__name__} needs {' and '.join(_NEEDED[kind])}, or pass your own loss=")
    output = forward(model, batch)
    if kind == "ForQuestionAnswering":
        spans = [(output.start_logits, batch["start_positions"]), (output.end_logits, batch["end_positions"])]
        if any(((at < 0) | (at >= logits.shape[1])).any() for logits, at in spans):
            raise HeadlabError("an answer starts or ends outside its example's tokens: leave such examples out")
        start, end = (F.cross_entropy(_precise(logits), at, reduction="none") for logits, at in spans)
        return (start + end) / 2
    logits = _precise(output.logits)
    if kind == "ForSequenceClassification":
        return _classification(root, logits, batch["labels"])
    labels = batch.get("labels")
    if kind == "ForCausalLM":
        real = real_tokens(batch)
        if labels is None:
            labels = batch["input_ids"].masked_fill(~real, IGNORED)
        if real.shape == labels.shape:
            labels = labels.masked_fill(~F.pad(real[:, :-1], (1, 0)), IGNORED)  # a left pad has nothing to predict from
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # shifting the labels copies less than cutting the logits
    assert labels is not None
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (labels != IGNORED).sum(-1)
    if not counted.all():
        raise HeadlabError("an example has no token to predict: every example needs at least one label")
    return losses.view(labels.shape).sum(-1) / counted


def _precise(logits: Tensor) -> Tensor:
    """In float32, or more if they come in more."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


_LABELS = ("labels", "start_positions", "end_positions", "next_sentence_label")
_NEEDED = {
    "ForConditionalGeneration": ("labels",),
    "ForMaskedLM": ("labels",),
    "ForTokenClassification": ("labels",),
    "ForSequenceClassification": ("labels",),
    "ForQuestionAnswering": ("start_positions", "end_positions"),
}


def loss_kind(model: nn.Module) -> str:
    """Which loss a model has, by transformers' ending of its class: `ForCausalLM`, `ForMaskedLM` ..."""
    name = type(bare_model(model)).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "ForCausalLM"
    kind = next((kind for kind in _NEEDED if name.endswith(kind)), None)
    if kind is None:
        raise HeadlabError(f"{name} has no loss of its own: pass loss=, a function (model, batch) -> one number per example")
    return kind


def _classification(root: PreTrainedModel, logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers decides: one output is a regression, float labels are several yes-or-no questions."""
    if logits.shape[-1] == 1 or root.config.problem_type == "regression":
        return F.mse_loss(logits.view(labels.shape), labels.float(), reduction="none").view(len(labels), -1).mean(-1)
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)
    return F.cross_entropy(logits, labels, reduction="none")
