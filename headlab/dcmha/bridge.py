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
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.conversion_utils.conversion_steps import RearrangeTensorConversion
from transformer_lens.conversion_utils.param_processing_conversion import ParamProcessingConversion
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES, ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    ParallelBlockBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from ..errors import HeadlabError
from ..families import Family, attentions, child, families, weight_blocks
from .attach import IMPLEMENTATION
from .compose import SCORE_TAPS


def hook_name(tap: str) -> str:
    """The hook point of a tap of `Compose`, by its name in an attention component."""
    return f"hook_attn_{tap}" if tap.startswith("scores") else f"hook_{tap}"


class WeightBridge(GeneralizedComponent):
    """A tensor of weights that no input goes through: it is in the state dict and has no hooks."""

    def __init__(self, name: str, optional: bool = False) -> None:
        super().__init__(name, optional=optional)
        _drop(self, "hook_in", "hook_out")


def map_components(path: str = "compose") -> dict[str, GeneralizedComponent]:
    """Components for the weights of a `Compose` at this path in an attention module: submodules of its bridge.

    TransformerLens keeps nothing in a state dict but the weights and biases of registered components.
    """
    return {
        "dw1": LinearBridge(name=f"{path}.dw1", optional=True),
        "dd": LinearBridge(name=f"{path}.dd", optional=True),
        "qkw": WeightBridge(name=f"{path}.qkw", optional=True),
        "base": WeightBridge(name=f"{path}.base", optional=True),
    }


