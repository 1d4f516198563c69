from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headlab as hl
from headlab.circuits.matrices import ov, qk
from headlab.circuits.summary import DISTANCES, CircuitTable, circuit_table, copying
from headlab.models.access import rows
from headlab.models.norms import final_norm, gain
from headlab.models.positions import is_rotary
from tests.helpers import surgical, zoo


@pytest.mark.parametrize("norm", ["raw", "fold"])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama-gqa", "gemma3", "dcformer-mha"])
def test_the_numbers_are_those_of_the_whole_matrices(name: str, norm: str) -> None:
    model = zoo.build(name)
    table = circuit_table(model, norm).to_frame().set_index("head")
    assert list(table.index) == [str(head) for head in hl.heads(model)]
    embed = model.get_input_embeddings().weight.detach().double()
    unembed = model.get_output_embeddings().weight.detach().double().T
    last = final_norm(model, rows(model)[0])
    assert last is not None
    if norm == "fold":
        unembed = gain(last).before(unembed)
    for head in hl.heads(model)[::4]:
        line = table.loc[str(head)]
        circuits = {"qk": qk(model, head.layer, head.index, norm=norm), "ov": ov(model, head.layer, head.index, norm=norm)}
        for circuit, factors in circuits.items():
            values = torch.linalg.svdvals(factors.AB.double())
            assert line[f"{circuit}_frobenius"] == pytest.approx(float(values.norm()))
            assert line[f"{circuit}_spectral"] == pytest.approx(float(values[0]))
            assert line[f"{circuit}_rank"] == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-4)
            shown = line[[f"{circuit}_s{i}" for i in range(1, min(8, head.d_head) + 1)]].to_numpy(dtype=float)
            np.testing.assert_allclose(shown, values[: len(shown)], rtol=1e-4)
        whole = torch.linalg.eigvals(embed @ circuits["ov"].AB.double() @ unembed)  # [token, token]
        assert line["copying"] == pytest.approx(float(whole.real.sum() / whole.abs().sum()), abs=1e-5)
        largest = whole[whole.abs().argsort(descending=True)[: head.d_head]]
        assert line["ov_positive"] == pytest.approx(float((largest.real > 0).double().mean()))
        if is_rotary(model, rows(model)[head.row]):
            content = qk(model, head.layer, head.index, norm=norm, distance=0).AB.double()
            for distance in DISTANCES[::3]:
                moved = qk(model, head.layer, head.index, norm=norm, distance=distance).AB.double() - content
                share = content.square().sum() / (content.square().sum() + moved.square().sum())
                assert line[f"content_{distance}"] == pytest.approx(float(share), abs=1e-4)


def test_learned_positions_have_shares_instead_of_distances() -> None:
    table = circuit_table(zoo.build("gpt2"))
    frame = table.to_frame()
    parts = ["token_token", "token_position", "position_token", "position_position"]
    assert set(parts) < set(table.columns)
    np.testing.assert_allclose(frame[parts].sum(axis=1), 1)
    assert not any(name.startswith("content") for name in table.columns)


@pytest.mark.parametrize(
    ("name", "word"),
    [("bert", "does not end in an unembedding"), ("t5-encoder", "unembedding"), ("electra", "does not begin with")],
)
def test_without_embeddings_the_copying_score_is_missing_and_it_says_why(name: str, word: str) -> None:
    table = circuit_table(zoo.build(name))
    frame = table.to_frame()
    assert frame["copying"].isna().all()
    assert frame["why"].str.contains(word).all()
    assert frame["ov_frobenius"].notna().all()
    with pytest.raises(hl.HeadlabError, match="copying is not known of every head, L0H0 for one"):
        table.scores("copying")


def test_only_the_decoder_of_two_stacks_writes_to_the_unembedding() -> None:
    frame = circuit_table(zoo.build("t5")).to_frame()
    assert list(frame["stack"].unique()) == ["enc", "dec", "cross"]
    assert (frame["copying"].isna() == (frame["stack"] == "enc")).all()
    assert (frame["exact"] == (frame["stack"] == "cross")).all()
    assert frame.loc[frame["stack"] == "enc", "why"].str.contains("encoder do not write").all()


