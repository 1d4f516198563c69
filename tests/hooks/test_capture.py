from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import headlab as hl
from headlab.hooks.patterns import Look, at_patterns
from headlab.models.access import bare_model, rows
from tests.helpers import zoo


def run(model: Any, batch: dict[str, Tensor], what: Any, heads: Any = None, reduce: Any = None) -> Any:
    with torch.no_grad(), hl.capture(model, heads, what, reduce) as acts:
        bare_model(model)(**batch)
    return acts


@pytest.mark.parametrize("what", ["pattern", "scores"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma2", "bert", "t5", "dcformer-gqa"])
def test_patterns_and_scores_by_head(name: str, what: str) -> None:
    model, batch = zoo.build(name).double(), zoo.batch_for(name, labels=False)
    seen: dict[int, Look] = {}
    with torch.no_grad(), at_patterns(model, lambda row, look: seen.update({row.row: look}), scores=True):
        model(**batch)
    acts = run(model, batch, what)
    assert list(acts) == hl.heads(model)
    for head, [value] in acts.items():
        assert value.equal(getattr(seen[head.row], what)[:, head.index])


def test_scores_become_the_pattern() -> None:
    model, batch = zoo.build("gpt2").double(), zoo.batch_for("gpt2")
    scores, patterns = run(model, batch, "scores"), run(model, batch, "pattern")
    for head, [value] in scores.items():
        torch.testing.assert_close(value.softmax(-1), patterns[head][0])


def test_patterns_times_values_are_what_heads_carry() -> None:
    model, batch = zoo.build("llama-gqa").double(), zoo.batch_for("llama-gqa", padded=False)
    values: list[Tensor] = []
    hooks = [layer.self_attn.v_proj.register_forward_hook(lambda _, __, v: values.append(v)) for layer in model.model.layers]
    patterns = run(model, batch, "pattern")
    for hook in hooks:
        hook.remove()
    for head, [z] in run(model, batch, "z").items():
        v = values[head.row].unflatten(-1, (3, 10))[:, :, head.group]
        torch.testing.assert_close(patterns[head][0] @ v, z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-gqa", "dcformer-mha", "t5"])
def test_heads_of_pruned_models(name: str) -> None:
    model, batch = zoo.build(name).double(), zoo.batch_for(name, labels=False)
    gone = [str(head) for head in hl.heads(model) if head.row == 1 or (head.row + head.index) % 4 == 0]
    mask = hl.HeadMask.without(hl.heads(model), gone)
    pruned = hl.prune(model, mask)
    with hl.masked(model, mask):
        whole = {what: run(model, batch, what) for what in ("pattern", "scores")}
    for what, expected in whole.items():
        acts = run(pruned, batch, what)
        by_name = {str(head): value for head, value in expected.items()}
        carrying = {row.row for row in rows(pruned) if row.slots}
        left = hl.heads(pruned, "probabilities" if name == "dcformer-mha" and what == "scores" else "output")
        assert list(acts) == [head for head in left if head.row in carrying]
        for head, [value] in acts.items():
            torch.testing.assert_close(value, by_name[str(head)][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", ["z", "result", "pattern", "scores"])
def test_of_a_reduction_nothing_more_stays(what: str) -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    wanted = hl.heads(model)[3:9]
    whole = run(model, batch, what, wanted)
    memory: list[weakref.ref[Any]] = []

    def first(value: Tensor) -> Tensor:
        memory.append(weakref.ref(value.untyped_storage()))
        return value[:, 0]  # a view

    parts = run(model, batch, what, wanted, first)
    assert list(parts) == wanted
    assert len(memory) == 6
    assert not any(ref() is not None for ref in memory)
    for head in wanted:
        [part], [value] = parts[head], whole[head]
        assert part.equal(value[:, 0])
        assert part.untyped_storage().nbytes() == part.numel() * 4


@pytest.mark.parametrize("what", ["pattern", "scores"])
def test_bridges_and_several_passes(what: str) -> None:
    model = zoo.build("llama-gqa").double()
    bridge = hl.bridge(model)
    batches = [zoo.batch_for("llama-gqa", seed) for seed in (0, 1)]
    with torch.no_grad(), hl.capture(bridge, what=what) as acts:  # type: ignore[arg-type]
        for batch in batches:
            bridge.original_model(**batch)
    for number, batch in enumerate(batches):
        for head, [value] in run(model, batch, what).items():
            torch.testing.assert_close(acts[head][number], value)


def test_what_is_not_there() -> None:
    model = zoo.build("llama-gqa")
    for what in ("pattern", "scores"):
        with (
            pytest.raises(hl.HeadlabError, match="the model has no heads L0H0, L0H1"),
            hl.capture(model, hl.heads(zoo.build("gpt2"))[:2], what),  # type: ignore[arg-type]
        ):
            pass
    with pytest.raises(hl.HeadlabError, match="what is 'scores', 'pattern', 'z' or 'result', not 'probs'"):
        run(model, {}, "probs")
