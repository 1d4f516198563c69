"""Stacks of probes against probes that are trained one by one, and against a plain loop with the optimizer of torch."""

from __future__ import annotations

from collections.abc import Iterator
from math import cos, pi
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from headlab.errors import HeadlabError
from synthetic_tasks import CrossComposition
from synthetic_tasks.probes import training
from synthetic_tasks.probes.models import ProbeForSequenceClassification, probe_config
from synthetic_tasks.probes.training import Bundle, Outcome, Recipe, Run, learning_rates, shares_of_mean, train
from synthetic_tasks.symbolic import Sample

SIZES = {"hidden_size": 11, "num_attention_heads": 3, "head_dim": 2}
STEPS, BATCH = 5, 13


def task_of(seed: int = 0, level: str = "conflict", **options: Any) -> CrossComposition:
    return CrossComposition(5, 7, 4, level, seed=seed, **options)


def run_of(
    seed: int = 0, kind: str = "dcmha", level: str = "conflict", sizes: dict[str, Any] | None = None, **recipe: Any
) -> Run:
    recipe = {"steps": STEPS, "batch": BATCH, "lr": 0.02, "warm": 0.4, "clip": 0.3} | recipe
    return Run(task_of(seed, level), kind, SIZES | (sizes or {}), Recipe(**recipe))


