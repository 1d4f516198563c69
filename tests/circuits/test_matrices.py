from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import headlab as hl
from headlab import dcmha
from headlab.circuits.matrices import composed_circuit, ov, qk
from headlab.dcmha.maps import composition_maps
from headlab.models.access import rows
from headlab.models.attention_modules import Attention
from headlab.models.norms import final_norm, gain, norm_after, norm_before
from headlab.models.positions import is_rotary
from headlab.models.projections import projections
from tests.helpers import surgical, zoo

_SCALED = {"original_max_position_embeddings": 13, "rope_theta": 100.0, "factor": 4.0}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_PLAIN_DC = {"compose": None, "use_qk_norm": True}


def _llama(**rope: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**zoo._LLAMA, num_key_value_heads=3, rope_parameters=_SCALED | rope))


MORE = {
    "llama-yarn": lambda: _llama(rope_type="yarn"),
    "llama-llama3": lambda: _llama(**_LLAMA3),
    "dcformer-qk-norm": lambda: dcmha.DCFormerForCausalLM(dcmha.DCFormerConfig(**zoo._DC, **_PLAIN_DC)),
    "dcpythia-plain": lambda: dcmha.DCPythiaForCausalLM(dcmha.DCPythiaConfig(**zoo._DC, **_PLAIN_DC, rotary_pct=0.5)),
    "smollm3": surgical.MORE["smollm3"],
    "gemma": surgical.MORE["gemma"],
}
CHECKED = [
    "gpt2", "neox", "llama-mha", "llama-gqa", "llama-mqa", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "mistral",
    "dcformer-plain", "bert", *MORE,
]  # fmt: skip


