from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import headlab as hl
from headlab.models import access
from tests.helpers import zoo
from tests.helpers.words import save_with_tokenizer


@pytest.mark.parametrize("name", zoo.ALL)
def test_fingerprints_tell_models_apart(name: str) -> None:
    model = zoo.build(name)
    fingerprint = access.fingerprint(model)
    assert len(fingerprint) == 12
    assert int(fingerprint, 16) >= 0
    assert access.fingerprint(zoo.build(name)) == fingerprint
    assert access.fingerprint(zoo.build(name).bfloat16()) == fingerprint
    assert access.fingerprint(zoo.build(name, seed=1)) != fingerprint


def test_a_description_says_what_was_used() -> None:
    model = zoo.build("llama-gqa").bfloat16()
    assert access.describe(model) == {
        "class": "LlamaForCausalLM",
        "name": None,
        "fingerprint": access.fingerprint(model),
        "dtype": "bfloat16",
        "weights": "raw",
        "versions": {"headlab": hl.__version__, "torch": torch.__version__, "transformers": hf.__version__},
    }


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_gives_everything_back(fails: bool) -> None:
    model = zoo.build("t5").train()
    model.encoder.eval()
    model.shared.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    assert len(set(modes)) == len(set(frozen)) == 2
    try:
        with access.evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen


@pytest.mark.parametrize("name", zoo.ALL)
def test_any_model_takes_the_probe(name: str) -> None:
    model = zoo.build(name)
    with torch.no_grad():
        assert torch.isfinite(model(**access.probe_batch(model))[0]).all()


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_any_changed_projection_changes_the_fingerprint(projection: str) -> None:
    model = zoo.build("llama-gqa")
    before = access.fingerprint(model)
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, projection).weight.mul_(1.5)
    assert access.fingerprint(model) != before


def test_evaluating_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = zoo.build("llama-gqa")
    with access.evaluating(model), torch.inference_mode():
        assert model(**access.probe_batch(model)).logits.isfinite().all()


def test_the_tokenizer_beside_a_model_comes_before_that_of_a_bridge(tmp_path: Path) -> None:
    """TransformerLens may have changed its own to put the first token in front."""
    plain = hl.load(save_with_tokenizer(zoo.build("llama-gqa"), tmp_path))
    words = [access.tokenizer(model) for model in (plain, hl.bridge(plain))]
    text = words[0].decode([5, 7, 11])
    assert words[0](text)["input_ids"] == words[1](text)["input_ids"]
