"""A model as every algorithm reads it, plain or as a bridge: its rows of heads, its tokenizer, what tells it from others."""

from __future__ import annotations

import copy
import hashlib
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import HeadlabError
from ..tables import Head, Heads
from ..version import __version__
from .attention_modules import Attention, attentions, bare

if TYPE_CHECKING:
    from collections.abc import Iterator


def is_bridge(model: nn.Module) -> bool:
    """Whether a model is a TransformerBridge (without importing TransformerLens)."""
    bridge = sys.modules.get("transformer_lens.model_bridge")
    return bridge is not None and isinstance(model, bridge.TransformerBridge)


def is_folded(model: nn.Module) -> bool:
    """Whether a bridge has processed weights (compatibility mode), so that removing a head means something else."""
    return is_bridge(model) and bool(getattr(model, "compatibility_mode", False))


def bare_model(model: nn.Module) -> PreTrainedModel:
    """The module tree with the Hugging Face class at its root, of a plain model or of a bridge."""
    return cast("PreTrainedModel", model.original_model if is_bridge(model) else model)


def rows(model: nn.Module, site: str = "output") -> tuple[Attention, ...]:
    """Every attention module of a plain model or a bridge, in the order of the rows of scores and masks."""
    found = tuple(row.at(site) for row in attentions(bare_model(model)))
    if site != "output" and not any(row.groups for row in found):
        raise HeadlabError(f"no layer of the model has anything to remove at the site {site!r}")
    return found


def heads(model: nn.Module, site: str = "output") -> list[Head]:
    """Every attention head of a model, in order: encoder, then decoder, then cross-attention; layer by layer.

    Args:
        model: a plain model or a bridge.
        site: in models with composed heads that are pruned, heads may have their scores left and not their output, or
            the other way round: those that can be removed at this site (see `masked`).

    Raises:
        HeadlabError: the model has an attention module that no description fits (the message names it), or no such site.

    >>> [str(head) for head in heads(model)][:3]  # doctest: +SKIP
    ['L0H0', 'L0H1', 'L0H2']
    """
    return [head for row in rows(model, site) for head in row.heads]


def head_rows(model: nn.Module, site: str = "output") -> Heads:
    """Every attention head of a model, one tuple per row."""
    return tuple(row.heads for row in rows(model, site))


def bare_copy(model: nn.Module) -> PreTrainedModel:
    """The plain model: itself, or a clean copy of what a bridge wraps.

    Raises:
        HeadlabError: the bridge is in compatibility mode (its weights are not the model's), or it is no such model.
    """
    if not is_bridge(model):
        if not isinstance(model, PreTrainedModel):
            raise HeadlabError(f"expected a Hugging Face model or a TransformerBridge, not a {type(model).__name__}")
        return model
    if is_folded(model):
        raise HeadlabError(
            "this bridge is in compatibility mode: value biases and norms have moved into other weights, so removing a "
            "head means something else than in the model; use the model itself, or a bridge without that mode"
        )
    wrapped = bare_model(model)
    kept = (value for module in wrapped.modules() for value in vars(module).values())
    passes = [value for value in kept if isinstance(value, torch.Tensor) and not value.is_leaf]
    memo = {id(value): value.detach() for value in passes}  # patterns of the last pass, which deepcopy would refuse
    plain = copy.deepcopy(wrapped, memo)
    _bare_below(plain)
    return plain


def _bare_below(module: nn.Module) -> None:
    """Put every component that a bridge wraps back in its place, without what the bridge has added to it."""
    for name, wrapped in list(module.named_children()):
        original = bare(wrapped)
        if original is not wrapped:
            setattr(module, name, original)
            if getattr(vars(original).get("forward"), "__module__", "").startswith("transformer_lens"):
                del original.forward  # T5 blocks are patched to call the bridge's hooks
            if original._buffers.pop("bias", None) is not None:
                original.register_parameter("bias", None)  # an unembedding without bias was given one
        _bare_below(original)


def probe_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    """A few tokens that any model takes."""
    plain = bare_model(model)
    ids = torch.arange(5, device=plain.device)[None] % plain.config.get_text_config().vocab_size
    extra = {"decoder_input_ids": ids} if plain.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | extra


def tokenizer(model: nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model's weights, if there is one; else that of a bridge, which may be made to put
    the first token in front."""
    own = cast("PreTrainedTokenizerBase | None", model.tokenizer if is_bridge(model) else None)
    name = bare_model(model).config._name_or_path
    if not name or (Path(name).is_dir() and not any(map(_of_tokenizer, Path(name).iterdir()))):
        return own  # of a folder without one, transformers makes up an empty one
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return own


def _of_tokenizer(file: Path) -> bool:
    return file.name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece"))


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits that tell models apart by their attention weights, in float32 as in bfloat16, plain or bridged."""
    digest = hashlib.sha256()
    weights: list[Any] = [next(bare(bare_model(model).get_input_embeddings()).parameters())]
    for row in rows(model):
        digest.update(f"{row.family.name} {row.stack} {row.groups}".encode())
        paths = (row.family.q, row.family.k, row.family.v, row.family.o) if row.slots else (row.family.o,)
        weights += [row.projection(path).weight for path in dict.fromkeys(paths)]
        if row.compose is not None:
            digest.update(f"{row.compose.kept} {row.compose.places}".encode())
            weights += row.compose.parameters()
    for weight in weights:
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64]  # [64]
        digest.update(sample.to(device="cpu", dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def describe(model: nn.Module) -> dict[str, Any]:
    """What a result says about the model it was computed from."""
    plain = bare_model(model)
    return {
        "class": type(plain).__name__,
        "name": plain.config._name_or_path or None,
        "fingerprint": fingerprint(model),
        "dtype": str(plain.dtype).removeprefix("torch."),
        "weights": "folded" if is_folded(model) else "raw",
        "versions": {"headlab": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; every module as before afterwards."""
    training = [module for module in bare_model(model).modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and parameters frozen inside the block; both as before afterwards."""
    # parameters made in inference mode can have no gradient, and do not let one change that
    every = bare_model(model).parameters()
    frozen = [parameter for parameter in every if parameter.requires_grad and not parameter.is_inference()]
    with without_dropout(model):
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
