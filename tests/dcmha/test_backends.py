"""Attention with composed heads: the backends against each other, against gradients by differences, and what is visible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headlab.dcmha import backends
from headlab.dcmha.backends import Problem, Visible, attend
from headlab.dcmha.branches import BRANCHES, SITES
from headlab.dcmha.compose import Compose, Side, scaled
from headlab.errors import HeadlabError

BATCH, HEADS, D_HEAD, D_VALUE, WIDTH = 2, 6, 5, 3, 7
BACKENDS = pytest.mark.parametrize("backend", ["eager", "chunked"])


def problem(
    n_queries: int,
    n_keys: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    options: dict | None = None,
    **others,
) -> tuple[Problem, dict[str, Tensor]]:
    """A layer's attention, and the leaves that it depends on: q, k, v, the tokens and the weights of the maps."""
    n_keys = n_queries if n_keys is None else n_keys
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    compose = Compose(WIDTH, HEADS, **{"branches": BRANCHES, "groups": 2, "hidden": 3} | (options or {})).to(dtype)
    for parameter in compose.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    leaves = {
        "q": leaf(BATCH, HEADS, n_queries, D_HEAD), "k": leaf(BATCH, HEADS, n_keys, D_HEAD),
        "v": leaf(BATCH, HEADS, n_keys, D_VALUE),
        "queries": leaf(BATCH, n_queries, WIDTH), "keys": leaf(BATCH, n_keys, WIDTH),
        **dict(compose.named_parameters()),
    }  # fmt: skip
    return with_leaves(compose, leaves, **others), leaves


def with_leaves(compose: Compose, leaves: dict[str, Tensor], **others) -> Problem:
    gates = others.pop("gates", compose.gates(leaves["queries"]))
    return Problem(
        q=leaves["q"], k=leaves["k"], v=leaves["v"], compose=compose, query=compose(leaves["queries"]),
        key=compose(leaves["keys"]), gates=gates, visible=others.pop("visible", Visible()), scale=D_HEAD**-0.5, **others,
    )  # fmt: skip


