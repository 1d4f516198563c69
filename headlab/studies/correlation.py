"""The same heads on two sets of data: Michel, Levy & Neubig 2019, section 3.4, compare what removing each head costs on two
domains (Pearson's r)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..errors import HeadlabError
from ..results import Result
from ..scores import HeadScores
from ..tables import Head, Heads, Rows, read_heads, write_heads

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
        table = pd.DataFrame([head.columns for head in flat])
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
        return {"heads": list(map(write_heads, self.heads)), "names": list(self.names), "lines": self.lines} | rows

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        heads = tuple(map(read_heads, body["heads"]))
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
