"""Models with attached composable heads as a TransformerBridge."""

from __future__ import annotations

import copy
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge

import headlab as hl
from headlab.dcmha import BRANCHES, STAGES, attach
from headlab.dcmha import bridge as module
from headlab.dcmha.branches import SCORE_TAPS
from headlab.models import access
from tests.helpers import zoo

LLAMAS = ["llama-mha", "llama-gqa", "llama-mqa"]
JOINED = ["gpt2", "neox"]
DECODERS = [*LLAMAS, *JOINED]
MODELS = [*DECODERS, "bert-mlm"]
BATCH, POS, RANK, LAYERS = 3, 7, 2, zoo.LAYERS


def build(name: str, seed: int = 0, **options: Any) -> Any:
    """The model, with maps far from the identity."""
    model = attach(zoo.build(name, seed), **options)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if ".compose." in path:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@cache
def pair(name: str) -> tuple[Any, Any]:
    """A model and its bridge, which no test changes for good."""
    model = build(name)
    return model, hl.bridge(model)


def ids(n_pos: int = POS) -> Tensor:
    return torch.randint(3, zoo.VOCAB, (BATCH, n_pos), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, tokens: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return access.bare_model(model)(ids() if tokens is None else tokens, **kwargs).logits


def same(a: Tensor, b: Tensor, within: float = 3e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=within, atol=within)


def sizes(model: Any) -> tuple[int, int, int]:
    """Heads, key-value heads, d_head."""
    row = access.rows(model)[0]
    return len(row.slots), len(row.groups), row.d_head


def projections(model: Any, layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Weights [head, d_model, d_head] (o: [head, d_head, d_model]) and biases of a layer, read off the module by hand."""
    n, n_kv, d = sizes(model)
    attention = access.rows(model)[layer].module
    if hasattr(attention, "c_attn"):
        parts = attention.c_attn.weight.T.chunk(3)
        biases: Any = attention.c_attn.bias.chunk(3)
        out = attention.c_proj.weight.T
    elif hasattr(attention, "query_key_value"):
        parts = attention.query_key_value.weight.reshape(n, 3, d, -1).unbind(1)
        biases = attention.query_key_value.bias.reshape(n, 3, d).unbind(1)
        out = attention.dense.weight
    else:
        bert = hasattr(attention, "self")
        names = ("query", "key", "value") if bert else ("q_proj", "k_proj", "v_proj")
        layers = [getattr(attention.self if bert else attention, part) for part in names]
        parts, biases = [part.weight for part in layers], [part.bias for part in layers]
        out = attention.output.dense.weight if bert else attention.o_proj.weight
    weights = {part: weight.reshape(-1, d, weight.shape[-1]).mT for part, weight in zip("QKV", parts, strict=True)}
    weights["O"] = out.T.reshape(n, d, -1)
    assert len(weights["K"]) == len(weights["V"]) == n_kv
    return weights, dict(zip("QKV", biases, strict=True))


# --- the same model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [False, True])
def test_logits_are_the_plain_model_s(name: str, padding: bool) -> None:
    model, bridge = pair(name)
    mask = torch.ones(BATCH, POS, dtype=torch.long)
    if padding:
        mask[1, 4:] = 0
    expected = logits(model, attention_mask=mask)
    assert same(logits(bridge, attention_mask=mask), expected)
    with torch.no_grad():
        given = bridge(ids(), attention_mask=mask)
    assert same(given[mask.bool()], expected[mask.bool()])
    assert type(model).__name__ == type(bridge.original_model).__name__
    assert bridge.original_model.config._attn_implementation == "headlab_composed"


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_maps_matter(name: str) -> None:
    model, bridge = pair(name)
    silent = copy.deepcopy(model)
    for row in access.rows(silent):
        for parameter in row.compose.parameters():
            parameter.data.zero_()
    assert (logits(silent) - logits(bridge)).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:ComposedRoberta.* does not support fold_ln")
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "granite", "mistral", "roberta"])
def test_other_models(name: str) -> None:
    model = build(name)
    bridge = hl.bridge(model)
    assert torch.equal(logits(bridge), logits(model))
    bridge.enable_compatibility_mode()
    assert same(bridge(ids()).log_softmax(-1), logits(model).log_softmax(-1), 1e-4)


@pytest.mark.parametrize("options", [{"branches": ["query"]}, {"groups": 1, "stages": ["post"]}, {"residual": False}])
def test_other_maps(options: dict[str, Any]) -> None:
    for name in ("gpt2", "bert-mlm"):
        model = build(name, **options)
        assert same(logits(hl.bridge(model)), logits(model))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_generation(name: str, use_past_kv_cache: bool) -> None:
    model, bridge = pair(name)
    prompt = ids(5)
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    found = bridge.generate(
        prompt, max_new_tokens=6, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False,
        use_past_kv_cache=use_past_kv_cache,
    )  # fmt: skip
    assert found.tolist() == expected.tolist()


# --- hook points


def expected_shapes(name: str) -> dict[str, tuple[int, ...]]:
    n, n_kv, d = sizes(pair(name)[0])
    whole = ("hook_attn_scores_raw", "hook_attn_scores", "hook_pattern_raw", "hook_pattern")
    table: dict[str, tuple[int, ...]] = dict.fromkeys(whole, (BATCH, n, POS, POS))
    table |= {"hook_q": (BATCH, POS, n, d), "hook_z": (BATCH, POS, n, d)}
    table |= dict.fromkeys(("hook_k", "hook_v"), (BATCH, POS, n_kv, d))
    for stage in STAGES:
        for branch in BRANCHES:
            factor = f"hook_{stage}_{branch}"
            if branch == "base":
                table[factor] = (n, n)
            elif branch.endswith("gate"):
                table[factor] = (BATCH, POS, n)
            else:
                table[f"{factor}_w1"] = table[f"{factor}_w2"] = (BATCH, POS, RANK, n)
    return table


@pytest.mark.parametrize("name", MODELS)
def test_hook_points(name: str) -> None:
    """Every hook point fires with its shape, has what goes through the taps, and is live."""
    model, bridge = pair(name)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids())
    table = expected_shapes(name)
    for layer in range(LAYERS):
        assert {point: tuple(cache[f"blocks.{layer}.attn.{point}"].shape) for point in table} == table
    taps: dict[str, Tensor] = {}
    compose = access.rows(model)[1].compose
    handles = [
        part.register_forward_hook(lambda _, __, out, tap=tap: taps.update({tap: out})) for tap, part in compose.taps.items()
    ]
    before = logits(model)
    for handle in handles:
        handle.remove()
    assert len(taps) == len(table) - 4  # q, k, v, z
    for tap, value in taps.items():
        point = f"hook_attn_{tap}" if tap in SCORE_TAPS[:2] and "scores" in tap else f"hook_{tap}"
        assert same(cache[f"blocks.1.attn.{point}"], value), point
    generator = torch.Generator().manual_seed(0)

    def edit(x: Tensor, hook: Any) -> Tensor:
        return x * 1.5 + 0.1 * torch.randn(x.shape, generator=generator)

    live = [
        *table,
        "hook_in",
        "hook_out",
        "dw1.hook_in",
        "dw1.hook_out",
        "dd.hook_out",
        "q.hook_in",
        "v.hook_in",
        "o.hook_out",
    ]
    live += ["qkv.hook_in", "qkv.hook_out"] if name in JOINED else []
    for point in live:
        with torch.no_grad():
            after = bridge.run_with_hooks(ids(), fwd_hooks=[(f"blocks.1.attn.{point}", edit)])
        assert (after - before).abs().max() > 1e-3, point
    assert same(logits(bridge), before)


@pytest.mark.parametrize("name", MODELS)
def test_q_k_and_v_are_those_of_each_head(name: str) -> None:
    """Scores, out of hook_q and hook_k; what heads carry, out of the composed pattern and hook_v."""
    _, bridge = pair(name)
    n, n_kv, d = sizes(bridge)
    with torch.no_grad():
        _, found = bridge.run_with_cache(ids())
    here = {point: found[f"blocks.2.attn.{point}"] for point in expected_shapes(name)}
    v = here["hook_v"].repeat_interleave(n // n_kv, 2)
    assert same(torch.einsum("bhts,bshd->bthd", here["hook_pattern"], v), here["hook_z"])
    if name in ("gpt2", "bert-mlm"):  # others turn queries and keys in between
        scores = torch.einsum("bthd,bshd->bhts", here["hook_q"], here["hook_k"]) / d**0.5
        assert same(scores, here["hook_attn_scores_raw"])
    weights, biases = projections(pair(name)[0], 2)
    x = found["blocks.2.attn.hook_in"]
    for part in "QKV":
        expected = torch.einsum("bpm,hmd->bphd", x, weights[part])
        if (bias := biases[part]) is not None:
            expected = expected + bias.reshape(expected.shape[2:])
        assert same(here[f"hook_{part.lower()}"], expected), part


@pytest.mark.parametrize("name", MODELS)
def test_one_value_head_edited(name: str) -> None:
    """Zeros in one value head are zeros in its block of the value projection."""
    model, bridge = pair(name)
    edited = copy.deepcopy(model)
    n, n_kv, d = sizes(model)
    head = n_kv - 1
    row = access.rows(edited)[0]
    block = row.family.block("v", head, n, n_kv)
    projection = row.projection(row.family.v)
    weight = projection.weight.T if name == "gpt2" else projection.weight
    weight.data[block * d : (block + 1) * d] = 0
    if projection.bias is not None:
        projection.bias.data[block * d : (block + 1) * d] = 0

    def zero(value: Tensor, hook: Any) -> Tensor:
        return value.index_fill(2, torch.tensor([head]), 0)

    with torch.no_grad():
        found = bridge.run_with_hooks(ids(), fwd_hooks=[("blocks.0.attn.hook_v", zero)])
    assert same(found, logits(edited))
    assert not same(found, logits(model), 1e-2)


@pytest.mark.parametrize("name", DECODERS)
def test_inputs_and_results_of_single_heads(name: str) -> None:
    model = pair(name)[0]
    bridge = hl.bridge(model)
    for flag in ("use_attn_result", "use_split_qkv_input", "use_attn_in"):
        getattr(bridge, f"set_{flag}")(True)
        with torch.no_grad():
            out, found = bridge.run_with_cache(ids())
        assert same(out, logits(model), 1e-4), flag
        if flag == "use_attn_result":
            total = found["blocks.1.attn.hook_result"].sum(2)
            bias = bridge.blocks[1].attn.o.bias
            assert same(total if bias is None else total + bias, found["blocks.1.hook_attn_out"])
        point = {"use_split_qkv_input": "hook_k_input", "use_attn_in": "hook_attn_in"}.get(flag, "hook_result")
        changed = bridge.run_with_hooks(
            ids(), fwd_hooks=[(f"blocks.1.attn.{point}", lambda x, hook: x + torch.randn(x.shape))]
        )
        assert not same(changed, out, 1e-2)
        getattr(bridge, f"set_{flag}")(False)


def test_gradients_at_hook_points() -> None:
    _, bridge = pair("gpt2")
    names = [f"blocks.1.attn.{point}" for point in expected_shapes("gpt2")]
    _, found = bridge.run_with_cache(ids(), return_type="loss", incl_bwd=True, names_filter=names)
    bridge.zero_grad()
    assert all(found[f"{name}_grad"].abs().max() > 0 for name in names)


# --- weights


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_heads(name: str) -> None:
    model, bridge = pair(name)
    n, n_kv, _ = sizes(model)
    for layer in range(LAYERS):
        weights, _ = projections(model, layer)
        block = bridge.blocks[layer].attn
        for part in "QKVO":
            assert torch.equal(getattr(bridge, f"W_{part}")[layer], weights[part]), part
            assert torch.equal(getattr(block, f"W_{part}"), weights[part]), part
        q, k, v, o = (weights[part].double() for part in "QKVO")
        k, v = (x.repeat_interleave(n // n_kv, 0) for x in (k, v))
        assert same(bridge.OV.AB[layer].double(), v @ o, 1e-5)
        assert same(bridge.QK.AB[layer].double(), q @ k.mT, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_round_trip(name: str) -> None:
    other = build(name, seed=1)
    bridge, source = hl.bridge(pair(name)[0]), hl.bridge(other)
    state = {key: value.clone() for key, value in source.state_dict().items()}
    assert {f"blocks.2.attn.{part}.weight" for part in ("q", "k", "v", "o", "dw1", "dd", "qkw", "base")} <= state.keys()
    assert not same(logits(bridge), logits(other), 0.1)
    result = bridge.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(logits(bridge), logits(other))
    again = bridge.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    plain = hl.load(bridge)  # the joined weights as well
    expected = other.state_dict()
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", MODELS)
def test_load_gives_the_plain_model_back(name: str, tmp_path: Path) -> None:
    model, bridge = pair(name)
    plain = hl.load(bridge)
    assert type(plain) is type(model)
    assert not [part for part in plain.modules() if type(part).__module__.startswith("transformer_lens")]
    expected = model.state_dict()
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in expected.items())
    assert torch.equal(logits(plain), logits(model))
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(hl.load(tmp_path)), logits(model))
    assert access.fingerprint(bridge) == access.fingerprint(model)


@pytest.mark.filterwarnings("ignore:ComposedBert.* does not support fold_ln")
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in (*MODELS, "llama-bias")]
    + [(name, option) for name in ("gpt2", "neox") for option in ({"fold_ln": False}, {"no_processing": True})],
)
def test_compatibility_mode(name: str, options: dict[str, bool]) -> None:
    model = build(name)
    bridge = hl.bridge(model)
    bridge.enable_compatibility_mode(**options)
    with torch.no_grad():
        out, found = bridge.run_with_cache(ids())
    assert same(out.log_softmax(-1), logits(model).log_softmax(-1), 1e-4)
    assert {tuple(found[f"blocks.0.attn.{point}"].shape) for point in ("hook_q", "hook_z")} == {
        (BATCH, POS, sizes(model)[0], sizes(model)[2])
    }
    if not options and name != "bert-mlm":
        assert (bridge.blocks[0].ln1.weight - 1).abs().max() == 0
    with pytest.raises(hl.HeadlabError, match="compatibility mode"):
        hl.load(bridge)


def test_compatibility_mode_in_other_dtypes() -> None:
    model = build("gpt2").double()
    bridge = hl.bridge(model)
    assert same(logits(bridge), logits(model), 1e-12)
    bridge.enable_compatibility_mode()
    assert {parameter.dtype for parameter in bridge.parameters()} == {torch.float64}
    assert same(bridge(ids()).log_softmax(-1), logits(model).log_softmax(-1), 1e-4)


# --- headlab on a bridge


@pytest.mark.parametrize("site", ["output", "scores", "probabilities", "head", "post_query"])
@pytest.mark.parametrize("name", MODELS)
def test_masks_are_the_plain_model_s(name: str, site: str) -> None:
    model, bridge = pair(name)
    assert hl.heads(bridge, site) == hl.heads(model, site)
    mask = hl.HeadMask.without(hl.heads(model, site), ["L0H1", "L2H0", "L2H3"])
    before = logits(model)
    with hl.masked(model, mask, site=site):
        expected = logits(model)
    with hl.masked(bridge, mask, site=site):
        assert same(logits(bridge), expected)
        assert same(bridge(ids()), expected)
    assert not same(expected, before, 1e-3)
    assert same(logits(bridge), before)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama-gqa"])
def test_pruned_models(name: str) -> None:
    model = build(name)
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L0H1", "L2H0"]))
    bridge = hl.bridge(small)
    assert same(logits(bridge), logits(small))
    assert hl.heads(bridge) == hl.heads(small)
    if name in JOINED:  # whose values are computed along with the scores that are left
        with pytest.raises(hl.HeadlabError, match="layer 0 has values of heads whose output is gone"):
            bridge.enable_compatibility_mode()
        small = hl.prune(model, hl.HeadMask.without(hl.heads(model, "head"), ["L0H1", "L2H0"]), site="head")
        bridge = hl.bridge(small)
    bridge.enable_compatibility_mode()
    assert same(bridge(ids()).log_softmax(-1), logits(small).log_softmax(-1), 1e-4)


# --- registration


@pytest.mark.parametrize("name", MODELS)
def test_the_factory_knows_the_classes(name: str) -> None:
    class_name = type(pair(name)[0]).__name__
    (point,) = entry_points(group="transformer_lens.architectures", name=class_name)
    adapter = point.load()
    assert issubclass(adapter, module.ComposedAdapter)
    assert adapter is module.composed_adapter(class_name.removeprefix("Composed"))
    assert ArchitectureAdapterFactory._adapters[class_name] is adapter


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_boot_transformers(name: str, tmp_path: Path) -> None:
    model = pair(name)[0]
    model.save_pretrained(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(zoo.VOCAB)}, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "1", "eos_token": "2", "pad_token": "0", "unk_token": "0"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), tokenizer=tokenizer, device="cpu")
    assert isinstance(bridge.adapter, module.ComposedAdapter)
    assert same(logits(bridge), logits(model))


def test_no_adapter() -> None:
    with pytest.raises(hl.HeadlabError, match="no adapter for ElectraForMaskedLM, so there is none for ComposedElectra"):
        hl.bridge(build("electra"))
