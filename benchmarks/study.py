"""From two real models to smaller ones: the figures in the README, made again by one command.

    python -m benchmarks.study smollm2 | wordsim | classifier [--out docs/study]

Importance, exact ablation of every head, pruning curves, pruned models and their timing: of SmolLM2 on next-token loss,
of MiniLM on word similarity, of a sentence classifier on held-out accuracy. Long steps resume from the files in `--out`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import headlab as hl
from headlab import plots
from headlab.data.losses import Loss, Metric
from headlab.pruning.timing import shapes

from . import real

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["smollm2", "wordsim", "classifier"])
    parser.add_argument("--out", type=Path, default=Path("docs/study"))
    options = parser.parse_args()
    {"smollm2": smollm2, "wordsim": wordsim, "classifier": classifier}[options.which](options.out / options.which)


def smollm2(out: Path) -> None:
    """Scores from 16 x 64 tokens of one licence; loss on 16 x 64 tokens each of two others."""
    model = hl.load(real.smollm2())
    tokenizer = AutoTokenizer.from_pretrained(real.smollm2())
    texts = real.licence_texts()
    scoring = hl.text_batches(tokenizer, texts["Apache-2.0"])
    testing = [batch for name in ("GPL-3.0", "PSF-2.0") for batch in hl.text_batches(tokenizer, texts[name])]
    study(model, scoring, testing, out, with_mean=True)
    scores = hl.importance(model, scoring)
    masks = {unit: scores.keep(0.5, unit=unit) for unit in ("head", "group")}
    half(model, masks, shapes(model, [(1, 64), (16, 64)]), out)


def wordsim(out: Path) -> None:
    """MiniLM on WordSim-353: scores from the squared error of the cosine, curves of Spearman's correlation."""
    model = hl.load(real.minilm())
    tokenizer = AutoTokenizer.from_pretrained(real.minilm())
    pairs = real.wordsim353()

    def encode(words: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(words, padding=True, return_tensors="pt"))

    first, second = (encode([pair[i] for pair in pairs]) for i in range(2))
    human = torch.tensor([score / 10 for _, _, score in pairs])
    batch = first | {"other_ids": second["input_ids"], "other_mask": second["attention_mask"], "human": human}

    def error(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        one = mean_state(m, b["input_ids"], b["attention_mask"])
        other = mean_state(m, b["other_ids"], b["other_mask"])
        return (torch.cosine_similarity(one, other) - b["human"]).square()

    def spearman(m: nn.Module, _: list[dict[str, Tensor]]) -> float:
        return real.wordsim_spearman(m, tokenizer, pairs)

    study(model, [batch], [batch], out, loss=error, metric=spearman)
    scores = hl.importance(model, [batch], loss=error)
    half(model, {"head": scores.keep(0.5)}, shapes(model, [(1, 32), (16, 32), (64, 32)]), out)


def mean_state(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def classifier(out: Path) -> None:
    """MiniLM fine-tuned on film reviews: scores on training sentences, curves of accuracy on held-out ones."""
    folder = real.sentence_classifier()
    model, tokenizer = hl.load(folder), AutoTokenizer.from_pretrained(folder)
    texts, labels = real.labelled_sentences()
    scoring = [encoded(tokenizer, texts[i : i + 32], labels[i : i + 32]) for i in range(0, 256, 32)]
    held_texts, held_labels = real.held_out_sentences()

    def accuracy(m: nn.Module, _: list[dict[str, Tensor]]) -> float:
        return real.classifier_accuracy(m, tokenizer, held_texts, held_labels)

    testing = [encoded(tokenizer, held_texts, held_labels)]
    study(model, scoring, testing, out, metric=accuracy)
    scores = hl.importance(model, scoring)
    half(model, {"head": scores.keep(0.5)}, shapes(model, [(1, 32), (16, 32), (64, 32)]), out)


def encoded(tokenizer: Callable[..., dict[str, Tensor]], texts: list[str], labels: list[int]) -> dict[str, Tensor]:
    batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    return dict(batch) | {"labels": torch.tensor(labels)}


def study(
    model: nn.Module,
    scoring: list[dict[str, Tensor]],
    testing: list[dict[str, Tensor]],
    out: Path,
    loss: Loss | None = None,
    metric: Metric | None = None,
    with_mean: bool = False,
) -> None:
    """Scores, exact ablation, and a curve for every order of removal."""
    left = hl.kept(model)
    grouped = bool((left["heads"] != left["groups"]).any())
    orders = {
        "Taylor": hl.importance(model, scoring, loss=loss),
        "exact ablation": hl.ablation(model, scoring, loss=loss, log=out / "ablation.log.jsonl"),
        "random": hl.importance(model, method="random"),
        "magnitude": hl.importance(model, method="magnitude"),
    }
    exact = orders["exact ablation"]
    correlations = {}
    for reduction in ("token", "example", "batch", "signed"):
        scores = hl.importance(model, scoring, loss=loss, reduction=reduction)
        correlations[f"Taylor, {reduction}"] = scores.rank_correlation(exact)
    correlations |= {name: orders[name].rank_correlation(exact) for name in ("magnitude", "random")}
    show("Rank correlation with exact ablation", pd.Series(correlations, name="rho").to_frame())
    frame = exact.to_frame()
    helpful = int(((frame["p"] < 0.01) & (frame["change"] > 0)).sum())
    harmful = int(((frame["p"] < 0.01) & (frame["change"] < 0)).sum())
    print(f"{len(frame)} heads: removal hurts significantly for {helpful}, helps for {harmful} (p < .01)\n")

    fill = hl.fill(model, scoring) if with_mean else None
    if fill is not None:
        orders["Taylor, mean fill"] = hl.importance(model, scoring, loss=loss, fill=fill)
    units = ["head", "group"] if grouped else ["head"]
    for unit in units:
        curves = {
            name: hl.pruning_curve(
                model, scores, testing, FRACTIONS, loss=loss if metric is None else None, metric=metric, unit=unit,
                fill=fill if "mean" in name else None, log=out / f"{file_name(name, unit)}.log.jsonl",
            )
            for name, scores in orders.items()
        }  # fmt: skip
        table = pd.DataFrame({name: curve.rises if metric is None else curve.values for name, curve in curves.items()}).T
        table.columns = [f"{100 * fraction:.0f} %" for fraction in curves["Taylor"].fractions]
        table["area"] = [curve.area for curve in curves.values()]
        show(f"By {unit}: {'rise of the loss' if metric is None else 'metric'} at heads removed", table)
        plots.save_html(plots.curves(curves, f"{out.name}: pruning by {unit}"), out / f"curves-{unit}.html")
        for name, curve in curves.items():
            curve.save(out / f"{file_name(name, unit)}.json")
    exact.save(out / "ablation.json")
    orders["Taylor"].save(out / "taylor.json")
    plots.save_html(plots.heads(exact), out / "ablation.html")
    plots.save_html(plots.against(orders["Taylor"], exact), out / "taylor-against-ablation.html")


def file_name(order: str, unit: str) -> str:
    return "-".join(["curve", *order.replace(",", "").split(), unit])


def half(model: nn.Module, masks: dict[str, hl.HeadMask], batches: list[dict[str, Tensor]], out: Path) -> None:
    """Size and speed of the model with half of its heads."""
    pruned = {unit: hl.prune(model, mask) for unit, mask in masks.items()}
    for unit, small in pruned.items():
        left = hl.kept(small)[["heads", "slots", "groups"]].sum()
        print(f"half removed by {unit}: {left['heads']} heads, {left['slots']} slots, {left['groups']} groups")
    models = {"dense": model, "masked": (model, next(iter(masks.values())))}
    result = hl.timing(models | {f"pruned by {unit}": small for unit, small in pruned.items()}, batches, repeats=5)
    result.save(out / "timing.json")
    show(f"Timing ({result.record['device']}, {result.record['threads']} threads)", result.to_frame().set_index("model"))


def show(title: str, table: pd.DataFrame) -> None:
    print(f"### {title}\n\n{table.round(3).to_string()}\n")


if __name__ == "__main__":
    main()