class ComposedAttentionBridge(AttentionBridge):
    """Attention computed by the wrapped module itself, which has a `Compose`, with its tensors at hook points.

    The wrapped module calls its own projections, which are bridges, so that their hooks are live. Everything else is
    connected for the length of a forward pass, and only where somebody listens: nothing is left in the module.
    """

    supports_attn_result = True
    config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _drop(self, "hook_hidden_states", "hook_rot_q", "hook_rot_k")  # nothing would ever go through them

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        for tap in self.compose.taps:
            if (name := hook_name(tap)) not in self._modules:
                setattr(self, name, HookPoint())
            if tap in SCORE_TAPS:
                self._point(tap).pos_dim = 2

    @property
    def compose(self) -> Any:
        """The maps of the layer, a module of the wrapped one."""
        return child(cast("nn.Module", self.original_component), _maps_path(self))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module returns, its first output through `hook_out`."""
        if args:
            x, args = args[0], args[1:]
        else:
            x = kwargs.pop("hidden_states")
        x = self.hook_in(x)
        with ExitStack() as stack:
            for module, hook in self._hooks(x):
                stack.callback(module.register_forward_hook(hook).remove)
            output = cast("nn.Module", self.original_component)(x, *args, **kwargs)
        if isinstance(output, tuple):
            return (self.hook_out(output[0]), *output[1:])
        return self.hook_out(output)

    def _hooks(self, x: Tensor) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Modules below the wrapped one, and the forward hook that each has to have in this pass."""
        taps = self.compose.taps
        # one of these makes attention eager, and a base must not change between a block and its recomputation
        whole = [tap for tap in taps if tap in SCORE_TAPS or tap.endswith("base")]
        if not any(_listened(self._point(tap)) for tap in whole):
            whole = []
        for tap in taps:
            if tap in whole or _listened(self._point(tap)):
                yield taps[tap], _through(self._point(tap))
        if self.config.use_attn_result:
            yield self.o.original_component, self._sum_of_results
        if self.config.use_split_qkv_input or self.config.use_attn_in:
            yield from self._split_inputs(x)

    def _point(self, tap: str) -> HookPoint:
        return cast("HookPoint", self._modules[hook_name(tap)])

    def _sum_of_results(self, projection: nn.Module, args: tuple[Tensor], _: Tensor) -> Tensor:
        """Instead of the output projection's own sum over heads: one result per head, through `hook_result`."""
        z = args[0].unflatten(-1, (-1, self.config.d_head))  # [batch, pos, head, d_head]
        return self._compute_per_head_result(z, z.shape[2], self.config.d_head)

    def _split_inputs(self, x: Tensor) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """A copy of the residual stream per head for q, k and v, as TransformerLens has it. The maps read the original."""
        source = x if self._captured_pre_ln_residual is None else self._captured_pre_ln_residual
        projections = {name: getattr(self, name).original_component for name in "qkv"}
        sizes = {name: projection.out_features // self.config.d_head for name, projection in projections.items()}
        shared = None
        if self.config.use_attn_in:
            shared = self._fork_and_norm_per_head(source, self.hook_attn_in, sizes["q"])  # [batch, pos, head, d_model]
        for name, n_heads in sizes.items():
            if shared is None:
                copies = self._fork_and_norm_per_head(source, getattr(self, f"hook_{name}_input"), n_heads)
            else:
                copies = shared[:, :, :n_heads]
            yield projections[name], _per_head(copies)


class DCAttentionBridge(ComposedAttentionBridge, PositionEmbeddingsAttentionBridge):
    """Attention with rotary positions, and norms of queries and keys where they are: that of DCFormer, DCPythia, Llama."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hook_cos.pos_dim = self.hook_sin.pos_dim = 2  # [batch, 1, pos, features that turn]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["position_embeddings"] = self._apply_position_embedding_hooks(kwargs["position_embeddings"])
        return super().forward(*args, **kwargs)

    def _hooks(self, x: Tensor) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        yield from super()._hooks(x)
        for norm in ("q_norm", "k_norm"):
            if norm in self.submodules and _listened(point := getattr(self, f"hook_{norm}ed")):
                yield getattr(self, norm), _through(point)


class JoinedBridge(LinearBridge):
    """A joined projection (of q, k and v) as three: what it returns are the outputs of theirs, so that their hooks are live.

    The joined weights themselves are not used.
    """

    parts: tuple[LinearBridge, ...]  # of the attention component, which has them as submodules
    d_head: int
    by_head: bool  # q, k and v of head 0, then of head 1 ...; else all of q, then k, then v

    def connect(self, parts: tuple[LinearBridge, ...], d_head: int, by_head: bool) -> None:
        self.__dict__.update(parts=parts, d_head=d_head, by_head=by_head)  # not as submodules of this one too

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: A002 (as TransformerLens calls it)
        """[batch, pos, 3 * head * d_head] of [batch, pos, d_model]."""
        x = self.hook_in(input)
        outputs = [part(x) for part in self.parts]
        return self.hook_out(_join(outputs, self.d_head, self.by_head, -1))


class ComposedJointAttentionBridge(ComposedAttentionBridge, JointQKVAttentionBridge):
    """Attention whose q, k and v are one projection (GPT-2)."""

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        family = _family(original_component)
        if self.o.original_component is getattr(original_component, family.o):
            setattr(original_component, family.o, self.o)  # the wrapped module has to call it
        self.qkv.connect((self.q, self.k, self.v), self.config.d_head, family.joined == "heads")
        self.register_load_state_dict_post_hook(_rejoin)


class ComposedJointRotaryAttentionBridge(ComposedJointAttentionBridge, JointQKVPositionEmbeddingsAttentionBridge):
    """Attention whose q, k and v are one projection, with rotary positions (GPT-NeoX)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["position_embeddings"] = self._apply_position_embedding_hooks(kwargs["position_embeddings"])
        return super().forward(*args, **kwargs)


def _family(attention: nn.Module) -> Family:
    return next(family for family in families() if type(attention).__name__ in family.attention)


def _maps_path(attention: AttentionBridge) -> str:
    """Where the maps are in the module that a component wraps: beside its projections."""
    if "dw1" in attention.submodules:
        return str(attention.submodules["dw1"].name).removesuffix(".dw1")
    core = str(attention.submodules["qkv" if "qkv" in attention.submodules else "q"].name).rpartition(".")[0]
    return ".".join(filter(None, (core, "compose")))


def _join(parts: list[Tensor], d_head: int, by_head: bool, dim: int) -> Tensor:
    """q, k and v, with [head * d_head] at `dim`, in the layout of their joined projection."""
    if not by_head:
        return torch.cat(parts, dim)
    start = dim % parts[0].ndim
    return torch.stack([part.unflatten(dim, (-1, d_head)) for part in parts], start + 1).flatten(start, start + 2)


def _split(attention: Any, d_head: int) -> tuple[nn.Linear, ...]:
    """The joined projection of an attention module as three `nn.Linear` (views of its weights, where that is possible)."""
    family = _family(attention)
    projection = getattr(attention, family.q)
    weights = weight_blocks(projection, d_head, "out")  # [block, d_head, d_model]
    n = len(weights) // 3
    found = []
    for part in "qkv":
        first, second = (family.block(part, i, n, n) for i in (0, 1))
        picked = slice(first, first + (second - first) * n, second - first)
        linear = nn.Linear(weights.shape[2], n * d_head, bias=projection.bias is not None, device="meta")
        linear.weight = nn.Parameter(weights[picked].flatten(0, 1).detach())
        if projection.bias is not None:
            linear.bias = nn.Parameter(projection.bias.unflatten(0, (-1, d_head))[picked].flatten().detach())
        found.append(linear.train(projection.training))
    return tuple(found)


@torch.no_grad()
def _rejoin(attention: Any, _: Any = None) -> None:
    """After weights were loaded: the joined projection, which is what `headlab.load` gives back, follows q, k and v."""
    joined, d_head = attention.qkv.original_component, attention.config.d_head
    parts = [part.original_component for part in attention.qkv.parts]
    if joined.bias is not None and any(part.bias is None for part in parts):
        return  # weights were processed, and there is no way back from them
    weight = _join([part.weight for part in parts], d_head, attention.qkv.by_head, 0)
    weight_blocks(joined, d_head, "out").copy_(weight.unflatten(0, (-1, d_head)))
    if joined.bias is not None:
        joined.bias.copy_(_join([part.bias for part in parts], d_head, attention.qkv.by_head, 0))


def _listened(point: HookPoint) -> bool:
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)


