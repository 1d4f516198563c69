from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import headlab as hl
from headlab.dcmha import (
    BRANCHES,
    PLACES,
    STAGES,
    Compose,
    DCFormerConfig,
    DCFormerForCausalLM,
    DCPythiaConfig,
    DCPythiaForCausalLM,
    attach,
    scaled,
)
from headlab.dcmha.compose import Side
from headlab.dcmha.factors import PARTS, LayerMaps, StageMaps
from headlab.dcmha.maps import CompositionMaps, Link, composition_maps
from headlab.errors import HeadlabError
from headlab.models.access import rows
from tests.helpers import zoo
from tests.helpers.words import WORDS, tokenizer

LAYERS, HEADS, D_HEAD, BATCH, POS = 2, 6, 4, 3, 7
LEFT, RIGHT = [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]
MASK = torch.tensor([[1] * POS, LEFT, RIGHT])


def build(kind: str = "dcformer", heads: int = HEADS, window: int | None = None, **compose: Any) -> nn.Module:
    config, cls = (DCFormerConfig, DCFormerForCausalLM) if kind == "dcformer" else (DCPythiaConfig, DCPythiaForCausalLM)
    model = cls(
        config(
            vocab_size=zoo.VOCAB, hidden_size=31, intermediate_size=37, num_hidden_layers=LAYERS, head_dim=D_HEAD,
            num_attention_heads=heads, max_position_embeddings=41, window_size=window, compose=compose, pad_token_id=0,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, zoo.VOCAB, (BATCH, POS))
    return {"input_ids": ids.masked_fill(MASK == 0, 0), "attention_mask": MASK}


def narrow(attn: Any, kept: dict[str, list[int]], places: Sequence[str]) -> None:
    """Prune an attention layer to some heads of each kind, its projections too."""
    for name, what in (("q_proj", "scores"), ("k_proj", "scores"), ("v_proj", "output")):
        projection = getattr(attn, name)
        projection.weight.data = projection.weight.data.unflatten(0, (-1, D_HEAD))[kept[what]].flatten(0, 1)
    attn.o_proj.weight.data = attn.o_proj.weight.data.unflatten(1, (-1, D_HEAD))[:, kept["output"]].flatten(1)
    attn.compose.narrow(kept, places)


class Dumb:
    """Every C(i, j) of a model, part by part, entry by entry, in float64."""

    def __init__(self, model: Any, data: dict[str, torch.Tensor]) -> None:
        self.layers = [layer.self_attn for layer in model.model.layers]
        self.windows = model.config.windows
        self.real = data.get("attention_mask", torch.ones_like(data["input_ids"])).bool().tolist()
        outputs: list[Any] = []
        hooks = [a.compose.register_forward_hook(lambda _, __, out: outputs.append(out)) for a in self.layers]
        with torch.no_grad():
            model(**data)
        for hook in hooks:
            hook.remove()
        self.numbers: list[dict[str, np.ndarray]] = []  # by layer: pre_base, pre_query.w1, pre_query.gate ...
        for attn, output in zip(self.layers, outputs, strict=True):
            found = {f"{name}.{x}": number(getattr(s, x)) for name, s in output.items() for x in ("w1", "w2", "gate")}
            for stage in STAGES:
                if f"{stage}_base" in attn.compose.places:
                    found[f"{stage}_base"] = number(attn.compose.base_map(stage))
            self.numbers.append(found)

    def part(self, layer: int, stage: str, part: str, query: int, key: int, example: int = 0) -> np.ndarray:
        compose, numbers = self.layers[layer].compose, self.numbers[layer]
        sources, targets = compose.ends(stage)
        here = part == "identity" or f"{stage}_{part}" in compose.places
        scale = compose.scale.get(f"{stage}_{part}", 1.0)
        side = f"{stage}_{part.split('_')[0]}"
        at = (example, query if part.startswith("query") else key)
        found = np.zeros((len(sources), len(targets)))
        for (m, source), (n, target) in product(enumerate(sources), enumerate(targets)):
            if not here:
                continue
            if part == "identity":
                found[m, n] = compose.residual and source == target
            elif part == "base":
                found[m, n] = scale * numbers[f"{stage}_base"][m, n]
            elif part.endswith("_gate"):
                found[m, n] = scale * numbers[f"{side}.gate"][at][n] if source == target else 0
            elif source // compose.per_group == target // compose.per_group:
                w1, w2 = numbers[f"{side}.w1"][at], numbers[f"{side}.w2"][at]
                found[m, n] = scale * sum(w1[r, m] * w2[r, n] for r in range(compose.rank))
        return found

    def map(self, layer: int, stage: str, *pair: int) -> np.ndarray:
        return sum(self.part(layer, stage, part, *pair) for part in PARTS)

    def pairs(self, layer: int) -> Iterator[tuple[int, int, int]]:
        """query, key, example of every visible pair"""
        window = self.windows[layer] or POS
        for example, real in enumerate(self.real):
            for query, key in product(range(len(real)), repeat=2):
                if real[query] and real[key] and key <= query and query - key < window:
                    yield query, key, example

    def check(self, maps: CompositionMaps) -> None:
        for layer in range(len(self.layers)):
            pre, post = (self.check_stage(maps, layer, stage) for stage in STAGES)
            close(maps.mean_effective(layer), np.mean([one @ other for one, other in zip(pre, post, strict=True)], 0))

    def check_stage(self, maps: CompositionMaps, layer: int, stage: str) -> np.ndarray:
        """Returns the map of every visible pair, [pair, source, target]."""
        pairs = list(self.pairs(layer))
        parts = np.array([[self.part(layer, stage, part, *pair) for part in PARTS] for pair in pairs])
        dense = parts.sum(1)
        sources, targets = self.layers[layer].compose.ends(stage)
        assert maps.heads(layer, stage) == (tuple(sources), tuple(targets))
        close(maps.mean(layer, stage), dense.mean(0))
        difference = parts.copy()  # from the identity
        difference[:, 0] -= np.array([[m == n for n in targets] for m in sources])
        whole = difference.sum(1)
        square = np.mean(np.sum(whole**2, (1, 2)))
        same(maps.distance(layer, stage), sqrt(square / len(targets)))
        for at, part in enumerate(PARTS):
            close(maps.mean(layer, stage, part), parts[:, at].mean(0))
            same(maps.distance(layer, stage, part), sqrt(np.mean(np.sum(difference[:, at] ** 2, (1, 2))) / len(targets)))
            inner = np.mean(np.sum(difference[:, at] * whole, (1, 2)))
            same(maps.share(layer, stage, part), inner / square if square else 0.0)
        rest = np.empty_like(dense)
        for at, (query, _, example) in enumerate(pairs):
            rest[at] = dense[at] - dense[[(q, e) == (query, example) for q, _, e in pairs]].mean(0)
        variation = np.sum((dense - dense.mean(0)) ** 2)
        same(maps.explained_by_query(layer, stage), 1 - np.sum(rest**2) / variation if variation > 1e-20 else 1.0)
        return dense


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Of two passes in float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def number(x: torch.Tensor | None) -> np.ndarray | None:
    return None if x is None else x.detach().double().numpy()


def same(actual: float, expected: float) -> None:
    assert isinstance(actual, float)
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-10)


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=2e-6)


