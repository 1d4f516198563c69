from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge

import headlab as hl
from headlab.dcmha import BRANCHES, DCFormerConfig, DCFormerForCausalLM, DCPythiaConfig, DCPythiaForCausalLM, backends
from headlab.dcmha import bridge as module
from headlab.dcmha.compose import Side
from headlab.models import access

BATCH, POS, HEADS, D_HEAD, D_MODEL, LAYERS, VOCAB = 3, 7, 6, 10, 37, 2, 101
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "head_dim": D_HEAD, "max_position_embeddings": 61, "window_size": 4, "pad_token_id": 0,
}  # fmt: skip
_FORMER = _COMMON | {"intermediate_size": 55}
_PYTHIA = _COMMON | {"intermediate_size": 53, "rotary_pct": 0.4}
CASES: dict[str, Callable[[], Any]] = {
    "mha": lambda: DCFormerConfig(**_FORMER, compose={"branches": BRANCHES}),
    "gqa": lambda: DCFormerConfig(
        **_FORMER, num_key_value_heads=3, use_qk_norm=True, mgate=True, mgate_dim=11,
        compose={"groups": 2, "rank": 3, "hidden": 13},
    ),
    "mqa": lambda: DCFormerConfig(
        **_FORMER, num_key_value_heads=1, compose={"rank": 1, "branches": ["query", "query_gate"]}, tie_word_embeddings=True
    ),
    "plain": lambda: DCFormerConfig(**_FORMER, num_key_value_heads=2, compose=None),
    "parallel": lambda: DCPythiaConfig(**_PYTHIA),
    "sequential": lambda: DCPythiaConfig(
        **_PYTHIA, use_parallel_residual=False, use_qk_norm=True, num_key_value_heads=2,
        compose={"branches": BRANCHES, "groups": 3},
    ),
    "unbiased": lambda: DCPythiaConfig(
        **_PYTHIA, use_linear_bias=False, compose={"branches": ["base", "key"], "residual": False}
    ),
    "plain-pythia": lambda: DCPythiaConfig(**_PYTHIA, use_parallel_residual=False, compose=None),
}  # fmt: skip
ALL = list(CASES)
COMPOSED = [case for case in ALL if not case.startswith("plain")]


def build(case: str, seed: int = 0) -> Any:
    """The model, with maps far from the identity; every bias and gain differs from its initial value."""
    config = CASES[case]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (DCFormerForCausalLM if config.model_type == "dcformer" else DCPythiaForCausalLM)(config)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 0.15 * noise if parameter.ndim > 1 else parameter.data + 0.2 * noise
    model.tie_weights()
    return model.eval()


@cache
def pair(case: str) -> tuple[Any, Any]:
    """A model and its bridge, which no test changes for good."""
    model = build(case)
    return model, hl.bridge(model)


def ids(n_pos: int = POS) -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, n_pos), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, tokens: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return access.bare_model(model)(ids() if tokens is None else tokens, **kwargs).logits


