"""Scoring a model, against a loop that says one token after the other; intervals against simulations."""

import copy

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import headlab as hl
from headlab.errors import HeadlabError
from synthetic_tasks import Answer, Context, Evaluation, evaluate
from synthetic_tasks.evaluation.encoding import answer_batches, encode
from synthetic_tasks.evaluation.scoring import wilson
from tests.evaluation.test_encoding import make_context, make_tokenizer
from tests.helpers import zoo
from tests.helpers.words import save_with_tokenizer

CHOICES = ("tea pot", "tea cup", "fox", "fig jam", "fig pie", "old tea")  # of several tokens, some of which begin alike
TOKENIZER = make_tokenizer("bytes", bos=True, padding=False, things=CHOICES)
CONTEXTS = [make_context(seed, n, CHOICES) for seed, n in enumerate([2, 3, 2, 2, 3, 2, 2, 3])]
OTHERS = [make_context(seed, 2, CHOICES) for seed in range(100, 116)]
MODELS = [*zoo.MHA_GQA_MQA, "gpt2", "dcformer-gqa", "mistral"]


def taught(name: str, steps: int = 14, tokenizer=TOKENIZER):
    """A model that has learned some of the answers."""
    model = zoo.build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        for batch in answer_batches(CONTEXTS[:5], tokenizer, 5):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def models():
    return {name: taught(name) for name in MODELS}


@pytest.fixture(scope="module")
def beginners():
    return {name: taught(name, 1) for name in MODELS}


@torch.no_grad()
def by_hand(model, contexts):
    """One token at a time, without batches: [all, first, choice, logprob] of every answer."""
    found = []
    for context, encoded in zip(contexts, encode(contexts, TOKENIZER), strict=True):
        for answer, where in zip(context.answers, encoded.answers, strict=True):
            ids, gold = list(encoded.ids[: where.span[0]]), list(encoded.ids[slice(*where.span)])
            said, chosen, nats = [], [], 0.0
            for token in gold:  # greedy
                said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
                nats += float(
                    model(torch.tensor([ids + gold[: len(said) - 1]])).logits[0, -1].double().log_softmax(-1)[token]
                )
            options = {choice: list(tokens) for choice, tokens in zip(answer.choices, where.choices, strict=True)}
            while not any(chosen == tokens for tokens in options.values()):  # greedy, but only what is a choice
                logits = model(torch.tensor([ids + chosen])).logits[0, -1]
                n = len(chosen)
                chosen.append(
                    max({t[n] for t in options.values() if t[:n] == chosen}, key=lambda token: float(logits[token]))
                )
            found.append((said == gold, said[0] == gold[0], chosen == gold, nats))
    return found


def judged(evaluation):
    return [tuple(row[name] for name in ("all", "first", "choice", "logprob")) for row in evaluation.lines]