# --- against maps built one by one


@pytest.mark.parametrize("number", range(2 ** len(BRANCHES)))
def test_every_set_of_branches(number: int) -> None:
    branches = [branch for bit, branch in enumerate(BRANCHES) if number >> bit & 1]
    model = build(heads=4, branches=branches, rank=2, groups=2, residual=number % 3 > 0)
    data = batch()
    Dumb(model, data).check(composition_maps(model, data))


@given(
    places=st.sets(st.sampled_from(PLACES)),
    rank=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3]),
    residual=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    kept=st.lists(st.sets(st.integers(0, HEADS - 1), min_size=1), min_size=3, max_size=3),
    scale=st.dictionaries(st.sampled_from(PLACES), st.sampled_from([0.0, 0.5])),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, derandomize=True, phases=[Phase.generate])  # a model is slow to shrink
def test_all_at_once(
    places: set[str], rank: int, groups: int, residual: bool, window: int | None, kept: list[set[int]],
    scale: dict[str, float], seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model: Any = build(branches=BRANCHES, window=window, rank=rank, groups=groups, residual=residual)
    left = {name: sorted(heads) for name, heads in zip(("scores", "probabilities", "output"), kept, strict=True)}
    compose = model.model.layers[1].self_attn.compose
    narrow(model.model.layers[1].self_attn, left, [place for place in compose.places if place in places])
    data = batch()
    with scaled(model, **scale):
        Dumb(model, data).check(composition_maps(model, data))


@pytest.mark.parametrize("kind", ["dcformer", "dcpythia"])
def test_dense_maps_and_their_branches(kind: str) -> None:
    model = build(kind, branches=BRANCHES, rank=3, groups=2, window=3)
    data = batch()
    maps, dumb = composition_maps(model, data), Dumb(model, data)
    for layer, stage, example in product(range(LAYERS), STAGES, range(BATCH)):
        real = [i for i in range(POS) if MASK[example, i]]
        for query, key in product(real[-2:], real):
            close(maps.dense(layer, stage, query, key, example), dumb.map(layer, stage, query, key, example))
            for part in PARTS:
                expected = dumb.part(layer, stage, part, query, key, example)
                close(maps.branch(layer, stage, part, query, key, example), expected)
            expected = dumb.map(layer, "pre", query, key, example) @ dumb.map(layer, "post", query, key, example)
            close(maps.effective(layer, query, key, example), expected)
    torch.testing.assert_close(maps.dense(1, "pre", -1, -2), maps.dense(1, "pre", POS - 1, POS - 2))
    torch.testing.assert_close(maps.dense(1, "pre", 1, 0, -1), maps.dense(1, "pre", 1, 0, BATCH - 1))


def test_maps_are_those_the_model_mixes_heads_with() -> None:
    model: Any = build(branches=BRANCHES, groups=3)
    compose = model.model.layers[1].self_attn.compose
    seen: dict[str, torch.Tensor] = {}
    for name in ("pattern_raw", "pattern"):
        compose.taps[name].register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.detach()}))
    data = batch()
    maps = composition_maps(model, data)
    for example, query, key in ((0, 5, 2), (1, 6, 3), (2, 3, 3)):
        raw, mixed = (seen[name][example, :, query, key] for name in ("pattern_raw", "pattern"))
        torch.testing.assert_close(raw @ maps.dense(1, "post", query, key, example), mixed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_visible_pairs_are_those_with_attention(window: int | None) -> None:
    model: Any = build(window=window)
    data = batch()
    patterns: list[torch.Tensor] = []
    for layer in model.model.layers:
        tap = layer.self_attn.compose.taps["pattern_raw"]
        tap.register_forward_hook(lambda _, __, out: patterns.append(out))
    maps = composition_maps(model, data)
    for layer, pattern in zip(maps.by_layer, patterns, strict=True):
        seen = (pattern > 0).any(1) & MASK.bool()[:, :, None]  # [example, query, key]
        for example, pairs in enumerate(layer.pairs()):
            ones = pairs.sums(torch.eye(POS, dtype=torch.float64))  # [query, key]
            torch.testing.assert_close(ones.bool(), seen[example])
            torch.testing.assert_close(pairs.keys, seen[example].sum(1).double())
            torch.testing.assert_close(pairs.queries, seen[example].sum(0).double())
    assert [layer.window for layer in maps.by_layer] == [window, None]


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama-gqa", "mistral", "qwen3", "gemma3", "bert-mlm"])
def test_models_with_attached_composition(name: str) -> None:
    model: Any = attach(zoo.build(name), branches=BRANCHES)
    composes = [row.compose for row in rows(model)]
    patterns: list[torch.Tensor] = []
    mixed: list[torch.Tensor] = []
    for compose in composes:
        for parameter in compose.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        compose.taps["pattern_raw"].register_forward_hook(lambda _, __, out: patterns.append(out.detach()))
        compose.taps["pattern"].register_forward_hook(lambda _, __, out: mixed.append(out.detach()))
    data = zoo.batch_for(name)
    maps = composition_maps(model, data)
    for layer in maps.layers:
        sums = [pairs.sums(torch.eye(zoo.POS, dtype=torch.float64)) for pairs in maps.by_layer[layer].pairs()]
        real = data["attention_mask"].bool()
        seen = (patterns[layer] > 0).any(1) & real[:, :, None]
        torch.testing.assert_close(torch.stack(sums) > 0, seen)
        pattern = torch.einsum("m,mn->n", patterns[layer][1, :, 4, 3], maps.dense(layer, "post", 4, 3, 1))
        torch.testing.assert_close(pattern, mixed[layer][1, :, 4, 3], atol=1e-5, rtol=1e-5)
        assert maps.distance(layer, "pre") > 0.1


def test_a_window_to_both_sides_is_an_error() -> None:
    model: Any = attach(zoo.build("bert-mlm"))
    rows(model)[1].core.sliding_window = 5
    with pytest.raises(HeadlabError, match=r"layer.1.attention sees a window of 5 to both sides"):
        composition_maps(model, zoo.batch_for("bert-mlm"))


# --- what is read


def test_padding_changes_nothing() -> None:
    model = build(branches=BRANCHES, window=3)
    ids = torch.randint(3, zoo.VOCAB, (1, 5))
    alone = composition_maps(model, ids)
    pad = torch.zeros(1, 2, dtype=torch.long)
    for padded, start in ((torch.cat([pad, ids], 1), 2), (torch.cat([ids, pad], 1), 0)):
        real = torch.zeros_like(padded)
        real[:, start : start + 5] = 1
        maps = composition_maps(model, {"input_ids": padded, "attention_mask": real})
        near(maps.dense(1, "post", start + 4, start + 1), alone.dense(1, "post", 4, 1))
        np.testing.assert_allclose(maps.to_frame().drop(columns="stage"), alone.to_frame().drop(columns="stage"), rtol=1e-4)


def test_batches_of_different_lengths_are_one_set_of_examples() -> None:
    model = build(branches=BRANCHES)
    short, long = torch.randint(3, zoo.VOCAB, (1, 3)), torch.randint(3, zoo.VOCAB, (2, POS))
    maps = composition_maps(model, [{"input_ids": short}, {"input_ids": long}])
    assert maps.by_layer[0].real.tolist() == [[True] * 3 + [False] * 4] + [[True] * POS] * 2
    near(maps.dense(1, "pre", 2, 1), composition_maps(model, short).dense(1, "pre", 2, 1))
    near(maps.dense(1, "pre", 6, 4, 2), composition_maps(model, long).dense(1, "pre", 6, 4, 1))
    means = [composition_maps(model, ids).mean(0, "post") for ids in (short, long[:1], long[1:])]
    pairs = [6, 28, 28]
    near(maps.mean(0, "post"), sum(n * mean for n, mean in zip(pairs, means, strict=True)) / sum(pairs))
    assert maps.record["tokens"] == [ids.tolist() for ids in (short[0], long[0], long[1])]


def test_texts_go_through_the_tokenizer(tmp_path: Path) -> None:
    model: Any = build()
    model.config.name_or_path = str(tmp_path)  # where its tokenizer lies
    tokenizer().save_pretrained(tmp_path)
    texts = [" ".join(WORDS[:5]), " ".join(WORDS[7:9])]
    maps = composition_maps(model, texts)
    assert maps.record["tokens"] == [WORDS[:5], WORDS[7:9]]
    assert maps.record["model"]["class"] == "DCFormerForCausalLM"
    assert maps.record["data"]["tokens"] == 7
    one = composition_maps(model, texts[1])
    near(maps.dense(1, "pre", 1, 0, 1), one.dense(1, "pre", 1, 0))


def test_reading_leaves_the_model_as_it_was() -> None:
    model: Any = build().train()
    composition_maps(model, batch())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, Compose))
    maps = composition_maps(model.bfloat16(), batch())
    assert maps.dense(0, "pre", 3, 1).dtype == torch.float32
    assert not any(x.requires_grad for layer in maps.by_layer for s in layer.stages.values() for _, x in s.tensors())


