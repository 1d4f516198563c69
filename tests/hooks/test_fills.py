"""Fills: what stands in for removed heads, against averages taken in float64 with plain hooks and loops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import headlab as hl
from headlab.models.access import fingerprint, head_rows
from tests.helpers import zoo
from tests.hooks.test_masking import GENERATING, GREEDY, logits, random_gates

Edit = Callable[[Tensor], Tensor | None]


def data_for(name: str) -> list[dict[str, Tensor]]:
    """Two batches of different sizes and paddings."""
    small = {key: value[:3] for key, value in zoo.batch_for(name, seed=5, padded=False).items()}
    return [zoo.batch_for(name), small]


def at_site(model: nn.Module, site: str, edit: Edit, stack: ExitStack) -> None:
    """Edit what enters an output projection, [batch, pos, head, d_head], by a hook of torch alone."""
    d_head = next(head.d_head for head in hl.heads(model) if head.site == site)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        edited = edit(args[0].detach().unflatten(-1, (-1, d_head)))
        return None if edited is None else (edited.flatten(2), *args[1:])

    stack.callback(model.get_submodule(site).register_forward_pre_hook(hook).remove)


def examples(model: nn.Module, data: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    """For every row, for every example, its outputs at real tokens, [pos, head, d_head] in float64."""
    rows = head_rows(model)
    found: list[list[Tensor]] = [[] for _ in rows]
    for batch in data:
        seen: dict[int, Tensor] = {}
        with ExitStack() as hooks, torch.no_grad():
            for number, row in enumerate(rows):
                at_site(model, row[0].site, lambda z, seen=seen, number=number: seen.update({number: z}), hooks)
            model(**{key: value for key, value in batch.items() if key != "labels" or model.config.is_encoder_decoder})
        for number, row in enumerate(rows):
            encoder = row[0].stack in ("", "enc")
            real = batch["attention_mask"].bool() if encoder else batch["labels"] != -100
            found[number].extend(z[keep].double() for z, keep in zip(seen[number], real, strict=True))
    return found


@pytest.mark.parametrize("name", zoo.ALL)
def test_means_are_over_real_tokens(name: str) -> None:
    model, data = zoo.build(name), data_for(name)
    fill = hl.fill(model, data)
    assert fill.how == "mean"
    assert fill.constant
    for ours, theirs in zip(fill.values, examples(model, data), strict=True):
        assert torch.allclose(ours.double(), torch.cat(theirs).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", zoo.ALL)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_means_per_position_count_positions_from_the_first_real_token(name: str, left: bool) -> None:
    model, data = zoo.build(name), data_for(name)
    if left:
        data = [{k: v.flip(-1) if k in ("input_ids", "attention_mask") else v for k, v in batch.items()} for batch in data]
        data = [{k: v for k, v in batch.items() if k != "labels" or name in ("t5", "bert-classifier")} for batch in data]
    fill = hl.fill(model, data, per_position=True)
    assert fill.how == "mean per position"
    assert not fill.constant
    for ours, theirs in zip(fill.values, examples(model, data), strict=True):
        assert len(ours) == max(map(len, theirs))
        for position, mean in enumerate(ours):
            here = [example[position] for example in theirs if len(example) > position]
            assert torch.allclose(mean.double(), torch.stack(here).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", zoo.ALL)
@pytest.mark.parametrize("per_position", [False, True])
def test_a_removed_head_puts_out_its_mean(name: str, per_position: bool) -> None:
    model = zoo.build(name)
    gates, fill = random_gates(model, 1, 0, 0.75), hl.fill(model, data_for(name), per_position=per_position)
    with ExitStack() as hooks:
        for row, row_gates, values in zip(head_rows(model), gates, fill.values, strict=True):

            def edit(z: Tensor, row_gates: Any = row_gates, values: Tensor = values) -> Tensor:
                z = z.clone()
                for head, gate in enumerate(row_gates):
                    for position in range(z.shape[1]):
                        stand_in = values[position, head] if per_position else values[head]
                        z[:, position, head] = gate * z[:, position, head] + (1 - gate) * stand_in
                return z

            at_site(model, row[0].site, edit, hooks)
        expected = logits(model, name)
    with hl.masked(model, gates, fill):
        ours = logits(model, name)
    batch = zoo.batch_for(name)
    if ours.ndim == 3 and name != "t5":  # padding is anywhere, and nobody's
        ours, expected = ours[batch["attention_mask"].bool()], expected[batch["attention_mask"].bool()]
    assert torch.allclose(ours, expected, atol=1e-5)
    with hl.masked(model, gates):
        assert not torch.allclose(logits(model, name)[0], expected[0], atol=1e-3)


def stand_ins(model: nn.Module, row: int, fill: hl.Fill, *batches: dict[str, Tensor]) -> list[Tensor]:
    """What each example gets instead of a whole row of heads, at its real tokens."""
    heads, seen = head_rows(model)[row], []
    mask = hl.HeadMask.without(hl.heads(model), heads)
    with hl.masked(model, mask, fill), ExitStack() as hooks, torch.no_grad():
        at_site(model, heads[0].site, lambda z: seen.extend(z), hooks)
        for batch in batches:
            model(**batch)
    if heads[0].stack in ("dec", "cross"):
        return seen
    real = [keep.bool() for batch in batches for keep in batch["attention_mask"]]
    return [z[keep] for z, keep in zip(seen, real, strict=True)]


def source(stand_in: Tensor, outputs: list[Tensor]) -> int:
    """Which example's output a stand-in is, starting over where that is shorter."""
    found = []
    for i, output in enumerate(outputs):
        repeated = torch.stack([output[position % len(output)] for position in range(len(stand_in))])
        found += [i] if torch.allclose(stand_in.double(), repeated, atol=1e-6) else []
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", ["gpt2", *zoo.MHA_GQA_MQA, "gemma3", "bert-classifier", "t5"])
def test_resampling_draws_another_example_the_same_one_every_time(name: str) -> None:
    model = zoo.build(name)
    data = [{key: value for key, value in batch.items() if key != "labels"} for batch in data_for(name)]
    if name == "t5":
        data = [batch | {"decoder_input_ids": torch.randint(3, 99, (len(batch["input_ids"]), 5))} for batch in data]
    measured = examples(model, [batch | {"labels": batch.get("decoder_input_ids")} for batch in data])
    drawn = set()
    for seed in range(3):
        fill = hl.fill(model, data, "resample", seed=seed)
        assert not fill.constant
        for row, outputs in enumerate(measured):
            first = [source(z, outputs) for z in stand_ins(model, row, fill, data[0])]
            assert all(i != own for own, i in enumerate(first))
            again = {key: value.flip(0)[:2] for key, value in data[0].items()}
            assert [source(z, outputs) for z in stand_ins(model, row, fill, again)] == first[::-1][:2]
            both = [source(z, outputs) for z in stand_ins(model, row, fill, {k: v[:3] for k, v in data[0].items()}, data[1])]
            second = both[3:]
            assert both[:3] == first[:3]
            assert all(i != own for own, i in enumerate(second, len(first)))
            drawn.add((row, *first, *second))
    assert len({draws[1:] for draws in drawn}) > 1


