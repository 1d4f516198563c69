from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import headlab as hl
from headlab.models import access
from tests.helpers import zoo


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**zoo.batch_for(name, labels=False))[0]


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def message(error: pytest.ExceptionInfo[hl.HeadlabError]) -> str:
    """Of an error that a command line can print: one line, without colours."""
    text = str(error.value)
    assert text.isprintable()
    return text


@pytest.mark.parametrize("name", zoo.ALL)
def test_a_folder_opens_as_the_class_it_was_saved_from(tmp_path: Path, name: str) -> None:
    saved = zoo.build(name)
    saved.save_pretrained(tmp_path)
    model = hl.load(tmp_path)
    assert type(model) is type(saved)
    assert states_equal(model, saved)
    assert not model.training
    assert torch.equal(logits(model, name), logits(saved, name))


def test_dtype_is_as_saved_or_as_asked(tmp_path: Path) -> None:
    zoo.build("llama-gqa").bfloat16().save_pretrained(tmp_path)
    assert hl.load(tmp_path).dtype == torch.bfloat16
    assert hl.load(str(tmp_path), dtype=torch.float32).dtype == torch.float32
    assert hl.load(tmp_path, device="cpu").device.type == "cpu"


def test_a_model_in_memory_is_itself() -> None:
    model = zoo.build("llama-gqa").train()
    assert hl.load(model) is model
    assert not model.training


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"], ["OwnLMHeadModel"]])
def test_a_checkpoint_that_does_not_say_its_class(tmp_path: Path, architectures: list[str] | None) -> None:
    zoo.build("llama-gqa").save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=architectures)
    expected = hf.LlamaForCausalLM if architectures else hf.LlamaModel
    assert type(hl.load(tmp_path)) is expected


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "no-such-model", "nobody/no-such-model", str(tmp_path)):
        with pytest.raises(hl.HeadlabError) as caught:
            hl.load(name)
        assert f"cannot open the model {name!r}" in message(caught)


@pytest.mark.parametrize("what", [nn.Linear(2, 2), "gpt2"], ids=["module", "name"])
def test_what_is_no_model_of_hugging_face(what: object) -> None:
    for function in (hl.bridge, hl.load) if isinstance(what, nn.Module) else (hl.bridge,):
        with pytest.raises(hl.HeadlabError, match=f"not a {type(what).__name__}") as caught:
            function(what)
        message(caught)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("model.safetensors", "garbage"),
        ("model.safetensors", None),
    ],
)
def test_a_damaged_folder(tmp_path: Path, file: str, content: str | None) -> None:
    zoo.build("llama-gqa").save_pretrained(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:5000] if content is None else content.encode())
    with pytest.raises(hl.HeadlabError, match="cannot open the model") as caught:
        hl.load(tmp_path)
    message(caught)


@pytest.mark.parametrize("model_type", ["own", "llama"])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, model_type: str) -> None:
    zoo.build("llama-gqa").save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnConfig: ...\nclass OwnModel: ...\n")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(tmp_path, model_type=model_type, architectures=["OwnModel"], auto_map=auto_map)
    with pytest.raises(hl.HeadlabError, match="code") as caught:
        hl.load(tmp_path)
    assert str(tmp_path) in message(caught)
    assert not (tmp_path / "ran").exists()


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    model = zoo.build("llama-gqa")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict() | {"model.norm.weight": Payload(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(hl.HeadlabError, match="a pickle with more in it than tensors") as caught:
        hl.load(tmp_path)
    message(caught)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", zoo.BRIDGED)
def test_a_bridge_computes_the_same_and_leaves_the_model_alone(tmp_path: Path, name: str) -> None:
    model = zoo.build(name).train()
    before, classes, attention = copy.deepcopy(model), kinds(model), model.config._attn_implementation
    bridge = hl.bridge(model)
    assert access.is_bridge(bridge)
    assert not access.is_bridge(model)
    assert not access.is_folded(bridge)
    assert model.training
    assert model.config._attn_implementation == attention
    assert kinds(model) == classes
    assert states_equal(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.eval()
    bridge.eval()
    assert torch.allclose(logits(bridge.original_model, name), logits(model, name), atol=2e-6)
    assert hl.heads(bridge) == hl.heads(model)
    assert access.fingerprint(bridge) == access.fingerprint(model)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter += 1
    assert states_equal(model, before)
    model.save_pretrained(tmp_path)
    assert states_equal(hl.load(tmp_path), before)


@pytest.mark.parametrize("name", zoo.BRIDGED)
def test_a_bridge_gives_back_a_clean_plain_model(tmp_path: Path, name: str) -> None:
    model = zoo.build(name)
    bridge = hl.bridge(model)
    bridge.original_model(**zoo.batch_for(name))  # leaves tensors with gradients in the components
    plain = hl.load(bridge)
    assert kinds(plain) == kinds(model)
    assert states_equal(plain, model)
    calls = []
    for _, point in bridge.hook_dict.items():
        point.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(logits(plain, name), logits(model, name), atol=2e-6)
    assert not calls
    plain.save_pretrained(tmp_path)
    assert states_equal(hl.load(tmp_path), model)
    with torch.no_grad():
        plain.get_input_embeddings().weight += 1
    assert not calls
    assert torch.allclose(logits(bridge.original_model, name), logits(model, name), atol=2e-6)
    assert calls


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "t5-encoder"])
def test_where_transformer_lens_has_no_adapter(name: str) -> None:
    model = zoo.build(name)
    with pytest.raises(hl.HeadlabError, match=f"TransformerLens cannot wrap this {type(model).__name__}") as caught:
        hl.bridge(model)
    message(caught)


def test_an_adapter_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge.sources import _bridge_builder

    build = _bridge_builder.build_bridge_from_module

    def wrong(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model.model.norm.weight += 1
        return build(model, *args, **kwargs)

    monkeypatch.setattr(_bridge_builder, "build_bridge_from_module", wrong)
    with pytest.raises(hl.HeadlabError, match="computes something else"):
        hl.bridge(zoo.build("llama-gqa"))


def test_a_folded_bridge_is_not_the_model() -> None:
    bridge = hl.bridge(zoo.build("gpt2"))
    assert access.describe(bridge)["weights"] == "raw"
    bridge.enable_compatibility_mode()
    assert access.is_folded(bridge)
    assert access.describe(bridge)["weights"] == "folded"
    for function in (access.bare_copy, hl.load, hl.bridge):
        with pytest.raises(hl.HeadlabError, match="compatibility mode") as caught:
            function(bridge)
        message(caught)
