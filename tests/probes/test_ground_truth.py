"""What is read off a probe: on probes written by hand, whose heads and maps are known, and against plain loops."""

from __future__ import annotations

from math import exp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headlab.errors import HeadlabError
from synthetic_tasks import CrossComposition
from synthetic_tasks.probes import ground_truth
from synthetic_tasks.probes.ground_truth import LooksAndCarries, Truth, compare, mean_maps, measured_heads
from synthetic_tasks.probes.models import ProbeAttention, ProbeForSequenceClassification, probe_config
from synthetic_tasks.probes.training import Recipe, Run, train
from synthetic_tasks.symbolic import LEVELS, Sample

FEATURES, VALUES, RECORDS = 4, 5, 3
BOTH = pytest.mark.parametrize("level", LEVELS)
SHARED = pytest.mark.parametrize("shared", [False, True])


def task_of(level: str = "binding", **options: Any) -> CrossComposition:
    return CrossComposition(FEATURES, VALUES, RECORDS, level, **options)


def attention_of(probe: ProbeForSequenceClassification) -> ProbeAttention:
    found = probe.layers[0].self_attn
    assert isinstance(found, ProbeAttention)
    return found


@torch.no_grad()
def written(
    task: CrossComposition, looks: list[int] | None = None, carries: list[int] | None = None
) -> ProbeForSequenceClassification:
    """A probe that solves a task: head h looks up feature looks[h] and carries feature carries[h].

    The stream has a direction for every value of a feature in records, in queries, for every selector and report. The
    branch `pre_query` leads from the head that looks p up to the head that carries a.
    """
    looks, carries = looks or list(range(FEATURES)), carries or list(range(FEATURES))
    own = FEATURES * VALUES
    config = probe_config(
        task, "low_rank", num_attention_heads=FEATURES, head_dim=VALUES, hidden_size=2 * own + 2 * FEATURES, rank=1
    )
    probe = ProbeForSequenceClassification(config).eval()
    attention = attention_of(probe)
    for p in probe.parameters():
        p.zero_()
    probe.layers[0].norm.weight.fill_(1)
    probe.norm.weight.fill_(1)
    probe.embed.weight[: config.hidden_size] = torch.eye(config.hidden_size)  # tokens lie as the directions do
    for head in range(FEATURES):
        for value in range(VALUES):
            at, looked_up, carried = head * VALUES + value, looks[head] * VALUES + value, carries[head] * VALUES + value
            attention.q_proj.weight[at, own + looked_up] = 3
            attention.k_proj.weight[at, looked_up] = 3
            attention.v_proj.weight[at, carried] = 1
            attention.o_proj.weight[carried, at] = 1
    compose = attention.compose
    hidden = compose.dw1.weight.unflatten(0, (4, 2 * FEATURES))[0]  # of pre_query; the other places stay silent
    mixed = compose.qkw.weight[0, 0]
    for head in range(FEATURES):
        p, a = looks[head], carries[head]
        named = (
            slice(2 * own + p, 2 * own + p + 1)
            if task.level == "conflict"
            else slice(own + p * VALUES, own + (p + 1) * VALUES)
        )
        hidden[head, named] = 5
        hidden[FEATURES + head, 2 * own + FEATURES + a] = 5
        mixed[head, 0, head] = mixed[FEATURES + head, 1, head] = 0.3
    for feature in range(FEATURES):
        for value in range(VALUES):
            answer = value if task.shared_values else feature * VALUES + value
            probe.head.weight[answer, feature * VALUES + value] = 1
            if not task.shared_values:
                probe.head.weight[answer, 2 * own + FEATURES + feature] = 30  # the vocabulary that is asked for
    return probe


def accuracy(probe: ProbeForSequenceClassification, sample: Sample) -> float:
    with torch.no_grad():
        return (probe(sample.ids).logits.argmax(-1) == sample.answer).double().mean().item()


# --- a probe that is known


@BOTH
def test_a_written_probe_looks_up_and_carries_what_was_written(level: str) -> None:
    task = task_of(level)
    looks, carries = [2, 0, 3, 1], [1, 3, 0, 2]
    probe = written(task, looks, carries)
    heads = measured_heads(probe, task, 200)
    assert heads.looks_up.shape == heads.carries.shape == (FEATURES, FEATURES)
    assert heads.looks_up.argmax(1).tolist() == looks
    assert heads.carries.argmax(1).tolist() == carries
    for found, own in ((heads.looks_up, looks), (heads.carries, carries)):
        at = found[range(FEATURES), own]
        rest = found.clone()
        rest[range(FEATURES), own] = 0
        assert at.min() > 4 * rest.max()
        assert at.min() > 0.5