def _unbiased(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model without biases, which no circuit holds, that shows its patterns."""
    for more, make in MORE.items():
        monkeypatch.setitem(zoo.ZOO, more, make)
    model = zoo.build(name)
    for part, parameter in model.named_parameters():
        if part.endswith("bias"):
            parameter.data.zero_()
    if name.startswith("dc"):
        model.config.backend = "eager"
    else:
        model.set_attn_implementation("eager")
    return model


def _unit(x: Tensor, norm: nn.Module | None) -> Tensor:
    """What a norm makes of x, without its gain."""
    if norm is None:
        return x
    x = x.double() - x.double().mean(-1, keepdim=True) * gain(norm).centres
    return x / _size(x, norm)[..., None]


def _size(x: Tensor, norm: nn.Module) -> Tensor:
    """The length that a norm divides by."""
    return (x.square().mean(-1) + getattr(norm, "variance_epsilon", getattr(norm, "eps", None))).sqrt()


def _pass(model: nn.Module, name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of every attention module: what its norm (or itself) is given, its patterns, and what its projection gives."""
    given: list[Tensor] = []
    gave: list[Tensor] = []
    hooks = []
    for row in rows(model):
        reads = norm_before(model, row) or row.module
        hooks.append(reads.register_forward_pre_hook(lambda _, args: given.append(args[0].detach())))
        output = row.projection(row.family.o)
        hooks.append(output.register_forward_hook(lambda _, args, out: gave.append(out.detach().double())))
    with torch.no_grad():
        patterns = model(**zoo.batch_for(name, padded=False, labels=False), output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    return given, [pattern.double() for pattern in patterns], gave


def _length(row: Attention, x: Tensor, part: str, head: int) -> Tensor | float:
    """The length that the norm of queries (or keys) divides by."""
    norm = getattr(row.core, f"{part}_norm", None)
    if norm is None:
        return 1.0
    block = projections(row).searching[head][part == "k"]
    before = norm_before(_length.model, row)  # type: ignore[attr-defined]
    made = x @ gain(before).before(getattr(projections(row), part)[block].double())
    return _size(made, norm)


@pytest.mark.parametrize("name", CHECKED)
def test_circuits_give_the_patterns_and_outputs_of_a_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _unbiased(name, monkeypatch)
    monkeypatch.setattr(_length, "model", model, raising=False)
    given, patterns, gave = _pass(model, name)
    far = torch.arange(zoo.POS)[:, None] - torch.arange(zoo.POS)
    for row, x, pattern, out in zip(rows(model), given, patterns, gave, strict=True):
        unit = _unit(x, norm_before(model, row)).double()  # [batch, pos, d_model]
        written = torch.zeros_like(unit)
        for i, head in enumerate(row.heads):
            q, k = (_length(row, unit, part, head.index) for part in "qk")
            scores = torch.zeros_like(pattern[:, i])
            for distance in range(zoo.POS) if is_rotary(model, row) else [None]:
                circuit = qk(model, row.layer, head.index, norm="fold", distance=distance)
                found = unit @ circuit.AB.double() @ unit.mT
                there = far == distance if distance is not None else far == far
                scores = torch.where(there, found, scores)
            scores = (
                scores / (q[..., None] if isinstance(q, Tensor) else q) / (k[..., None, :] if isinstance(k, Tensor) else k)
            )
            scores = scores * getattr(row.core, "scaling", row.d_head**-0.5)
            if name == "gemma2":
                scores = 50 * torch.tanh(scores / 50)
            visible = pattern[:, i] > 0
            expected = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            torch.testing.assert_close(pattern[:, i], expected, rtol=2e-3, atol=2e-5)
            written += pattern[:, i] @ unit @ ov(model, row.layer, head.index, norm="fold").AB.double()
        if (norm := norm_after(model, row)) is not None:
            out = _unit(out, norm) * gain(norm).weight.double()
            written = written / _size(gave[row.row], norm)[..., None]
        torch.testing.assert_close(written, out, rtol=2e-4, atol=2e-4)


def test_cross_attention_reads_keys_and_values_through_the_last_norm_of_the_encoder() -> None:
    model = zoo.build("t5")
    model.set_attn_implementation("eager")
    row = next(row for row in rows(model) if row.stack == "cross")
    last = final_norm(model, rows(model)[0])
    before = norm_before(model, row)
    assert last is not None
    assert before is not None
    given: dict[nn.Module, Tensor] = {}
    for module in (last, before):
        module.register_forward_pre_hook(lambda module, args: given.update({module: args[0].detach()}))
    with torch.no_grad():
        patterns = model(**zoo.batch_for("t5", padded=False), output_attentions=True).cross_attentions
    query, key = _unit(given[before], before), _unit(given[last], last)
    for head in range(5):
        scores = query @ qk(model, 0, head, norm="fold", stack="cross").AB.double() @ key.mT
        torch.testing.assert_close(patterns[0][:, head].double(), scores.softmax(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen3", "bert-mlm", *zoo.MHA_GQA_MQA])
def test_raw_circuits_are_those_of_transformerlens(name: str) -> None:
    model = zoo.build(name)
    bridge = hl.bridge(model)
    theirs = bridge.QK.AB.detach(), bridge.OV.AB.detach()
    for given in (model, bridge):
        for head in hl.heads(model):
            found = qk(given, head.layer, head.index), ov(given, head.layer, head.index)
            for ours, all_of_theirs in zip(found, theirs, strict=True):
                assert ours.mdim == head.d_head
                torch.testing.assert_close(ours.AB, all_of_theirs[head.layer, head.index])


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-mqa"])
def test_folding_is_that_of_the_compatibility_mode(name: str) -> None:
    model = zoo.build(name)
    folded = hl.bridge(model)
    folded.enable_compatibility_mode()
    layer, head = 1, 4
    circuit = qk(model, layer, head, norm="fold").AB
    torch.testing.assert_close(circuit, folded.QK.AB[layer, head].detach(), rtol=1e-4, atol=1e-5)
    ours, theirs = ov(model, layer, head, norm="fold").AB, folded.OV.AB[layer, head].detach()
    if name == "gpt2":  # TransformerLens also takes the mean from what is written, which every later norm would
        ours = ours - ours.mean(-1, keepdim=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama-gqa", "dcformer-mha", "dcformer-gqa"])
def test_pruned_heads_keep_their_circuits_and_their_numbers(name: str) -> None:
    model = zoo.build(name)
    mask = hl.HeadMask.without(hl.heads(model), ["L0H0", "L0H3", "L1H1", "L2H0", "L2H1", "L2H2", "L2H4"])
    small = hl.prune(model, mask)
    assert len(hl.heads(small)) == len(hl.heads(model)) - 7
    for head in hl.heads(small):
        distance = 2 if is_rotary(model, rows(model)[0]) else None
        torch.testing.assert_close(
            ov(small, head.layer, head.index, norm="fold").AB, ov(model, head.layer, head.index, norm="fold").AB
        )
        found, whole = (qk(m, head.layer, head.index, norm="fold", distance=distance).AB for m in (small, model))
        torch.testing.assert_close(found, whole)
    with pytest.raises(hl.HeadlabError, match="layer 1 has no head 1 with an output: its heads are 0, 2, 3, 4"):
        ov(small, 1, 1)


def test_composed_heads_may_have_scores_left_without_an_output() -> None:
    model = zoo.build("dcformer-mha")
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L1H2"]))
    torch.testing.assert_close(qk(small, 1, 2).AB, qk(model, 1, 2).AB)  # its scores still enter other heads
    with pytest.raises(hl.HeadlabError, match="no head 2 with an output"):
        ov(small, 1, 2)
    smaller = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L1H2"]), site="scores")
    with pytest.raises(hl.HeadlabError, match="no head 2 with scores: its heads are 0, 1, 3, 4, 5"):
        qk(smaller, 1, 2)


def test_what_is_not_there_is_named() -> None:
    model = zoo.build("llama-gqa")
    for call in (qk, ov):
        with pytest.raises(hl.HeadlabError, match=r"layer 2 has no head 6 with .*: its heads are 0, 1, 2, 3, 4, 5"):
            call(model, 2, 6)
        with pytest.raises(hl.HeadlabError, match="no head -1"):
            call(model, 2, -1)
        with pytest.raises(hl.HeadlabError, match="there is no layer 3: the layers are 0 to 2"):
            call(model, 3, 0)
        with pytest.raises(hl.HeadlabError, match="the model has no stack 'enc': leave stack out"):
            call(model, 0, 0, stack="enc")
        with pytest.raises(hl.HeadlabError, match="several stacks: say stack='enc' or 'dec' or 'cross'"):
            call(zoo.build("t5"), 0, 0)
    with pytest.raises(hl.HeadlabError, match="there is no layer 2 of stack 'dec'"):
        qk(zoo.build("t5"), 2, 0, stack="dec")
    gone = hl.prune(model, surgical.without_rows(model, 1))
    with pytest.raises(hl.HeadlabError, match="layer 1 has no head 0 with scores: nothing is left of its heads"):
        qk(gone, 1, 0, norm="fold")


def test_distances_are_whole_numbers_and_for_rotary_models() -> None:
    model = zoo.build("llama-mha")
    for odd in (-1, 1.5, True):
        with pytest.raises(hl.HeadlabError, match="a distance is a whole number of tokens"):
            qk(model, 0, 0, distance=odd)  # type: ignore[arg-type]
    for name, stack in (("gpt2", ""), ("bert", ""), ("t5", "enc"), ("t5", "cross")):
        with pytest.raises(hl.HeadlabError, match="has no rotary positions"):
            qk(zoo.build(name), 0, 0, distance=1, stack=stack)


def test_content_is_the_circuit_without_positions() -> None:
    model = zoo.build("llama-gqa")
    raw, content, apart = (qk(model, 1, 2, distance=distance).AB for distance in (None, 0, 5))
    torch.testing.assert_close(raw, content)
    assert not torch.allclose(content, apart, atol=1e-2)
    assert np.isclose(apart.norm(), content.norm(), rtol=0.7)


def test_an_effective_head_joins_two_circuits_by_their_mean_weight() -> None:
    model = zoo.build("dcformer-gqa")
    maps = composition_maps(model, zoo.batch_for("dcformer-gqa"))
    found = composed_circuit(model, maps, 2, 1, 4, norm="fold", distance=3)
    torch.testing.assert_close(found.qk.AB, qk(model, 2, 1, norm="fold", distance=3).AB)
    torch.testing.assert_close(found.ov.AB, ov(model, 2, 4, norm="fold").AB)
    assert found.weight == pytest.approx(float(maps.mean_effective(2)[1, 4]))
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L2H0"]))
    few = composition_maps(small, zoo.batch_for("dcformer-gqa"))
    weight = composed_circuit(small, few, 2, 1, 4).weight
    assert few.heads(2, "post")[1].index(4) == 3
    assert weight == pytest.approx(float(few.mean_effective(2)[few.heads(2, "pre")[0].index(1), 3]))
    with pytest.raises(hl.HeadlabError, match="the maps were read from another model"):
        composed_circuit(model, few, 2, 1, 4)
    with pytest.raises(hl.HeadlabError, match="no head 0 with an output"):
        composed_circuit(small, few, 2, 1, 0)
