from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch import Tensor

import headlab as hl
from headlab.attention import similarity as module
from headlab.attention.similarity import Similarity, divergences, similarity
from headlab.data.batches import real_tokens
from headlab.data.losses import forward
from headlab.hooks.patterns import at_patterns
from headlab.models.access import heads
from headlab.models.attention_modules import Attention
from tests.helpers import zoo


def by_hand(model: torch.nn.Module, data: Sequence[dict[str, Tensor]], stack: str = "") -> np.ndarray:
    """The mean divergence over all real queries but the first of an example, one pair of heads and one query at a time."""
    total, n = np.zeros(()), 0
    for batch in data:
        looks: list[Tensor] = []

        def see(row: Attention, look: object, looks: list[Tensor] = looks) -> None:
            if row.stack == stack:
                looks.append(look.raw.double())  # type: ignore[attr-defined]

        with torch.no_grad(), at_patterns(model, see):
            forward(model, batch)
        whole = torch.cat(looks, 1).numpy()  # [batch, head, query, key]
        real = real_tokens(batch, stack)
        for example in range(len(whole)):
            for query in real[example].nonzero().flatten().tolist()[1:]:
                p = whole[example, :, query]
                total = total + np.array([[jensenshannon(a, b) ** 2 for b in p] for a in p])
                n += 1
    return total / n


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_divergences_are_scipys(n_heads: int, n_queries: int, n_keys: int, cached: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(n_heads, n_queries, n_keys, generator=generator).mul(2).softmax(-1)
    patterns[0] = 0
    patterns[0, :, 0] = 1  # zeros and ones are weights too
    before, module.CACHED = module.CACHED, cached
    try:
        found = divergences(patterns)
    finally:
        module.CACHED = before
    p = patterns.double().numpy()
    wanted = [
        [sum(jensenshannon(a, b) ** 2 for a, b in zip(p[i], p[j], strict=True)) for j in range(n_heads)]
        for i in range(n_heads)
    ]
    np.testing.assert_allclose(found, np.nan_to_num(wanted), atol=2e-6)


@pytest.mark.parametrize("name", ["llama-gqa", "bert-mlm", "dcformer-mha"])
def test_all_queries_give_the_distances_of_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = zoo.build(name), [zoo.batch_for(name, seed, labels=False) for seed in (0, 1)]
    wanted = by_hand(model, data)
    for room in (2**28, 4 * 18 * 7 * 5):  # the second one: five queries at a time
        monkeypatch.setattr(module, "ROOM", room)
        found = similarity(model, data, queries=999)
        np.testing.assert_allclose(found.distances, wanted, atol=3e-6)
        assert found.record["queries"] == {"all": 2 * (6 + 4 + 3 + 6)}


def test_a_sample_is_drawn_by_its_seed() -> None:
    model, data = zoo.build("gpt2"), [zoo.batch_for("gpt2")]
    one, same, other = (similarity(model, data, queries=5, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.distances, same.distances)
    np.testing.assert_array_equal(one.points, same.points)
    assert not np.array_equal(one.distances, other.distances)
    assert one.record["queries"] == {"all": 5}


def test_stacks_are_compared_apart() -> None:
    model, batch = zoo.build("t5"), zoo.batch_for("t5", labels=False)
    found = similarity(model, [batch], queries=99, clusters=2)
    assert list(found.heads) == heads(model)
    stacks = np.array([head.stack for head in found.heads])
    np.testing.assert_array_equal(np.isnan(found.distances), stacks[:, None] != stacks)
    for stack in ("enc", "dec", "cross"):
        own = stacks == stack
        np.testing.assert_allclose(found.distances[np.ix_(own, own)], by_hand(model, [batch], stack), atol=3e-6)
        assert len(set(np.array(found.clusters)[own])) == 2
    assert sorted(set(found.clusters)) == [0, 1, 2, 3, 4, 5]
    assert all(str(near).startswith("cross") for near, _ in found.nearest("cross.L0H0", 99))


def test_heads_with_equal_weights_are_alike_and_in_one_cluster() -> None:
    model = zoo.build("gpt2")
    weight = model.transformer.h[1].attn.c_attn.weight.data
    bias = model.transformer.h[1].attn.c_attn.bias.data
    for part in (0, 35):  # queries and keys of head 3 become those of head 1
        weight[:, part + 21 : part + 28] = weight[:, part + 7 : part + 14]
        bias[part + 21 : part + 28] = bias[part + 7 : part + 14]
    found = similarity(model, [zoo.batch_for("gpt2")], clusters=14)
    first, second, value = found.top(1)[0]
    assert (str(first), str(second), value) == ("L1H1", "L1H3", pytest.approx(0, abs=1e-6))
    assert found.nearest("L1H3", 1)[0][0] == first
    clusters = dict(zip(map(str, found.heads), found.clusters, strict=True))
    assert clusters["L1H1"] == clusters["L1H3"]
    assert len(set(found.clusters)) == 14
    points = dict(zip(map(str, found.heads), found.points, strict=True))
    np.testing.assert_allclose(points["L1H1"], points["L1H3"], atol=0.01)


def test_the_map_keeps_distances_that_fit_a_plane() -> None:
    points = np.random.default_rng(0).normal(size=(7, 2))
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    points = module._map(distances)
    np.testing.assert_allclose(np.linalg.norm(points[:, None] - points, axis=-1), distances, atol=1e-3)
    np.testing.assert_array_equal(module._map(distances[:2, :2])[1], [distances[0, 1], 0])
    assert module._map(np.zeros((4, 4))).tolist() == [[0, 0]] * 4


@pytest.mark.parametrize("name", zoo.MHA_GQA_MQA)
def test_pruned_models_have_the_distances_of_their_heads(name: str) -> None:
    model, batch = zoo.build(name), zoo.batch_for(name)
    mask = hl.HeadMask.without(heads(model), ["L2H0", "L2H5", *(f"L1H{i}" for i in range(6))])
    small = hl.prune(model, mask)
    with hl.masked(model, mask):
        whole = similarity(model, [batch], queries=99)
    kept = [place for place, head in enumerate(whole.heads) if head in mask.kept]
    np.testing.assert_allclose(
        similarity(small, [batch], queries=99).distances, whole.distances[np.ix_(kept, kept)], atol=1e-5
    )


def test_a_single_head_has_a_cluster_and_a_place() -> None:
    model = zoo.build("gpt2")
    small = hl.prune(model, hl.HeadMask.without(heads(model), heads(model)[1:]))
    found = similarity(small, [zoo.batch_for("gpt2")])
    assert (found.clusters, found.points.tolist(), found.nearest("L0H0"), found.top()) == ((0,), [[0, 0]], [], [])
    assert len(found.to_frame()) == 1


def test_a_model_without_heads_has_no_distances() -> None:
    model = zoo.build("gpt2")
    found = similarity(hl.prune(model, hl.HeadMask.without(heads(model), heads(model))), [zoo.batch_for("gpt2")])
    assert found.distances.shape == (0, 0)
    assert found.top() == []


@pytest.mark.parametrize("name", ["t5", "llama-gqa"])
def test_results_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    result = similarity(zoo.build(name), [zoo.batch_for(name)])
    loaded = Similarity.load(result.save(tmp_path / "similarity.json"))
    np.testing.assert_array_equal(loaded.distances, result.distances)
    assert loaded.to_frame().equals(result.to_frame())
    assert loaded.record == result.record
    assert repr(loaded) == repr(result)


def test_bad_input_is_refused() -> None:
    model, batch = zoo.build("gpt2"), zoo.batch_for("gpt2")
    for options in ({"queries": 0}, {"clusters": 0}):
        with pytest.raises(hl.HeadlabError, match="at least 1"):
            similarity(model, [batch], **options)
    with pytest.raises(hl.HeadlabError, match="no example has two tokens"):
        similarity(model, [{"input_ids": torch.tensor([[4], [5]])}])
    with pytest.raises(hl.HeadlabError, match="there are no batches"):
        similarity(model, [])
    with pytest.raises(hl.HeadlabError, match="no head L9H9"):
        similarity(model, [batch]).nearest("L9H9")
    model.transformer.h[1].attn.c_attn.weight.data[0, 0] = torch.nan
    with pytest.raises(hl.HeadlabError, match="holds NaN"):
        similarity(model, [batch])
