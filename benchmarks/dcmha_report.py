"""docs/dcmha.md out of the results of `benchmarks/dcmha.py`: tables, two figures, and no judgement beyond the numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from headlab.plots import save_html
from headlab.results import write

MEANING = {
    "mha": "plain multi-head attention",
    "mha-wide": "the same with a wider MLP: the parameters of `dynamic`",
    "dynamic": "query, query gate, key, key gate; pre and post; rank 2 (published default)",
    "static": "base only",
    "low-rank": "query and key, no gates",
    "gates": "query gate and key gate only",
    "query": "query and query gate only",
    "key": "key and key gate only",
    "pre": "scores only",
    "post": "probabilities only",
    "rank-1": "dynamic, rank 1",
    "rank-4": "dynamic, rank 4",
}
COLOURS = {"dynamic": "#d62728", "mha-wide": "#1f77b4"}
Row = dict[str, Any]


def write_report(results: Sequence[Path], docs: Path) -> Path:
    """Read result files (a later run of the same replaces an earlier one) and write the page and its figures."""
    rows = [row for path in results for row in read(path)]
    training = [row for row in rows if row["job"]["kind"] == "train"]
    sizes = {size: latest(row for row in training if row["job"]["size"] == size) for size in ("main", "small")}
    parts = [
        "# DCFormer next to plain multi-head attention, measured",
        intro(rows, training),
        *main_part(sizes["main"], docs),
        *variant_part(sizes["small"], docs),
        *speed_part([row for row in rows if row["job"]["kind"] == "speed"]),
        *memory_part([row for row in rows if row["job"]["kind"] == "memory"]),
    ]
    return write(docs / "dcmha.md", lambda file: file.write_text("\n\n".join(parts) + "\n", encoding="utf-8"))


def read(path: Path) -> list[Row]:
    lines = path.read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "job" in row]


def latest(rows: Iterable[Row]) -> dict[tuple[str, int], Row]:
    """By variant and seed.

    Raises:
        ValueError: they are not of one shape, so that they cannot be compared.
    """
    found = {(row["job"]["variant"], row["job"]["seed"]): row for row in rows}
    if len({json.dumps(row["job"]["shape"]) for row in found.values()}) > 1:
        raise ValueError("the results hold runs of different sizes or lengths: give the files of one study only")
    return found


def intro(rows: list[Row], training: list[Row]) -> str:
    machines = sorted({f"{row['where']['machine']}, torch {row['where']['torch']}" for row in rows})
    text = f"Made by `benchmarks/dcmha.py` on {'; '.join(machines)}. Everything is as measured. "
    text += "All models are DCFormer's network (RMSNorm, SwiGLU, rotary positions, norms of queries and keys, no local "
    text += "windows); without composition it is the plain multi-head attention (MHA) that it is compared with."
    if training:
        corpus = training[-1]["result"]["corpus"]
        train, valid = corpus["train"], corpus["valid"]
        text += (
            f"\n\nCorpus (`benchmarks/corpus.py`): English prose of {len(corpus.get('packages', []))} Debian documentation "
            f"packages, {train['pages']:,} pages with {train['tokens'] / 1e6:.1f} million tokens for training and "
            f"{valid['pages']:,} other pages with {valid['tokens'] / 1e6:.2f} million for validation, a vocabulary of "
            f"{corpus['vocabulary']:,}. Losses are means per token in nats on the same validation texts; bits per byte are "
            f"loss / ln 2 / {valid['bytes per token']:.3f} bytes per token."
        )
    return text


def shape_of(row: Row) -> str:
    shape, job = row["job"]["shape"], row["job"]
    dtype = "bfloat16 autocast" if job["dtype"] == "bfloat16" else job["dtype"]
    return (
        f"{shape['n_layers']} layers, {shape['d_model']} wide, {shape['n_heads']} heads of "
        f"{shape['d_model'] // shape['n_heads']}; {shape['steps']:,} steps of {shape['batch']} texts of {shape['seq']} "
        f"tokens, AdamW, peak learning rate {shape['lr']:g}, {dtype}, "
        f"backend `{job['backend']}`{', compiled' if job['compile'] else ''}"
    )


def main_part(runs: dict[tuple[str, int], Row], docs: Path) -> list[str]:
    if not runs:
        return []
    lines = []
    for (variant, seed), row in runs.items():
        result, shape = row["result"], row["job"]["shape"]
        loss = result["valid"][-1][1]
        a_step = shape["batch"] * shape["seq"]
        lines.append([
            f"`{variant}`", seed, f"{result['parameters']['all']:,}", f"{result['parameters']['maps']:,}", told_loss(result),
            f"{bits(loss, result):.4f}", ms(result["step s"]), f"{a_step / result['step s']['median']:,.0f}",
            gigabytes(result["peak bytes"]),
        ])  # fmt: skip
    header = [
        "variant", "seed", "parameters", "of them maps", "validation loss", "bits per byte", "ms a step (min-max)",
        "tokens/s", "peak GB",
    ]  # fmt: skip
    figure = go.Figure()
    for (variant, seed), row in runs.items():
        scale = row["job"]["shape"]["batch"] * row["job"]["shape"]["seq"] / 1e6
        style = {"color": COLOURS.get(variant), "width": 1}
        name = f"{variant}, seed {seed}"
        loss, valid = row["result"]["loss"], row["result"]["valid"][1:]
        figure.add_scatter(
            x=[s * scale for s, _ in loss], y=[y for _, y in loss], name=f"{name}, training", line=style, opacity=0.5
        )
        figure.add_scatter(
            x=[s * scale for s, _ in valid], y=[y for _, y in valid], name=f"{name}, validation", mode="lines+markers",
            line=style | {"width": 2.5},
        )  # fmt: skip
    lowest = min(y for row in runs.values() for _, y in row["result"]["loss"])
    figure.update_layout(
        xaxis_title="million tokens", yaxis_title="loss (nats per token)", template="plotly_white", margin={"t": 20}
    )
    figure.update_yaxes(range=[lowest - 0.2, lowest + 3])
    parts = ["## Training, the main pair", shape_of(next(iter(runs.values()))) + ".", table(header, lines)]
    for seed in sorted({seed for _, seed in runs}):
        ends = {variant: row["result"]["valid"][-1][1] for (variant, of), row in runs.items() if of == seed}
        if {"dynamic", "mha-wide"} <= set(ends):
            difference = ends["dynamic"] - ends["mha-wide"]
            parts.append(
                f"Seed {seed}: validation loss of `dynamic` minus that of `mha-wide`: {difference:+.4f} nats per token."
            )
    return [*parts, *notes(runs), picture(figure, docs, "dcmha-loss", "Loss in training and on the validation set")]


def variant_part(runs: dict[tuple[str, int], Row], docs: Path) -> list[str]:
    if not runs:
        return []
    seeds = sorted({seed for _, seed in runs})
    names = [variant for variant in MEANING if any(of == variant for of, _ in runs)]
    end = {key: row["result"]["valid"][-1][1] for key, row in runs.items()}
    lines, figure = [], go.Figure()
    base = {seed: end.get(("mha-wide", seed)) for seed in seeds}
    gaps: dict[str, list[float]] = {}
    for variant in names:
        of = [seed for seed in seeds if (variant, seed) in runs]
        result = runs[variant, of[-1]]["result"]
        losses = [end[variant, seed] for seed in of]
        gaps[variant] = [end[variant, seed] - base[seed] for seed in of if base[seed] is not None]
        times = sorted(runs[variant, seed]["result"]["step s"]["median"] for seed in of)
        lines.append([
            f"`{variant}`", MEANING[variant], f"{result['parameters']['all']:,}", f"{result['parameters']['maps']:,}",
            *(told_loss(runs[variant, seed]["result"]) if seed in of else "-" for seed in seeds),
            f"{sum(losses) / len(losses):.4f}",
            f"{sum(gaps[variant]) / len(gaps[variant]):+.4f}" if gaps[variant] else "-",
            " / ".join(f"{1000 * t:.1f}" for t in times),
        ])  # fmt: skip
        figure.add_scatter(
            x=gaps[variant], y=[variant] * len(gaps[variant]), mode="markers", name=variant, showlegend=False,
            marker={"size": 9, "color": COLOURS.get(variant, "#555")},
        )  # fmt: skip
    header = ["variant", "", "parameters", "of them maps", *(f"loss, seed {seed}" for seed in seeds)]
    header += ["mean", "against mha-wide", "ms a step"]
    apart = max((max(differences) - min(differences) for differences in gaps.values() if differences), default=0.0)
    title = "validation loss minus that of mha-wide, same seed (nats)"
    figure.update_layout(xaxis_title=title, template="plotly_white", margin={"t": 20})
    figure.update_yaxes(autorange="reversed", type="category")
    figure.add_vline(x=0, line_width=1)
    note = (
        f"From seed to seed, what a variant adds to `mha-wide` changes by up to {apart:.4f}: less than that tells nothing."
    )
    return [
        "## The variants",
        shape_of(next(iter(runs.values()))) + ".",
        table(header, lines),
        *([note] if len(seeds) > 1 else []),
        picture(figure, docs, "dcmha-variants", "What every variant adds, one dot a seed"),
    ]  # fmt: skip


def speed_part(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = []
    for row in rows:
        job, result, shape = row["job"], row["result"], row["job"]["shape"]
        lines.append([
            f"`{job['variant']}`", f"`{job['backend']}`{', compiled' if job['compile'] else ''}", ms(result["step s"]),
            *(ms(result.get(f"{what} s, {texts}")) for what in ("prefill", "decode") for texts in (1, 8)),
        ])  # fmt: skip
    header = [
        "variant",
        "backend",
        f"training step, {shape['batch']} x {shape['seq']}",
        "prefill, 1 text",
        "prefill, 8 texts",
    ]
    header += ["a token, 1 text", "a token, 8 texts"]
    return [
        "## Speed",
        f"The size of the main pair in {rows[0]['job']['dtype']}; 1,024 tokens in, 128 out, greedy, with a key-value cache. "
        "Milliseconds: median (fastest-slowest). `sdpa` is the same MHA network with PyTorch's fused attention (Qwen3 of "
        "transformers, whose weights and results are the same).",
        table(header, lines),
    ]


def memory_part(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    found = {tuple(row["job"][name] for name in ("dtype", "length", "variant", "backend")): row["result"] for row in rows}
    nothing = {"peak bytes": None, "s": None}
    lines = []
    for dtype, length in sorted({key[:2] for key in found}):
        eager, chunked, plain, half = (
            found.get((dtype, n, *name), nothing)
            for n, name in (
                (length, ("dynamic", "eager")), (length, ("dynamic", "chunked")), (length, ("mha", "eager")),
                (length // 2, ("dynamic", "chunked")),
            )
        )  # fmt: skip
        lines.append([
            dtype, f"{length:,}", *(megabytes(result["peak bytes"]) for result in (eager, chunked)),
            ratio(chunked, eager), ratio(chunked, half), megabytes(plain["peak bytes"]),
            *(ms(result["s"]) for result in (eager, chunked)),
        ])  # fmt: skip
    shape = rows[0]["job"]["shape"]
    header = [
        "dtype", "length", "eager MB", "chunked MB", "chunked / eager", "chunked against half the length", "MHA, eager MB",
        "eager ms", "chunked ms",
    ]  # fmt: skip
    return [
        "## Memory",
        f"Attention of one layer ({shape['heads']} heads of {shape['d_head']}, one text), forward and backward: the peak of "
        "allocated memory above queries, keys, values, the layer's input and weights. The aim was: chunked below a quarter "
        "of eager at 2,048, and at 4,096 at most 2.2 times what it needs at 2,048. `-`: not measured, or out of memory.",
        table(header, lines),
    ]


def table(header: list[str], lines: list[list[Any]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def notes(runs: dict[tuple[str, int], Row]) -> list[str]:
    """What is to be known of single runs, as whoever made them wrote into the results by hand (`note`)."""
    return [f"Note on `{variant}`, seed {seed}: {row['note']}." for (variant, seed), row in runs.items() if "note" in row]


def told_loss(result: Row) -> str:
    """The last on the validation set."""
    return f"{result['valid'][-1][1]:.4f}" + (f" (diverged at step {result['diverged']})" if result.get("diverged") else "")


def ms(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    return f"{1000 * spread['median']:.2f} ({1000 * spread['min']:.2f}-{1000 * spread['max']:.2f})"


def bits(loss: float, result: Row) -> float:
    return loss / 0.6931471805599453 / result["corpus"]["valid"]["bytes per token"]


def gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.1f}"


def ratio(one: Row, other: Row) -> str:
    sizes = one["peak bytes"], other["peak bytes"]
    return f"{sizes[0] / sizes[1]:.3f}" if all(sizes) else "-"


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f}"


def picture(figure: go.Figure, docs: Path, name: str, caption: str) -> str:
    """The figure as a PNG where plotly can make one (it needs kaleido and a browser), else as a page."""
    folder = docs / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    height = figure.layout.height or 480
    try:
        write(
            folder / f"{name}.png",
            lambda file: file.write_bytes(figure.to_image("png", width=900, height=height, scale=1.5)),
        )
    except (ImportError, ValueError, RuntimeError):
        save_html(figure, folder / f"{name}.html")
        return f"[{caption}](figures/{name}.html)"
    return f"![{caption}](figures/{name}.png)"
