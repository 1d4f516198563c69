"""What DCFormer and DCPythia models are described by."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..errors import HeadlabError
from .backends import check_backend
from .branches import DYNAMIC, STAGES, check_rank, heads_per_group, places_of

WINDOWS = {"LG": "LG", "LGLL": "LGLL", "LGL6": "LGLLLLLL"}  # local and global layers, over and over
LOCAL = 256  # keys that a local layer sees where a cycle is named and no window
OPTIONS = ("rank", "groups", "branches", "stages", "residual", "hidden")  # of `Compose`


class DCConfig(PreTrainedConfig):
    """What DCFormer and DCPythia have in common. Names that the published configs use are understood too.

    Args:
        compose: the arguments of `Compose` (those left out are as published); None for plain multi-head attention.
        window_size: how many keys the local layers see, themselves included; None: all layers are global.
        window_type: the cycle of local (L) and global (G) layers: `LG` (also without a name), `LGLL` or `LGL6`.
        backend: how attention is computed: `eager` or `chunked`.
    """

    attribute_map: ClassVar[dict[str, str]] = {
        "dim": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_local_heads": "num_key_value_heads", "block_size": "max_position_embeddings", "rope_base": "rope_theta",
    }  # fmt: skip
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    __no_type_check__: ClassVar[bool] = True  # at run time: it takes more names than its fields

    vocab_size: int = 32_000
    hidden_size: int = 2_560
    intermediate_size: int | None = None
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2_048
    rope_theta: float = 10_000.0
    rotary_pct: float = 1.0
    norm_eps: float = 1e-5
    use_qk_norm: bool = False
    window_size: int | None = 256
    window_type: str | None = None
    compose: dict[str, Any] | None = field(default_factory=dict)
    backend: str = "eager"
    initializer_range: float = 0.006
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for published, name in type(self).attribute_map.items():
            if published in kwargs:
                setattr(self, name, kwargs.pop(published))
        if kwargs.pop("use_dcmha", True) is False:
            self.compose = None
        elif self.compose is not None:
            if not isinstance(self.compose, dict) or (unknown := [name for name in self.compose if name not in OPTIONS]):
                given = repr(self.compose) if not isinstance(self.compose, dict) else ", ".join(map(repr, unknown))
                raise HeadlabError(f"compose is None or a dict of {', '.join(OPTIONS)}, not {given}")
            branches = [b for b in DYNAMIC if not (kwargs.get("query_wise") and b.startswith("key"))]
            published_options = {"branches": ["base", *branches] if kwargs.get("use_sw") else branches}
            self.compose = published_options | self.compose
            self.compose |= {key: list(value) for key, value in self.compose.items() if isinstance(value, tuple)}
        for name in ("query_wise", "use_sw", "is_training", "use_gradient_checkpointing", "q_chunk_size", "prefill_pad"):
            kwargs.pop(name, None)  # of the published code; what they mean is in `compose` now, or nothing
        if self.num_key_value_heads in (None, -1):
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        if kv is None or kv < 1 or heads % kv:
            raise HeadlabError(f"{heads} query heads cannot share {kv} key-value heads: it must divide them")
        d_head = self.head_dim or 0
        turned = int(d_head * self.rotary_pct)
        if turned + turned % 2 > d_head:
            raise HeadlabError(
                f"rotary positions turn features in pairs, but a rotary_pct of {self.rotary_pct} takes {turned} of a head's "
                f"{d_head}"
            )
        if self.window_size is not None and self.window_size < 1:
            raise HeadlabError(f"a window holds at least 1 key, the query's own, not {self.window_size}; None is no window")
        if self.window_type is not None and self.window_type not in WINDOWS:
            raise HeadlabError(f"window_type is one of {', '.join(WINDOWS)} or None, not {self.window_type!r}")
        check_backend(self.backend)
        if self.compose is not None:
            places = places_of(self.compose.get("branches", DYNAMIC), self.compose.get("stages", STAGES))
            check_rank(self.compose.get("rank", 2), heads_per_group(heads, self.compose.get("groups", 1)), places)

    @property
    def windows(self) -> list[int | None]:
        """For every layer, how many keys a query sees; None: all."""
        if self.window_size is None and self.window_type is None:
            return [None] * self.num_hidden_layers
        cycle = WINDOWS[self.window_type or "LG"]
        local = self.window_size or LOCAL
        return [local if cycle[i % len(cycle)] == "L" else None for i in range(self.num_hidden_layers)]


class DCFormerConfig(DCConfig):
    __doc__ = f"""{DCConfig.__doc__}
        mgate: whether the MLP's hidden layer lies in `mgate_dim` groups, weighted by a softmax over groups.
    """
    model_type = "dcformer"

    rope_theta: float = 500_000.0
    mgate: bool = False
    mgate_dim: int = 44

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            wide = 8 * kwargs.get("dim", self.hidden_size) // 3
            self.intermediate_size = -(-wide // 256) * 256
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        super()._check()
        wide = self.intermediate_size or 0
        if self.mgate and (self.mgate_dim < 1 or wide % self.mgate_dim):
            raise HeadlabError(f"an MLP of {wide} cannot be gated in {self.mgate_dim} groups")


class DCPythiaConfig(DCConfig):
    __doc__ = f"""{DCConfig.__doc__}
        use_parallel_residual: attention and MLP read the same residual stream (GPT-NeoX), or one after the other.
        use_linear_bias: whether linear maps have biases.
    """
    model_type = "dcpythia"

    rotary_pct: float = 0.25
    use_parallel_residual: bool = True
    use_linear_bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * kwargs.get("dim", self.hidden_size)
        super().__post_init__(**kwargs)
