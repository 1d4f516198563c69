"""The Compose function against maps built one by one as matrices (`dcmha_loop`), for every combination of its switches."""

from __future__ import annotations

from itertools import chain, combinations
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headlab.dcmha.branches import BRANCHES, DYNAMIC, PLACES, SCORE_TAPS, SITES, STAGES, places_of
from headlab.dcmha.compose import Compose, Side, Sides, scaled
from headlab.errors import HeadlabError
from tests.helpers import dcmha_loop

WIDTH, HEADS, HIDDEN = 7, 6, 3
BATCH, QUERIES, KEYS = 2, 2, 3
SUBSETS = list(chain.from_iterable(combinations(BRANCHES, n) for n in range(len(BRANCHES) + 1)))


def build(seed: int = 0, **options) -> Compose:
    """Maps in float64 that are far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    compose = Compose(WIDTH, HEADS, **{"hidden": HIDDEN} | options)
    for parameter in compose.parameters():
        parameter.data = 0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return compose


def loop(compose: Compose, **options) -> dcmha_loop.Maps:
    places = [f"{s}_{b}" for s in options.get("stages", STAGES) for b in options.get("branches", DYNAMIC)]
    weights = {key: value.numpy() for key, value in compose.state_dict().items()}
    others = {key: options[key] for key in ("groups", "residual") if key in options}
    return dcmha_loop.Maps(weights, HEADS, frozenset(places), options.get("rank", 2), scale=compose.scale, **others)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens as queries and as keys, and something to compose."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (BATCH, QUERIES, WIDTH), (BATCH, KEYS, WIDTH), (BATCH, HEADS, QUERIES, KEYS)
    x, y, a = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, y, a


def composed(maps: dcmha_loop.Maps, stage: str, x: Tensor, y: Tensor) -> np.ndarray:
    """The dense maps, [batch, query, key, source, target]."""
    return np.array([maps.whole(stage, list(q.numpy()), list(k.numpy())) for q, k in zip(x, y, strict=True)])


def pairs(queries: Side, keys: Side) -> tuple[Side, Side]:
    """Every query with every key."""
    i, j = torch.cartesian_prod(torch.arange(QUERIES), torch.arange(KEYS)).T
    return queries.at(i), keys.at(j)


def assert_same(found: Tensor, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert found.numel() == 0 or np.abs(found.detach().numpy() - expected).max() < 1e-12


def assert_like_the_loop(compose: Compose, maps: dcmha_loop.Maps, batch: int = BATCH) -> None:
    x, y, a = (part[:batch] for part in inputs())
    mine, theirs = compose(x), compose(y)
    for stage in STAGES:
        sources, targets = compose.ends(stage)
        dense = composed(maps, stage, x, y)[..., sources, :][..., targets]
        at = a[:, sources]
        out = np.zeros((batch, len(targets), QUERIES, KEYS))
        for b, i, j in np.ndindex(batch, QUERIES, KEYS):
            out[b, :, i, j] = at[b, :, i, j].numpy() @ dense[b, i, j]
        query, key = mine[f"{stage}_query"], theirs[f"{stage}_key"]
        assert_same(compose.mix(stage, at, query, key), out)
        expected = dense.reshape(batch, QUERIES * KEYS, len(sources), len(targets))
        assert_same(compose.dense(stage, *pairs(query, key)).expand(expected.shape), expected)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("stages", [(), ("pre",), ("post",), STAGES], ids=lambda stages: "-".join(stages) or "none")
def test_every_combination_of_switches_composes_as_its_matrices_do(stages, groups):
    for number, branches in enumerate(SUBSETS):
        for rank in (1, 2) if {"query", "key"} & {*branches} else (1,):
            for residual in (True, False):
                options = {"stages": stages, "branches": branches, "rank": rank, "groups": groups, "residual": residual}
                compose = build(number, **options)
                assert_like_the_loop(compose, loop(compose, **options), batch=1)


@pytest.mark.parametrize(("groups", "rank"), [(1, 6), (2, 3), (6, 1), (1, 3)])
def test_other_ranks_and_groups(groups, rank):
    options = {"branches": BRANCHES, "groups": groups, "rank": rank, "hidden": None}
    compose = build(**options)
    assert compose.hidden == 2 * rank * HEADS // groups
    assert_like_the_loop(compose, loop(compose, **options))


@settings(max_examples=40)
@given(
    places=st.sets(st.sampled_from(PLACES)),
    rank=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    scale=st.lists(st.floats(0, 1), min_size=10, max_size=10),
)
def test_branches_of_one_stage_and_their_scales(places, rank, groups, scale):
    compose = build(branches=sorted(places), rank=rank, groups=groups)
    compose.scale.update(zip(PLACES, scale, strict=True))
    maps = dcmha_loop.Maps(
        {key: value.numpy() for key, value in compose.state_dict().items()},
        HEADS, frozenset(places), rank, groups, scale=compose.scale,
    )  # fmt: skip
    assert_like_the_loop(compose, maps)


@pytest.mark.parametrize("groups", [1, 3])
def test_branch_maps_are_the_parts_of_the_matrices(groups):
    options = {"branches": BRANCHES, "groups": groups}
    compose = build(**options)
    compose.scale.update(pre_query=0.3, post_base=0.7, post_key_gate=0.0)
    maps = loop(compose, **options)
    x, y, _ = inputs()
    for stage in STAGES:
        found = compose.branch_maps(stage, *pairs(compose(x)[f"{stage}_query"], compose(y)[f"{stage}_key"]))
        assert set(found) == {"identity", *BRANCHES}
        always = maps.always(stage)
        for name in ("identity", "base"):
            assert_same(found[name], always[name])
        for b in range(BATCH):
            for pair, (i, j) in enumerate(np.ndindex(QUERIES, KEYS)):
                parts = maps.branches(stage, "query", x[b, i].numpy()) | maps.branches(stage, "key", y[b, j].numpy())
                for name, part in parts.items():
                    assert_same(found[name][b, pair], part)


def test_a_map_of_only_some_branches_has_only_these_parts():
    compose = build(branches=("key",), stages=("post",), residual=False)
    sides = compose(inputs()[0])
    assert set(compose.branch_maps("post", sides["post_query"], sides["post_key"])) == {"key"}
    assert compose.branch_maps("pre", sides["pre_query"], sides["pre_key"]) == {}
    assert compose.dense("pre", sides["pre_query"], sides["pre_key"]).tolist() == [[0.0] * HEADS] * HEADS


def test_without_branches_the_maps_are_the_identity_and_cost_nothing():
    compose = Compose(WIDTH, HEADS, stages=())
    a = torch.randn(BATCH, HEADS, QUERIES, KEYS)
    assert compose.trivial
    assert not list(compose.parameters())
    assert compose.mix("pre", a, Side(), Side()).data_ptr() == a.data_ptr()
    assert torch.equal(compose.mix("pre", a, Side(), Side()), a)
    assert torch.equal(compose.dense("post", Side(), Side()), torch.eye(HEADS))
    assert not Compose(WIDTH, HEADS, stages=(), residual=False).trivial
    assert not Compose(WIDTH, HEADS).trivial


def test_the_norm_of_w1_is_over_heads_with_its_epsilon():
    compose = build()
    compose.qkw.weight.data *= 1e-3  # so small that the epsilon counts
    x, _, _ = inputs()
    hidden = nn.functional.gelu(compose.dw1(x)).unflatten(-1, (4, HIDDEN))  # [batch, pos, place, hidden]
    raw = torch.einsum("btck,ckrm->btcrm", hidden, compose.qkw.weight[:, 0])
    w1 = raw[:, :, 0, :2]
    expected = w1 / (w1.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    side = compose(x)["pre_query"]
    torch.testing.assert_close(side.w1, expected)
    torch.testing.assert_close(side.w2, raw[:, :, 0, 2:])


def test_factors_stay_right_in_half_precision():
    exact = build(branches=BRANCHES)
    exact.qkw.weight.data *= 1e-2
    half = build(branches=BRANCHES)
    half.load_state_dict(exact.state_dict())
    half.half()
    x, _, _ = inputs()
    expected, found = exact(x), half(x.half())
    for name, side in expected.items():
        torch.testing.assert_close(found[name].w1.double(), side.w1, rtol=0.02, atol=0.01)
        torch.testing.assert_close(found[name].gate.double(), side.gate, rtol=0.02, atol=0.01)


# --- initial weights


def test_fresh_weights_have_the_published_spread():
    width, heads, rank, groups = 192, 32, 3, 2
    compose = Compose(width, heads, rank=rank, groups=groups, branches=BRANCHES)
    per_group, hidden = heads // groups, 2 * rank * heads // groups
    for weight, std in (
        (compose.dw1.weight, sqrt(2 / (width + hidden))),
        (compose.qkw.weight, sqrt(1 / hidden) * 2 / (per_group + rank) * 0.01),
        (compose.dd.weight, sqrt(2 / (width + per_group)) * 0.005),
        (compose.base.weight, 0.1 / sqrt(per_group)),
    ):
        error = 1 / sqrt(2 * weight.numel())  # of a measured standard deviation
        assert weight.std().item() == pytest.approx(std, rel=5 * error)
        assert abs(weight.mean().item()) < 5 * std / sqrt(weight.numel())


def test_a_fresh_layer_is_next_to_the_identity_and_with_identity_is_it():
    compose = Compose(64, 8)
    sides = compose(torch.randn(2, 11, 64))
    for stage in STAGES:
        maps = compose.dense(stage, sides[f"{stage}_query"], sides[f"{stage}_key"])
        away = (maps - torch.eye(8)).abs().max().item()
        assert 0 < away < 0.05
    compose = Compose(64, 8, branches=BRANCHES)
    compose.initialise(identity=True)
    assert compose.qkw.weight[:, :, :, : compose.rank].std() > 0  # w1 as published
    sides = compose(torch.randn(2, 11, 64))
    for stage in STAGES:
        maps = compose.dense(stage, sides[f"{stage}_query"], sides[f"{stage}_key"])
        assert torch.equal(maps, torch.eye(8).expand(maps.shape))
        a = torch.randn(2, 8, 11, 11)
        assert torch.equal(compose.mix(stage, a, sides[f"{stage}_query"], sides[f"{stage}_key"]), a)


# --- what a cache keeps


@pytest.mark.parametrize("branches", SUBSETS, ids="+".join)
def test_key_sides_survive_packing(branches):
    compose = build(branches=branches, groups=2)
    compose.kept = {"scores": [0, 1, 3, 5], "probabilities": [0, 2, 3, 4, 5], "output": [2, 4, 5]}
    sides = compose(inputs()[1])
    low_rank = 2 * (4 + 5) + 2 * (5 + 3) if "key" in branches else 0
    gates = 5 + 3 if "key_gate" in branches else 0
    assert compose.key_numbers == low_rank + gates
    packed = compose.pack(sides) if low_rank + gates else torch.empty(BATCH, KEYS, 0)
    assert packed.shape == (BATCH, KEYS, low_rank + gates)
    again = compose.unpack(packed)
    for name in ("pre_key", "post_key"):
        for before, after in zip(vars(sides[name]).values(), vars(again[name]).values(), strict=True):
            assert (before is None and after is None) or torch.equal(before, after)


# --- gates, taps, scales


def gated(compose: Compose, sides: tuple[Sides, Sides], a: Tensor, stage: str, gates: dict[str, Tensor]) -> Tensor:
    return compose.mix(stage, a, sides[0][f"{stage}_query"], sides[1][f"{stage}_key"], gates)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_gate_multiplies_what_its_branch_adds_to_a_composed_head(groups, pruned):
    compose = build(branches=BRANCHES, groups=groups)
    if pruned:
        compose.narrow({"scores": [1, 2, 4], "probabilities": [0, 1, 3, 5], "output": [2, 3, 4, 5]}, PLACES)
    x, y, a = inputs()
    sides = compose(x), compose(y)
    for stage in STAGES:
        sources, targets = compose.ends(stage)
        at = a[:, sources]
        whole = gated(compose, sides, at, stage, {})
        for branch in BRANCHES:
            place = f"{stage}_{branch}"
            with scaled(nn.ModuleList([compose]), **{place: 0}):
                without = gated(compose, sides, at, stage, {})
            gate = torch.rand(BATCH, len(targets), QUERIES, 1, dtype=torch.float64)
            expected = without + gate * (whole - without)
            torch.testing.assert_close(gated(compose, sides, at, stage, {place: gate}), expected)


def test_sites_give_gates_only_when_hooked_and_head_means_all_three():
    compose = build(branches=["base", "pre_query"])
    compose.kept = {"scores": [0, 1, 2, 4], "probabilities": [1, 2, 3], "output": [0, 5]}
    x, _, _ = inputs()
    assert compose.gates(x) == {}
    assert compose.heads_at("head") == [0, 1, 2, 3, 4, 5]
    sites = {
        "scores": [0, 1, 2, 4], "probabilities": [1, 2, 3], "output": [0, 5], "pre_query": [1, 2, 3], "post_base": [0, 5],
        "post_key": [],
    }  # fmt: skip
    assert {site: compose.heads_at(site) for site in sites} == sites
    factors = torch.arange(1.0, 7).double()
    handles = [
        compose.sites["head"].register_forward_hook(lambda module, args, ones: ones * factors[:, None]),
        compose.sites["scores"].register_forward_hook(lambda module, args, ones: ones * 10),
        compose.sites["post_base"].register_forward_pre_hook(lambda module, args: (args[0] * 3,)),
    ]
    gates = compose.gates(x)
    for handle in handles:
        handle.remove()
    assert {site: gate[1, :, 1, 0].tolist() for site, gate in gates.items()} == {
        "scores": [10, 20, 30, 50], "post_base": [3, 3], "probabilities": [2, 3, 4], "output": [1, 6],
    }  # fmt: skip
    assert all(gate.shape == (BATCH, gate.shape[1], QUERIES, 1) for gate in gates.values())
    assert compose.gates(x) == {}
    assert set(compose.sites) == set(SITES) - {"output"}


def test_every_factor_passes_through_its_tap_and_an_edit_counts():
    compose = build(branches=BRANCHES, groups=2)
    x, y, a = inputs()
    names = [name for name in compose.taps if name not in SCORE_TAPS]
    assert len(names) == 2 * (1 + 2 * 2 + 2)
    for name in names:
        stage = name.split("_")[0]
        before = gated(compose, (compose(x), compose(y)), a, stage, {})
        handle = compose.taps[name].register_forward_hook(lambda module, args, value: value * 2)
        after = gated(compose, (compose(x), compose(y)), a, stage, {})
        handle.remove()
        assert not torch.allclose(before, after), name
        place = name.removesuffix("_w1").removesuffix("_w2")
        with scaled(nn.ModuleList([compose]), **{place: 0}):
            without = gated(compose, (compose(x), compose(y)), a, stage, {})
        torch.testing.assert_close(after - before, before - without)  # twice as much of this branch
    for name in SCORE_TAPS:
        assert not compose.tapped()
        handle = compose.taps[name].register_forward_pre_hook(lambda module, args: None)
        assert compose.tapped()
        handle.remove()


def test_constants_hold_what_scales_and_hooked_base_maps_were():
    compose = build(branches=BRANCHES)
    x, y, a = inputs()
    sides = compose(x), compose(y)
    compose.scale["pre_query"] = 0.25
    handle = compose.taps["pre_base"].register_forward_hook(lambda module, args, value: value * 3)
    before, constants = gated(compose, sides, a, "pre", {}), compose.constants()
    handle.remove()
    compose.scale["pre_query"] = 1.0
    assert not torch.allclose(gated(compose, sides, a, "pre", {}), before)
    assert torch.equal(compose.mix("pre", a, sides[0]["pre_query"], sides[1]["pre_key"], constants=constants), before)


def test_scaled_puts_everything_back():
    model = nn.ModuleList([build(), build(branches=BRANCHES)])
    model[1].scale["post_key"] = 0.5
    context = scaled(model, pre_query=0, post_key=0.25)
    context.__enter__()
    assert [compose.scale["post_key"] for compose in model] == [0.25, 0.25]
    assert [compose.scale["pre_query"] for compose in model] == [0, 0]
    with pytest.raises(ZeroDivisionError):  # whatever happens inside
        context.gen.throw(ZeroDivisionError())
    assert [compose.scale["post_key"] for compose in model] == [1.0, 0.5]
    assert set(model[0].scale.values()) == {1.0}


# --- pruned maps


@settings(max_examples=60)
@given(data=st.data(), groups=st.sampled_from([1, 2, 3]), rank=st.integers(1, 2))
def test_narrowed_maps_are_the_rows_and_columns_that_are_left(data, groups, rank):
    heads = st.sets(st.integers(0, HEADS - 1)).map(sorted)
    kept = {name: data.draw(heads, name) for name in ("scores", "probabilities", "output")}
    places = data.draw(st.sets(st.sampled_from(PLACES)), "places")
    compose = build(branches=BRANCHES, groups=groups, rank=rank)
    maps = loop(compose, branches=BRANCHES, groups=groups, rank=rank)
    maps = dcmha_loop.Maps(
        maps.weights, HEADS, maps.places, rank, groups, scale={place: float(place in places) for place in PLACES}
    )
    compose.narrow(kept, sorted(places))
    assert set(compose.places) == places
    assert compose.ends("pre") == (kept["scores"], kept["probabilities"])
    assert compose.ends("post") == (kept["probabilities"], kept["output"])
    assert_like_the_loop(compose, maps)


@pytest.mark.parametrize("place", PLACES)
def test_a_silenced_branch_adds_nothing_to_these_heads_and_the_same_to_others(place):
    compose = build(branches=BRANCHES, groups=2)
    x, y, a = inputs()
    stage = place.split("_")[0]
    gate = torch.ones(BATCH, HEADS, QUERIES, 1, dtype=torch.float64)
    gate[:, [1, 4]] = 0
    expected = {s: gated(compose, (compose(x), compose(y)), a, s, {place: gate} if s == stage else {}) for s in STAGES}
    compose.silence(place, [1, 4])
    for s in STAGES:
        torch.testing.assert_close(gated(compose, (compose(x), compose(y)), a, s, {}), expected[s])


def test_keys_and_values_are_spread_over_the_heads_that_read_them():
    compose = build()
    compose.ratio = 2  # heads 0 and 1 read key-value head 0, ...
    x = torch.arange(3.0)[None, :, None, None].expand(2, 3, 5, 7)
    assert compose.spread(x, "scores")[0, :, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    compose.kept = {"scores": [1, 4, 5], "probabilities": [0], "output": [2, 5]}
    assert compose.spread(x[:, [0, 2]], "scores")[0, :, 0, 0].tolist() == [0, 2, 2]
    assert compose.spread(x[:, [1, 2]], "output")[0, :, 0, 0].tolist() == [1, 2]
    compose.ratio, compose.joined = 1, True  # one projection for all three: what one of them needs is there for all
    assert compose.held("scores") == compose.held("output") == [1, 2, 4, 5]
    x = torch.tensor([1.0, 2, 4, 5])[None, :, None, None]
    assert compose.spread(x, "scores").flatten().tolist() == [1, 4, 5]
    assert compose.spread(x, "output").flatten().tolist() == [2, 5]


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 4}, "6 heads cannot be composed in 4 groups"),
        ({"groups": 0}, "6 heads cannot be composed in 0 groups"),
        ({"groups": 3, "rank": 3}, r"from 1 to the number of heads in a group \(2\), not 3"),
        ({"rank": 0}, r"from 1 to the number of heads in a group \(6\), not 0"),
        ({"branches": ["query", "querry"]}, "no branch or stage is called 'querry'"),
        ({"stages": ["before"]}, "no branch or stage is called 'before'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(HeadlabError, match=message):
        Compose(WIDTH, HEADS, **options)


def test_the_rank_does_not_matter_without_low_rank_branches():
    assert Compose(WIDTH, HEADS, groups=3, rank=3, branches=["base", "key_gate"]).places == (
        "pre_base", "pre_key_gate", "post_base", "post_key_gate",
    )  # fmt: skip


def test_places_come_in_their_order():
    assert places_of(["key", "base"]) == ("pre_base", "pre_key", "post_base", "post_key")
    assert places_of(["post_query", "key"], ["pre"]) == ("pre_key",)
    assert places_of(["post_query", "pre_key_gate"]) == ("pre_key_gate", "post_query")


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"query": 0}, "no branch is called query"),
        ({"pre_query": 1.5}, "from 0 to 1, not pre_query=1.5"),
        ({"pre_query": -0.1}, "from 0 to 1, not pre_query=-0.1"),
        ({"pre_query": float("nan")}, "from 0 to 1, not pre_query=nan"),
    ],
)
def test_bad_scales(scales, message):
    with pytest.raises(HeadlabError, match=message), scaled(nn.ModuleList([build()]), **scales):
        pass


def test_a_model_without_composition_cannot_be_scaled():
    with pytest.raises(HeadlabError, match="Linear has no composable heads"), scaled(nn.Linear(2, 3), pre_query=0):
        pass


# --- only what queries bring, or only what keys do


def assert_only(compose: Compose) -> None:
    x = inputs()[0]
    whole = compose(x)
    for side in ("query", "key"):
        found = compose(x, side)
        assert list(found) == list(whole)
        for name, part in found.items():
            for numbers, expected in zip(
                (part.w1, part.w2, part.gate), (whole[name].w1, whole[name].w2, whole[name].gate), strict=True
            ):
                if not name.endswith(side) or expected is None:
                    assert numbers is None
                else:
                    assert_same(numbers, expected.detach().numpy())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stages", [(), ("pre",), ("post",), STAGES], ids=lambda stages: "-".join(stages) or "none")
def test_what_queries_and_keys_bring_by_themselves(stages, groups):
    for number, branches in enumerate(SUBSETS):
        assert_only(build(number, stages=stages, branches=branches, groups=groups))


def test_what_queries_and_keys_bring_by_themselves_with_any_places():
    low_rank, gates = ([place for place in PLACES if place.endswith(ends)] for ends in (("_query", "_key"), "_gate"))
    for names in (low_rank, gates):
        for n in range(1, 5):
            for places in combinations(names, n):
                assert_only(build(n, branches=places))


@settings(max_examples=40)
@given(data=st.data(), groups=st.sampled_from([1, 3]), rank=st.integers(1, 2))
def test_what_queries_and_keys_bring_by_themselves_to_pruned_maps(data, groups, rank):
    heads = st.sets(st.integers(0, HEADS - 1)).map(sorted)
    kept = {name: data.draw(heads, name) for name in ("scores", "probabilities", "output")}
    compose = build(branches=BRANCHES, groups=groups, rank=rank)
    compose.narrow(kept, sorted(data.draw(st.sets(st.sampled_from(PLACES)), "places")))
    assert_only(compose)


@pytest.mark.parametrize("side", ["query", "key"])
def test_gradients_of_one_side_are_those_of_its_part(side):
    compose = build(branches=BRANCHES)
    x = inputs()[0]
    gradients = []
    for sides in (compose(x), compose(x, side)):
        compose.zero_grad()
        parts = (part for name, s in sides.items() if name.endswith(side) for part in (s.w1, s.w2, s.gate))
        sum(part.square().sum() for part in parts).backward()
        gradients.append([p.grad.clone() for p in compose.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 3  # the base is neither's
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["query", "key"])
def test_only_the_taps_of_a_side_fire(side):
    compose, fired = build(branches=BRANCHES), []
    for name, tap in compose.taps.items():
        tap.register_forward_hook(lambda module, args, value, name=name: fired.append(name))
    compose(inputs()[0], side)
    assert sorted(fired) == sorted(f"{stage}_{side}_{what}" for stage in STAGES for what in ("w1", "w2", "gate"))