def test_resampling_takes_a_repeated_example_for_one() -> None:
    model = zoo.build("llama-gqa")
    batch = {key: value[[0, 0, 1]] for key, value in zoo.batch_for("llama-gqa").items()}
    fill = hl.fill(model, [batch, batch], "resample")
    outputs = examples(model, [batch])[1]
    assert [len(values) for values in fill.values] == [2] * zoo.LAYERS
    assert [source(z, outputs[1:]) for z in stand_ins(model, 1, fill, batch)] == [1, 1, 0]
    with pytest.raises(hl.HeadlabError, match="fewer than two different examples"):
        hl.fill(model, [{key: value[:2] for key, value in batch.items()}], "resample")


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bert-mlm", "t5"])
@pytest.mark.parametrize("options", [{}, {"per_position": True}, {"kind": "resample", "seed": 3}], ids=str)
def test_a_bridge_measures_and_fills_the_same(name: str, options: dict[str, Any]) -> None:
    model = zoo.build(name)
    bridge, gates = hl.bridge(model), random_gates(model, 2)
    plain, bridged = (hl.fill(which, data_for(name), **options) for which in (model, bridge))
    for a, b in zip(plain.values, bridged.values, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with hl.masked(model, gates, bridged), hl.masked(bridge, gates, plain):
        assert torch.allclose(logits(bridge, name), logits(model, name), atol=1e-5)


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("per_position", [False, True])
def test_fills_hold_in_generation_with_left_padding(name: str, per_position: bool) -> None:
    model = zoo.build(name)
    long = {"input_ids": torch.randint(3, 99, (5, 13))} | ({"labels": torch.randint(3, 99, (5, 13))} if name == "t5" else {})
    gates, fill = random_gates(model, 3), hl.fill(model, [long], per_position=per_position)
    batch = {key: value.flip(-1) for key, value in zoo.batch_for("llama-gqa").items()}
    with hl.masked(model, gates, fill):
        cached = model.generate(**batch, **GREEDY)
        uncached = model.generate(**batch, **GREEDY, use_cache=False)
        alone = [model.generate(batch["input_ids"][i : i + 1, start:], **GREEDY) for i, start in ((1, 2), (2, 3))]
    assert torch.equal(cached, uncached)
    new = GREEDY["max_new_tokens"]
    assert [row[0, -new:].tolist() for row in alone] == cached[1:3, -new:].tolist()
    with hl.masked(model, gates):
        assert not torch.equal(cached, model.generate(**batch, **GREEDY))


def test_the_input_may_not_be_longer_than_a_fill_per_position() -> None:
    model = zoo.build("llama-gqa")
    fill = hl.fill(model, [zoo.batch_for("llama-gqa")], per_position=True)
    with (
        hl.masked(model, torch.zeros(18), fill),
        pytest.raises(hl.HeadlabError, match="measured at 7 positions, but the input has 8"),
    ):
        model(torch.ones(1, 8, dtype=torch.long))


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = zoo.build("bert-classifier").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    fill = hl.fill(model, [zoo.batch_for("bert-classifier")])
    assert model.training
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = hl.fill(model.eval(), [zoo.batch_for("bert-classifier")])
    assert all(torch.equal(a, b) for a, b in zip(fill.values, again.values, strict=True))
    with hl.masked(model, torch.zeros(15), fill):
        model(**zoo.batch_for("bert-classifier")).loss.backward()
    assert model.classifier.weight.grad.any()


@pytest.mark.parametrize("options", [{}, {"per_position": True}, {"kind": "resample", "seed": 3}], ids=str)
@pytest.mark.parametrize("name", ["llama-gqa", "t5"])
def test_a_fill_comes_back_from_its_file(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model = zoo.build(name)
    fill = hl.fill(model, data_for(name), **options)
    path = fill.save(tmp_path / "fill.safetensors")
    back = hl.Fill.load(path)
    assert back.how == fill.how
    assert back.record == fill.record
    assert back.record["model"]["fingerprint"] == fingerprint(model)
    for field in ("values", "lengths", "keys"):
        ours, theirs = getattr(fill, field), getattr(back, field)
        assert len(ours) == len(theirs)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with hl.masked(model, random_gates(model, 1), fill):
        expected = logits(model, name)
    with hl.masked(model, random_gates(model, 1), back):
        assert torch.equal(logits(model, name), expected)


def test_files_that_are_no_fill(tmp_path: Path) -> None:
    path = hl.fill(zoo.build("llama-gqa"), [zoo.batch_for("llama-gqa")]).save(tmp_path / "fill.safetensors")
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:20], b"", b"no tensors"):
        path.write_bytes(content)
        with pytest.raises(hl.HeadlabError, match=r"is damaged|is not a headlab result, or cut off"):
            hl.Fill.load(path)
    for metadata in (None, {"kind": "weather", "headlab": "1"}, {"kind": "fill", "headlab": "99"}):
        save_file({"values.0": torch.ones(3)}, path, metadata=metadata)
        with pytest.raises(hl.HeadlabError, match="not a result that this version"):
            hl.Fill.load(path)
    with pytest.raises(hl.HeadlabError, match="there is no file"):
        hl.Fill.load(tmp_path / "none")