def assert_same(ours, theirs, tolerance=1e-4):
    assert [row[:3] for row in ours] == [row[:3] for row in theirs]
    np.testing.assert_allclose([row[3] for row in ours], [row[3] for row in theirs], atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_against_one_token_at_a_time(models, beginners, name):
    for model, contexts in ((models[name], CONTEXTS), (beginners[name], OTHERS)):
        expected = by_hand(model, contexts)
        evaluation = evaluate(model, contexts, TOKENIZER, batch_size=3)
        assert_same(judged(evaluation), expected)
        for i, measure in enumerate(("all", "first", "choice")):
            assert evaluation.accuracy(measure) == np.mean([row[i] for row in expected])


def test_that_every_kind_of_decision_was_compared(models, beginners):
    seen = [row for model in models.values() for row in judged(evaluate(model, CONTEXTS, TOKENIZER))]
    seen += [row for model in beginners.values() for row in judged(evaluate(model, OTHERS, TOKENIZER))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert sum(row[i] != row[j] for row in seen) > 3


def test_a_space_apart_is_not_yet_the_first_token():
    split = make_tokenizer("split", things=CHOICES)
    seen = set()
    for steps in (1, 6):
        model = taught("llama-mha", steps, split)
        rows = evaluate(model, OTHERS, split).lines
        answers = [(e, a) for e in encode(OTHERS, split) for a in e.answers]
        for (encoded, where), row in zip(answers, rows, strict=True):
            assert where.lead == 1
            with torch.no_grad():
                said = model(torch.tensor([encoded.ids])).logits[0].argmax(-1).tolist()
            right = [said[i - 1] == encoded.ids[i] for i in range(*where.span)]
            assert row["all"] == all(right)
            assert row["first"] == (right[0] and right[1])
            seen.add((right[0], right[1]))
    assert {(True, False), (True, True)} <= seen


def test_one_choice_may_begin_another(models):
    choices = ("tea", "tea pot", "fox")
    text = "Ann has tea pot. >. Ann has tea pot\nBob has tea. >. Bob has tea"
    first, second = (Answer("tea pot", (28, 35), choices, (20, 27)), Answer("tea", (60, 63), choices, (52, 59)))
    (encoded,) = encode([Context("t", text, (first, second))], TOKENIZER)
    tea, pot, fox = encoded.answers[0].choices
    assert pot[: len(tea)] == tea
    rows = evaluate(models["gpt2"], [Context("t", text, (first, second))], TOKENIZER).lines
    with torch.no_grad():
        logits = models["gpt2"](torch.tensor([encoded.ids])).logits[0]
    for where, row in zip(encoded.answers, rows, strict=True):
        before = logits[where.span[0] - 1]
        assert row["choice"] == bool(before[tea[0]] > before[fox[0]])


def test_generation_says_what_is_right(models):
    model = models["llama-gqa"]
    for context, encoded in zip(CONTEXTS, encode(CONTEXTS, TOKENIZER), strict=True):
        rows = evaluate(model, [context], TOKENIZER).lines
        for where, row in zip(encoded.answers, rows, strict=True):
            ids = torch.tensor([encoded.ids[: where.span[0]]])
            options = {"max_new_tokens": where.length, "do_sample": False, "pad_token_id": 0}
            said = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
            assert row["all"] == (said.tolist() == list(encoded.ids[slice(*where.span)]))


@pytest.mark.parametrize("name", ["llama-mqa", "gpt2", "dcformer-gqa"])
def test_batches_change_nothing(models, name):
    one = evaluate(models[name], CONTEXTS, TOKENIZER, batch_size=1)
    for size in (2, 5, 100):
        other = evaluate(models[name], CONTEXTS, TOKENIZER, batch_size=size)
        assert_same(judged(other), judged(one), 1e-5)
        assert other.record["data"] == one.record["data"]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "dcformer-gqa"])
def test_a_bridge_gives_the_same(models, name):
    bridge = hl.bridge(models[name])
    assert_same(judged(evaluate(bridge, CONTEXTS, TOKENIZER)), judged(evaluate(models[name], CONTEXTS, TOKENIZER)))


def test_what_a_row_says(models):
    evaluation = evaluate(models["llama-mha"], CONTEXTS, TOKENIZER)
    answers = [(i, place, c, a) for i, c in enumerate(CONTEXTS) for place, a in enumerate(c.answers)]
    assert len(answers) == len(evaluation.lines)
    frame = evaluation.to_frame()
    for (number, place, context, answer), row, (_, line) in zip(answers, evaluation.lines, frame.iterrows(), strict=True):
        assert (row["context"], row["place"], row["task"], row["answer"]) == (number, place, context.task, answer.text)
        assert row["factors"] == context.factors
        assert row["difficulty"] == 0
        assert row["chance"] == 1 / 6
        assert line["relation"] == context.factors["relation"]
        assert line["all"] == row["all"]
    assert f"{len(answers)} answers in 8 contexts of 3 tasks: all {evaluation.accuracy():.1%}" in repr(evaluation)
    with pytest.raises(HeadlabError, match="measure is one of all, first, choice, not 'any'"):
        evaluation.accuracy("any")


def test_saved_and_read_again(models, tmp_path):
    evaluation = evaluate(models["llama-mha"], CONTEXTS, TOKENIZER)
    path = evaluation.save(tmp_path / "evaluation.json")
    for again in (Evaluation.load(path), hl.Result.load(path)):
        assert again.lines == evaluation.lines
        assert again.record == evaluation.record
        assert again.by("relation").equals(evaluation.by("relation"))


