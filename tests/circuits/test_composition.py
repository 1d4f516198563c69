from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headlab as hl
from headlab.circuits.composition import CompositionScores, MapReader, composition_scores, map_composition
from headlab.errors import HeadlabError
from headlab.models.access import rows
from headlab.models.norms import circuits_of, gain, norm_before
from tests.helpers import surgical, zoo

NAMES = ["gpt2", "neox", "llama-mha", "llama-gqa", "llama-mqa", "gemma2", "bert", "dcformer-gqa"]


def circuits(model: nn.Module, norm: str = "raw", stack: str = "") -> dict[str, dict[str, Tensor]]:
    """Every head's whole d_model x d_model matrices, in float64."""
    found: dict[str, dict[str, Tensor]] = {}
    for row in rows(model):
        if row.stack != stack or not row.slots:
            continue
        p = circuits_of(model, row, norm)  # type: ignore[arg-type]
        name = f"{stack}{'.' if stack else ''}L{row.layer}H"
        for head, (v, o) in p.carrying.items():
            found.setdefault(f"{name}{head}", {})["V"] = p.v[v].double() @ p.o[o].double()
        for head, (q, k) in p.searching.items():
            qk = p.q[q].double() @ p.k[k].double().T
            found.setdefault(f"{name}{head}", {}).update(Q=qk, K=qk.T)
    return found


