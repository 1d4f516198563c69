"""The same heads on two sets of data, and the stacks of an encoder-decoder one at a time.

Michel, Levy & Neubig 2019: section 3.4 compares what removing each head costs on two domains (Pearson's r), section 5
prunes one kind of attention only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import nn

from .data.batches import Batches
from .data.losses import Loss, Metric
from .errors import HeadlabError
from .hooks.fills import Fill
from .models.access import head_rows
from .pruning.curves import TENTHS, Curve, pruning_curve
from .results import Result
from .scores import Head, Heads, HeadScores, Rows, Unit

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 3  # heads: two points always lie on a line


@dataclass(frozen=True, eq=False)
class Correlation(Result):
    """Two scores of the same heads.

    Attributes:
        heads: one tuple per row.
        first: the first scores, in rows as the heads.
        second: the second.
        names: what the two are called.
        lines: the coefficients over all heads, over each stack if there are several, and over each layer: `over`, the
            number of `heads`, Pearson's `r` with its `p` value, Spearman's `rho` with its `rho_p`. A coefficient is None
            where it is not defined: fewer than three heads, or all scores the same.
    """

    kind = "correlation"
    heads: Heads
    first: Rows
    second: Rows
    names: tuple[str, str]
    lines: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def r(self) -> float | None:
        """Pearson's coefficient over all heads."""
        return self.lines[0]["r"]

    @property
    def rho(self) -> float | None:
        """Spearman's coefficient over all heads."""
        return self.lines[0]["rho"]

    def to_frame(self) -> pd.DataFrame:
        """A table with the lines; NaN where a coefficient is not defined."""
        import pandas as pd

        numbers = ["r", "p", "rho", "rho_p"]
        return pd.DataFrame(self.lines).astype(dict.fromkeys(numbers, float))

    def points(self) -> pd.DataFrame:
        """A table with one line per head: both scores and both ranks (1 is the most important)."""
        import pandas as pd

        flat = [head for row in self.heads for head in row]
        table = pd.DataFrame(
            {"head": [str(h) for h in flat], "stack": [h.stack for h in flat], "layer": [h.layer for h in flat]}
        )
        for name, rows in (("first", self.first), ("second", self.second)):
            table[name] = np.concatenate(rows) if rows else np.zeros(0)
            table[f"{name}_rank"] = table[name].rank(ascending=False)
        return table

    def top(self, k: int = 10) -> list[tuple[Head, float]]:
        """The k heads whose ranks differ most, with the rank in the second minus that in the first."""
        table = self.points()
        change = (table["second_rank"] - table["first_rank"]).to_numpy()
        flat = [head for row in self.heads for head in row]
        return [(flat[i], float(change[i])) for i in np.argsort(-np.abs(change), kind="stable")[:k]]

    def _body(self) -> dict[str, Any]:
        rows = {name: [row.tolist() for row in getattr(self, name)] for name in ("first", "second")}
        heads = [[vars(head) for head in row] for row in self.heads]
        return {"heads": heads, "names": list(self.names), "lines": self.lines} | rows

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        heads = tuple(tuple(Head(**head) for head in row) for row in body["heads"])
        first, second = (tuple(np.array(row, dtype=float) for row in body[name]) for name in ("first", "second"))
        return cls(heads, first, second, tuple(body["names"]), body["lines"], record)

    def __repr__(self) -> str:
        told = ", ".join(
            f"{name} {'undefined' if x is None else f'{x:.2f}'}" for name, x in (("r", self.r), ("rho", self.rho))
        )
        return f"Correlation({self.names[0]} and {self.names[1]}, {self.lines[0]['heads']} heads: {told})"


def correlate(a: HeadScores, b: HeadScores, names: tuple[str, str] = ("first data", "second data")) -> Correlation:
    """How well the scores of heads on one set of data agree with those on another.

    Args:
        a: scores of a model's heads: the exact effect of removal (`hl.ablation`, what Michel et al. compare) or importance.
        b: scores of the same heads on other data.
        names: what to call the two data sets.

    Raises:
        HeadlabError: the two are of different models or heads, or were not made in the same way (method, site, what stands
            in for a head); two equal names.

    >>> correlate(hl.ablation(model, news), hl.ablation(model, tales), ("news", "tales")).r  # doctest: +SKIP
    0.56
    """
    sizes = [[len(row) for row in scores.rows] for scores in (a, b)]
    if sizes[0] != sizes[1]:
        raise HeadlabError(f"the two scores are of different heads: one has {sizes[0]} in its layers, the other {sizes[1]}")
    models = [scores.record.get("model", {}).get("fingerprint") for scores in (a, b)]
    if None not in models and models[0] != models[1]:
        raise HeadlabError(f"the two scores are of different models: one of {models[0]}, the other of {models[1]}")
    if names[0] == names[1]:
        raise HeadlabError(f"both data sets are called {names[0]!r}: give them two names")
    for key, one in _kind(a).items():
        if one != (other := _kind(b)[key]):
            raise HeadlabError(f"the two scores are not of the same kind: one has {key} {one}, the other {key} {other}")
    if a.heads is not None and b.heads is not None and (mixed := _differ(a.heads, b.heads)):
        raise HeadlabError(f"the two scores are of different heads: one has {mixed[0]} where the other has {mixed[1]}")
    labels = a.labels if a.heads is not None else b.labels
    stacks = np.array([head.stack for row in labels for head in row], dtype=object)
    lines = [{"over": "all heads"} | _coefficients(a.flat, b.flat)]
    if len(kinds := dict.fromkeys(stacks)) > 1:
        lines += [{"over": kind} | _coefficients(a.flat[stacks == kind], b.flat[stacks == kind]) for kind in kinds]
    for number, (heads, one, other) in enumerate(zip(labels, a.rows, b.rows, strict=True)):
        name = str(heads[0]).rpartition("H")[0] if heads else f"row {number}"
        lines.append({"over": name} | _coefficients(one, other))
    record = {"method": "correlation", "model": a.record.get("model") or b.record.get("model") or {}}
    return Correlation(labels, a.rows, b.rows, names, lines, record | {"first": a.record, "second": b.record})