def test_by_factor(models):
    evaluation = evaluate(models["llama-mha"], CONTEXTS, TOKENIZER)
    frame = evaluation.to_frame()
    by = evaluation.by("relation", "task")
    assert by["n"].sum() == len(frame)
    for _, line in by.iterrows():
        group = frame[(frame["relation"] == line["relation"]) & (frame["task"] == line["task"])]
        assert (line["n"], line["contexts"]) == (len(group), group["context"].nunique())
        for measure in ("all", "first", "choice"):
            assert line[measure] == pytest.approx(group[measure].mean())
            ends = wilson(group[measure].to_numpy(float), group["context"].to_numpy())
            assert (line[f"{measure}_low"], line[f"{measure}_high"]) == ends
            assert 0 <= ends[0] <= line[measure] <= ends[1] <= 1
    whole = evaluation.by()
    assert len(whole) == 1
    assert whole["all"][0] == evaluation.accuracy()
    assert whole["logprob"][0] == pytest.approx(np.mean([row["logprob"] for row in evaluation.lines]))
    assert list(evaluation.by("task")["task"]) == ["t0", "t1", "t2"]
    with pytest.raises(HeadlabError, match=r"no factor 'kind'; there are context, task, difficulty, place, relation, order"):
        evaluation.by("kind")


def test_contexts_without_factors_stand_beside_those_with_them(models):
    bare = Context("bare", CONTEXTS[0].text, CONTEXTS[0].answers)
    by = evaluate(models["llama-mha"], [*CONTEXTS, bare], TOKENIZER).by("relation")
    assert by["relation"].isna().sum() == 1
    assert by["n"].sum() == sum(len(context.answers) for context in [*CONTEXTS, bare])


# --- intervals


def test_wilson_of_independent_answers():
    from scipy.stats import binomtest

    rng = np.random.default_rng(0)
    right = (rng.random(3000) < 0.3).astype(float)
    expected = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(right, np.arange(3000)), (expected.low, expected.high), atol=2e-5)


def test_answers_that_always_agree_count_once():
    rng = np.random.default_rng(1)
    right = (rng.random(40) < 0.5).astype(float)
    once = wilson(right, np.arange(40))
    np.testing.assert_allclose(wilson(right.repeat(6), np.arange(40).repeat(6)), once, atol=1e-12)
    alternating = np.tile([0.0, 1.0], 120)  # negatively correlated: the design effect is not below 1
    clusters = np.arange(40).repeat(6)
    spread = wilson(rng.permutation(alternating), np.arange(240))
    assert np.diff(wilson(alternating, clusters)) >= np.diff(spread) * 0.99


def test_the_design_effect_in_a_loop():
    from scipy.stats import t

    right, clusters = [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0], list("aaabbbccdde")
    n, names, p = len(right), sorted(set(clusters)), sum(right) / len(right)
    squares = sum(sum(r - p for r, c in zip(right, clusters, strict=True) if c == name) ** 2 for name in names)
    effective = n / (len(names) / (len(names) - 1) * squares / n**2 / (p * (1 - p) / n))
    assert effective < n
    z = t.ppf(0.975, len(names) - 1)
    for end in wilson(np.array(right, float), np.array(clusters)):  # ends of Wilson's interval solve this equation
        assert (p - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / effective)


def test_what_cannot_be_estimated_counts_a_cluster_once():
    from scipy.stats import t

    z = t.ppf(0.975, 11)
    for value, expected in ((1.0, (12 / (12 + z**2), 1.0)), (0.0, (0.0, z**2 / (12 + z**2)))):
        np.testing.assert_allclose(wilson(np.full(72, value), np.arange(12).repeat(6)), expected, atol=1e-12)
    low, high = wilson(np.array([0.0, 1.0, 1.0]), np.zeros(3))
    assert 0 < low < 0.2 < 0.9 < high < 1


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_intervals_hold_the_truth_as_often_as_they_say(share):
    rng = np.random.default_rng(2)
    clusters, held, naive = np.arange(30).repeat(6), 0, 0
    for _ in range(600):
        of_cluster = rng.beta(share * 1.5, (1 - share) * 1.5, 30)  # correlation within clusters: 0.4
        right = (rng.random(180) < of_cluster.repeat(6)).astype(float)
        low, high = wilson(right, clusters)
        held += low <= share <= high
        low, high = wilson(right, np.arange(180))
        naive += low <= share <= high
    assert 0.92 < held / 600 < 0.985
    assert naive / 600 < 0.85


