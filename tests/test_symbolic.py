"""The trainable tasks, solved from their tokens alone by plain loops, and what their draws are distributed like."""

from __future__ import annotations

import doctest
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from headlab.errors import HeadlabError
from synthetic_tasks import CrossComposition, symbolic
from synthetic_tasks.symbolic import IGNORED, LAYOUTS, LEVELS, SPLITS, Induction, Sample

LEVEL, LAYOUT, SHARED = st.sampled_from(LEVELS), st.sampled_from(LAYOUTS), st.booleans()


@st.composite
def tasks(draw, **fixed) -> CrossComposition:
    """Any sizes, any share that there can be."""
    features, values = draw(st.integers(2, 6)), draw(st.integers(1, 7))
    pairs = features * (features - 1)
    out = draw(st.integers(0, pairs - features))
    options = {
        "n_features": features,
        "n_values": values,
        "n_records": draw(st.integers(1, values)),
        "held_out": out / pairs,
        "level": draw(LEVEL),
        "layout": draw(LAYOUT),
        "shared_values": draw(SHARED),
        "seed": draw(st.integers(0, 2**31)),
    }
    return CrossComposition(**options | fixed)


# --- a solver that reads tokens


def read_bags(task: CrossComposition, positions: list[list[int]]) -> tuple[list, list, int | None, int]:
    """Records as value by feature, then what the query names, the selector and the report."""
    size = task.n_features * task.n_values
    records, named, select, report = [], [], [], []
    for i, bag in enumerate(positions):
        found = {}
        for token in bag:
            if token == 2 * size + 2 * task.n_features:
                continue  # padding
            if token < size:
                assert i < len(positions) - 1
                found[token // task.n_values] = token % task.n_values
                continue
            assert i == len(positions) - 1
            if token < 2 * size:
                named.append(divmod(token - size, task.n_values))
            elif token < 2 * size + task.n_features:
                select.append(token - 2 * size)
            else:
                report.append(token - 2 * size - task.n_features)
        if i < len(positions) - 1:
            assert len(found) == len([token for token in bag if token < size]) == task.n_features
            records.append(found)
    assert len(report) == 1
    assert len(select) == (task.level == "conflict")
    return records, named, select[0] if select else None, report[0]


def read_tokens(task: CrossComposition, tokens: list[int]) -> tuple[list, list, int | None, int]:
    answers = task.n_values * (1 if task.shared_values else task.n_features)
    words = ["value"] * answers + ["feature"] * task.n_features + ["record", "query", "report"]
    told = [(words[token], token) for token in tokens]

    def value(feature: int, token: int) -> int:
        if task.shared_values:
            return token
        assert token // task.n_values == feature
        return token % task.n_values

    records, named, select, report, i = [], [], None, None, 0
    part = ""
    while i < len(told):
        kind, token = told[i]
        if kind != "feature":
            part = kind
            if kind == "record":
                records.append({})
            i += 1
            continue
        feature = token - answers
        if part == "report":
            report = feature
        elif i + 1 < len(told) and told[i + 1][0] == "value":
            found = value(feature, told[i + 1][1])
            if part == "record":
                assert feature not in records[-1]
                records[-1][feature] = found
            else:
                assert part == "query"
                named.append((feature, found))
            i += 1
        else:
            assert part == "query"
            select = feature
        i += 1
    assert all(len(record) == task.n_features for record in records)
    return records, named, select, report


def solve(task: CrossComposition, ids: list) -> tuple[int, int, int, int, list, list]:
    """p, a, the record and the answer; what every record is, and the record that each name points at."""
    records, named, select, report = (read_bags if task.layout == "bag" else read_tokens)(task, ids)
    assert len(records) == task.n_records
    pointed = []
    for feature, value in named:
        (record,) = [i for i, found in enumerate(records) if found[feature] == value]  # exactly one
        pointed.append((feature, record))
    if task.level == "binding":
        assert select is None
        ((p, record),) = pointed
    else:
        assert [feature for feature, _ in pointed] == list(range(task.n_features))
        p, record = select, dict(pointed)[select]
    answer = records[record][report]
    if not task.shared_values:
        answer += report * task.n_values
    return p, report, record, answer, [[found[f] for f in range(task.n_features)] for found in records], pointed


def assert_solved(task: CrossComposition, sample: Sample, pairs: set[tuple[int, int]]) -> None:
    for row in range(len(sample.ids)):
        p, a, record, answer, values, pointed = solve(task, sample.ids[row].tolist())
        stated = [
            part[row].tolist() for part in (sample.looked_up, sample.reported, sample.record, sample.answer, sample.values)
        ]
        assert [p, a, record, answer, values] == stated
        assert (p, a) in pairs
        assert 0 <= answer < task.n_classes
        for feature in range(task.n_features):
            assert len({found[feature] for found in values}) == task.n_records
            assert all(0 <= found[feature] < task.n_values for found in values)
        if task.level == "conflict":
            times = Counter(r for _, r in pointed)  # as equal as they can be
            assert max(times.values()) == -(-task.n_features // task.n_records)
            assert len(times) == min(task.n_features, task.n_records)


@settings(max_examples=120)
@given(tasks(), st.sampled_from(SPLITS), st.integers(0, 9))
def test_the_tokens_alone_say_what_the_sample_says(task, split, draw):
    if split == "test" and not task.n_held_out:
        split = "seen"
    sample = task.sample(5, split, draw=draw)
    assert_solved(task, sample, {tuple(pair) for pair in task.pairs(split).tolist()})
    assert int(sample.ids.max()) < task.n_tokens
    assert int(sample.ids.min()) >= 0


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_sizes_of_the_study(level, layout, shared):
    task = CrossComposition(level=level, layout=layout, shared_values=shared)
    assert (len(task.trained_pairs), len(task.held_out_pairs)) == (39, 17)  # 30 % of 56
    assert task.n_classes == (16 if shared else 128)
    sample = task.sample(7, "test")
    assert_solved(task, sample, {tuple(pair) for pair in task.held_out_pairs.tolist()})
    if layout == "bag":
        assert sample.ids.shape == (7, 13, 8 if level == "binding" else 10)
        assert (task.n_tokens, task.pad) == (2 * 128 + 2 * 8 + 1, 272)
    else:
        query = 1 + 2 if level == "binding" else 1 + 16 + 1
        assert sample.ids.shape == (7, 12 * 17 + query + 2)
        assert task.n_tokens == task.n_classes + 8 + 3


# --- which combinations are held out


@settings(max_examples=200)
@given(tasks())
def test_trained_and_held_out_combinations_are_all_and_none_is_in_both(task):
    trained, out = ([tuple(pair) for pair in part.tolist()] for part in (task.trained_pairs, task.held_out_pairs))
    everything = [(p, a) for p in range(task.n_features) for a in range(task.n_features) if p != a]
    assert sorted(trained + out) == everything
    assert len(out) == task.n_held_out == round(task.held_out * len(everything))
    assert {p for p, _ in trained} == {a for _, a in trained} == set(range(task.n_features))
    assert torch.equal(task.pairs("train"), task.trained_pairs)
    assert torch.equal(task.pairs("seen"), task.trained_pairs)


@pytest.mark.parametrize("features", [2, 3, 5, 8, 13, 29])
def test_the_largest_share_is_the_one_that_the_error_names(features):
    pairs = features * (features - 1)
    task = CrossComposition(features, held_out=(pairs - features) / pairs)
    assert len(task.trained_pairs) == features
    assert {p for p, _ in task.trained_pairs.tolist()} == {a for _, a in task.trained_pairs.tolist()} == set(range(features))
    too_many = (pairs - features + 1) / pairs
    with pytest.raises(
        HeadlabError, match=rf"takes {pairs - features + 1} of {pairs} .*, but {features} have to stay"
    ) as error:
        CrossComposition(features, held_out=too_many)
    named = float(str(error.value).split()[-1])
    assert len(CrossComposition(features, held_out=named).trained_pairs) == features


def test_other_seeds_hold_other_combinations_out():
    found = {tuple(map(tuple, CrossComposition(5, seed=seed).held_out_pairs.tolist())) for seed in range(20)}
    assert len(found) == 20
    times = Counter(pair for pairs in found for pair in pairs)
    assert len(times) == 20  # any combination can be held out


# --- determinism


def same(one: Sample, other: Sample) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_sample_follows_from_seed_split_and_draw(level, layout):
    task = CrossComposition(3, 7, 5, level, layout=layout, seed=11)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = task.sample(13, "train", draw=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(one, replace(task).sample(13, "train", draw=2))
    others = [task.sample(13, split, draw=draw) for split in SPLITS for draw in (0, 1, 2)]
    others.append(replace(task, seed=12).sample(13, "train", draw=2))
    distinct = {str(sample.values.tolist()) for sample in others}
    assert len(distinct) == 10
    assert sum(same(one, other) for other in others) == 1


@pytest.mark.parametrize(
    ("level", "layout", "ids", "answers"),
    [
        ("binding", "bag", [[[0, 4], [2, 5], [8, 15]], [[0, 5], [2, 3], [6, 15]]], [5, 5]),
        ("conflict", "bag",
         [[[0, 4, 16, 16], [2, 5, 16, 16], [6, 11, 12, 15]], [[0, 5, 16, 16], [2, 3, 16, 16], [6, 9, 12, 15]]], [4, 5]),
        ("binding", "tokens",
         [[8, 6, 0, 7, 4, 8, 6, 2, 7, 5, 9, 6, 2, 10, 7], [8, 6, 0, 7, 5, 8, 6, 2, 7, 3, 9, 6, 0, 10, 7]], [5, 5]),
        ("conflict", "tokens",
         [[8, 6, 0, 7, 4, 8, 6, 2, 7, 5, 9, 6, 0, 7, 5, 6, 10, 7], [8, 6, 0, 7, 5, 8, 6, 2, 7, 3, 9, 6, 0, 7, 3, 6, 10, 7]],
         [4, 5]),
    ],
)  # fmt: skip
def test_the_first_rows(level, layout, ids, answers):
    """What was drawn once is drawn for ever: results name their seeds."""
    sample = CrossComposition(2, 3, 2, level, held_out=0, layout=layout, seed=3).sample(2)
    assert sample.ids.tolist() == ids
    assert sample.answer.tolist() == answers


def test_the_example_in_the_docstring():
    (example,) = doctest.DocTestFinder(recurse=False).find(CrossComposition, globs=vars(symbolic).copy())
    assert doctest.DocTestRunner().run(example) == (0, 4)


# --- distribution


def uniform(counts: list[int], n: int) -> None:
    assert sum(counts) == n
    assert stats.chisquare(counts).pvalue > 1e-3  # the seeds are fixed: this cannot fail now and then


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("level", LEVELS)
def test_combinations_records_and_values_are_equally_frequent(level, split):
    n, task = 20_000, CrossComposition(5, 7, 3, level, seed=4)
    sample = task.sample(n, split)
    pairs = Counter(zip(sample.looked_up.tolist(), sample.reported.tolist(), strict=True))
    assert set(pairs) == {tuple(pair) for pair in task.pairs(split).tolist()}
    uniform(list(pairs.values()), n)
    uniform(sample.record.bincount(minlength=3).tolist(), n)
    for record in range(3):
        for feature in range(5):
            uniform(sample.values[:, record, feature].bincount(minlength=7).tolist(), n)
    # neither features nor records say anything about each other
    together = sample.values[:, 0, 1] * 7 + sample.values[:, 0, 3]
    uniform(together.bincount(minlength=49).tolist(), n)
    ordered = sample.values[:, 0, 2] * 7 + sample.values[:, 2, 2]
    uniform([c for i, c in enumerate(ordered.bincount(minlength=49).tolist()) if i % 8], n)
    assert all(c == 0 for c in ordered.bincount(minlength=49)[::8].tolist())
    what = (sample.record * 5 + sample.looked_up)[sample.looked_up == sample.looked_up[0]]
    uniform([c for c in what.bincount().tolist() if c], len(what))


def test_the_records_that_a_conflict_names_are_equally_frequent():
    task = CrossComposition(3, 7, 5, "conflict", seed=1)
    sample = task.sample(10_000)
    named = sample.ids[:, -1, :3] - 3 * 7 - torch.arange(3) * 7
    records = (sample.values == named[:, None]).long().argmax(1)  # [n, feature]
    for feature in range(3):
        uniform(records[:, feature].bincount(minlength=5).tolist(), 10_000)
    couples = (records[:, 0] * 5 + records[:, 2]).bincount(minlength=25).tolist()
    uniform([c for i, c in enumerate(couples) if i % 6], 10_000)


@pytest.mark.parametrize("shared", [False, True])
def test_chance_is_the_accuracy_of_any_record(shared):
    task = CrossComposition(5, 7, 3, shared_values=shared)
    assert task.chance == 1 / 3
    sample = task.sample(500)
    right = 0
    for values, a, answer in zip(sample.values.tolist(), sample.reported.tolist(), sample.answer.tolist(), strict=True):
        right += sum(record[a] + (0 if shared else a * 7) == answer for record in values)
    assert right == 500  # of 1500 guesses


# --- several runs at once, batches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_run_draws_combinations_of_its_own(level, layout):
    runs = [CrossComposition(3, 7, 5, level, 1 / 3, layout, seed=seed) for seed in (0, 1, 5)]
    pairs = torch.stack([task.trained_pairs for task in runs])
    assert len({str(own.tolist()) for own in pairs}) > 1
    whole = runs[0].draw(pairs, 40, torch.Generator().manual_seed(0))
    assert {len(part) for part in whole} == {3}
    assert {part.shape[1] for part in whole} == {40}
    for i, own in enumerate(pairs.tolist()):
        part = Sample(*(x[i] for x in whole))
        assert_solved(runs[i], part, {tuple(pair) for pair in own})
        found = set(zip(part.looked_up.tolist(), part.reported.tolist(), strict=True))
        assert found == {tuple(pair) for pair in own}
    assert len({str(x.tolist()) for x in whole.values}) == 3


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_has_the_answer_behind_the_sequence_and_a_label_there_alone(shared):
    task = CrossComposition(3, 7, 5, layout="tokens", shared_values=shared)
    sample = task.sample(11)
    batch = task.batch(sample)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for row in range(11):
        assert batch["input_ids"][row].tolist() == [*sample.ids[row].tolist(), sample.answer[row].item()]
        assert batch["labels"][row].tolist() == [-100] * sample.ids.shape[1] + [sample.answer[row].item()]
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    assert bool((batch["attention_mask"] == 1).all())


# --- the controls


@settings(max_examples=40)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 99), st.sampled_from(SPLITS))
def test_induction_follows_from_what_was_said_before(tokens, length, seed, split):
    batch = Induction(tokens, length, seed).sample(5, split)
    assert batch["input_ids"].shape == (5, 2 * length)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert all(0 <= token < tokens for token in ids)
        assert labels[: length + 1] == [-100] * (length + 1)
        for at in range(length + 1, 2 * length):
            assert labels[at] == ids[at] == ids[at - length]


def test_the_control_is_deterministic_and_its_draws_differ():
    task = Induction(17, 5)
    distinct = {str(task.sample(7, split, draw=draw)["input_ids"].tolist()) for split in SPLITS for draw in (0, 1)}
    distinct |= {str(replace(task, seed=1).sample(7)["input_ids"].tolist())}
    assert len(distinct) == 7
    assert torch.equal(task.sample(7, "test", draw=1)["input_ids"], replace(task).sample(7, "test", draw=1)["input_ids"])


def test_tokens_of_the_control_are_equally_frequent():
    n = 5000
    for at in range(3):
        uniform(Induction(11, 3).sample(n)["input_ids"][:, at].bincount(minlength=11).tolist(), n)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_features": 1}, "n_features is 1"),
        ({"n_features": 0}, "n_features is 0"),
        ({"n_records": 17}, r"n_records is 17, but the 16 values of a feature \(n_values\) name at most 16"),
        ({"n_records": 0}, "n_records is 0, .* there must be one"),
        ({"level": "easy"}, "the level is 'binding' or 'conflict', not 'easy'"),
        ({"layout": "words"}, "the layout is 'bag' or 'tokens', not 'words'"),
        ({"held_out": 1.0}, "from 0 to below 1, not 1.0"),
        ({"held_out": -0.1}, "from 0 to below 1, not -0.1"),
        ({"held_out": float("nan")}, "from 0 to below 1, not nan"),
        ({"held_out": 0.9}, r"held_out=0.9 takes 50 of 56 combinations away, but 8 have to stay .* at most 0.8571$"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(HeadlabError, match=message):
        CrossComposition(**options)


@pytest.mark.parametrize("task", [CrossComposition(), Induction()], ids=lambda task: type(task).__name__)
def test_bad_samples(task):
    with pytest.raises(HeadlabError, match="0 sequences were asked for"):
        task.sample(0)
    with pytest.raises(HeadlabError, match="-3 sequences were asked for"):
        task.sample(-3)
    with pytest.raises(HeadlabError, match="the split is 'train', 'seen', 'test', not 'dev'"):
        task.sample(1, "dev")
    for draw in (-1, 2**20):  # the next would be the first of another split
        with pytest.raises(HeadlabError, match=f"a draw has a number from 0 to 1048575, not {draw}"):
            task.sample(1, draw=draw)
    task.sample(1, draw=2**20 - 1)


def test_there_is_no_test_where_nothing_is_held_out():
    for share in (0.0, 0.005):
        task = CrossComposition(held_out=share)
        assert len(task.trained_pairs) == 56
        assert task.held_out_pairs.shape == (0, 2)
        with pytest.raises(HeadlabError, match=f"held_out={share} takes none of 56 combinations away, so there is no test"):
            task.sample(1, "test")
    with pytest.raises(HeadlabError, match="not 'dev'"):
        task.pairs("dev")


def test_bags_are_no_batch():
    task = CrossComposition()
    with pytest.raises(HeadlabError, match="layout 'tokens'"):
        task.batch(task.sample(1))


@pytest.mark.parametrize(("tokens", "length"), [(1, 5), (5, 1), (0, 3)])
def test_bad_induction(tokens, length):
    with pytest.raises(HeadlabError, match=f"{length} of {tokens} tokens"):
        Induction(tokens, length)


@pytest.mark.slow
def test_plain_attention_solves_the_control() -> None:
    task = Induction(n_tokens=32, length=8)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=task.n_tokens,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    for draw in range(400):
        model(**task.sample(128, "train", draw=draw), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = task.sample(500, "seen")
    with torch.inference_mode():
        said = model(batch["input_ids"], use_cache=False).logits[:, :-1].argmax(-1)
    asked = batch["labels"][:, 1:] != IGNORED
    assert (said == batch["labels"][:, 1:])[asked].double().mean() > 0.98
