"""Variants of Hugging Face models: classes made at run time, which nest, and behave like those they are made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headlab import HeadlabError
from headlab.dcmha.attachment import COMPOSING
from headlab.models import variants
from headlab.models.variants import Variant, base_name, base_of, become
from headlab.pruning.narrowed import PRUNING
from tests.helpers import zoo


def _build(model: Any) -> None:
    if model.config.wings is None:
        raise HeadlabError("no wings")
    model.wings = nn.Linear(model.config.wings["span"], 2)


@pytest.fixture(scope="module")
def winged() -> Iterator[Variant]:
    """A variant with a further linear map, for these tests."""
    made = Variant("Winged", "winged_", "wings", _build, about="with wings", home=__name__)
    yield made
    variants._variants.remove(made)
    for mapping in (CONFIG_MAPPING, modeling_auto.MODEL_MAPPING, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING):
        extra = mapping._extra_content
        for key in [key for key in extra if "winged" in str(key).lower()]:
            del extra[key]


def test_classes(winged: Variant) -> None:
    cls, config = winged.model_class(hf.LlamaForCausalLM), winged.config_class(hf.LlamaConfig)
    assert (cls.__name__, config.__name__, config.model_type) == (
        "WingedLlamaForCausalLM", "WingedLlamaConfig", "winged_llama",
    )  # fmt: skip
    assert cls.config_class is config
    assert issubclass(cls, hf.LlamaForCausalLM)
    assert issubclass(config, hf.LlamaConfig)
    assert (base_of(cls), base_of(config)) == (hf.LlamaForCausalLM, hf.LlamaConfig)
    assert cls.__module__ == config.__module__ == __name__
    assert "with wings" in str(cls.__doc__)
    assert winged.model_class(hf.LlamaForCausalLM) is cls
    assert winged.model_class(cls) is cls
    assert winged.config_class(config) is config
    with pytest.raises(HeadlabError, match="no wings"):
        cls(config(**zoo._LLAMA))


def test_a_model_becomes_a_variant_saves_and_reloads(winged: Variant, tmp_path: Path) -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    before, config = model(**batch).logits, model.config
    model.wings = nn.Linear(3, 2)
    winged.enter(model, {"span": 3})
    assert model.config is config is model.model.config
    assert type(model) is winged.model_class(hf.LlamaForCausalLM)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["wings"] == {"span": 3}
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert type(hf.AutoModel.from_pretrained(tmp_path)) is winged.model_class(hf.LlamaModel)
    assert torch.equal(again.wings.weight, model.wings.weight)
    assert torch.equal(again(**batch).logits, before)
    for one in (model, again):
        winged.leave(one)
        assert (type(one), type(one.config)) == (hf.LlamaForCausalLM, hf.LlamaConfig)
        assert not hasattr(one.config, "wings")
        assert one.config.architectures == ["LlamaForCausalLM"]


def test_variants_nest(winged: Variant) -> None:
    outer = PRUNING.model_class(winged.model_class(hf.LlamaForCausalLM))
    assert outer.__name__ == "PrunedWingedLlamaForCausalLM"
    assert outer.config_class.model_type == "headlab_winged_llama"
    config = outer.config_class(**zoo._LLAMA, wings={"span": 3})  # its models are registered now: each with its own config
    found = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    assert found[outer.config_class] is outer
    assert found[winged.config_class(hf.LlamaConfig)] is winged.model_class(hf.LlamaForCausalLM)
    assert (config.headlab, config.wings) == (None, {"span": 3})
    assert base_name(outer.__name__) == ("LlamaForCausalLM", (winged, PRUNING))
    assert base_name("headlab_winged_llama") == ("llama", (winged, PRUNING))


def test_names_without_their_variants() -> None:
    assert base_name("LlamaForCausalLM") == ("LlamaForCausalLM", ())
    assert base_name("PrunedComposedGPT2DoubleHeadsModel") == ("GPT2DoubleHeadsModel", (COMPOSING, PRUNING))
    assert base_name("headlab_gpt_neox") == ("gpt_neox", (PRUNING,))


def test_every_described_model_type_has_its_variants() -> None:
    for name in ("gpt2", "llama", "gpt_neox", "bert", "vit"):
        for kind in ("headlab_", "composed_", "headlab_composed_"):
            assert CONFIG_MAPPING[kind + name].model_type == kind + name
    assert "composed_nonsense" not in CONFIG_MAPPING
    COMPOSING.announce(["nonsense"])
    assert "composed_nonsense" not in CONFIG_MAPPING


@pytest.mark.parametrize("variant", [PRUNING, COMPOSING], ids=["pruned", "composed"])
def test_variants_can_do_what_their_base_can(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    for base, attention, experts in ((hf.MixtralForCausalLM, True, True), (hf.LlamaForCausalLM, True, False)):
        for what in ("attn", "experts"):
            monkeypatch.delattr(base, f"_can_set_{what}_implementation_cached_value", raising=False)
        made = variant.model_class(base)
        assert made._can_set_attn_implementation() is attention
        assert made._can_set_experts_implementation() is experts


def test_what_a_model_can_return_after_a_change_of_class() -> None:
    model, batch = zoo.build("bert"), zoo.batch_for("bert")
    become(model, type("OtherBertModel", (hf.BertModel,), {}))
    output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == zoo.LAYERS + 1
