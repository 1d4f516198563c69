"""docs/sixteen.md out of the results of `benchmarks/sixteen.py`, beside the numbers of Michel, Levy & Neubig 2019."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from headlab import plots
from headlab.attribution.ablation import ALPHA, AblationScores
from headlab.plots.studies import correlation, profile
from headlab.pruning.curves import Curve
from headlab.pruning.timing import Timing
from headlab.results import Result, write
from headlab.studies.checkpoints import Profile, step_of
from headlab.studies.correlation import Correlation

from .dcmha_report import picture, table
from .sequence import BASE, SIZES

# Michel, Levy & Neubig 2019 (arXiv 1905.10650); Enc-Enc, Dec-Dec, Enc-Dec there are enc, dec, cross here
PAPER_ALONE = {  # tables 2 and 3: the best head of a layer alone; * is p < .01
    "enc": ["-1.31*", "-0.16", "+0.12", "-0.15", "+0.02", "-0.36*"],
    "dec": ["-0.03", "+0.12", "+0.18", "+0.17", "-0.04", "+0.24"],
    "cross": ["+0.24*", "+0.06", "+0.05", "-0.24", "-1.55*", "-13.56*"],
}
PAPER_BERT_ALONE = "-0.01, +0.10, -0.14, -0.53, -0.29, -0.52, +0.05, -0.72, -0.96, +0.07, -0.19, -0.12"
PAPER_R = {"translator": "0.56 (newstest2013 and MTNT)", "classifier": "0.68 (MNLI matched and mismatched)"}
PAPER_SPEED = {1: "17.0 to 17.3 (+1.9 %)", 4: "67.3 to 69.1 (+2.7 %)", 16: "114.0 to 134.0 (+17.5 %)"}
PAPER_SPEED[64] = "124.7 to 146.6 (+17.5 %)"
STACKS = {"enc": "encoder", "dec": "decoder", "cross": "cross-attention", "": "encoder"}
UNIT = {"translator": "per cent of tokens", "classifier": "per cent of answers"}
METRIC = {"translator": "BLEU", "classifier": "accuracy (%)"}


class Results:
    """The results of one model, by name; None for what is not there."""

    def __init__(self, folder: Path, task: str) -> None:
        self.folder, self.task = folder, task

    def __call__(self, name: str) -> Any:
        path = self.folder / f"{self.task}-{name}.json"
        return Result.load(path) if path.exists() else None


def write_report(folder: Path, docs: Path) -> Path:
    """The page and its figures; what was not measured is left out."""
    found = {task: Results(folder, task) for task in (*METRIC, BASE)}
    parts = [
        "# Are sixteen heads really better than one? The studies, repeated",
        "Made by `python -m benchmarks.sixteen all --out RUN` on a GPU, as measured; the speed of BERT-base by the same "
        "command with `--only bert-base --repeats 5` on a CPU. `docs/data/sixteen` holds the results, and "
        "`python -m benchmarks.sixteen report --out docs/data/sixteen` makes this page of them. The studies are those of "
        "Michel, Levy & Neubig 2019 (*Are Sixteen Heads Really Better than One?*, arXiv 1905.10650), whose numbers stand "
        "beside ours. Layers and heads are counted from 0.",
        "Their models are large (a WMT English-French translator with 6 layers of 16 heads a stack; BERT-base on MNLI, 12 "
        "of 12), ours are two that `benchmarks/sequence.py` trains from scratch on a made-up language, so that nothing has "
        f"to be fetched: a translator, on {SIZES['translator'].pool:,} sentences, and a classifier of pairs of sentences, "
        f"on {SIZES['classifier'].pool:,} after guessing masked words. What can be compared is the shape of the findings. "
        "One seed each.",
        *sizes(found),
    ]
    for title, study in (
        ("One head off", one_off), ("All but one head", alone), ("Pruning in order of importance", pruning),
        ("Encoder, decoder and cross-attention apart", by_stack), ("Two domains", domains),
        ("Over the course of training", training), ("Speed at half the heads", speed),
    ):  # fmt: skip
        if told := [part for task, results in found.items() for part in study(task, results, docs)]:
            parts += [f"## {title}", *told]
    return write(docs / "sixteen.md", lambda file: file.write_text("\n\n".join(parts) + "\n", encoding="utf-8"))


def sizes(found: dict[str, Results]) -> list[str]:
    lines = []
    for task, results in found.items():
        scores, curve, timing = results("one-off"), results("curve-taylor"), results("timing")
        if scores is not None and curve is not None:
            stacks = [row[0].stack for row in scores.labels]
            width = max(len(row) for row in scores.labels)
            shape = " + ".join(f"{stacks.count(stack)} x {width} {stack}".strip() for stack in dict.fromkeys(stacks))
            parameters = "-" if timing is None else f"{timing.lines[0]['parameters']:,}"
            data = scores.record["data"]["examples"]
            lines.append(
                [task, scores.record["model"]["class"], shape, parameters, f"{curve.values[0]:.2f} {METRIC[task]}", data]
            )
    header = ["model", "class", "layers x heads", "parameters", "with all heads", "test sentences"]
    return [table(header, lines)] if lines else []


def one_off(task: str, results: Results, docs: Path) -> list[str]:
    """The paper's table 1: every head by itself."""
    scores: AblationScores | None = results("one-off")
    if scores is None:
        return []
    frame = scores.to_frame()
    gains = 0.0 - frame["change"]
    told = (
        f"**{task}.** Change of accuracy ({UNIT[task]}) when one head is removed; * is p < .01 (paired t-test over "
        f"sentences). {_significant(scores)}; the range is {gains.min():+.2f} to {gains.max():+.2f}. "
    )
    if (loss := results("one-off-loss")) is not None:
        told += f"Told by the loss, which sees more than the errors do: {_significant(loss)}. "
    told += (
        "Paper (table 1, encoder heads, BLEU): 8 of 96 significant, half of them to the better, -0.53 to +0.24."
        if task == "translator"
        else ""
    )
    parts = [told]
    for stack, rows in frame.groupby("stack", sort=False):
        lines = [
            [
                layer,
                *(f"{_points(change)}{star}" for change, star in zip(of["change"], of["significant"], strict=True)),
            ]
            for layer, of in rows.groupby("layer")
        ]
        width = max(len(line) for line in lines) - 1
        header = [f"{STACKS[str(stack)]}, layer", *(f"head {i}" for i in range(width))]
        parts.append(table(header, [line + [""] * (width + 1 - len(line)) for line in lines]))
    figure = plots.heads(scores, f"{task}: rise of errors ({UNIT[task]}) when a head is removed")
    figure.update_traces(colorbar_title="points")
    figure.update_layout(height=220 + 20 * len(scores.rows))
    return [*parts, picture(figure, docs, f"sixteen-{task}-one-off", f"What each head of the {task} is worth")]