def test_fills_of_other_models() -> None:
    model = zoo.build("llama-gqa")
    for other, expected in (
        (zoo.build("llama-gqa", seed=1), f"another model .*this one is {fingerprint(model)}"),
        (zoo.build("gpt2"), r"\(5, 7\), \(5, 7\), \(5, 7\)\], but the model has \[\(6, 10\)"),
    ):
        fill = hl.fill(other, [{"input_ids": torch.ones(2, 3, dtype=torch.long)}])
        with pytest.raises(hl.HeadlabError, match=expected), hl.masked(model, torch.zeros(18), fill):
            pytest.fail("the block must not begin")


@pytest.mark.parametrize("options", [{"kind": "median"}, {"kind": "resample", "per_position": True}], ids=str)
def test_fills_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(hl.HeadlabError, match="kind is 'mean'"):
        hl.fill(zoo.build("llama-gqa"), [zoo.batch_for("llama-gqa")], **options)
    with pytest.raises(hl.HeadlabError, match="there are no batches"):
        hl.fill(zoo.build("llama-gqa"), [])


def test_nested_masks_with_fills() -> None:
    model, batch = zoo.build("llama-gqa"), zoo.batch_for("llama-gqa")
    fill, first = hl.fill(model, [batch]), np.array([0, 1, 1, 0, 1, 1])
    second, keep = np.array([0, 0, 1, 1, 1, 1]), np.ones(6)
    with ExitStack() as hooks:
        mean = fill.values[1]

        def edit(z: Tensor) -> Tensor:
            return torch.stack(
                [z[:, :, 0] * 0, z[:, :, 1] * 0, z[:, :, 2], mean[3].expand_as(z[:, :, 3]), z[:, :, 4], z[:, :, 5]], 2
            )

        at_site(model, head_rows(model)[1][0].site, edit, hooks)
        expected = logits(model, "llama-gqa")
    with hl.masked(model, [keep, first, keep], fill), hl.masked(model, [keep, second, keep]):
        assert torch.allclose(logits(model, "llama-gqa"), expected, atol=1e-6)
