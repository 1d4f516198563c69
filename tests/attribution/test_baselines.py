"""Scores that need no data: random numbers, and the size of a head's weights."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor, nn

import headlab as hl
from tests.helpers import zoo


def test_random_follows_its_seed() -> None:
    model = zoo.build("llama-gqa")
    one, again, other = (hl.importance(model, method="random", seed=seed) for seed in (3, 3, 4))
    assert one.flat.tolist() == again.flat.tolist() != other.flat.tolist()
    assert len(set(one.flat)) == len(hl.heads(model))


def weights_of(name: str, model: nn.Module) -> list[list[list[Tensor]]]:
    """The weights of every head, sliced by hand: [row][head] -> tensors."""
    w = {key: value.detach() for key, value in model.named_parameters()}
    found = []
    for layer in range(zoo.LAYERS):
        if name == "gpt2":
            joined, out = w[f"transformer.h.{layer}.attn.c_attn.weight"], w[f"transformer.h.{layer}.attn.c_proj.weight"]
            cut = [[joined[:, 35 * p + 7 * h : 35 * p + 7 * h + 7] for p in range(3)] for h in range(5)]
            found.append([[*qkv, out[7 * h : 7 * h + 7]] for h, qkv in enumerate(cut)])
        elif name == "neox":
            stem = f"gpt_neox.layers.{layer}.attention"
            joined, out = w[f"{stem}.query_key_value.weight"], w[f"{stem}.dense.weight"]
            found.append([[joined[24 * h : 24 * h + 24], out[:, 8 * h : 8 * h + 8]] for h in range(5)])
        elif name == "llama-gqa":
            q, k, v, o = (w[f"model.layers.{layer}.self_attn.{p}_proj.weight"] for p in "qkvo")
            own, kv = [slice(10 * h, 10 * h + 10) for h in range(6)], [slice(10 * g, 10 * g + 10) for g in range(3)]
            found.append([[q[own[h]], k[kv[h // 2]], v[kv[h // 2]], o[:, own[h]]] for h in range(6)])
        elif name == "bert":
            stem = f"encoder.layer.{layer}.attention"
            qkv = [w[f"{stem}.self.{p}.weight"] for p in ("query", "key", "value")]
            own = [slice(7 * h, 7 * h + 7) for h in range(5)]
            found.append([[*(p[s] for p in qkv), w[f"{stem}.output.dense.weight"][:, s]] for s in own])
    if name == "t5":
        stems = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(3)]
        stems += [f"decoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
        stems += [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)]
        own = [slice(7 * h, 7 * h + 7) for h in range(5)]
        found = [[[*(w[f"{s}.{p}.weight"][h] for p in "qkv"), w[f"{s}.o.weight"][:, h]] for h in own] for s in stems]
    return found


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama-gqa", "bert", "t5"])
def test_magnitude_is_the_norm_of_a_heads_weights(name: str) -> None:
    model = zoo.build(name)
    expected = [
        [np.sqrt(sum((t.double() ** 2).sum().item() for t in head)) for head in row] for row in weights_of(name, model)
    ]
    scores = hl.importance(model, method="magnitude")
    np.testing.assert_allclose(np.concatenate(expected), scores.flat, rtol=1e-10)
