"""`headlab tasks`: the tasks from the command line. Imports what it needs when a command runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthetic_tasks.language.contexts import Fact

from ..errors import HeadlabError
from . import results_folder
from .options import BatchSize, Device, Model, Out, Precision

if TYPE_CHECKING:
    from synthetic_tasks.evaluation.scoring import Evaluation
    from synthetic_tasks.language.contexts import Context

tasks = typer.Typer(
    help="Synthetic tasks, which ask for combinations of what is looked up and what is reported.", add_completion=False
)


Several = list[str] | None
Relation = Annotated[Several, typer.Option("--relation", help="Only tasks of this relation; may be given several times.")]
LookedUp = Annotated[Several, typer.Option("--looked-up", help="Only tasks that look this up; several times.")]
Reported = Annotated[Several, typer.Option("--reported", help="Only tasks that report this; several times.")]
Negation = Annotated[Several, typer.Option("--negation", help="Only tasks with this negation; several times.")]
Order = Annotated[Several, typer.Option("--order", help="Only tasks in this order; several times.")]
Contexts = Annotated[int | None, typer.Option(min=1, help="Contexts per task; by default 4 (of a published file all).")]
Shots = Annotated[int | None, typer.Option(min=0, help="Solved lines before the scored ones; by default 2.")]
Scored = Annotated[int | None, typer.Option(min=1, help="Scored lines in a context; by default 6.")]
Records = Annotated[int | None, typer.Option(min=2, help="Facts on a line; by default 3.")]
Lexicon = Annotated[Path | None, typer.Option(help="Your own words and sentence patterns, a TOML file.")]
Seed = Annotated[int | None, typer.Option(help="What sentences are drawn by; by default 0.")]


@tasks.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@tasks.command()
def evaluate(
    model: Model,
    published: Annotated[
        str | None, typer.Option("--published", metavar="FILE_OR_URL", help="The task file of DCFormer, or one of its form.")
    ] = None,
    sentences: Annotated[
        bool, typer.Option("--sentences", help="Sentences made here (InContextTasks); the default.")
    ] = False,
    out: Out = Path("results"),
    relation: Relation = None,
    looked_up: LookedUp = None,
    reported: Reported = None,
    negation: Negation = None,
    order: Order = None,
    contexts: Contexts = None,
    shots: Shots = None,
    scored: Scored = None,
    records: Records = None,
    lexicon: Lexicon = None,
    seed: Seed = None,
    mask: Annotated[Path | None, typer.Option(help="A mask (JSON): which heads are left out.")] = None,
    attention: Annotated[Fact | None, typer.Option(help="Also measure every head's attention to this part.")] = None,
    batch_size: BatchSize = 8,
    dtype: Precision = "auto",
    device: Device = "cpu",
) -> None:
    """How many answers a language model gets right, by what the tasks are made of. Goes on where it stopped."""
    from synthetic_tasks.evaluation import scoring

    from .. import plots
    from ..hooks.masking import masked
    from ..scores import HeadMask

    filters = {"relation": relation, "looked_up": looked_up, "reported": reported, "negation": negation, "order": order}
    sizes = {"shots": shots, "scored": scored, "records": records, "lexicon": lexicon, "seed": seed}
    if published is not None:
        if given := [f"--{name}" for name, value in {"sentences": sentences or None, **sizes}.items() if value is not None]:
            raise HeadlabError(f"{', '.join(given)} and --published do not go together: the file says what there is")
        found = _published(published, filters, contexts)
    else:
        found = _sentences(filters, sizes, contexts)
    if attention and not any(getattr(answer, attention) for context in found for answer in context.answers):
        raise HeadlabError(f"these texts do not say where the {attention} is: leave --attention out, or take --sentences")
    gates = None if mask is None else HeadMask.load(mask)
    site = "output" if gates is None else gates.record.get("scores", {}).get("site", "output")  # where its scores were taken
    loaded = results_folder.open_model(model, dtype, device)
    if gates is not None:
        with masked(loaded, gates, site=site):  # a mask of another model is an error before there is a log
            pass
    kind = "tasks-sentences" if published is None else "tasks-published"
    name = kind if mask is None else f"{kind}-{mask.stem}"
    log = out / f"{name}.log.jsonl"
    result = scoring.evaluate(loaded, found, mask=gates, site=site, batch_size=batch_size, log=log)
    result = results_folder.store(result, out / f"{name}.json")
    results_folder.write_csv(result, out / f"{name}.csv")
    factors = [*dict.fromkeys(factor for row in result.lines for factor in row["factors"]), "difficulty"]
    alike = _alike(result, kind, out)
    several = alike if len(alike) > 1 else result
    measures = ["all", "choice"] if len(alike) > 1 else ["all", "first", "choice"]
    plots.save_html(plots.tasks(several, factors, measures), out / f"{kind}.html")
    plots.save_html(plots.tasks(result, "task", ["all", "choice"]), out / f"{name}-by-task.html")
    typer.echo(_table(result, factors))
    typer.echo(f"{result!r}; written to {out / name}.json, figures to {out / kind}.html and {out / name}-by-task.html")
    if attention:
        _attend(loaded, found, attention, gates, site, batch_size, out / name.replace("tasks", f"attention-{attention}"))


@tasks.command()
def write(
    to: Annotated[Path, typer.Option("--to", help="The file, of JSON lines; it must not be there yet.")],
    relation: Relation = None,
    looked_up: LookedUp = None,
    reported: Reported = None,
    negation: Negation = None,
    order: Order = None,
    contexts: Contexts = None,
    shots: Shots = None,
    scored: Scored = None,
    records: Records = None,
    lexicon: Lexicon = None,
    seed: Seed = None,
) -> None:
    """Write sentences to a file: a line per context with its text, and its answers with their choices and places."""
    import json
    from dataclasses import asdict

    from ..results import write as write_file

    if to.exists():
        raise HeadlabError(f"{to} is there already: move it away, or choose another file")
    filters = {"relation": relation, "looked_up": looked_up, "reported": reported, "negation": negation, "order": order}
    sizes = {"shots": shots, "scored": scored, "records": records, "lexicon": lexicon, "seed": seed}
    found = _sentences(filters, sizes, contexts)
    lines = "".join(json.dumps(asdict(context), ensure_ascii=False) + "\n" for context in found)
    write_file(to, lambda file: file.write_text(lines, encoding="utf-8"))
    n_answers = sum(len(context.answers) for context in found)
    n_tasks = len({context.task for context in found})
    typer.echo(f"{len(found)} contexts of {n_tasks} tasks, with {n_answers} scored answers; written to {to}")


@tasks.command()
def probe(
    study: Annotated[
        Several,
        typer.Option("--study", help="main (default), kinds, heads, features, records, d_head, held_out ...; several."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="full or small; by default small on the cpu.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many of every setting.")] = 5,
    out: Out = Path("results"),
    device: Device = "cpu",
) -> None:
    """Train probes of plain attention and of composed heads, and draw what they make of unseen combinations. Can go on."""
    from synthetic_tasks.probes.benchmark import ProbeResults
    from synthetic_tasks.probes.benchmark import study as run
    from synthetic_tasks.probes.studies import AXES

    from .. import plots

    results_folder.check_device(device)
    names = list(dict.fromkeys(study or ["main"]))
    chosen = size or ("small" if device == "cpu" else "full")
    for name in names:  # before hours of training
        if (file := out / f"probes-{name}.json").exists():
            there = ProbeResults.load(file).record
            if (there.get("size"), there.get("seeds")) != (chosen, seeds):
                raise HeadlabError(
                    f"{file} holds probes of size {there.get('size')} and {there.get('seeds')} seeds, not {chosen} and "
                    f"{seeds}: choose another --out"
                )
    results = run(names, chosen, seeds=seeds, device=device, log=out / f"probes-{chosen}.log.jsonl")
    for name in names:
        of = results.of(name)
        of = results_folder.store(of, out / f"probes-{name}.json")
        results_folder.write_csv(of, out / f"probes-{name}.csv")
        figure = plots.probes(of, name) if name in AXES else plots.probe_kinds(of)
        plots.save_html(figure, out / f"probes-{name}.html")
        table = of.summary()
        changing = [column for column in _SETTINGS if table[column].nunique() > 1]
        table = table[["level", "kind", "heads", *changing, "parameters", *_REACHED]]
        typer.echo(f"{name}\n{table.to_string(index=False, float_format='{:.3g}'.format)}")
    typer.echo(f"{len(results.lines)} probes; written to {out / 'probes-STUDY.json, .csv and .html'}")


_SETTINGS = (
    "first", "features", "records", "d_head", "held_out", "shared_values", "mlp", "layers", "rank", "steps", "hold",
    "weight_decay",
)  # fmt: skip
_REACHED = ("seen_mean", "seen_min", "test_mean", "test_min", "test_max", "mapped_test")


def _sentences(filters: Mapping[str, Several], sizes: Mapping[str, Any], contexts: int | None) -> list[Context]:
    from synthetic_tasks.language.in_context import InContextTasks

    kept = {"relations" if name == "relation" else name: values or None for name, values in filters.items()}
    made = InContextTasks(**kept, **{name: value for name, value in sizes.items() if value is not None})  # type: ignore[arg-type]
    return made.sample(contexts or 4)


def _published(source: str, filters: Mapping[str, Several], contexts: int | None) -> list[Context]:
    """Contexts of the file with these values; the first ones of every task."""
    from synthetic_tasks.language.published import published_tasks

    found = published_tasks(source)
    for name, wanted in filters.items():
        if not wanted:
            continue
        known = dict.fromkeys(context.factors[name] for context in found if name in context.factors)
        if unknown := [value for value in wanted if value not in known]:
            raise HeadlabError(f"no task has the {name} {unknown[0]!r}; possible here: {', '.join(known) or 'none'}")
        found = [context for context in found if context.factors.get(name) in wanted]
    seen: dict[str, int] = {}
    kept = []
    for context in found:
        seen[context.task] = seen.get(context.task, 0) + 1
        if contexts is None or seen[context.task] <= contexts:
            kept.append(context)
    return kept


def _alike(result: Evaluation, kind: str, out: Path) -> dict[str, Evaluation]:
    """What the folder has on the same questions, under masks and without."""
    found = {}
    for file in sorted(out.glob(f"{kind}*.json"), key=lambda file: file.stem):
        one = type(result).load(file)
        if one.record["data"] == result.record["data"]:
            found[file.stem.removeprefix(kind).removeprefix("-") or "whole model"] = one
    return found


def _table(result: Evaluation, factors: list[str]) -> str:
    """Per cent right with intervals: everything, then by one factor after the other."""
    import pandas as pd

    lines = []
    for factor in [None, *factors]:
        for line in (result.by(factor) if factor else result.by()).to_dict("records"):
            value = line[factor] if factor else "answers"
            value = "none" if value is None or value != value else f"{value:g}" if isinstance(value, float) else value
            shown = {"factor": factor or "all", "value": value}
            shown |= {"n": line["n"], "contexts": line["contexts"]}
            for measure in ("all", "first", "choice"):
                share, low, high = (100 * line[measure + end] for end in ("", "_low", "_high"))
                shown[f"{measure} (%)"] = f"{share:.1f} ({low:.1f} to {high:.1f})"
            lines.append(shown | {"chance (%)": f"{100 * line['chance']:.1f}"})
    return str(pd.DataFrame(lines).to_string(index=False))


def _attend(model: Any, contexts: list[Context], part: Fact, mask: Any, site: str, batch_size: int, path: Path) -> None:
    from contextlib import nullcontext

    from synthetic_tasks.evaluation.attention import attention_on

    from .. import plots
    from ..hooks.masking import masked

    with nullcontext() if mask is None else masked(model, mask, site=site):
        scores = attention_on(model, contexts, part=part, batch_size=batch_size)
    if mask is not None:
        scores.record.update(mask=[row.tolist() for row in mask.rows], site=site)
    file = path.with_name(f"{path.name}.json")
    scores = results_folder.store(scores, file)
    plots.save_html(plots.heads(scores, f"Attention on the {part}"), path.with_name(f"{path.name}.html"))
    best = ", ".join(f"{head} {100 * share:.1f} %" for head, share in scores.top(5))
    typer.echo(f"most attention on the {part}: {best}; written to {file}")
