from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import headlab as hl
from headlab.models.access import rows
from headlab.models.attention_modules import Attention
from headlab.models.norms import approximate, circuits_of, final_norm, gain, norm_after, norm_before
from tests.helpers import zoo

POST_NORM = ["bert", "bert-classifier", "bert-mlm", "electra", "roberta"]


def _seen(model: nn.Module, modules: dict[str, nn.Module], name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes in and out of modules in a pass."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for key, module in modules.items():

        def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, key: str = key) -> None:
            found[key] = args[0].detach(), out.detach()

        hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(**zoo.batch_for(name, labels=False))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", [name for name in zoo.ALL if name not in POST_NORM])
def test_queries_read_what_the_norm_before_attention_gives(name: str) -> None:
    model = zoo.build(name)
    for row in rows(model):
        norm, projection = norm_before(model, row), row.projection(row.family.q)
        assert norm is not None
        seen = _seen(model, {"norm": norm, "q": projection}, name)
        torch.testing.assert_close(seen["norm"][1], seen["q"][0], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in zoo.WITH_LOSS if name not in POST_NORM])
def test_the_unembedding_reads_what_the_final_norm_gives(name: str) -> None:
    model = zoo.build(name)
    row = next(row for row in rows(model) if row.stack in ("", "dec"))
    norm = final_norm(model, row)
    assert norm is not None
    seen = _seen(model, {"norm": norm, "unembed": model.get_output_embeddings()}, name)
    scale = 37**-0.5 if name == "t5" else 1
    torch.testing.assert_close(seen["norm"][1] * scale, seen["unembed"][0])


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma2", "t5", "dcpythia"])
def test_a_norm_is_its_gain_times_the_vector_over_its_length(name: str) -> None:
    model = zoo.build(name)
    row = rows(model)[0]
    norm = norm_before(model, row)
    assert norm is not None
    x, found = torch.randn(13, norm.weight.numel()) + 0.5, gain(norm)
    centred = x - x.mean(-1, keepdim=True) if name in ("gpt2", "dcpythia") else x
    assert found.centres == (name in ("gpt2", "dcpythia"))
    bias = getattr(norm, "bias", None)
    expected = norm(x) - (0 if bias is None else bias)
    length = centred.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(x @ found.before(torch.eye(x.shape[1])) / length, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.after(x) / length, expected, rtol=1e-4, atol=1e-4)


def test_only_gemma_has_a_norm_between_attention_and_the_stream() -> None:
    for name in zoo.ALL:
        model = zoo.build(name)
        norms = [norm_after(model, row) for row in rows(model)]
        assert all((norm is not None) == (name in ("gemma2", "gemma3")) for norm in norms), name
    model = zoo.build("gemma2")
    row = rows(model)[1]
    norm = norm_after(model, row)
    assert norm is not None
    seen = _seen(model, {"norm": norm, "o": row.projection("o_proj")}, "gemma2")
    torch.testing.assert_close(seen["norm"][0], seen["o"][1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", []),
        ("llama-gqa", []),
        ("neox", []),
        ("dcformer-plain", []),
        ("qwen3", ["queries and keys are normed"]),
        ("gemma2", ["soft-capped at 50", "between attention and the stream"]),
        ("gemma3", ["queries and keys are normed", "between attention and the stream"]),
        ("dcformer-gqa", ["queries and keys are normed", "composed"]),
        ("dcpythia", ["queries and keys are normed", "composed"]),
        ("bert", ["post-norm"]),
        ("t5", ["relative position bias"]),
    ],
)
def test_it_says_why_a_circuit_is_approximate(name: str, words: list[str]) -> None:
    model = zoo.build(name)
    for row in rows(model):
        why = approximate(model, row)
        if row.stack == "cross":
            assert why == []
        else:
            assert len(why) == len(words)
            assert all(word in reason for word, reason in zip(words, why, strict=True))


def test_an_unknown_norm_before_attention_is_named_and_nothing_is_folded() -> None:
    model = zoo.build("llama-gqa")
    layer = model.model.layers[1]
    layer.some_norm = layer.input_layernorm
    del layer.input_layernorm
    row = rows(model)[1]
    assert approximate(model, row) == ["no norm before attention is known"]
    torch.testing.assert_close(circuits_of(model, row, "fold").q, circuits_of(model, row, "raw").q)


def test_wrong_norms_and_folded_bridges_are_refused() -> None:
    model = zoo.build("gpt2")
    with pytest.raises(hl.HeadlabError, match="norm is 'raw' or 'fold', not 'folded'"):
        circuits_of(model, rows(model)[0], "folded")  # type: ignore[arg-type]
    bridge = hl.bridge(model)
    bridge.enable_compatibility_mode()
    with pytest.raises(hl.HeadlabError, match="compatibility mode"):
        circuits_of(bridge, rows(bridge)[0], "raw")


def test_half_precision_is_widened() -> None:
    model = zoo.build("llama-gqa").to(torch.bfloat16)
    row: Attention = rows(model)[0]
    found = circuits_of(model, row, "fold")
    assert {part.dtype for part in (found.q, found.k, found.v, found.o)} == {torch.float32}
    norm = norm_before(model, row)
    assert norm is not None
    expected = model.model.layers[0].self_attn.q_proj.weight.float()[:10].T * norm.weight.float()[:, None]
    torch.testing.assert_close(found.q[0], expected)
