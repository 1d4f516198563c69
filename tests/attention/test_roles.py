from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import headlab as hl
from headlab.attention import statistics
from headlab.attention.induction import repeated
from headlab.attention.roles import ROLES, PatternStats, Roles, patterns, roles
from headlab.data.batches import real_tokens
from headlab.data.losses import forward
from headlab.data.tokens import tokens_of
from headlab.hooks.patterns import Look, at_patterns
from headlab.hooks.sites import at_sites
from headlab.models.access import heads, rows
from headlab.tables import HeadTable
from tests.helpers import zoo

Values = dict[str, list[tuple[float, int]]]  # per example: the sum over counted queries, and how many these are
TESTED = ["gpt2", "llama-gqa", "llama-mqa", "mistral", "qwen3", "bert-mlm", "t5", "dcformer-mha", "dcpythia"]


def data_for(name: str, left: bool = False) -> list[dict[str, Tensor]]:
    """Batches of different lengths with padding and with copies of tokens."""
    batches = []
    for seed in range(2):
        batch = zoo.batch_for(name, seed, labels=False)
        ids = batch["input_ids"]
        ids[:, 3] = ids[:, 1]
        ids[0, 6] = ids[0, 5]
        ids[3, 6], ids[0, 2] = 2, 2  # the symbol that ends a text
        if left and name != "t5":
            batch = {key: value.flip(1) for key, value in batch.items()}
        batches.append(batch)
    return [batches[0], {key: value[:3, :6] for key, value in batches[1].items()}]


def is_visible(name: str, layer: int, query: int, key: int) -> bool:
    """By the architecture, for self-attention of decoders and encoders; places are counted among real tokens."""
    if name.startswith("bert"):
        return True
    window = {"mistral": [5] * 3, "qwen3": [5, 99, 5], "dcformer-mha": [5, 99, 5], "dcpythia": [5, 99, 5]}.get(
        name, [99] * 3
    )
    return 0 <= query - key < window[layer]


def looked_at(model: Any, batch: dict[str, Tensor]) -> dict[int, Look]:
    found: dict[int, Look] = {}
    with torch.no_grad(), at_patterns(model, lambda row, look: found.update({row.row: look})):
        forward(model, batch)
    return found


def by_hand(
    name: str, data: list[dict[str, Tensor]], looks: list[dict[int, Look]], row: Any, composed: bool
) -> list[Values]:
    """The statistics of every head by loops, in float64; `positional` is left to another test."""
    counts = Counter(
        int(token)
        for batch in data
        for field in ("input_ids", "decoder_input_ids")
        if field in batch
        for token in batch[field][real_tokens(batch, "dec" if field[0] == "d" else "")]
    )
    cross, out = row.stack == "cross", [defaultdict(list) for _ in row.heads]
    for batch, looked in zip(data, looks, strict=True):
        look = looked[row.row]
        pattern = (look.pattern if composed else look.raw).double().numpy()
        q_tokens = batch["decoder_input_ids"] if row.stack in ("dec", "cross") else batch["input_ids"]
        k_tokens = batch["input_ids"] if cross else q_tokens
        q_real = real_tokens(batch, row.stack)
        k_real = real_tokens(batch) if cross else q_real
        for example in range(len(q_tokens)):
            qs, ks = (real[example].nonzero().flatten().tolist() for real in (q_real, k_real))
            text = [int(k_tokens[example, k]) for k in ks]
            for head in range(pattern.shape[1]):
                sums: dict[str, list[float]] = defaultdict(list)
                for i, q in enumerate(qs):
                    token = int(q_tokens[example, q])
                    seen = [j for j in range(len(ks)) if cross or row.stack == "enc" or is_visible(name, row.layer, i, j)]
                    if len(seen) < 2:
                        continue
                    a = {j: float(pattern[example, head, q, ks[j]]) for j in seen}
                    rarest = min(((counts[text[j]], -text[j]) for j in seen if j), default=None)
                    wanted = {
                        "first": [j for j in seen if j == 0],
                        "rare": [j for j in seen if j and (counts[text[j]], -text[j]) == rarest],
                        "delimiter": [j for j in seen if j and text[j] in (0, 1, 2)],
                    }
                    if not cross:
                        wanted |= {
                            "previous": [j for j in seen if j == i - 1],
                            "self": [j for j in seen if j == i],
                            "next": [j for j in seen if j == i + 1],
                            "duplicate": [j for j in seen if j < i and text[j] == token],
                            "induction": [j for j in seen if 0 < j < i and text[j - 1] == token],
                        }
                    for one, places in wanted.items():
                        if places:
                            sums[one].append(sum(a[j] for j in places))
                    sums["sum"].append(sum(a.values()))
                    if composed:
                        continue
                    nats = -sum(w * np.log(w) for w in a.values() if w > 0)
                    sums["entropy"].append(nats)
                    sums["relative_entropy"].append(nats / np.log(len(seen)))
                    sums["confidence"].append(max([w for j, w in a.items() if not (j and text[j] == 2)], default=0))
                    if not cross:
                        sums["distance"].append(sum(w * abs(i - j) for j, w in a.items()))
                for one, values in sums.items():
                    out[head][one].append((float(np.sum(values)), len(values)))
    return out


