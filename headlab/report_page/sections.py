"""What each kind of result adds to the page: numbers per head, lines in a head's panel, figures, prompts.

A new kind needs one function here and its line in `SECTIONS`. A result without one still adds its table, if that has a line
per head.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import plots
from ..tables import WHICH_HEAD, Head
from .parts import Column, Item, Line, Panel, Part, Plot, Prompt

PARTNERS = 5  # shown per head and direction
_LONGEST = 90  # characters of a prompt in the list of prompts
_DIRECTIONS, _TOKENS = 5, 6  # shown of a circuit: singular directions, and tokens at each end of one
_MATRIX = 400  # heads whose pairs fit in a figure that a browser draws at once


def _table(item: Item, labels: Mapping[str, str] | None = None, without: Collection[str] = ()) -> Part:
    """The columns of a table that has one line per head: all but some; `labels` are better ones than their names."""
    part = Part()
    frame = item.result.to_frame() if hasattr(item.result, "to_frame") else None
    if frame is None or "head" not in frame or not frame["head"].is_unique:
        return part
    heads = [str(head) for head in frame["head"]]
    part.heads.update(heads)
    if "group" in frame:
        part.groups.update(zip(heads, map(int, frame["group"]), strict=True))
    for name in map(str, frame.columns):
        if name in WHICH_HEAD or name in without or name.endswith("_se"):
            continue
        found = {head: kept for head, value in zip(heads, frame[name], strict=True) if (kept := _plain(value)) is not None}
        told = name.replace("_", " ")
        if any(isinstance(value, list) for value in found.values()):
            lines = {head: [Line(text) for text in value] for head, value in found.items() if isinstance(value, list)}
            part.panels.append(Panel(item.kind.capitalize(), told, item.path.name, lines))
        elif found:
            part.columns.append(Column((labels or {}).get(name, f"{item.name}: {told}"), item.path.name, found))
    return part


def _plain(value: Any) -> Any:
    """A value of a table as the page has it: a number, a word, or a list of words; None if there is none."""
    if isinstance(value, (bool, np.bool_)):
        return float(value)
    if isinstance(value, (int, float, np.integer, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [str(one) for one in value] or None
    return None if value is None or value is np.nan or value == "" else str(value)


def _scores(item: Item, without: Collection[str] = ()) -> Part:
    part = _table(item, {"score": item.name}, without)
    part.figures.append((item.name, partial(plots.heads, item.result, plots.shown(f"Heads: {item.name}"))))
    return part


def _ablation(item: Item) -> Part:
    part = _scores(item, without=("change", "se", "significant"))
    columns, labels = item.result.columns, item.result.labels
    alone = item.record.get("keep_one")
    what = "loss with this head alone in its layer" if alone else "loss without this head"
    lines: dict[str, list[Line]] = {}
    for row, heads in enumerate(labels):
        for i, head in enumerate(heads):
            change, se, p = (float(columns[name][row][i]) if name in columns else math.nan for name in ("change", "se", "p"))
            if math.isnan(change):
                continue
            told = f"{what}: {change:+.4g}" + (f" ± {se:.2g} (standard error)" if se == se else "")
            told += f", p = {p:.2g}" if p == p else ""
            lines[str(head)] = [Line(f"{told}, over {_counted(item.record)}")]
    part.panels.append(Panel("What removal costs", item.name, item.path.name, lines))
    return part


def _counted(record: Mapping[str, Any]) -> str:
    data = record.get("data") or {}
    return f"{data.get('examples', '?')} examples ({data.get('tokens', '?')} tokens)"


def _mask(item: Item) -> Part:
    result = item.result
    part = _table(item, {"kept": f"{item.name} (1 kept, 0 removed)"})
    part.figures.append((item.name, partial(plots.heads, result, plots.shown(f"Heads kept: {item.name}"))))
    return part


def _curve(item: Item) -> Part:
    """When each head goes; the figure shows all curves of the folder (see `together`)."""
    curve = item.result
    heads = f"the {stack} heads" if (stack := item.record.get("stack")) else "heads"
    share, lines = {}, {}
    for step, names in enumerate(curve.removed):
        for name in names:
            if name not in share:
                share[name] = float(curve.fractions[step])
                text = f"goes at {100 * share[name]:.0f} % of {heads} removed; change up to there {curve.rises[step]:+.4g}"
                lines[name] = [Line(text)]
    part = Part(heads=set(share))
    part.columns.append(Column(f"{item.name}: share of {heads} removed when it goes", item.path.name, share))
    part.panels.append(Panel("What removal costs", item.name, item.path.name, lines))
    return part


def _circuits(item: Item) -> Part:
    """Numbers as columns, singular values and reservations as lines."""
    table = item.result
    singular = {circuit: table.singular_values(circuit) for circuit in ("qk", "ov")}
    part = _table(item, without=("exact", "why", *singular["qk"], *singular["ov"]))
    lines: dict[str, list[Line]] = {}
    for row, heads in enumerate(table.heads):
        for i, head in enumerate(heads):
            told = []
            for circuit, names in singular.items():
                values = [float(table.columns[name][row][i]) for name in names]
                if known := [f"{x:.3g}" for x in values if not math.isnan(x)]:
                    told.append(f"{circuit.upper()} singular values: {', '.join(known)}")
            told += [f"Not all there is to it: {why}"] if (why := table.why[row][i]) else []
            lines |= {str(head): [Line(text) for text in told]} if told else {}
    part.panels.append(Panel("Circuits", item.name, item.path.name, lines))
    part.figures += [(f"{item.name}: {circuit}", partial(plots.spectra, table, circuit)) for circuit in ("ov", "qk")]
    if any(name.startswith("content_") for name in table.columns):
        part.figures.append((f"{item.name}: content by distance", partial(plots.content, table)))
    if "copying" in table.columns and table.known("copying"):
        part.figures.append((f"{item.name}: copying", partial(_copying, table)))
    return part


def _copying(table: Any) -> Any:
    return plots.heads(table.scores("copying"))


def _directions(item: Item) -> Part:
    """The singular directions of one head's circuit as tokens, the largest first."""
    result, head = item.result, str(item.result.head)
    into, out = {"qk": ("queries", "keys"), "ov": ("reads", "writes")}[result.circuit]
    words: dict[Any, list[str]] = defaultdict(list)
    sizes: dict[Any, float] = {}
    for line in sorted(result.lines, key=lambda line: line["rank"]):
        sizes[line["direction"]] = line["singular_value"]
        if len(of := words[line["direction"], line["side"], line["end"]]) < _TOKENS:
            of.append(repr(line["token"])[1:-1].replace(" ", "\u00b7"))
    lines = []
    for direction, size in list(sizes.items())[:_DIRECTIONS]:
        for end in ("+", "-"):
            told = [f"{name} {' '.join(words[direction, side, end])}" for name, side in ((into, "in"), (out, "out"))]
            lines.append(Line(f"{end} {told[0]} \u2192 {told[1]}", value=size))
    label = f"{result.circuit.upper()}: top singular directions, from + and - end"
    figures: list[tuple[str, Plot]] = [(item.name, partial(plots.tokens_of, result))]
    return Part(panels=[Panel("Circuits", label, item.path.name, {head: lines})], figures=figures, heads={head})