def test_embeddings_instead_of_tokens() -> None:
    model: Any = build()
    ids = torch.randint(3, zoo.VOCAB, (2, POS))
    maps = composition_maps(model, {"inputs_embeds": model.model.embed_tokens(ids).detach()})
    near(maps.mean(1, "post"), composition_maps(model, ids).mean(1, "post"))
    assert maps.record["tokens"] is None


def test_scales_are_recorded() -> None:
    model = build()
    assert "scale" not in composition_maps(model, batch()).record
    with scaled(model, pre_query=0.5, post_base=0):  # there is no base here
        maps = composition_maps(model, batch())
    assert maps.record["scale"] == {f"model.layers.{i}.self_attn": {"pre_query": 0.5} for i in range(LAYERS)}


def test_only_factors_are_kept() -> None:
    model = build()
    counts = []
    for n in (10, 20):
        maps = composition_maps(model, torch.randint(3, zoo.VOCAB, (1, n)))
        counts.append(sum(x.numel() for layer in maps.by_layer for s in layer.stages.values() for _, x in s.tensors()))
    assert counts[1] == 2 * counts[0]
    assert counts[0] == LAYERS * 10 * 4 * (2 * 2 + 1) * HEADS  # per side: w1 and w2 of rank 2, a gate


# --- what follows from the maps


