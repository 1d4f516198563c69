from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headlab as hl
from headlab.circuits import tokens
from headlab.circuits.matrices import ov, qk
from headlab.circuits.tokens import Directions, directions, score_parts, top_pairs
from headlab.models.access import rows
from headlab.models.norms import final_norm, gain
from headlab.models.positions import learned_positions
from tests.helpers import zoo


def _whole(model: nn.Module, layer: int, head: int, circuit: str, norm: str, distance: int | None = None) -> Tensor:
    """The full circuit, [token, token], in float64."""
    embed = model.get_input_embeddings().weight.detach().double()
    if circuit == "qk":
        return embed @ qk(model, layer, head, norm=norm, distance=distance).AB.double() @ embed.T  # type: ignore[arg-type]
    unembed = model.get_output_embeddings().weight.detach().double().T
    last = final_norm(model, rows(model)[-1])
    if norm == "fold" and last is not None:
        unembed = gain(last).before(unembed)
    return embed @ ov(model, layer, head, norm=norm).AB.double() @ unembed  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [101, 1300, 2**23])
@pytest.mark.parametrize(
    ("name", "circuit", "norm", "distance"),
    [
        ("gpt2", "ov", "fold", None),
        ("gpt2", "qk", "raw", None),
        ("llama-gqa", "ov", "raw", None),
        ("llama-gqa", "qk", "fold", 3),
        ("gemma3", "ov", "fold", None),
        ("bert-mlm", "ov", "fold", None),
        ("dcpythia", "qk", "fold", 2),
    ],
)
def test_top_pairs_are_those_of_the_whole_matrix(
    name: str, circuit: str, norm: str, distance: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_BLOCK", block)
    model = zoo.build(name)
    found = top_pairs(model, 1, 2, circuit, 17, norm=norm, distance=distance)  # type: ignore[arg-type]
    whole = _whole(model, 1, 2, circuit, norm, distance)
    values, places = whole.flatten().topk(17)
    np.testing.assert_allclose(found["value"], values, rtol=1e-4)
    at = whole[found["source_id"].tolist(), found["target_id"].tolist()]
    np.testing.assert_allclose(found["value"], at, rtol=1e-4)
    assert found.loc[0, ["source_id", "target_id"]].tolist() == list(divmod(int(places[0]), whole.shape[1]))
    assert list(found["source"]) == [str(number) for number in found["source_id"]]
    assert len(found.drop_duplicates(["source_id", "target_id"])) == 17


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 13), m=st.integers(1, 11), k=st.integers(1, 150), rows=st.integers(1, 14)
)
def test_the_largest_of_any_matrix_are_found_block_by_block(seed: int, n: int, m: int, k: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-3, 4, (size, 2), generator=generator).double() for size in (n, m))  # many ties
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_BLOCK", rows * m)
        values, places = tokens._largest(a, b, k)
    whole = (a @ b.T).flatten()
    torch.testing.assert_close(values, whole.topk(min(k, n * m)).values)
    torch.testing.assert_close(whole[places], values)
    assert len(set(places.tolist())) == len(places)


@pytest.mark.parametrize(("name", "circuit"), [("gpt2", "ov"), ("llama-mqa", "qk"), ("gemma2", "ov")])
def test_directions_are_the_singular_vectors_read_as_tokens(name: str, circuit: str) -> None:
    model = zoo.build(name)
    found = directions(model, 2, 3, circuit, 3, 4)  # type: ignore[arg-type]
    frame = found.to_frame()
    factors = qk(model, 2, 3, norm="fold") if circuit == "qk" else ov(model, 2, 3, norm="fold")
    u, s, vh = torch.linalg.svd(factors.AB.double())
    embed = model.get_input_embeddings().weight.detach().double()
    unembed = gain(final_norm(model, rows(model)[0])).before(model.get_output_embeddings().weight.detach().double().T).T
    for i in range(3):
        sides = {"in": embed @ u[:, i], "out": (embed if circuit == "qk" else unembed) @ vh[i]}
        sign = sides["out"][sides["out"].abs().argmax()].sign()
        for side, along in sides.items():
            for end, largest in (("+", True), ("-", False)):
                lines = frame[(frame["direction"] == i) & (frame["side"] == side) & (frame["end"] == end)]
                np.testing.assert_allclose(lines["singular_value"], s[i], rtol=1e-4)
                expected = (sign * along).topk(4, largest=largest)
                assert list(lines["id"]) == expected.indices.tolist()
                np.testing.assert_allclose(lines["value"], expected.values, rtol=1e-3, atol=1e-5)
    assert found.record["exact"] == (name != "gemma2")
    assert [value for *_, value in found.top(2)] == frame["singular_value"].unique()[:2].tolist()


