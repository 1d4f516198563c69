"""Text files into batches: running text for language models, JSON lines with labels or targets for the others."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import HeadlabError
from ..models.access import tokenizer as tokenizer_of
from .batches import IGNORED
from .losses import loss_kind

MASKED_SHARE = 0.15  # of the tokens, as BERT was trained


def text_batches(
    tokenizer: PreTrainedTokenizerBase, text: str, *, examples: int = 16, length: int = 64, batch_size: int = 8
) -> list[dict[str, Tensor]]:
    """Cut running text into examples of `length` tokens, in batches: `examples` of them, or as many as there are.

    Raises:
        HeadlabError: the text is shorter than one example.

    >>> batches = text_batches(tokenizer, open("book.txt").read(), examples=16, length=64)  # doctest: +SKIP
    """
    for name, value in (("examples", examples), ("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise HeadlabError(f"{name} must be at least 1, not {value}")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    n = min(examples, len(ids) // length)
    if n < 1:
        raise HeadlabError(f"the text has {len(ids)} tokens, fewer than one example of {length}: give more, or ask for less")
    cut = torch.tensor(ids[: n * length]).view(n, length)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in cut.split(batch_size)]


def read_batches(
    model: nn.Module,
    path: str | Path,
    *,
    examples: int = 16,
    length: int = 64,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Batches for a model's own loss, from a file.

    A causal language model reads running text; so does a masked one, which has to find 15 % of the tokens again (drawn by
    `seed`). Other models read JSON lines: `{"text": ..., "label": ...}` for a classifier (the label a number, or its name
    in the configuration), `{"text": ..., "target": ...}` for an encoder-decoder; texts are cut to `length` tokens, and
    padded.

    Raises:
        HeadlabError: the file cannot be read or is not of the form that the model needs; the model has no tokenizer.
    """
    kind = loss_kind(model)
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise HeadlabError("no tokenizer lies beside the model, so it cannot read text")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadlabError(f"cannot read the text file {path}: {error}") from None
    if kind in ("ForCausalLM", "ForMaskedLM"):
        batches = text_batches(tokenizer, text, examples=examples, length=length, batch_size=batch_size)
        return batches if kind == "ForCausalLM" else _hide_tokens(tokenizer, batches, seed)
    wanted = {"ForSequenceClassification": "label", "ForConditionalGeneration": "target"}.get(kind)
    if wanted is None:
        raise HeadlabError(f"headlab cannot make batches for {type(model).__name__} from a file: make them in Python")
    names = dict(model.config.label2id or {}) if wanted == "label" else None  # type: ignore[union-attr, arg-type]
    lines = _json_lines(text, path, wanted, names)[:examples]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return [_labelled(tokenizer, lines[i : i + batch_size], wanted, length) for i in range(0, len(lines), batch_size)]


def _hide_tokens(tokenizer: PreTrainedTokenizerBase, batches: list[dict[str, Tensor]], seed: int) -> list[dict[str, Tensor]]:
    """Replace a share of the tokens by the mask token, and ask for them; at least one in every example."""
    generator = torch.Generator().manual_seed(seed)
    hidden = []
    for batch in batches:
        ids = batch["input_ids"]
        draws = torch.rand(ids.shape, generator=generator)
        chosen = (draws < MASKED_SHARE) | (draws == draws.min(-1, keepdim=True).values)
        labels = ids.masked_fill(~chosen, IGNORED)
        hidden.append(batch | {"input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id), "labels": labels})
    return hidden


def _json_lines(
    text: str, path: str | Path, wanted: str, labels: dict[str, int] | None
) -> list[dict[str, str | int | float]]:
    """Texts with targets, or with labels; `labels` has the numbers of those by name."""
    lines: list[dict[str, str | int | float]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            said, value = found["text"], found[wanted]
        except (json.JSONDecodeError, KeyError, TypeError):
            said = value = None
        if not isinstance(said, str) or not isinstance(value, str if labels is None else str | int | float):
            raise HeadlabError(
                f'{path}, line {number}: this model needs JSON lines with "text" and "{wanted}", '
                f'as in {{"text": "...", "{wanted}": {"1" if wanted == "label" else chr(34) + "..." + chr(34)}}}'
            )
        lines.append({"text": said, wanted: value if labels is None else _label(value, labels, f"{path}, line {number}")})
    if not lines:
        raise HeadlabError(f"{path} holds no examples")
    return lines


def _label(given: str | int | float, labels: dict[str, int], where: str) -> int | float:
    """The number of a label, which may be given by its name. A model of one label (regression) takes any number."""
    if len(labels) < 2 and not isinstance(given, str):
        return given
    number = labels.get(given, given) if isinstance(given, str) else given
    if number not in labels.values():
        known = ", ".join(f"{i} ({name})" for name, i in labels.items())
        raise HeadlabError(f"{where}: the model has no label {given!r}; it has {known}")
    return int(number)


def _labelled(
    tokenizer: PreTrainedTokenizerBase, lines: list[dict[str, str | int | float]], wanted: str, length: int
) -> dict[str, Tensor]:
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": length}
    batch = dict(tokenizer([line["text"] for line in lines], **options))
    if wanted == "label":
        return batch | {"labels": torch.tensor([line["label"] for line in lines])}
    target = tokenizer(text_target=[line["target"] for line in lines], **options)
    return batch | {"labels": target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)}
