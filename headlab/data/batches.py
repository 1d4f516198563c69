"""What a batch is, and which of its tokens are real."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import HeadlabError
from ..models.access import bare_model, tokenizer
from ..models.variants import base_name

Batch = dict[str, Tensor]
Batches = Iterable[Batch] | Iterable[str]

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
    root = bare_model(model)
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
    if context is not None and base_name(config.model_type)[0] in ("roberta", "xlm-roberta"):
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
