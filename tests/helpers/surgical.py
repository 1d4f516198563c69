"""What tests of pruning share: masks, and what a model says on the way through a batch and a generation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn

import headlab as hl
from headlab.models.access import head_rows
from tests.helpers import zoo

# described, but so like others that only pruning looks at them
MORE = {
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**zoo._LLAMA, num_key_value_heads=1)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(  # experts want widths that are multiples of 4
            **zoo._LLAMA | {"hidden_size": 44, "intermediate_size": 60}, num_key_value_heads=3, num_local_experts=2,
            num_experts_per_tok=1,
        )
    ),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**zoo._LLAMA, num_key_value_heads=3)),
    "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**zoo._LLAMA, num_key_value_heads=2)),
    "xlm-roberta": lambda: hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**zoo._BERT)),
}  # fmt: skip
ATOL = 1e-5
ATTENTION = {name: ["eager"] if name == "gemma2" else ["eager", "sdpa"] for name in [*zoo.ALL, *MORE]}
GENERATES = [*zoo.CAUSAL, "t5"]


def build(name: str, attention: str | None = None) -> hf.PreTrainedModel:
    zoo.ZOO.update(MORE)
    model = zoo.build(name)
    for extra in MORE:
        del zoo.ZOO[extra]
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def random_mask(model: nn.Module, seed: int) -> hl.HeadMask:
    """Any mask: uneven groups, and now and then a layer without heads or one that keeps them all."""
    rng, rows = np.random.default_rng(seed), head_rows(model)
    shares = rng.choice([0, 0.3, 0.5, 0.8, 1], size=len(rows), p=[0.15, 0.25, 0.25, 0.25, 0.1])
    return hl.HeadMask([rng.random(len(row)) < share for row, share in zip(rows, shares, strict=True)], rows)


def without_rows(model: nn.Module, *gone: int) -> hl.HeadMask:
    """The mask that takes all heads of these rows."""
    rows = head_rows(model)
    return hl.HeadMask([np.full(len(row), float(i not in gone)) for i, row in enumerate(rows)], rows)


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state of a model that has none."""
    with torch.no_grad():
        return model(**batch)[0]


def prompt(name: str) -> dict[str, Tensor]:
    """Something to go on from, padded: on the left where tokens are appended to it."""
    batch = {key: value for key, value in zoo.batch_for(name).items() if key != "labels"}
    return batch if name == "t5" else {key: value.flip(1).contiguous() for key, value in batch.items()}


def generated(model: nn.Module, start: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The tokens of a greedy generation, and the logits of every step: [step, batch, vocabulary]."""
    found = model.generate(
        **start, max_new_tokens=6, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def same_generation(small: nn.Module, tokens: Tensor, logits: Tensor, start: dict[str, Tensor], **options: Any) -> None:
    """The pruned model goes the same way, logits and tokens, until two tokens are as good as equal."""
    found, steps = generated(small, start, **options)
    new, expected = found[:, -len(steps) :], tokens[:, -len(steps) :]
    for example in range(len(new)):
        for step in range(len(steps)):
            near(steps[step, example], logits[step, example])
            if (one := new[example, step]) != (other := expected[example, step]):
                near(steps[step, example, one], steps[step, example, other], atol=2 * ATOL)
                break


def in_steps(model: nn.Module, ids: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Logits of a text that comes in several steps, some of several tokens, on one cache."""
    cache, logits = None, []
    with torch.no_grad():
        for part in ids.split(steps, dim=1):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
            assert cache.get_seq_length() == sum(len(x[0]) for x in logits)
    return torch.cat(logits, 1)


def near(one: Tensor, other: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)
