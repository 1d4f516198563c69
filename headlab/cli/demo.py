"""The main job on models made on the spot: where attention fails, what composition does, which heads go, a smaller model.

Two probes learn to look records up by one feature and report another one, plain attention and composed heads. Both are
asked for combinations that they never met; then the composed one is taken apart and shrinks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from synthetic_tasks.probes.benchmark import ProbeResults, described, measured
from synthetic_tasks.probes.ground_truth import Truth, compare
from synthetic_tasks.probes.models import ProbeForSequenceClassification
from synthetic_tasks.probes.studies import MATCHED, SMALL, Point, point
from synthetic_tasks.probes.training import train
from synthetic_tasks.symbolic import CrossComposition, Split

from .. import plots
from ..attribution.ablation import ablation
from ..attribution.gradients import importance
from ..data.losses import own_loss
from ..dcmha.maps import composition_maps
from ..errors import HeadlabError
from ..loading import load
from ..pruning.curves import Curve, pruning_curve
from ..pruning.surgery import deviation, prune, save_pruned
from ..pruning.timing import timing
from ..results import building, write
from ..scores import HeadMask, HeadScores

HEADS = 12
STEPS = {False: 2000, True: 1000}  # quick or not
SIZE = replace(
    SMALL,
    features=5,
    records=6,
    d_model=48,
    recipes={"binding": replace(SMALL.recipes["binding"], weight_decay=0.1)},
)
TOLERATED = 0.05  # nats: the pruned model may lose this much
TOOK_APART = "dcmha"


def points(quick: bool, seed: int) -> list[Point]:
    """What is trained: plain attention, more of it, and composed heads."""
    recipe = replace(SIZE.recipes["binding"], steps=STEPS[quick])
    return [point(SIZE, "binding", label, seed, heads=HEADS, recipe=recipe) for label in ("mha", MATCHED, TOOK_APART)]


def batches(task: CrossComposition, split: Split, draw: int) -> list[dict[str, torch.Tensor]]:
    """Sequences as a classifier takes them."""
    samples = (task.sample(256, split, draw=2 * draw + i) for i in range(2))
    return [{"input_ids": sample.ids, "labels": sample.answer} for sample in samples]


def run(folder: Path, quick: bool = False, seed: int = 0) -> str:
    """Train, compare, score, draw curves, prune, check; everything into `folder`. Returns the summary.

    Raises:
        HeadlabError: the folder holds something already; the pruned model does not compute what the masked one does.
    """
    wanted = points(quick, seed)
    task = wanted[0].run.task
    with building(folder) as out:
        outcomes = list(train([at.run for at in wanted], checks=10))
        lines = [{"study": "demo"} | described(at) | measured(outcome) for at, outcome in zip(wanted, outcomes, strict=True)]
        results = ProbeResults(tuple(lines), {"studies": ["demo"], "seed": seed, "torch": torch.__version__})
        probe = outcomes[-1].probe
        seen, unseen = (compare(probe, task, split) for split in ("seen", "test"))
        said = _take_apart(probe, task, out, folder)

        results.save(out / "probes.json")
        shown = [_shown(truth, which, pair) for truth, which, pair in _examples(task, seen, unseen)]
        plots.save_html(plots.probe_kinds(results), out / "probes.html")
        plots.save_html(plots.feature_map(shown, "What the map ties together at a query"), out / "truth.html")
        table = "\n".join(
            f"| {plots.PROBES[line['kind']][0]} | {line['own_heads']} | {line['parameters']:,} | {line['seen']:.1%} "
            f"| {line['test']:.1%} | {_percent(line['mapped_seen'])} | {_percent(line['mapped_test'])} |"
            for line in lines
        )
        summary = _SUMMARY.format(
            task=task, trained=len(task.trained_pairs), held_out=len(task.held_out_pairs), table=table, chance=task.chance,
            map_chance=seen.chance, folder=folder, tolerated=TOLERATED, **said,
        )  # fmt: skip
        write(out / "summary.md", lambda file: file.write_text(summary, encoding="utf-8"))
    return summary


def _take_apart(probe: ProbeForSequenceClassification, task: CrossComposition, out: Path, folder: Path) -> dict[str, object]:
    """Score, prune and time the probe; results and figures into `out`. Returns what the summary says."""
    probe.save_pretrained(out / "model")
    model = load(out / "model")
    model.config._name_or_path = str(folder / "model")  # where it will be when this is done
    scoring, testing = batches(task, "seen", 10), batches(task, "test", 10)
    taylor = {site: importance(model, scoring, reduction="signed", site=site) for site in ("scores", "output")}
    exact = ablation(model, scoring)
    steps = [i / HEADS for i in range(HEADS + 1)]
    orders = {"Taylor (signed)": taylor["output"], "exact ablation": exact, "random": importance(model, method="random")}
    curves = {name: pruning_curve(model, scores, testing, steps) for name, scores in orders.items()}

    mask = cheapest_mask(curves["exact ablation"], exact)
    save_pruned(prune(model, mask), out / "pruned")
    small = load(out / "pruned")
    difference = deviation(small, model, mask, batches=testing[:1])
    with torch.inference_mode():
        losses = [own_loss(m, testing[0]).mean().item() for m in (model, small)]
        right = [(m(**testing[0]).logits.argmax(-1) == testing[0]["labels"]).double().mean().item() for m in (model, small)]
    if difference > 1e-4:
        raise HeadlabError(f"the pruned model differs from the masked one by {difference:.2g}: this is a bug in headlab")
    speed = timing({"dense": model, "masked": (model, mask), "pruned": small}, testing[:1], repeats=5)
    maps = composition_maps(model, testing[0]["input_ids"][:32])

    results = {"scores-taylor": taylor["output"], "scores-taylor-scores": taylor["scores"], "scores-ablation": exact}
    for name, result in (results | {"mask": mask, "timing": speed}).items():
        result.save(out / f"{name}.json")
    for name, curve in curves.items():
        curve.save(out / f"curve-{name.split(' ')[0].lower()}.json")
    maps.save(out / "maps.safetensors")
    figures = {
        "heads": plots.heads(exact, "What removing the output of each head costs"),
        "heads-scores": plots.heads(taylor["scores"], "How much the scores of each head matter"),
        "taylor-against-ablation": plots.against(taylor["output"], exact),
        "curves": plots.curves(curves),
        "maps": plots.maps(maps),
        "timing": plots.timing(speed),
    }
    for name, figure in figures.items():
        plots.save_html(figure, out / f"{name}.html")
    lines = speed.to_frame().set_index("model")
    return {
        "dense_loss": losses[0], "pruned_loss": losses[1], "dense_right": right[0], "pruned_right": right[1],
        "top": ", ".join(f"{h} ({s:.2g})" for h, s in exact.top(3)), "rho": taylor["output"].rank_correlation(exact),
        "removed": len(mask.removed), "all": len(mask), "difference": difference,
        "areas": ", ".join(f"{name} {curve.area:.2f}" for name, curve in curves.items()),
        "dense": int(lines.loc["dense", "parameters"]), "pruned": int(lines.loc["pruned", "parameters"]),
        "speedup": lines.loc["pruned", "speedup"], "attention": lines.loc["pruned", "attention_speedup"],
    }  # fmt: skip


def cheapest_mask(curve: Curve, scores: HeadScores) -> HeadMask:
    """The last mask of a curve, from the whole model on, that costs no more than is tolerated."""
    within = 0
    while within + 1 < len(curve.rises) and curve.rises[within + 1] <= TOLERATED:
        within += 1
    return HeadMask.without([h for row in scores.labels for h in row], curve.removed[within])


def _examples(task: CrossComposition, seen: Truth, unseen: Truth) -> list[tuple[Truth, str, list[int]]]:
    """Two queries that were trained and two that were not."""
    trained, held_out = task.trained_pairs.tolist(), task.held_out_pairs.tolist()
    return [(seen, "trained", pair) for pair in trained[:2]] + [(unseen, "unseen", pair) for pair in held_out[:2]]


def _shown(truth: Truth, which: str, pair: list[int]) -> tuple[str, torch.Tensor, tuple[int, int]]:
    p, a = pair
    return f"look up {p}, report {a} ({which})", truth.mean(p, a), (p, a)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


_SUMMARY = """\
# headlab demo