def check(scores: CompositionScores, whole: dict[str, dict[str, Tensor]], what: str) -> None:
    places = sorted(whole, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    sources, readers = ([name for name in places if kind in whole[name]] for kind in ("V", what))
    assert (list(map(str, scores.sources)), list(map(str, scores.readers))) == (sources, readers)
    for source, values in zip(scores.sources, scores.values, strict=True):
        for reader, value in zip(scores.readers, values, strict=True):
            a, b = whole[str(source)]["V"], whole[str(reader)][what]
            if reader.layer > source.layer:
                assert float(value) == pytest.approx(float((a @ b).norm() / (a.norm() * b.norm())), rel=1e-5)
            else:
                assert value.isnan()


@pytest.mark.parametrize("what", ["Q", "K", "V"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_whole_matrices(name: str, what: str) -> None:
    model = zoo.build(name)
    for norm in ("raw", "fold"):
        scores = composition_scores(model, what, norm)  # type: ignore[arg-type]
        check(scores, circuits(model, norm), what)
        assert scores.record["norm"] == norm
    assert scores.record["exact"] == (not scores.record["approximate"]) == (name in NAMES[:5])


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-mqa", "bert-mlm"])
def test_values_and_interface_are_those_of_transformer_lens(name: str) -> None:
    model = zoo.build(name)
    bridge = hl.bridge(model)
    for what in "QKV":
        ours, theirs = composition_scores(bridge, what), bridge.all_composition_scores(what)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=0)
        assert torch.equal(ours.scores, composition_scores(model, what).scores)
        assert (ours.layer_indices, ours.head_labels) == (theirs.layer_indices, theirs.head_labels)
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        torch.testing.assert_close(ours[0, 1], theirs[0, 1])
        torch.testing.assert_close(torch.stack([ours, ours]).sum(), 2 * theirs.sum())
        for compare in ("__gt__", "__lt__", "__ge__", "__le__", "__eq__", "__ne__"):
            assert torch.equal(getattr(ours, compare)(0.0), getattr(theirs, compare)(0.0))
        assert bool((ours == ours).all())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ours.nothing


@settings(max_examples=6)
@given(seed=st.integers(0, 1000), name=st.sampled_from([*zoo.MHA_GQA_MQA, "dcformer-mha"]), what=st.sampled_from("QKV"))
def test_pruned_models_have_the_heads_that_are_there(seed: int, name: str, what: str) -> None:
    model = zoo.build(name)
    mask = surgical.random_mask(model, seed)
    mask.rows[0][:3] = 1  # a layer 0 without heads cannot be cached
    small = hl.prune(model, hl.HeadMask(mask.rows, mask.heads))
    scores = composition_scores(small, what)
    check(scores, circuits(small), what)
    dense = scores.scores
    assert dense.shape[1] == dense.shape[3] == 1 + max(end.index for end in (*scores.sources, *scores.readers))  # type: ignore[union-attr]
    assert int((dense > 0).sum()) == int((scores.values > 0).sum()) == len(scores.to_frame())


def test_an_encoder_decoder_has_scores_within_a_stack() -> None:
    model = zoo.build("t5")
    for stack in ("enc", "dec"):
        scores = composition_scores(model, "K", "fold", stack=stack)
        check(scores, circuits(model, "fold", stack), "K")
        assert scores.head_labels[0] == f"{stack}.L0H0"
    for stack in ("", "cross"):
        with pytest.raises(HeadlabError, match=r"stack is 'enc' or 'dec', not .* two residual streams"):
            composition_scores(model, "K", stack=stack)


def test_the_baseline_is_the_mean_square_over_rotations() -> None:
    model = zoo.build("gpt2")
    scores = composition_scores(model, "Q")
    whole = circuits(model)
    a, b = whole["L0H1"]["V"], whole["L2H3"]["Q"]
    turns = [torch.linalg.qr(torch.randn(35, 35, dtype=torch.float64)) for _ in range(400)]
    squares = [(a @ (turn.Q * turn.R.diagonal().sign()) @ b).norm().square() for turn in turns]
    expected = torch.stack(squares).mean().sqrt() / (a.norm() * b.norm())
    assert float(expected) == pytest.approx(scores.baseline, rel=0.02)
    assert scores.baseline == pytest.approx(35**-0.5)
    later = scores.values[~scores.values.isnan()]
    assert float(later.square().mean().sqrt()) == pytest.approx(scores.baseline, rel=0.05)  # fresh weights


def test_nearly_orthogonal_and_half_precision_weights() -> None:
    model = zoo.build("llama-mha")
    with torch.no_grad():  # layer 2 reads the first half of the stream, where layer 0 writes next to nothing
        model.model.layers[0].self_attn.o_proj.weight[:21] *= 1e-4
        model.model.layers[2].self_attn.q_proj.weight[:, 21:] = 0
    scores = composition_scores(model, "Q")
    assert 0 < float(scores.scores[0, :, 2].max()) < 1e-3
    check(scores, circuits(model), "Q")
    half = composition_scores(model.to(torch.bfloat16), "Q")
    assert half.values.dtype == torch.float32
    check(half, circuits(model), "Q")


def test_top_frame_and_file(tmp_path: Path) -> None:
    model = zoo.build("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[10:20] = 0  # L1H1 looks for nothing: no score
    scores = composition_scores(model, "Q")
    frame = scores.to_frame()
    assert len(frame) == 3 * 36
    assert set(frame["reader"][frame["score"].isna()]) == {"L1H1"}
    best = frame.sort_values("score", ascending=False).iloc[0]
    top = scores.top(1000)
    assert len(top) == 3 * 36 - 6
    assert (str(top[0].source), str(top[0].reader)) == (best["source"], best["reader"])
    assert top[0].score == pytest.approx(best["score"])
    assert top[0].ratio == pytest.approx(best["ratio"]) == pytest.approx(top[0].score * 42**0.5)
    assert [pair.score for pair in top] == sorted((pair.score for pair in top), reverse=True)
    assert str(top[0]) == f"{best['source']} -> {best['reader']} {top[0].score:.3g} ({top[0].ratio:.1f} x random)"
    assert str(top[0]) in repr(scores)
    loaded = CompositionScores.load(scores.save(tmp_path / "scores.json"))
    for other in (loaded, copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert (other.what, other.sources, other.readers, other.d_model) == ("Q", scores.sources, scores.readers, 42)
        assert (other.record, other.baseline) == (scores.record, scores.baseline)
        torch.testing.assert_close(other.values, scores.values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm", ["raw", "fold"])
@pytest.mark.parametrize("name", ["dcformer-mha", "dcformer-gqa", "dcformer-mqa", "dcpythia"])
def test_map_composition_is_that_of_whole_matrices(name: str, norm: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    scores = map_composition(model, norm)  # type: ignore[arg-type]
    whole = circuits(model, norm)
    compose = [row.compose for row in rows(model)]
    assert [end.place for end in scores.readers] == 3 * [p for p in compose[0].places if not p.endswith("base")]  # type: ignore[union-attr]
    for source, values in zip(scores.sources, scores.values, strict=True):
        for reader, value in zip(scores.readers, values, strict=True):
            assert isinstance(reader, MapReader)
            assert str(reader) == f"L{reader.layer} {reader.place}"
            if reader.layer <= source.layer:
                assert value.isnan()
                continue
            a, b = whole[str(source)]["V"], reads(compose[reader.layer], reader.place)
            if norm == "fold":
                before = norm_before(model, rows(model)[reader.layer])
                assert before is not None
                b = gain(before).before(b)
            assert float(value) == pytest.approx(float((a @ b).norm() / (a.norm() * b.norm())), rel=1e-5)
    assert scores.scores.shape == (3, 6, 3, len(scores.readers) // 3)
    assert float(scores.scores[0, 4, 2, 1]) == float(scores.values[4, 2 * len(scores.readers) // 3 + 1])
    assert len(scores.to_frame()) == (12 + 6) * len(scores.readers) // 3
    assert "reader_place" in scores.to_frame()
    loaded = CompositionScores.load(scores.save(tmp_path / "maps.json"))
    assert (loaded.readers, loaded.top(3)) == (scores.readers, scores.top(3))


def reads(compose: nn.Module, place: str) -> Tensor:
    """What a branch reads with, row by row of the weights, [d_model, number]."""
    gates = place.endswith("_gate")
    kin = [p for p in compose.places if p.endswith("_gate") == gates and not p.endswith("base")]
    weight = (compose.dd if gates else compose.dw1).weight
    size = compose.n_heads if gates else compose.groups * compose.hidden
    start = kin.index(place) * size
    return torch.stack([weight[i].detach().double() for i in range(start, start + size)], 1)


def test_map_composition_of_a_pruned_model_leaves_out_what_is_gone() -> None:
    model = zoo.build("dcformer-mha")
    mask = surgical.without_rows(model)
    mask.rows[2][[0, 4]] = 0
    small = hl.prune(model, hl.HeadMask(mask.rows, mask.heads))
    before, after = map_composition(model), map_composition(small)
    places = [end.place for end in before.readers][:8]  # type: ignore[union-attr]
    kept = rows(small)[2].compose.ends("post")[1]
    assert kept == [1, 2, 3, 5]
    a = circuits(model)["L1H2"]["V"]
    b = reads(rows(model)[2].compose, "post_key_gate")[:, kept]
    value = after.scores[1, 2, 2, places.index("post_key_gate")]
    assert float(value) == pytest.approx(float((a @ b).norm() / (a.norm() * b.norm())), rel=1e-5)
    torch.testing.assert_close(after.scores[0, :, 1], before.scores[0, :, 1])


def test_what_cannot_be_asked_for() -> None:
    model = zoo.build("llama-mha")
    with pytest.raises(HeadlabError, match="kind is 'Q', 'K' or 'V', not 'M'; of composition maps, see map_composition"):
        composition_scores(model, "M")
    with pytest.raises(HeadlabError, match="norm is 'raw' or 'fold', not 'folded'"):
        composition_scores(model, "Q", "folded")  # type: ignore[arg-type]
    with pytest.raises(HeadlabError, match="one stack of layers only: leave out stack='dec'"):
        composition_scores(model, "Q", stack="dec")
    for name in ("llama-mha", "dcformer-plain"):
        with pytest.raises(HeadlabError, match="no composition maps that read the stream"):
            map_composition(zoo.build(name))