def _through(point: HookPoint) -> Callable[..., Any]:
    return lambda _, __, output: point(output)


def _per_head(copies: Tensor) -> Callable[..., Tensor]:
    """A forward hook by which a projection reads a copy of its input per head, [batch, pos, head, d_model]."""

    def project(projection: Any, _: Any, __: Any) -> Tensor:
        weight = projection.weight.unflatten(0, (copies.shape[2], -1))  # [head, d_head, d_model]
        projected = torch.einsum("bphm,hdm->bphd", copies, weight).flatten(2)
        return projected if projection.bias is None else projected + projection.bias

    return project


def _drop(component: GeneralizedComponent, *names: str) -> None:
    """Take hook points away that would never fire: an unknown name is an error, a dead hook a silent nothing."""
    for name in names:
        if component._modules.pop(name, None) is not None:
            del component._hook_registry[name]


class OwnGatedMLPBridge(GatedMLPBridge):
    """A gated MLP computed by the wrapped module in compatibility mode too, where TransformerLens has its own formula."""

    def set_processed_weights(self, weights: Any, verbose: bool = False) -> None:
        GeneralizedComponent.set_processed_weights(self, weights, verbose)


class ComposedAdapter(ArchitectureAdapter):
    """What an architecture with composed heads needs when weights are processed (`enable_compatibility_mode`).

    The maps read the first norm's output too, so its gain and bias go into them as well; and value biases stay where they
    are, because rows of a composed pattern do not sum to 1.
    """

    supports_hf_output_attentions = False  # hook points have the patterns, in any backend

    def prepare_model(self, hf_model: Any) -> None:
        super().prepare_model(hf_model)
        hf_model.config.output_attentions = False  # `boot_transformers` sets it
        path = _maps_path(cast("Any", self.component_mapping)["blocks"].submodules["attn"])
        modules = (self.get_component(hf_model, f"blocks.{i}.attn") for i in range(self.cfg.n_layers))
        maps: list[Any] = [child(module, path) for module in modules]
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
        options["split_qkv_matrix"] = functools.partial(_split, d_head=config.d_head)
    return cast(
        "ComposedAttentionBridge",
        cls(name=plain.name, config=config, submodules=submodules | map_components(_maps_path(plain)), **options),
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

# --- `boot_transformers` takes no architecture that is not in this table
SUPPORTED_ARCHITECTURES.setdefault("ComposedGPT2LMHeadModel", ComposedGPT2Adapter)
SUPPORTED_ARCHITECTURES.setdefault("ComposedLlamaForCausalLM", ComposedLlamaAdapter)
SUPPORTED_ARCHITECTURES.setdefault("ComposedGPTNeoXForCausalLM", ComposedGPTNeoXAdapter)
SUPPORTED_ARCHITECTURES.setdefault("ComposedBertForMaskedLM", ComposedBertAdapter)
for _name, _adapter in (("DCFormer", DCFormerAdapter), ("DCPythia", DCPythiaAdapter)):
    ArchitectureAdapterFactory.register_adapter(_name, _adapter)  # as published checkpoints call it
    for _known in (_name, f"{_name}ForCausalLM"):  # `boot_transformers` takes no architecture that is not in this table
        SUPPORTED_ARCHITECTURES.setdefault(_known, _adapter)