def _roles(item: Item) -> Part:
    """The main role as a word, and every role that a head plays, with its number and what is enough for it."""
    part = _table(item, without=("role", "roles"))
    part.figures.append((item.name, partial(plots.roles, item.result)))
    main: dict[str, float | str] = {}
    lines: dict[str, list[Line]] = {}
    for line in item.result.to_frame().to_dict("records"):
        playing = [role for role in str(line["roles"]).split(", ") if role]
        main[str(line["head"])] = playing[0] if playing else "no known role"
        told = [Line(f"{role} (from {item.result.thresholds[role]:g} on)", value=_plain(line[role])) for role in playing]
        lines |= {str(line["head"]): told} if told else {}
    part.columns.insert(0, Column(f"{item.name}: role", item.path.name, main))
    part.panels.append(Panel("Role", item.name, item.path.name, lines))
    return part


def _similarity(item: Item) -> Part:
    """Clusters, and the heads that attend most alike."""
    result, names = item.result, [str(head) for head in item.result.heads]
    part = Part(heads=set(names))
    clusters = {name: f"cluster {cluster}" for name, cluster in zip(names, result.clusters, strict=True)}
    part.columns.append(Column(f"{item.name}: cluster of heads that attend alike", item.path.name, clusters))
    distances = np.where(np.isfinite(result.distances), result.distances, np.inf)
    np.fill_diagonal(distances, np.inf)
    lines = _partners(distances, names, names, nearest=True)
    part.panels.append(Panel("Partners", "Attends most like (Jensen-Shannon divergence, nats)", item.path.name, lines))
    part.figures.append((item.name, partial(plots.similarity, result)))
    _pairs(part, f"{item.name}: pairs", plots.similarity_matrix, result, len(names))
    return part


