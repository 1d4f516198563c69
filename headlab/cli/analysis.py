"""The commands that look at heads: their circuits, roles and maps; studies over data and training; the report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ..choices import Circuit, Norm
from ..errors import HeadlabError
from . import results_folder
from .options import BatchSize, Device, Examples, Length, Model, Out, Precision, TextFile

if TYPE_CHECKING:
    from ..data.batches import Batch

CIRCUITS: tuple[Circuit, ...] = get_args(Circuit)
analysis = typer.Typer()
Prompt = typer.Option("--prompt", "-p", help="A text (token numbers without a tokenizer); several may be given.")
Checkpoints = Annotated[Path, typer.Argument(help="The folder of a training run, with a model in each folder inside.")]
Scores = Annotated[Path, typer.Argument(help="A file of scores, as in results/scores-ablation.json.")]


@analysis.command()
def circuits(
    model: Model,
    out: Out = Path("results"),
    norm: Annotated[Norm, typer.Option(help="fold the gains of the norms into the weights, or leave them raw.")] = "fold",
    head: Annotated[
        list[str] | None, typer.Option("--head", help="Also read this head's directions as tokens, as in L3H5; several.")
    ] = None,
    dtype: Precision = "auto",
    device: Device = "cpu",
) -> None:
    """What every head looks for (QK) and carries (OV), and how heads feed each other. Goes on where it stopped."""
    from .. import plots
    from ..circuits.composition import CompositionScores, composition_scores, map_composition
    from ..circuits.summary import CircuitTable, circuit_table
    from ..circuits.tokens import directions
    from ..models.access import heads, rows

    loaded = results_folder.open_model(model, dtype, device)
    known = {str(found): found for found in heads(loaded)}
    if unknown := [name for name in head or [] if name not in known]:
        raise HeadlabError(f"the model has no head {unknown[0]}; its heads are {next(iter(known))} to {list(known)[-1]}")
    table = results_folder.once(CircuitTable, out / "circuits.json", loaded, lambda: circuit_table(loaded, norm), norm=norm)
    results_folder.write_csv(table, out / "circuits.csv")
    if table.known("copying"):
        plots.save_html(plots.heads(table.scores("copying")), out / "circuits-copying.html")
    for circuit in CIRCUITS:
        plots.save_html(plots.spectra(table, circuit), out / f"circuits-{circuit}.html")
    scored: dict[str, Callable[[], CompositionScores]] = {}
    if len({row.stack for row in rows(loaded)}) == 1:  # between stacks they would mean nothing
        scored |= {kind: partial(composition_scores, loaded, kind, norm) for kind in ("Q", "K", "V")}
    if any(row.compose is not None for row in rows(loaded)):
        scored["M"] = partial(map_composition, loaded, norm)
    for kind, make in scored.items():
        found = results_folder.once(CompositionScores, out / f"composition-{kind}.json", loaded, make, norm=norm)
        plots.save_html(plots.composition_matrix(found), out / f"composition-{kind}.html")
        plots.save_html(plots.composition_graph(found), out / f"composition-{kind}-graph.html")
        typer.echo(f"{kind}-composition: " + "; ".join(map(str, found.top(3))))
    for name in head or []:
        one = known[name]
        for circuit in CIRCUITS:
            read = directions(loaded, one.layer, one.index, circuit, norm=norm, stack=one.stack)
            read = results_folder.store(read, out / f"directions-{name}-{circuit}.json")
            plots.save_html(plots.tokens_of(read), out / f"directions-{name}-{circuit}.html")
    typer.echo(f"{len(known)} heads; written to {out / 'circuits.json'}")


@analysis.command()
def roles(
    model: Model,
    text: Annotated[
        Path | None, typer.Option("--text", "-t", help="Text file; without one, roles are measured on random tokens only.")
    ] = None,
    prompt: Annotated[list[str] | None, Prompt] = None,
    out: Out = Path("results"),
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of random tokens, for induction and copies.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Their length.")] = 256,
    examples: Examples = 16,
    length: Length = 64,
    batch_size: BatchSize = 8,
    seed: int = 0,
    dtype: Precision = "auto",
    device: Device = "cpu",
) -> None:
    """Where heads look: their roles, their patterns' statistics, which heads are alike; and patterns on prompts."""
    from .. import plots
    from ..attention.prompts import attention_patterns
    from ..attention.roles import PatternStats, Roles
    from ..attention.roles import patterns as measured
    from ..attention.roles import roles as found_in
    from ..attention.similarity import Similarity, similarity

    loaded = results_folder.open_model(model, dtype, device)
    drawn = [
        attention_patterns(loaded, one) for one in results_folder.prompts(loaded, prompt or [])
    ]  # a bad prompt is told first
    data = None if text is None else results_folder.batches(loaded, text, examples, length, batch_size, seed)
    asked = {"sequences": sequences, "length": tokens, "seed": seed}
    make = partial(found_in, loaded, data, sequences=sequences, length=tokens, seed=seed)
    found = results_folder.once(Roles, out / "roles.json", loaded, make, asked=asked, data=_told(data))
    results_folder.write_csv(found, out / "roles.csv")
    plots.save_html(plots.roles(found), out / "roles.html")
    if data is not None:
        stats = results_folder.once(
            PatternStats, out / "patterns.json", loaded, partial(measured, loaded, data), data=_told(data)
        )
        results_folder.write_csv(stats, out / "patterns.csv")
        alike = results_folder.once(
            Similarity, out / "similarity.json", loaded, partial(similarity, loaded, data), data=_told(data)
        )
        plots.save_html(plots.similarity(alike), out / "similarity.html")
        plots.save_html(plots.similarity_matrix(alike), out / "similarity-matrix.html")
    for number, pattern in enumerate(drawn, 1):
        pattern = results_folder.store(pattern, out / f"attention-{number}.safetensors")
        plots.save_html(plots.pattern(pattern), out / f"attention-{number}.html")
    typer.echo(str(found))
    typer.echo(f"written to {out / 'roles.json'}; figures beside it, as in {out / 'roles.html'}")


