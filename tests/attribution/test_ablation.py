"""Exact ablation against whole passes under a mask, one head at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp, ttest_rel
from torch import Tensor, nn

import headlab as hl
from headlab.models.access import head_rows
from tests.helpers import zoo
from tests.helpers.float64 import build64, loss64

FILLS: dict[str, dict[str, Any]] = {
    "mean": {}, "per position": {"per_position": True}, "resample": {"kind": "resample", "seed": 5},
}  # fmt: skip
FEW = [*zoo.MHA_GQA_MQA, "gpt2", "bert-mlm", "t5"]


def batches_of(name: str) -> list[dict[str, Tensor]]:
    """Different sizes and lengths."""
    second = zoo.batch_for(name, seed=1)
    cut = {"input_ids": 6, "attention_mask": 6, "labels": 4 if name == "t5" else 6}
    shorter = {key: value[:3, : cut[key]] if value.ndim == 2 else value[:3] for key, value in second.items()}
    return [zoo.batch_for(name), {key: value.contiguous() for key, value in shorter.items()}]


def measured(model: nn.Module, kind: str | None, batches: list[dict[str, Tensor]]) -> hl.Fill | None:
    return None if kind is None else hl.fill(model, batches, **FILLS[kind])


def one_at_a_time(
    model: nn.Module, batches: list[dict[str, Tensor]], fill: Any = None, keep_one: bool = False, *, loss: Any = None
) -> list[np.ndarray]:
    """Loss with a head (or all others of its layer) removed, minus loss as it was: [example, head] per row."""
    rows, loss = head_rows(model), loss or hl.own_loss
    with torch.no_grad():
        whole = torch.cat([loss(model, batch) for batch in batches])
    found = []
    for row in range(len(rows)):
        by_head = []
        for head in range(len(rows[row])):
            mask = [np.ones(len(r)) for r in rows]
            mask[row][:] = 0 if keep_one else 1
            mask[row][head] = 1 if keep_one else 0
            with torch.no_grad(), hl.masked(model, hl.HeadMask(mask), fill):
                less = torch.cat([loss(model, batch) for batch in batches])
            by_head.append((less.double() - whole.double()).numpy())
        found.append(np.array(by_head).T)
    return found


def agree(found: Any, changes: list[np.ndarray], atol: float = 1e-5) -> None:
    for one, other in zip(found, changes, strict=True):
        np.testing.assert_allclose(one, other.mean(0), rtol=0, atol=atol)
    assert max(abs(row).max() for row in changes) > 100 * atol


@pytest.mark.parametrize("name", zoo.WITH_LOSS)
@pytest.mark.parametrize("keep_one", [False, True])
def test_whole_passes_give_the_same(name: str, keep_one: bool) -> None:
    model, batches = zoo.build(name), batches_of(name)
    changes = one_at_a_time(model, batches, keep_one=keep_one)
    scores = hl.ablation(model, batches, keep_one=keep_one)
    agree(scores.columns["change"], changes)
    agree(scores.values, [-row if keep_one else row for row in changes])
    assert scores.heads == head_rows(model)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", list(FILLS))
def test_whole_passes_give_the_same_with_a_fill(name: str, kind: str) -> None:
    model, batches = zoo.build(name), batches_of(name)
    fill = measured(model, kind, batches)
    scores = hl.ablation(model, batches, fill=fill)
    agree(scores.values, one_at_a_time(model, batches, fill))
    assert scores.record["fill"]["method"] == fill.record["method"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"),
    [(n, a) for n in zoo.WITH_LOSS for a in ("eager", "sdpa") if (n, a) != ("gemma2", "sdpa")],  # it has no such thing
)
@pytest.mark.parametrize("kind", list(FILLS))
@pytest.mark.parametrize("keep_one", [False, True])
def test_whole_passes_give_the_same_everywhere(name: str, kind: str, keep_one: bool, attention: str) -> None:
    model, batches = zoo.build(name), batches_of(name)
    model.set_attn_implementation(attention)
    fill = measured(model, kind, batches)
    agree(
        hl.ablation(model, batches, fill=fill, keep_one=keep_one).columns["change"],
        one_at_a_time(model, batches, fill, keep_one),
    )


@pytest.mark.parametrize("name", FEW)
def test_to_ten_digits_in_float64(name: str) -> None:
    model, batches = build64(name), batches_of(name)
    agree(hl.ablation(model, batches, loss=loss64).values, one_at_a_time(model, batches, loss=loss64), atol=1e-12)


@pytest.mark.parametrize("name", FEW)
def test_how_many_heads_go_through_a_pass_does_not_matter(name: str) -> None:
    model, batches = zoo.build(name), batches_of(name)
    all_at_once = hl.ablation(model, batches, heads_per_pass=100)
    for heads in (1, 2):
        found = hl.ablation(model, batches, heads_per_pass=heads)
        np.testing.assert_allclose(found.flat, all_at_once.flat, rtol=0, atol=1e-6)


def test_blocks_below_a_layer_run_once() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    runs = [0] * zoo.LAYERS
    for layer, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, layer=layer: runs.__setitem__(layer, runs[layer] + 1))
    hl.ablation(model, [batch], heads_per_pass=2)
    passes = 6 // 2
    assert runs == [1 + passes, 1 + 2 * passes, 1 + 3 * passes]


def test_the_encoder_is_shared_by_the_decoders_heads() -> None:
    model, batch = zoo.build("t5"), zoo.batch_for("t5")
    runs, queries = {"encoder": 0, "decoder": 0}, []
    model.decoder.block[1].layer[0].SelfAttention.q.register_forward_hook(lambda *_: queries.append(1))
    for name in runs:
        feed_forward = getattr(model, name).block[0].layer[-1]
        feed_forward.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1))
    hl.ablation(model, [batch], heads_per_pass=5)
    assert runs == {"encoder": 1 + 1, "decoder": 1 + zoo.LAYERS + 2}  # its two attentions in block 0, none in block 1
    assert len(queries) == 1 + zoo.LAYERS + 2  # cross-attention is read after self-attention of its block, not with it


@pytest.mark.parametrize("name", FEW)
def test_a_loss_may_run_the_model_twice(name: str) -> None:
    model, batches = zoo.build(name), batches_of(name)

    def twice(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        backwards = batch | {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
        return hl.own_loss(m, batch) + m(**backwards).logits.abs().flatten(1).mean(1)

    agree(hl.ablation(model, batches, loss=twice).values, one_at_a_time(model, batches, loss=twice))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", [None, "resample"])
def test_heads_masked_around_the_call_stay_removed(name: str, kind: str | None) -> None:
    model, batches = zoo.build(name), batches_of(name)
    fill = measured(model, kind, batches)
    outer = hl.HeadMask([np.arange(len(row)) != i % 5 for i, row in enumerate(head_rows(model))])
    with hl.masked(model, outer, fill):
        changes, scores = one_at_a_time(model, batches, fill), hl.ablation(model, batches, fill=fill)
    agree(scores.values, changes)
    removed = [row[i % 5] for i, row in enumerate(scores.values)]
    np.testing.assert_allclose(removed, 0, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma3", "bert-mlm", "t5"])
def test_plain_equals_bridge(name: str) -> None:
    model, batches = zoo.build(name), batches_of(name)
    plain, bridged = hl.ablation(model, batches), hl.ablation(hl.bridge(model), batches)
    np.testing.assert_allclose(bridged.flat, plain.flat, rtol=0, atol=1e-5)


def test_pruned_models() -> None:
    model, batches = zoo.build("llama-gqa"), batches_of("llama-gqa")
    mask = hl.HeadMask([[1, 1, 1, 0, 0, 0], [0] * 6, [1, 0, 1, 1, 0, 1]], head_rows(model))
    small = hl.prune(model, mask)
    with hl.masked(model, mask):
        changes = one_at_a_time(model, batches)
    left = [row[:, keep == 1] for row, keep in zip(changes, mask.rows, strict=True)]
    scores = hl.ablation(small, batches)
    assert [str(head) for row in scores.heads for head in row] == [str(head) for head in mask.kept]
    np.testing.assert_allclose(scores.flat, np.concatenate([row.mean(0) for row in left]), atol=1e-5)


def test_standard_errors_and_p_values() -> None:
    model, batches = build64("llama-gqa"), batches_of("llama-gqa")
    changes = one_at_a_time(model, batches, loss=loss64)
    scores = hl.ablation(model, batches, loss=loss64)
    whole = torch.cat([loss64(model, batch) for batch in batches]).detach().numpy()
    for row, change in enumerate(changes):
        n = len(change)
        assert n == 7
        by_hand = np.sqrt(((change - change.mean(0)) ** 2).sum(0) / (n - 1)) / np.sqrt(n)
        np.testing.assert_allclose(scores.columns["se"][row], by_hand, rtol=1e-8)
        pairs = [ttest_rel(whole + change[:, head], whole).pvalue for head in range(change.shape[1])]
        np.testing.assert_allclose(scores.columns["p"][row], pairs, rtol=1e-6)
        np.testing.assert_allclose(scores.columns["p"][row], ttest_1samp(change, 0).pvalue, rtol=1e-6)
    frame = scores.to_frame()
    assert frame["significant"].tolist() == ["*" if p < 0.01 else "" for row in scores.columns["p"] for p in row]


def test_examples_that_all_change_alike() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    one = {key: value[:1] for key, value in batch.items()}
    scores = hl.ablation(model, [one, one, one])
    assert max(map(max, scores.columns["se"])) < 1e-9
    assert max(map(max, scores.columns["p"])) < 1e-9
    constant = hl.ablation(model, [batch], loss=lambda m, b: 0 * hl.own_loss(m, b) + 3)
    assert set(constant.flat) == {0.0}
    assert {p for row in constant.columns["p"] for p in row} == {1.0}


def test_a_single_example_has_no_statistics() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    scores = hl.ablation(model, [{key: value[:1] for key, value in batch.items()}])
    assert list(scores.columns) == ["change"]
    assert "significant" not in scores.to_frame()


@pytest.mark.parametrize("keep_one", [False, True])
def test_order_by_size(keep_one: bool) -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    value, size = (hl.ablation(model, [batch], keep_one=keep_one, order=order) for order in ("value", "size"))
    assert value.flat.min() < 0 < value.flat.max()
    assert size.flat.tolist() == (-abs(value.flat) if keep_one else abs(value.flat)).tolist()
    assert size.columns["change"][0].tolist() == value.columns["change"][0].tolist()


class _Killed:
    """The model's own loss, until the call at which the run is killed."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return hl.own_loss(model, batch)