def _significant(scores: AblationScores) -> str:
    frame = scores.to_frame()
    sure = frame[frame["p"] < ALPHA]
    better = int((sure["change"] < 0).sum())
    return f"{len(sure)} of {len(frame)} heads make a significant difference, {better} of them to the better"


def alone(task: str, results: Results, docs: Path) -> list[str]:
    """Tables 2, 3, 5 and 6: one head of a layer left, the best by the same data and the best by other data."""
    tested, chosen = results("alone"), results("alone-choose")
    if tested is None or chosen is None:
        return []
    lines, safe = [], 0
    for row, heads in enumerate(tested.labels):
        best = [int(scores.rows[row].argmax()) for scores in (tested, chosen)]
        cells = [_starred(tested, row, head) for head in best]
        safe += tested.columns["p"][row][best[1]] >= ALPHA
        paper = PAPER_ALONE.get(heads[0].stack, [])
        theirs = paper[heads[0].layer] if task == "translator" and heads[0].layer < len(paper) else ""
        lines.append([f"{STACKS[heads[0].stack]} {heads[0].layer}", *cells, *([theirs] if task == "translator" else [])])
    header = [
        "layer",
        "best head",
        "best head on other data",
        *(["paper, best head (BLEU)"] if task == "translator" else []),
    ]
    told = (
        f"**{task}.** Change of accuracy ({UNIT[task]}) with one head left in a layer and all other layers whole; * is "
        f"p < .01. With the head chosen on other data, {safe} of {len(lines)} layers show no significant change. "
    )
    told += (
        "Paper: half of the layers; chosen on other data, cross-attention loses 18.89 BLEU in its last layer and 2.75 in "
        "the one before, the encoder 1.96 in its first."
        if task == "translator"
        else f"Paper (table 3, BERT, best head by layer, points of accuracy): {PAPER_BERT_ALONE}; none significant."
    )
    return [told, table(header, lines)]