def _pairs(part: Part, title: str, plot: Callable[[Any], Any], result: Any, n_heads: int) -> None:
    """Add the matrix of all pairs, unless it has too many."""
    if n_heads <= _MATRIX:
        part.figures.append((title, partial(plot, result)))
    else:
        name = plot.__name__
        part.left_out.append(f"no figure of all pairs of {n_heads} heads (at most {_MATRIX}): headlab.plots.{name} draws it")


def _composition(item: Item) -> Part:
    """The strongest partners in and out, of scores with NaN where there is no such pair."""
    result = item.result
    sources, readers = ([str(end) for end in ends] for ends in (result.sources, result.readers))
    values = np.asarray(result.values.tolist(), dtype=float).reshape(len(sources), len(readers))
    heads = {str(end) for end in (*result.sources, *result.readers) if isinstance(end, Head)}
    part = Part(heads=heads)
    what = f"{result.what}-composition (by chance {result.baseline:.2g})"
    for told, table, names, others in (("feeds", values, sources, readers), ("is fed by", values.T, readers, sources)):
        lines = {name: found for name, found in _partners(table, names, others).items() if name in heads}
        part.panels.append(Panel("Partners", f"{what}: {told}", item.path.name, lines))
        best = {name: found[0].value for name, found in lines.items() if found[0].value is not None}
        part.columns.append(Column(f"{item.name}: strongest that it {told}", item.path.name, best))
    part.figures.append((f"{item.name}: graph", partial(plots.composition_graph, result)))
    _pairs(part, f"{item.name}: all pairs", plots.composition_matrix, result, max(len(sources), len(readers)))
    return part


def _partners(values: np.ndarray, names: list[str], others: list[str], nearest: bool = False) -> dict[str, list[Line]]:
    """For every name the others with the highest values, or the lowest; those whose value is not finite are left out."""
    found = {}
    for name, own in zip(names, values, strict=True):
        best = np.argsort(own if nearest else -own, kind="stable")[:PARTNERS]  # NaN comes last
        if lines := [Line(others[i], others[i], float(own[i])) for i in best if np.isfinite(own[i])]:
            found[name] = lines
    return found


def _maps(item: Item) -> Part:
    """The composed heads' links within a layer, by mean effective weight; a figure per layer."""
    result = item.result
    to: dict[str, list[Line]] = defaultdict(list)
    of: dict[str, list[Line]] = defaultdict(list)
    for link in result.links():
        source, target = f"L{link.layer}H{link.source}", f"L{link.layer}H{link.target}"
        for lines, name, other in ((to, source, target), (of, target, source)):
            if len(lines[name]) < PARTNERS:
                lines[name].append(Line(other, other, link.weight))
    part = Part(heads={*to, *of})
    for label, lines in (("its scores reach the output of", to), ("its output gets the scores of", of)):
        part.panels.append(Panel("Partners", f"Composition maps: {label}", item.path.name, lines))
    part.figures.append((item.name, partial(plots.maps, result)))
    part.figures += [(f"{item.name}, layer {layer}", partial(plots.maps, result, layer)) for layer in result.layers]
    return part


def _pattern(item: Item) -> Part:
    """A prompt; where heads are composed, also as another prompt what they attend to before that."""
    result = item.result
    tokens = {stack: list(words) for stack, words in result.tokens.items()}
    sides = {
        str(head): ("dec", "enc") if head.stack == "cross" else (head.stack, head.stack)
        for head in (*result.values, *result.raw)
    }
    words = tokens.get("enc") or next(iter(tokens.values()), [])
    text = ("" if any(not word.isdigit() for word in words) else " ").join(words)  # numbers, without a tokenizer
    name = " ".join(text.split())
    name = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
    part = Part(groups={str(head): head.group for head in result.heads})
    for held, more in ((result.values, ""), (result.raw, " (before heads are composed)")):
        if held:
            patterns = {str(head): weights.float().numpy() for head, weights in held.items()}
            part.prompts.append(Prompt(name + more, item.path.name, tokens, sides, patterns))
    return part


def _timing(item: Item) -> Part:
    return Part(figures=[(item.name, partial(plots.timing, item.result))])