def test_directions_are_saved(tmp_path: Path) -> None:
    found = directions(zoo.build("llama-gqa"), 0, 5, "qk", 2, 3, distance=4)
    again = Directions.load(found.save(tmp_path / "directions.json"))
    assert again.to_frame().equals(found.to_frame())
    assert (again.head, again.circuit, again.record) == (found.head, "qk", found.record)
    assert found.record["distance"] == 4
    assert repr(found).startswith("Directions(L0H5 QK: '")


@pytest.mark.parametrize("name", ["gpt2", "bert-mlm", "roberta"])
@pytest.mark.parametrize("norm", ["raw", "fold"])
def test_the_parts_of_scores_are_those_of_all_pairs(name: str, norm: str) -> None:
    model = zoo.build(name)
    frame = score_parts(model, 1, 3, norm=norm).set_index(["query", "key"])  # type: ignore[arg-type]
    positions = learned_positions(model)
    assert positions is not None
    assert len(positions) == (61 if name != "roberta" else 60)
    sides = {"token": model.get_input_embeddings().weight.detach().double(), "position": positions.double()}
    circuit = qk(model, 1, 3, norm=norm).AB.double()  # type: ignore[arg-type]
    for a, queries in sides.items():
        for b, keys in sides.items():
            scores = queries @ circuit @ keys.T
            expected = scores.var(1, correction=0).mean().sqrt()
            assert frame.loc[(a, b), "std"] == pytest.approx(float(expected), rel=1e-4)
    assert frame["share"].sum() == pytest.approx(1)


def test_a_tokenizer_names_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return f"<{ids[0]}>"

    monkeypatch.setattr(tokens, "tokenizer", lambda _: Words())
    model = zoo.build("llama-mha")
    pairs = top_pairs(model, 0, 0, k=2)
    assert pairs["target"][0] == f"<{pairs['target_id'][0]}>"
    line = directions(model, 0, 0, k=1, tokens=1).lines[0]
    assert line["token"] == f"<{line['id']}>"


def test_what_cannot_be_read_says_why() -> None:
    with pytest.raises(hl.HeadlabError, match="no circuit to tokens here: the stream does not end in an unembedding"):
        top_pairs(zoo.build("bert"), 0, 0, "ov")
    with pytest.raises(hl.HeadlabError, match="no circuit from tokens here: the stream does not begin"):
        directions(zoo.build("electra"), 0, 0, "qk")
    with pytest.raises(hl.HeadlabError, match="heads of the encoder do not write to the unembedding"):
        directions(zoo.build("t5"), 0, 0, "ov", stack="enc")
    model = zoo.build("llama-mha")
    with pytest.raises(hl.HeadlabError, match="has no learned positions"):
        score_parts(model, 0, 0)
    with pytest.raises(hl.HeadlabError, match="circuit is 'qk' or 'ov', not 'vo'"):
        top_pairs(model, 0, 0, "vo")  # type: ignore[arg-type]
    with pytest.raises(hl.HeadlabError, match="an OV circuit is the same at every distance"):
        top_pairs(model, 0, 0, "ov", distance=1)
    with pytest.raises(hl.HeadlabError, match="k must be at least 1"):
        top_pairs(model, 0, 0, k=0)
    with pytest.raises(hl.HeadlabError, match="must be at least 1"):
        directions(model, 0, 0, tokens=0)


def test_a_bridge_gives_what_the_model_gives() -> None:
    model = zoo.build("gpt2")
    bridge = hl.bridge(model)
    assert top_pairs(bridge, 1, 2).equals(top_pairs(model, 1, 2))
    assert score_parts(bridge, 1, 2).equals(score_parts(model, 1, 2))
    ours, theirs = (directions(given, 1, 2).to_frame() for given in (model, bridge))
    assert ours["id"].equals(theirs["id"])
