"""The probes against the same models written as plain loops in float64, and headlab's tools on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import erf, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import headlab as hl
from headlab.dcmha import BRANCHES
from headlab.errors import HeadlabError
from synthetic_tasks import CrossComposition
from synthetic_tasks.probes.models import COMPOSITIONAL, KINDS, ProbeConfig, ProbeForSequenceClassification, probe_config
from tests.helpers import dcmha_loop

SIZES = {"hidden_size": 11, "num_attention_heads": 3, "head_dim": 2}
LEVELS = ("binding", "conflict")
COMPOSED = [kind for kind in KINDS if kind != COMPOSITIONAL]


def task_of(level: str = "conflict", **options: Any) -> CrossComposition:
    return CrossComposition(5, 7, 4, level, **options)


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def build(kind: str, level: str = "conflict", seed: int = 0, **sizes: Any) -> ProbeForSequenceClassification:
    """A probe in float64 whose every weight is far from where it starts, the maps' and the norms' too."""
    with float64():
        probe = ProbeForSequenceClassification(probe_config(task_of(level), kind, **SIZES | sizes)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in probe.named_parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.6 if "compose" in name else 0.5)
    return probe


def ids_of(level: str = "conflict", n: int = 3) -> Tensor:
    return task_of(level).sample(n).ids


# --- the same, written again


class Loop:
    """A probe on one sequence, one number after the other."""

    def __init__(self, probe: ProbeForSequenceClassification) -> None:
        self.config, self.w = probe.config, {name: x.numpy() for name, x in probe.state_dict().items()}

    def logits(self, bags: list[list[int]]) -> np.ndarray:
        config = self.config
        stream = [self.embedded(bag, query=i == len(bags) - 1) for i, bag in enumerate(bags)]
        if config.first:
            stream[-1] = stream[-1] + self.mlp("first.", stream[-1])
        for layer in range(config.num_hidden_layers):
            path = f"layers.{layer}."
            normed = [self.norm(f"{path}norm.", x) for x in stream]
            attend = self.searched if config.kind == COMPOSITIONAL else self.attended
            stream = [x + out for x, out in zip(stream, attend(f"{path}self_attn.", normed), strict=True)]
            if config.mlp:
                stream = [x + self.mlp(f"{path}mlp.", x) for x in stream]
        return self.w["head.weight"] @ self.norm("norm.", stream[-1]) + self.w["head.bias"]

    def embedded(self, bag: list[int], query: bool) -> np.ndarray:
        """Tokens of records / sqrt(features); of queries, the named values / sqrt(how many), the others as they are."""
        config, out = self.config, np.zeros(self.config.hidden_size)
        for token in bag:
            if token == config.n_tokens - 1:
                continue
            scale = 1.0
            if token < config.record_tokens:
                scale = 1 / sqrt(config.n_features)
            elif query and token < 2 * config.record_tokens:
                scale = 1 / sqrt(sum(config.record_tokens <= other < 2 * config.record_tokens for other in bag))
            out = out + scale * self.w["embed.weight"][token]
        return out

    def norm(self, path: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean()
        return x / sqrt((x * x).mean() + 1e-5) * self.w[f"{path}weight"] + self.w[f"{path}bias"]

    def mlp(self, path: str, x: np.ndarray) -> np.ndarray:
        up = self.w[f"{path}up_proj.weight"] @ self.norm(f"{path}norm.", x)
        return self.w[f"{path}down_proj.weight"] @ np.array([u * (1 + erf(u / sqrt(2))) / 2 for u in up])

    def heads(self, path: str, x: np.ndarray) -> list[np.ndarray]:
        size = self.config.head_dim
        out = self.w[path] @ x
        return [out[h * size : (h + 1) * size] for h in range(self.config.num_attention_heads)]

    def attended(self, path: str, xs: list[np.ndarray]) -> list[np.ndarray]:
        n_heads, scale = self.config.num_attention_heads, self.config.head_dim**-0.5
        q, k, v = ([self.heads(f"{path}{part}_proj.weight", x) for x in xs] for part in "qkv")
        pre, post = self.maps(path, xs)
        out = []
        for i in range(len(xs)):
            seen = range(i + 1)
            scores = [np.array([q[i][h] @ k[j][h] for h in range(n_heads)]) * scale @ pre[i][j] for j in seen]
            patterns = [softmax([scores[j][h] for j in seen]) for h in range(n_heads)]
            mixed = [np.array([patterns[h][j] for h in range(n_heads)]) @ post[i][j] for j in seen]
            z = [sum(mixed[j][h] * v[j][h] for j in seen) for h in range(n_heads)]
            out.append(self.w[f"{path}o_proj.weight"] @ np.concatenate(z))
        return out

    def maps(self, path: str, xs: list[np.ndarray]) -> list[list[list[np.ndarray]]]:
        n_heads, kind = self.config.num_attention_heads, self.config.kind
        if kind == "mha":
            return [[[np.eye(n_heads)] * len(xs)] * len(xs)] * 2
        path += "compose."
        weights = {name.removeprefix(path): x for name, x in self.w.items() if name.startswith(path)}
        places = frozenset(
            f"{stage}_{branch}"
            for stage in STAGES_OF.get(kind, ("pre", "post"))
            for branch in BRANCHES_OF.get(kind, BRANCHES)
        )
        maps = dcmha_loop.Maps(weights, n_heads, places, self.config.rank)
        return [maps.whole(stage, xs, xs) for stage in ("pre", "post")]

    def searched(self, path: str, xs: list[np.ndarray]) -> list[np.ndarray]:
        n_heads, scale = self.config.num_attention_heads, self.config.head_dim**-0.5
        q, k, v = ([self.heads(f"{path}{part}_proj.weight", x) for x in xs] for part in "qkv")
        wish = [self.heads(f"{path}choice_q.weight", x) for x in xs]
        out = []
        for i in range(len(xs)):
            chosen = []
            for s in range(n_heads):
                pattern = softmax([q[i][s] @ k[j][s] * scale for j in range(i + 1)])
                found = [sum(pattern[j] * v[j][r] for j in range(i + 1)) for r in range(n_heads)]
                fit = softmax([wish[i][s] @ (self.w[f"{path}choice_k.weight"] @ f) * scale for f in found])
                chosen.append(sum(fit[r] * found[r] for r in range(n_heads)))
            out.append(self.w[f"{path}o_proj.weight"] @ np.concatenate(chosen))
        return out


BRANCHES_OF = {
    "static": ("base",),
    "gates": ("query_gate", "key_gate"),
    "query": ("query", "query_gate"),
    "key": ("key", "key_gate"),
    "low_rank": ("query", "key"),
    "dynamic": ("query", "query_gate", "key", "key_gate"),
}
STAGES_OF = {"pre": ("pre",), "post": ("post",)}


def softmax(scores: list[float]) -> np.ndarray:
    e = np.exp(np.array(scores) - max(scores))
    return e / e.sum()


def logits(probe: ProbeForSequenceClassification, ids: Tensor, last: bool = False) -> np.ndarray:
    with torch.no_grad():
        return probe(ids, last=last).logits.numpy()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_computes_what_the_loop_does_and_so_does_its_last_query_alone(kind, level):
    ids = ids_of(level, n=2)
    for sizes in ({}, {"num_hidden_layers": 2, "mlp": True, "first": True, "rank": 1}):
        probe = build(kind, level, **sizes)
        expected = np.array([Loop(probe).logits(bags) for bags in ids.tolist()])
        assert np.ptp(expected, 1).min() > 0.1
        assert np.abs(logits(probe, ids) - expected).max() < 1e-11
        assert np.abs(logits(probe, ids, last=True) - expected).max() < 1e-11


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    level=st.sampled_from(LEVELS),
    layers=st.integers(1, 3),
    mlp=st.booleans(),
    first=st.booleans(),
    rank=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_the_last_query_alone_gives_the_same(kind, level, layers, mlp, first, rank, seed):
    probe = build(kind, level, seed, num_hidden_layers=layers, mlp=mlp, first=first, rank=rank)
    ids = task_of(level, seed=seed).sample(3).ids
    assert np.abs(logits(probe, ids) - logits(probe, ids, last=True)).max() < 1e-11


@pytest.mark.parametrize("level", LEVELS)
def test_bags_are_sums_of_embeddings(level):
    probe, ids = build("mha", level), ids_of(level, n=6)
    with torch.no_grad():
        found = probe.embedded(ids).numpy()
    loop = Loop(probe)
    expected = [[loop.embedded(bag, i == 4) for i, bag in enumerate(bags)] for bags in ids.tolist()]
    assert found.shape == (6, 5, 11)
    assert np.abs(found - expected).max() < 1e-12


def test_the_embedding_of_padding_never_counts_and_has_no_gradient():
    probe, ids = build("dcmha", "binding"), ids_of("binding")
    before = logits(probe, ids)
    probe.zero_grad()
    probe(ids).logits.sum().backward()
    assert probe.embed.weight.grad[-1].abs().max() == 0
    assert probe.embed.weight.grad[ids[0, 0, 0]].abs().max() > 0
    probe.embed.weight.data[-1] = 1e6
    assert np.array_equal(before, logits(probe, ids))


@pytest.mark.parametrize("kind", ["mha", "static", "dcmha", COMPOSITIONAL])
def test_records_have_no_order_and_a_query_does_not_see_another_sequence(kind):
    probe, ids = build(kind, mlp=True, first=True), ids_of(n=5)  # of one layer: the second would be told an order
    expected = logits(probe, ids)
    order = torch.tensor([2, 0, 3, 1, 4])
    assert np.abs(logits(probe, ids[:, order]) - expected).max() < 1e-11
    assert np.abs(logits(probe, ids[order]) - expected[order]).max() < 1e-11
    slots = torch.cat([ids[..., :5].flip(-1), ids[..., 5:]], -1)  # nor have the tokens in a bag
    assert np.abs(logits(probe, slots) - expected).max() < 1e-11
    other = ids.clone()
    other[:, 1] = other[:, 0]
    assert np.abs(logits(probe, other) - expected).min(0).max() > 1e-3


@pytest.mark.parametrize("last", [False, True])
def test_the_loss(last):
    probe, sample = build("dcmha"), task_of().sample(5)
    out = probe(input_ids=sample.ids, labels=sample.answer, last=last)
    rows = out.logits.detach().numpy()
    expected = [np.log(np.exp(row).sum()) - row[answer] for row, answer in zip(rows, sample.answer.tolist(), strict=True)]
    assert abs(out.loss.item() - np.mean(expected)) < 1e-12
    assert probe(sample.ids).loss is None


# --- sizes


def count(probe: torch.nn.Module) -> int:
    return sum(p.numel() for p in probe.parameters())


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        # embeddings 273 x 128, four projections 128 x 128, two norms, answers 128 x 128 + 128
        ("mha", 34944 + 65536 + 512 + 16512),
        ("static", 117504 + 2 * 8 * 8),
        ("gates", 117504 + 4 * 8 * 128),
        # hidden 32; to 32 of the layer, from there 2 x 2 vectors over 8 heads; for two stages; and their gates
        ("query", 117504 + 2 * (128 * 32 + 32 * 4 * 8) + 2 * 8 * 128),
        ("key", 129792),
        ("low_rank", 117504 + 4 * (128 * 32 + 32 * 4 * 8)),
        ("pre", 117504 + (142208 - 117504) // 2),
        ("post", 117504 + (142208 - 117504) // 2),
        ("dynamic", 142080),
        ("dcmha", 142208),
        (COMPOSITIONAL, 117504 + 128 * 128 + 16 * 16),
    ],
)
@pytest.mark.parametrize("level", LEVELS)
def test_parameters_at_the_size_of_the_study(kind, parameters, level):
    probe = ProbeForSequenceClassification(probe_config(CrossComposition(level=level), kind))
    assert count(probe) == parameters


def test_parameters_of_more():
    task = CrossComposition(level="conflict", shared_values=True)
    assert count(ProbeForSequenceClassification(probe_config(task, "mha"))) == 117504 - 112 * 129  # 16 answers, not 128
    mlp = 2 * 128 + 2 * 128 * 512
    for sizes, more in (
        ({"mlp": True}, mlp),
        ({"first": True}, mlp),
        ({"num_attention_heads": 64}, 4 * 128 * 56 * 16),
        ({"num_hidden_layers": 2}, 65536 + 256),
    ):
        probe = ProbeForSequenceClassification(probe_config(CrossComposition(level="conflict"), "mha", **sizes))
        assert count(probe) == 117504 + more
    names = set(KINDS)
    assert names == {*BRANCHES_OF, *STAGES_OF, "mha", "dcmha", COMPOSITIONAL}


def test_fresh_weights():
    torch.manual_seed(7)
    probe = ProbeForSequenceClassification(probe_config(CrossComposition(), "dcmha", mlp=True, num_hidden_layers=2))
    for name, p in probe.named_parameters():
        if "norm" in name or name == "head.bias":
            assert torch.equal(p.data, torch.full_like(p, float(name.endswith("norm.weight"))))
            continue
        spread = {"embed.weight": 1.0}.get(name, p.shape[-1] ** -0.5)
        if "compose" in name:
            module = probe.get_submodule(name.removesuffix(".weight"))
            spread = module.std
            assert spread < 0.15
        assert p.std().item() == pytest.approx(spread, rel=0.15), name


# --- as a Hugging Face model


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_is_saved_and_opened(kind, tmp_path):
    probe = build(kind, num_hidden_layers=2, mlp=True, first=True, rank=1).float()
    ids = ids_of()
    probe.save_pretrained(tmp_path / "probe")
    folder = tmp_path / "probe"
    for opened in (
        ProbeForSequenceClassification.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
        hl.load(folder),
    ):
        assert type(opened) is ProbeForSequenceClassification
        assert opened.config.kind == kind
        assert np.array_equal(logits(opened.eval(), ids), logits(probe, ids))
        assert torch.equal(opened.weights, probe.weights)
        assert np.allclose(logits(opened, ids, last=True), logits(probe, ids), atol=1e-5)


@pytest.mark.parametrize("sizes", [{"record_tokens": 35, "n_features": 5, "query_tokens": 5}, {"kind": "mha", "rank": 3}])
def test_a_config_says_what_it_was_given(sizes):
    config = ProbeConfig(**sizes)
    again = ProbeConfig.from_dict(config.to_dict())
    assert {name: getattr(again, name) for name in sizes} == sizes
    assert again.num_labels == again.n_classes == 128


def test_the_config_of_a_task():
    config = probe_config(task_of(), "gates", hidden_size=13)
    assert (config.n_tokens, config.n_classes, config.record_tokens) == (81, 35, 35)
    assert (config.n_features, config.query_tokens, config.hidden_size, config.kind) == (5, 5, 13, "gates")
    assert probe_config(task_of("binding", shared_values=True), "mha").n_classes == 7
    assert probe_config(task_of("binding"), "mha").query_tokens == 1


def test_bad_configs():
    with pytest.raises(HeadlabError, match="no attention is called 'moe'; the kinds are mha, static, gates"):
        ProbeConfig("moe")
    with pytest.raises(HeadlabError, match="make the task with layout='bag'"):
        probe_config(task_of(layout="tokens"), "mha")
    with pytest.raises(HeadlabError, match=r"the rank is from 1 to the number of heads in a group \(3\), not 4"):
        ProbeForSequenceClassification(probe_config(task_of(), "dcmha", **SIZES, rank=4))


# --- headlab's tools


def batches_of(n: int = 4, parts: int = 2) -> list[dict[str, Tensor]]:
    samples = [task_of().sample(n, draw=i) for i in range(parts)]
    return [{"input_ids": sample.ids, "labels": sample.answer} for sample in samples]


@pytest.mark.parametrize("kind", COMPOSED)
def test_heads(kind):
    probe = build(kind, num_hidden_layers=2)
    assert [str(head) for head in hl.heads(probe)] == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]


def test_compositional_attention_has_no_heads_of_its_own():
    with pytest.raises(HeadlabError, match=r"layers\.0\.self_attn \(CompositionalAttention\)"):
        hl.heads(build(COMPOSITIONAL))


@pytest.mark.parametrize("kind", ["mha", "dcmha"])
def test_importance_is_the_slope_of_the_loss(kind):
    probe, batches = build(kind, num_hidden_layers=2), batches_of()
    scores = hl.importance(probe, batches)
    step = 1e-5
    for row in range(2):
        for head in range(3):
            slopes = []
            for batch in batches:
                losses = []
                for sign in (1, -1):
                    gates = [torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
                    gates[row][head] += sign * step
                    with torch.no_grad(), hl.masked(probe, gates):
                        out = probe(batch["input_ids"]).logits
                    losses.append(torch.nn.functional.cross_entropy(out, batch["labels"], reduction="none"))
                slopes += ((losses[0] - losses[1]) / (2 * step)).abs().tolist()
            assert scores.rows[row][head] == pytest.approx(np.mean(slopes), rel=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_a_masked_head_of_plain_attention_has_no_column_in_the_output(last):
    probe, ids = build("mha", num_hidden_layers=2), ids_of()
    with hl.masked(probe, hl.HeadMask.without(hl.heads(probe), ["L0H1", "L1H0"])):
        found = logits(probe, ids, last)
    probe.layers[0].self_attn.o_proj.weight.data[:, 2:4] = 0
    probe.layers[1].self_attn.o_proj.weight.data[:, 0:2] = 0
    assert np.abs(found - logits(probe, ids)).max() < 1e-11


SITES = ["output", "head", "scores", "probabilities", "pre_base", "pre_query", "post_key", "pre_key_gate", "post_query_gate"]


@pytest.mark.parametrize(("kind", "site"), [("mha", "output"), *(("dcmha", site) for site in SITES)])
def test_pruned_is_masked_and_opens_again(kind, site, tmp_path):
    probe, ids = build(kind, num_hidden_layers=2, mlp=True).float(), ids_of(n=5)
    mask = hl.HeadMask.without(hl.heads(probe, site), ["L0H1", "L1H0", "L1H2"])
    before = logits(probe, ids)
    with hl.masked(probe, mask, site=site):
        expected = [logits(probe, ids), logits(probe, ids, last=True)]
    assert np.abs(expected[0] - before).max() > 1e-2
    assert np.array_equal(logits(probe, ids), before)
    small = hl.prune(probe, mask, site=site)
    if site in SITES[:4] and site != "probabilities":
        assert count(small) < count(probe)
    hl.save_pruned(small, tmp_path / "small")
    for model in (small, hl.load(tmp_path / "small")):
        for last in (False, True):
            found = logits(model, ids, last)
            assert all(np.abs(found - other).max() < 1e-5 * np.abs(before).max() for other in expected)
    if site == "output":
        assert hl.kept(small)["heads"].tolist() == [2, 1]
        assert [str(head) for head in hl.heads(small)] == ["L0H0", "L0H2", "L1H1"]


def test_importance_then_prune():
    probe, batches = build("dcmha", num_hidden_layers=2), batches_of()
    for site in ("output", "head", "pre_query"):
        scores = hl.importance(probe, batches, site=site)
        assert all(np.isfinite(row).all() and (row > 0).all() for row in scores.rows)
        mask = scores.keep(0.5)
        small = hl.prune(probe, mask, site=site)
        with hl.masked(probe, mask, site=site):
            assert np.abs(logits(small, batches[0]["input_ids"]) - logits(probe, batches[0]["input_ids"])).max() < 1e-10


def test_composition_maps_of_a_probe():
    """The maps that are read out are the ones of the loop."""
    probe, ids = build("dcmha"), ids_of(n=1)
    maps = hl.composition_maps(probe, ids)
    loop = Loop(probe)
    stream = [loop.embedded(bag, i == 4) for i, bag in enumerate(ids[0].tolist())]
    normed = [loop.norm("layers.0.norm.", x) for x in stream]
    pre, post = loop.maps("layers.0.self_attn.", normed)
    for stage, expected in (("pre", pre), ("post", post)):
        found = np.asarray(maps.dense(0, stage, 4, 2))
        assert np.abs(found.reshape(3, 3) - expected[4][2]).max() < 1e-5