@pytest.mark.parametrize("name", ["llama-gqa", "t5"])
def test_a_killed_run_goes_on(name: str, tmp_path: Path) -> None:
    model, batches = zoo.build(name), batches_of(name)
    whole = hl.ablation(model, batches, loss=_Killed(10**6), log=tmp_path / "whole", heads_per_pass=3)
    log = tmp_path / "log"
    for at in (0, 1, 4, 11):
        with pytest.raises(KeyboardInterrupt):
            hl.ablation(model, batches, loss=_Killed(at), log=log, heads_per_pass=3)
        assert not any("forward" in vars(module) for module in model.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    resumed = hl.ablation(model, batches, loss=_Killed(10**6), log=log, heads_per_pass=3)
    assert resumed.flat.tolist() == whole.flat.tolist()
    assert log.read_bytes() == (tmp_path / "whole").read_bytes()
    again = hl.ablation(model, batches, loss=_Killed(0), log=log)  # nothing is left to do
    assert again.flat.tolist() == whole.flat.tolist()


def test_a_log_may_be_cut_anywhere(tmp_path: Path) -> None:
    model, batches = zoo.build("llama-gqa"), batches_of("llama-gqa")
    log = tmp_path / "log"
    whole = hl.ablation(model, batches, log=log)
    data = log.read_bytes()
    lines = [len(b"".join(data.splitlines(keepends=True)[:i])) for i in range(1, 8)]
    assert len(data.splitlines()) == 1 + zoo.LAYERS * len(batches)
    for cut in (0, 10, lines[0], lines[1], lines[1] + 1, lines[3] - 1, lines[3] + 30, len(data) - 1):
        log.write_bytes(data[:cut])
        assert hl.ablation(model, batches, log=log).flat.tolist() == whole.flat.tolist()
        assert log.read_bytes() == data


def test_another_computations_log_is_an_error(tmp_path: Path) -> None:
    model, batches = zoo.build("llama-gqa"), batches_of("llama-gqa")
    log = tmp_path / "log"
    hl.ablation(model, batches[:1], log=log)
    data = log.read_bytes()
    fill = hl.fill(model, batches)
    for differs, call in {
        "keep_one": {"keep_one": True}, "fill": {"fill": fill}, "loss": {"loss": loss64}, "data": {},
    }.items():  # fmt: skip
        with pytest.raises(hl.HeadlabError, match=f"another computation.*{differs}"):
            hl.ablation(model, batches if differs == "data" else batches[:1], log=log, **call)
    with pytest.raises(hl.HeadlabError, match=r"another computation.*model"):
        hl.ablation(zoo.build("llama-gqa", seed=1), batches[:1], log=log)
    assert log.read_bytes() == data
    assert json.loads(data.splitlines()[0])["method"] == "ablation"


def test_broken_losses() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    with pytest.raises(hl.HeadlabError, match="batch 1 is NaN"):
        hl.ablation(model, [batch, zoo.batch_for("llama-gqa", seed=1)], loss=_Diverges())
    with pytest.raises(hl.HeadlabError, match="one number per example"):
        hl.ablation(model, [batch], loss=lambda m, b: hl.own_loss(m, b).mean())
    with pytest.raises(hl.HeadlabError, match="order is"):
        hl.ablation(model, [batch], order="magnitude")


class _Diverges(_Killed):
    def __init__(self) -> None:
        super().__init__(10**6)
        self.first: int | None = None

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.first = self.first or int(batch["input_ids"][0, 0])
        return super().__call__(model, batch) / (int(batch["input_ids"][0, 0]) == self.first)


def test_a_model_whose_first_layer_is_empty_has_statistics_too() -> None:
    model = zoo.build("llama-gqa")
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), [f"L0H{i}" for i in range(6)]))
    scores = hl.ablation(small, [zoo.batch_for("llama-gqa")])
    assert [len(row) for row in scores.columns["p"]] == [0, 6, 6]
    alone = {name: value[:1] for name, value in zoo.batch_for("llama-gqa").items()}
    assert "p" not in hl.ablation(small, [alone]).columns


def test_a_fill_of_another_model_is_refused() -> None:
    fill = hl.fill(zoo.build("llama-gqa", seed=1), [zoo.batch_for("llama-gqa")])
    with pytest.raises(hl.HeadlabError, match="measured on another model"):
        hl.ablation(zoo.build("llama-gqa"), [zoo.batch_for("llama-gqa")], fill=fill)


def test_a_loss_that_is_not_finite_names_the_batch_and_the_first_head() -> None:
    model = zoo.build("llama-mha")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[20:30] = torch.inf  # of head 2
    with pytest.raises(hl.HeadlabError, match="loss of batch 0 is NaN or infinite; head L1H2 was the first"):
        hl.ablation(model, [zoo.batch_for("llama-mha")])
