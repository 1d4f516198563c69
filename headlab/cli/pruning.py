"""The commands that score, remove and prune heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..choices import Method, Policy, Reduction, Unit
from ..errors import HeadlabError
from . import results_folder
from .options import (
    BatchSize,
    Device,
    Examples,
    Filled,
    FillKind,
    Length,
    Model,
    Order,
    Out,
    Precision,
    Site,
    TextFile,
)

if TYPE_CHECKING:
    from torch import nn

    from ..scores import HeadScores

pruning = typer.Typer()


@pruning.command()
def score(
    model: Model,
    text: Annotated[Path | None, typer.Option("--text", "-t", help="Text file (not needed for a baseline).")] = None,
    out: Out = Path("results"),
    method: Method = "taylor",
    reduction: Reduction = "example",
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide by the layer's l2 norm.")] = False,
    site: Site = "output",
    fill: Filled = "zero",
    examples: Examples = 16,
    length: Length = 64,
    batch_size: BatchSize = 8,
    seed: int = 0,
    dtype: Precision = "auto",
    device: Device = "cpu",
) -> None:
    """Score every head by one forward and one backward pass (or by a baseline)."""
    from .. import plots
    from ..attribution.gradients import importance

    loaded = results_folder.open_model(model, dtype, device)
    data = None
    if method == "taylor":
        data = results_folder.batches(loaded, results_folder.needed(text), examples, length, batch_size, seed)
    scores = importance(
        loaded,
        data,
        method=method,
        reduction=reduction,
        normalize="layer" if normalize else None,
        fill=None if data is None else results_folder.fill(loaded, data, fill, out),
        site=site,
        seed=seed,
    )
    name = results_folder.named(f"scores-{method}", site)
    scores = results_folder.store(scores, out / f"{name}.json")
    plots.save_html(plots.heads(scores), out / f"{name}.html")
    _show_top(scores, out / f"{name}.json")


@pruning.command()
def ablate(
    model: Model,
    text: TextFile,
    out: Out = Path("results"),
    keep_one: Annotated[bool, typer.Option("--keep-one", help="Remove every other head of the layer instead.")] = False,
    by_size: Annotated[bool, typer.Option("--by-size", help="Score by the size of the change, not its value.")] = False,
    site: Site = "output",
    fill: Filled = "zero",
    examples: Examples = 16,
    length: Length = 64,
    batch_size: BatchSize = 8,
    seed: int = 0,
    dtype: Precision = "auto",
    device: Device = "cpu",
) -> None:
    """The exact change of the loss with each head removed. Goes on where it stopped."""
    from .. import plots
    from ..attribution.ablation import ablation

    loaded = results_folder.open_model(model, dtype, device)
    data = results_folder.batches(loaded, text, examples, length, batch_size, seed)
    name = results_folder.named("scores-keep-one" if keep_one else "scores-ablation", site)
    scores = ablation(
        loaded,
        data,
        keep_one=keep_one,
        order="size" if by_size else "value",
        fill=results_folder.fill(loaded, data, fill, out),
        site=site,
        log=out / f"{name}.log.jsonl",
    )
    scores = results_folder.store(scores, out / f"{name}.json")
    results_folder.write_csv(scores, out / f"{name}.csv")
    plots.save_html(plots.heads(scores), out / f"{name}.html")
    if (taylor := out / f"{results_folder.named('scores-taylor', site)}.json").exists() and not keep_one:
        figure = plots.against(results_folder.read_scores(taylor), scores)
        plots.save_html(figure, out / f"{results_folder.named('taylor-against-ablation', site)}.html")
    _show_top(scores, out / f"{name}.json")


@pruning.command()
def curve(
    model: Model,
    text: TextFile,
    out: Out = Path("results"),
    order: Annotated[Order, typer.Option(help="What goes first; taylor and ablation are read from the folder.")] = "taylor",
    reestimate: Annotated[bool, typer.Option("--reestimate", help="Score again (Taylor) before every step.")] = False,
    unit: Unit = "head",
    by_stack: Annotated[
        bool, typer.Option("--by-stack", help="Encoder, decoder and cross-attention apart, one curve each.")
    ] = False,
    site: Site = "output",
    steps: Annotated[int, typer.Option(min=1, help="Steps from the whole model to the last fraction.")] = 10,
    until: Annotated[float, typer.Option(help="The last fraction of heads removed.")] = 1.0,
    fill: Filled = "zero",
    examples: Examples = 16,
    length: Length = 64,
    batch_size: BatchSize = 8,
    seed: int = 0,
    dtype: Precision = "auto",
    device: Device = "cpu",
) -> None:
    """The loss against the share of heads removed. Goes on where it stopped."""
    from .. import plots
    from ..attribution.gradients import importance
    from ..pruning.curves import Curve, pruning_curve
    from ..studies.stacks import stack_curves

    if by_stack and site != "output":
        raise HeadlabError(f"--by-stack is for the output of heads, not for --site {site}")
    loaded = results_folder.open_model(model, dtype, device)
    data = results_folder.batches(loaded, text, examples, length, batch_size, seed)
    stand_in = results_folder.fill(loaded, data, fill, out)
    scores: HeadScores | Callable[[nn.Module], HeadScores]
    if reestimate:
        scores = lambda m: importance(m, data, fill=stand_in, site=site)  # noqa: E731
    else:
        scores = results_folder.ordered(loaded, order, site, seed, out)
    parts = ["reestimated" if reestimate else order, "group" if unit == "group" else "", "mean" if stand_in else ""]
    name = results_folder.named("-".join(filter(None, ["curve", *parts])), site)
    fractions = [until * step / steps for step in range(steps + 1)]
    options: dict[str, Any] = {"fill": stand_in, "unit": unit, "log": out / f"{name}.log.jsonl"}
    if by_stack:
        results = {f"{name}-{stack}": one for stack, one in stack_curves(loaded, scores, data, fractions, **options).items()}
    else:
        results = {name: pruning_curve(loaded, scores, data, fractions, site=site, **options)}
    for name, result in results.items():
        result = results_folder.store(result, out / f"{name}.json")
        results_folder.write_csv(result, out / f"{name}.csv")
        typer.echo(f"{name}: area {result.area:.4g}; written to {out / name}.json")
        typer.echo(result.to_frame().to_string(index=False, float_format="{:.4g}".format))
    found = {file.stem.removeprefix("curve-"): Curve.load(file) for file in sorted(out.glob("curve-*.json"))}
    plots.save_html(plots.curves(found), out / "curves.html")
    typer.echo(f"all curves of the folder are in {out / 'curves.html'}")


@pruning.command()
def prune(
    model: Model,
    out: Out = Path("results"),
    keep: Annotated[float, typer.Option(help="The share of heads (or groups) that stays.")] = 0.7,
    order: Annotated[Order, typer.Option(help="What goes first; taylor and ablation are read from the folder.")] = "taylor",
    unit: Unit = "head",
    at_least: Annotated[int, typer.Option(min=0, help="Units of every layer that stay in any case.")] = 0,
    gqa: Annotated[Policy, typer.Option(help="What to do where groups keep unequal numbers of query heads.")] = "pad",
    site: Site = "output",
    fill: Annotated[FillKind, typer.Option(help="zero, or the means that an earlier command measured.")] = "zero",
    to: Annotated[Path | None, typer.Option(help="Folder of the pruned model; by default OUT/pruned.")] = None,
    seed: int = 0,
    dtype: Precision = "auto",
    device: Device = "cpu",
) -> None:
    """Save a model without its least important heads. It opens with headlab.load, or transformers' from_pretrained."""
    from ..hooks.fills import Fill
    from ..models.access import tokenizer
    from ..pruning.surgery import deviation, kept, save_pruned
    from ..pruning.surgery import prune as pruned

    loaded = results_folder.open_model(model, dtype, device)
    scores = results_folder.ordered(loaded, order, site, seed, out)
    mask = scores.keep(keep, unit=unit, at_least=at_least)
    means = None if fill == "zero" else Fill.load(out / "fill-mean.safetensors")
    small = pruned(loaded, mask, means, gqa, site)
    difference = deviation(small, loaded, mask, means, site)
    target = to or out / results_folder.named("pruned", site)
    save_pruned(small, target, tokenizer(loaded))
    mask.save(out / f"{target.name}-mask.json")
    left = kept(small)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (loaded, small))
    typer.echo(left.to_string(index=False))
    typer.echo(
        f"{len(mask.removed)} of {len(mask)} heads removed: {left['slots'].sum()} query slots and {left['groups'].sum()} "
        f"key-value groups are left, {after:,} of {before:,} parameters; largest difference from the masked model "
        f"{difference:.1e}; written to {target}"
    )


