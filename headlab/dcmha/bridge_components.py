"""Components of a TransformerBridge for attention with composed heads: the wrapped module computes, hooks see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    GatedMLPBridge,
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    LinearBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from ..models.attention_modules import submodule, weight_blocks
from ..models.families import Family, families
from .branches import SCORE_TAPS


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
        return submodule(cast("nn.Module", self.original_component), maps_path(self))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module returns, its first output through `hook_out`."""
        if args:
            x, args = args[0], args[1:]
        else:
            x = kwargs.pop("hidden_states")
        x = self.hook_in(x)
        with ExitStack() as hooks:
            for module, hook in self._hooks(x):
                hooks.callback(module.register_forward_hook(hook).remove)
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


def maps_path(attention: AttentionBridge) -> str:
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


def split(attention: Any, d_head: int) -> tuple[nn.Linear, ...]:
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
