from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headlab as hl
from headlab.attention.prompts import Pattern, attention_patterns
from headlab.hooks.patterns import Look, at_patterns
from headlab.models.access import rows
from tests.helpers import zoo
from tests.helpers.words import save_with_tokenizer


def one(name: str, example: int = 1) -> dict[str, Tensor]:
    """One example of the batch of the zoo, the second of which has five real tokens."""
    return {key: value[example : example + 1] for key, value in zoo.batch_for(name, labels=False).items()}


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "mistral", "bert", "dcformer-gqa", "t5", "t5-encoder"])
def test_patterns_are_those_seen_without_padding(name: str) -> None:
    model, batch = zoo.build(name), one(name)
    seen: dict[int, Look] = {}
    with torch.no_grad(), at_patterns(model, lambda row, look: seen.update({row.row: look})):
        model(**batch)
    found = attention_patterns(model, batch)
    assert list(found.heads) == hl.heads(model)
    assert found.composed == (name == "dcformer-gqa")
    for head in found.heads:
        assert found.of(head).shape == (5, 5)
        whole = seen[head.row].pattern[0, head.index, :5, :5]
        torch.testing.assert_close(found.of(head), whole, rtol=1e-3, atol=1e-4)
        assert found.values[head].dtype == torch.float16
        assert found.of(str(head)).equal(found.of(head))
        if found.composed:
            torch.testing.assert_close(
                found.of(head, raw=True), seen[head.row].raw[0, head.index, :5, :5], rtol=1e-3, atol=1e-4
            )
    ids = batch["input_ids"][0, :5].tolist()
    queries, keys = found.sides(found.heads[-1])
    assert keys == tuple(map(str, ids))  # there is no tokenizer
    assert queries == tuple(map(str, batch["decoder_input_ids"][0].tolist() if name == "t5" else ids))
    assert found.record["data"]["examples"] == 1
    assert found.record["model"]["class"] == type(model).__name__


def test_labels_are_turned_into_what_the_decoder_reads() -> None:
    model = zoo.build("t5")
    batch = {key: value[3:4] for key, value in zoo.batch_for("t5").items()}  # three labels and two without loss
    found = attention_patterns(model, batch, heads=["cross.L0H2"])
    assert list(found.tokens) == ["dec", "enc"]
    assert found.tokens["dec"] == tuple(map(str, [0, *batch["labels"][0, :2].tolist()]))
    assert found.of("cross.L0H2").shape == (3, 7)


def test_texts(tmp_path: Path) -> None:
    model = hl.load(save_with_tokenizer(zoo.build("llama-gqa"), tmp_path / "model"))
    found = attention_patterns(model, "w3 w5 w3 [EOS]", heads=["L2H4", hl.heads(model)[1]])
    assert [str(head) for head in found.heads] == ["L0H1", "L2H4"]
    assert found.sides("L0H1") == (("w3", "w5", "w3", "[EOS]"),) * 2
    bridged = attention_patterns(hl.bridge(model), torch.tensor([[8, 10, 8, 2]]))
    assert bridged.tokens == found.tokens
    torch.testing.assert_close(found.of("L2H4"), bridged.of("L2H4"))


def test_tokens_that_are_part_of_a_letter_keep_their_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return {7: "\ufffd", 8: "", 9: " the"}[ids[0]]

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"<0x{number}>" for number in ids]

    monkeypatch.setattr("headlab.attention.prompts.tokenizer", lambda _: Words())
    found = attention_patterns(zoo.build("gpt2"), torch.tensor([[7, 8, 9]]))
    assert found.tokens[""] == ("<0x7>", "<0x8>", " the")


@pytest.mark.parametrize("name", ["llama-gqa", "dcformer-mha", "t5"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    found = attention_patterns(zoo.build(name), one(name))
    again = Pattern.load(found.save(tmp_path / "patterns.safetensors"))
    assert (again.heads, again.tokens, again.record) == (found.heads, found.tokens, found.record)
    assert again.composed == found.composed
    for head in found.heads:
        assert again.values[head].equal(found.values[head])
        if found.composed:
            assert again.raw[head].equal(found.raw[head])
    (tmp_path / "other").write_text("{}")
    with pytest.raises(hl.HeadlabError, match="is not a result that this version"):
        Pattern.load(tmp_path / "other")


def test_pruned_models() -> None:
    model = zoo.build("dcformer-gqa")
    pruned = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L0H1", *(f"L1H{i}" for i in range(6))]))
    found = attention_patterns(pruned, one("dcformer-gqa"))
    assert [str(head) for head in found.heads if head.layer < 2] == ["L0H0", "L0H2", "L0H3", "L0H4", "L0H5"]
    assert found.of("L0H5").shape == (5, 5)
    with pytest.raises(hl.HeadlabError, match="no pattern of L0H1 in Pattern"):
        found.of("L0H1")


def test_tables_and_the_strongest_pairs() -> None:
    model = zoo.build("dcformer-mha")
    found = attention_patterns(model, one("dcformer-mha"))
    frame = found.to_frame()
    assert list(frame.columns) == ["head", "query", "key", "query_token", "key_token", "weight"]
    assert len(frame) == 18 * 15  # what a query sees of five tokens
    queries, keys = found.sides("L0H0")
    for line in frame.itertuples():
        assert line.weight == float(found.of(line.head)[line.query, line.key])
        assert (line.query_token, line.key_token) == (queries[line.query], keys[line.key])
    best = frame.sort_values("weight", ascending=False)
    top = found.top(7)
    assert [weight for *_, weight in top] == list(best["weight"][:7])
    assert all(float(found.of(head)[query, key]) == weight for head, query, key, weight in top)
    assert len(found.top(10**6)) == 18 * 25
    assert repr(found) == "Pattern(18 heads, 5 tokens)"


def test_bad_input() -> None:
    model = zoo.build("llama-gqa")
    for prompt, heads, said in (
        (zoo.batch_for("llama-gqa"), None, "a prompt is one example, but there are 4"),
        (one("llama-gqa"), ["L0H0", "L9H9"], "no heads named L9H9"),
        ("w1 w2", None, "the model brings no tokenizer"),
        (torch.zeros(1, 0, dtype=torch.long), None, "batch 0 is empty"),
    ):
        with pytest.raises(hl.HeadlabError, match=said):
            attention_patterns(model, prompt, heads)
    with pytest.raises(hl.HeadlabError, match="an encoder-decoder needs both sides"):
        attention_patterns(zoo.build("t5"), torch.tensor([[5, 6]]))
    found = attention_patterns(model, one("llama-gqa"), "L1H2")  # a single name will do
    assert [str(head) for head in found.heads] == ["L1H2"]
    with pytest.raises(hl.HeadlabError, match="the heads of this model are not composed"):
        found.of("L1H2", raw=True)


def test_rows_without_wanted_heads_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama-gqa")
    asked: list[int] = []

    def at(model: Any, see: Any, wanted: Any) -> Any:
        asked.extend(row.row for row in wanted)
        return at_patterns(model, see, wanted)

    monkeypatch.setattr("headlab.attention.prompts.at_patterns", at)
    attention_patterns(model, one("llama-gqa"), ["L1H2", "L1H0"])
    assert asked == [rows(model)[1].row]
