"""Published checkpoints: the parity cases of `golden/`, in every form in which such checkpoints come, and broken ones."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import headlab as hl
from headlab.dcmha import (
    DCFormerConfig,
    DCFormerForCausalLM,
    DCFormerModel,
    DCPythiaConfig,
    DCPythiaForCausalLM,
    DCPythiaModel,
)
from headlab.dcmha.branches import DYNAMIC, STAGES
from headlab.errors import HeadlabError
from tests.helpers import dcmha_loop

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
MAPS = "layers.1.attention.dyn_w_proj."
State = dict[str, Tensor]


@cache
def expected(case: str) -> State:
    return load_file(GOLDEN / case / "expected.safetensors")


@cache
def published(case: str) -> State:
    return load_file(GOLDEN / case / "model.safetensors")


@cache
def opened(case: str):
    return model_class(case).from_pretrained(GOLDEN / case).eval()


def model_class(case: str):
    return DCPythiaForCausalLM if case.startswith("dcpythia") else DCFormerForCausalLM


def config_of(case: str) -> dict:
    return json.loads((GOLDEN / case / "config.json").read_text())


def write(
    folder: Path, case: str, state: State | None = None, suffix: str = "safetensors", shards: int = 1, **config
) -> Path:
    """A checkpoint folder: this state, as `safetensors` or `bin`, whole or in shards with an index."""
    state = published(case) if state is None else state
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(case) | config))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save = save_file if suffix == "safetensors" else torch.save
    state = {key: value.contiguous() for key, value in state.items()}
    if shards == 1:
        save(state, folder / f"{stem}.{suffix}")
        return folder
    keys = sorted(state)
    weight_map = {}
    for n in range(shards):
        name = f"{stem}-{n + 1:05}-of-{shards:05}.{suffix}"
        save({key: state[key] for key in keys[n::shards]}, folder / name)
        weight_map |= dict.fromkeys(keys[n::shards], name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def separate(case: str) -> State:
    """q, k and v as three tensors."""
    state = {}
    for key, value in published(case).items():
        if ".wqkv." in key:
            state |= {key.replace("wqkv", name): part for name, part in zip(("wq", "wk", "wv"), value.chunk(3), strict=True)}
        else:
            state[key] = value
    return state


def with_derived(case: str) -> State:
    """With the tensors that the published inference code derives from others and saves all the same."""
    config, state = config_of(case), dict(published(case))
    for layer in range(config["n_layer"]):
        path = f"layers.{layer}.attention.dyn_w_proj."
        state[f"{path}dw_m"], state[f"{path}qkw_m"] = torch.randn(3, 5), torch.randn(2, 3, 7)
        for name in ("pre_proj.w", "post_proj.w"):
            state[path + name] = torch.eye(config["n_head"])[None]
    return state


def assert_same_weights(found, case: str) -> None:
    mine, theirs = found.state_dict(), opened(case).state_dict()
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


# --- parity


@pytest.fixture(params=["eager", "chunked"])
def backend(request):
    return request.param


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def model(case, backend):
    found = opened(case)
    found.config.backend = backend
    found.generation_config.eos_token_id = None
    yield found
    found.config.backend = "eager"


def test_there_are_four_cases():
    assert CASES == ["dcformer-global", "dcformer-mgate", "dcformer-window", "dcpythia-window"]


def test_logits(case, model):
    with torch.no_grad():
        logits = model(expected(case)["input_ids"]).logits
    torch.testing.assert_close(logits, expected(case)["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_greedy_continuation(case, model, use_cache):
    ids, greedy = expected(case)["input_ids"], expected(case)["greedy"]
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=greedy.shape[1], do_sample=False, use_cache=use_cache,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(found[:, ids.shape[1] :], greedy)


def test_greedy_continuation_token_by_token(case, model):
    ids, greedy = expected(case)["input_ids"], expected(case)["greedy"]
    with torch.no_grad():
        output = model(ids[:, :5], use_cache=True)
        for t in range(5, ids.shape[1]):
            output = model(ids[:, t : t + 1], past_key_values=output.past_key_values)
        for token in greedy.T:
            assert torch.equal(output.logits[:, -1].argmax(-1), token)
            output = model(token[:, None], past_key_values=output.past_key_values)


@pytest.mark.parametrize("stage", STAGES)
def test_scores_and_probabilities_before_and_after_composition(case, model, stage):
    raw, composed = {"pre": ("scores_raw", "scores"), "post": ("pattern_raw", "pattern")}[stage]
    seen: dict[tuple[int, str], Tensor] = {}
    handles = [
        layer.self_attn.compose.taps[name].register_forward_hook(
            lambda module, args, value, at=(n, name): seen.update({at: value})
        )
        for n, layer in enumerate(model.model.layers)
        for name in (raw, composed)
    ]
    ids = expected(case)["input_ids"]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for n in range(model.config.num_hidden_layers):
        for name, end in ((raw, "in"), (composed, "out")):
            found, wanted = seen[n, name], expected(case)[f"layers.{n}.{stage}_compose.{end}"]
            assert found.shape == wanted.shape
            if stage == "pre":
                found, wanted = found.masked_fill(~visible, 0), wanted.masked_fill(~visible, 0)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_attention_output_of_the_last_token(case, model):
    outputs: dict[int, Tensor] = {}
    handles = [
        layer.self_attn.register_forward_hook(lambda module, args, output, n=n: outputs.update({n: output[0]}))
        for n, layer in enumerate(model.model.layers)
    ]
    ids = torch.cat([expected(case)["input_ids"], expected(case)["greedy"]], 1)
    with torch.no_grad():
        past = model(ids[:, :-2], use_cache=True).past_key_values
        model(ids[:, -2:-1], past_key_values=past)  # the last token that was decoded has been chosen, not read
    for handle in handles:
        handle.remove()
    for n, output in outputs.items():
        torch.testing.assert_close(output, expected(case)[f"layers.{n}.attn_out"], rtol=0, atol=1e-4)


def test_an_independent_reader_computes_the_same(case):
    """The float64 reference of the other tests, given the opened weights, agrees with the published code too."""
    model = opened(case)
    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    ids = expected(case)["input_ids"][1].tolist()
    found = torch.tensor(dcmha_loop.Transformer(weights, model.config.to_dict()).logits(ids))
    torch.testing.assert_close(found, expected(case)["logits"][1].double(), rtol=0, atol=1e-4)


# --- every form of a checkpoint


FORMS: dict[str, Callable[[Path, str], Path]] = {
    "bin": lambda path, case: write(path, case, suffix="bin"),
    "bin-shards": lambda path, case: write(path, case, suffix="bin", shards=2),
    "safetensors-shards": lambda path, case: write(path, case, shards=2),
    "separate-qkv": lambda path, case: write(path, case, separate(case)),
    "separate-qkv-bin-shards": lambda path, case: write(path, case, separate(case), "bin", 3),
    "derived": lambda path, case: write(path, case, with_derived(case)),
    "derived-bin": lambda path, case: write(path, case, with_derived(case), "bin"),
    "with-code": lambda path, case: write(path, case, auto_map={"AutoModelForCausalLM": "modeling_dc.DC"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_checkpoint(form, case, tmp_path):
    folder = FORMS[form](tmp_path / "published", case)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    for found in (model_class(case).from_pretrained(folder), AutoModelForCausalLM.from_pretrained(str(folder))):
        assert type(found) is model_class(case)
        assert not found.training
        assert_same_weights(found, case)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(1)  # weights may be mapped from the file, but never written to it
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_auto_classes_know_the_configs(case):
    config = AutoConfig.from_pretrained(GOLDEN / case)
    assert type(config) is (DCPythiaConfig if case.startswith("dcpythia") else DCFormerConfig)
    published = config_of(case)
    for theirs, ours in (("dim", "hidden_size"), ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads"),
                         ("n_local_heads", "num_key_value_heads"), ("block_size", "max_position_embeddings"),
                         ("rope_base", "rope_theta")):  # fmt: skip
        assert getattr(config, ours) == published[theirs] == getattr(config, theirs)
    assert config.compose == {"branches": list(DYNAMIC)}


def test_the_body_alone(case, tmp_path):
    body_class = DCPythiaModel if case.startswith("dcpythia") else DCFormerModel
    ids = expected(case)["input_ids"]
    opened(case).save_pretrained(tmp_path)
    for found in (AutoModel.from_pretrained(GOLDEN / case), body_class.from_pretrained(GOLDEN / case),
                  AutoModel.from_pretrained(tmp_path)):  # fmt: skip
        assert type(found) is body_class
        with torch.no_grad():
            assert torch.equal(found(ids).last_hidden_state, opened(case).model(ids).last_hidden_state)


def test_saved_and_opened_again(case, tmp_path):
    opened(case).save_pretrained(tmp_path)
    assert config_of(case)["architectures"] != json.loads((tmp_path / "config.json").read_text())["architectures"]
    for found in (model_class(case).from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert_same_weights(found, case)
        ours, theirs = found.config.to_dict(), opened(case).config.to_dict()
        assert ours["architectures"] == [model_class(case).__name__]
        assert ours.pop("_name_or_path", None) != theirs.pop("_name_or_path", None)
        assert ours == theirs
        with torch.no_grad():
            torch.testing.assert_close(
                found(expected(case)["input_ids"]).logits, expected(case)["logits"], rtol=0, atol=1e-4
            )


def test_dtype_and_device(case):
    ids, logits = expected(case)["input_ids"], expected(case)["logits"]
    half = model_class(case).from_pretrained(GOLDEN / case, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found = half(ids).logits
        rounded = half.float()(ids).logits  # weights rounded, but computed in float32
    assert found.dtype == torch.bfloat16
    assert (found.float() - logits).abs().mean() < 2 * (rounded - logits).abs().mean()
    double = AutoModelForCausalLM.from_pretrained(GOLDEN / case, dtype="float64")
    assert double.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(double(ids).logits.float(), logits, rtol=0, atol=1e-4)
    assert AutoModelForCausalLM.from_pretrained(GOLDEN / case, dtype="auto").dtype == torch.float32


def test_half_precision_files_open_as_such(tmp_path):
    folder = write(
        tmp_path, "dcformer-global", {key: value.half() for key, value in published("dcformer-global").items()}, "bin",
        torch_dtype="float16",
    )  # fmt: skip
    assert DCFormerForCausalLM.from_pretrained(folder).dtype == torch.float16
    assert DCFormerForCausalLM.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


def test_options_of_the_config_may_be_given(tmp_path):
    folder = GOLDEN / "dcformer-global"
    model, info = DCFormerForCausalLM.from_pretrained(folder, backend="chunked", block_size=99, output_loading_info=True)
    assert (model.config.backend, model.config.max_position_embeddings) == ("chunked", 99)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.name_or_path == str(folder)
    assert DCFormerForCausalLM.from_pretrained(folder, compose=None).config.compose is None
    config = DCFormerConfig.from_pretrained(folder, backend="chunked")
    assert DCFormerForCausalLM.from_pretrained(folder, config=config).config.backend == "chunked"
    assert DCFormerForCausalLM.from_pretrained(folder, config=str(folder)).config.hidden_size == 32
    assert (
        DCFormerForCausalLM.from_pretrained(folder, trust_remote_code=False, low_cpu_mem_usage=True).config.backend
        == "eager"
    )


def test_a_hub_name_opens_from_the_cache(tmp_path):
    case, commit = "dcpythia-window", "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--Caiyun-AI--DCPythia-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    write(repository / "snapshots" / commit, case, suffix="bin", shards=2)
    for cls in (DCPythiaForCausalLM, AutoModelForCausalLM):
        assert_same_weights(cls.from_pretrained("Caiyun-AI/DCPythia-tiny", cache_dir=tmp_path), case)


def test_tied_embeddings(tmp_path):
    case = "dcformer-global"
    state = {key: value for key, value in published(case).items() if key != "output.weight"}
    model = DCFormerForCausalLM.from_pretrained(write(tmp_path, case, state, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, state["tok_embeddings.weight"])


# --- published switches


def test_without_dcmha_it_is_plain_attention(case, tmp_path):
    state = {key: value for key, value in published(case).items() if "dyn_w_proj" not in key}
    for n, tensors in enumerate((state, published(case))):
        model = AutoModelForCausalLM.from_pretrained(write(tmp_path / str(n), case, tensors, use_dcmha=False))
        assert model.config.compose is None
        assert not [name for name, _ in model.named_parameters() if "compose" in name]
        weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
        ids = expected(case)["input_ids"][:1]
        with torch.no_grad():
            logits = model(ids).logits[0]
        expected_logits = dcmha_loop.Transformer(weights, model.config.to_dict()).logits(ids[0].tolist())
        torch.testing.assert_close(logits.double(), torch.tensor(expected_logits), rtol=0, atol=1e-4)


def test_a_query_wise_model_drops_key_branches_and_caches_nothing_more(case, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write(tmp_path, case, query_wise=True))
    assert model.config.compose["branches"] == ["query", "query_gate"]
    compose, whole = model.model.layers[0].self_attn.compose, opened(case).model.layers[0].self_attn.compose
    assert compose.key_numbers == 0
    assert torch.equal(compose.dd.weight, whole.dd.weight.unflatten(0, (4, -1))[[0, 2]].flatten(0, 1))
    ids = expected(case)["input_ids"]
    with torch.no_grad():
        output = model(ids, use_cache=True)
        for layer in output.past_key_values.layers:
            assert layer.keys.shape == layer.values.shape == (2, model.config.n_head, ids.shape[1], model.config.head_dim)
        # the same as the whole model with its key branches switched off
        for layer in (full := AutoModelForCausalLM.from_pretrained(GOLDEN / case)).model.layers:
            layer.self_attn.compose.scale.update(
                dict.fromkeys(("pre_key", "pre_key_gate", "post_key", "post_key_gate"), 0.0)
            )
        torch.testing.assert_close(output.logits, full(ids).logits)
        assert not torch.allclose(output.logits, opened(case)(ids).logits)


def test_static_maps(case, tmp_path):
    heads, state = config_of(case)["n_head"], dict(with_derived(case))
    for key in [key for key in state if key.endswith("_proj.w")]:
        state[key] = 0.3 * torch.randn(1, heads, heads)
    folder = write(tmp_path, case, state, use_sw=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.compose["branches"] == ["base", *DYNAMIC]
    base = model.model.layers[1].self_attn.compose.base.weight
    assert torch.equal(base, torch.stack([state[f"{MAPS}pre_proj.w"], state[f"{MAPS}post_proj.w"]]))
    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    ids = expected(case)["input_ids"][:1]
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    reference = dcmha_loop.Transformer(weights, model.config.to_dict()).logits(ids[0].tolist())
    torch.testing.assert_close(logits, torch.tensor(reference), rtol=0, atol=1e-4)
    with pytest.raises(HeadlabError, match=r"static maps \(pre_proj.w, post_proj.w\), but the config does not set use_sw"):
        AutoModelForCausalLM.from_pretrained(write(tmp_path, case, state))
    del state[f"{MAPS}post_proj.w"]
    with pytest.raises(HeadlabError, match=r"lacks the tensors model.layers.1.self_attn.dyn_w_proj.post_proj.w"):
        AutoModelForCausalLM.from_pretrained(write(tmp_path, case, state, use_sw=True))


def test_groups_and_ranks_follow_from_the_tensors(tmp_path):
    """8 heads in 2 groups, rank 1."""
    case, width, groups, hidden = "dcformer-window", 64, 2, 3
    state = dict(published(case))
    for layer in range(3):
        path = f"layers.{layer}.attention.dyn_w_proj."
        state[f"{path}dw1"] = torch.randn(width, groups, 4, hidden)
        state[f"{path}qkw"] = torch.randn(groups, 4, hidden, 2, 4)
        state[f"{path}dd"] = torch.randn(width, groups, 16)
    model = DCFormerForCausalLM.from_pretrained(write(tmp_path, case, state))
    assert model.config.compose == {"branches": list(DYNAMIC), "rank": 1, "hidden": hidden, "groups": groups}
    compose, x = model.model.layers[1].self_attn.compose, torch.randn(1, 1, width)
    sides = compose(x)
    names = ("pre_query", "pre_key", "post_query", "post_key")
    gates = torch.einsum("d,dgm->gm", x[0, 0], state[f"{MAPS}dd"]).tanh().view(groups, 4, 4)  # [group, place, head]
    hidden_layer = torch.nn.functional.gelu(torch.einsum("d,dgck->gck", x[0, 0], state[f"{MAPS}dw1"]))
    w2 = torch.einsum("gck,gckrm->gcrm", hidden_layer, state[f"{MAPS}qkw"])[:, :, 1]  # [group, place, head]
    for place, name in enumerate(names):
        torch.testing.assert_close(sides[name].gate[0, 0], gates[:, place].flatten())
        torch.testing.assert_close(sides[name].w2[0, 0, 0], w2[:, place].flatten())


# --- broken and hostile checkpoints


class Hostile:
    """Would create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["beside", "whole", "plain-pickle", "shard"])