def test_the_identity_is_at_no_distance() -> None:
    config = DCFormerConfig(
        vocab_size=zoo.VOCAB, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4, compose=None
    )
    model = DCFormerForCausalLM(config)
    with_maps = build(branches=BRANCHES)
    for module in with_maps.modules():
        if isinstance(module, Compose):
            module.initialise(identity=True)
    for maps in (composition_maps(model, torch.arange(5)[None]), composition_maps(with_maps, batch())):
        frame = maps.to_frame()
        assert (frame["distance"] == 0).all()
        assert (frame[list(PARTS)] == 0).all(axis=None)
        assert (frame["explained_by_query"] == 1).all()
        torch.testing.assert_close(maps.mean_effective(0), torch.eye(len(maps.heads(0, "pre")[0])))
        assert all(link.weight == 0 for link in maps.top(3))


@pytest.mark.parametrize(("branches", "explained"), [(["base"], 1.0), (["query", "query_gate"], 1.0)])
def test_what_does_not_depend_on_the_key_is_explained(branches: list[str], explained: float) -> None:
    maps = composition_maps(build(branches=branches), batch())
    assert [maps.explained_by_query(1, stage) for stage in STAGES] == [explained] * 2


def test_what_depends_on_the_key_alone_is_hardly_explained() -> None:
    model = build(branches=["key"])
    ids = torch.randint(3, zoo.VOCAB, (1, 41))
    assert composition_maps(model, ids).explained_by_query(0, "pre") < 0.2
    one = composition_maps(model, torch.tensor([[7]]))
    assert one.explained_by_query(0, "pre") == 1  # a single pair


