"""docs/tasks.md out of saved results: probes (`headlab tasks probe`) and SmolLM2 (`python -m benchmarks.tasks smollm2`).

headlab tasks probe --study main --study kinds ... --device cuda --out results     # writes results/probes-full.log.jsonl
python -m benchmarks.tasks smollm2 --published FILE_OR_URL --out results
python -m benchmarks.tasks report docs/data/probes-*.jsonl --smollm2 docs/data
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from headlab import plots
from headlab.results import write
from synthetic_tasks import Evaluation, InContextTasks, evaluate, published_tasks
from synthetic_tasks.probes.benchmark import ProbeResults, collected
from synthetic_tasks.probes.studies import AXES, FULL, STUDIES

from .dcmha_report import picture

app = typer.Typer(add_completion=False)
SEEDS = 5
EVALUATIONS = {"published": "The 74 published tasks", "sentences": "InContextTasks"}
FACTORS = ["relation", "looked_up", "reported", "negation", "order", "difficulty"]


@app.command()
def smollm2(
    published: Annotated[str, typer.Option(help="The DCFormer task file.")],
    out: Path = Path("results"),
    docs: Path = Path("docs"),
    contexts: int = 4,
) -> None:
    """Evaluate SmolLM2-135M-Instruct (4-bit weights, see `benchmarks.real`) on both kinds of tasks, for the page."""
    import headlab as hl

    from .real import smollm2 as folder

    found = {"published": published_tasks(published), "sentences": InContextTasks(seed=0).sample(contexts)}
    for name, texts in found.items():
        result = evaluate(hl.load(folder()), texts, log=out / f"smollm2-{name}.log.jsonl")
        result.save(out / f"smollm2-{name}.json")
        picture(plots.tasks(result, FACTORS, ["all", "choice"]), docs, f"smollm2-{name}", name)
        lines = by_factors(result).to_csv(index=False)
        write(docs / "data" / f"smollm2-{name}.csv", lambda file, lines=lines: file.write_text(lines, encoding="utf-8"))


@app.command()
def report(logs: list[Path], docs: Path = Path("docs")) -> None:
    """Write docs/tasks.md and the figures of the probes."""
    rows, machines = read(logs)
    parts = [INTRO.format(size=FULL, machines=machines)]
    for name, (title, text) in SECTIONS.items():
        of = ProbeResults(collected([name], "full", SEEDS, rows))
        n_points = len(STUDIES[name](FULL, range(SEEDS)))
        if 2 * len(of.lines) < n_points:  # a few points that another study has measured are no study
            continue
        figure = plots.probes(of, name) if name in AXES else plots.probe_kinds(of)
        parts += [f"## {title}", text, picture(figure, docs, f"probes-{name}", title), table(of)]
        if len(of.lines) < n_points:
            parts.append(f"{len(of.lines)} of {n_points} points were measured.")
    parts += ["## A language model on the same questions", SMOLLM2]
    for name, title in EVALUATIONS.items():
        lines = pd.read_csv(docs / "data" / f"smollm2-{name}.csv", dtype=str, keep_default_na=False)
        parts += [f"### {title}", f"![{title}](figures/smollm2-{name}.png)", markdown(lines)]
    write(docs / "tasks.md", lambda file: file.write_text("\n\n".join(parts) + "\n", encoding="utf-8"))


def read(logs: Sequence[Path]) -> tuple[list[dict[str, Any]], str]:
    """The rows of some logs, and where they were made."""
    rows, machines = [], []
    for log in logs:
        header, *found = map(json.loads, log.read_text("utf-8").splitlines())
        rows += found
        machines.append(f"{len(found)} probes on {header['device']}, torch {header['torch']}")
    return rows, "; ".join(machines)


def table(results: ProbeResults) -> str:
    """Accuracies by setting, one number per seed."""
    frame = results.to_frame()
    fixed = ("study", "run", "seed", "seen", "test", "mapped_seen", "mapped_test", "chance", "d_model", "values")
    settings = [c for c in frame.columns if c not in fixed and (frame[c].nunique() > 1 or c in ("level", "kind"))]
    lines = []
    for values, group in frame.groupby(settings, sort=False, dropna=False):
        line = dict(zip(settings, values, strict=True))
        line["kind"] = plots.PROBES[line["kind"]][0]
        if "parameters" in line:
            line["parameters"] = f"{line['parameters']:,}"
        line |= {name.replace("_", " "): line.pop(name) for name in list(line)}
        line["trained, lowest"] = percent(group["seen"].min())
        if group["test"].notna().any():
            line["unseen, every seed"] = ", ".join(map(percent, group["test"]))
        line["map right, unseen"] = percent(group["mapped_test"].astype(float).mean())
        lines.append(line)
    return markdown(pd.DataFrame(lines))


def by_factors(evaluation: Evaluation) -> pd.DataFrame:
    lines = []
    for factor in [None, *FACTORS]:
        for row in (evaluation.by(factor) if factor else evaluation.by()).to_dict("records"):
            line = {"factor": factor or "all", "value": row[factor] if factor else "", "answers": row["n"]}
            for measure, said in (("all", "whole answer"), ("first", "first token"), ("choice", "choice")):
                share, low, high = (row[measure + end] for end in ("", "_low", "_high"))
                line[said] = f"{percent(share)} ({percent(low)} to {percent(high)})"
            lines.append(line | {"chance of choice": percent(row["chance"])})
    return pd.DataFrame(lines)


def markdown(frame: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + " --- |" * len(frame.columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False))])


def percent(share: float) -> str:
    return "-" if pd.isna(share) else f"{100 * share:.1f}"


INTRO = """\
# Where plain attention fails, measured

