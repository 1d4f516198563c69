"""DCFormer and DCPythia as a TransformerBridge of TransformerLens: adapters, and attention whose composition can be hooked.

Installing headlab tells TransformerLens of the adapters (entry points). `headlab.bridge(model)` builds the bridge;
`TransformerBridge.boot_transformers` does too, after `import headlab.dcmha.bridge`. Models with attached maps
(`ComposedLlamaForCausalLM`) have an adapter made from TransformerLens' own one for the plain class, see `composed_adapter`.

Beside the names that every bridge has, an attention component `blocks.L.attn` has these hook points (m, n are heads):

    hook_attn_scores_raw  [batch, m, query, key]   scaled scores, not masked
    hook_attn_scores      [batch, n, query, key]   composed (stage `pre`), not masked yet: edits of masked pairs do nothing
    hook_pattern_raw      [batch, m, query, key]   after mask and softmax: rows sum to 1
    hook_pattern          [batch, n, query, key]   composed (stage `post`): rows need not sum to 1, entries may be negative
    hook_pre_query_w1     [batch, pos, rank, m]    a factor of a branch: stage pre or post, side query or key,
    hook_pre_query_w2     [batch, pos, rank, n]      w1 or w2 ...
    hook_pre_query_gate   [batch, pos, n]            ... or the gate
    hook_pre_base         [m, n]                   W_b of a stage (the same for every pair; `pos_slice` is not for it)
    dw1.hook_out, dd.hook_out                      what the factors are made of, before GELU and tanh

There are those of the branches that the model has. Every one is live: what a hook returns is what the model goes on with.
In a cached step of a generation, factors are those of the new tokens. While a hook listens to scores, patterns or a base,
that layer's attention is computed by the `eager` backend, which needs memory for all pairs.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.conversion_utils.conversion_steps import RearrangeTensorConversion
from transformer_lens.conversion_utils.param_processing_conversion import ParamProcessingConversion
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES, ArchitectureAdapterFactory
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    JointQKVAttentionBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    ParallelBlockBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from ..errors import HeadlabError
from ..models.attention_modules import attentions, submodule
from .attachment import IMPLEMENTATION
from .bridge_components import (
    ComposedAttentionBridge,
    ComposedJointAttentionBridge,
    ComposedJointRotaryAttentionBridge,
    DCAttentionBridge,
    JoinedBridge,
    OwnGatedMLPBridge,
    map_components,
    maps_path,
    split,
)


class ComposedAdapter(ArchitectureAdapter):
    """What an architecture with composed heads needs when weights are processed (`enable_compatibility_mode`).

    The maps read the first norm's output too, so its gain and bias go into them as well; and value biases stay where they
    are, because rows of a composed pattern do not sum to 1.
    """

    supports_hf_output_attentions = False  # hook points have the patterns, in any backend

    def prepare_model(self, hf_model: Any) -> None:
        super().prepare_model(hf_model)
        hf_model.config.output_attentions = False  # `boot_transformers` sets it
        path = maps_path(cast("Any", self.component_mapping)["blocks"].submodules["attn"])
        modules = (self.get_component(hf_model, f"blocks.{i}.attn") for i in range(self.cfg.n_layers))
        maps: list[Any] = [submodule(module, path) for module in modules]
        self._plain = [compose.trivial and len(set(map(tuple, compose.kept.values()))) == 1 for compose in maps]

    def preprocess_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        state = super().preprocess_weights(state_dict)
        offset = 1.0 if getattr(self.cfg, "rmsnorm_uses_offset", False) else 0.0
        self._value_biases: dict[int, Tensor] = {}
        for layer, plain in enumerate(self._plain):
            attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
            if self._fold_ln_requested and getattr(self, "supports_fold_ln", True):
                fold_norm(state, f"blocks.{layer}.ln1", [f"{attn}.{name}" for name in ("q", "k", "v", "dw1", "dd")], offset)
                if f"{mlp}.group.weight" in state:
                    fold_norm(state, f"blocks.{layer}.ln2", [f"{mlp}.{name}" for name in ("in", "gate", "group")])
            if not plain and f"{attn}.v.bias" in state:
                self._value_biases[layer] = state.pop(f"{attn}.v.bias")
        return state

    def postprocess_weights(self, bridge: Any) -> None:
        super().postprocess_weights(bridge)
        for layer, bias in self._value_biases.items():
            bridge.blocks[layer].attn.v.original_component.bias = nn.Parameter(bias)


def fold_norm(state: dict[str, Tensor], norm: str, readers: list[str], offset: float = 0.0) -> None:
    """Move a norm's gain and bias into the linear maps that read its output, in place; exact, the norm is left without.

    Args:
        state: weights by name.
        norm: the norm's name: `.weight` [d_model], and `.bias` if it has one.
        readers: all linear maps that read it (those that are not there are passed over): `.weight` [out, d_model]. A
            reader without a bias gets one where the norm has one.
        offset: what the norm adds to its weight (1 in Gemma).
    """
    weights, shift = state[f"{norm}.weight"], state.get(f"{norm}.bias")
    gain = weights.to(torch.promote_types(weights.dtype, torch.float32)) + offset
    for reader in readers:
        if (weight := state.get(f"{reader}.weight")) is None:
            continue
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if shift is not None:
            bias = state.get(f"{reader}.bias", weight.new_zeros(len(weight)))
            state[f"{reader}.bias"] = (bias + exact @ shift.to(exact)).to(weight.dtype)
        state[f"{reader}.weight"] = (exact * gain.to(exact)).to(weight.dtype)
    state[f"{norm}.weight"] = torch.full_like(weights, 1 - offset)
    if shift is not None:
        state[f"{norm}.bias"] = torch.zeros_like(shift)


class _Adapter(ComposedAdapter):
    """What DCFormer and DCPythia have in common."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._configure()
        self.weight_processing_conversions = {  # whatever number of heads a (pruned) layer has
            f"blocks.{{i}}.attn.{part}.weight": ParamProcessingConversion(
                RearrangeTensorConversion("m (n h) -> n h m" if part == "o" else "(n h) m -> n m h", h=self.cfg.d_head)
            )
            for part in "qkvo"
        }
        parallel = self.cfg.parallel_attn_mlp
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "blocks": (ParallelBlockBridge if parallel else BlockBridge)(
                name="model.layers",
                submodules={
                    "ln1": self._norm("input_layernorm"),
                    "ln2": self._norm("post_attention_layernorm"),
                    "attn": self._attention(),
                    "mlp": self._mlp(),
                },
            ),
            "ln_final": self._norm("model.norm"),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }

    def _configure(self) -> None:
        raise NotImplementedError

    def _norm(self, name: str) -> NormalizationBridge:
        raise NotImplementedError

    def _mlp(self) -> MLPBridge:
        raise NotImplementedError

    def _attention(self) -> DCAttentionBridge:
        norms = {name: RMSNormalizationBridge(name=name, config=self.cfg) for name in ("q_norm", "k_norm")}
        return DCAttentionBridge(
            name="self_attn",
            config=self.cfg,
            submodules={
                **{part: LinearBridge(name=f"{part}_proj") for part in "qkvo"},
                **(norms if self.cfg.use_qk_norm else {}),
                **map_components(),
            },
        )