def test_the_same_token_everywhere_is_no_variation() -> None:
    model: Any = build(branches=BRANCHES)
    maps = composition_maps(model, torch.full((2, 5), 11))
    # the first layer's input is the token's embedding, whatever its position
    assert [maps.explained_by_query(0, stage) for stage in STAGES] == [1.0] * 2
    assert maps.distance(0, "pre") > 0.1


def test_rounding_is_no_variation() -> None:
    gate = torch.full((1, 5, 3), 0.5)
    gate[:, ::2] = torch.nextafter(gate[:, ::2], torch.ones(()))
    maps = StageMaps((0, 1, 2), (0, 1, 2), 3, True, None, Side(), Side(gate=gate))
    layer = LayerMaps(0, True, None, torch.ones(1, 5).bool(), {"pre": maps, "post": maps})
    assert CompositionMaps((layer,)).explained_by_query(0, "pre") == 1
    gate[0, 1, 2] += 1e-3
    assert CompositionMaps((layer,)).explained_by_query(0, "pre") < 0.5


def test_the_strongest_links() -> None:
    maps = composition_maps(build(branches=BRANCHES, groups=2), batch())
    links = maps.top(5)
    assert len(links) == 5
    everything = []
    for layer in range(LAYERS):
        weights = maps.mean_effective(layer)
        everything += [(layer, m, n, weights[m, n].item()) for m, n in product(range(HEADS), repeat=2) if m != n]
    everything.sort(key=lambda link: -abs(link[3]))
    assert [tuple(link) for link in links] == everything[:5]
    assert len(maps.top(999)) == LAYERS * HEADS * (HEADS - 1)
    assert str(Link(2, 3, 5, 0.12)) == "L2H3 -> L2H5 0.12"


