"""One query without keys and values against the attention of all queries, in float64, with maps far from the identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headlab.dcmha import BRANCHES, Compose, scaled
from headlab.dcmha.branches import PLACES, SITES, STAGES
from synthetic_tasks.probes import one_query
from synthetic_tasks.probes.models import KINDS, ProbeAttention, ProbeConfig

BATCH, KEYS, HEADS, D_HEAD, WIDTH = 2, 7, 3, 5, 11
OPTIONS = {kind: options for kind, options in KINDS.items() if isinstance(options, Mapping)}


def build(seed: int = 0, **options: Any) -> ProbeAttention:
    config = ProbeConfig("mha", hidden_size=WIDTH, num_attention_heads=HEADS, head_dim=D_HEAD)
    attention = ProbeAttention(config, 0)
    attention.compose = Compose(WIDTH, HEADS, **options)
    generator = torch.Generator().manual_seed(seed)
    for p in attention.parameters():
        p.data = 0.9 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return attention


def tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn((BATCH, KEYS, WIDTH), generator=generator, dtype=torch.float64).requires_grad_()


def fits(attention: ProbeAttention) -> bool:
    return one_query.fits(attention.compose, attention.k_proj, attention.v_proj)


def assert_as_all_queries(attention: ProbeAttention, seed: int = 0) -> None:
    assert fits(attention)
    found = []
    for compute in (lambda x: attention(x, last=True), lambda x: attention(x)[:, -1:]):
        x = tokens(seed)
        attention.zero_grad()
        out = compute(x)
        assert out.shape == (BATCH, 1, WIDTH)
        out.square().sum().backward()
        wanted = [x, *attention.parameters()]
        found.append([out.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in wanted)])
    largest = max(float(part.abs().max()) for part in found[1])
    for mine, other in zip(*found, strict=True):
        assert (mine - other).abs().max() < 1e-11 * max(1, largest)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_computes_what_all_queries_do(kind: str, residual: bool) -> None:
    for seed in range(5):
        assert_as_all_queries(build(seed, residual=residual, **OPTIONS[kind]), seed)


@settings(max_examples=60)
@given(
    places=st.lists(st.sampled_from(PLACES), unique=True),
    rank=st.integers(1, HEADS),
    scale=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_branches_at_any_scale(places: list[str], rank: int, scale: float, seed: int) -> None:
    attention = build(seed, branches=places, rank=rank)
    with scaled(attention, **dict.fromkeys(places[:2], scale)):
        assert_as_all_queries(attention, seed)


@pytest.mark.parametrize("place", PLACES)
def test_every_scale_counts(place: str) -> None:
    attention = build(branches=BRANCHES)
    x = tokens()
    before = attention(x, last=True)
    with scaled(attention, **{place: 0.5}):
        assert (attention(x, last=True) - before).abs().max() > 1e-4


def test_the_last_query_goes_that_way_and_is_the_same_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = build(branches=BRANCHES), tokens()
    used = []
    nothing = torch.zeros(BATCH, HEADS, D_HEAD, dtype=torch.float64)
    monkeypatch.setattr(one_query, "attended", lambda *given: used.append(1) or nothing)
    assert attention(x, last=True).abs().max() == 0
    assert used == [1]
    assert attention(x).shape == (BATCH, KEYS, WIDTH)
    assert used == [1]
    with attention.k_proj.register_forward_hook(lambda *_: None):  # who listens is not passed by
        assert torch.equal(attention(x, last=True), attention(x)[:, -1:])


@pytest.mark.parametrize("site", [site for site in SITES if site != "output"])
def test_gates_do_not_fit(site: str) -> None:
    attention = build(branches=BRANCHES)
    with attention.compose.sites[site].register_forward_hook(lambda *_: None):
        assert not fits(attention)
    assert fits(attention)


@pytest.mark.parametrize("name", ["scores_raw", "scores", "pattern_raw", "pattern", "pre_query_w1", "post_base"])
def test_who_listens_does_not_fit(name: str) -> None:
    attention = build(branches=BRANCHES)
    with attention.compose.taps[name].register_forward_hook(lambda *_: None):
        assert not fits(attention)
    with attention.compose.register_forward_hook(lambda *_: None):
        assert not fits(attention)
    assert fits(attention)


def test_gates_on_the_output_are_heard() -> None:
    attention, x = build(branches=BRANCHES), tokens()
    gates = torch.arange(HEADS * D_HEAD, dtype=torch.float64)
    with attention.o_proj.register_forward_pre_hook(lambda _, given: (given[0] * gates,)):
        assert fits(attention)
        assert torch.allclose(attention(x, last=True), attention(x)[:, -1:], rtol=1e-11)


@pytest.mark.parametrize("what", ["scores", "probabilities", "output"])
def test_pruned_heads_do_not_fit(what: str) -> None:
    attention = build(branches=BRANCHES)
    heads = {name: list(range(HEADS)) for name in ("scores", "probabilities", "output")} | {what: [0, 2]}
    attention.compose.narrow(heads, attention.compose.places)
    assert not fits(attention)


def test_groups_do_not_fit() -> None:
    assert not fits(build(branches=BRANCHES, groups=HEADS, rank=1))


def test_stages_are_not_mixed_up() -> None:
    for stage in STAGES:
        assert_as_all_queries(build(3, branches=BRANCHES, stages=(stage,)), 3)
