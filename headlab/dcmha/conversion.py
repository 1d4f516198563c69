"""Published DCFormer and DCPythia checkpoints, opened as the models of `modeling.py`; reading only.

Their tensors have other names and layouts, q, k and v may be one tensor or three, some tensors are derived from others,
and their shards are PyTorch `.bin` files, of which nothing but tensors is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from ..errors import HeadlabError
from .compose import Compose

PUBLISHED = ("DCFormer", "DCPythia")  # the architectures that their configs name
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FACTORS = ("pre_query", "pre_key", "post_query", "post_key")  # as they lie in dw1, qkw and dd
DYNAMIC, STATIC = ("dw1", "qkw", "dd"), ("pre_proj.w", "post_proj.w")  # of a layer's maps
HEAD = "lm_head."
DERIVED = ("dyn_w_proj.dw_m", "dyn_w_proj.qkw_m", "dyn_w_proj.sw")  # merged from dw1, dd, qkw and the static maps
_NAMES = {  # within a layer
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm", "feed_forward.mg": "mlp.group_proj",
    "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def open_model(cls: Any, opener: Callable[..., Any], name: Any, *args: Any, **kwargs: Any) -> Any:
    """`from_pretrained` of our models: `opener` is that of transformers.

    Raises:
        HeadlabError: a tensor is missing, unexpected or of another shape (the message lists them), or a file cannot be
            read or holds more than tensors.
    """
    if name is None or kwargs.get("state_dict") is not None:
        return opener(name, *args, **kwargs)
    hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
    wants_info = kwargs.pop("output_loading_info", False)
    if _is_published(name, hub):
        for option in HUB_OPTIONS:
            kwargs.pop(option, None)
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):
            known = {field.name for field in fields(cls.config_class)} - {"dtype"} | set(cls.config_class.attribute_map)
            own = {key: kwargs.pop(key) for key in list(kwargs) if key in known}
            config = cls.config_class.from_pretrained(config or name, **hub, **own)
        state = convert(read(_folder(name, hub)), config)
        _check(cls, config, state)
        if not hasattr(cls, "body"):  # without the language-model head
            state = {key.removeprefix("model."): value for key, value in state.items() if not key.startswith(HEAD)}
        model, info = opener(None, *args, config=config, state_dict=state, output_loading_info=True, **kwargs)
        model.config.name_or_path = str(name)
    else:
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = opener(name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise HeadlabError(f"{name} lacks the tensors {', '.join(missing)}")
        if unexpected := sorted(info["unexpected_keys"]):
            raise HeadlabError(f"{name} has tensors that the model has no place for: {', '.join(unexpected)}")
        if (wrong := sorted(info["mismatched_keys"])) and not may_differ:
            raise _shapes(str(name), [(key, tuple(found), tuple(meant)) for key, found, meant in wrong])
    return (model, info) if wants_info else model


def _is_published(name: Any, hub: dict[str, Any]) -> bool:
    try:
        path = cached_file(str(name), "config.json", **hub)
        architectures = json.loads(Path(str(path)).read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError):
        return False  # transformers says better what is wrong
    return bool(architectures) and architectures[0] in PUBLISHED


def _folder(name: Any, hub: dict[str, Any]) -> Path:
    folder = Path(str(name))
    return folder if folder.is_dir() else Path(snapshot_download(str(name), allow_patterns=["*.json", *_patterns()], **hub))


def _patterns() -> list[str]:
    return [f"{Path(name).stem}*{Path(name).suffix}" for name in WEIGHTS]


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, in one file or in shards with an index; mapped into memory where it can be."""
    for whole in WEIGHTS:
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return _read(folder / whole)
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise HeadlabError(f"{index} is no index of shards: it has no readable weight_map") from None
            if strange := [name for name in names if Path(name).name != name]:
                raise HeadlabError(f"{index} points outside its folder, to {', '.join(strange)}")
            return {key: value for name in names for key, value in _read(folder / name).items()}
    raise HeadlabError(f"found no weights in {folder}: expected {' or '.join(WEIGHTS)}, or shards with an index")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise HeadlabError(f"the shard {path} is missing")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several kinds
        if type(error).__name__ == "UnpicklingError":  # torch advises to unpickle it all the same
            raise HeadlabError(f"{path} is a pickle with more in it than tensors, which headlab does not open") from None
        raise HeadlabError(f"cannot read {path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise HeadlabError(f"{path} is not a table of tensors")
    return found


def convert(published: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Published tensors under our names and in our layout; sizes of the maps in `config` are set to theirs."""
    converted: dict[str, Tensor] = {}
    maps: dict[str, dict[str, Tensor]] = {}  # of every layer's attention
    for key, value in published.items():
        if key.endswith(DERIVED):
            continue
        if key.startswith("layers.") and ".attention.dyn_w_proj." in key:
            layer, name = key.split(".attention.dyn_w_proj.")
            maps.setdefault(f"model.{layer}.self_attn", {})[name] = value
        else:
            converted.update(_renamed(key, value, config))
    for path, tensors in maps.items():
        converted.update({f"{path}.{name}": value for name, value in _maps(path, tensors, config)})
    return converted


def _renamed(key: str, value: Tensor, config: Any) -> dict[str, Tensor]:
    if not key.startswith("layers."):
        module, _, kind = key.partition(".")
        return {f"{_OUTSIDE[module]}.{kind}" if module in _OUTSIDE else key: value}
    _, number, inside = key.split(".", 2)
    module, _, kind = inside.rpartition(".")
    prefix = f"model.layers.{number}"
    if module == "attention.wqkv":
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        if len(value) != q + 2 * kv:
            raise HeadlabError(f"{key} has {len(value)} rows, but the config's heads need {q} + {kv} + {kv}")
        parts = value.split([q, kv, kv])
        return {f"{prefix}.self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", parts, strict=True)}
    if module == "feed_forward.w1":
        return {f"{prefix}.mlp.{'gate' if config.model_type == 'dcformer' else 'up'}_proj.{kind}": value}
    kind = "weight" if kind == "scale" else kind
    return {f"{prefix}.{_NAMES[module]}.{kind}" if module in _NAMES else key: value}


def _maps(path: str, tensors: dict[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `Compose` out of published ones."""
    yield from ((f"dyn_w_proj.{name}", value) for name, value in tensors.items() if name not in (*DYNAMIC, *STATIC))
    if config.compose is None:
        return
    meant = _meant(path, tensors, config)
    dw1, qkw, dd = (tensors[name] for name in DYNAMIC)
    low_rank = [i for i, place in enumerate(FACTORS) if place in meant.places]
    gated = [i for i, place in enumerate(FACTORS) if f"{place}_gate" in meant.places]
    if low_rank:  # [d_model, group, 4, hidden] and [group, 4, hidden, 2 rank, head]
        yield "compose.dw1.weight", dw1[:, :, low_rank].permute(2, 1, 3, 0).flatten(0, 2)
        yield "compose.qkw.weight", qkw[:, low_rank].transpose(0, 1)
    if gated:  # [d_model, group, 4 heads]
        yield "compose.dd.weight", dd.unflatten(-1, (4, -1))[:, :, gated].permute(2, 1, 3, 0).flatten(0, 2)
    static = [name for name in STATIC if f"{name.split('_')[0]}_base" in meant.places]
    if static:
        yield "compose.base.weight", torch.stack([tensors[name] for name in static])
    identity = torch.eye(meant.per_group)
    if strange := [name for name in STATIC if name not in static and (tensors.get(name, identity) != identity).any()]:
        raise HeadlabError(f"{path} has static maps ({', '.join(strange)}), but the config does not set use_sw")


def _meant(path: str, tensors: dict[str, Tensor], config: Any) -> Compose:
    """The maps (without weights) that the published tensors of a layer are for; raises `HeadlabError` if they do not fit."""
    qkw = tensors.get("qkw")
    if qkw is not None and qkw.ndim == 5:
        config.compose.update(rank=qkw.shape[3] // 2, hidden=qkw.shape[2], groups=qkw.shape[0])
    with torch.device("meta"):
        meant = Compose(config.hidden_size, config.num_attention_heads, **config.compose)
    groups, hidden, heads = meant.groups, meant.hidden, meant.per_group
    shapes: dict[str, tuple[int, ...]] = {
        "dw1": (meant.d_model, groups, len(FACTORS), hidden),
        "qkw": (groups, len(FACTORS), hidden, 2 * meant.rank, heads),
        "dd": (meant.d_model, groups, len(FACTORS) * heads),
    }
    static = [name for name in STATIC if name in tensors or f"{name.split('_')[0]}_base" in meant.places]
    shapes |= dict.fromkeys(static, (groups, heads, heads))
    if missing := [f"{path}.dyn_w_proj.{name}" for name in shapes if name not in tensors]:
        raise HeadlabError(f"the checkpoint lacks the tensors {', '.join(missing)}")
    found = [(f"{path}.dyn_w_proj.{name}", tuple(tensors[name].shape), shape) for name, shape in shapes.items()]
    if wrong := [row for row in found if row[1] != row[2]]:
        raise _shapes("the checkpoint", wrong)
    return meant


def _check(cls: Any, config: Any, state: dict[str, Tensor]) -> None:
    """Raise `HeadlabError` unless the tensors are exactly those of the model."""
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in cls(config).state_dict().items()}
    if not hasattr(cls, "body"):
        expected = {f"model.{key}": shape for key, shape in expected.items()}
        state = {key: value for key, value in state.items() if not key.startswith(HEAD)}
    elif config.tie_word_embeddings:
        expected = {key: shape for key, shape in expected.items() if key in state or not key.startswith(HEAD)}
    if missing := sorted(set(expected) - set(state)):
        raise HeadlabError(f"the checkpoint lacks the tensors {', '.join(missing)}")
    if unexpected := sorted(set(state) - set(expected)):
        raise HeadlabError(f"the checkpoint has tensors that the model has no place for: {', '.join(unexpected)}")
    found = [(key, tuple(state[key].shape), shape) for key, shape in expected.items()]
    if wrong := [row for row in found if row[1] != row[2]]:
        raise _shapes("the checkpoint", wrong)


def _shapes(where: str, wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> HeadlabError:
    shapes = ", ".join(f"{key} {found} for {meant}" for key, found, meant in wrong)
    return HeadlabError(f"{where} has tensors of other shapes than the config asks for: {shapes}")