def test_a_malicious_pickle_is_not_run(kind, case, tmp_path):
    folder, trace = tmp_path / "published", tmp_path / "trace"
    write(folder, case, suffix="bin", shards=2 if kind == "shard" else 1)
    path = sorted(folder.glob("*.bin"))[-1]
    state = torch.load(path, weights_only=True)
    if kind == "plain-pickle":
        path.write_bytes(pickle.dumps(Hostile(trace)))
    else:
        torch.save(Hostile(trace) if kind == "whole" else state | {"layers.9.extra": Hostile(trace)}, path)
    for cls in (model_class(case), AutoModelForCausalLM, AutoModel):
        with pytest.raises(HeadlabError, match=path.name) as error:
            cls.from_pretrained(folder)
        assert "\n" not in str(error.value)
        assert not trace.exists()
    if kind != "plain-pickle":
        assert "a pickle with more in it than tensors, which headlab does not open" in str(error.value)


def without(case: str, *names: str) -> State:
    return {key: value for key, value in published(case).items() if key not in names}


def test_missing_tensors_are_named(case, tmp_path):
    folder = write(tmp_path, case, without(case, "layers.1.attention.wo.weight", "norm.weight", f"{MAPS}qkw"))
    message = "the checkpoint lacks the tensors model.layers.1.self_attn.dyn_w_proj.qkw"
    with pytest.raises(HeadlabError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    folder = write(tmp_path, case, without(case, "layers.1.attention.wo.weight", "norm.weight"))
    for cls in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(
            HeadlabError, match=r"lacks the tensors model.layers.1.self_attn.o_proj.weight, model.norm.weight$"
        ):
            cls.from_pretrained(folder)
    folder = write(tmp_path, case, without(case, "output.weight"))
    with pytest.raises(HeadlabError, match=r"lacks the tensors lm_head.weight$"):
        AutoModelForCausalLM.from_pretrained(folder)
    AutoModel.from_pretrained(folder)  # has none
    state = {key: value for key, value in published(case).items() if not key.startswith(MAPS)}
    with pytest.raises(HeadlabError, match=r"lacks the tensors model.layers.1.self_attn.compose.dd.weight, model.layers.1"):
        AutoModelForCausalLM.from_pretrained(write(tmp_path, case, state))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("layers.1.attention.wz.weight", "layers.1.attention.wz.weight"),
        ("layers.0.extra", "layers.0.extra"),
        ("memory.weight", "memory.weight"),
        (f"{MAPS}other", "model.layers.1.self_attn.dyn_w_proj.other"),
        ("layers.0.dyn_w_proj.dw1", "layers.0.dyn_w_proj.dw1"),
    ],
)
def test_unexpected_tensors_are_named(name, named, tmp_path):
    case = "dcformer-mgate"
    folder = write(tmp_path, case, published(case) | {name: torch.zeros(3)})
    for cls in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(HeadlabError, match=f"tensors that the model has no place for: {named}$"):
            cls.from_pretrained(folder)