def off(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def same(a: Tensor, b: Tensor, within: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=within, atol=within)


def cached(bridge: Any, tokens: Tensor | None = None, **kwargs: Any) -> Any:
    with torch.no_grad():
        return bridge.run_with_cache(ids() if tokens is None else tokens, **kwargs)[1]


# --- the same model


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_are_the_plain_model_s(case: str, padding: str) -> None:
    model, bridge = pair(case)
    mask = torch.ones(BATCH, POS, dtype=torch.long)
    if padding != "none":
        mask[1, :3] = 0
        mask = mask if padding == "left" else mask.flip(1)
    expected = logits(model, attention_mask=mask)
    assert same(logits(bridge, attention_mask=mask), expected, 1e-6)
    with torch.no_grad():
        given = bridge(ids(), attention_mask=mask)  # TransformerLens counts positions from the first real token
    assert same(given[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["mha", "sequential"])
def test_other_dtypes(case: str, dtype: torch.dtype) -> None:
    model = build(case).to(dtype)
    bridge = hl.bridge(model)
    expected = logits(model)
    assert expected.dtype == dtype
    assert torch.equal(logits(bridge), expected)
    bridge.enable_compatibility_mode()
    assert {p.dtype for p in bridge.parameters()} == {dtype}
    found = logits(bridge)
    assert found.dtype == dtype
    assert same(found.log_softmax(-1), expected.log_softmax(-1), 1e-4 if dtype == torch.float64 else 0.2)


@pytest.mark.parametrize("case", ["gqa", "parallel"])
@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_generation(case: str, use_past_kv_cache: bool) -> None:
    model, bridge = pair(case)
    prompt = ids(5)
    expected = model.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=None)
    found = bridge.generate(
        prompt, max_new_tokens=9, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False,
        use_past_kv_cache=use_past_kv_cache,
    )  # fmt: skip
    assert found.tolist() == expected.tolist()


def test_a_hook_is_live_in_cached_generation() -> None:
    model, bridge = pair("mha")
    seen = []

    def edit(factor: Tensor, hook: Any) -> Tensor:
        seen.append(factor.shape[1])
        return factor * 0

    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    name = "blocks.1.attn.hook_post_key_w2"
    with bridge.hooks([(name, edit)]):
        found = bridge.generate(ids(5), **options)
    assert seen == [5, 1, 1, 1]
    silenced = copy.deepcopy(model)
    silenced.model.layers[1].self_attn.compose.silence("post_key", range(HEADS))
    expected = silenced.generate(ids(5), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert found.tolist() == expected.tolist()
    assert same(bridge.run_with_hooks(ids(), fwd_hooks=[(name, edit)]), logits(silenced))


# --- hook points


def expected_shapes(case: str) -> dict[str, tuple[int, ...]]:
    """The hook points of scores, patterns and maps in a layer, spelled out."""
    config = CASES[case]()
    whole = ("hook_attn_scores_raw", "hook_attn_scores", "hook_pattern_raw", "hook_pattern")
    table: dict[str, tuple[int, ...]] = dict.fromkeys(whole, (BATCH, HEADS, POS, POS))
    if config.compose is None:
        return table
    rank = config.compose.get("rank", 2)
    for stage in config.compose.get("stages", ["pre", "post"]):
        for branch in config.compose["branches"]:
            name = f"hook_{stage}_{branch}"
            if branch == "base":
                table[name] = (HEADS, HEADS)
            elif branch.endswith("gate"):
                table[name] = (BATCH, POS, HEADS)
            else:
                table[f"{name}_w1"] = table[f"{name}_w2"] = (BATCH, POS, rank, HEADS)
    return table


@pytest.mark.parametrize("case", ALL)
def test_every_hook_point_and_its_shape(case: str) -> None:
    _, bridge = pair(case)
    cache = cached(bridge)
    gated = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_result", "hook_mlp_in")
    assert [name for name in bridge.hook_dict if name not in cache and not name.endswith(gated)] == []
    for layer in range(LAYERS):
        table = expected_shapes(case)
        assert {name: tuple(cache[f"blocks.{layer}.attn.{name}"].shape) for name in table} == table
        factors = [f"blocks.{layer}.attn.hook_{stage}_" for stage in ("pre", "post")]
        assert sum(name.startswith(tuple(factors)) for name in cache) == len(table) - 4
    assert ("blocks.1.hook_resid_mid" in cache) == (case not in ("parallel", "unbiased"))  # elsewhere there is none
    n_kv = bridge.original_model.config.num_key_value_heads
    assert cache["blocks.0.attn.hook_q"].shape == cache["blocks.0.attn.hook_z"].shape == (BATCH, POS, HEADS, D_HEAD)
    assert cache["blocks.0.attn.hook_k"].shape == cache["blocks.0.attn.hook_v"].shape == (BATCH, POS, n_kv, D_HEAD)


@pytest.mark.parametrize("case", COMPOSED)
def test_hook_points_have_what_goes_through_the_taps(case: str) -> None:
    model, bridge = pair(case)
    cache = cached(bridge)
    found: dict[str, Tensor] = {}
    handles = []
    for layer, block in enumerate(model.model.layers):
        for tap, part in block.self_attn.compose.taps.items():
            name = f"blocks.{layer}.attn.hook_{'attn_' if tap in ('scores_raw', 'scores') else ''}{tap}"
            handles.append(part.register_forward_hook(lambda _, __, out, name=name: found.update({name: out})))
    logits(model)
    for handle in handles:
        handle.remove()
    assert len(found) == LAYERS * len(expected_shapes(case))
    for name, value in found.items():
        assert same(cache[name], value, 1e-6), name


def test_factors_make_the_maps() -> None:
    """Composed tensors out of raw ones and factors, a matrix per query and key."""
    _, bridge = pair("mha")
    cache = {name.removeprefix("blocks.1.attn.hook_"): value.double() for name, value in cached(bridge).items()}
    raw_and_composed = {"pre": ("attn_scores_raw", "attn_scores"), "post": ("pattern_raw", "pattern")}
    for stage, (before, after) in raw_and_composed.items():
        for batch in range(BATCH):
            for i in range(POS):
                for j in range(i + 1):
                    c = torch.eye(HEADS, dtype=torch.float64) + cache[f"{stage}_base"]
                    for side, pos in (("query", i), ("key", j)):
                        w1, w2 = (cache[f"{stage}_{side}_w{n}"][batch, pos] for n in (1, 2))
                        for r in range(2):
                            c = c + w1[r][:, None] * w2[r][None, :]
                        c = c + torch.diag(cache[f"{stage}_{side}_gate"][batch, pos])
                    assert same(cache[before][batch, :, i, j] @ c, cache[after][batch, :, i, j], 1e-5)


@pytest.mark.filterwarnings("ignore:A forward hook edited")
@pytest.mark.parametrize("case", ALL)
def test_every_hook_is_live(case: str) -> None:
    model, bridge = pair(case)
    generator = torch.Generator().manual_seed(0)

    def edit(x: Tensor, hook: Any) -> Tensor:
        return x * 1.5 + 0.1 * torch.randn(x.shape, generator=generator)

    before = logits(model)
    names = [name for name in cached(bridge) if name.startswith("blocks.1.")]
    assert len(names) > 35
    if case not in ("gqa", "parallel"):  # others have no further kinds of hook points
        names = [f"blocks.1.attn.{name}" for name in expected_shapes(case)]
    for name in names:
        with torch.no_grad():
            after = bridge.run_with_hooks(ids(), fwd_hooks=[(name, edit)])
        assert off(after, before) > 1e-3, name
    assert torch.equal(logits(bridge), logits(model))


def test_edits_are_the_tensors_the_model_goes_on_with() -> None:
    """Another model's pattern, put in, gives what it would carry; a head's scores of zero leave every composed head."""
    model, bridge = pair("mha")
    cache = cached(bridge)
    other = torch.rand(BATCH, HEADS, POS, POS, generator=torch.Generator().manual_seed(2))
    z: list[Tensor] = []
    with torch.no_grad():
        bridge.run_with_hooks(
            ids(),
            fwd_hooks=[
                ("blocks.1.attn.hook_pattern", lambda pattern, hook: other),
                ("blocks.1.attn.hook_z", lambda value, hook: z.append(value)),
            ],
        )
    v = cache["blocks.1.attn.hook_v"].transpose(1, 2)  # [batch, head, key, d_head]
    assert same(z[0], (other @ v).transpose(1, 2))
    composed: list[Tensor] = []

    def zero(scores: Tensor, hook: Any) -> Tensor:
        return scores.index_fill(1, torch.tensor([4]), 0)

    with torch.no_grad():
        bridge.run_with_hooks(
            ids(),
            fwd_hooks=[
                ("blocks.1.attn.hook_attn_scores_raw", zero),
                ("blocks.1.attn.hook_attn_scores", lambda value, hook: composed.append(value)),
            ],
        )
    factors = {name.removeprefix("blocks.1.attn.hook_pre_"): value for name, value in cache.items()}
    sides = (Side(*(factors[f"{side}_{part}"] for part in ("w1", "w2", "gate"))) for side in ("query", "key"))
    raw = zero(cache["blocks.1.attn.hook_attn_scores_raw"], None)
    with torch.no_grad():
        assert same(composed[0], model.model.layers[1].self_attn.compose.mix("pre", raw, *sides))


def test_gradients_at_hook_points() -> None:
    _, bridge = pair("mha")
    names = [f"blocks.1.attn.{name}" for name in expected_shapes("mha")]
    _, cache = bridge.run_with_cache(ids(), return_type="loss", incl_bwd=True, names_filter=names)
    bridge.zero_grad()
    for name in expected_shapes("mha"):
        gradient = cache[f"blocks.1.attn.{name}_grad"]
        assert gradient.shape == cache[f"blocks.1.attn.{name}"].shape
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("name", ["hook_pattern_raw", "hook_post_base", "hook_pre_key_gate", "hook_pre_query_w1"])
def test_a_hook_on_gradients_alone(name: str) -> None:
    _, bridge = pair("mha")
    gradients: list[Tensor] = []
    with bridge.hooks(bwd_hooks=[(f"blocks.1.attn.{name}", lambda gradient, hook: gradients.append(gradient))]):
        bridge(ids(), return_type="loss").backward()
    bridge.zero_grad()
    assert [tuple(gradient.shape) for gradient in gradients] == [expected_shapes("mha")[name]]


def test_slices_of_positions() -> None:
    _, bridge = pair("gqa")
    whole, last = cached(bridge), cached(bridge, pos_slice=slice(4, 6))
    assert last.keys() == whole.keys()
    for name, value in last.items():
        point = name.rsplit(".", 1)[-1]
        by_head = point.startswith(("hook_attn_scores", "hook_pattern", "hook_cos", "hook_sin")) or "_norm" in name
        axis = 2 if ".attn." in name and by_head else 1
        assert torch.equal(value, whole[name].narrow(axis, 4, 2)), name


# --- memory: nothing is connected unless somebody listens


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    for name, backend in list(backends.BACKENDS.items()):

        def counted(problem: Any, name: str = name, backend: Any = backend) -> Any:
            made.append(name)
            return backend(problem)

        monkeypatch.setitem(backends.BACKENDS, name, counted)
    return made


def test_only_listening_makes_attention_eager(calls: list[str]) -> None:
    model = build("mha")
    model.config.backend = "chunked"
    bridge = hl.bridge(model)
    calls.clear()
    expected = logits(bridge)
    assert calls == ["chunked"] * LAYERS
    calls.clear()
    light = ["blocks.1.attn.hook_z", "blocks.1.attn.hook_pre_query_w1", "blocks.1.attn.hook_q"]
    assert set(light) <= set(cached(bridge, names_filter=light))
    assert calls == ["chunked"] * LAYERS
    for name in ("hook_pattern", "hook_attn_scores_raw", "hook_post_base"):
        calls.clear()
        found = cached(bridge, names_filter=f"blocks.1.attn.{name}")
        assert found[f"blocks.1.attn.{name}"].shape == expected_shapes("mha")[name]
        assert calls == ["chunked", "eager"]
    calls.clear()
    assert torch.equal(logits(bridge), expected)
    assert calls == ["chunked"] * LAYERS


@pytest.mark.parametrize("name", ["hook_pre_base", "hook_post_key_w2", "hook_attn_scores"])
@pytest.mark.parametrize("how", ["chunked", "checkpointed"])
def test_edits_and_gradients_where_layers_are_computed_again(monkeypatch: pytest.MonkeyPatch, name: str, how: str) -> None:
    monkeypatch.setattr(backends, "BLOCK", 3)
    gradients = []
    for again in (False, True):
        model = build("mha").double()
        if again and how == "chunked":
            model.config.backend = "chunked"
        bridge = hl.bridge(model)
        if again and how == "checkpointed":
            hf_model = bridge.original_model
            getattr(hf_model, "activation_checkpointing_enable", hf_model.gradient_checkpointing_enable)()
        bridge.train()
        hooks = [(f"blocks.1.attn.{name}", lambda x, hook: x * 1.5)]
        with bridge.hooks(hooks):
            bridge.original_model(ids(), labels=ids(), use_cache=False).loss.backward()
        gradients.append({key: value.grad for key, value in bridge.original_model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        assert same(gradients[1][key], value, 1e-12), key


# --- weights, head by head


@pytest.mark.parametrize("case", ALL)
def test_circuits_of_every_head(case: str) -> None:
    model, bridge = pair(case)
    ratio = HEADS // model.config.num_key_value_heads
    for layer, block in enumerate(model.model.layers):
        attn = block.self_attn
        for head in range(HEADS):
            rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
            kv = head // ratio
            shared = slice(kv * D_HEAD, (kv + 1) * D_HEAD)
            w_q, w_o = attn.q_proj.weight[rows].T, attn.o_proj.weight[:, rows].T
            w_k, w_v = attn.k_proj.weight[shared].T, attn.v_proj.weight[shared].T
            for found, expected in (
                (bridge.W_Q[layer, head], w_q), (bridge.W_K[layer, kv], w_k), (bridge.W_V[layer, kv], w_v),
                (bridge.W_O[layer, head], w_o), (bridge.QK[layer, head].AB, w_q @ w_k.T),
                (bridge.OV[layer, head].AB, w_v @ w_o),
            ):  # fmt: skip
                assert same(found, expected, 1e-5)
            if attn.q_proj.bias is not None:
                assert torch.equal(bridge.blocks[layer].attn.b_Q[head], attn.q_proj.bias[rows])


@pytest.mark.parametrize("case", ["gqa", "parallel"])
def test_composition_scores_of_transformer_lens(case: str) -> None:
    _, bridge = pair(case)
    scores = bridge.all_composition_scores("K").scores
    assert scores.shape == (LAYERS, HEADS, LAYERS, HEADS)
    ov, qk = bridge.OV[0, 4].AB, bridge.QK[1, 1].AB
    assert scores[0, 4, 1, 1].item() == pytest.approx((ov @ qk.T).norm().item() / (ov.norm() * qk.norm()).item(), rel=1e-4)


@pytest.mark.parametrize("case", ALL)
def test_results_of_heads_sum_to_the_output(case: str) -> None:
    model, _ = pair(case)
    bridge = hl.bridge(model)
    before = cached(bridge)
    stacked = before.stack_head_results().unflatten(0, (LAYERS, HEADS))  # [layer, head, batch, pos, d_model]
    bridge.set_use_attn_result(True)
    after = cached(bridge)
    assert same(logits(bridge), logits(model))
    for layer, block in enumerate(model.model.layers):
        name = f"blocks.{layer}.attn"
        result = after[f"{name}.hook_result"]  # [batch, pos, head, d_model]
        bias = 0 if block.self_attn.o_proj.bias is None else block.self_attn.o_proj.bias
        assert same(result.sum(2) + bias, before[f"blocks.{layer}.hook_attn_out"])
        assert same(result, stacked[layer].movedim(0, 2))
        assert set(before) <= set(after)
        assert all(same(after[key], before[key], 1e-5) for key in before)
    removed = hl.HeadMask.without(hl.heads(model), ["L1H4"])
    with hl.masked(model, removed):
        expected = logits(model)

    def remove(result: Tensor, hook: Any) -> Tensor:
        return result.index_fill(2, torch.tensor([4]), 0)

    with torch.no_grad():
        assert same(bridge.run_with_hooks(ids(), fwd_hooks=[("blocks.1.attn.hook_result", remove)]), expected)
    with hl.masked(bridge, removed):
        assert same(logits(bridge), expected)
    bridge.set_use_attn_result(False)
    assert torch.equal(logits(bridge), logits(model))


@pytest.mark.parametrize(
    ("case", "folded"), [("gqa", False), ("sequential", False), ("mha", True), ("mqa", True), ("parallel", True)]
)
def test_an_input_of_its_own_for_every_head(case: str, folded: bool) -> None:
    bridge = hl.bridge(build(case))
    if folded:
        bridge.enable_compatibility_mode()
    before, expected = cached(bridge), logits(bridge)
    n_kv = bridge.original_model.config.num_key_value_heads

    def edit(copies: Tensor, hook: Any) -> Tensor:  # [batch, pos, head, d_model]
        return copies.index_fill(2, torch.tensor([0]), 0.5)

    bridge.set_use_split_qkv_input(True)
    assert same(logits(bridge), expected)
    for part, n_heads in (("q", HEADS), ("k", n_kv), ("v", n_kv)):
        name = f"blocks.1.attn.hook_{part}_input"
        assert cached(bridge)[name].shape == (BATCH, POS, n_heads, D_MODEL)
        with bridge.hooks([(name, edit)]):
            after = cached(bridge)
        for other in "qkv":
            key = f"blocks.1.attn.hook_{other}"
            changed = [off(after[key][:, :, h], before[key][:, :, h]) > 1e-3 for h in range(before[key].shape[2])]
            assert changed == [other == part and h == 0 for h in range(len(changed))]
        assert same(after["blocks.1.attn.dw1.hook_out"], before["blocks.1.attn.dw1.hook_out"])  # maps read the original
        assert off(after["unembed.hook_out"], before["unembed.hook_out"]) > 1e-3
    bridge.set_use_split_qkv_input(False)
    bridge.set_use_attn_in(True)
    assert same(logits(bridge), expected)
    with bridge.hooks([("blocks.1.attn.hook_attn_in", edit)]):
        after = cached(bridge)
    for part in "qkv":
        key = f"blocks.1.attn.hook_{part}"
        assert off(after[key][:, :, 0], before[key][:, :, 0]) > 1e-3
        assert same(after[key][:, :, 1:], before[key][:, :, 1:])


# --- state dicts and processed weights


@pytest.mark.parametrize("case", ALL)
def test_a_state_dict_has_every_weight(case: str) -> None:
    model, _ = pair(case)
    other = build(case, seed=1)
    bridge, source = hl.bridge(model), hl.bridge(other)
    state = source.state_dict()
    of_maps = {name.split(".")[-2] for name in state if ".attn." in name} - set("qkvo") - {"q_norm", "k_norm"}
    expected = {"plain": "", "mha": "dw1 dd qkw base", "sequential": "dw1 dd qkw base", "unbiased": "dw1 qkw base"}
    assert of_maps == set(expected.get(case.split("-")[0], "dw1 dd qkw").split())
    biases = 0 if state["unembed.bias"].abs().max() else VOCAB  # TransformerLens adds one of zeros
    tied = other.config.tie_word_embeddings * VOCAB * D_MODEL
    assert sum(value.numel() for value in state.values()) - biases - tied == sum(p.numel() for p in other.parameters())
    assert off(logits(bridge), logits(other)) > 0.1
    result = bridge.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(logits(bridge), logits(other))
    again = bridge.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("case", "options"),
    [(case, {}) for case in ALL]
    + [("gqa", {"fold_ln": False}), ("gqa", {"no_processing": True}), ("sequential", {"fold_ln": False})]
    + [("parallel", {name: False}) for name in ("fold_ln", "fold_value_biases", "center_writing_weights")],
    ids=str,
)
def test_processed_weights_compute_the_same(case: str, options: dict[str, bool]) -> None:
    model, _ = pair(case)
    bridge = hl.bridge(model)
    raw = cached(bridge)
    bridge.enable_compatibility_mode(**options)
    found, expected = logits(bridge).log_softmax(-1), logits(model).log_softmax(-1)
    assert same(found, expected, 1e-4)
    assert off(expected, expected.mean()) > 1
    cache = cached(bridge)
    for layer in range(LAYERS):  # the same maps of the same tokens, out of other weights
        for name in expected_shapes(case):
            if "scores" in name:
                continue  # centred queries and keys differ by constants
            assert same(cache[f"blocks.{layer}.attn.{name}"], raw[f"blocks.{layer}.attn.{name}"], 1e-4), name
    folded = options.get("fold_ln", True) and "no_processing" not in options
    for block, plain in zip(bridge.blocks, model.model.layers, strict=True):
        for name, norm in (("ln1", plain.input_layernorm), ("ln2", plain.post_attention_layernorm)):
            assert torch.equal(getattr(block, name).weight, torch.ones(D_MODEL) if folded else norm.weight)
            shift = dict(getattr(block, name).original_component.named_parameters()).get("bias")
            assert shift is None or torch.equal(shift, torch.zeros(D_MODEL) if folded else norm.bias)
        if case == "parallel":  # rows of a composed pattern do not sum to 1, so these cannot move into the output bias
            assert block.attn.v.bias.abs().max() > 0.1
        if case == "plain-pythia":
            assert (block.attn.v.bias == 0).all()


def test_value_biases_of_a_head_without_probabilities() -> None:
    """Its pattern is zero and not one per row: its value bias may not move into the output bias either."""
    model = build("plain-pythia")
    compose = model.model.layers[0].self_attn.compose
    compose.narrow(compose.kept | {"probabilities": [0, 1, 3, 4, 5]}, compose.places)
    bridge = hl.bridge(model)
    assert (cached(bridge)["blocks.0.attn.hook_pattern"][:, 2] == 0).all()
    bridge.enable_compatibility_mode()
    assert same(logits(bridge).log_softmax(-1), logits(model).log_softmax(-1), 1e-4)
    assert bridge.blocks[0].attn.v.bias.abs().max() > 0.1
    assert (bridge.blocks[1].attn.v.bias == 0).all()


def test_norms_are_folded_exactly() -> None:
    torch.manual_seed(3)
    norm = nn.LayerNorm(5, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    biased, unbiased = nn.Linear(5, 3, dtype=torch.float64), nn.Linear(5, 2, bias=False, dtype=torch.float64)
    x = torch.randn(7, 5, dtype=torch.float64)
    expected = biased(norm(x)), unbiased(norm(x))
    parts = {"norm": norm, "biased": biased, "unbiased": unbiased}
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    kept = {key: value.clone() for key, value in state.items()}
    module.fold_norm(state, "norm", ["biased", "unbiased", "absent"])
    assert state.keys() == kept.keys() | {"unbiased.bias"}
    y = nn.functional.layer_norm(x, (5,), state["norm.weight"], state["norm.bias"])
    assert torch.equal(y, nn.functional.layer_norm(x, (5,)))
    for name, value in zip(("biased", "unbiased"), expected, strict=True):
        assert same(y @ state[f"{name}.weight"].T + state[f"{name}.bias"], value, 1e-14)
    rms = {"norm.weight": kept["norm.weight"], "unbiased.weight": kept["unbiased.weight"]}
    module.fold_norm(rms, "norm", ["unbiased"])
    assert rms.keys() == {"norm.weight", "unbiased.weight"}
    assert same(rms["unbiased.weight"], kept["unbiased.weight"] * kept["norm.weight"], 0)


# --- headlab on a bridge


@pytest.mark.parametrize("case", ALL)
def test_heads_and_masks_are_the_plain_model_s(case: str) -> None:
    model, bridge = pair(case)
    assert access.is_bridge(bridge)
    assert hl.heads(bridge) == hl.heads(model)
    assert len(hl.heads(bridge)) == LAYERS * HEADS
    assert access.fingerprint(bridge) == access.fingerprint(model)
    before = logits(model)
    for names in (["L0H0"], ["L1H5", "L1H2"]):
        mask = hl.HeadMask.without(hl.heads(model), names)
        with hl.masked(model, mask):
            expected = logits(model)
        with hl.masked(bridge, mask):
            assert same(logits(bridge), expected)
        assert off(before, expected) > 1e-3
    assert same(logits(bridge), before)


@pytest.mark.parametrize("site", ["scores", "probabilities", "head", "pre_query", "post_base"])
def test_other_sites_on_a_bridge(site: str) -> None:
    model, bridge = pair("mha")
    mask = hl.HeadMask.without(hl.heads(model), ["L0H0", "L1H5"])
    with hl.masked(model, mask, site=site):
        expected = logits(model)
    with hl.masked(bridge, mask, site=site):
        assert same(logits(bridge), expected, 1e-6)
    assert off(logits(bridge), expected) > 1e-3


@pytest.mark.parametrize("site", ["output", "scores", "head"])
@pytest.mark.parametrize("case", ["gqa", "parallel"])
def test_a_bridge_over_a_pruned_model(case: str, site: str) -> None:
    model, _ = pair(case)
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L0H1", "L1H2", "L1H3"]), site=site)
    bridge = hl.bridge(small)
    assert hl.heads(bridge, site) == hl.heads(small, site)
    assert same(logits(bridge), logits(small), 1e-6)
    cache = cached(bridge)
    n_sources, n_outputs = (4 if site in parts else HEADS for parts in (("scores", "head"), ("output", "head")))
    assert cache["blocks.1.attn.hook_attn_scores_raw"].shape == (BATCH, n_sources, POS, POS)
    assert cache["blocks.1.attn.hook_pattern"].shape == (BATCH, n_outputs, POS, POS)
    assert cache["blocks.1.attn.hook_z"].shape == (BATCH, POS, n_outputs, D_HEAD)
    bridge.set_use_attn_result(True)
    bridge.set_use_split_qkv_input(True)
    assert same(logits(bridge), logits(small))
    bridge.enable_compatibility_mode()
    assert same(logits(bridge).log_softmax(-1), logits(small).log_softmax(-1), 1e-4)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(part) for name, part in model.named_modules()}


@pytest.mark.parametrize("case", ALL)
def test_a_bridge_gives_back_a_clean_plain_model(tmp_path: Path, case: str) -> None:
    model, _ = pair(case)
    bridge = hl.bridge(model)
    seen: list[str] = []
    for point in bridge.hook_dict.values():
        point.add_hook(lambda x, hook: seen.append(hook.name), is_permanent=True)
    bridge.original_model(ids())  # with gradients
    assert any("pattern_raw" in name for name in seen)
    plain = hl.load(bridge)
    assert kinds(plain) == kinds(model)
    assert [type(m).__name__ for m in plain.modules() if m._forward_hooks or m._forward_pre_hooks] == []
    seen.clear()
    assert torch.equal(logits(plain), logits(model))
    assert not seen
    state, expected = plain.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(hl.load(tmp_path)), logits(model))
    logits(bridge)
    assert seen


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    _, bridge = pair("mha")

    def fail(x: Tensor, hook: Any) -> Tensor:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        bridge.run_with_hooks(ids(), fwd_hooks=[("blocks.1.attn.hook_pattern_raw", fail)])
    assert [m for m in hl.load(bridge).modules() if m._forward_hooks or m._forward_pre_hooks] == []
    compose = bridge.blocks[1].attn.compose
    assert not compose.tapped()
    assert not any(tap._forward_hooks for tap in compose.taps.values())


# --- how TransformerLens finds it


@pytest.mark.parametrize("name", ["DCFormer", "DCPythia"])
def test_installing_headlab_is_enough(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    adapter = getattr(module, f"{name}Adapter")
    (point,) = entry_points(group="transformer_lens.architectures", name=f"{name}ForCausalLM")
    assert point.load() is adapter
    known = {
        key: value for key, value in ArchitectureAdapterFactory._adapters.items() if not key.startswith(("DC", "Composed"))
    }
    monkeypatch.setattr(ArchitectureAdapterFactory, "_adapters", known)
    monkeypatch.setattr(ArchitectureAdapterFactory, "_entry_points_discovered", False)
    config = TransformerBridgeConfig(d_model=8, d_head=4, n_heads=2, n_layers=1, n_ctx=16, architecture=f"{name}ForCausalLM")
    assert type(ArchitectureAdapterFactory.select_architecture_adapter(config)) is adapter


@pytest.mark.parametrize("case", ["gqa", "parallel"])
@pytest.mark.parametrize("published", [False, True])
def test_the_way_transformer_lens_opens_models(tmp_path: Path, case: str, published: bool) -> None:
    model = build(case)
    model.config.backend = "chunked"
    model.save_pretrained(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "1", "eos_token": "2", "pad_token": "0", "unk_token": "0"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    options = {"tokenizer": tokenizer, "device": "cpu"}
    if published:
        given = copy.deepcopy(model)
        given.config.architectures = [type(model).__name__.removesuffix("ForCausalLM")]
        options["hf_model"] = given
    bridge = TransformerBridge.boot_transformers(str(tmp_path), **options)
    assert isinstance(bridge.adapter, module.ComposedAdapter)
    assert same(logits(bridge), logits(model))
    tokens = bridge.to_tokens("5 7 11")
    assert tokens.shape[1] > 3
    with torch.no_grad():
        assert same(bridge("5 7 11"), logits(model, tokens))


def test_attention_that_is_not_of_dcformer() -> None:
    """The component alone, as an adapter of another architecture would have it: no rotary positions, no forks."""

    class Other(module.DCFormerAdapter):
        def _attention(self) -> Any:
            parts = super()._attention().submodules
            return module.ComposedAttentionBridge(name="self_attn", config=self.cfg, submodules=parts)

    model, _ = pair("mha")
    ArchitectureAdapterFactory.register_adapter("OtherForCausalLM", Other)
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    bridge = build_bridge_from_module(copy.deepcopy(model), "OtherForCausalLM", hf_config=model.config)
    assert same(logits(bridge), logits(model))
    cache = cached(bridge)
    assert "blocks.0.attn.hook_post_base" in cache
    assert "blocks.0.attn.hook_cos" not in bridge.hook_dict
    bridge.set_use_attn_result(True)
    assert same(logits(bridge), logits(model))
    with pytest.raises(NotImplementedError, match="use_split_qkv_input"):
        bridge.set_use_split_qkv_input(True)
    bridge.enable_compatibility_mode()
    assert same(logits(bridge).log_softmax(-1), logits(model).log_softmax(-1), 1e-4)