class DCFormerAdapter(_Adapter):
    """DCFormerForCausalLM."""

    def _configure(self) -> None:
        self._set_rms_rotary_defaults()
        self.cfg.act_fn = "silu"
        self.cfg.parallel_attn_mlp = False

    def _norm(self, name: str) -> NormalizationBridge:
        return RMSNormalizationBridge(name=name, config=self.cfg)

    def _mlp(self) -> MLPBridge:
        parts: dict[str, GeneralizedComponent] = {
            "gate": LinearBridge(name="gate_proj"),
            "in": LinearBridge(name="up_proj"),
            "out": LinearBridge(name="down_proj"),
            "group": LinearBridge(name="group_proj", optional=True),
        }
        return OwnGatedMLPBridge(name="mlp", config=self.cfg, submodules=parts)


class DCPythiaAdapter(_Adapter):
    """DCPythiaForCausalLM."""

    def _configure(self) -> None:
        self.cfg.normalization_type = "LN"
        self.cfg.positional_embedding_type = "rotary"
        self.cfg.final_rms = False
        self.cfg.gated_mlp = False
        self.cfg.attn_only = False
        self.cfg.act_fn = "gelu"
        self.cfg.parallel_attn_mlp = getattr(self.cfg, "use_parallel_residual", True)
        self.cfg.default_prepend_bos = False  # as in Pythia, whose data the published model was trained on

    def _norm(self, name: str) -> NormalizationBridge:
        return NormalizationBridge(name=name, config=self.cfg, use_native_layernorm_autograd=True)

    def _mlp(self) -> MLPBridge:
        return self._ungated_mlp()


# --- models with attached maps