def test_a_layer_more_than_the_config_says(tmp_path):
    case = "dcformer-window"
    with pytest.raises(
        HeadlabError, match=r"no place for: model.layers.2.input_layernorm.weight, .*model.layers.2.self_attn"
    ):
        AutoModelForCausalLM.from_pretrained(write(tmp_path, case, n_layer=2))
    with pytest.raises(
        HeadlabError, match=r"lacks the tensors model.layers.3.input_layernorm.weight, .*model.layers.3.self"
    ):
        AutoModelForCausalLM.from_pretrained(write(tmp_path, case, n_layer=4))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("layers.0.attention.wo.weight", (32, 33), r"model.layers.0.self_attn.o_proj.weight \(32, 33\) for \(32, 32\)"),
        ("layers.0.attention.wqkv.weight", (95, 32), r"wqkv.weight has 95 rows, but the config's heads need 32 \+ 32 \+ 32"),
        ("layers.0.attention.wqkv.weight", (96, 31), r"self_attn.q_proj.weight \(32, 31\) for \(32, 32\), .*k_proj.weight"),
        ("tok_embeddings.weight", (60, 32), r"model.embed_tokens.weight \(60, 32\) for \(61, 32\)"),
        (f"{MAPS}dw1", (31, 1, 4, 16), r"dyn_w_proj.dw1 \(31, 1, 4, 16\) for \(32, 1, 4, 16\)"),
        (f"{MAPS}dw1", (32, 1, 2, 16), r"dyn_w_proj.dw1 \(32, 1, 2, 16\) for \(32, 1, 4, 16\)"),
        (f"{MAPS}dd", (32, 1, 15), r"dyn_w_proj.dd \(32, 1, 15\) for \(32, 1, 16\)"),
        (f"{MAPS}dd", (512,), r"dyn_w_proj.dd \(512,\) for \(32, 1, 16\)"),
        (f"{MAPS}qkw", (1, 4, 16, 5, 4), r"dyn_w_proj.qkw \(1, 4, 16, 5, 4\) for \(1, 4, 16, 4, 4\)"),
        (f"{MAPS}qkw", (1, 4, 16, 4, 5), r"dyn_w_proj.qkw \(1, 4, 16, 4, 5\) for \(1, 4, 16, 4, 4\)"),
        (f"{MAPS}qkw", (16, 4, 4), r"dyn_w_proj.qkw \(16, 4, 4\) for \(1, 4, 16, 4, 4\)"),
        (f"{MAPS}qkw", (1, 4, 16, 10, 4), r"from 1 to the number of heads in a group \(4\), not 5"),
        (f"{MAPS}qkw", (3, 4, 16, 4, 4), "4 heads cannot be composed in 3 groups"),
        (f"{MAPS}pre_proj.w", (1, 4, 3), r"dyn_w_proj.pre_proj.w \(1, 4, 3\) for \(1, 4, 4\)"),
    ],
)
def test_tensors_of_another_shape_are_named(key, shape, message, tmp_path):
    folder = write(tmp_path, "dcformer-global", published("dcformer-global") | {key: torch.zeros(shape)})
    for cls in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(HeadlabError, match=message):
            cls.from_pretrained(folder)


