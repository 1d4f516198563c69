"""Models in and out: a plain Hugging Face model from a name, a folder or memory, its heads, and its TransformerBridge.

Private paths of TransformerLens are in this module, and in `dcmha.bridge` and `dcmha.hooked`, only.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from . import __version__
from .errors import HeadlabError
from .families import PRUNED, Attention, attentions, bare
from .scores import Head, Heads
from .variants import base_of, unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformer_lens.model_bridge import TransformerBridge


def load(
    model: str | Path | nn.Module, *, dtype: torch.dtype | str = "auto", device: str | torch.device | None = None
) -> PreTrainedModel:
    """A plain Hugging Face model of its own class, in evaluation mode.

    Args:
        model: a hub name, a folder (of a pruned model too), a model in memory, or a bridge (a clean copy is restored).
        dtype: of the weights, for a name or folder; `auto` is as they were saved.
        device: where the model goes; by default it stays where it is.

    Raises:
        HeadlabError: there is no such model, it cannot be read, or it wants to run code of its own.
    """
    if isinstance(model, nn.Module):
        found = restored(model)
    else:
        found = _from_pretrained(str(model), dtype)
    found.eval()
    return found if device is None else found.to(device)  # type: ignore[arg-type]  # transformers' decorator loses self


def _from_pretrained(name: str, dtype: torch.dtype | str) -> PreTrainedModel:
    from . import dcmha, pruned  # noqa: F401 (they tell AutoConfig of their models, which may come from the hub too)

    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise HeadlabError(f"cannot open the model {name!r}: there is no such folder")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False) if not _is_pruned(name) else _pruned_config(name)
        found = _class_of(config).from_pretrained(name, config=config, dtype=dtype)
    except HeadlabError:
        raise
    except Exception as error:  # transformers raises many kinds; all mean that this is no model we can open
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if type(error).__name__ == "UnpicklingError":  # torch advises to unpickle it all the same
            reason = "its weights are a pickle with more in it than tensors, which headlab does not open"
        raise HeadlabError(f"cannot open the model {name!r}: {reason}") from error
    return found


def _is_pruned(name: str) -> bool:
    config = Path(name) / "config.json"
    try:
        return str(json.loads(config.read_text(encoding="utf-8")).get("model_type")).startswith(PRUNED)
    except (OSError, ValueError, AttributeError):
        return False  # a hub name, or something that AutoConfig explains better


def _pruned_config(name: str) -> Any:
    from . import pruned

    model_type = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))["model_type"]
    base = type(AutoConfig.for_model(model_type.removeprefix(PRUNED)))
    pruned.config_class(base)  # type: ignore[arg-type]  # mypy takes no class for hashable
    return AutoConfig.from_pretrained(name)


def _class_of(config: Any) -> Any:
    """The class that a checkpoint was saved from; a bare or unknown one opens as `AutoModel`."""
    name, made = unwrapped((config.architectures or ["AutoModel"])[0])  # PrunedLlamaForCausalLM: a pruned Llama ...
    base = type(config)
    for _ in made:
        base = base_of(base)
    for candidate in (name, f"{name}ForCausalLM"):  # published DCFormer checkpoints name the architecture only
        if (found := _registered(candidate, base)) is not None:
            return functools.reduce(lambda cls, variant: variant.model_class(cls), made, found)
    if getattr(config, "auto_map", None):
        raise HeadlabError(f"cannot open {config._name_or_path!r}: {name} is code of its own, which headlab never runs")
    return transformers.AutoModelForCausalLM if name.endswith(("ForCausalLM", "LMHeadModel")) else transformers.AutoModel


def _registered(name: str, config: Any) -> Any:
    """The model class of this name, of transformers or registered with it for a class of configs; None if there is none."""
    if hasattr(transformers, name):
        return getattr(transformers, name)
    mappings = (getattr(auto, "_model_mapping", None) or {} for auto in vars(modeling_auto).values())
    found = (mapping[config] for mapping in mappings if config in mapping)
    classes = (cls for entry in found for cls in (entry if isinstance(entry, tuple) else (entry,)))
    return next((cls for cls in classes if cls.__name__ == name), None)


def is_bridge(model: nn.Module) -> bool:
    """Whether a model is a TransformerBridge (without importing TransformerLens)."""
    bridge = sys.modules.get("transformer_lens.model_bridge")
    return bridge is not None and isinstance(model, bridge.TransformerBridge)


def is_folded(model: nn.Module) -> bool:
    """Whether a bridge has processed weights (compatibility mode), so that removing a head means something else."""
    return is_bridge(model) and bool(getattr(model, "compatibility_mode", False))


def inner(model: nn.Module) -> PreTrainedModel:
    """The module tree with the Hugging Face class at its root, of a plain model or of a bridge."""
    return cast("PreTrainedModel", model.original_model if is_bridge(model) else model)


def rows(model: nn.Module, site: str = "output") -> tuple[Attention, ...]:
    """Every attention module of a plain model or a bridge, in the order of the rows of scores and masks."""
    found = tuple(row.at(site) for row in attentions(inner(model)))
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


def restored(model: nn.Module) -> PreTrainedModel:
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
    wrapped = inner(model)
    kept = (value for module in wrapped.modules() for value in vars(module).values())
    passes = [value for value in kept if isinstance(value, torch.Tensor) and not value.is_leaf]
    memo = {id(value): value.detach() for value in passes}  # patterns of the last pass, which deepcopy would refuse
    plain = copy.deepcopy(wrapped, memo)
    _unwrap(plain)
    return plain


def _unwrap(module: nn.Module) -> None:
    """Put every component that a bridge wraps back in its place, without what the bridge has added to it."""
    for name, wrapped in list(module.named_children()):
        original = bare(wrapped)
        if original is not wrapped:
            setattr(module, name, original)
            if getattr(vars(original).get("forward"), "__module__", "").startswith("transformer_lens"):
                del original.forward  # T5 blocks are patched to call the bridge's hooks
            if original._buffers.pop("bias", None) is not None:
                original.register_parameter("bias", None)  # an unembedding without bias was given one
        _unwrap(original)


def bridge(model: nn.Module) -> TransformerBridge:
    """A TransformerBridge over a copy of a model, with raw weights; the model itself is not taken over.

    Raises:
        HeadlabError: TransformerLens has no adapter for the model, or its adapter computes something else.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    from .dcmha.attach import ComposedModel

    plain = restored(model)
    name = type(plain).__name__.removeprefix("Pruned")
    wrapped = copy.deepcopy(plain)
    if isinstance(plain, ComposedModel):  # its attention implementation stays, whose patterns have hook points of their own
        from .dcmha.bridge import register_composed

        register_composed(name)
    elif hasattr(wrapped, "set_attn_implementation"):
        wrapped.set_attn_implementation("eager")  # elsewhere TransformerLens' pattern hooks do not fire
    batch = probe_batch(plain)
    try:
        found = build_bridge_from_module(wrapped, name, hf_config=wrapped.config, tokenizer=tokenizer(plain))
        with torch.no_grad(), evaluating(plain), evaluating(found):
            ours, theirs = plain(**batch)[0], found.original_model(**batch)[0]
    except Exception as error:  # TransformerLens raises many kinds where an adapter is missing or does not fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HeadlabError(f"TransformerLens cannot wrap this {type(plain).__name__}: {reason}") from error
    if ours.shape != theirs.shape or not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2):
        raise HeadlabError(f"TransformerLens wraps this {type(plain).__name__}, but then it computes something else")
    return found


