"""The backend for one query and many sequences against the eager one, in float64, with maps far from the identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headlab.dcmha import BRANCHES, Compose, scaled
from headlab.dcmha.attention import BACKENDS, Problem, Visible, attend
from headlab.dcmha.places import PLACES, STAGES
from synthetic_tasks import single
from synthetic_tasks.probes import KINDS

BATCH, KEYS, HEADS, D_HEAD, WIDTH = 2, 7, 3, 5, 11
OPTIONS = {kind: options for kind, options in KINDS.items() if isinstance(options, Mapping)}


def build(seed: int = 0, **options: Any) -> Compose:
    generator = torch.Generator().manual_seed(seed)
    compose = Compose(WIDTH, HEADS, **options)
    for p in compose.parameters():
        p.data = 1.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return compose


def inputs(seed: int = 0, queries: int = 1) -> list[Tensor]:
    """Tokens, then q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (BATCH, KEYS, WIDTH),
        (BATCH, HEADS, queries, D_HEAD),
        (BATCH, HEADS, KEYS, D_HEAD),
        (BATCH, HEADS, KEYS, D_HEAD),
    )
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def problem_of(compose: Compose, x: Tensor, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Problem:
    asking = x[:, -q.shape[2] :]
    parts = {"query": compose(asking), "key": compose(x), "gates": compose.gates(asking), "visible": Visible(causal=False)}
    return Problem(q, k, v, compose, **parts | {"scale": 0.7} | more)


def assert_as_eager(compose: Compose, seed: int) -> None:
    found = []
    for backend in ("single", "eager"):
        given = inputs(seed)
        compose.zero_grad()
        problem = problem_of(compose, *given)
        assert single.fits(problem)
        z, _ = attend(problem, backend)
        assert z.shape == (BATCH, 1, HEADS, D_HEAD)
        z.square().sum().backward()
        wanted = [*given, *compose.parameters()]
        found.append([z.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in wanted)])
    largest = max(float(x.abs().max()) for x in found[1])
    for mine, eager in zip(*found, strict=True):
        assert (mine - eager).abs().max() < 1e-12 * max(1, largest)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_computes_what_the_eager_backend_does(kind, residual):
    for seed in range(5):
        compose = build(seed, residual=residual, **OPTIONS[kind])
        given = inputs(seed)
        mine, eager = (BACKENDS[name](problem_of(compose, *given))[0] for name in ("single", "eager"))
        assert mine.shape == eager.shape == (BATCH, HEADS, 1, D_HEAD)
        assert (mine - eager).abs().max() < 1e-12
        assert_as_eager(compose, seed)


@settings(max_examples=80, deadline=None)
@given(
    places=st.sets(st.sampled_from(PLACES)),
    rank=st.integers(1, 3),
    residual=st.booleans(),
    scale=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=10, max_size=10),
    seed=st.integers(0, 999),
)
def test_any_branches_at_any_scale(places, rank, residual, scale, seed):
    compose = build(seed, branches=sorted(places), rank=rank, residual=residual)
    with scaled(torch.nn.ModuleList([compose]), **dict(zip(PLACES, scale, strict=True))):
        assert_as_eager(compose, seed)


@pytest.mark.parametrize("place", PLACES)
def test_every_scale_counts(place):
    compose, given = build(branches=BRANCHES), inputs()
    before = BACKENDS["single"](problem_of(compose, *given))[0]
    compose.scale[place] = 0.25
    after, eager = (BACKENDS[name](problem_of(compose, *given))[0] for name in ("single", "eager"))
    assert (after - before).abs().max() > 1e-3
    assert (after - eager).abs().max() < 1e-12


def test_maps_with_branches_pruned_away():
    compose = build(branches=BRANCHES)
    everyone = list(range(HEADS))
    compose.narrow(
        dict.fromkeys(("scores", "probabilities", "output"), everyone), ["pre_query", "post_base", "post_key_gate"]
    )
    assert_as_eager(compose, 3)


# --- what it does not compute


def test_what_fits():
    compose, given = build(branches=BRANCHES), inputs()
    problem = problem_of(compose, *given)
    assert single.fits(problem)
    ones = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool)
    for visible in (
        Visible(causal=True),
        Visible(causal=False, window=KEYS),
        Visible(causal=False, real=ones[:, 0, 0]),
        Visible(causal=False, seen=ones),
    ):
        assert not single.fits(replace(problem, visible=visible))
    assert not single.fits(replace(problem, gates={"output": torch.ones(BATCH, HEADS, 1, 1)}))
    assert not single.fits(replace(problem, dropout=0.1))


def test_several_queries_do_not_fit():
    compose = build(branches=BRANCHES)
    assert not single.fits(problem_of(compose, *inputs(queries=2)))


@pytest.mark.parametrize("site", ["head", "scores", "post_key"])
def test_gates_that_hooks_ask_for_do_not_fit(site):
    compose = build(branches=BRANCHES)
    handle = compose.sites[site].register_forward_hook(lambda module, args, ones: ones)
    assert not single.fits(problem_of(compose, *inputs()))
    handle.remove()
    assert single.fits(problem_of(compose, *inputs()))


def test_groups_do_not_fit():
    compose = build(groups=3, rank=1)
    assert not single.fits(problem_of(compose, *inputs()))


@pytest.mark.parametrize("what", ["scores", "probabilities", "output"])
def test_pruned_heads_do_not_fit(what):
    compose = build(branches=BRANCHES)
    kept = {name: list(range(HEADS)) for name in ("scores", "probabilities", "output")} | {what: [0, 2]}
    compose.narrow(kept, compose.places)
    x, q, k, v = inputs()
    heads = {name: kept[name] for name in ("scores", "output")}
    assert not single.fits(problem_of(compose, x, q[:, heads["scores"]], k[:, heads["scores"]], v[:, heads["output"]]))


def test_who_listens_to_scores_gets_the_eager_backend():
    compose = build(branches=BRANCHES)
    seen = []
    handle = compose.taps["pattern"].register_forward_hook(lambda module, args, value: seen.append(value))
    z, pattern = attend(problem_of(compose, *inputs()), "single")
    handle.remove()
    assert torch.equal(seen[0], pattern)
    without, nothing = attend(problem_of(compose, *inputs()), "single")
    assert nothing is None
    assert (z - without).abs().max() < 1e-12


def test_it_is_known_by_its_name():
    assert BACKENDS["single"] is single.single
    assert STAGES == ("pre", "post")  # `single` says both by name