def test_several_shapes_are_named_at_once(tmp_path):
    with pytest.raises(HeadlabError, match=r"lm_head.weight \(61, 32\) for \(62, 32\)") as error:
        AutoModelForCausalLM.from_pretrained(write(tmp_path, "dcformer-global", vocab_size=62))
    assert "model.embed_tokens.weight (61, 32) for (62, 32)" in str(error.value)


def test_saved_models_with_other_tensors(tmp_path):
    """The same for folders that `save_pretrained` has written."""
    opened("dcformer-global").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    o_proj = "model.layers.1.self_attn.o_proj.weight"
    short = o_proj.removeprefix("model.")
    for tensors, message in (
        ({key: value for key, value in state.items() if key != o_proj}, f"lacks the tensors (model.)?{short}$"),
        (state | {"model.extra": torch.zeros(3)}, "tensors that the model has no place for: (model.)?extra$"),
        (state | {o_proj: torch.zeros(32, 33)}, rf" (model.)?{short} \(32, 33\) for \(32, 32\)$"),
    ):
        save_file(tensors, path, metadata={"format": "pt"})
        for cls in (AutoModelForCausalLM, AutoModel):
            with pytest.raises(HeadlabError, match=message):
                cls.from_pretrained(tmp_path)
    fresh, info = DCFormerForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert fresh.model.layers[1].self_attn.o_proj.weight.shape == (32, 32)
    assert [key for key, _, _ in info["mismatched_keys"]] == [o_proj]


