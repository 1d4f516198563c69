"""One description per attention family, read by every algorithm, and the search for attention modules in a model.

A description says where an attention module keeps its q, k, v and output projections and how the heads lie in them.
Supporting a new architecture means registering one more:

>>> from headlab.families import Family, register
>>> register(Family("mine", attention=("MyAttention",), q="wq", k="wk", v="wv", o="wo", d_head="head_dim"))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from .errors import HeadlabError
from .scores import Head

PRUNED = "headlab_"  # how the model type of a pruned model begins: headlab_llama
Groups = tuple[tuple[int, tuple[int | None, ...]], ...]
"""The heads of one attention module as they lie in its weights: for every key-value head its original number and the
original numbers of the query heads that read it; None is a padding slot (a query head of zeros)."""


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


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention module found in a model, plain or bridged, and the heads it holds (at a site, see `at`)."""

    row: int
    layer: int
    stack: str
    path: str
    module: nn.Module
    family: Family
    groups: Groups
    d_head: int
    site: str = "output"

    @property
    def slots(self) -> tuple[int | None, ...]:
        """The original number of the head in each query slot, in the order of the site; None is padding."""
        return tuple(head for _, heads in self.groups for head in heads)

    @property
    def places(self) -> list[int]:
        """For each head, in the order of `heads`, its slot."""
        slots = self.slots
        return sorted((i for i, head in enumerate(slots) if head is not None), key=lambda i: slots[i] or 0)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads, by their original number."""
        owner = {head: group for group, heads in self.groups for head in heads}
        site = f"{self.path}.{self.family.o}"
        indices = sorted(head for head in self.slots if head is not None)
        return tuple(Head(self.row, self.layer, i, self.stack, owner[i], self.d_head, site) for i in indices)

    @property
    def core(self) -> Any:
        """The module that computes the heads' outputs; `Any`, for torch does not know its attributes."""
        return child(self.module, self.family.core)

    @property
    def compose(self) -> Any:
        """The maps of an attention with composed heads (`headlab.dcmha.Compose`); None in plain attention."""
        found = getattr(bare(self.core), "compose", None)
        return None if found is None else bare(found)

    def at(self, site: str) -> Attention:
        """The same module with the heads that can be removed at a site: `output`, or what composed heads have beside it.

        Raises:
            HeadlabError: there is no such site here.
        """
        if site == self.site:
            return self
        if not self.groups and self.compose is None:
            return replace(self, site=site)  # pruning left nothing of it
        if self.compose is None:
            raise HeadlabError(f"plain attention, as in {self.path}, has one site, 'output', not {site!r}")
        if site not in ("output", *self.compose.sites):
            raise HeadlabError(f"composed heads have the sites output, {', '.join(self.compose.sites)}, but not {site!r}")
        return replace(self, groups=grouped(self.compose.heads_at(site), self.compose.ratio), site=site)

    def projection(self, path: str) -> Any:
        """A projection of the module as it was before any bridge: an `nn.Linear`, a `Conv1D` or the like."""
        return bare(child(self.module, path))


def bare(module: nn.Module) -> nn.Module:
    """A module without the TransformerLens component that may wrap it."""
    while (inner := module._modules.get("_original_component")) is not None:
        module = inner
    return module