class _Attached(ComposedAdapter):
    """Mixed into the adapter of a plain class, it makes that of the class with attached maps."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        parts = cast("Any", self.component_mapping)["blocks"].submodules
        parts["attn"] = _composed_attention(parts["attn"], self.cfg)
        if "qkv" in parts["attn"].submodules:
            # q, k and v are there one by one, with whatever number of heads a (pruned) layer has
            conversions = dict(self.weight_processing_conversions or {})
            output = conversions.pop("blocks.{i}.attn.o", None) or conversions["blocks.{i}.attn.o.weight"]
            stored_in_out = cast("Any", output).tensor_conversion.pattern.startswith("(")  # Conv1D
            patterns = {f"{part}.weight": "(n h) m -> n m h" for part in "qkv"} | {
                f"{part}.bias": "(n h) -> n h" for part in "qkv"
            }
            patterns["o.weight"] = "(n h) m -> n h m" if stored_in_out else "m (n h) -> n h m"
            for part in "qkv":
                conversions.pop(f"blocks.{{i}}.attn.{part}", None)
            for name, pattern in patterns.items():
                conversion = RearrangeTensorConversion(pattern, h=self.cfg.d_head)
                conversions[f"blocks.{{i}}.attn.{name}"] = ParamProcessingConversion(conversion)
            self.weight_processing_conversions = conversions

    def preprocess_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._uneven:
            raise HeadlabError(
                f"compatibility mode cannot process this pruned model: layer {self._uneven[0]} has values of heads whose "
                "output is gone (its q, k and v are one projection); use the bridge with raw weights (no_processing=True)"
            )
        return super().preprocess_weights(state_dict)

    def prepare_model(self, hf_model: Any) -> None:
        super().prepare_model(hf_model)
        joined = (row.compose for row in attentions(hf_model) if row.family.joined)
        self._uneven = [i for i, compose in enumerate(joined) if compose.held("output") != compose.kept["output"]]
        hf_model.set_attn_implementation(IMPLEMENTATION)  # TransformerLens may have set `eager`, which composes nothing


def _composed_attention(plain: Any, config: Any) -> ComposedAttentionBridge:
    """The composed counterpart of an adapter's attention component: the same name and submodules, and the maps."""
    joint, rotary = isinstance(plain, JointQKVAttentionBridge), hasattr(plain, "_apply_position_embedding_hooks")
    if joint:
        cls: Any = ComposedJointRotaryAttentionBridge if rotary else ComposedJointAttentionBridge
    else:
        cls = DCAttentionBridge if rotary else ComposedAttentionBridge
    submodules = {name: part for name, part in plain.submodules.items() if not joint or name not in "qkv"}
    options: dict[str, Any] = {"requires_attention_mask": plain.requires_attention_mask}
    if joint:
        submodules["qkv"] = JoinedBridge(name=plain.submodules["qkv"].name)
        options["split_qkv_matrix"] = functools.partial(split, d_head=config.d_head)
    return cast(
        "ComposedAttentionBridge",
        cls(name=plain.name, config=config, submodules=submodules | map_components(maps_path(plain)), **options),
    )


@functools.cache
def composed_adapter(name: str) -> type[ArchitectureAdapter]:
    """The adapter of a class with attached maps, from TransformerLens' own one for the plain class.

    Args:
        name: the plain class's name, `LlamaForCausalLM`.

    Raises:
        HeadlabError: TransformerLens has no adapter for it.
    """
    if (plain := SUPPORTED_ARCHITECTURES.get(name)) is None:
        raise HeadlabError(f"TransformerLens has no adapter for {name}, so there is none for Composed{name} either")
    return type(f"Composed{plain.__name__}", (_Attached, plain), {"__module__": __name__, "__doc__": f"Composed{name}."})


def register_composed(name: str) -> None:
    """Tell TransformerLens of the adapter for a class with attached maps, `ComposedLlamaForCausalLM`.

    Raises:
        HeadlabError: it has none for the plain class.
    """
    adapter = composed_adapter(name.removeprefix("Composed"))
    ArchitectureAdapterFactory.discover_entry_points()  # first, else it warns of those that are there already
    ArchitectureAdapterFactory.register_adapter(name, adapter)
    SUPPORTED_ARCHITECTURES.setdefault(name, adapter)


ComposedGPT2Adapter = composed_adapter("GPT2LMHeadModel")
ComposedLlamaAdapter = composed_adapter("LlamaForCausalLM")
ComposedGPTNeoXAdapter = composed_adapter("GPTNeoXForCausalLM")
ComposedBertAdapter = composed_adapter("BertForMaskedLM")

for _name, _adapter in (("DCFormer", DCFormerAdapter), ("DCPythia", DCPythiaAdapter)):
    ArchitectureAdapterFactory.register_adapter(_name, _adapter)  # as published checkpoints call it

SUPPORTED_ARCHITECTURES.update({  # `boot_transformers` takes no architecture that is not in this table
    "DCFormer": DCFormerAdapter,
    "DCFormerForCausalLM": DCFormerAdapter,
    "DCPythia": DCPythiaAdapter,
    "DCPythiaForCausalLM": DCPythiaAdapter,
    "ComposedGPT2LMHeadModel": ComposedGPT2Adapter,
    "ComposedLlamaForCausalLM": ComposedLlamaAdapter,
    "ComposedGPTNeoXForCausalLM": ComposedGPTNeoXAdapter,
    "ComposedBertForMaskedLM": ComposedBertAdapter,
})  # fmt: skip
