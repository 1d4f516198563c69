"""`projections` against what the modules themselves compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headlab as hl
from headlab.models.access import rows
from headlab.models.attention_modules import Attention
from headlab.models.projections import Projections, projections
from tests.helpers import zoo

N = 11  # random inputs


def own(row: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the module's forward makes them, [block, n, d_head], by a way of its own."""
    module: Any = row.module
    if row.family.name == "gpt2":
        joined = module.c_attn(x).chunk(3, dim=-1)
    elif row.family.name == "gpt_neox":
        joined = module.query_key_value(x).view(len(x), -1, 3 * row.d_head).chunk(3, dim=-1)
    elif row.family.name == "bert":
        joined = module.self.query(x), module.self.key(x), module.self.value(x)
    elif row.family.name == "t5":
        joined = module.q(x), module.k(x), module.v(x)
    else:
        joined = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    q, k, v = (part.reshape(len(x), -1, row.d_head).transpose(0, 1) for part in joined)
    return q, k, v


def output(row: Attention, z: Tensor) -> Tensor:
    """What the module makes of its heads' outputs, [n, slots * d_head]."""
    module: Any = row.module
    if row.family.name == "gpt2":
        return module.c_proj(z)
    if row.family.name == "gpt_neox":
        return module.dense(z)
    if row.family.name == "bert":
        return module.output.dense(z)
    return module.o(z) if row.family.name == "t5" else module.o_proj(z)


def check(row: Attention, found: Projections) -> None:
    width = found.o.shape[-1]
    x = torch.randn(N, width, dtype=torch.float64)
    with torch.no_grad():
        for part, expected in zip("qkv", own(row, x), strict=True):
            weight, bias = getattr(found, part), found.biases.get(part)  # type: ignore[call-overload]
            assert weight.shape == (len(expected), width, row.d_head)
            for block, value in enumerate(expected):
                mine = x @ weight[block] + (0 if bias is None else bias[block])
                torch.testing.assert_close(mine, value, rtol=0, atol=1e-12)
        z = torch.randn(N, len(found.o), row.d_head, dtype=torch.float64)
        mine = sum((z[:, slot] @ found.o[slot] for slot in range(len(found.o))), torch.zeros(N, width, dtype=torch.float64))
        mine = mine + found.biases.get("o", torch.zeros(width, dtype=torch.float64))
        torch.testing.assert_close(mine, output(row, z.flatten(1)), rtol=0, atol=1e-12)


def built(name: str) -> nn.Module:
    return zoo.build(name).double()


