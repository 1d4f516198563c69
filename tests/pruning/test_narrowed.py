"""Pruned models are ordinary Hugging Face models: they save, reload, train and keep what was set on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import headlab as hl
from headlab.models.access import head_rows
from headlab.models.families import families
from headlab.pruning import narrowed
from tests.helpers import zoo
from tests.helpers.surgical import GENERATES, MORE, build, generated, in_steps, near, outputs, prompt, without_rows

TASK = {
    "bert": "AutoModel", "bert-mlm": "AutoModelForMaskedLM", "roberta": "AutoModelForMaskedLM",
    "electra": "AutoModelForMaskedLM", "bert-classifier": "AutoModelForSequenceClassification",
    "xlm-roberta": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM", "t5-encoder": "AutoModelForTextEncoding",
}  # fmt: skip
RELOAD = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
import headlab.surgery
import transformers

for folder, auto in json.loads(sys.argv[1]):
    batch, found = load_file(folder + "/../batch.safetensors"), {}
    for name in (auto, "AutoModel"):
        if "t5-encoder" in folder and name == "AutoModel":
            continue
        model = getattr(transformers, name).from_pretrained(folder)
        assert model.config.model_type.startswith("headlab_") and not model.training
        with torch.no_grad():
            found[name] = model(**batch)[0].contiguous()
    save_file(found, folder + "/../found.safetensors")
"""


