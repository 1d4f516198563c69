from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

import headlab as hl
from headlab.data.texts import MASKED_SHARE
from tests.helpers import zoo
from tests.helpers.words import WORDS, save_with_tokenizer, tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ["llama-gqa", "bert-mlm", "bert-classifier", "t5", "bert"]
    root = tmp_path_factory.mktemp("models")
    return {name: save_with_tokenizer(zoo.build(name), root / name) for name in names}


def test_running_text_is_cut_without_overlap_or_gap() -> None:
    text = " ".join(WORDS[i % len(WORDS)] for i in range(47))
    batches = hl.text_batches(tokenizer(), text, examples=5, length=7, batch_size=2)
    assert [b["input_ids"].shape for b in batches] == [(2, 7), (2, 7), (1, 7)]
    joined = torch.cat([b["input_ids"].flatten() for b in batches]).tolist()
    assert joined == tokenizer()(text)["input_ids"][:35]


def test_a_short_text_gives_fewer_examples_and_a_shorter_one_an_error() -> None:
    text = " ".join(WORDS[:17])
    assert hl.text_batches(tokenizer(), text, examples=100, length=5)[0]["input_ids"].shape == (3, 5)
    with pytest.raises(hl.HeadlabError, match="17 tokens, fewer than one example of 19"):
        hl.text_batches(tokenizer(), text, length=19)
    with pytest.raises(hl.HeadlabError, match="examples must be at least 1, not 0"):
        hl.text_batches(tokenizer(), text, examples=0)


def test_a_causal_model_reads_text(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(WORDS), encoding="utf-8")
    model = hl.load(folders["llama-gqa"])
    batches = hl.read_batches(model, file, examples=2, length=11, batch_size=2)
    assert batches[0]["input_ids"].shape == (2, 11)
    assert hl.own_loss(model, batches[0]).shape == (2,)


def test_a_masked_model_has_to_find_hidden_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(WORDS * 13), encoding="utf-8")
    model = hl.load(folders["bert-mlm"])
    plain = hl.text_batches(tokenizer(), file.read_text(), examples=29, length=31, batch_size=29)[0]["input_ids"]
    batch = hl.read_batches(model, file, examples=29, length=31, batch_size=29)[0]
    hidden = batch["labels"] != -100
    assert (batch["input_ids"][hidden] == tokenizer().mask_token_id).all()
    assert (batch["labels"][hidden] == plain[hidden]).all()
    assert (batch["input_ids"][~hidden] == plain[~hidden]).all()
    assert hidden.any(-1).all()
    assert abs(hidden.float().mean() - MASKED_SHARE) < 0.04
    again = hl.read_batches(model, file, examples=29, length=31, batch_size=29)[0]
    assert torch.equal(again["input_ids"], batch["input_ids"])


def test_json_lines_for_a_classifier_and_an_encoder_decoder(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": " ".join(WORDS[:n]), "label": n % 3, "target": " ".join(WORDS[n : 2 * n])} for n in (3, 5, 2)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    labelled = hl.read_batches(hl.load(folders["bert-classifier"]), file, batch_size=2)
    assert [b["input_ids"].shape for b in labelled] == [(2, 5), (1, 2)]
    assert labelled[0]["labels"].tolist() == [0, 2]
    translated = hl.read_batches(hl.load(folders["t5"]), file, batch_size=3)[0]
    assert translated["labels"].shape == (3, 5)
    assert (translated["labels"] == -100).sum(-1).tolist() == [2, 0, 3]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"text": "a"}', '{"text": "a", "label": null}'])
def test_a_line_that_does_not_fit_is_named(line: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": 1}\n' + line, encoding="utf-8")
    with pytest.raises(hl.HeadlabError, match='line 2: this model needs JSON lines with "text" and "label"'):
        hl.read_batches(hl.load(folders["bert-classifier"]), file)


def test_labels_by_name_and_labels_that_there_are_not(folders: dict[str, Path], tmp_path: Path) -> None:
    model, file = hl.load(folders["bert-classifier"]), tmp_path / "rows.jsonl"
    model.config.label2id = {"good": 0, "bad": 1, "neither": 2}
    lines = ['{"text": "w1", "label": "bad"}', '{"text": "w2", "label": 2}', '{"text": "w3", "label": "good"}']
    file.write_text("\n".join(lines), encoding="utf-8")
    assert hl.read_batches(model, file)[0]["labels"].tolist() == [1, 2, 0]
    for wrong, shown in (('"ugly"', "'ugly'"), ("3", "3"), ("-1", "-1"), ("1.5", "1.5")):
        file.write_text("\n".join([*lines, f'{{"text": "w", "label": {wrong}}}']), encoding="utf-8")
        with pytest.raises(
            hl.HeadlabError, match=rf"line 4: the model has no label {shown}; it has 0 \(good\), 1 \(bad\), 2"
        ):
            hl.read_batches(model, file)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    for name in ("llama-gqa", "gpt2", "bert-mlm", "t5"):
        zoo.build(name).save_pretrained(tmp_path / name)
        with pytest.raises(hl.HeadlabError, match="no tokenizer lies beside the model"):
            hl.read_batches(hl.load(tmp_path / name), __file__)


def test_errors_say_what_to_do(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(hl.HeadlabError, match="cannot read the text file"):
        hl.read_batches(hl.load(folders["llama-gqa"]), tmp_path / "nothing.txt")
    with pytest.raises(hl.HeadlabError, match="no tokenizer"):
        hl.read_batches(zoo.build("llama-gqa"), tmp_path / "nothing.txt")
    with pytest.raises(hl.HeadlabError, match="BertModel has no loss of its own"):
        hl.read_batches(hl.load(folders["bert"]), tmp_path / "nothing.txt")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(hl.HeadlabError, match="holds no examples"):
        hl.read_batches(hl.load(folders["bert-classifier"]), tmp_path / "empty.jsonl")
    assert isinstance(hl.load(folders["bert"]), hf.BertModel)