{task.n_records} records with {task.n_features} features of {task.n_values} values each, and a query: find the record whose
feature p has a value, report its feature a. {trained} combinations (p, a) are trained, {held_out} are held out, and every
p and every a is trained in others. A head of plain attention ties where it looks (QK) to what it carries (OV); composed
heads (DCMHA) tie them anew at every query.

| attention | heads | parameters | trained combinations | unseen ones | map right, trained | map right, unseen |
|---|---|---|---|---|---|---|
{table}

Guessing a record gives {chance:.1%}. **The map is right** where, of the record that the query names, it brings the feature
asked for more than any other one to the answer; by chance {map_chance:.0%}. `truth.html` shows it at two trained and two
unseen queries.

**Which heads matter** in the composed probe. Removing the output of one head costs most for {top}, in nats. One
backward pass ranks all heads; the rank correlation of its (signed) Taylor scores with exact ablation is {rho:.2f}: a probe
that is all but certain of its answers has small gradients, which say little. `heads-scores.html` ranks heads by their
scores instead: composed, a head may matter for where it looks and not for what it carries.

**How many can go.** Mean rise of the loss on unseen combinations over the pruning curve, by order of removal (less is
better): {areas}. {removed} of {all} outputs go without that loss rising by more than {tolerated}.

**A model that really is smaller.** {dense:,} parameters became {pruned:,}; on unseen combinations the loss went from
{dense_loss:.3f} to {pruned_loss:.3f} and accuracy from {dense_right:.1%} to {pruned_right:.1%}. It computes what the
masked model computes (largest difference of a logit: {difference:.1e}), reopens with
`headlab.load("{folder}/pruned")`, and one forward pass is {speedup:.2f} times as fast, its attention {attention:.2f} times.

Open `probes.html`, `truth.html`, `curves.html`, `heads.html`, `maps.html` and `timing.html` in a browser.
"""