def in_a_fresh_process(script: str, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(hl.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", script, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def case(name: str) -> tuple[nn.Module, hl.HeadMask, hl.Fill, dict[str, Tensor]]:
    """A model, a mask that takes a whole layer and more, a fill, a batch."""
    model, batch = build(name), zoo.batch_for(name, labels=False)
    rows = head_rows(model)
    keep = [[(row + i) % 3 > 0 and row != 1 for i in range(len(heads))] for row, heads in enumerate(rows)]
    return model, hl.HeadMask(keep, rows), hl.fill(model, [batch]), batch


def test_a_fresh_process_opens_them_with_auto_classes(tmp_path: Path) -> None:
    expected, folders = {}, []
    for name in [*zoo.ALL, *MORE]:
        model, mask, fill, batch = case(name)
        hl.prune(model, mask, fill).save_pretrained(tmp_path / name / "model")
        save_file(batch, tmp_path / name / "batch.safetensors")
        with hl.masked(model, mask, fill), torch.no_grad():
            found = model(**batch, output_hidden_states=True)
        hidden = found["decoder_hidden_states" if name == "t5" else "hidden_states"][-1]
        auto = TASK.get(name, "AutoModelForCausalLM")
        expected[name] = {"AutoModel": hidden, auto: found[0]}
        folders.append((str(tmp_path / name / "model"), auto))
    in_a_fresh_process(RELOAD, json.dumps(folders))
    for name, outputs_by_class in expected.items():
        found = load_file(tmp_path / name / "found.safetensors")
        assert found.keys() == outputs_by_class.keys() - ({"AutoModel"} if name == "t5-encoder" else set())
        for auto, output in found.items():
            near(output, outputs_by_class[auto])


def test_load_needs_no_other_import(tmp_path: Path) -> None:
    model, mask, fill, batch = case("llama-gqa")
    folder = hl.save_pruned(hl.prune(model, mask, fill), tmp_path / "model")
    save_file(batch, tmp_path / "batch.safetensors")
    in_a_fresh_process(
        "import sys, headlab as hl; from safetensors.torch import load_file, save_file\n"
        "model, batch = hl.load(sys.argv[1] + '/model'), load_file(sys.argv[1] + '/batch.safetensors')\n"
        "save_file({'logits': model(**batch).logits.detach()}, sys.argv[1] + '/found.safetensors')\n",
        str(tmp_path),
    )
    with hl.masked(model, mask, fill):
        near(load_file(tmp_path / "found.safetensors")["logits"], outputs(model, batch))
    assert folder == tmp_path / "model"


@pytest.mark.parametrize("name", [*zoo.ALL, *MORE])
@pytest.mark.parametrize("gqa", ["pad", "ungroup"])
def test_reloaded_equals_pruned(name: str, gqa: Any, tmp_path: Path) -> None:
    model, mask, fill, batch = case(name)
    small = hl.prune(model, mask, fill if gqa == "pad" else None, gqa=gqa)
    again = hl.load(hl.save_pruned(small, tmp_path / "x"))
    assert type(again) is type(small)
    assert again.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in small.state_dict().items())
    assert hl.heads(again) == hl.heads(small) == mask.kept
    assert str(hl.kept(again)) == str(hl.kept(small))
    assert torch.equal(outputs(again, batch), outputs(small, batch))
    if name in GENERATES:
        assert torch.equal(generated(again, prompt(name))[1], generated(small, prompt(name))[1])


@pytest.mark.parametrize("name", [*zoo.ALL, *MORE])
def test_a_model_without_any_head_reloads(name: str, tmp_path: Path) -> None:
    model, _, fill, batch = case(name)
    small = hl.prune(model, without_rows(model, *range(len(head_rows(model)))), fill)
    again = hl.load(hl.save_pruned(small, tmp_path / "x"))
    assert hl.heads(again) == []
    assert torch.equal(outputs(again, batch), outputs(small, batch))


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
@pytest.mark.parametrize("layer", range(zoo.LAYERS))
def test_the_cache_of_a_reloaded_model(name: str, layer: int, tmp_path: Path) -> None:
    model = build(name)
    mask = without_rows(model, layer)
    again = hl.load(hl.save_pruned(hl.prune(model, mask), tmp_path / "x"))
    ids = torch.randint(3, zoo.VOCAB, (2, 8))
    with hl.masked(model, mask):
        near(in_steps(again, ids, (3, 4, 1)), outputs(model, {"input_ids": ids}))


def test_a_reloaded_model_is_pruned_again(tmp_path: Path) -> None:
    model, mask, _, batch = case("llama-gqa")
    again = hl.load(hl.save_pruned(hl.prune(model, mask), tmp_path / "x"))
    gone = [str(head) for head in hl.heads(again)[::3]]
    fill = hl.fill(again, [batch])
    second = hl.HeadMask.without(hl.heads(again), gone)
    reloaded = hl.load(hl.save_pruned(hl.prune(again, second, fill), tmp_path / "y"))
    with hl.masked(again, second, fill):
        near(outputs(reloaded, batch), outputs(again, batch))
    assert [str(head) for head in hl.heads(reloaded)] == [str(h) for h in mask.kept if str(h) not in gone]
    assert hl.kept(reloaded)["heads_before"].tolist() == [6, 6, 6]


@pytest.mark.parametrize(("name", "had"), [("llama-gqa", False), ("t5", False), ("gpt2", True), ("bert", True)])
def test_a_fill_makes_a_bias_where_there_was_none(name: str, had: bool, tmp_path: Path) -> None:
    model, mask, fill, batch = case(name)
    small = hl.prune(model, mask, fill)
    sites = [head.site for heads in head_rows(model) for head in heads[:1]]
    assert [model.get_submodule(site).bias is not None for site in sites] == [had] * len(sites)
    again = hl.load(hl.save_pruned(small, tmp_path / "x"))
    for row, site in enumerate(sites):
        projection = model.get_submodule(site)
        weight = projection.weight if name == "gpt2" else projection.weight.T
        gone = (mask.rows[row] == 0).repeat(fill.values[row].shape[-1])
        bias = fill.values[row].flatten()[gone].double() @ weight[gone].double() + (projection.bias if had else 0)
        near(again.get_submodule(site).bias, bias.float(), atol=1e-6)
    assert all(hl.prune(model, mask).get_submodule(site).bias is None for site in sites) or had
    with hl.masked(model, mask, fill):
        near(outputs(again, batch), outputs(model, batch))


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bert-mlm", "t5", "llama-mqa"])
def test_tied_embeddings_stay_tied(name: str, tmp_path: Path) -> None:
    model, mask, _, _ = case(name)
    small = hl.prune(model, mask)
    for found in (small, hl.load(hl.save_pruned(small, tmp_path / "x"))):
        tied = found.get_input_embeddings().weight is found.get_output_embeddings().weight
        assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
        assert tied == (name != "llama-mqa")


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert-mlm", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, mask, _, batch = case(name)
    model.to(dtype)
    fill = hl.fill(model, [batch])
    small = hl.prune(model, mask, fill)
    with hl.masked(model, mask, fill):
        expected = outputs(model, batch)
    for found in (small, hl.load(hl.save_pruned(small, tmp_path / "x"))):
        kept_in_float32 = "wo" if dtype == torch.float16 else "no such name"  # by transformers, in T5
        assert {p.dtype for key, p in found.named_parameters() if kept_in_float32 not in key} == {dtype}
        assert found.dtype == dtype
        near(outputs(found, batch).float(), expected.float(), atol=0.05 * expected.abs().max().item())
    assert hl.load(tmp_path / "x").config.dtype == dtype
    assert hl.load(tmp_path / "x", dtype=torch.float32).dtype == torch.float32


def test_generation_config_and_settings_stay(tmp_path: Path) -> None:
    model, mask, _, _ = case("llama-gqa")
    model.generation_config.update(max_new_tokens=17, repetition_penalty=1.5)
    model.config.label_of_mine = "mine"
    small = hl.prune(model, mask)
    for found in (small, hl.load(hl.save_pruned(small, tmp_path / "x"))):
        assert (found.generation_config.max_new_tokens, found.generation_config.repetition_penalty) == (17, 1.5)
        assert found.config.label_of_mine == "mine"
        assert found.config.model_type == "headlab_llama"
        assert found.config.num_attention_heads == 6
    assert json.loads((tmp_path / "x" / "config.json").read_text())["architectures"] == ["PrunedLlamaForCausalLM"]


@pytest.mark.parametrize("name", zoo.WITH_LOSS)
def test_a_training_step(name: str) -> None:
    model, mask, fill, _ = case(name)
    small, batch = hl.prune(model, mask, fill).train(), zoo.batch_for(name)
    empty, norms = ("h.1.", "layers.1.", "block.1."), ("ln_1.", "input_layernorm.", "layer.0.layer_norm.")
    for key in without_gradient(small, batch) - without_gradient(model, batch):  # before attention that is no more
        assert any(layer in key for layer in empty)
        assert any(norm in key for norm in norms)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    before = hl.own_loss(small.eval(), batch).mean()
    optimizer.step()
    assert hl.own_loss(small, batch).mean() < before


def without_gradient(model: nn.Module, batch: dict[str, Tensor]) -> set[str]:
    model.zero_grad()
    hl.own_loss(model, batch).mean().backward()
    return {key for key, parameter in model.named_parameters() if parameter.grad is None and parameter.numel()}


def words() -> hf.PreTrainedTokenizerFast:
    numbers = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, zoo.VOCAB)}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("name", ["llama-gqa", "bert-mlm", "t5"])
