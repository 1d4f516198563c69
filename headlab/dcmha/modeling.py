"""DCFormer and DCPythia as ordinary Hugging Face models.

DCFormer is a Llama with composed heads (RMSNorm, SwiGLU, rotary positions, optional norms of queries and keys, layers
with a local window in between); DCPythia a GPT-NeoX with composed heads. With `compose=None` each is the plain
multi-head transformer it is compared with. Both open with `AutoModelForCausalLM` once this module is imported, published
checkpoints included (`conversion.py`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..errors import HeadlabError
from ..models.families import Family, register
from ..models.positions import rotate
from . import conversion
from .backends import Problem, Visible, attend
from .cache import check_layers, remember
from .compose import Compose, Projection, Weight
from .configuration import DCConfig, DCFormerConfig, DCPythiaConfig


class RMSNorm(nn.RMSNorm):
    """In its input's dtype, also under autocast, which leaves weights as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class DCAttention(nn.Module):
    """Attention with composed heads."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        bias = getattr(config, "use_linear_bias", False)
        d_model, d_head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(d_model, config.num_attention_heads * d_head, bias=bias)
        self.k_proj = nn.Linear(d_model, config.num_key_value_heads * d_head, bias=bias)
        self.v_proj = nn.Linear(d_model, config.num_key_value_heads * d_head, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d_head, d_model, bias=bias)
        if config.use_qk_norm:
            self.q_norm, self.k_norm = RMSNorm(d_head, eps=1e-6), RMSNorm(d_head, eps=1e-6)
        options = {"stages": ()} if config.compose is None else config.compose
        self.compose = Compose(d_model, config.num_attention_heads, **options)
        self.compose.ratio = config.num_attention_heads // config.num_key_value_heads

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        visible: Visible,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x = hidden_states  # [batch, pos, d_model]
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [batch, head, pos, d_head]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(part, *position_embeddings) for part in (q, k))
        sides = self.compose(x)
        keys = sides
        if past_key_values is not None:
            k, v, keys = remember(past_key_values, self.layer_idx, self.compose, k, v, sides)
        problem = Problem(
            q=q,
            k=self.compose.spread(k, "scores"),
            v=self.compose.spread(v, "output"),
            compose=self.compose,
            query=sides,
            key=keys,
            gates=self.compose.gates(x),
            visible=visible,
            scale=self.head_dim**-0.5,
        )
        z, pattern = attend(problem, self.config.backend)
        return self.o_proj(z.flatten(2)), pattern


class DCMLP(nn.Module):
    """SwiGLU, its hidden layer optionally gated in groups (DCFormer), or GELU (DCPythia)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = getattr(config, "use_linear_bias", False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.swiglu = isinstance(config, DCFormerConfig)
        self.groups = config.mgate_dim if getattr(config, "mgate", False) else 0
        if self.swiglu:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        if self.groups:
            self.group_proj = nn.Linear(config.hidden_size, self.groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.swiglu:
            return self.down_proj(F.gelu(self.up_proj(x)))
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)  # [batch, pos, d_mlp]
        if self.groups:
            wide = torch.promote_types(x.dtype, torch.float32)
            weights = self.group_proj(x).softmax(-1, dtype=wide).to(x.dtype)  # [batch, pos, group]
            hidden = (hidden.unflatten(-1, (self.groups, -1)) * weights[..., None]).flatten(-2)
        return self.down_proj(hidden)


class DCBlock(GradientCheckpointingLayer):
    """A layer: attention and MLP, one after the other or (DCPythia) side by side."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.parallel = getattr(config, "use_parallel_residual", False)
        self.self_attn = DCAttention(config, layer_idx)
        self.mlp = DCMLP(config)
        self.input_layernorm, self.post_attention_layernorm = _norm(config), _norm(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        attended, pattern = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        middle = hidden_states + attended
        return middle + self.mlp(self.post_attention_layernorm(hidden_states if self.parallel else middle)), pattern


def _norm(config: DCConfig) -> nn.Module:
    kind = RMSNorm if isinstance(config, DCFormerConfig) else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class DCPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialising."""

    config_class = DCConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DCBlock"]  # noqa: RUF012 (as transformers declares it)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (Weight, Projection)):  # of `Compose`
            nn.init.normal_(module.weight, std=module.std)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; published checkpoints open too, and a missing or unexpected tensor is an error."""
        return conversion.open_model(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)


class DCModel(DCPreTrainedModel):
    """Embedding, layers and final norm."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: DCConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DCBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise HeadlabError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [batch, pos, d_model]
        again = self.gradient_checkpointing and self.training  # layers run twice, which a cache would see
        if use_cache is None:
            use_cache = config.use_cache
        if again:
            _check_empty(past_key_values)
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past: int | Tensor = 0
        if past_key_values is not None:
            check_layers(past_key_values, config.num_hidden_layers)
            past = past_key_values.get_seq_length()
            past = past.clone() if isinstance(past, Tensor) else past  # a cache of fixed size counts in place
        n_pos, known = x.shape[1], past if isinstance(past, int) else 0
        if known + n_pos > config.max_position_embeddings:
            raise HeadlabError(
                f"{n_pos} tokens after {known} are more than the model's context of {config.max_position_embeddings}"
            )
        if position_ids is None:
            position_ids = (torch.arange(n_pos, device=x.device) + past)[None]
        fixed = not isinstance(past, int) or getattr(past_key_values, "is_compileable", False)
        real, seen = _masks(attention_mask, len(x), known + n_pos, fixed)
        rotary = rotary_of(config, position_ids, torch.promote_types(x.dtype, torch.float32))
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list[Tensor] = []
        patterns: list[Tensor | None] = []
        for layer, window in zip(self.layers, config.windows, strict=True):
            states += [x] if output_hidden_states else []
            visible = Visible(past, True, window, real, seen)
            x, pattern = layer(x, position_embeddings=rotary, visible=visible, past_key_values=past_key_values)
            patterns += [pattern] if output_attentions else []
        x = self.norm(x)
        states += [x] if output_hidden_states else []
        if output_attentions and any(pattern is None for pattern in patterns):
            raise HeadlabError(
                f"the {config.backend!r} backend has no attention patterns: set model.config.backend = 'eager'"
            )
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(p for p in patterns if p is not None) if output_attentions else None,
        )
        return output if _wants_dict(config, return_dict) else output.to_tuple()