def _kind(scores: HeadScores) -> dict[str, Any]:
    """How scores were made, as far as only scores made alike can be compared."""
    record = scores.record
    stand_in = (record.get("fill") or {}).get("method", "zero")
    return {
        "method": record.get("method"), "site": record.get("site", "output"), "keep_one": record.get("keep_one", False),
        "reduction": record.get("reduction"), "fill": stand_in,
    }  # fmt: skip


def _differ(one: Heads, other: Heads) -> tuple[Head, Head] | None:
    """The first two heads that are not the same, by name."""
    pairs = ((h, o) for row, of in zip(one, other, strict=True) for h, o in zip(row, of, strict=True))
    return next(((h, o) for h, o in pairs if str(h) != str(o)), None)


def _coefficients(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    from scipy.stats import pearsonr, spearmanr

    found: dict[str, Any] = {"heads": len(one)} | dict.fromkeys(("r", "p", "rho", "rho_p"))
    if len(one) < FEWEST or np.ptp(one) == 0 or np.ptp(other) == 0:
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores that hardly differ; what comes out is looked at below
        results = pearsonr(one, other), spearmanr(one, other)
    numbers = [float(x) for result in results for x in (result.statistic, result.pvalue)]
    return found | {k: x if np.isfinite(x) else None for k, x in zip(("r", "p", "rho", "rho_p"), numbers, strict=True)}


def only(scores: HeadScores, stack: str) -> HeadScores:
    """The scores with every head outside one stack ranked above all heads in it, so that those are removed first.

    Args:
        scores: of an encoder-decoder.
        stack: `enc`, `dec` or `cross`.

    Raises:
        HeadlabError: the scores have no such stack.
    """
    stacks = [{head.stack for head in row} for row in scores.labels]
    if not any(stack in names for names in stacks):
        there = sorted(set().union(*stacks) - {""})
        found = f"their stacks are {', '.join(there)}" if there else "their heads belong to no encoder-decoder"
        raise HeadlabError(f"there are no heads in a stack {stack!r}: {found}")
    high = 1 + 2 * float(np.abs(scores.flat).sum())  # above the sum of any key-value group
    rows = tuple(
        np.array([value if head.stack == stack else high for head, value in zip(heads, values, strict=True)])
        for heads, values in zip(scores.labels, scores.rows, strict=True)
    )
    return HeadScores(rows, scores.heads, scores.record | {"only": stack})


def stack_curves(
    model: nn.Module,
    scores: HeadScores | Callable[[nn.Module], HeadScores],
    batches: Batches,
    fractions: Sequence[float] = TENTHS,
    *,
    loss: Loss | None = None,
    metric: Metric | None = None,
    fill: Fill | None = None,
    unit: Unit = "head",
    log: str | Path | None = None,
) -> dict[str, Curve]:
    """A pruning curve for each kind of attention of an encoder-decoder: heads of that stack go, all others stay.

    Args:
        fractions: shares of the stack's units to remove; the curves' `fractions` are shares of the stack's heads too.
        log: a file, as for `pruning_curve`, with the stack added to its name: `curve.jsonl` becomes `curve-enc.jsonl`.
        model, scores, batches, loss, metric, fill, unit: as for `pruning_curve`.

    Returns:
        By stack, `enc`, `dec` and `cross`; `plots.curves` draws them (Michel et al. 2019, figure 4).

    Raises:
        HeadlabError: the model is no encoder-decoder; and what `pruning_curve` raises.
    """
    labels = head_rows(model)
    stacks = list(dict.fromkeys(head.stack for row in labels for head in row))
    if len(stacks) < 2:
        name = type(model).__name__
        raise HeadlabError(
            f"{name} has one stack of heads, with nothing to take apart: use pruning_curve (without --by-stack)"
        )
    if bad := [f for f in fractions if not 0 <= f <= 1]:
        raise HeadlabError(f"fractions are between 0 and 1, not {', '.join(map(str, bad))}")
    units = {(head.stack, head.row, head.group if unit == "group" else head.index) for row in labels for head in row}
    data: Any = list(batches)  # it is gone through once a stack
    first, dot, last = (None, "", "") if log is None else Path(log).name.partition(".")
    found = {}
    for stack in stacks:
        order: HeadScores | Callable[[nn.Module], HeadScores]
        if isinstance(scores, HeadScores):
            order = only(HeadScores(scores.rows, scores.heads or labels, scores.record), stack)
        else:
            order = lambda m, stack=stack: only(scores(m), stack)  # noqa: E731
        n = sum(name == stack for name, *_ in units)
        curve = pruning_curve(
            model, order, data, [round(fraction * n) / len(units) for fraction in fractions], loss=loss, metric=metric,
            fill=fill, unit=unit, log=None if log is None else Path(log).with_name(f"{first}-{stack}{dot}{last}"),
        )  # fmt: skip
        of_stack = sum(head.stack == stack for row in labels for head in row)
        curve = replace(curve, n_heads=of_stack)  # so that its fractions are of the stack
        found[stack] = replace(curve, record=curve.record | {"stack": stack, "fractions": curve.fractions.tolist()})
    return found
