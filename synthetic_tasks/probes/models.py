"""Small models for `CrossComposition`: one layer or a few of attention of some kind, the answer read at the query.

A record and the query are one position each, the sum of the embeddings of what is in the bag. Layers are pre-norm and
causal, without positions; a probe is an ordinary Hugging Face model, so heads of probes are scored, masked, looked into
and pruned as anywhere in headlab. The last layer may be asked for the query alone, which gives the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from headlab.dcmha import BRANCHES, Compose
from headlab.dcmha.backends import Problem, Visible, attend
from headlab.dcmha.compose import Projection, Weight
from headlab.errors import HeadlabError
from headlab.models.families import Family, register

from ..symbolic import CrossComposition
from . import one_query
from .one_query import flat

COMPOSITIONAL = "compositional"
KINDS: Mapping[str, Mapping[str, Any] | str] = {
    "mha": {"stages": ()},
    "static": {"branches": ("base",)},
    "gates": {"branches": ("query_gate", "key_gate")},
    "query": {"branches": ("query", "query_gate")},
    "key": {"branches": ("key", "key_gate")},
    "low_rank": {"branches": ("query", "key")},
    "pre": {"branches": BRANCHES, "stages": ("pre",)},
    "post": {"branches": BRANCHES, "stages": ("post",)},
    "dynamic": {},
    "dcmha": {"branches": BRANCHES},
    COMPOSITIONAL: COMPOSITIONAL,
}
"""Attention of probes, as options of `Compose`: none; static maps; one part of DCMHA; its published default (`dynamic`);
all five branches at both stages (`dcmha`); and compositional attention, which is no map (`CompositionalAttention`)."""


class ProbeConfig(PreTrainedConfig):
    """Sizes of a probe.

    Args:
        kind: one of `KINDS`.
        n_tokens, n_classes: vocabulary, its last token being the padding of bags; and answers.
        record_tokens: the first ones, which stand in records; there are as many in a record as features.
        n_features, query_tokens: how many tokens a record holds, and how many of the named kind the query does. Their
            embeddings are divided by the square root of it.
        hidden_size, num_attention_heads, head_dim, num_hidden_layers: as everywhere.
        mlp: an MLP (4 x, GELU) behind every attention.
        first: an MLP on the query before attention, so that what it names can be multiplied.
        rank: of the low-rank branches.
    """

    model_type = "cross_composition_probe"

    def __init__(
        self,
        kind: str = "dcmha",
        n_tokens: int = 273,
        n_classes: int = 128,
        record_tokens: int = 128,
        n_features: int = 8,
        query_tokens: int = 1,
        hidden_size: int = 128,
        num_attention_heads: int = 8,
        head_dim: int = 16,
        num_hidden_layers: int = 1,
        mlp: bool = False,
        first: bool = False,
        rank: int = 2,
        **kwargs: Any,
    ) -> None:
        if kind not in KINDS:
            raise HeadlabError(f"no attention is called {kind!r}; the kinds are {', '.join(KINDS)}")
        self.kind, self.n_tokens, self.n_classes, self.record_tokens = kind, n_tokens, n_classes, record_tokens
        self.n_features, self.query_tokens = n_features, query_tokens
        self.hidden_size, self.num_attention_heads, self.head_dim = hidden_size, num_attention_heads, head_dim
        self.num_hidden_layers, self.mlp, self.first, self.rank = num_hidden_layers, mlp, first, rank
        self.num_key_value_heads = num_attention_heads
        kwargs.setdefault("num_labels", n_classes)
        super().__init__(**kwargs)


def probe_config(task: CrossComposition, kind: str, **sizes: Any) -> ProbeConfig:
    """The config of a probe that reads a task's bags; `sizes` as in `ProbeConfig`.

    Raises:
        HeadlabError: no such kind, or the task is laid out in tokens.
    """
    if task.layout != "bag":
        raise HeadlabError("probes read bags: make the task with layout='bag' (its tokens are for language models)")
    return ProbeConfig(
        kind,
        n_tokens=task.n_tokens,
        n_classes=task.n_classes,
        record_tokens=task.n_features * task.n_values,
        n_features=task.n_features,
        query_tokens=task.n_features if task.level == "conflict" else 1,
        **sizes,
    )


class ProbeAttention(nn.Module):
    """Attention with composed heads, for all positions or for the last one as the only query."""

    is_causal = True

    def __init__(self, config: ProbeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        options = KINDS[config.kind]
        assert isinstance(options, Mapping)
        self.compose = Compose(config.hidden_size, config.num_attention_heads, rank=config.rank, **options)

    def forward(self, x: Float[Tensor, "batch pos d_model"], last: bool = False) -> Float[Tensor, "batch query d_model"]:
        if last and one_query.fits(self.compose, self.k_proj, self.v_proj):
            asked = flat(self.q_proj, x[:, -1:])[:, 0].unflatten(-1, (-1, self.head_dim))
            w_k, w_v = (part.weight.unflatten(0, (-1, self.head_dim)) for part in (self.k_proj, self.v_proj))
            return flat(self.o_proj, one_query.attended(self.compose, asked, w_k, w_v, x).flatten(1)[:, None])
        parts = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (flat(part, x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        sides = self.compose(x)
        problem = Problem(
            q=q,  # [batch, head, pos, d_head]
            k=self.compose.spread(k, "scores"),
            v=self.compose.spread(v, "output"),
            compose=self.compose,
            query=sides,
            key=sides,
            gates=self.compose.gates(x),
            visible=Visible(),
            scale=self.head_dim**-0.5,
        )
        out = flat(self.o_proj, attend(problem)[0].flatten(2))
        return out[:, -1:] if last else out


class CompositionalAttention(nn.Module):
    """Every search with every retrieval, and a choice among them at each query.

    Each of H searches (queries and keys) attends with each of H retrievals (values); a second attention, of queries of
    the token with keys of what was retrieved, chooses among the retrievals of a search. Source: Compositional Attention:
    Disentangling Search and Retrieval (arXiv 2110.09419, ICLR 2022), section 3.
    """

    def __init__(self, config: ProbeConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        d_model, d_head, width = config.hidden_size, config.head_dim, config.num_attention_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, width, bias=False) for _ in range(3))
        self.choice_q = nn.Linear(d_model, width, bias=False)
        self.choice_k = nn.Linear(d_head, d_head, bias=False)
        self.o_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"], last: bool = False) -> Float[Tensor, "batch query d_model"]:
        asking = x[:, -1:] if last else x
        parts = ((self.q_proj, asking), (self.choice_q, asking), (self.k_proj, x), (self.v_proj, x))
        q, wish, k, v = (flat(part, at).unflatten(-1, (-1, self.head_dim)) for part, at in parts)  # [batch, pos, head, d]
        scores = torch.einsum("bqsd,bksd->bsqk", q, k) * self.head_dim**-0.5
        if not last:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        found = torch.einsum("bsqk,bkrd->bqsrd", scores.softmax(-1), v)  # by search and retrieval
        fit = torch.einsum("bqsd,bqsrd->bqsr", wish, self.choice_k(found)) * self.head_dim**-0.5
        chosen = torch.einsum("bqsr,bqsrd->bqsd", fit.softmax(-1), found)
        return flat(self.o_proj, chosen.flatten(2))


class ProbeMLP(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.up_proj = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down_proj = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What it adds."""
        return flat(self.down_proj, F.gelu(flat(self.up_proj, self.norm(x))))


