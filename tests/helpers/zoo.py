"""Tiny random models of every architecture, with a different prime size on every axis.

Weights are large enough that every head matters: the 0.02 of a fresh model leaves attention almost uniform.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf

from headlab import dcmha

VOCAB, LAYERS, BATCH, POS = 101, 3, 4, 7
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# 6 query heads on 3, 2 or 1 key-value heads of 10: not the hidden size over the heads (transformers wants a multiple of 6)
_LLAMA = _COMMON | {
    "hidden_size": 42, "intermediate_size": 59, "num_hidden_layers": LAYERS, "num_attention_heads": 6, "head_dim": 10,
    "max_position_embeddings": 61,
}  # fmt: skip
_BERT = {
    "vocab_size": VOCAB, "hidden_size": 35, "num_hidden_layers": LAYERS, "num_attention_heads": 5, "intermediate_size": 59,
    "max_position_embeddings": 61, "pad_token_id": 0,
}  # fmt: skip
_MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_T5 = {
    "vocab_size": VOCAB, "d_model": 37, "d_kv": 7, "d_ff": 59, "num_layers": LAYERS, "num_decoder_layers": 2, "num_heads": 5,
    "decoder_start_token_id": 0, "dropout_rate": 0.1,
}  # fmt: skip

_DC = _COMMON | {
    "hidden_size": 42, "intermediate_size": 59, "num_hidden_layers": LAYERS, "num_attention_heads": 6, "head_dim": 10,
    "max_position_embeddings": 61, "window_size": 5,
}  # fmt: skip

ZOO: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**_COMMON, n_embd=35, n_layer=LAYERS, n_head=5, n_positions=61, n_inner=59)
    ),
    "neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            **_COMMON, hidden_size=40, num_hidden_layers=LAYERS, num_attention_heads=5, intermediate_size=59,
            max_position_embeddings=61,
        )
    ),
    "llama-mha": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, num_key_value_heads=6)),
    "llama-gqa": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, num_key_value_heads=3)),
    "llama-mqa": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, num_key_value_heads=1)),
    "llama-bias": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, num_key_value_heads=2, attention_bias=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA, num_key_value_heads=3, sliding_window=5)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA, num_key_value_heads=3)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**_LLAMA, num_key_value_heads=3, use_sliding_window=True, max_window_layers=0, **_MIXED)
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LLAMA, num_key_value_heads=3, **_MIXED)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_LLAMA, num_key_value_heads=1, **_MIXED)),
    "granite": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(**_LLAMA, num_key_value_heads=3, attention_multiplier=10**-0.5)  # by default 1: too steep
    ),
    "dcformer-mha": lambda: dcmha.DCFormerForCausalLM(
        dcmha.DCFormerConfig(**_DC, compose={"branches": dcmha.BRANCHES, "groups": 2, "rank": 1})
    ),
    "dcformer-gqa": lambda: dcmha.DCFormerForCausalLM(dcmha.DCFormerConfig(**_DC, num_key_value_heads=3, use_qk_norm=True)),
    "dcformer-mqa": lambda: dcmha.DCFormerForCausalLM(
        dcmha.DCFormerConfig(**_DC, num_key_value_heads=1, compose={"branches": ["query", "key_gate"], "residual": False})
    ),
    "dcpythia": lambda: dcmha.DCPythiaForCausalLM(dcmha.DCPythiaConfig(**_DC, rotary_pct=0.5, use_qk_norm=True)),
    "dcformer-plain": lambda: dcmha.DCFormerForCausalLM(dcmha.DCFormerConfig(**_DC, compose=None)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_BERT)),
    "bert-mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
    "bert-classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT, num_labels=3)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_BERT)),
    "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**_BERT, embedding_size=17)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "t5-encoder": lambda: hf.T5EncoderModel(hf.T5Config(**_T5)),
}  # fmt: skip
ALL = sorted(ZOO)
MHA_GQA_MQA = ["llama-mha", "llama-gqa", "llama-mqa"]
COMPOSED = [name for name in ALL if name.startswith("dc")]
WITH_LOSS = [name for name in ALL if name not in ("bert", "t5-encoder")]
CAUSAL = [name for name in WITH_LOSS if not name.startswith(("bert", "roberta", "electra", "t5"))]
BRIDGED = ["gpt2", "neox", "llama-mha", "llama-gqa", "llama-mqa", "mistral", "qwen3", "gemma3", "bert-mlm", "t5"]


def build(name: str, seed: int = 0) -> hf.PreTrainedModel:
    """The model, the same one for the same seed; every bias and gain differs from its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ZOO[name]()
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 0.15 * noise if parameter.ndim > 1 else parameter.data + 0.1 * noise
    model.tie_weights()
    return model.eval()


def batch_for(name: str, seed: int = 0, padded: bool = True, labels: bool = True) -> dict[str, torch.Tensor]:
    """A batch of 4 examples of 7 tokens; two have padding on the right; labels where the model's own loss needs them."""
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(3, VOCAB, (BATCH, POS), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = 0
        mask[2, 4:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "bert-classifier" and labels:
        batch["labels"] = torch.tensor([0, 2, 1, 2])
    elif name in ("bert-mlm", "roberta", "electra") and labels:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    elif name == "t5":
        answer = torch.randint(3, VOCAB, (BATCH, 5), generator=generator)
        answer[3, 3:] = -100
        if labels:
            batch["labels"] = answer
        else:
            batch["decoder_input_ids"] = answer.clamp(min=0)
    return batch