def _told(data: list[Batch] | None) -> dict[str, Any] | None:
    """What a record says of the data; None without any."""
    from ..data.batches import describe_data

    return None if data is None else describe_data(data)


@analysis.command()
def maps(
    model: Model,
    prompt: Annotated[list[str], Prompt],
    out: Out = Path("results"),
    layer: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="Also draw this layer's mean maps; may be given several times.")
    ] = None,
    dtype: Precision = "auto",
    device: Device = "cpu",
) -> None:
    """Read the composition maps of a model with composed heads (DCMHA) on prompts."""
    from .. import plots
    from ..dcmha.maps import composition_maps
    from ..results import write

    loaded = results_folder.open_model(model, dtype, device)
    found = composition_maps(loaded, results_folder.prompts(loaded, prompt))
    drawn = {number: plots.maps(found, number) for number in layer or []}  # an unknown layer is an error before any file is
    found = results_folder.store(found, out / "maps.safetensors")
    results_folder.write_csv(found, out / "maps.csv")
    write(out / "maps-mean.csv", lambda file: found.weights().to_csv(file, index=False))
    plots.save_html(plots.maps(found), out / "maps.html")
    for number, figure in drawn.items():
        plots.save_html(figure, out / f"maps-layer{number}.html")
    columns = ["layer", "stage", "heads_from", "heads_to", "distance", "explained_by_query"]
    typer.echo(found.to_frame()[columns].to_string(index=False, float_format="{:.3g}".format))
    typer.echo("strongest links (scores of one head, output of another): " + ", ".join(map(str, found.top(5))))
    typer.echo(f"{found.record['data']['tokens']} tokens; written to {out / 'maps.safetensors'}")


@analysis.command()
def correlate(
    first: Scores,
    second: Scores,
    out: Out = Path("results"),
    names: Annotated[str, typer.Option(help="What to call the two data sets, as in news,tales.")] = "first data,second data",
) -> None:
    """How well the scores of heads on one set of data agree with those on another (two files of score or ablate)."""
    from .. import plots
    from ..scores import HeadScores
    from ..studies.correlation import correlate as correlation

    called = [name.strip() for name in names.split(",")]
    if len(called) != 2 or not all(called):
        raise HeadlabError(f"names are two, with a comma between them, as in news,tales, not {names!r}")
    found = correlation(HeadScores.load(first), HeadScores.load(second), (called[0], called[1]))
    found = results_folder.store(found, out / "correlation.json")
    if found.names != (called[0], called[1]):
        here, there = out / "correlation.json", " and ".join(found.names)
        raise HeadlabError(f"{here} calls the data {there}: give the same --names, or choose another --out")
    results_folder.write_csv(found, out / "correlation.csv")
    plots.save_html(plots.correlation(found), out / "correlation.html")
    typer.echo(found.to_frame().to_string(index=False, float_format="{:.3g}".format))
    if found.r is None:
        typer.echo("not defined over all heads: there are fewer than three, or all have the same score")
    if found.record["first"].get("data") == found.record["second"].get("data") is not None:
        typer.echo("note: both scores are of the same data")
    typer.echo(f"written to {out / 'correlation.json'}")


@analysis.command()
def profile(
    checkpoints: Checkpoints,
    text: TextFile,
    out: Out = Path("results"),
    scoring: Annotated[
        Path | None, typer.Option(help="What heads are scored on, if not on the text that the curves are measured on.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Score by exact removal, not by gradients.")] = False,
    examples: Examples = 16,
    length: Length = 64,
    batch_size: BatchSize = 8,
    seed: int = 0,
    device: Device = "cpu",
) -> None:
    """When heads become redundant: scores and a pruning curve for every checkpoint of a training run. Can be resumed."""
    from .. import plots
    from ..studies.checkpoints import checkpoint_folders
    from ..studies.checkpoints import profile as over_training

    found = checkpoint_folders(checkpoints)
    first = results_folder.open_model(str(found[0]), "auto", device)
    data, other = (
        None if file is None else results_folder.batches(first, file, examples, length, batch_size, seed)
        for file in (text, scoring)
    )
    method = "ablation" if exact else "taylor"
    log = out / "profile.log.jsonl"
    result = over_training(found, data, scoring=other, method=method, log=log, device=device)  # type: ignore[arg-type]
    result = results_folder.store(result, out / "profile.json")
    results_folder.write_csv(result, out / "profile.csv")
    plots.save_html(plots.profile(result), out / "profile.html")
    shares = zip(result.names, result.removable(0.1), strict=True)
    typer.echo("heads that can go for 0.1 nats of loss: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))
    typer.echo(f"{len(found)} checkpoints; written to {out / 'profile.json'}")


@analysis.command()
def report(
    results: Annotated[Path, typer.Argument(help="The folder of results that other commands wrote.", metavar="FOLDER")],
    to: Annotated[Path | None, typer.Option(help="The page; by default FOLDER/report.html.")] = None,
) -> None:
    """One page with everything in a folder of results, to open by double click or to send."""
    from ..report_page.build import written

    results_folder.quieten()
    page, found = written(results, to)
    for told, what in (("could not be shown whole", found.problems), ("not in the folder yet", found.missing)):
        if what:
            names = dict.fromkeys(one.get("file") or one["what"] for one in what)
            typer.echo(f"{told}: {', '.join(names)} (the page says more)")
    typer.echo(f"written to {page}")