class ProbeBlock(nn.Module):
    def __init__(self, config: ProbeConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        attention = CompositionalAttention if config.kind == COMPOSITIONAL else ProbeAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = ProbeMLP(config.hidden_size) if config.mlp else None

    def forward(self, x: Float[Tensor, "batch pos d_model"], last: bool = False) -> Float[Tensor, "batch query d_model"]:
        x = (x[:, -1:] if last else x) + self.self_attn(self.norm(x), last)
        return x if self.mlp is None else x + self.mlp(x)


class ProbeForSequenceClassification(PreTrainedModel):
    """A probe: bags of tokens in, one class out.

    `forward(input_ids)` takes bags [batch, pos, slot]; logits are [batch, class]. With `labels` [batch] there is a loss.
    """

    config_class = ProbeConfig
    _input_embed_layer = "embed"
    weights: Tensor  # of a token in its bag

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.n_tokens, config.hidden_size)
        self.first = ProbeMLP(config.hidden_size) if config.first else None
        self.layers = nn.ModuleList(ProbeBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.n_classes)
        weights = torch.ones(config.n_tokens)
        named = slice(config.record_tokens, 2 * config.record_tokens)
        weights[: config.record_tokens], weights[named] = config.n_features**-0.5, config.query_tokens**-0.5
        weights[-1] = 0
        self.register_buffer("weights", weights)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (Weight, Projection)):  # of `Compose`
            nn.init.normal_(module.weight, std=module.std)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def embedded(self, ids: Int[Tensor, "batch pos slot"]) -> Float[Tensor, "batch pos d_model"]:
        """The sum of the embeddings in every bag, as a product with counts: a gather would write each of them out."""
        n_records, n_all = self.config.record_tokens, self.config.n_tokens - 1  # without the padding
        parts = []
        for bags, end in ((ids[:, :-1, : self.config.n_features], n_records), (ids[:, -1:], n_all)):
            counts = self.weights.new_zeros(*bags.shape[:-1], end)
            counts = counts.scatter_add(-1, bags.clamp(max=end - 1), self.weights[bags])
            parts.append((counts.flatten(0, 1) @ self.embed.weight[:end]).unflatten(0, bags.shape[:2]))
        return torch.cat(parts, 1)

    def stream(self, ids: Int[Tensor, "batch pos slot"]) -> Float[Tensor, "batch pos d_model"]:
        """What the first layer gets."""
        x = self.embedded(ids)
        return x if self.first is None else torch.cat([x[:, :-1], x[:, -1:] + self.first(x[:, -1:])], 1)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, last: bool = False, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """`last`: compute the last layer for the query only, which gives the same logits for less."""
        x = self.stream(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, last and i == len(self.layers) - 1)
        logits = self.head(self.norm(x[:, -1]))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


PROBE = register(Family("cross_composition_probe", ("ProbeAttention",), model_types=(ProbeConfig.model_type,)))
AutoConfig.register(ProbeConfig.model_type, ProbeConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForSequenceClassification):
    _auto.register(ProbeConfig, ProbeForSequenceClassification, exist_ok=True)