def test_the_width_is_that_of_a_bootstrap_of_contexts():
    rng = np.random.default_rng(3)
    of_cluster = rng.beta(1, 1, 300)
    right = (rng.random((300, 6)) < of_cluster[:, None]).astype(float)
    drawn = [right[rng.integers(300, size=300)].mean() for _ in range(2000)]
    low, high = wilson(right.ravel(), np.arange(300).repeat(6))
    assert high - low == pytest.approx(2 * 1.96 * np.std(drawn), rel=0.08)


# --- masks, logs, the model left as it was


@pytest.mark.parametrize("name", ["llama-gqa", "dcformer-gqa"])
def test_under_a_mask(models, name):
    model = models[name]
    mask = hl.HeadMask.without(hl.heads(model), ["L0H1", "L1H0", "L2H5"])
    fill = hl.fill(model, answer_batches(CONTEXTS, TOKENIZER))
    clean = evaluate(model, CONTEXTS, TOKENIZER)
    for filling in (None, fill):
        with hl.masked(model, mask, filling):
            expected = by_hand(model, CONTEXTS)
            around = evaluate(model, CONTEXTS, TOKENIZER)
        inside = evaluate(model, CONTEXTS, TOKENIZER, mask=mask, fill=filling, batch_size=2)
        assert_same(judged(inside), expected)
        assert_same(judged(inside), judged(around), 1e-5)
        assert judged(inside) != judged(clean)
        assert inside.record["mask"] == [row.tolist() for row in mask.rows]
    flat = torch.from_numpy(mask.flat)
    assert judged(evaluate(model, CONTEXTS, TOKENIZER, mask=flat)) == judged(
        evaluate(model, CONTEXTS, TOKENIZER, mask=[row.tolist() for row in mask.rows])
    )
    if name == "dcformer-gqa":
        at_scores = evaluate(model, CONTEXTS, TOKENIZER, mask=mask, site="scores")
        with hl.masked(model, mask, site="scores"):
            assert_same(judged(at_scores), by_hand(model, CONTEXTS))
    with pytest.raises(HeadlabError, match="no mask"):
        evaluate(model, CONTEXTS, TOKENIZER, fill=fill)
    with pytest.raises(HeadlabError, match="one per head"):
        evaluate(model, CONTEXTS, TOKENIZER, mask=torch.ones(7, 18))
    with pytest.raises(HeadlabError, match="another model"):
        evaluate(models["llama-mha"], CONTEXTS, TOKENIZER, mask=clean_mask(model))


def test_a_mask_that_does_not_fit_leaves_no_log(models, tmp_path):
    with pytest.raises(HeadlabError):
        evaluate(models["llama-mha"], CONTEXTS, TOKENIZER, mask=torch.ones(7), log=tmp_path / "log.jsonl")
    assert not (tmp_path / "log.jsonl").exists()


def clean_mask(model):
    return hl.importance(model, answer_batches(CONTEXTS, TOKENIZER)).keep(0.5)


def test_the_model_is_left_as_it_was(models):
    model = copy.deepcopy(models["llama-mha"]).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    assert implementation == "sdpa"
    evaluate(model, CONTEXTS, TOKENIZER)
    assert before == {name: module.training for name, module in model.named_modules()}
    assert model.config._attn_implementation == implementation
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=zoo.VOCAB, n_embd=10, n_layer=1, n_head=2, n_positions=61)).train()
    assert judged(evaluate(model, CONTEXTS, TOKENIZER)) == judged(evaluate(model, CONTEXTS, TOKENIZER))
    assert model.training


