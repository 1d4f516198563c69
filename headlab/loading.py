"""Models in and out: a plain Hugging Face model from a name, a folder or memory, and its TransformerBridge.

This module knows every class of models: those of transformers, composed and pruned ones. Private paths of TransformerLens
are here, and in `dcmha.bridge` and `dcmha.bridge_components`, only.
"""

from __future__ import annotations

import copy
import functools
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .dcmha.attachment import COMPOSED, ComposedModel
from .errors import HeadlabError
from .models.access import bare_copy, evaluating, probe_batch, tokenizer
from .models.families import families
from .models.variants import PRUNED, base_name, base_of
from .pruning.narrowed import PRUNING

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

for _type in [model_type for family in families() for model_type in family.model_types]:
    PRUNING.announce([_type, COMPOSED + _type])  # pruning and dcmha do not know of each other


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
        found = bare_copy(model)
    else:
        found = _from_pretrained(str(model), dtype)
    found.eval()
    return found if device is None else found.to(device)  # type: ignore[arg-type]  # transformers' decorator loses self


def _from_pretrained(name: str, dtype: torch.dtype | str) -> PreTrainedModel:
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise HeadlabError(f"cannot open the model {name!r}: there is no such folder")
    try:
        config = _config(name)
        found = _class_of(config).from_pretrained(name, config=config, dtype=dtype)
    except HeadlabError:
        raise
    except Exception as error:  # transformers raises many kinds; all mean that this is no model we can open
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if type(error).__name__ == "UnpicklingError":  # torch advises to unpickle it all the same
            reason = "its weights are a pickle with more in it than tensors, which headlab does not open"
        raise HeadlabError(f"cannot open the model {name!r}: {reason}") from error
    return found


def _config(name: str) -> Any:
    """The config of a model, of whose type transformers may yet have to be told."""
    model_type = str(PretrainedConfig.get_config_dict(name)[0].get("model_type"))
    base, made = base_name(model_type)
    for home in entry_points(group="headlab.models", name=base):  # installed packages that bring models of their own
        home.load()
    if PRUNING in made:
        PRUNING.config_class(type(AutoConfig.for_model(model_type.removeprefix(PRUNED))))
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _class_of(config: Any) -> Any:
    """The class that a checkpoint was saved from; a bare or unknown one opens as `AutoModel`."""
    name, made = base_name((config.architectures or ["AutoModel"])[0])  # PrunedLlamaForCausalLM: a pruned Llama ...
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


def bridge(model: nn.Module) -> TransformerBridge:
    """A TransformerBridge over a copy of a model, with raw weights; the model itself is not taken over.

    Raises:
        HeadlabError: TransformerLens has no adapter for the model, or its adapter computes something else.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    plain = bare_copy(model)
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