def test_links_of_a_pruned_model_have_the_original_numbers() -> None:
    model: Any = build()
    kept = {"scores": [1, 4], "probabilities": [0, 1, 2, 4, 5], "output": [2, 4, 5]}
    for layer in model.model.layers:
        narrow(layer.self_attn, kept, layer.self_attn.compose.places)
    maps = composition_maps(model, batch())
    weights = maps.mean_effective(0)
    assert weights.shape == (2, 3)
    assert {(link.source, link.target) for link in maps.top(99)} == {(1, 2), (1, 4), (1, 5), (4, 2), (4, 5)}
    found = {(link.layer, link.source, link.target): link.weight for link in maps.top(99)}
    assert found[0, 4, 5] == weights[1, 2].item()


def test_a_table_with_a_line_per_layer_and_stage() -> None:
    model: Any = build(branches=BRANCHES)
    narrow(model.model.layers[1].self_attn, {"scores": [0], "probabilities": [0, 1, 2], "output": [3, 4]}, PLACES)
    maps = composition_maps(model, batch())
    frame = maps.to_frame()
    assert list(frame.columns) == ["layer", "stage", "heads_from", "heads_to", "distance", *PARTS, "explained_by_query"]
    assert frame[["layer", "stage", "heads_from", "heads_to"]].to_numpy().tolist() == [
        [0, "pre", 6, 6], [0, "post", 6, 6], [1, "pre", 1, 3], [1, "post", 3, 2],
    ]  # fmt: skip
    for line in frame.to_dict("records"):
        at = line["layer"], line["stage"]
        assert line["distance"] == maps.distance(*at)
        assert line["key_gate"] == maps.share(*at, "key_gate")
        assert line["explained_by_query"] == maps.explained_by_query(*at)
        assert sum(line[part] for part in PARTS) == pytest.approx(1)


def test_no_heads_left() -> None:
    model: Any = build(branches=BRANCHES)
    narrow(model.model.layers[1].self_attn, {"scores": [0, 3], "probabilities": [1, 2, 5], "output": []}, PLACES)
    maps = composition_maps(model, batch())
    assert maps.dense(1, "post", 3, 1).shape == (3, 0)
    assert maps.distance(1, "post") == 0
    assert maps.mean_effective(1).shape == (2, 0)
    assert not maps.to_frame().isna().any(axis=None)


# --- bridges, files, errors


def test_a_bridge_gives_the_same_maps() -> None:
    model: Any = build(branches=BRANCHES)
    data = batch()
    maps, bridged = composition_maps(model, data), composition_maps(hl.bridge(model), data)
    np.testing.assert_allclose(
        maps.to_frame().drop(columns="stage"), bridged.to_frame().drop(columns="stage"), rtol=1e-4, atol=1e-6
    )
    assert bridged.record["model"]["fingerprint"] == maps.record["model"]["fingerprint"]


