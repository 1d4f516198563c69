from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import headlab as hl
from headlab.pruning.timing import shapes
from tests.helpers import zoo


@pytest.mark.parametrize("name", [*zoo.MHA_GQA_MQA, "gpt2", "bert", "t5"])
def test_dense_masked_and_pruned_beside_each_other(name: str) -> None:
    model = zoo.build(name)
    mask = hl.importance(model, method="random").keep(0.5)
    small = hl.prune(model, mask)
    models = {"dense": model, "masked": (model, mask), "pruned": small}
    result = hl.timing(models, shapes(model, [(2, 5), (3, 7)]), repeats=3, warmup=1)
    frame = result.to_frame()
    assert frame["model"].tolist() == ["dense", "masked", "pruned"] * 2
    assert frame["batch"].tolist() == [2] * 3 + [3] * 3
    assert (frame["low"] <= frame["ms"]).all()
    assert (frame["ms"] <= frame["high"]).all()
    assert (frame["attention_ms"] > 0).all()
    sizes = frame.set_index("model")["parameters"]
    assert sizes["dense"].tolist() == sizes["masked"].tolist() == [sum(p.numel() for p in model.parameters())] * 2
    assert sizes["pruned"].tolist() == [sum(p.numel() for p in small.parameters())] * 2
    base = frame[frame["model"] == "dense"].set_index(["batch", "pos"])["ms"]
    expected = [base[line.batch, line.pos] / line.ms for line in frame.itertuples()]
    np.testing.assert_allclose(frame["speedup"], expected)


def test_bytes_are_those_of_the_saved_weights(tmp_path: Path) -> None:
    model = zoo.build("llama-gqa").to(torch.bfloat16)
    result = hl.timing({"dense": model}, shapes(model, [(1, 3)]), repeats=1, warmup=0)
    model.save_pretrained(tmp_path)
    assert result.lines[0]["bytes"] == (tmp_path / "model.safetensors").stat().st_size


def test_a_result_reads_back_and_names_its_machine(tmp_path: Path) -> None:
    model = zoo.build("llama-mha")
    result = hl.timing({"dense": model}, shapes(model, [(1, 3)]), repeats=2)
    again = hl.Result.load(result.save(tmp_path / "timing.json"))
    assert isinstance(again, hl.Timing)
    assert again.lines == result.lines
    assert again.record["threads"] == torch.get_num_threads()
    assert again.top(1) == [("dense 1 x 3", result.lines[0]["ms"])]


def test_what_cannot_be_timed() -> None:
    model = zoo.build("llama-mha")
    with pytest.raises(hl.HeadlabError, match="no models"):
        hl.timing({}, shapes(model, [(1, 3)]))
    with pytest.raises(hl.HeadlabError, match="repeats must be at least 1"):
        hl.timing({"dense": model}, shapes(model, [(1, 3)]), repeats=0)
    with pytest.raises(hl.HeadlabError, match="no batches"):
        hl.timing({"dense": model}, [])


def test_models_are_left_as_they_were() -> None:
    model = zoo.build("llama-gqa").train()
    hl.timing({"dense": model}, shapes(model, [(1, 3)]), repeats=1)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_batches_of_the_same_shape_stay_apart() -> None:
    model = zoo.build("llama-mha")
    small = hl.prune(model, hl.importance(model, method="random").keep(0.5))
    frame = hl.timing({"dense": model, "pruned": small}, shapes(model, [(1, 3), (1, 3)]), repeats=1).to_frame()
    times = frame["ms"].tolist()
    assert frame["speedup"].tolist() == [1, times[0] / times[1], 1, times[2] / times[3]]