def test_a_tokenizer_goes_with_it(name: str, tmp_path: Path) -> None:
    model, mask, _, _ = case(name)
    folder = hl.save_pruned(hl.prune(model, mask), tmp_path / "x", words())
    assert hf.AutoTokenizer.from_pretrained(folder)("w5 w77")["input_ids"] == [5, 77]
    if name == "llama-gqa":
        by_text = hl.importance(hl.load(folder), ["w5 w77 w9", "w8 w7"])
        batch = {
            "input_ids": torch.tensor([[5, 77, 9], [8, 7, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        }
        assert by_text.flat.tolist() == hl.importance(hl.load(folder), [batch]).flat.tolist()


def test_no_pickle_is_written(tmp_path: Path) -> None:
    model, mask, fill, _ = case("t5")
    hl.save_pruned(hl.prune(model, mask, fill), tmp_path / "x", words())
    assert {path.suffix for path in (tmp_path / "x").iterdir()} == {".safetensors", ".json"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    model, mask, _, _ = case("llama-gqa")
    small = hl.prune(model, mask)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in ("full", "file"):
        with pytest.raises(hl.HeadlabError, match="already holds something"):
            hl.save_pruned(small, tmp_path / taken)
    assert (tmp_path / "full" / "config.json").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert hl.load(hl.save_pruned(small, tmp_path / "empty")).config.headlab
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_save_that_fails(error: BaseException, tmp_path: Path, monkeypatch: Any) -> None:
    model, mask, _, _ = case("llama-gqa")
    small = hl.prune(model, mask)

    def fail(folder: Path, **_: Any) -> None:
        (Path(folder) / "half").write_text("half")
        raise error

    monkeypatch.setattr(small, "save_pretrained", fail)
    with pytest.raises(hl.HeadlabError if isinstance(error, OSError) else KeyboardInterrupt, match=r"No space|^$"):
        hl.save_pruned(small, tmp_path / "x")
    assert not list(tmp_path.iterdir())


# those of headlab itself: pruned models of other packages (probes) are made known when one is loaded
DESCRIBED = {t for family in families() if family.name != "cross_composition_probe" for t in family.model_types}


@pytest.mark.parametrize("model_type", sorted(DESCRIBED))
def test_every_described_model_type_is_registered(model_type: str) -> None:
    config = hf.AutoConfig.for_model("headlab_" + model_type)
    assert isinstance(config, CONFIG_MAPPING[model_type])
    base = hf.AutoModel._model_mapping[type(config)]
    assert base.__name__.startswith("Pruned")
    assert base.config_class is type(config)


def test_a_pruned_config_must_fit_its_model() -> None:
    small = hl.prune(*case("llama-gqa")[:2])
    small.config.headlab["groups"] = small.config.headlab["groups"][:2]
    with pytest.raises(hl.HeadlabError, match="describes 2 attention modules, but the model has 3"):
        type(small)(small.config)
    with pytest.raises(hl.HeadlabError, match=r"hl\.prune makes it"):
        type(small)(narrowed.PRUNING.config_class(hf.LlamaConfig)(**zoo._LLAMA))
