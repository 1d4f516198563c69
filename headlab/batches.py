"""The data: what a batch is, which of its tokens are real, what a model's own loss on it is."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import HeadlabError
from .models.access import inner, tokenizer
from .models.variants import PRUNED

Batch = dict[str, Tensor]
Batches = Iterable[Batch] | Iterable[str]
Loss = Callable[[nn.Module, Batch], Tensor]
"""`loss(model, batch)` gives one number per example, `[batch]`."""
Metric = Callable[[nn.Module, list[Batch]], float]
"""`metric(model, batches)` gives one number for the whole corpus; a higher one is better."""

TEXTS_PER_BATCH = 8
IGNORED = -100  # label of a token that has no loss, as everywhere in transformers


def prepare(model: nn.Module, batches: Batches) -> list[dict[str, Tensor]]:
    """The batches as a list of dicts of tensors on the model's device; strings are tokenized and padded on the right.

    Raises:
        HeadlabError: there are none, one has no tokens, or one is longer than the model's context.
    """
    if isinstance(batches, (str, Mapping)):
        raise HeadlabError("batches is a list (of dicts with input_ids, or of strings), not a single one: put it in [...]")
    given: list[Any] = list(batches)
    if not given:
        raise HeadlabError("there are no batches: expected at least one dict with input_ids, or one string")
    if all(isinstance(text, str) for text in given):
        given = _tokenized(model, given)
    root = inner(model)
    context = context_length(root)
    prepared = []
    for number, batch in enumerate(given):
        if not isinstance(batch, Mapping) or not any(name in batch for name in ("input_ids", "inputs_embeds")):
            raise HeadlabError(f"batch {number} is not a dict with input_ids (nor is every batch a string)")
        try:
            moved = {name: torch.as_tensor(value).to(root.device) for name, value in batch.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise HeadlabError(f"batch {number} is not made of tensors: {str(error).splitlines()[0]}") from None
        main = moved["input_ids" if "input_ids" in moved else "inputs_embeds"]
        if main.ndim < 2 or main.numel() == 0:
            raise HeadlabError(f"batch {number} is empty: input_ids has the shape {tuple(main.shape)}, not [batch, pos]")
        if context is not None and main.shape[1] > context:
            raise HeadlabError(
                f"batch {number} is {main.shape[1]} tokens long, but the model's context is {context}: cut its examples to "
                f"that (length={context}, or --length {context})"
            )
        if not _mask(moved, main).any(-1).all():
            raise HeadlabError(f"batch {number} has an example without a single real token")
        prepared.append(moved)
    return prepared


def _tokenized(model: nn.Module, texts: list[str]) -> list[dict[str, Tensor]]:
    found = tokenizer(model)
    if found is None:
        raise HeadlabError("the model brings no tokenizer: give batches as dicts with input_ids, not as strings")
    if found.pad_token is None:
        found.pad_token = found.eos_token
    if found.pad_token is None:
        raise HeadlabError("the tokenizer has no token to pad with: set its pad_token, or give batches of dicts")
    chunks = [texts[i : i + TEXTS_PER_BATCH] for i in range(0, len(texts), TEXTS_PER_BATCH)]
    return [dict(found(chunk, return_tensors="pt", padding=True, padding_side="right")) for chunk in chunks]


def context_length(root: PreTrainedModel) -> int | None:
    """The longest input that a model takes; None where nothing limits it (relative positions)."""
    config = root.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and config.model_type.removeprefix(PRUNED) in ("roberta", "xlm-roberta"):
        context -= config.pad_token_id + 1  # these count positions from there
    return context


def _mask(batch: Batch, main: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones(main.shape[:2], device=main.device) if mask is None else mask


def real_tokens(batch: Batch, stack: str = "") -> Bool[Tensor, "batch pos"]:
    """Which positions hold real tokens, for the heads of a stack; padding never counts."""
    if stack in ("dec", "cross"):
        if (mask := batch.get("decoder_attention_mask")) is not None:
            return mask.bool()
        if (labels := batch.get("labels")) is not None and labels.ndim == 2:
            return labels != IGNORED
        if (tokens := batch.get("decoder_input_ids")) is not None:
            return torch.ones_like(tokens, dtype=torch.bool)
    # a classifier's decoder reads what its encoder reads
    main = batch.get("input_ids", batch.get("inputs_embeds"))
    assert main is not None
    return _mask(batch, main).bool()


def data_fingerprint(batches: Iterable[Batch]) -> str:
    """Twelve hex digits that tell data apart by everything in the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = batch[name].detach().cpu()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update((value.float() if value.dtype == torch.bfloat16 else value).contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def describe_data(batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """What a result says about the data it was computed from."""
    tokens = sum(int(real_tokens(batch).sum()) for batch in batches)
    return {"fingerprint": data_fingerprint(batches), "examples": count_examples(batches), "tokens": tokens}


def count_examples(batches: Iterable[Batch]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in batches)


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
    root = inner(model)
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
    root = inner(model)
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
    name = type(inner(model)).__name__
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