def child(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path, looking through TransformerLens components."""
    for name in filter(None, path.split(".")):
        module = getattr(bare(module), name)
    return module


_registry: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a description known under the class names of its attention modules. Returns it."""
    _registry.update(dict.fromkeys(family.attention, family))
    return family


def families() -> tuple[Family, ...]:
    """Every registered description."""
    return tuple(dict.fromkeys(_registry.values()))


def attentions(root: nn.Module) -> tuple[Attention, ...]:
    """Every attention module of a model: encoder layers, then decoder layers, then cross-attention.

    Raises:
        HeadlabError: a module looks like attention but has no description, or there is no attention at all.
    """
    found = list(_described(root, ""))
    if not found:
        raise HeadlabError(f"found no attention module in {type(root).__name__}; {_HOW}")
    stacks = [_stack(path, family) for path, _, family in found]
    order = [name for name in ("enc", "dec", "cross") if name in stacks]
    rows: list[Attention] = []
    for stack in order:
        members = [item for item, name in zip(found, stacks, strict=True) if name == stack]
        for layer, (path, module, family) in enumerate(members):
            groups, d_head = _layout(module, family, path)
            rows.append(Attention(len(rows), layer, stack if len(order) > 1 else "", path, module, family, groups, d_head))
    return tuple(rows)


_HOW = (
    "describe it with headlab.families.register(Family(name, attention=(class name,), q=..., k=..., v=..., o=..., "
    "d_head=...)), see help(headlab.families)"
)


def _described(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, Family]]:
    """Attention modules below `module`, depth first; an undescribed one is an error."""
    inner = bare(module)
    name = type(inner).__name__
    family = vars(inner).get("headlab_family") or _registry.get(name)
    if family is not None:
        yield path, module, family
        return
    below = False
    for child_name, submodule in inner.named_children():
        for item in _described(submodule, f"{path}.{child_name}".lstrip(".")):
            below = True
            yield item
    if "Attention" in name and not below and any(True for _ in inner.parameters()):
        raise HeadlabError(f"found no description of the attention module {path or 'itself'} ({name}); {_HOW}")


def _stack(path: str, family: Family) -> str:
    """`enc`, `dec` or `cross`, from where the module stands."""
    names = path.split(".")
    if names[-1] in family.cross:
        return "cross"
    return "enc" if "encoder" in names and "decoder" not in names else "dec"


def _layout(module: nn.Module, family: Family, path: str) -> tuple[Groups, int]:
    """Read groups and head size off the weights (a pruned module says itself which heads it holds)."""
    core = bare(child(module, family.core))
    d_head = getattr(core, family.d_head, None)
    if not isinstance(d_head, int):
        raise HeadlabError(f"{path} ({type(bare(module)).__name__}) has no whole number {family.d_head!r}; {_HOW}")
    if (wrapped := getattr(core, "compose", None)) is not None:
        compose: Any = bare(wrapped)
        return grouped(compose.heads_at("output"), compose.ratio), d_head
    if (groups := getattr(core, "headlab_groups", None)) is not None:
        return groups, d_head
    if family.joined and getattr(core, "is_cross_attention", False):
        raise HeadlabError(f"{path} is cross-attention, whose queries have a projection of their own; {_HOW}")
    n_slots = width_in(bare(child(module, family.o))) // d_head
    n_kv = n_slots if family.joined == "heads" else width_out(bare(child(module, family.v))) // d_head
    if family.joined == "blocks":
        n_kv = (n_kv - n_slots) // 2
    if n_kv < 1 or n_slots % n_kv:
        raise HeadlabError(f"{path} has {n_slots} query heads on {n_kv} key-value heads, which headlab cannot group")
    ratio = n_slots // n_kv
    return tuple((g, tuple(range(g * ratio, (g + 1) * ratio))) for g in range(n_kv)), d_head


def grouped(heads: Sequence[int], ratio: int) -> Groups:
    """Heads by the key-value head they read, of which each serves `ratio` neighbouring heads."""
    return tuple((g, tuple(h for h in heads if h // ratio == g)) for g in sorted({h // ratio for h in heads}))


def transposed(projection: nn.Module) -> bool:
    """Whether the weight is stored as [in, out], as in GPT-2's Conv1D, and not as [out, in]."""
    return type(projection).__name__ == "Conv1D"


def width_in(projection: Any) -> int:
    return projection.weight.shape[0 if transposed(projection) else 1]


def width_out(projection: Any) -> int:
    return projection.weight.shape[1 if transposed(projection) else 0]


def weight_blocks(projection: Any, d_head: int, side: Literal["in", "out"]) -> torch.Tensor:
    """The weight as [block, d_head, other side], a block per head on the given side (a view)."""
    weight = projection.weight if transposed(projection) == (side == "in") else projection.weight.T
    return weight.unflatten(0, (-1, d_head))


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