def _evaluation(item: Item) -> Part:
    lines = item.result.lines
    factors = [*dict.fromkeys(factor for line in lines for factor in line["factors"]), "difficulty"]
    title = plots.shown(f"Accuracy: {item.name}")
    figures: list[tuple[str, Plot]] = [
        (item.name, partial(plots.tasks, item.result, factors, ["all", "first", "choice"], title)),
        (f"{item.name}, by task", partial(plots.tasks, item.result, "task", ["all", "choice"], title)),
    ]
    return Part(figures=figures)


def _probes(item: Item) -> Part:
    studies = list(dict.fromkeys(line["study"] for line in item.result.lines))
    figures: list[tuple[str, Plot]] = []
    for study in studies:
        of = item.result.of(study)
        varied = of.to_frame().get(study)  # a study that varies one size is called like it
        along = varied is not None and varied.nunique() > 1
        plot = partial(plots.probes, of, study) if along else partial(plots.probe_kinds, of)
        figures.append((f"{item.name}: {study}", plot))
    return Part(figures=figures)


def _correlation(item: Item) -> Part:
    return Part(figures=[(item.name, partial(plots.correlation, item.result))])


def _profile(item: Item) -> Part:
    return Part(figures=[(item.name, partial(plots.profile, item.result))])


def together(items: Iterable[Item]) -> list[tuple[str, str, Plot]]:
    """Figures of several results of one model: title, sources, and what makes it."""
    of: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        of[item.kind].append(item)
    found: list[tuple[str, str, Plot]] = []
    if curves := of["curve"]:
        alike: dict[tuple[str, bool], list[Item]] = defaultdict(list)
        for item in curves:
            alike[str(item.record.get("metric") or "loss"), bool(item.record.get("stack"))].append(item)
        for (metric, by_stack), group in alike.items():
            title = f"Pruning curves by stack ({metric})" if by_stack else f"Pruning curves ({metric})"
            results = {item.name.removeprefix("curve-"): item.result for item in group}
            sources = ", ".join(item.path.name for item in group)
            found.append((title, sources, partial(plots.curves, results, plots.shown(title))))
    exact = [item for item in of["ablation"] if not item.record.get("keep_one")]
    for one in of["scores"]:
        for other in exact:
            same = one.result.labels == other.result.labels and one.record.get("site") == other.record.get("site")
            if same:
                plot = partial(plots.against, one.result, other.result)
                found.append((f"{one.name} against {other.name}", f"{one.path.name}, {other.path.name}", plot))
    return found


@dataclass(frozen=True)
class Section:
    """How results of one kind are shown, and what the page says where there is none.

    Attributes:
        part: what one result adds; None for what commands read and nobody looks at.
        what: how the page calls it where it is missing (only kinds that it looks out for).
        command: what makes it.
        needs: kinds that this command reads from the folder.
        one_stack: the command does not make it of an encoder-decoder.
        composed: only models with composed heads have it.
    """

    part: Callable[[Item], Part] | None
    what: str = ""
    command: str = ""
    needs: tuple[str, ...] = ()
    one_stack: bool = False
    composed: bool = False


SECTIONS: dict[str, Section] = {  # in the order of the page
    "ablation": Section(_ablation, "what the removal of each head costs", "headlab ablate MODEL --text FILE --out FOLDER"),
    "scores": Section(_scores, "importance scores", "headlab score MODEL --text FILE --out FOLDER"),
    "roles": Section(_roles, "roles", "headlab roles MODEL --out FOLDER"),
    "curve": Section(_curve, "pruning curves", "headlab curve MODEL --text FILE --out FOLDER", needs=("scores",)),
    "circuits": Section(_circuits, "circuits", "headlab circuits MODEL --out FOLDER"),
    "composition": Section(_composition, "composition scores", "headlab circuits MODEL --out FOLDER", one_stack=True),
    "similarity": Section(_similarity, "similar heads", "headlab roles MODEL --text FILE --out FOLDER"),
    "pattern": Section(
        _pattern, "attention patterns on prompts", "headlab roles MODEL --prompt TEXT --out FOLDER", one_stack=True
    ),
    "timing": Section(_timing, "sizes and speed", "headlab time MODEL --out FOLDER", needs=("scores", "mask")),
    "maps": Section(_maps, "composition maps", "headlab maps MODEL --prompt TEXT --out FOLDER", composed=True),
    "mask": Section(_mask, command="headlab prune MODEL --out FOLDER"),
    "directions": Section(_directions),
    "evaluation": Section(_evaluation),
    "probes": Section(_probes),
    "correlation": Section(_correlation),
    "profile": Section(_profile),
    "fill": Section(None),
}
TABLE = Section(_table)  # of any other kind
