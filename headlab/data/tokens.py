"""The tokens that a model reads: how many there are, what they say, which of them are no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models.access import bare_model, tokenizer
from ..models.attention_modules import bare
from .batches import context_length

_SPECIAL = ("bos", "eos", "pad", "sep", "cls", "mask", "unk", "decoder_start")
_ENDS = ("eos_token_id", "sep_token_id")


@dataclass(frozen=True)
class Tokens:
    """What is known of a model's tokens.

    Attributes:
        words: the tokenizer, where one lies beside the model.
        embedded: how many tokens the model has an embedding of.
        known: how many of them stand for something: where there is a tokenizer, those that it knows.
        special: the numbers of those that are no text: the configuration's, and those added to the tokenizer.
        ends: of those that end a text, or a part of one.
        context: the longest input, in tokens; None where nothing limits it.
        inputs: under which names a batch has tokens: those of the encoder, and of the decoder if there is one.
        device: where the model is.
    """

    words: PreTrainedTokenizerBase | None
    embedded: int
    known: int
    special: frozenset[int]
    ends: frozenset[int]
    context: int | None
    inputs: tuple[str, ...]
    device: torch.device


def tokens_of(model: nn.Module) -> Tokens:
    """The tokens that a model reads."""
    root, words = bare_model(model), tokenizer(model)
    config: Any = root.config.get_text_config()
    embedding: Any = bare(root.get_input_embeddings())
    special = _numbers(config, *(f"{name}_token_id" for name in _SPECIAL))
    if words is not None:
        special |= {*words.all_special_ids, *getattr(words, "added_tokens_decoder", {})}
    return Tokens(
        words=words,
        embedded=embedding.weight.shape[0],
        known=config.vocab_size if words is None else min(config.vocab_size, len(words)),
        special=frozenset(special),
        ends=frozenset(_numbers(config, *_ENDS) | _numbers(words, *_ENDS)),
        context=context_length(root),
        inputs=("input_ids", "decoder_input_ids") if root.config.is_encoder_decoder else ("input_ids",),
        device=root.device,
    )


def _numbers(owner: Any, *names: str) -> set[int]:
    """The numbers that attributes hold, each one or several or none."""
    found = [value for name in names if (value := getattr(owner, name, None)) is not None]
    return {number for value in found for number in (value if isinstance(value, (list, tuple)) else [value])}