def test_files_that_cannot_be_read(tmp_path):
    case = "dcformer-global"

    def fails(folder: Path, message: str) -> None:
        with pytest.raises(HeadlabError, match=message) as error:
            AutoModelForCausalLM.from_pretrained(folder)
        assert "\n" not in str(error.value)

    folder = write(tmp_path / "none", case)
    (folder / "model.safetensors").unlink()
    fails(folder, "found no weights in .*: expected model.safetensors or pytorch_model.bin, or shards with an index")
    folder = write(tmp_path / "lost", case, suffix="bin", shards=2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    fails(folder, "the shard .*pytorch_model-00002-of-00002.bin is missing")
    for suffix, name in (("safetensors", "model"), ("bin", "pytorch_model")):
        folder = write(tmp_path / f"cut-{suffix}", case, suffix=suffix)
        path = folder / f"{name}.{suffix}"
        path.write_bytes(path.read_bytes()[:1000])
        fails(folder, f"cannot read .*{name}.{suffix}: .")
        path.write_bytes(b"")
        fails(folder, f"cannot read .*{name}.{suffix}: .")
    folder = write(tmp_path / "list", case, suffix="bin")
    torch.save([torch.zeros(3)], folder / "pytorch_model.bin")
    fails(folder, "is not a table of tensors")
    torch.save({"norm.weight": 3}, folder / "pytorch_model.bin")
    fails(folder, "is not a table of tensors")
    folder = write(tmp_path / "index", case, shards=2)
    index = folder / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weights": 1}', '{"weight_map": ["a"]}'):
        index.write_text(text)
        fails(folder, "is no index of shards: it has no readable weight_map")
    index.write_text(json.dumps({"weight_map": {"norm.weight": "../secret.safetensors"}}))
    fails(folder, r"points outside its folder, to ../secret.safetensors")


def test_load_opens_a_published_checkpoint_as_a_language_model(case, tmp_path):
    """Its config names the architecture only (`DCFormer`), not a class."""
    for folder in (GOLDEN / case, write(tmp_path / "bin", case, suffix="bin", shards=2)):
        model = hl.load(folder)
        assert type(model) is model_class(case)
        with torch.no_grad():
            logits = model(expected(case)["input_ids"]).logits
        torch.testing.assert_close(logits, expected(case)["logits"], rtol=0, atol=1e-4)