def test_saved_maps_read_back(tmp_path: Path) -> None:
    model: Any = build(branches=BRANCHES, groups=2, residual=False, window=3)
    narrow(model.model.layers[1].self_attn, {"scores": [0, 4], "probabilities": [5], "output": [3, 4, 5]}, PLACES[:3])
    maps = composition_maps(model, batch())
    path = maps.save(tmp_path / "deeper" / "maps.safetensors")
    found = CompositionMaps.load(path)
    assert found.record == json.loads(json.dumps(maps.record))
    assert repr(found) == repr(maps) == "CompositionMaps(2 layers, 3 examples, 16 tokens)"
    assert found.to_frame().equals(maps.to_frame())
    for layer, stage in product(maps.layers, STAGES):
        assert found.heads(layer, stage) == maps.heads(layer, stage)
        torch.testing.assert_close(found.dense(layer, stage, 3, 2), maps.dense(layer, stage, 3, 2), rtol=0, atol=0)
    assert found.top(4) == maps.top(4)
    assert [p.name for p in path.parent.iterdir()] == ["maps.safetensors"]


def test_files_that_are_no_maps(tmp_path: Path) -> None:
    with pytest.raises(HeadlabError, match=r"there is no file .*nothing"):
        CompositionMaps.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("no")
    with pytest.raises(HeadlabError, match="is not a headlab result"):
        CompositionMaps.load(tmp_path / "text")
    fill = hl.fill(zoo.build("gpt2"), [zoo.batch_for("gpt2")]).save(tmp_path / "fill")
    with pytest.raises(HeadlabError, match="holds a fill, but a maps was expected"):
        CompositionMaps.load(fill)


def test_errors_say_what_there_is() -> None:
    maps = composition_maps(build(), batch())
    for call, message in (
        (lambda: maps.dense(5, "pre", 0, 0), "no composition maps of layer 5: the layers are 0, 1"),
        (lambda: maps.mean(0, "prae"), "a stage is 'pre' or 'post', not 'prae'"),
        (lambda: maps.mean(0, "pre", "gate"), "no branch is called 'gate': there are identity, base, query, "),
        (lambda: maps.share(0, "pre", "qk"), "no branch is called 'qk'"),
        (lambda: maps.distance(0, "pre", "qk"), "no branch is called 'qk'"),
        (lambda: maps.branch(0, "pre", "qk", 0, 0), "no branch is called 'qk'"),
        (lambda: maps.dense(0, "pre", 7, 0), "no query 7: the maps are of 3 examples of 7 tokens"),
        (lambda: maps.dense(0, "pre", 0, -8), "no key -8"),
        (lambda: maps.effective(0, 0, 0, 3), "no example 3"),
        (lambda: maps.dense(0, "pre", 6, 0, 2), "query 6 of example 2 is padding"),
        (lambda: maps.dense(0, "pre", 6, 1, 1), "key 1 of example 1 is padding"),
        (lambda: composition_maps(zoo.build("gpt2"), torch.arange(3)[None]), "GPT2LMHeadModel has no composable heads"),
        (lambda: composition_maps(build(), torch.arange(99)[None]), "99 tokens long, but the model's context is 41"),
        (lambda: composition_maps(build(), "a text"), "brings no tokenizer"),
        (
            lambda: composition_maps(build(), {"input_ids": MASK, "attention_mask": torch.ones(BATCH, 1, POS, POS)}),
            r"says which tokens are real, \[batch, pos\], not \(3, 1, 7, 7\)",
        ),
        (lambda: composition_maps(build(), []), "there are no batches"),
    ):
        with pytest.raises(HeadlabError, match=message):
            call()


def test_maps_that_a_pass_goes_round_are_an_error() -> None:
    model: Any = build()
    attn = model.model.layers[1].self_attn
    attn.compose.forward = lambda x: {}  # the module is called, but what it gives is not used...
    plain = attn.forward
    attn.forward = lambda *args, **kwargs: (args[0] if args else kwargs["hidden_states"], None)
    with pytest.raises(HeadlabError, match=r"went 0 times through the maps of model.layers.1.self_attn, not once"):
        composition_maps(model, batch())
    attn.forward = plain