def _starred(scores: AblationScores, row: int, head: int) -> str:
    star = "*" if scores.columns["p"][row][head] < ALPHA else ""
    return f"{_points(scores.columns['change'][row][head])}{star} (head {head})"


def _points(change: float) -> str:
    """What is gained, with its sign; no negative zero."""
    return f"{0.0 - round(change, 2):+.2f}"


def pruning(task: str, results: Results, docs: Path) -> list[str]:
    curves = {name: results(f"curve-{name}") for name in ("taylor", "ablation", "random")}
    curves = {name: curve for name, curve in curves.items() if curve is not None}
    if not curves:
        return []
    paper = "a fifth of the heads for nothing (WMT)" if task == "translator" else "two fifths for nothing (BERT on MNLI)"
    told = (
        f"**{task}.** {METRIC[task]} of the whole model pruned in order of importance (Taylor, l2 by layer), of the exact "
        f"effect of removal, and at random; both orders are made on other sentences. Paper: {paper}, then a sharp drop; "
        "importance beats the order of single effects."
    )
    figure = plots.curves(curves, f"{task}: pruning the whole model")
    figure.update_layout(yaxis_title=f"change of {METRIC[task]}", legend={"x": 0.02, "y": 0.02})
    caption = f"Pruning the {task} by importance"
    return [told, curve_table(curves, task), picture(figure, docs, f"sixteen-{task}-pruning", caption)]


def by_stack(task: str, results: Results, docs: Path) -> list[str]:
    """Figure 4."""
    curves = {STACKS[stack]: curve for stack in ("enc", "dec", "cross") if (curve := results(f"curve-{stack}")) is not None}
    if not curves:
        return []
    told = (
        f"**{task}.** {METRIC[task]} when heads of one kind of attention go, in order of importance, and all others stay; "
        "shares are of that stack. Paper (figure 4): cross-attention collapses past 60 %; encoder and decoder keep about 30 "
        "of 36 BLEU with a fifth of their heads."
    )
    figure = plots.curves(curves, f"{task}: pruning one kind of attention")
    figure.update_layout(yaxis_title=f"change of {METRIC[task]}", legend={"x": 0.02, "y": 0.02})
    caption = "Pruning one kind of attention"
    return [told, curve_table(curves, task), picture(figure, docs, f"sixteen-{task}-stacks", caption)]


def curve_table(curves: dict[str, Curve], task: str) -> str:
    first = next(iter(curves.values()))
    header = [f"{METRIC[task]} at heads removed", *(f"{100 * fraction:.0f} %" for fraction in first.fractions)]
    return table(header, [[name, *(f"{value:.1f}" for value in curve.values)] for name, curve in curves.items()])


def domains(task: str, results: Results, docs: Path) -> list[str]:
    lines, parts = [], []
    for name, what in (
        ("ablation", "effect of removal on errors"), ("loss", "effect of removal on the loss"),
        ("importance", "importance (Taylor)"),
    ):  # fmt: skip
        found: Correlation | None = results(f"domains-{name}")
        if found is None:
            continue
        for line in found.lines:
            if line["over"] in ("all heads", *STACKS):
                over = STACKS.get(line["over"], line["over"])
                lines.append([what, over, line["heads"], *(_number(line[key]) for key in ("r", "p", "rho", "rho_p"))])
        figure = correlation(found, f"{task}: {what} in two domains")
        figure.update_layout(height=560)
        if name != "importance":
            unit = f"errors added by removal ({UNIT[task]})" if name == "ablation" else "loss added by removal (nats)"
            one, other = (f"{unit}, {domain}" for domain in found.names)
            figure.update_layout(xaxis_title=one, yaxis_title=other)
        parts.append(picture(figure, docs, f"sixteen-{task}-domains-{name}", f"{what} of the {task}'s heads in two domains"))
    if not lines:
        return []
    told = f"**{task}.** The same scores on sentences of two domains. Paper, effect of removal: Pearson's r {PAPER_R[task]}."
    return [told, table(["score", "over", "heads", "Pearson r", "p", "Spearman rho", "p"], lines), *parts]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.1e}"