def result(task: Problem, leaves: dict[str, Tensor], backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """z and the gradients of a random sum of it."""
    z, _ = attend(task, backend)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad((z * weights).sum() / z.shape[1] ** 0.5, wanted.values())
    return z.detach(), dict(zip(wanted, gradients, strict=True))


def assert_backends_agree(make, *args, unused: Sequence[str] = (), **kwargs) -> Tensor:
    outcomes = []
    for backend in ("eager", "chunked"):
        task, leaves = make(*args, **kwargs)
        outcomes.append(result(task, leaves, backend))
    (z, gradients), (other, others) = outcomes
    torch.testing.assert_close(other, z, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        size = gradient.abs().max().item()
        assert size > 0 or (name in unused), name
        assert (others[name] - gradient).abs().max() <= 1e-5 * max(1, size), name
    return z


# --- what a query sees


@settings(max_examples=200)
@given(data=st.data())
def test_blocks_show_every_query_its_keys_and_no_others(data):
    n_keys = data.draw(st.integers(1, 9), "keys")
    past = data.draw(st.integers(0, n_keys - 1), "past")
    n_queries = n_keys - past
    start = data.draw(st.integers(0, n_queries - 1), "start")
    stop = data.draw(st.integers(start + 1, n_queries), "stop")
    causal = data.draw(st.booleans(), "causal")
    window = data.draw(st.none() | st.integers(1, 10), "window")
    flags = st.lists(st.booleans(), min_size=n_keys * BATCH, max_size=n_keys * BATCH)
    real = data.draw(st.none() | flags.map(lambda x: torch.tensor(x).view(BATCH, n_keys)), "real")
    many = st.lists(st.booleans(), min_size=BATCH * n_queries * n_keys, max_size=BATCH * n_queries * n_keys)
    seen = data.draw(st.none() | many.map(lambda x: torch.tensor(x).view(BATCH, 1, n_queries, n_keys)), "seen")
    as_tensor = data.draw(st.booleans(), "tensor")

    visible = Visible(torch.tensor(past) if as_tensor else past, causal, window, real, seen)
    keys, mask = visible.block(start, stop, n_keys, torch.device("cpu"))
    for b in range(BATCH):
        for t in range(start, stop):
            for j in range(n_keys):
                sees = (not causal or j <= past + t) and (window is None or past + t - j < window)
                sees = sees and (real is None or bool(real[b, j])) and (seen is None or bool(seen[b, 0, t, j]))
                found = keys.start <= j < keys.stop
                if found and mask is not None:
                    found = bool(mask.expand(BATCH, 1, stop - start, -1)[b, 0, t - start, j - keys.start])
                assert found == sees, (b, t, j)
    if not as_tensor and causal and window is not None:
        assert keys.stop - keys.start <= window + stop - start - 1  # a local layer looks at no more keys than it needs


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    for backend in ("eager", "chunked"):
        real = torch.tensor([[False] * 3 + [True] * 4, [True] * 7])
        task, leaves = problem(7, visible=Visible(real=real))
        z, gradients = result(task, leaves, backend)
        assert torch.equal(z[0, :3], torch.zeros(3, HEADS, D_VALUE))
        assert (z[0, 3:] != 0).all()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert not gradients["k"][0, :, :3].any()  # padding has no influence
        assert not gradients["v"][0, :, :3].any()


def test_composed_patterns_stay_zero_where_nothing_is_seen():
    task, _ = problem(7, visible=Visible(window=3))
    _, pattern = attend(task)
    assert pattern.shape == (BATCH, HEADS, 7, 7)
    distance = torch.arange(7)[:, None] - torch.arange(7)
    unseen = (distance < 0) | (distance >= 3)
    assert not pattern[:, :, unseen].any()
    assert (pattern[:, :, ~unseen] != 0).all()
    assert not torch.allclose(pattern.sum(-1), torch.ones(BATCH, HEADS, 7))  # rows need not sum to 1 any more


# --- the backends agree


@pytest.mark.parametrize("window", [None, 1, 40, 150])
@pytest.mark.parametrize("n_pos", [11, 128, 129, 300])
def test_chunked_equals_eager(n_pos, window):
    # alone with one key, a query gives it all it has, whatever the scores
    unused = ["q", "k"] if window == 1 else []
    assert_backends_agree(problem, n_pos, visible=Visible(window=window), unused=unused)


@pytest.mark.parametrize("options", [{"stages": ()}, {"stages": ("post",), "branches": ["query"]}, {"residual": False}])
def test_chunked_equals_eager_for_other_maps(options):
    def make():
        task, leaves = problem(131, options=options)
        plain, query_only = options.get("stages") == (), options.get("branches") == ["query"]
        without = ("queries", "keys") if plain else ("keys",) if query_only else ()
        return task, {name: leaf for name, leaf in leaves.items() if name not in without}

    assert_backends_agree(make)


@pytest.mark.parametrize("side", ["left", "right"])
def test_chunked_equals_eager_with_padding(side):
    real = torch.ones(BATCH, 150, dtype=torch.bool)
    real[1, :31] = False
    z = assert_backends_agree(problem, 150, visible=Visible(window=60, real=real if side == "left" else real.flip(1)))
    if side == "left":
        assert not z[1, :31].any()


def test_chunked_equals_eager_after_a_past_and_with_other_masks():
    assert_backends_agree(problem, 140, 201, visible=Visible(past=61, window=77))
    assert_backends_agree(problem, 140, 201, visible=Visible(past=torch.tensor(61), window=77))
    assert_backends_agree(problem, 133, 17, visible=Visible(causal=False))  # cross-attention
    seen = torch.rand(BATCH, HEADS, 133, 133, generator=torch.Generator().manual_seed(0)) < 0.4
    assert_backends_agree(problem, 133, visible=Visible(causal=False, seen=seen))
    assert_backends_agree(problem, 133, visible=Visible(causal=False, window=20))


def test_chunked_equals_eager_with_gates_at_every_site():
    def make():
        compose_task, leaves = problem(150)
        compose = compose_task.compose
        generator = torch.Generator().manual_seed(2)
        factors = {
            site: torch.rand(BATCH, 150, len(compose.heads_at(site)), 1, generator=generator).requires_grad_()
            for site in compose.sites
        }
        handles = [
            compose.sites[site].register_forward_hook(lambda module, args, ones, gate=gate: ones * gate)
            for site, gate in factors.items()
        ]
        task = with_leaves(compose, leaves, visible=Visible(window=99))
        for handle in handles:
            handle.remove()
        assert set(task.gates) == set(SITES) - {"head"}
        return task, leaves | {f"gate {site}": gate for site, gate in factors.items()}

    gated = assert_backends_agree(make)
    assert not torch.allclose(gated, attend(problem(150, visible=Visible(window=99))[0])[0])


@BACKENDS
def test_gates_act_on_scores_probabilities_and_outputs(backend):
    task, leaves = problem(140)
    gates = {site: torch.rand(BATCH, HEADS, 140, 1) for site in ("scores", "probabilities", "output")}
    raw = task.q @ task.k.transpose(-1, -2) * D_HEAD**-0.5 * gates["scores"]
    scores = task.compose.mix("pre", raw, task.query["pre_query"], task.key["pre_key"])
    unseen = torch.ones(140, 140, dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(unseen, -torch.inf).softmax(-1) * gates["probabilities"]
    mixed = task.compose.mix("post", pattern, task.query["post_query"], task.key["post_key"])
    expected = (mixed @ leaves["v"] * gates["output"]).transpose(1, 2)
    torch.testing.assert_close(attend(replace(task, gates=gates), backend)[0], expected, rtol=1e-5, atol=1e-5)


def test_chunked_equals_eager_where_heads_are_pruned():
    kept = {"scores": [0, 1, 4], "probabilities": [1, 2, 5], "output": [0, 3, 4, 5]}

    def make():
        task, leaves = problem(133)
        task.compose.narrow(kept, [place for place in task.compose.places if place != "pre_key"])
        leaves |= dict(task.compose.named_parameters())
        leaves |= {name: leaves[name].detach()[:, :3].clone().requires_grad_() for name in "qk"}
        leaves |= {"v": leaves["v"].detach()[:, :4].clone().requires_grad_()}
        return with_leaves(task.compose, leaves, visible=Visible(window=50)), leaves

    z = assert_backends_agree(make)
    assert z.shape == (BATCH, 133, 4, D_VALUE)


# --- gradients


@BACKENDS
def test_gradients_by_differences(backend, monkeypatch):
    monkeypatch.setattr(backends, "BLOCK", 2)
    task, leaves = problem(3, 4, torch.float64, options={"rank": 1, "hidden": 2})
    real = torch.tensor([[False, True, True, True], [True] * 4])
    gate = torch.rand(BATCH, HEADS, 3, 1, dtype=torch.float64, requires_grad=True)
    names = list(leaves)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.compose = task.compose

        def forward(self, gate: Tensor, given: dict[str, Tensor]) -> Tensor:
            gates = {"scores": gate, "post_key": gate, "output": gate}
            visible = Visible(past=1, window=3, real=real)
            return attend(with_leaves(self.compose, given, gates=gates, visible=visible), backend)[0]

    def function(gate: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        weights = {f"compose.{name}": value for name, value in given.items() if name.endswith("weight")}
        return torch.func.functional_call(Layer(), weights, (gate, given))

    values = gate, *(leaves[name] for name in names)
    assert len(values) == 10
    assert torch.autograd.gradcheck(function, values, atol=1e-6, fast_mode=True)


def test_blocks_computed_again_see_the_scales_and_hooks_of_their_forward_pass():
    plain, leaves = problem(200)
    compose = plain.compose
    gradients = {}
    for backend in ("eager", "chunked"):
        handle = compose.taps["pre_base"].register_forward_hook(lambda module, args, value: value * 3)
        with scaled(nn.ModuleList([compose]), pre_query=0.25, post_key=0, post_base=0.5):
            z, _ = attend(with_leaves(compose, leaves), backend)
        handle.remove()
        gradients[backend] = torch.autograd.grad(z.square().sum() / 100, leaves.values())
    for name, mine, theirs in zip(leaves, gradients["eager"], gradients["chunked"], strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@BACKENDS
def test_dropout_drops_the_same_in_the_gradient(backend):
    task, leaves = problem(150, dropout=0.4)
    z, _ = attend(task, backend)
    assert not torch.allclose(z, attend(replace(task, dropout=0.0), backend)[0])
    weights = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((z * weights).sum(), leaves["v"])
    # z is linear in v, and its gradient at this draw gives it back
    torch.testing.assert_close((gradient * leaves["v"]).sum(), (z * weights).sum(), rtol=1e-4, atol=1e-3)


def test_chunked_keeps_nothing_of_the_size_of_a_pattern_for_the_backward_pass():
    def kept(n_pos: int, backend: str) -> list[int]:
        sizes: dict[int, int] = {}
        task, _ = problem(n_pos)

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attend(task, backend)
        return list(sizes.values())

    n = 4 * backends.BLOCK
    assert max(kept(n, "eager")) >= BATCH * HEADS * n * n
    assert max(kept(n, "chunked")) < BATCH * HEADS * n * backends.BLOCK
    assert sum(kept(2 * n, "chunked")) <= 2.2 * sum(kept(n, "chunked"))


# --- taps, patterns, errors


def test_taps_see_everything_and_their_edits_count_in_either_backend():
    task, leaves = problem(140, visible=Visible(window=70))
    seen: dict[str, Tensor] = {}
    for name in ("scores_raw", "scores", "pattern_raw", "pattern"):
        handle = task.compose.taps[name].register_forward_hook(
            lambda module, args, value, name=name: seen.update({name: value})
        )
        z, _ = attend(task, "chunked")  # as a whole all the same
        handle.remove()
        assert seen[name].shape == (BATCH, HEADS, 140, 140)
        handle = task.compose.taps[name].register_forward_hook(lambda module, args, value: value * 0.5)
        for backend in ("eager", "chunked"):
            assert (attend(task, backend)[0] - z).abs().max() > 1e-3
        handle.remove()
    raw = task.q @ task.k.transpose(-1, -2) * D_HEAD**-0.5
    torch.testing.assert_close(seen["scores_raw"], raw)
    mixed = task.compose.mix("pre", raw, task.query["pre_query"], task.key["pre_key"])
    torch.testing.assert_close(seen["scores"], mixed)
    distance = torch.arange(140)[:, None] - torch.arange(140)
    pattern = mixed.masked_fill((distance < 0) | (distance >= 70), -torch.inf).softmax(-1)
    torch.testing.assert_close(seen["pattern_raw"], pattern)
    mixed = task.compose.mix("post", pattern, task.query["post_query"], task.key["post_key"])
    torch.testing.assert_close(seen["pattern"], mixed)
    torch.testing.assert_close(attend(task)[0], (mixed @ leaves["v"]).transpose(1, 2))


def test_only_eager_has_a_pattern():
    task, _ = problem(7)
    assert attend(task, "eager")[1] is not None
    assert attend(task, "chunked")[1] is None
    assert attend(task)[0].shape == (BATCH, 7, HEADS, D_VALUE)


def test_without_composition_this_is_ordinary_attention():
    task, leaves = problem(150, options={"stages": ()})
    expected = nn.functional.scaled_dot_product_attention(leaves["q"], leaves["k"], leaves["v"], is_causal=True)
    for backend in ("eager", "chunked"):
        torch.testing.assert_close(attend(task, backend)[0], expected.transpose(1, 2))


def test_half_precision_gives_half_precision():
    exact, leaves = problem(150)
    half = {name: leaf.detach().bfloat16() for name, leaf in leaves.items()}
    compose = problem(150)[0].compose.bfloat16()
    for backend in ("eager", "chunked"):
        z, _ = attend(with_leaves(compose, half), backend)
        assert z.dtype == torch.bfloat16
        assert (z.float() - attend(exact, backend)[0]).abs().mean() < 0.02


def test_an_unknown_backend():
    task, _ = problem(7)
    with pytest.raises(HeadlabError, match="one of 'eager', 'chunked', not 'flash'"):
        attend(task, "flash")


def test_a_side_at_some_positions():
    side = Side(gate=torch.arange(24.0).view(2, 4, 3))
    assert side.at(slice(1, 3)).gate.shape == (2, 2, 3)
    assert torch.equal(side.at(torch.tensor([3, 0])).gate, side.gate[:, [3, 0]])
    assert side.at(slice(1)).w1 is None