Made by `headlab tasks probe` and `benchmarks/tasks.py`; everything is as measured ({machines}).

**The task.** {size.records} records with {size.features} features of {size.values} values, and a query: find the record
whose feature p has a value, report its feature a. 30 % of the {size.features} x ({size.features} - 1) combinations (p, a)
are never trained, though every p and every a is trained in others. On the level *binding* the query names p, its value and
a; on the level *conflict* it names a value for every feature, each of another record, and only a selector says which one
counts. Guessing a record gives 8.3 %.

**The probes.** {size.d_model} wide, heads of {size.d_head}, one layer (pre-norm), the answer read at the query. `seed`
draws the combinations held out, the data and the weights. Per cent of 10,000 sequences; *trained* is fresh sequences with
trained combinations, *unseen* those held out. *The map is right* at a query if of all pairs of features (on the level
binding: all features to report) it ties the asked ones most
(`synthetic_tasks.probes.ground_truth`). *Matched* is an MHA with so many heads that it has as many parameters as the DCMHA
of the same point."""
SECTIONS = {
    "main": (
        "The main figure",
        "Eight heads on the level binding: plain attention fits what it is trained on and is lost on the rest, with as many "
        "parameters too; static maps nearly suffice. The level conflict separates static from dynamic maps. Read it with "
        "care: a linear query cannot multiply the selector with the values, so without an MLP on the query plain attention "
        "does not even fit the trained combinations, and that is no failure to generalise. With the MLP, two heads for each "
        "of the 56 combinations and a recipe of its own it does fit them, and does not know the others: there the gap in "
        "unseen accuracy is between kinds that all fit what they were trained on. All of these probes are one program that "
        "took 117 seconds on one H100 (45 probes, 205,000 steps of a run, 4.8 GiB; one measurement). What bounds it is "
        "traffic through memory, copies and elementwise kernels above all, and weight gradients that fill few of the GPU's "
        "processors, which is why stacks are trained side by side; the longest part is that last MHA with its 112 heads.",
    ),
    "kinds": (
        "Every kind",
        "On the level conflict with an MLP on the query and 16 heads. There low-rank maps of the query are what it takes: "
        "alone, after the softmax alone, or with everything else, they answer every unseen combination in every seed; maps "
        "of the keys, gates, static maps and maps before the softmax alone do not even fit, with this recipe.",
    ),
    "heads": (
        "Number of heads",
        "On the level conflict with an MLP on the query: maps want more heads than features.",
    ),
    "features": ("Number of features", "Level binding."),
    "records": ("Number of records", "Level binding."),
    "d_head": ("Size of a head", "Level binding. A head that can carry a whole record need not be composed."),
    "held_out": ("Share held out", "Level binding."),
    "shared": ("One vocabulary for all features", "Carrying the whole record wins nothing here; the gap is wider."),
    "layers": ("Two layers, or an MLP behind attention", "Level binding."),
    "recipes": (
        "What makes dynamic maps generalise",
        "Level conflict, without an MLP but for the last rows. With little decay the maps learn the trained pairs by heart; "
        "with more they find the rule. At a high learning rate what they make of a single pair that they never meet comes "
        "and goes while all trained ones stay right: a probe that stops at the wrong moment has lost one of sixteen. Either "
        "the rate falls all the time (`hold` 0), or the mean of the weights over the last steps (`average`, a share of the "
        "steps) is taken, which loses fewer. More heads than features and an MLP on the query (above) lose none; rank 4 "
        "loses more. Which pair is lost changes when sums are rounded in another order, so that seeds differ from run to "
        "run. The last rows are plain attention with an MLP on the query and a head, or two, for each of the 56 pairs.",
    ),
    "control": (
        "Nothing held out",
        "The same task is no problem for plain attention that has met every combination and has the heads for it.",
    ),
}
SMOLLM2 = """\
SmolLM2-135M-Instruct from 4-bit weights (see `benchmarks/real.py`), two solved lines before six scored ones. *Whole
answer*: every token is the most likely one; *first token*: the first is; *choice*: among the possible answers (of the
published tasks all answers of the task, of the sentences those that the line's facts allow). Per cent, with 95 % intervals
that count answers of one context as one cluster."""

if __name__ == "__main__":
    app()