def training(task: str, results: Results, docs: Path) -> list[str]:
    found: Profile | None = results("profile")
    if found is None:
        return []
    within, close = found.removable(0.1), found.removable(0.02)
    relative = found.relative
    lines = [
        [
            f"{step_of(name):,}", f"{curve.values[0]:.2f}", *map(_percent, relative[i, 1:]), _percent(close[i]),
            _percent(within[i]),
        ]
        for i, (name, curve) in enumerate(zip(found.names, found.curves, strict=True))
    ]  # fmt: skip
    header = ["step", METRIC[task], *(f"at {100 * fraction:.0f} %" for fraction in found.fractions[1:])]
    told = (
        f"**{task}.** Every checkpoint pruned in order of its own importances: what is left of its own unpruned "
        f"{METRIC[task]} at a share of heads removed, and how much can go within 2 % and within 10 % of it. "
    )
    told += (
        "Paper (figure 5, IWSLT): in the first two epochs the score falls in proportion to the heads removed; from epoch 10 "
        "on up to 40 % can go at 85 to 90 % of BLEU."
        if task == "translator"
        else ""
    )
    figure = profile(found, f"{task}: pruning over the course of training")
    figure.update_layout(yaxis_title=f"{METRIC[task]} left (% of the checkpoint's own)")
    caption = f"Pruning the {task} over the course of its training"
    return [
        told,
        table([*header, "within 2 %", "within 10 %"], lines),
        picture(figure, docs, f"sixteen-{task}-training", caption),
    ]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.0f} %"


def speed(task: str, results: Results, docs: Path) -> list[str]:
    """Table 4: BERT with half of its heads gone."""
    found: Timing | None = results("timing")
    if found is None:
        return []
    frame = found.to_frame()
    dense, half = (part.set_index("batch") for _, part in frame.groupby("model", sort=False))
    lines = []
    for batch in dense.index:
        both = [part.loc[batch] for part in (dense, half)]
        times = [f"{one.ms:.1f} ({one.low:.1f} to {one.high:.1f})" for one in both]
        rates = [f"{1000 * batch / one.ms:,.0f}" for one in both]
        gains = [f"{100 * (both[1][key] - 1):+.1f} %" for key in ("speedup", "attention_speedup")]
        lines.append([batch, *times, *rates, *gains, *([PAPER_SPEED.get(int(batch), "")] if task == BASE else [])])
    header = ["batch", "ms, all heads", "ms, half", "sentences/s", "with half", "gain", "gain in attention alone"]
    header += ["paper, sentences/s (2 x 1080Ti)"] if task == BASE else []
    sizes_ = [f"{part['parameters'].iloc[0]:,}" for part in (dense, half)]
    record = found.record
    machine = f"{record['device']} ({record['threads']} threads)"
    which = "drawn at random, of random weights" if task == BASE else "the least important ones"
    told = (
        f"**{task}.** Half of the heads, {which}, removed for good (`hl.prune`): {sizes_[0]} parameters, then {sizes_[1]}. "
        f"Forward passes of {dense['pos'].iloc[0]} tokens on {machine}, {record['repeats']} of each in "
        "turns: medians, with quartiles in brackets."
    )
    if dense["ms"].iloc[-1] < 1.5 * dense["ms"].iloc[0]:
        told += " A pass takes as long for many sentences as for one: the machine waits for its kernels to be launched."
    return [told, table(header, lines)]