def test_what_is_exact_says_so_and_what_is_not_says_why() -> None:
    for name, exact in (("llama-gqa", True), ("gpt2", True), ("gemma2", False), ("bert-mlm", False), ("qwen3", False)):
        frame = circuit_table(zoo.build(name)).to_frame()
        assert (frame["exact"] == exact).all()
        assert (frame["why"].str.len() > 0).eq(not exact).all()
    assert frame["copying"].notna().all()


def test_a_pruned_model_has_the_lines_of_the_heads_that_stayed() -> None:
    for name in ("gpt2", "llama-gqa"):
        model = zoo.build(name)
        small = hl.prune(model, surgical.random_mask(model, 1))
        whole, table = circuit_table(model).to_frame(), circuit_table(small)
        frame = table.to_frame()
        assert list(frame["head"]) == [str(head) for head in hl.heads(small)]
        kept = whole[whole["head"].isin(frame["head"])].reset_index(drop=True)
        for column in ("copying", "qk_spectral", "ov_rank", "ov_positive"):
            np.testing.assert_allclose(frame[column], kept[column], rtol=1e-6, atol=1e-9)
        assert [len(row) for row in table.scores("ov_rank").rows] == [len(row.heads) for row in rows(small)]


def test_a_composed_head_without_output_keeps_its_line_with_a_hole() -> None:
    model = zoo.build("dcformer-gqa")
    table = circuit_table(hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L1H2"])))
    line = table.to_frame().set_index("head").loc["L1H2"]
    assert np.isnan(line["ov_frobenius"])
    assert np.isnan(line["copying"])
    assert line["qk_frobenius"] > 0
    assert "no output is left of the head" in line["why"]
    assert "composed" in line["why"]
    assert "L1H2" not in [str(head) for head, _ in table.top(100)]


def test_layers_without_rotation_have_no_content_by_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.ZOO, "smollm3", surgical.MORE["smollm3"])
    model = zoo.build("smollm3")
    model.model.layers[1].self_attn.use_rope = False
    frame = circuit_table(model).to_frame()
    assert (frame["content_4"].isna() == (frame["layer"] == 1)).all()


def test_a_table_is_saved_sorted_and_drawn_from(tmp_path: Path) -> None:
    table = circuit_table(zoo.build("llama-mqa"), norm="raw")
    again = CircuitTable.load(table.save(tmp_path / "circuits.json"))
    assert again.to_frame().equals(table.to_frame())
    assert again.record == table.record
    assert again.heads == table.heads
    frame = table.to_frame().sort_values("qk_rank", ascending=False)
    assert [(str(head), value) for head, value in table.top(4, by="qk_rank")] == list(
        frame[["head", "qk_rank"]].head(4).itertuples(index=False, name=None)
    )
    assert table.scores("copying").record["method"] == "copying"
    np.testing.assert_allclose(table.scores("copying").flat, table.to_frame()["copying"])
    assert repr(table) == "CircuitTable(18 heads in 3 rows, norm='raw')"
    with pytest.raises(hl.HeadlabError, match="there is no number 'size' here, but qk_frobenius"):
        table.top(by="size")


def test_a_head_of_zeros_has_no_rank_and_does_not_copy(tmp_path: Path) -> None:
    model = zoo.build("llama-mha")
    model.model.layers[1].self_attn.o_proj.weight.data[:, 20:30] = 0
    model.model.layers[1].self_attn.q_proj.weight.data[20:30] = 0
    table = circuit_table(model)
    line = CircuitTable.load(table.save(tmp_path / "zero.json")).to_frame().set_index("head").loc["L1H2"]
    assert line["ov_frobenius"] == 0
    assert line[["ov_rank", "copying", "ov_positive", "qk_rank", "content_1"]].isna().all()


def test_layers_without_heads_have_no_lines() -> None:
    model = hl.prune(zoo.build("llama-mha"), surgical.without_rows(zoo.build("llama-mha"), 1, 2))
    assert [len(row) for row in circuit_table(model).values("qk_rank")] == [6, 0, 0]


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 7), sign=st.sampled_from([1, -1]))
def test_copying_is_one_for_positive_matrices_and_minus_one_for_negative(seed: int, n: int, sign: int) -> None:
    x = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    score, positive = copying(torch.linalg.eigvals(sign * (x @ x.T + 0.1 * torch.eye(n))))
    assert score == pytest.approx(sign)
    assert positive == (sign > 0)
