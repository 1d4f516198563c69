"""The studies of "Are Sixteen Heads Really Better than One?" (Michel, Levy & Neubig 2019), on models trained here.

    python -m benchmarks.sixteen all --out RUN --docs docs            train, study, and write docs/sixteen.md
    python -m benchmarks.sixteen train | study --out RUN              the first two parts by themselves
    python -m benchmarks.sixteen report --out RUN --docs docs         the page, from RUN/results alone

One head off, all but one, what each kind of attention can lose, two domains, the course of training, and speed at half the
heads: of the translator and the classifier of `benchmarks/sequence.py`; speed also of BERT-base with random weights. What is
in RUN already is not made again: after a kill, the same command goes on, and one with other options is refused. Six minutes
on one GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import headlab as hl
from headlab.data.batches import Batch
from headlab.data.losses import Loss, Metric
from headlab.errors import HeadlabError
from headlab.pruning.curves import TENTHS
from headlab.pruning.timing import shapes
from headlab.results import Result, read_json, write
from headlab.studies.checkpoints import checkpoint_folders, profile

from .language import DOMAINS
from .sequence import BASE, LONGEST, accuracy, add_sizes, bleu, cut, examples, given_size, train, wrong

TASKS = ("translator", "classifier")
STACKS = ("enc", "dec", "cross")
METRICS: dict[str, Metric] = {"translator": bleu, "classifier": accuracy}
SPEED_BATCHES = (1, 4, 16, 64)
FRACTIONS = TENTHS


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    for task in options.only.split(","):
        if options.command != "report" and task != BASE:
            same_options(task, options)
        if options.command in ("all", "train") and task != BASE:
            models(task, options)
        if options.command in ("all", "study"):
            (base_speed if task == BASE else study)(task, options)
    if options.command in ("all", "report"):
        from .sixteen_report import write_report  # plotly need not be where the study runs

        print(write_report(options.out / "results", options.docs))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["all", "train", "study", "report"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--only", default=",".join([*TASKS, BASE]), help="models, separated by commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--examples", type=int, default=2048, help="what is measured on; as many choose the heads")
    parser.add_argument("--batch-size", type=int, default=2048, help="of what is measured on")
    parser.add_argument("--repeats", type=int, default=20, help="of timed passes")
    add_sizes(parser)
    return parser.parse_args(arguments)


def same_options(task: str, options: argparse.Namespace) -> None:
    """Raise unless RUN was begun with the same training and the same sentences."""
    path = options.out / f"{task}-options.json"
    asked = vars(given_size(task, options)) | {"steps": options.steps, "examples": options.examples}
    if not path.exists():
        write(path, lambda file: file.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8"))
    elif (begun := read_json(path)) != asked:
        differ = ", ".join(f"{name} {begun.get(name)}" for name in asked if begun.get(name) != asked[name])
        raise HeadlabError(f"{options.out} was begun with {differ}: give the same options, or choose another --out")


def models(task: str, options: argparse.Namespace) -> None:
    """Train a model, unless it is there."""
    folder = options.out / "models" / task
    if not folder.exists():
        train(task, folder, options.steps, given_size(task, options), options.device)


def study(task: str, options: argparse.Namespace) -> None:
    """Everything that is measured on one model, into RUN/results."""
    folder, out, n = options.out / "models" / task, options.out / "results", options.examples
    model = hl.load(str(checkpoint_folders(folder)[-1]), device=options.device)
    choosing, testing = (cut(examples(task, part, n), options.batch_size) for part in ("choose", "test"))
    metric = METRICS[task]

    def once(name: str, make: Callable[[], Any]) -> Any:
        return kept(out / f"{task}-{name}.json", make)

    def exact(name: str, data: list[Batch], loss: Loss = wrong, keep_one: bool = False) -> hl.AblationScores:
        log = options.out / "logs" / f"{task}-{name}.jsonl"
        return once(name, lambda: hl.ablation(model, data, loss=loss, keep_one=keep_one, log=log))

    exact("one-off", testing)
    exact("one-off-loss", testing, hl.own_loss)
    exact("alone", testing, keep_one=True)
    exact("alone-choose", choosing, keep_one=True)
    orders = {
        "taylor": once("taylor", lambda: hl.importance(model, choosing, normalize="layer")),
        "ablation": exact("one-off-choose", choosing),
        "random": hl.importance(model, method="random"),
    }
    for name, order in orders.items():
        once(f"curve-{name}", lambda: hl.pruning_curve(model, order, testing, FRACTIONS, metric=metric))
    if task == "translator" and not all((out / f"{task}-curve-{stack}.json").exists() for stack in STACKS):
        for stack, curve in hl.stack_curves(model, orders["taylor"], testing, FRACTIONS, metric=metric).items():
            curve.save(out / f"{task}-curve-{stack}.json")
    log = options.out / "logs" / f"{task}-profile.jsonl"
    once("profile", lambda: profile(
        folder, testing, scoring=choosing, fractions=FRACTIONS, metric=metric, normalize="layer", log=log,
        device=options.device,
    ))  # fmt: skip
    of = {domain: cut(examples(task, "test", n, seed=1, domain=domain), options.batch_size) for domain in DOMAINS}
    wrongs = [exact(f"one-off-{domain}", data) for domain, data in of.items()]
    losses = [exact(f"one-off-loss-{domain}", data, hl.own_loss) for domain, data in of.items()]
    importances = [hl.importance(model, data) for data in of.values()]
    for name, (one, other) in (("ablation", wrongs), ("loss", losses), ("importance", importances)):
        once(f"domains-{name}", lambda: hl.correlate(one, other, DOMAINS))
    once("timing", lambda: halved(model, orders["taylor"], options.repeats))


def base_speed(task: str, options: argparse.Namespace) -> None:
    """Of the paper's own shape; how fast it is does not depend on its weights."""
    model = BertForSequenceClassification(BertConfig()).to(options.device).eval()
    scores = hl.importance(model, method="random")
    kept(options.out / "results" / f"{task}-timing.json", lambda: halved(model, scores, options.repeats))


def kept(path: Path, make: Callable[[], Result]) -> Result:
    """The result in a file, made now if there is none."""
    if path.exists():
        return Result.load(path)
    print(f"{path.stem} ...", flush=True)
    result = make()
    result.save(path)
    return result


def halved(model: nn.Module, scores: hl.HeadScores, repeats: int) -> hl.Timing:
    """A model and the same with the less important half of its heads really gone, at several batch sizes."""
    small = hl.prune(model, scores.keep(0.5))
    batches = shapes(model, [(batch, LONGEST) for batch in SPEED_BATCHES])
    return hl.timing({"all heads": model, "half of the heads": small}, batches, repeats=repeats)


if __name__ == "__main__":
    main()