def test_a_killed_run_goes_on(models, tmp_path):
    model = models["llama-gqa"]
    whole = evaluate(model, CONTEXTS, TOKENIZER, batch_size=2, log=tmp_path / "whole.jsonl")
    runs = []

    def kill(*_):
        runs.append(1)
        if len(runs) == 3:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, CONTEXTS, TOKENIZER, batch_size=2, log=tmp_path / "killed.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes().count(b"\n") == 3
    again = evaluate(model, CONTEXTS, TOKENIZER, batch_size=2, log=tmp_path / "killed.jsonl")
    assert len(runs) == 3 + 2  # the batches that were missing
    evaluate(model, CONTEXTS, TOKENIZER, batch_size=2, log=tmp_path / "killed.jsonl")
    assert len(runs) == 5
    handle.remove()
    assert again.lines == whole.lines
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_log_of_something_else_is_refused(models, tmp_path):
    model, log = models["llama-gqa"], tmp_path / "log.jsonl"
    evaluate(model, CONTEXTS, TOKENIZER, log=log)
    mask = hl.HeadMask.without(hl.heads(model), ["L0H1"])
    others = {
        "model": lambda: evaluate(models["llama-mha"], CONTEXTS, TOKENIZER, log=log),
        "data": lambda: evaluate(model, CONTEXTS[1:], TOKENIZER, log=log),
        "mask": lambda: evaluate(model, CONTEXTS, TOKENIZER, log=log, mask=mask),
        "batch_size": lambda: evaluate(model, CONTEXTS, TOKENIZER, log=log, batch_size=3),
    }
    for what, run in others.items():
        with pytest.raises(HeadlabError, match=rf"another computation .it differs in: {what}"):
            run()
    fewer = [Context(c.task, c.text, tuple(Answer(a.text, a.span, (a.text,), a.query) for a in c.answers)) for c in CONTEXTS]
    with pytest.raises(HeadlabError, match="differs in: data"):  # the same texts with other choices
        evaluate(model, fewer, TOKENIZER, log=log)


# --- bad input


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "t5", "bert-classifier"])
def test_other_models_are_refused(name):
    model = zoo.build(name)
    with pytest.raises(HeadlabError, match=f"{type(model).__name__} is no causal language model"):
        evaluate(model, CONTEXTS, TOKENIZER)


def test_bad_input(models, tmp_path):
    model = models["llama-mha"]
    with pytest.raises(HeadlabError, match="no contexts"):
        evaluate(model, [], TOKENIZER)
    with pytest.raises(HeadlabError, match="no tokenizer lies beside the model"):
        evaluate(model, CONTEXTS)
    with pytest.raises(HeadlabError, match=r"context 8 .* no answers"):
        evaluate(model, [*CONTEXTS, Context("t", "Ann", ())], TOKENIZER)
    with pytest.raises(HeadlabError, match="batch_size must be at least 1, not 0"):
        evaluate(model, CONTEXTS, TOKENIZER, batch_size=0)
    long = make_context(0, 9)
    n = len(TOKENIZER(long.text)["input_ids"])
    assert n > 61
    with pytest.raises(HeadlabError, match=f"context 1 has {n} tokens, but the model takes 61 at most"):
        evaluate(model, [CONTEXTS[0], long], TOKENIZER)
    named = Context("t", CONTEXTS[0].text, CONTEXTS[0].answers, {"first": "x"})
    with pytest.raises(HeadlabError, match="cannot be named first"):
        evaluate(model, [named], TOKENIZER)
    few = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=10, n_layer=1, n_head=2, n_positions=61))
    with pytest.raises(HeadlabError, match=r"the model knows 50: is it its tokenizer\?"):
        evaluate(few, CONTEXTS, TOKENIZER)
    broken = copy.deepcopy(model)
    broken.model.layers[1].self_attn.v_proj.weight.data[:10] = float("nan")
    with pytest.raises(HeadlabError, match="NaN or infinite; head L1H0 was the first"):
        evaluate(broken, CONTEXTS, TOKENIZER)


def test_the_tokenizer_beside_the_model(tmp_path):
    folder = save_with_tokenizer(zoo.build("gpt2"), tmp_path / "model")
    TOKENIZER.save_pretrained(folder)
    model = hl.load(folder)
    assert judged(evaluate(model, CONTEXTS)) == judged(evaluate(model, CONTEXTS, TOKENIZER))