@pytest.fixture
def exact() -> Iterator[None]:
    """Adam divides gradients by their size: in float32 the last digits of a small one would count."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Fixed:
    """Samples made beforehand, in place of `CrossComposition.draw`; by the combinations that a run is trained on."""

    def __init__(self, runs: list[Run], steps: int = STEPS, batch: int = BATCH) -> None:
        self.steps: list[dict[str, Sample]] = [
            {str(run.task.trained_pairs.tolist()): run.task.sample(batch, draw=step) for run in runs}
            for step in range(steps)
        ]
        assert len(self.steps[0]) == len(runs)
        self.at = 0

    def of(self, run: Run) -> list[Sample]:
        return [step[str(run.task.trained_pairs.tolist())] for step in self.steps]

    def draw(self, pairs: Tensor, n: int, generator: torch.Generator) -> Sample:
        chosen = [self.steps[self.at][str(own.tolist())] for own in pairs]
        self.at = (self.at + 1) % len(self.steps)
        assert {len(sample.ids) for sample in chosen} == {n}
        return Sample(*(torch.stack(parts) for parts in zip(*chosen, strict=True)))


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def fix(runs: list[Run], **sizes: int) -> Fixed:
        samples = Fixed(runs, **sizes)
        monkeypatch.setattr(CrossComposition, "draw", lambda self, *args: samples.draw(*args))
        return samples

    return fix


def trained(runs: list[Run]) -> Bundle:
    bundle = Bundle(runs)
    for _ in range(runs[0].recipe.steps):
        bundle.step()
    return bundle


def weights_of(bundle: Bundle, run: int) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in bundle.trained(run).named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> None:
    assert set(found) == set(expected)
    for name, x in found.items():
        assert (x - expected[name]).abs().max() < within, name


# --- what a bundle computes


VARIED = [
    {"weight_decay": 0.01},
    {"weight_decay": 0.5, "decay": {"base": 0.0, "mlp": 3.0}},
    {"weight_decay": 0.1, "decay": {"low_rank": 2.0, "gates": 0.7}},
]


@pytest.mark.parametrize(
    ("kind", "level", "sizes"),
    [
        ("mha", "binding", {}),
        ("dcmha", "conflict", {"mlp": True, "first": True}),
        ("low_rank", "conflict", {"num_hidden_layers": 2}),
        ("static", "binding", {"first": True}),
        ("compositional", "conflict", {}),
    ],
)
@pytest.mark.usefixtures("exact")
def test_runs_of_a_stack_are_trained_as_each_of_them_alone_and_as_in_a_plain_loop(kind, level, sizes, fixed):
    runs = [run_of(seed, kind, level, sizes, **more) for seed, more in enumerate(VARIED)]
    samples = fixed(runs)
    together = trained(runs)
    for i, run in enumerate(runs):
        alone = trained([run])
        assert_same(weights_of(together, i), weights_of(alone, 0), 1e-9)
        plain, norms = plain_loop(run, samples.of(run))
        assert_same(weights_of(together, i), dict(plain.named_parameters()), 1e-9)
        assert max(norms) > run.recipe.clip  # the gradients were clipped
        torch.manual_seed(run.task.seed)
        fresh = ProbeForSequenceClassification(probe_config(run.task, kind, **run.sizes))
        for name, p in fresh.named_parameters():
            assert (weights_of(together, i)[name] - p).abs().max() > 1e-3, name


def test_the_same_in_float32(fixed):
    runs = [run_of(seed, lr=0.003, **more) for seed, more in enumerate(VARIED)]
    fixed(runs)
    together = trained(runs)
    for i, run in enumerate(runs):
        assert_same(weights_of(together, i), weights_of(trained([run]), 0), 1e-4)
        assert weights_of(together, i)["head.weight"].dtype == torch.float32


def decay_by_name(recipe: Recipe, name: str) -> float:
    """By what the weights of `Compose` and the probe are called; one by one."""
    last = name.split(".compose.")[-1] if ".compose." in name else ""
    part = {"base.weight": "base", "dd.weight": "gates", "dw1.weight": "low_rank", "qkw.weight": "low_rank"}.get(last)
    if ".mlp." in name or name.startswith("first."):
        part = "mlp"
    return recipe.decay.get(part, recipe.weight_decay)


def plain_loop(run: Run, samples: list[Sample]) -> tuple[ProbeForSequenceClassification, list[float]]:
    recipe = run.recipe
    torch.manual_seed(run.task.seed)
    probe = ProbeForSequenceClassification(probe_config(run.task, run.kind, **run.sizes))
    groups = [{"params": [p], "weight_decay": decay_by_name(recipe, name)} for name, p in probe.named_parameters()]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))
    norms = []
    for step, sample in enumerate(samples):
        optimizer.zero_grad()
        cross_entropy(probe(sample.ids).logits, sample.answer).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(probe.parameters(), recipe.clip)))
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        optimizer.step()
    return probe, norms


def rate(recipe: Recipe, step: int) -> float:
    at, up = step + 0.5, recipe.warm * recipe.steps
    fall = up + recipe.hold * recipe.steps
    if at < up:
        return recipe.lr * (1 / 25 + (1 - 1 / 25) * (1 - cos(pi * at / up)) / 2)
    if at < fall:
        return recipe.lr
    return recipe.lr * (1 / 250_000 + (1 - 1 / 250_000) * (1 + cos(pi * (at - fall) / (recipe.steps - fall))) / 2)


def test_every_part_may_decay_at_a_rate_of_its_own():
    recipe = Recipe(weight_decay=0.1, decay={"base": 0.2, "gates": 0.3, "low_rank": 0.4, "mlp": 0.5})
    probe = ProbeForSequenceClassification(probe_config(task_of(), "dcmha", **SIZES, mlp=True, first=True))
    found: dict[float, set[str]] = {}
    for name, _ in probe.named_parameters():
        found.setdefault(recipe.decay_of(name), set()).add(name)
        assert recipe.decay_of(name) == decay_by_name(recipe, name)
        assert Recipe(weight_decay=0.7).decay_of(name) == 0.7
    compose = "layers.0.self_attn.compose."
    assert found[0.2] == {f"{compose}base.weight"}
    assert found[0.3] == {f"{compose}dd.weight"}
    assert found[0.4] == {f"{compose}dw1.weight", f"{compose}qkw.weight"}
    assert len(found[0.5]) == 8
    assert {"embed.weight", "head.weight", "layers.0.self_attn.q_proj.weight"} <= found[0.1]


@pytest.mark.parametrize("recipe", [Recipe(steps=40), Recipe(steps=37, warm=0.25, hold=0.5), Recipe(100, lr=7.0, warm=0.01)])
def test_learning_rates(recipe):
    found = learning_rates(recipe)
    assert found.shape == (recipe.steps,)
    expected = torch.tensor([rate(recipe, step) for step in range(recipe.steps)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * recipe.lr)
    up, level = recipe.warm * recipe.steps, (recipe.warm + recipe.hold) * recipe.steps
    middle = torch.arange(recipe.steps) + 0.5
    assert (found[middle < up].diff() > 0).all()
    assert (found[middle > level].diff() < 0).all()
    if recipe.hold:
        assert torch.allclose(found[(middle > up) & (middle < level)], torch.tensor(recipe.lr))


def test_learning_rates_begin_and_end_low():
    found = learning_rates(Recipe(steps=100_000, lr=2.0, hold=0.2))
    assert found[0] == pytest.approx(2 / 25, rel=1e-4)
    assert found[-1] == pytest.approx(2 / 250_000, rel=1e-2)
    assert found.max() == pytest.approx(2.0)
    assert found[40_000] == found[30_001] == 2.0


@pytest.mark.parametrize(
    ("steps", "average", "counted"), [(7, 0.0, 1), (7, 0.3, 2), (5, 1.0, 5), (11, 0.5, 6), (3, 0.01, 1)]
)
def test_the_mean_counts_the_last_steps_alike(steps, average, counted):
    values = torch.randn(steps, dtype=torch.float64)
    mean = torch.tensor(3.0, dtype=torch.float64)
    for value, share in zip(values, shares_of_mean(Recipe(steps=steps, average=average)).double(), strict=True):
        mean = mean.lerp(value, share)
    assert abs(mean - values[-counted:].mean()) < 1e-6


@pytest.mark.usefixtures("exact")
def test_a_trained_probe_has_the_mean_of_its_last_weights():
    runs = [run_of(seed, steps=5, average=0.6) for seed in range(2)]
    bundle, seen = Bundle(runs), []
    for _ in range(5):
        bundle.step()
        seen.append([weights_of(bundle, i) for i in range(2)])
    last = seen[-1][1]["head.weight"]
    bundle.finish()
    for i in range(2):
        for name, x in weights_of(bundle, i).items():
            expected = torch.stack([weights[i][name] for weights in seen[-3:]]).mean(0)
            assert (x - expected).abs().max() < 1e-9, name
    assert (weights_of(bundle, 1)["head.weight"] - last).abs().max() > 1e-4
    outcome, _ = train(runs)
    for name, x in outcome.probe.named_parameters():
        assert (x - weights_of(bundle, 0)[name]).abs().max() < 1e-9, name


# --- accuracy, outcomes


@pytest.mark.parametrize("n", [1, 100, 4097])
def test_accuracy_counts_right_answers(n, monkeypatch):
    bundle = Bundle([run_of(seed, "mha", "binding") for seed in range(2)])
    drawn: list[Sample] = []
    draw = CrossComposition.draw

    def watched(self: CrossComposition, pairs: Tensor, size: int, generator: torch.Generator) -> Sample:
        drawn.append(draw(self, pairs, size, generator))
        return drawn[-1]

    monkeypatch.setattr(CrossComposition, "draw", watched)
    for split in ("seen", "test"):
        drawn.clear()
        found = bundle.accuracy(split, n)
        assert sum(sample.ids.shape[1] for sample in drawn) == n
        for i, run in enumerate(bundle.runs):
            right, probe = 0, bundle.trained(i)
            wanted = {tuple(pair) for pair in run.task.pairs(split).tolist()}
            for sample in drawn:
                with torch.no_grad():
                    answers = probe(sample.ids[i]).logits.argmax(-1)
                right += sum(a == b for a, b in zip(answers.tolist(), sample.answer[i].tolist(), strict=True))
                asked = zip(sample.looked_up[i].tolist(), sample.reported[i].tolist(), strict=True)
                assert set(asked) <= wanted
            assert found[i] == pytest.approx(right / n)
        if n > 1:
            assert len({str(sample.values.tolist()) for sample in drawn}) == len(drawn)
        assert bundle.accuracy(split, n) == found


def test_outcomes():
    runs = [run_of(0, "static", steps=6), run_of(1, "mha", steps=4), run_of(2, "static", steps=6, weight_decay=1.0)]
    outcomes = list(train(runs, checks=2, n_test=50))
    assert {id(outcome.run) for outcome in outcomes} == {id(run) for run in runs}
    for outcome in outcomes:
        assert isinstance(outcome, Outcome)
        steps = outcome.run.recipe.steps
        assert [row["step"] for row in outcome.history] == [steps // 2, steps]
        assert all(set(row) == {"step", "seen", "test"} for row in outcome.history)
        assert all(0 <= row[split] <= 1 for row in outcome.history for split in ("seen", "test"))
        assert (outcome.seen * 50) % 1 == pytest.approx(0, abs=1e-6)
        assert 0 <= outcome.seen <= 1
        assert 0 <= outcome.test <= 1
        assert type(outcome.probe) is ProbeForSequenceClassification
        assert not outcome.probe.training
        assert outcome.probe.config.kind == outcome.run.kind
        assert outcome.parameters == sum(p.numel() for p in outcome.probe.parameters())
    assert all(outcome.history == [] for outcome in train(runs[:1], n_test=10))


def test_nothing_is_tested_where_nothing_is_held_out():
    run = Run(task_of(held_out=0.0), "mha", SIZES, Recipe(steps=2, batch=3))
    (outcome,) = train([run], checks=1, n_test=20)
    assert outcome.test is None
    assert [set(row) for row in outcome.history] == [{"step", "seen"}]


def test_the_accuracy_of_an_outcome_is_its_probes():
    (outcome,) = train([run_of(3, "mha", "binding", steps=60, batch=64)], n_test=4000)
    sample = outcome.run.task.sample(4000, "seen")
    with torch.no_grad():
        right = (outcome.probe(sample.ids).logits.argmax(-1) == sample.answer).float().mean()
    assert outcome.seen == pytest.approx(right.item(), abs=0.04)
    assert outcome.seen > 1.5 / 35  # of 35 classes: it has learned something


# --- which runs are stacked


def test_runs_of_one_shape_are_one_stack(monkeypatch):
    made: list[list[Run]] = []

    class Watched(Bundle):
        def __init__(self, runs: list[Run], device: Any = "cpu") -> None:
            made.append(list(runs))
            super().__init__(runs, device)

    monkeypatch.setattr(training, "Bundle", Watched)
    small = {"steps": 1, "batch": 2}
    one = run_of(0, "mha", **small)
    same = [
        one,
        run_of(1, "mha", **small),
        run_of(0, "mha", **small, weight_decay=0.7),
        run_of(2, "mha", **small, decay={"mlp": 1.0}),
        Run(one.task, "mha", dict(reversed(one.sizes.items())), one.recipe),
    ]
    others = [
        run_of(0, "static", **small),
        run_of(0, "mha", "binding", **small),
        run_of(0, "mha", sizes={"mlp": True}, **small),
        run_of(0, "mha", steps=2, batch=2),
        run_of(0, "mha", **small, lr=0.1),
        run_of(0, "mha", **small, clip=0.1),
        Run(task_of(held_out=0.5), "mha", SIZES, one.recipe),
    ]
    outcomes = list(train([others[0], same[0], *others[1:], *same[1:]], beside=3, n_test=5))
    assert made == [[others[0]], same, *([run] for run in others[1:])]
    assert [outcome.run for outcome in outcomes] == [run for group in made for run in group]


def test_the_same_runs_give_the_same():
    runs = [run_of(seed, steps=20) for seed in (3, 4)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = list(train(runs, n_test=500))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    other = list(train(runs, n_test=500))
    for a, b in zip(one, other, strict=True):
        assert (a.seen, a.test, a.run) == (b.seen, b.test, b.run)
        assert_same(dict(a.probe.named_parameters()), dict(b.probe.named_parameters()), 1e-12)
    assert not torch.equal(one[0].probe.head.weight, one[1].probe.head.weight)


def test_seeds_begin_with_other_weights():
    bundle = Bundle([run_of(0), run_of(1), run_of(0, weight_decay=1.0)])
    first, second, again = (weights_of(bundle, i) for i in range(3))
    for name in first:
        assert torch.equal(first[name], again[name])
        if "norm" not in name and name != "head.bias":
            assert not torch.equal(first[name], second[name]), name
    assert bundle.pairs[0].tolist() == bundle.runs[0].task.trained_pairs.tolist() != bundle.pairs[1].tolist()


def test_no_run_changes_another(fixed):
    runs = [run_of(seed) for seed in range(2)]
    fixed(runs)
    expected = weights_of(trained(runs), 0)
    wild = [runs[0], run_of(1, weight_decay=45.0)]
    assert_same(weights_of(trained(wild), 0), expected, 1e-6)
    assert (weights_of(trained(wild), 1)["head.weight"] - weights_of(trained(runs), 1)["head.weight"]).abs().max() > 0.01


def test_precision_of_products_is_put_back():
    before = torch.get_float32_matmul_precision()
    with training.faster_products():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    list(train([run_of(steps=1)], n_test=5))
    assert torch.get_float32_matmul_precision() == before


def test_plain_attention_fails_where_maps_do_not():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 5}
    recipe = Recipe(600, 64, lr=8e-3, weight_decay=0.1)
    tasks = [CrossComposition(4, 5, 4, held_out=0.25, seed=seed) for seed in (0, 2)]
    outcomes = list(train([Run(task, kind, sizes, recipe) for kind in ("mha", "static") for task in tasks], n_test=2000))
    plain, static = ([outcome for outcome in outcomes if outcome.run.kind == kind] for kind in ("mha", "static"))
    assert min(outcome.seen for outcome in plain) > 0.7
    assert min(outcome.seen for outcome in static) > 0.95
    assert max(outcome.test for outcome in plain) < 0.45  # a record at random: 0.25
    assert min(outcome.test for outcome in static) > 0.65


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decay": {"heads": 0.1, "base": 1.0, "a": 0.0}},
            "no part of a probe is called a, heads; the parts are base, gates",
        ),
        ({"warm": 0.0}, r"warm \(0.0\) and hold \(0.0\) are shares"),
        ({"warm": 0.5, "hold": 0.5}, r"warm \(0.5\) and hold \(0.5\)"),
        ({"hold": -0.1}, r"hold \(-0.1\)"),
        ({"warm": float("nan")}, r"warm \(nan\)"),
        ({"average": 1.5}, r"average \(1.5\) is a share"),
        ({"average": float("nan")}, r"average \(nan\) is a share"),
        ({"steps": 0}, "0 steps of 1024 sequences"),
        ({"batch": -2}, "4000 steps of -2 sequences"),
    ],
)
def test_bad_recipes(options, message):
    with pytest.raises(HeadlabError, match=message):
        Recipe(**options)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Run(task_of(), "moe"), "no attention is called 'moe'"),
        (Run(task_of(layout="tokens"), "mha"), "make the task with layout='bag'"),
        (Run(task_of(), "dcmha", SIZES | {"rank": 4}), r"the rank is from 1 to the number of heads in a group \(3\), not 4"),
    ],
)
def test_bad_runs(run, message):
    with pytest.raises(HeadlabError, match=message):
        list(train([run]))


def test_no_runs_no_outcomes():
    assert list(train([])) == []
