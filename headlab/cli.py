"""The command line. Every command reads and writes one folder; a result that is there is never replaced."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthetic_tasks.commands import tasks

from . import folder
from .errors import HeadlabError
from .inspection import inspection
from .options import (
    BatchSize,
    Device,
    Dtype,
    Examples,
    Filled,
    FillKind,
    Gqa,
    Length,
    Method,
    Model,
    Order,
    Out,
    Precision,
    Reduction,
    Site,
    Text,
    Unit,
)

if TYPE_CHECKING:
    from torch import nn

    from .scores import HeadScores

app = typer.Typer(
    help="Attention heads of transformers: see what they do, score them, remove them one by one, prune the model, time it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(inspection)
app.add_typer(tasks, name="tasks")


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    out: Out = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Half the training.")] = False,
    seed: int = 0,
) -> None:
    """Train a probe of plain attention and one of composed heads, compare them on what neither has met, prune the second."""
    from synthetic_tasks.demo import run

    folder.quieten()
    typer.echo(run(out, quick, seed))
    typer.echo(f"Everything is in {out}: begin with {out / 'summary.md'} and {out / 'probes.html'}.")


@app.command()
def score(
    model: Model,
    text: Annotated[Path | None, typer.Option("--text", "-t", help="Text file (not needed for a baseline).")] = None,
    out: Out = Path("results"),
    method: Method = Method.taylor,
    reduction: Reduction = Reduction.example,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide by the layer's l2 norm.")] = False,
    site: Site = "output",
    fill: Filled = FillKind.zero,
    examples: Examples = 16,
    length: Length = 64,
    batch_size: BatchSize = 8,
    seed: int = 0,
    dtype: Precision = Dtype.auto,
    device: Device = "cpu",
) -> None:
    """Score every head by one forward and one backward pass (or by a baseline)."""
    from . import plots
    from .attribution.gradients import importance

    loaded = folder.open_model(model, dtype, device)
    data = None
    if method is Method.taylor:
        data = folder.batches(loaded, folder.needed(text), examples, length, batch_size, seed)
    scores = importance(
        loaded,
        data,
        method=method.value,
        reduction=reduction.value,
        normalize="layer" if normalize else None,
        fill=None if data is None else folder.fill(loaded, data, fill, out),
        site=site,
        seed=seed,
    )
    name = folder.named(f"scores-{method}", site)
    scores = folder.store(scores, out / f"{name}.json")
    plots.save_html(plots.heads(scores), out / f"{name}.html")
    _show_top(scores, out / f"{name}.json")


@app.command()
def ablate(
    model: Model,
    text: Text,
    out: Out = Path("results"),
    keep_one: Annotated[bool, typer.Option("--keep-one", help="Remove every other head of the layer instead.")] = False,
    by_size: Annotated[bool, typer.Option("--by-size", help="Score by the size of the change, not its value.")] = False,
    site: Site = "output",
    fill: Filled = FillKind.zero,
    examples: Examples = 16,
    length: Length = 64,
    batch_size: BatchSize = 8,
    seed: int = 0,
    dtype: Precision = Dtype.auto,
    device: Device = "cpu",
) -> None:
    """The exact change of the loss with each head removed. Goes on where it stopped."""
    from . import plots
    from .attribution.ablation import ablation

    loaded = folder.open_model(model, dtype, device)
    data = folder.batches(loaded, text, examples, length, batch_size, seed)
    name = folder.named("scores-keep-one" if keep_one else "scores-ablation", site)
    scores = ablation(
        loaded,
        data,
        keep_one=keep_one,
        order="size" if by_size else "value",
        fill=folder.fill(loaded, data, fill, out),
        site=site,
        log=out / f"{name}.log.jsonl",
    )
    scores = folder.store(scores, out / f"{name}.json")
    folder.write_csv(scores, out / f"{name}.csv")
    plots.save_html(plots.heads(scores), out / f"{name}.html")
    if (taylor := out / f"{folder.named('scores-taylor', site)}.json").exists() and not keep_one:
        figure = plots.against(folder.read_scores(taylor), scores)
        plots.save_html(figure, out / f"{folder.named('taylor-against-ablation', site)}.html")
    _show_top(scores, out / f"{name}.json")


@app.command()
def curve(
    model: Model,
    text: Text,
    out: Out = Path("results"),
    order: Annotated[
        Order, typer.Option(help="What goes first; taylor and ablation are read from the folder.")
    ] = Order.taylor,
    reestimate: Annotated[bool, typer.Option("--reestimate", help="Score again (Taylor) before every step.")] = False,
    unit: Unit = Unit.head,
    by_stack: Annotated[
        bool, typer.Option("--by-stack", help="Encoder, decoder and cross-attention apart, one curve each.")
    ] = False,
    site: Site = "output",
    steps: Annotated[int, typer.Option(min=1, help="Steps from the whole model to the last fraction.")] = 10,
    until: Annotated[float, typer.Option(help="The last fraction of heads removed.")] = 1.0,
    fill: Filled = FillKind.zero,
    examples: Examples = 16,
    length: Length = 64,
    batch_size: BatchSize = 8,
    seed: int = 0,
    dtype: Precision = Dtype.auto,
    device: Device = "cpu",
) -> None:
    """The loss against the share of heads removed. Goes on where it stopped."""
    from . import plots
    from .attribution.gradients import importance
    from .pruning.curves import Curve, pruning_curve
    from .studies.stacks import stack_curves

    if by_stack and site != "output":
        raise HeadlabError(f"--by-stack is for the output of heads, not for --site {site}")
    loaded = folder.open_model(model, dtype, device)
    data = folder.batches(loaded, text, examples, length, batch_size, seed)
    stand_in = folder.fill(loaded, data, fill, out)
    scores: HeadScores | Callable[[nn.Module], HeadScores]
    if reestimate:
        scores = lambda m: importance(m, data, fill=stand_in, site=site)  # noqa: E731
    else:
        scores = folder.ordered(loaded, order, site, seed, out)
    parts = ["reestimated" if reestimate else order, "group" if unit is Unit.group else "", "mean" if stand_in else ""]
    name = folder.named("-".join(filter(None, ["curve", *parts])), site)
    fractions = [until * step / steps for step in range(steps + 1)]
    options: dict[str, Any] = {"fill": stand_in, "unit": unit.value, "log": out / f"{name}.log.jsonl"}
    if by_stack:
        results = {f"{name}-{stack}": one for stack, one in stack_curves(loaded, scores, data, fractions, **options).items()}
    else:
        results = {name: pruning_curve(loaded, scores, data, fractions, site=site, **options)}
    for name, result in results.items():
        result = folder.store(result, out / f"{name}.json")
        folder.write_csv(result, out / f"{name}.csv")
        typer.echo(f"{name}: area {result.area:.4g}; written to {out / name}.json")
        typer.echo(result.to_frame().to_string(index=False, float_format="{:.4g}".format))
    found = {file.stem.removeprefix("curve-"): Curve.load(file) for file in sorted(out.glob("curve-*.json"))}
    plots.save_html(plots.curves(found), out / "curves.html")
    typer.echo(f"all curves of the folder are in {out / 'curves.html'}")


@app.command()
def prune(
    model: Model,
    out: Out = Path("results"),
    keep: Annotated[float, typer.Option(help="The share of heads (or groups) that stays.")] = 0.7,
    order: Annotated[
        Order, typer.Option(help="What goes first; taylor and ablation are read from the folder.")
    ] = Order.taylor,
    unit: Unit = Unit.head,
    at_least: Annotated[int, typer.Option(min=0, help="Units of every layer that stay in any case.")] = 0,
    gqa: Annotated[Gqa, typer.Option(help="What to do where groups keep unequal numbers of query heads.")] = Gqa.pad,
    site: Site = "output",
    fill: Annotated[FillKind, typer.Option(help="zero, or the means that an earlier command measured.")] = FillKind.zero,
    to: Annotated[Path | None, typer.Option(help="Folder of the pruned model; by default OUT/pruned.")] = None,
    seed: int = 0,
    dtype: Precision = Dtype.auto,
    device: Device = "cpu",
) -> None:
    """Save a model without its least important heads. It opens with headlab.load, or transformers' from_pretrained."""
    import torch

    from .hooks.fills import Fill
    from .hooks.masking import masked
    from .models.access import inner, probe_batch, tokenizer
    from .pruning.surgery import kept, save_pruned
    from .pruning.surgery import prune as pruned

    loaded = folder.open_model(model, dtype, device)
    scores = folder.ordered(loaded, order, site, seed, out)
    mask = scores.keep(keep, unit=unit.value, at_least=at_least)
    means = None if fill is FillKind.zero else Fill.load(out / "fill-mean.safetensors")
    small = pruned(loaded, mask, means, gqa.value, site)
    batch = probe_batch(loaded)
    with torch.inference_mode():
        with masked(loaded, mask, means, site):
            expected = inner(loaded)(**batch)[0]
        difference = (inner(small)(**batch)[0] - expected).abs().max().item()
    target = to or out / folder.named("pruned", site)
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


