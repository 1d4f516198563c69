"""Where heads look, against whole patterns."""

import copy

import numpy as np
import pytest
import torch

import headlab as hl
from headlab.errors import HeadlabError
from synthetic_tasks import Answer, Context, evaluate
from synthetic_tasks.evaluation.attention import attention_on
from synthetic_tasks.evaluation.encoding import encode
from tests.evaluation.test_scoring import CONTEXTS, MODELS, TOKENIZER, assert_same, judged, taught
from tests.helpers import zoo


@pytest.fixture(scope="module")
def models():
    return {name: taught(name) for name in MODELS}


@pytest.mark.parametrize("name", [*MODELS, "dcformer-plain", "dcpythia", "attached"])
@pytest.mark.parametrize("part", ["record", "matched", "reported", "query"])
def test_attention_against_the_whole_patterns(models, name, part):
    if name == "attached":
        from headlab.dcmha import attach

        model = attach(copy.deepcopy(models["llama-gqa"]))
    else:
        model = models[name] if name in models else zoo.build(name)
    scores = attention_on(model, CONTEXTS, TOKENIZER, part, batch_size=3)
    open_model = copy.deepcopy(model)
    if not name.startswith(("dc", "attached")):
        open_model.set_attn_implementation("eager")
    expected, n = 0, 0
    for context, encoded in zip(CONTEXTS, encode(CONTEXTS, TOKENIZER), strict=True):
        with torch.no_grad():
            patterns = open_model(torch.tensor([encoded.ids]), output_attentions=True).attentions
        pattern = torch.stack(patterns).double()[:, 0]  # [layer, head, query, key]
        for _, where in zip(context.answers, encoded.answers, strict=True):
            left, right = getattr(where, part)
            expected = expected + sum(pattern[:, :, where.span[0] - 1, i] for i in range(left, right))
            n += 1
    np.testing.assert_allclose(np.stack(scores.values), (expected / n).numpy(), atol=1e-5)
    assert scores.record["averaged"] == n
    assert scores.labels == tuple(tuple(h for h in hl.heads(model) if h.row == row) for row in range(len(scores.values)))


def test_attention_of_a_pruned_model(models):
    model = models["llama-gqa"]
    mask = hl.HeadMask.without(hl.heads(model), ["L0H1", *(f"L1H{i}" for i in range(6)), "L2H4", "L2H5"])
    small = hl.prune(model, mask)
    ours = attention_on(small, CONTEXTS, TOKENIZER)
    with hl.masked(model, mask):
        whole = attention_on(model, CONTEXTS, TOKENIZER)
    expected = [value for value, kept in zip(whole.flat, mask.flat, strict=True) if kept]
    np.testing.assert_allclose(ours.flat, expected, atol=1e-5)
    assert_same(judged(evaluate(small, CONTEXTS, TOKENIZER)), judged(evaluate(model, CONTEXTS, TOKENIZER, mask=mask)))


def test_attention_to_parts_that_few_answers_have(models):
    without = [
        Context(c.task, c.text, tuple(Answer(a.text, a.span, a.choices, a.query) for a in c.answers)) for c in CONTEXTS
    ]
    with pytest.raises(HeadlabError, match="no answer of these contexts says where its record is"):
        attention_on(models["llama-mha"], without, TOKENIZER)
    some = attention_on(models["llama-mha"], [*without, CONTEXTS[0]], TOKENIZER, batch_size=1)
    np.testing.assert_allclose(some.flat, attention_on(models["llama-mha"], CONTEXTS[:1], TOKENIZER).flat, atol=1e-6)
    with pytest.raises(HeadlabError, match=r"part is 'record'.*not 'fact'"):
        attention_on(models["llama-mha"], CONTEXTS, TOKENIZER, "fact")


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "dcformer-gqa"])
def test_a_bridge_gives_the_same(models, name):
    bridge = hl.bridge(models[name])
    for part in ("record", "matched"):
        ours, theirs = (attention_on(model, CONTEXTS, TOKENIZER, part) for model in (bridge, models[name]))
        np.testing.assert_allclose(ours.flat, theirs.flat, atol=1e-5)


def test_the_model_is_left_as_it_was(models):
    model = copy.deepcopy(models["llama-mha"]).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    assert implementation == "sdpa"
    attention_on(model, CONTEXTS, TOKENIZER)
    assert before == {name: module.training for name, module in model.named_modules()}
    assert model.config._attn_implementation == implementation
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "t5", "bert-classifier"])
def test_other_models_are_refused(name):
    model = zoo.build(name)
    with pytest.raises(HeadlabError, match=f"{type(model).__name__} is no causal language model"):
        attention_on(model, CONTEXTS, TOKENIZER)
