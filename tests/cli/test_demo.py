"""The demo: its parts agree with each other; and, slowly, that the gap it shows is there in every seed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import headlab as hl
from headlab import plots
from headlab.cli import demo
from headlab.errors import HeadlabError
from synthetic_tasks.probes.benchmark import ProbeResults, described
from synthetic_tasks.probes.ground_truth import compare
from synthetic_tasks.probes.models import ProbeForSequenceClassification
from synthetic_tasks.probes.studies import MATCHED
from synthetic_tasks.probes.training import train
from synthetic_tasks.symbolic import CrossComposition


def test_the_cheapest_mask_stops_before_the_first_costly_step() -> None:
    scores = hl.HeadScores(([0.1, 0.2, 0.3, 0.4],))
    removed = [[], ["L0H0"], ["L0H0", "L0H1"], ["L0H0", "L0H1", "L0H2"]]
    curve = hl.Curve(removed, np.array([1.0, 1.04, 1.2, 1.01]), np.zeros(0), 4)
    assert [str(head) for head in demo.cheapest_mask(curve, scores).removed] == ["L0H0"]
    curve = hl.Curve(removed, np.array([1.0, 1.06, 1.0, 1.01]), np.zeros(0), 4)
    assert demo.cheapest_mask(curve, scores).removed == []
    curve = hl.Curve(removed, np.array([1.0, 0.9, 0.8, 0.7]), np.zeros(0), 4)
    assert [str(head) for head in demo.cheapest_mask(curve, scores).kept] == ["L0H3"]


def test_what_is_trained() -> None:
    for quick, steps in ((False, 2000), (True, 1000)):
        points = demo.points(quick, seed=3)
        assert [at.label for at in points] == ["mha", MATCHED, "dcmha"]
        assert {at.run.recipe.steps for at in points} == {steps}
        assert {at.run.task for at in points} == {CrossComposition(5, 8, 6, "binding", seed=3)}
        assert {at.heads for at in points} == {12}


def test_batches_are_other_sequences_every_time() -> None:
    task = CrossComposition(5, 8, 6)
    found = [batch for split in ("seen", "test") for draw in (0, 1, 10) for batch in demo.batches(task, split, draw)]
    assert len({str(batch["input_ids"].tolist()) for batch in found}) == len(found) == 12
    assert all(batch["input_ids"].shape == (256, 7, 5) and batch["labels"].shape == (256,) for batch in found)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STEPS", {True: 60})
        return out, demo.run(out, quick=True, seed=1)


@pytest.fixture
def task() -> CrossComposition:
    return demo.points(True, 1)[0].run.task


def test_everything_is_written(made: tuple[Path, str]) -> None:
    folder, said = made
    results = {"probes", "scores-taylor", "scores-taylor-scores", "scores-ablation", "mask", "timing"}
    results |= {f"curve-{name}" for name in ("taylor", "exact", "random")}
    figures = {"probes", "truth", "heads", "heads-scores", "taylor-against-ablation", "curves", "maps", "timing"}
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    expected = {f"{name}.json" for name in results} | {f"{name}.html" for name in figures}
    expected |= {f"{model}/{name}" for model in ("model", "pruned") for name in ("config.json", "model.safetensors")}
    assert files == expected | {"maps.safetensors", "summary.md"}
    assert (folder / "summary.md").read_text(encoding="utf-8") == said
    assert [file.name for file in folder.parent.iterdir()] == ["out"]
    for name in re.findall(r"`([a-z-]+\.html)`", said):
        assert "Plotly.newPlot(" in (folder / name).read_text(encoding="utf-8")
    assert f'headlab.load("{folder}/pruned")' in said
    assert "{" not in said
    assert isinstance(hl.Result.load(folder / "scores-ablation.json"), hl.AblationScores)
    for name in ("taylor", "exact", "random"):
        assert hl.Curve.load(folder / f"curve-{name}.json").fractions[-1] == 1


def test_the_summary_tells_the_results(made: tuple[Path, str], task: CrossComposition) -> None:
    folder, said = made
    rows = ProbeResults.load(folder / "probes.json").lines
    assert [row["kind"] for row in rows] == ["mha", "matched", "dcmha"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STEPS", {True: 60})
        for row, at in zip(rows, demo.points(True, 1), strict=True):
            assert {name: row[name] for name in described(at)} == described(at)
    for row in rows:
        name, *_ = plots.PROBES[row["kind"]]
        shares = f"{row['seen']:.1%} | {row['test']:.1%} | {row['mapped_seen']:.0%} | {row['mapped_test']:.0%}"
        assert f"| {name} | {row['own_heads']} | {row['parameters']:,} | {shares} |" in said
        assert len(row["history"]) == 10
    assert rows[1]["parameters"] >= rows[2]["parameters"] > rows[0]["parameters"]
    assert f"{len(task.trained_pairs)} combinations (p, a) are trained, {len(task.held_out_pairs)} are held out" in said
    mask = hl.HeadMask.load(folder / "mask.json")
    assert f"{len(mask.removed)} of 12 outputs go" in said
    exact = hl.HeadScores.load(folder / "scores-ablation.json")
    assert ", ".join(f"{head} ({score:.2g})" for head, score in exact.top(3)) in said
    assert f"with exact ablation is {hl.HeadScores.load(folder / 'scores-taylor.json').rank_correlation(exact):.2f}" in said
    areas = [hl.Curve.load(folder / f"curve-{name}.json").area for name in ("taylor", "exact", "random")]
    assert "Taylor (signed) {:.2f}, exact ablation {:.2f}, random {:.2f}".format(*areas) in said


def test_the_model_is_the_probe_of_the_table(made: tuple[Path, str], task: CrossComposition) -> None:
    folder, said = made
    model, small = hl.load(folder / "model"), hl.load(folder / "pruned")
    assert type(model) is ProbeForSequenceClassification
    row = ProbeResults.load(folder / "probes.json").lines[-1]
    counts = [sum(p.numel() for p in one.parameters()) for one in (model, small)]
    assert counts[0] == row["parameters"]
    assert f"{counts[0]:,} parameters became {counts[1]:,}" in said
    for split in ("seen", "test"):
        assert compare(model, task, split).share == row[f"mapped_{split}"]
        sample = task.sample(4000, split)
        with torch.inference_mode():
            right = (model(sample.ids).logits.argmax(-1) == sample.answer).double().mean().item()
        assert right == pytest.approx(row[split], abs=0.04)
    (batch, *_) = demo.batches(task, "test", 10)
    losses, shares = [], []
    for one in (model, small):
        losses.append(f"{hl.own_loss(one, batch).mean().item():.3f}")
        with torch.inference_mode():
            shares.append(f"{(one(**batch).logits.argmax(-1) == batch['labels']).double().mean().item():.1%}")
    assert f"from\n{' to '.join(losses)} and accuracy from {' to '.join(shares)}" in said


def test_the_pruned_model_is_the_masked_one(made: tuple[Path, str], task: CrossComposition) -> None:
    folder, _ = made
    model, small = hl.load(folder / "model"), hl.load(folder / "pruned")
    mask = hl.HeadMask.load(folder / "mask.json")
    assert [str(head) for head in hl.heads(small)] == [str(head) for head in mask.kept]
    curve = hl.Curve.load(folder / "curve-exact.json")
    assert demo.cheapest_mask(curve, hl.HeadScores.load(folder / "scores-ablation.json")).removed == mask.removed
    assert mask.removed  # trained so little, it has heads to spare
    for split in ("seen", "test"):
        for batch in demo.batches(task, split, 3):
            with torch.inference_mode(), hl.masked(model, mask):
                expected = model(**batch).logits
            with torch.inference_mode():
                assert (small(**batch).logits - expected).abs().max() < 1e-5
                assert (model(**batch).logits - expected).abs().max() > 1e-3


def test_a_folder_with_other_results_is_left_alone(made: tuple[Path, str]) -> None:
    folder, _ = made
    before = sorted(folder.rglob("*"))
    with pytest.raises(HeadlabError, match="already holds something"):
        demo.run(folder, quick=True)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_the_gap_is_there_in_every_seed() -> None:
    """Measured once: unseen at most 24 % (MHA), 31 % (matched), at least 98 % (DCMHA)."""
    points = [at for seed in range(5) for at in demo.points(False, seed)]
    labels = {id(at.run): at.label for at in points}
    reached: dict[str, list[float]] = {}
    for outcome in train([at.run for at in points]):
        assert outcome.seen >= 0.99
        assert outcome.test is not None
        reached.setdefault(labels[id(outcome.run)], []).append(outcome.test)
    assert {label: len(shares) for label, shares in reached.items()} == {"mha": 5, MATCHED: 5, "dcmha": 5}
    assert max(reached["mha"] + reached[MATCHED]) < 0.5
    assert min(reached["dcmha"]) >= 0.95