@pruning.command()
def time(
    model: Model,
    out: Out = Path("results"),
    pruned: Annotated[Path | None, typer.Option(help="Folder of the pruned model; by default OUT/pruned.")] = None,
    sizes: Annotated[str, typer.Option(help="Examples x tokens, as in 1x64,16x256.")] = "1x64,4x64,16x64,16x256",
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes per size.")] = 10,
    dtype: Precision = "auto",
    device: Device = "cpu",
) -> None:
    """Parameters, bytes on disk and latency of the dense, masked and pruned model."""
    from .. import plots
    from ..models.access import heads
    from ..pruning.timing import shapes, timing
    from ..scores import HeadMask

    grid = _sizes(sizes)
    if (out / "timing.json").exists():
        raise HeadlabError(f"{out / 'timing.json'} is there already: move it away, or choose another --out")
    target = pruned or out / "pruned"
    dense = results_folder.open_model(model, dtype, device)
    small = results_folder.open_model(str(target), dtype, device)
    if (saved := out / f"{target.name}-mask.json").exists():
        mask = HeadMask.load(saved)
    else:
        mask = HeadMask.without(heads(dense), {str(head) for head in heads(dense)} - {str(head) for head in heads(small)})
    site = mask.record.get("scores", {}).get("site", "output")
    models = {"dense": dense, "masked": (dense, mask, site), "pruned": small}
    result = timing(models, shapes(dense, grid), repeats=repeats)
    result.save(out / "timing.json")
    results_folder.write_csv(result, out / "timing.csv")
    plots.save_html(plots.timing(result), out / "timing.html")
    typer.echo(result.to_frame().to_string(index=False, float_format="{:.4g}".format))
    typer.echo(f"medians of {repeats} passes on {result.record['device']}; written to {out / 'timing.json'}")


def _show_top(scores: HeadScores, path: Path) -> None:
    order = {str(head): score for head, score in scores.top(len(scores))}
    names = list(order)
    typer.echo("most important:  " + ", ".join(f"{name} {order[name]:.4g}" for name in names[:5]))
    typer.echo("least important: " + ", ".join(f"{name} {order[name]:.4g}" for name in names[:-6:-1]))
    typer.echo(f"{len(scores)} heads; written to {path}")


def _sizes(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(int(n) for n in part.split("x")) for part in text.split(",")]
        if all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
            return [(pair[0], pair[1]) for pair in pairs]
    except ValueError:
        pass
    raise HeadlabError(f"sizes are examples x tokens, as in 1x64,16x256, not {text!r}")