@app.command()
def time(
    model: Model,
    out: Out = Path("results"),
    pruned: Annotated[Path | None, typer.Option(help="Folder of the pruned model; by default OUT/pruned.")] = None,
    sizes: Annotated[str, typer.Option(help="Examples x tokens, as in 1x64,16x256.")] = "1x64,4x64,16x64,16x256",
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes per size.")] = 10,
    dtype: Precision = Dtype.auto,
    device: Device = "cpu",
) -> None:
    """Parameters, bytes on disk and latency of the dense, masked and pruned model."""
    from . import plots
    from .models.access import heads
    from .pruning.timing import shapes, timing
    from .scores import HeadMask

    grid = _sizes(sizes)
    if (out / "timing.json").exists():
        raise HeadlabError(f"{out / 'timing.json'} is there already: move it away, or choose another --out")
    target = pruned or out / "pruned"
    dense = folder.open_model(model, dtype, device)
    small = folder.open_model(str(target), dtype, device)
    if (saved := out / f"{target.name}-mask.json").exists():
        mask = HeadMask.load(saved)
    else:
        mask = HeadMask.without(heads(dense), {str(head) for head in heads(dense)} - {str(head) for head in heads(small)})
    site = mask.record.get("scores", {}).get("site", "output")
    models = {"dense": dense, "masked": (dense, mask, site), "pruned": small}
    result = timing(models, shapes(dense, grid), repeats=repeats)
    result.save(out / "timing.json")
    folder.write_csv(result, out / "timing.csv")
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


STOPPED = 130  # exit status after Ctrl-C, by convention 128 + the signal's number


def main() -> None:
    """Run the command line; an error is one line on stderr and exit status 1, never a traceback."""
    try:
        status = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        status = STOPPED
    except HeadlabError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer's, whose classes are private
            _fail(f"{error.format_message()} (headlab --help tells more)", 2)
        if "HEADLAB_DEBUG" in os.environ:
            raise
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or "memory" in str(error):
            _fail(f"out of memory: take fewer or shorter examples (--batch-size, --length); {what}", 1)
        _fail(f"unexpected {what} (HEADLAB_DEBUG=1 shows where)", 1)
    if status == STOPPED:  # which is also how typer reports Ctrl-C
        _fail("stopped; run the same command again to go on", STOPPED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    sys.stderr.write(f"headlab: {' '.join(message.split())}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
