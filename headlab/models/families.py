"""One description per attention family, read by every algorithm.

A description says where an attention module keeps its q, k, v and output projections and how the heads lie in them.
Supporting a new architecture means registering one more:

>>> hl.register(hl.Family("mine", ("MyAttention",), q="wq", k="wk", v="wv", o="wo", d_head="head_dim"))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Family:
    """How one kind of attention module lays out its heads. Paths are relative to the module.

    Attributes:
        attention: class names of the modules described (exact names: a subclass may compute something else).
        q, k, v: the three projections; or all of them the same path for one joined projection.
        o: the output projection; its input is the heads' site.
        joined: how q, k and v share a projection: `None` (they don't), `blocks` (all of q, then k, then v; GPT-2) or
            `heads` (q, k and v of head 0, then of head 1 ...; GPT-NeoX).
        d_head: attribute that holds the size of a head.
        core: the submodule that computes the heads, where the output projection stands beside it (BERT).
        counts: attributes that follow the number of heads, and what they count: `slots` (query heads), `width`
            (query heads x d_head) or `ratio` (query heads per key-value head).
        cross: names of attributes that hold cross-attention.
        shared_bias: the module shares a position bias with one row per head among layers (T5).
        angles: makes cos and sin of positions [batch, pos], both [batch, 1, pos, features that turn], from the module's
            config, the positions and a dtype; None where the model has a rotary module that does, or no rotary positions.
        model_types: `config.model_type` of models known to use it; their pruned models open with `AutoModel`.
    """

    name: str
    attention: tuple[str, ...]
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    joined: Literal["blocks", "heads"] | None = None
    d_head: str = "head_dim"
    core: str = ""
    counts: Mapping[str, Literal["slots", "width", "ratio"]] = field(default_factory=dict)
    cross: tuple[str, ...] = ()
    shared_bias: bool = False
    angles: Callable[[Any, Tensor, torch.dtype], tuple[Tensor, Tensor]] | None = None
    model_types: tuple[str, ...] = ()

    def block(self, part: str, index: int, n_slots: int, n_kv: int) -> int:
        """Which block of d_head rows of its projection holds a query slot (`q`) or a key-value head (`k`, `v`).

        `n_slots` and `n_kv` count what the projection holds now.

        >>> GPT2.block("v", 1, n_slots=3, n_kv=3)
        7
        """
        if self.joined == "blocks":
            return index + {"q": 0, "k": n_slots, "v": n_slots + n_kv}[part]
        return 3 * index + "qkv".index(part) if self.joined == "heads" else index

    def blocks(
        self, slots: Sequence[int | None], keys: Sequence[int], values: Sequence[int], n_slots: int, n_kv: int
    ) -> dict[str, list[int | None]]:
        """For each input projection, the blocks that hold these query slots, keys and values, in its order.

        A block is None where the slot is (padding).

        >>> GPT2.blocks([0, 2], [0, 2], [0, 2], n_slots=3, n_kv=3)
        {'c_attn': [0, 2, 3, 5, 6, 8]}
        """
        found: dict[str, list[int | None]] = {self.q: [], self.k: [], self.v: []}
        parts = [("q", slots), ("k", keys), ("v", values)]
        if self.joined == "heads":
            parts = [(part, [slot]) for slot in slots for part, _ in parts]
        for part, indices in parts:
            blocks = (None if i is None else self.block(part, i, n_slots, n_kv) for i in indices)
            found[getattr(self, part)].extend(blocks)
        return found


_registry: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a description known under the class names of its attention modules. Returns it."""
    _registry.update(dict.fromkeys(family.attention, family))
    return family


def family_of(module: nn.Module) -> Family | None:
    """The description of an attention module, by its own word or by the name of its class; None if there is none."""
    return vars(module).get("headlab_family") or _registry.get(type(module).__name__)


def families() -> tuple[Family, ...]:
    """Every registered description."""
    return tuple(dict.fromkeys(_registry.values()))


LLAMA = register(
    Family(
        "llama",
        attention=(
            "LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention", "Qwen3Attention",
            "GemmaAttention", "Gemma2Attention", "Gemma3Attention", "GraniteAttention", "SmolLM3Attention",
            "Starcoder2Attention",
        ),
        counts={"num_key_value_groups": "ratio"},
        model_types=(
            "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3",
            "starcoder2",
        ),
    )
)  # fmt: skip
GPT2 = register(
    Family(
        "gpt2", ("GPT2Attention",), q="c_attn", k="c_attn", v="c_attn", o="c_proj", joined="blocks",
        counts={"num_heads": "slots", "split_size": "width"}, model_types=("gpt2",),
    )
)  # fmt: skip
NEOX = register(
    Family(
        "gpt_neox", ("GPTNeoXAttention",), q="query_key_value", k="query_key_value", v="query_key_value", o="dense",
        joined="heads", d_head="head_size", model_types=("gpt_neox",),
    )
)  # fmt: skip
BERT = register(
    Family(
        "bert", ("BertAttention", "RobertaAttention", "XLMRobertaAttention", "ElectraAttention"),
        q="self.query", k="self.key", v="self.value", o="output.dense", core="self", d_head="attention_head_size",
        counts={"num_attention_heads": "slots", "all_head_size": "width"}, cross=("crossattention",),
        model_types=("bert", "roberta", "xlm-roberta", "electra"),
    )
)  # fmt: skip
VIT = register(Family("vit", ("ViTAttention",), counts={"num_attention_heads": "slots"}, model_types=("vit",)))
T5 = register(
    Family(
        "t5", ("T5Attention", "NarrowT5Attention"), q="q", k="k", v="v", o="o", d_head="key_value_proj_dim",
        counts={"n_heads": "slots", "inner_dim": "width"}, cross=("EncDecAttention",), shared_bias=True,
        model_types=("t5",),
    )
)  # fmt: skip