def _wants_dict(config: Any, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _check_empty(cache: Cache | None) -> None:
    if cache is not None and cache.get_seq_length() > 0:
        raise HeadlabError(
            f"gradient checkpointing cannot go on from a cache of {int(cache.get_seq_length())} tokens: give all tokens at "
            "once, or switch checkpointing off"
        )


def _masks(mask: Tensor | None, batch: int, n_keys: int, fixed: bool) -> tuple[Tensor | None, Tensor | None]:
    """A mask of padding [batch, key], or one of any other kind [batch, head, query, key] (bool, or 0 where seen).

    With a cache of `fixed` size, there may be more keys than these.
    """
    if mask is None:
        return None, None
    if mask.ndim == 4:
        return None, mask if mask.dtype == torch.bool else mask == 0
    if mask.ndim != 2 or len(mask) != batch or mask.shape[1] < n_keys or (mask.shape[1] > n_keys and not fixed):
        raise HeadlabError(
            f"an attention mask of shape {tuple(mask.shape)} does not fit: expected ({batch}, {n_keys}), one number for "
            "every token, those in the cache included"
        )
    return mask.bool(), None


def rotary_of(config: Any, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, [batch, 1, pos, features that turn]."""
    n = int(config.head_dim * config.rotary_pct)
    powers = torch.arange(0, n, 2, device=position_ids.device, dtype=dtype) / n
    angles = position_ids[:, None, :, None].to(dtype) * config.rope_theta**-powers
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


class DCForCausalLM(DCPreTrainedModel, GenerationMixin):
    """A language model: logits, and a loss where there are labels."""

    body: ClassVar[type[DCModel]]

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DCConfig) -> None:
        super().__init__(config)
        self.model = self.body(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


class DCFormerModel(DCModel):
    """DCFormer without its language-model head."""

    config_class = DCFormerConfig


class DCPythiaModel(DCModel):
    """DCPythia without its language-model head."""

    config_class = DCPythiaConfig


class DCFormerForCausalLM(DCForCausalLM):
    """DCFormer (Caiyun-AI/DCFormer-2.8B and its kind)."""

    config_class = DCFormerConfig
    body = DCFormerModel


class DCPythiaForCausalLM(DCForCausalLM):
    """DCPythia (Caiyun-AI/DCPythia-6.9B and its kind)."""

    config_class = DCPythiaConfig
    body = DCPythiaModel


DCMHA = register(Family("dcmha", ("DCAttention",), angles=rotary_of, model_types=("dcformer", "dcpythia")))

for _config, _body, _model in (
    (DCFormerConfig, DCFormerModel, DCFormerForCausalLM),
    (DCPythiaConfig, DCPythiaModel, DCPythiaForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _body, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