def check(found: HeadTable, row: int, head: int, name: str, values: list[tuple[float, int]]) -> None:
    sums, n = np.array(values).T
    mean = sums.sum() / n.sum()
    np.testing.assert_allclose(found.columns[name][row][head], mean, rtol=2e-5, atol=2e-6, err_msg=name)
    if len(n) > 1:
        error = np.sqrt(((sums - mean * n) ** 2).sum() * len(n) / (len(n) - 1)) / n.sum()
        np.testing.assert_allclose(found.errors[name][row][head], error, rtol=1e-3, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(("name", "left"), [*((name, False) for name in TESTED), ("gpt2", True), ("dcpythia", True)])
def test_every_number_is_that_of_loops_over_queries(name: str, left: bool) -> None:
    model, data = zoo.build(name), data_for(name, left)
    model.config.eos_token_id, model.config.bos_token_id = 2, 1  # encoders have none in their configurations
    found, looks = patterns(model, data), [looked_at(model, batch) for batch in data]
    for row in rows(model):
        for composed in (False, True) if name.startswith("dc") else (False,):
            for head, sums in enumerate(by_hand(name, data, looks, row, composed)):
                for one, values in sums.items():
                    if composed or one != "sum":
                        check(found, row.row, head, f"composed_{one}" if composed else one, values)
                for one in statistics.MARKS:
                    if one not in sums:
                        assert np.isnan(found.columns[one][row.row][head]), one


def test_cross_attention_has_what_makes_sense_there() -> None:
    model = zoo.build("t5")
    model.config.eos_token_id = 2
    found = patterns(model, data_for("t5"))
    cross = [row for row, labels in enumerate(found.heads) if labels[0].stack == "cross"]
    for name, values in found.columns.items():
        sensible = name in ("entropy", "relative_entropy", "confidence", "first", "delimiter", "rare")
        assert all(np.isfinite(values[row]).all() == sensible for row in cross), name


def eta_squared(pattern: np.ndarray, seen: np.ndarray) -> float:
    values, distances = [], []
    for b, q, k in zip(*seen.nonzero(), strict=True):
        values.append(pattern[b, q, k])
        distances.append(q - k)
    x, d = np.array(values), np.array(distances)
    between = sum((d == one).sum() * (x[d == one].mean() - x.mean()) ** 2 for one in set(distances))
    return float(between / ((x - x.mean()) ** 2).sum())


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(3, 7), st.integers(0, 99))
def test_positional_is_the_variance_between_distances(n_batch: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sums, patterns_of, masks = statistics.ByDistance(2), [], []
    for length in (n, n + 2, n - 1):
        seen = torch.rand(n_batch, length, length, generator=generator) > 0.3
        pattern = torch.rand(n_batch, 2, length, length, generator=generator) * seen[:, None]
        sums.add(pattern, seen)
        pad = (0, n + 2 - length) * 2
        patterns_of.append(torch.nn.functional.pad(pattern, pad))
        masks.append(torch.nn.functional.pad(seen, pad))
    whole, seen = torch.cat(patterns_of).double().numpy(), torch.cat(masks).numpy()
    wanted = [eta_squared(whole[:, head], seen) for head in range(2)]
    np.testing.assert_allclose(sums.explained, wanted, rtol=1e-4, atol=1e-5)


def test_positional_patterns_are_explained_wholly_and_uniform_ones_do_not_vary() -> None:
    seen = torch.ones(2, 5, 5, dtype=torch.bool)
    sums = statistics.ByDistance(2)
    sums.add(torch.stack([torch.eye(5), torch.full((5, 5), 0.2)]).expand(2, 2, 5, 5), seen)
    assert sums.explained[0] == pytest.approx(1)
    assert np.isnan(sums.explained[1])


def test_constructed_patterns_have_the_numbers_that_they_were_made_for() -> None:
    text = torch.tensor([[5, 6, 7, 5, 6, 7]])
    seen = torch.ones(6, 6).tril().bool()[None]
    marks = statistics.marked(seen, statistics.Text(torch.ones_like(text).bool(), text), same=True)
    pattern = torch.zeros(1, 3, 6, 6)
    for query in range(6):
        pattern[0, 0, query, max(query - 1, 0)] = 1
        pattern[0, 1, query, query - 3 if query > 2 else 0] = 1
        pattern[0, 2, query, query - 2 if query > 2 else 0] = 1
    sums = statistics.LayerSums(3, 3, composed=False)
    sums.add(pattern, None, seen, marks, statistics.Text(torch.ones_like(text).bool(), text), same=True)
    means, errors = sums.columns()
    assert means["previous"].tolist() == [1, pytest.approx(0.2), pytest.approx(0.2)]
    assert means["duplicate"].tolist() == [0, 1, 0]
    assert means["induction"].tolist() == [0, 0, 1]
    assert means["confidence"].tolist() == [1, 1, 1]
    assert means["entropy"].tolist() == [0, 0, 0]
    assert means["distance"].tolist() == pytest.approx([1, (1 + 2 + 3 * 3) / 5, (1 + 2 + 3 * 2) / 5])
    assert np.isnan(errors["previous"]).all()


@pytest.mark.parametrize("name", zoo.ALL)
def test_every_architecture_has_patterns_and_roles(name: str) -> None:
    model = zoo.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stats = patterns(model, [zoo.batch_for(name)])
    found = roles(model, sequences=2, length=12)
    for result in (stats, found):
        assert [head for row in result.heads for head in row] == heads(model)
        assert len(result.to_frame()) == len(heads(model))
    assert all(np.isfinite(row).all() for row in stats.columns["entropy"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_pruned_models_keep_their_labels_and_numbers() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    mask = hl.HeadMask.without(heads(model), ["L1H0", "L1H1", "L2H5", *(f"L0H{i}" for i in range(6))])
    with hl.masked(model, mask):
        masked = patterns(model, [batch])
    pruned = patterns(hl.prune(model, mask), [batch])
    assert [len(row) for row in pruned.heads] == [0, 4, 5]
    whole = masked.to_frame().set_index("head")
    for line in pruned.to_frame().to_dict("records"):
        assert line["entropy"] == pytest.approx(whole.loc[line["head"], "entropy"], rel=1e-4)
        assert line["induction"] == pytest.approx(whole.loc[line["head"], "induction"], rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("site", ["output", "probabilities"])
def test_pruned_composed_models_tell_raw_from_composed_heads(site: str) -> None:
    model, batch = zoo.build("dcformer-mha"), zoo.batch_for("dcformer-mha")
    mask = hl.HeadMask.without(heads(model), ["L1H0", "L1H3"])
    small = hl.prune(model, mask, site=site)
    found = patterns(small, [batch]).to_frame().set_index("head")
    gone = "composed_sum" if site == "output" else "entropy"
    for head in ("L1H0", "L1H3"):
        row = next(row for row in rows(small) if row.layer == 1)
        assert head not in found.index or np.isnan(found.loc[head, gone]) or head in map(str, row.heads)
    assert np.isfinite(found.loc["L1H1", ["entropy", "composed_sum"]].to_numpy(float)).all()


def test_roles_copying_is_that_of_whole_logits() -> None:
    for name in ("gpt2", "llama-gqa", "gemma2", "t5", "dcformer-mha"):
        model: Any = zoo.build(name).requires_grad_(False)
        found = roles(model, sequences=3, length=14, seed=5)
        batch = repeated(tokens_of(model), 3, 14, 5)[0][0]
        row = rows(model)[-3 if name == "t5" else -1]
        z: list[Tensor] = []
        with torch.no_grad(), at_sites(model, lambda _, x, __, z=z: z.append(x.double()), [row]):
            forward(model, batch)
        norm = model.get_submodule({"gpt2": "transformer.ln_f", "t5": "decoder.final_layer_norm"}.get(name, "model.norm"))
        scale = norm.weight.double() + (1 if name == "gemma2" else 0)
        weight = row.projection(row.family.o).weight.double()
        weight = weight.T if name == "gpt2" else weight  # [d_model, slot * d_head]
        unembedding = model.get_output_embeddings().weight.double()
        values: dict[int, list[float]] = defaultdict(list)
        ids = batch["decoder_input_ids" if name == "t5" else "input_ids"]
        for example in range(3):
            for query in range(7, 13):
                for head in range(len(row.heads)):
                    part = slice(head * row.d_head, (head + 1) * row.d_head)
                    o = weight[:, part] @ z[0][example, query, head]
                    if name == "gemma2":
                        o = o * (1 + model.model.layers[-1].post_attention_layernorm.weight.double())
                    o = (o - o.mean() if name == "gpt2" else o) * scale
                    logits = unembedding @ o
                    token = int(ids[example, query + 1])
                    values[head].append(float((logits[token] - logits.mean()) / logits.std(correction=0)))
        wanted = [np.mean(values[head]) for head in range(len(row.heads))]
        np.testing.assert_allclose(found.columns["copying"][row.row], wanted, rtol=1e-3, atol=1e-4, err_msg=name)


def test_heads_that_no_unembedding_reads_have_no_copying() -> None:
    for name in ("bert", "bert-mlm", "bert-classifier", "t5-encoder"):
        found = roles(zoo.build(name), sequences=2, length=12)
        assert all(np.isnan(row).all() for row in found.columns["copying"])
        assert "copying" in " ".join(found.record["notes"])


def table(**columns: list[float]) -> Roles:
    labels = (tuple(hl.Head(0, 0, i) for i in range(len(next(iter(columns.values()))))),)
    given = {name: (np.array(row),) for name, row in columns.items() if name != "error"}
    errors = {"copying": (np.array(columns.get("error", [0.0] * len(labels[0]))),)}
    return Roles(labels, given, errors)


def test_induction_needs_matching_and_copying() -> None:
    found = table(
        induction=[0.9, 0.9, 0.9, 0.1, 0.5], copying=[0.5, -0.5, 0.1, 2, np.nan], error=[0.1, 0.1, 0.1, 0.1, np.nan]
    )
    assert [head.index for head in found.of("induction")] == [0, 4]
    assert [found.playing(0, place) for place in range(3)] == [["induction"], [], []]


def test_roles_come_in_order_and_a_hole_plays_none() -> None:
    found = table(first=[0.9, 0.6, np.nan], previous=[0.2, 0.5, np.nan], copying=[0.0, 0, 0])
    assert found.playing(0, 1) == ["previous", "first"]
    assert found.playing(0, 2) == []
    assert [head.index for head in found.of("first")] == [0, 1]
    assert [head.index for head, _ in found.top(5, "previous")] == [1, 0]
    assert list(found.to_frame()["role"]) == ["first", "previous", ""]
    assert "previous L0H1" in repr(found)
    with pytest.raises(hl.HeadlabError, match="a role is one of"):
        found.of("sink")
    with pytest.raises(hl.HeadlabError, match="no number"):
        found.top(1, "sink")


def test_texts_decide_on_all_but_copies() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    alone, both, stats = (
        roles(model, sequences=2, length=12),
        roles(model, [batch], sequences=2, length=12),
        patterns(model, [batch]),
    )
    for name in ROLES:
        source = alone if name in ("induction", "duplicate") else stats
        for a, b in zip(both.columns[name], source.columns[name], strict=True):
            np.testing.assert_array_equal(a, b)
    assert all(np.isnan(row).all() for row in alone.columns["rare"])
    assert "data" not in alone.record
    assert both.record["data"] == stats.record["data"]


def test_random_tokens_repeat_are_no_special_ones_and_fit() -> None:
    model = zoo.build("gpt2")
    batches, notes = repeated(tokens_of(model), 11, 40, 0)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (11, 40)
    assert torch.equal(ids[:, :20], ids[:, 20:])
    assert not set(ids.flatten().tolist()) & tokens_of(model).special
    assert all(len(set(row)) == 20 for row in ids[:, :20].tolist())
    assert not notes
    batches, notes = repeated(tokens_of(model), 2, 4096, 0)
    assert batches[0]["input_ids"].shape == (2, 60)
    assert "60 tokens instead of 4096" in notes[0]
    assert roles(model, sequences=1, length=4096).record["length"] == 60
    assert torch.equal(ids, torch.cat([batch["input_ids"] for batch in repeated(tokens_of(model), 11, 40, 0)[0]]))
    assert not torch.equal(ids, torch.cat([batch["input_ids"] for batch in repeated(tokens_of(model), 11, 40, 1)[0]]))
    assert "come more than twice" in repeated(tokens_of(zoo.build("t5")), 2, 1000, 0)[1][0]


def test_bad_input_is_refused() -> None:
    model = zoo.build("gpt2")
    for options, message in (({"sequences": 0}, "at least 1"), ({"length": 5}, "at least 6")):
        with pytest.raises(hl.HeadlabError, match=message):
            roles(model, **options)
    for batches, message in (([], "no batches"), ([{"input_ids": torch.zeros(1, 62).long()}], "context is 61")):
        with pytest.raises(hl.HeadlabError, match=message):
            patterns(model, batches)


def test_prompts_of_one_token_leave_holes_and_a_note() -> None:
    found = patterns(zoo.build("gpt2"), [{"input_ids": torch.tensor([[7], [8]])}])
    assert all(np.isnan(row).all() for rows_of in found.columns.values() for row in rows_of)
    assert "entropy" in found.record["notes"][0]
    assert found.top(3, "entropy") == []


@pytest.mark.parametrize("name", ["t5", "dcformer-gqa"])
def test_results_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    for result in (patterns(model, [zoo.batch_for(name)]), roles(model, sequences=2, length=12)):
        loaded = type(result).load(result.save(tmp_path / "result.json"))
        assert loaded.to_frame().equals(result.to_frame())
        assert loaded.heads == result.heads
        assert loaded.record == result.record
        assert repr(loaded) == repr(result)
    with pytest.raises(hl.HeadlabError, match="was expected"):
        PatternStats.load(tmp_path / "result.json")


def test_bridges_and_lower_precision_have_the_same_numbers() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    plain = patterns(model, [batch])
    for other, tolerance in ((hl.bridge(model), 1e-5), (model.to(torch.bfloat16), 0.1)):
        found = patterns(other, [batch])
        for name in ("entropy", "first", "induction"):
            for a, b in zip(found.columns[name], plain.columns[name], strict=True):
                np.testing.assert_allclose(a, b, atol=tolerance)