@pytest.mark.parametrize("name", zoo.ALL)
def test_projections_are_what_the_modules_compute(name: str) -> None:
    model = built(name)
    for row in rows(model):
        found = projections(row)
        check(row, found)
        n, kv = len(row.slots), len(found.k)
        assert found.searching == {head: (head, head * kv // n) for head in range(n)}
        assert found.carrying == {head: (head * kv // n, head) for head in range(n)}
        parts = [found.q, found.k, found.v, found.o, *found.biases.values()]
        assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("name", zoo.BRIDGED)
def test_a_bridge_has_the_same_projections(name: str) -> None:
    model = zoo.build(name)
    plain = [projections(row) for row in rows(model)]
    for one, other in zip(plain, map(projections, rows(hl.bridge(model))), strict=True):
        assert (one.searching, one.carrying) == (other.searching, other.carrying)
        for part in "qkvo":
            assert torch.equal(getattr(one, part), getattr(other, part))
        assert one.biases.keys() == other.biases.keys()
        assert all(torch.equal(bias, other.biases[part]) for part, bias in one.biases.items())


@pytest.mark.parametrize("gqa", ["pad", "ungroup"])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama-mha", "llama-gqa", "llama-mqa", "llama-bias", "bert-mlm", "t5"])
def test_a_pruned_head_keeps_its_own_factors(name: str, gqa: Any) -> None:
    model = built(name)
    small = hl.prune(model, hl.importance(model, method="random", seed=3).keep(0.4), gqa=gqa)
    for before, row in zip(rows(model), rows(small), strict=True):
        whole, found = projections(before), projections(row)
        kept = {head.index for head in row.heads}
        assert found.searching.keys() == found.carrying.keys() == kept
        same_heads(whole, found)
        if kept:
            check(row, found)


def same_heads(whole: Projections, found: Projections) -> None:
    """The heads that are left have the factors and biases that they had."""
    for parts, name in ((("q", "k"), "searching"), (("v", "o"), "carrying")):
        for head, places in getattr(found, name).items():
            for part, place, old in zip(parts, places, getattr(whole, name)[head], strict=True):
                assert torch.equal(getattr(found, part)[place], getattr(whole, part)[old])
                if part != "o" and part in whole.biases:
                    assert torch.equal(found.biases[part][place], whole.biases[part][old])  # type: ignore[index]


@pytest.mark.parametrize("site", ["output", "scores", "head"])
@pytest.mark.parametrize("name", ["dcformer-mha", "dcformer-gqa", "dcformer-mqa", "dcpythia"])
def test_pruned_composed_heads_have_what_is_left_of_them(name: str, site: str) -> None:
    model = built(name)
    mask = hl.importance(model, method="random", seed=5, site=site).keep(0.5)
    kept: dict[int, set[int]] = {row.row: set() for row in rows(model)}
    for head in mask.kept:
        kept[head.row].add(head.index)
    small = hl.prune(model, mask, site=site)
    for before, row in zip(rows(model), rows(small), strict=True):
        whole, found = projections(before), projections(row)
        assert found.searching.keys() == (kept[row.row] if site != "output" else whole.searching.keys())
        assert found.carrying.keys() == (kept[row.row] if site != "scores" else whole.carrying.keys())
        same_heads(whole, found)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama-gqa", "bert-mlm", "t5"])
def test_a_layer_without_heads_has_no_blocks(name: str) -> None:
    model = built(name)
    first = {head for head in hl.heads(model) if head.row == 0}
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), first))
    row = rows(small)[0]
    found = projections(row)
    width = projections(rows(model)[0]).o.shape[-1]
    assert found.searching == found.carrying == {}
    for part in (found.q, found.k, found.v):
        assert part.shape == (0, width, row.d_head)
    assert found.o.shape == (0, row.d_head, width)
    assert found.biases.keys() <= {"o"}
    check(rows(small)[1], projections(rows(small)[1]))


@pytest.mark.parametrize("name", ["gpt2", "llama-mha", "llama-gqa", "llama-mqa", "llama-bias", "bert-mlm"])
def test_one_token_alone_gets_all_of_its_values(name: str) -> None:
    """With one key the weights are 1, so the module's whole output is the sum of its heads' OV circuits, and biases."""
    model = built(name)
    for row in rows(model):
        x = torch.randn(1, 1, projections(row).o.shape[-1], dtype=torch.float64)
        if row.family.name == "bert":
            with torch.no_grad():
                z = row.core(x)[0]
                expected = row.projection(row.family.o)(z)[0]
        else:
            seen: list[Tensor] = []
            hook = row.module.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0]))
            inputs: list[Tensor] = []
            before = row.module.register_forward_pre_hook(
                lambda _, args, kwargs, inputs=inputs: inputs.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            with torch.no_grad():
                model(torch.tensor([[7]]))
            hook.remove()
            before.remove()
            x, expected = inputs[0], seen[0][0]
        found = projections(row)
        mine = found.biases.get("o", torch.zeros(x.shape[-1], dtype=torch.float64)).expand_as(expected).clone()
        for value, slot in found.carrying.values():
            carried = x[0] @ found.v[value]
            if "v" in found.biases:
                carried = carried + found.biases["v"][value]
            mine += carried @ found.o[slot]
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
