"""Variants of Hugging Face models, as classes made at run time: a pruned Llama, a Llama with composed heads, or both.

A variant's config has one more field, and its model builds what this field says before any weight is loaded. Its classes
are registered with `AutoConfig` and `AutoModel*`, so that `from_pretrained` opens what `save_pretrained` wrote. Variants
nest: `PrunedComposedLlamaForCausalLM`, of the model type `headlab_composed_llama`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import output_capturing

PRUNED = "headlab_"  # how the model type of a pruned model begins: headlab_llama
_variants: list[Variant] = []


@dataclass(frozen=True, eq=False)
class Variant:
    """One kind of variant.

    Attributes:
        name: how the names of its classes begin: `Pruned`.
        kind: how their model types begin: `headlab_`.
        field: the field that its configs have beside those of their base; None where nothing has been said yet.
        build: changes a model that has just been made as its config says.
        about: what distinguishes its models, for their docstrings: `with fewer heads`.
        home: the module that the classes belong to.
        mixins: further base classes of its models.
    """

    name: str
    kind: str
    field: str
    build: Callable[[Any], None]
    about: str
    home: str
    mixins: tuple[type, ...] = ()

    def __post_init__(self) -> None:
        _variants.append(self)

    def config_class(self, base: Any) -> type[Any]:
        """The config class of this variant of `base`, registered with `AutoConfig`."""
        return base if base.model_type.startswith(self.kind) else _config_class(self, base)

    def model_class(self, base: Any) -> type[Any]:
        """The class of models that are this variant of `base`."""
        return base if base.config_class.model_type.startswith(self.kind) else _model_class(self, base)

    def announce(self, model_types: Iterable[str]) -> None:
        """Tell `AutoConfig` of this variant of these model types, as far as transformers knows them."""
        for model_type in model_types:
            if model_type in CONFIG_MAPPING:
                self.config_class(CONFIG_MAPPING[model_type])

    def enter(self, model: Any, field: Any) -> None:
        """Make a model, whose modules are built already, one of this variant, in place; `field` goes into its config.

        The classes change in place: submodules share the config, and the model keeps what was set on it.
        """
        config = model.config
        base: Any = type(config)
        config.__class__ = self.config_class(base)
        if config.__class__ is not base:
            _register_models(self, config.__class__, base)
        setattr(config, self.field, field)
        become(model, self.model_class(type(model)))

    def leave(self, model: Any) -> None:
        """The other way round: the model and its config are of their base classes again."""
        config = model.config
        delattr(config, self.field)
        config.__class__ = base_of(type(config))
        become(model, base_of(type(model)))
        if config.architectures:
            config.architectures = [name.removeprefix(self.name) for name in config.architectures]


def base_of(made: type) -> Any:
    """The class that a variant's class was made of."""
    return made.__bases__[-1]


def become(model: PreTrainedModel, cls: type[PreTrainedModel]) -> None:
    """Change a model's class in place, as if it had been made by the new one."""
    model.__class__ = cls  # type: ignore[assignment]
    # transformers notes what a class can return beside its result (hidden states) when a first model of it is made
    registry: dict[str, Any] = getattr(output_capturing, "_CAN_RECORD_REGISTRY", {})
    dict.__setitem__(registry, str(cls), model._can_record_outputs)


def base_name(name: str) -> tuple[str, tuple[Variant, ...]]:
    """The name of a class, or a model type, without its variants, and these from the innermost to the outermost.

    >>> base_name("PrunedLlamaForCausalLM")  # doctest: +SKIP
    ('LlamaForCausalLM', (<Pruned>,))
    """
    for variant in _variants:
        for prefix in (variant.name, variant.kind):
            if name.startswith(prefix):
                bare, inside = base_name(name.removeprefix(prefix))
                return bare, (*inside, variant)
    return name, ()


@functools.cache
def _config_class(variant: Variant, base: Any) -> type[Any]:
    def __post_init__(self: PretrainedConfig, **kwargs: Any) -> None:
        base.__post_init__(self, **kwargs)
        _register_models(variant, made, base)

    body = {
        "model_type": variant.kind + base.model_type,
        variant.field: None,
        "__annotations__": {variant.field: dict | None},
        "__post_init__": __post_init__,
        "__module__": variant.home,
        "__doc__": f"{base.__name__} of a model {variant.about}: `{variant.field}` says how.",
    }
    made: Any = type(variant.name + base.__name__, (base,), body)
    AutoConfig.register(made.model_type, made, exist_ok=True)
    return made


@functools.cache
def _model_class(variant: Variant, base: Any) -> type[Any]:
    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        variant.build(self)

    # transformers reads these off the source of the module that a class is from, which is ours
    asked = ("_can_set_attn_implementation", "_can_set_experts_implementation")
    body = {
        **{name: getattr(base, name) for name in asked if hasattr(base, name)},
        "config_class": variant.config_class(base.config_class),
        "__init__": __init__,
        "__module__": variant.home,
        "__doc__": f"{base.__name__} {variant.about}.",
    }
    return type(variant.name + base.__name__, (*variant.mixins, base), body)


@functools.cache
def _register_models(variant: Variant, made: Any, base_config: Any) -> None:
    """Tell every AutoModel class of its variant; on first use, for it imports the modelling code."""
    for name in modeling_auto.__dict__:
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and base_config in mapping:
            found = mapping[base_config]
            base = found[0] if isinstance(found, tuple) else found
            if base.config_class is base_config:  # JevForDecision opens Qwen 2, but with a config of its own
                auto.register(made, variant.model_class(base), exist_ok=True)
