from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import headlab as hl
from headlab import demo


def test_only_what_is_said_again_has_labels() -> None:
    batch = demo.repeated(3, 5, torch.Generator().manual_seed(0))
    ids, labels = batch["input_ids"], batch["labels"]
    assert torch.equal(ids[:, :5], ids[:, 5:])
    assert (labels[:, :6] == -100).all()
    assert torch.equal(labels[:, 6:], ids[:, 6:])


def test_the_cheapest_mask_stops_before_the_first_costly_step() -> None:
    scores = hl.HeadScores(([0.1, 0.2, 0.3, 0.4],))
    removed = [[], ["L0H0"], ["L0H0", "L0H1"], ["L0H0", "L0H1", "L0H2"]]
    curve = hl.Curve(removed, np.array([1.0, 1.04, 1.2, 1.01]), np.zeros(0), 4)
    assert [str(head) for head in demo.cheapest_mask(curve, scores).removed] == ["L0H0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK", replace(demo.QUICK, steps=150))
        demo.run(out, quick=True)
    return out


def test_the_model_is_attention_only_and_has_learned(folder: Path) -> None:
    model = hl.load(folder / "model")
    batch = demo.repeated(17, demo.QUICK.half, torch.Generator().manual_seed(5))
    loss = hl.own_loss(model, batch).mean().item()
    assert loss < 1  # guessing gives 4.2
    for layer in model.model.layers:
        layer.mlp.forward = lambda x: torch.zeros_like(x)
    assert hl.own_loss(model, batch).mean().item() == pytest.approx(loss, abs=1e-6)


def test_the_demo_writes_results_that_agree_with_each_other(folder: Path) -> None:
    model, small = hl.load(folder / "model"), hl.load(folder / "pruned")
    mask = hl.HeadMask.load(folder / "mask.json")
    assert [str(head) for head in hl.heads(small)] == [str(head) for head in mask.kept]
    batch = demo.repeated(3, demo.QUICK.half, torch.Generator().manual_seed(7))
    with torch.inference_mode(), hl.masked(model, mask):
        expected = model(**batch).logits
    assert torch.allclose(small(**batch).logits, expected, atol=1e-5)
    assert isinstance(hl.Result.load(folder / "scores-ablation.json"), hl.AblationScores)
    curve = hl.Curve.load(folder / "curve-taylor.json")
    assert curve.fractions[-1] == 1
    assert "heads go without the loss rising" in (folder / "summary.md").read_text(encoding="utf-8")
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} <= {".json", ".html", ".md", ".safetensors"}


def test_a_folder_with_other_results_is_left_alone(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(hl.HeadlabError, match="already holds something"):
        demo.run(folder, quick=True)
    assert sorted(folder.rglob("*")) == before