@BOTH
@pytest.mark.parametrize("split", ["seen", "test"])
def test_right_maps_are_found_right(level: str, split: Any) -> None:
    task = task_of(level)
    for heads in ([0, 1, 2, 3], [2, 0, 3, 1]):  # what each looks up and carries: alone it ties nothing else
        probe = written(task, heads, heads)
        sample = task.sample(300, split)
        assert accuracy(probe, sample) == 1  # the maps do what they were written for
        found = compare(probe, task, split, 300)
        assert found.share == 1
        assert {tuple(pair) for pair in found.strongest.tolist()} == {tuple(p) for p in task.pairs(split).tolist()}

        attention_of(probe).compose.scale["pre_query"] = 0  # plain attention
        assert accuracy(probe, sample) < 0.75
        assert compare(probe, task, split, 300).share < 0.6


@BOTH
@SHARED
def test_maps_set_from_outside_are_right_or_guess(level: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(level, held_out=0.0, shared_values=shared)
    probe = written(task)
    sample = task.sample(900, "seen", draw=1)
    identity = torch.eye(FEATURES).expand(900, -1, -1)
    right = 0.01 * identity.clone()
    right[torch.arange(900), sample.looked_up, sample.reported] = 1
    for maps, share in (((right, identity), 1), ((identity, right), 1), ((identity, identity), None)):
        monkeypatch.setattr(ground_truth, "mean_maps", lambda *_, maps=maps: maps)
        found = compare(probe, task, "seen", 900)
        assert torch.equal(found.sample.ids, sample.ids)
        assert found.share == share if share else abs(found.share - found.chance) < 0.08
    wrong = torch.zeros(900, FEATURES, FEATURES)
    wrong[torch.arange(900), sample.reported, sample.looked_up] = 1  # looks a up and reports p
    monkeypatch.setattr(ground_truth, "mean_maps", lambda *_: (wrong, identity))
    assert compare(probe, task, "seen", 900).share <= (0.4 if level == "binding" else 0.01)


# --- against loops


def wild(kind: str, task: CrossComposition, **sizes: Any) -> ProbeForSequenceClassification:
    """A probe in float64 with every weight far from where it starts."""
    sizes = {"hidden_size": 11, "num_attention_heads": 3, "head_dim": 2} | sizes
    probe = ProbeForSequenceClassification(probe_config(task, kind, **sizes)).double().eval()
    generator = torch.Generator().manual_seed(3)
    for p in probe.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.6
    return probe


def input_of(probe: ProbeForSequenceClassification, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = attention_of(probe).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        probe(ids)
    hook.remove()
    return seen[0]


@BOTH
@pytest.mark.parametrize("kind", ["mha", "static", "gates", "query", "key", "low_rank", "pre", "post", "dcmha"])
def test_mean_maps_are_the_mean_over_pairs(kind: str, level: str) -> None:
    task = task_of(level)
    probe = wild(kind, task, first=level == "conflict")
    compose = attention_of(probe).compose
    x = input_of(probe, task.sample(3).ids)
    with torch.no_grad():
        pre, post = mean_maps(compose, x)
        for stage, found in (("pre", pre), ("post", post)):
            assert found.shape == (3, 3, 3)
            for b in range(3):
                sides = compose(x[b : b + 1])
                total = torch.zeros(3, 3, dtype=torch.float64)
                for j in range(RECORDS):
                    query, key = sides[f"{stage}_query"].at([RECORDS]), sides[f"{stage}_key"].at([j])
                    total += compose.dense(stage, query, key).reshape(3, 3)
                torch.testing.assert_close(found[b].double(), total / RECORDS, rtol=0, atol=1e-12)
    if kind in ("query", "dcmha"):
        assert (pre[0] - pre[1]).abs().max() > 0.01


def roles_in_loops(probe: ProbeForSequenceClassification, task: CrossComposition, sample: Sample) -> tuple[Any, Any]:
    heads, size = probe.config.num_attention_heads, probe.config.head_dim
    attention = attention_of(probe)
    wq, wk, wv, wo = (getattr(attention, f"{part}_proj").weight.detach().numpy() for part in "qkvo")
    head, scale = probe.head.weight.detach().numpy(), probe.norm.weight.detach().numpy()
    x = input_of(probe, sample.ids).numpy()
    looks_up: dict[tuple[int, int], list[float]] = {}
    carries: dict[tuple[int, int], list[float]] = {}
    for b in range(len(x)):
        records = sample.values[b].tolist()
        for h in range(heads):
            rows = slice(h * size, (h + 1) * size)
            scores = [(wq[rows] @ x[b, -1]) @ (wk[rows] @ x[b, j]) / size**0.5 for j in range(RECORDS)]
            for token in sample.ids[b, -1].tolist():  # what the query names
                feature, value = divmod(token - FEATURES * VALUES, VALUES)
                if 0 <= feature < FEATURES:
                    named = [record[feature] for record in records].index(value)
                    others = [score for j, score in enumerate(scores) if j != named]
                    looks_up.setdefault((h, feature), []).append(scores[named] - sum(others) / len(others))
            for j in range(RECORDS):
                out = wo[:, rows] @ (wv[rows] @ x[b, j])
                logits = head @ ((out - out.mean()) * scale)
                for feature in range(FEATURES):
                    start = 0 if task.shared_values else feature * VALUES
                    among = logits[start : start + VALUES]
                    carries.setdefault((h, feature), []).append(among[records[j][feature]] - among.mean())
    return tuple(
        np.array([[np.mean(found[h, f]) for f in range(FEATURES)] for h in range(heads)]) for found in (looks_up, carries)
    )  # type: ignore[return-value]


@BOTH
@SHARED
def test_roles_and_maps_are_those_of_a_plain_loop(level: str, shared: bool) -> None:
    task = task_of(level, shared_values=shared, seed=2)
    probe = wild("dcmha", task)
    heads = measured_heads(probe, task, 40)
    looks_up, carries = roles_in_loops(probe, task, task.sample(40, "seen", draw=2))
    np.testing.assert_allclose(heads.looks_up.numpy(), looks_up, atol=1e-11)
    np.testing.assert_allclose(heads.carries.numpy(), carries, atol=1e-11)
    assert np.ptp(looks_up) > 0.1
    assert np.ptp(carries) > 0.1

    found = compare(probe, task, "test", 40)
    sample = task.sample(40, "test", draw=1)
    assert torch.equal(found.sample.ids, sample.ids)
    assert found.task == task
    with torch.no_grad():
        pre, post = (part.numpy() for part in mean_maps(attention_of(probe).compose, input_of(probe, sample.ids)))
    for b in range(40):
        for p in range(FEATURES):
            composed = [sum(looks_up[m, p] * pre[b, m, n] for m in range(3)) for n in range(3)]
            paid = [exp(d) / (exp(d) + RECORDS - 1) - 1 / RECORDS for d in composed]
            for a in range(FEATURES):
                expected = sum(paid[n] * post[b, n, k] * carries[k, a] for n in range(3) for k in range(3))
                assert found.maps[b, p, a].item() == pytest.approx(expected, abs=1e-9)


@BOTH
def test_the_strongest_pair_the_share_and_the_mean(level: str) -> None:
    task = task_of(level)
    sample = task.sample(120, "seen", draw=4)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(120, FEATURES, FEATURES, generator=generator)
    maps += 5 * torch.eye(FEATURES)  # no query asks for what it looks up
    heads = LooksAndCarries(torch.zeros(2, FEATURES), torch.zeros(2, FEATURES))
    found = Truth(task, sample, maps, heads)
    right = 0
    for b in range(120):
        asked = (int(sample.looked_up[b]), int(sample.reported[b]))
        pairs = [(p, a) for p in range(FEATURES) for a in range(FEATURES) if p != a]
        if level == "binding":
            pairs = [(p, a) for p, a in pairs if p == asked[0]]
        best = max(pairs, key=lambda pair: maps[b][pair])
        assert tuple(found.strongest[b].tolist()) == best
        right += best == asked
    assert found.share == pytest.approx(right / 120)
    assert found.chance == pytest.approx(1 / (3 if level == "binding" else 12))
    assert abs(found.share - found.chance) < 0.15

    for p, a in task.trained_pairs.tolist():
        asked_for = [b for b in range(120) if (sample.looked_up[b], sample.reported[b]) == (p, a)]
        expected = sum(maps[b] for b in asked_for) / len(asked_for)
        torch.testing.assert_close(found.mean(p, a), expected)
    p, a = task.held_out_pairs[0].tolist()
    with pytest.raises(HeadlabError, match=f"no query looks {p} up and reports {a}: take another split"):
        found.mean(p, a)


# --- trained


def test_composed_heads_tie_unseen_pairs_and_plain_ones_do_not() -> None:
    task = CrossComposition(4, 5, 4, held_out=0.25, seed=2)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 5}
    recipe = Recipe(400, 48, lr=1e-2, weight_decay=0.1)
    plain, composed = train([Run(task, kind, sizes, recipe) for kind in ("mha", "dcmha")], n_test=500)
    for split in ("seen", "test"):
        assert compare(composed.probe, task, split).share > compare(plain.probe, task, split).share + 0.2


# --- bad input


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("dcmha", {"num_hidden_layers": 2}, "not those of 2 layers of dcmha attention"),
        ("mha", {"num_hidden_layers": 3}, "not those of 3 layers of mha attention"),
        ("compositional", {}, "not those of 1 layers of compositional attention"),
    ],
)
def test_what_has_no_map_to_read(kind: str, sizes: dict[str, int], message: str) -> None:
    task = task_of()
    probe = wild(kind, task, **sizes)
    for read in (compare, measured_heads):
        with pytest.raises(HeadlabError, match=message):
            read(probe, task)


def test_too_few_queries_to_measure_roles() -> None:
    task = task_of()
    with pytest.raises(HeadlabError, match=r"none of 1 queries looks feature \d up: take more"):
        measured_heads(wild("dcmha", task), task, 1)
    assert measured_heads(wild("dcmha", task_of("conflict")), task_of("conflict"), 1).looks_up.isfinite().all()