def probe_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    """A few tokens that any model takes."""
    plain = inner(model)
    ids = torch.arange(5, device=plain.device)[None] % plain.config.get_text_config().vocab_size
    extra = {"decoder_input_ids": ids} if plain.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | extra


def tokenizer(model: nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model's weights, if there is one; else that of a bridge, which may be made to put
    the first token in front."""
    own = cast("PreTrainedTokenizerBase | None", model.tokenizer if is_bridge(model) else None)
    name = inner(model).config._name_or_path
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
    weights: list[Any] = [next(bare(inner(model).get_input_embeddings()).parameters())]
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
    plain = inner(model)
    return {
        "class": type(plain).__name__,
        "name": plain.config._name_or_path or None,
        "fingerprint": fingerprint(model),
        "dtype": str(plain.dtype).removeprefix("torch."),
        "weights": "folded" if is_folded(model) else "raw",
        "versions": {"headlab": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and parameters frozen inside the block; both as before afterwards."""
    root = inner(model)
    training = [module for module in root.modules() if module.training]
    # those made in inference mode can have no gradient, and do not let one change that
    frozen = [parameter for parameter in root.parameters() if parameter.requires_grad and not parameter.is_inference()]
    for module in training:
        module.training = False
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in frozen:
            parameter.requires_grad_(True)
