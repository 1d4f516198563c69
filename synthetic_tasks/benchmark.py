"""Where plain attention fails and what composition does about it: probes of every kind, trained and compared.

A study is a list of points, one for every kind, size and seed; `STUDIES` names them. Points that studies share are
trained once, runs of one shape as one stack (`training.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from headlab.errors import HeadlabError
from headlab.results import Result, RowLog

from .probes import COMPOSITIONAL, KINDS, ProbeForSequenceClassification, probe_config
from .symbolic import LEVELS, CrossComposition
from .training import Outcome, Recipe, Run, train
from .truth import compare

if TYPE_CHECKING:
    import pandas as pd

MATCHED = "matched"
"""An MHA with so many heads that it has as many parameters as the DCMHA of the same point, or more."""


@dataclass(frozen=True)
class Size:
    """What the studies vary around, and how long probes are trained."""

    features: int
    values: int
    records: int
    d_model: int
    heads: int
    d_head: int
    recipes: Mapping[str, Recipe]  # by level


FULL = Size(
    features=8, values=16, records=12, d_model=128, heads=8, d_head=16,
    recipes={
        "binding": Recipe(steps=4000, warm=0.1, hold=0.5),
        "conflict": Recipe(steps=5000, warm=0.1, hold=0.75, weight_decay=0.5),
    },
)  # fmt: skip
SMALL = Size(
    features=5, values=8, records=6, d_model=48, heads=5, d_head=8,
    recipes={
        "binding": Recipe(steps=2000, batch=256, lr=4e-3, warm=0.1, hold=0.5),
        "conflict": Recipe(steps=4000, batch=256, lr=4e-3, weight_decay=0.3),
    },
)  # fmt: skip
SIZES = {"full": FULL, "small": SMALL}


@dataclass(frozen=True)
class Point:
    """One run in a study: what it is called there and at how many heads it is drawn."""

    label: str
    heads: int
    run: Run


def point(
    size: Size, level: str, label: str, seed: int, *, heads: int = 0, recipe: Recipe | None = None, **changes: Any
) -> Point:
    """A point of a study.

    Args:
        size: what is not said otherwise.
        label: a kind of `KINDS`, or `matched`.
        heads: of the point (a `matched` MHA has more).
        recipe: by default the level's.
        changes: fields of `CrossComposition` or of `ProbeConfig`.
    """
    sizes = {"n_features": size.features, "n_values": size.values, "n_records": size.records}
    for_task = {name: value for name, value in changes.items() if name in CrossComposition.__dataclass_fields__}
    task = CrossComposition(level=level, seed=seed, **(sizes | for_task))  # type: ignore[arg-type]
    heads = heads or size.heads
    given = {"hidden_size": size.d_model, "head_dim": size.d_head}
    given |= {name: value for name, value in changes.items() if name not in for_task}
    kind, own = label, heads
    if label == MATCHED:
        kind, own = "mha", heads_of_matched(replace(task, seed=0), heads, tuple(sorted(given.items())))
    return Point(label, heads, Run(task, kind, {"num_attention_heads": own} | given, recipe or size.recipes[level]))


@cache
def heads_of_matched(task: CrossComposition, heads: int, sizes: tuple[tuple[str, Any], ...]) -> int:
    """The fewest heads with which an MHA has as many parameters as a DCMHA of `heads`."""

    def parameters(kind: str, heads: int) -> int:
        with torch.device("meta"):
            probe = ProbeForSequenceClassification(probe_config(task, kind, num_attention_heads=heads, **dict(sizes)))
        return sum(p.numel() for p in probe.parameters())

    goal, found = parameters("dcmha", heads), heads
    while parameters("mha", found) < goal:
        found += 1
    return found


# --- the studies

MAIN = ("mha", MATCHED, "static", "low_rank", "dcmha")


def main(size: Size, seeds: Iterable[int]) -> list[Point]:
    """The main figure: both levels; the level conflict as it is, and with an MLP on the query before attention.

    There heads are twice as many as features; the control is an MHA with a head for every combination, and that MLP.
    """
    found = []
    for seed in seeds:
        found += [point(size, "binding", label, seed) for label in ("mha", MATCHED, "static", "dcmha")]
        found += [point(size, "conflict", label, seed, heads=2 * size.heads) for label in ("mha", "low_rank")]
        found += [point(size, "conflict", label, seed, **_first(size)) for label in ("static", "low_rank", "dcmha")]
        found.append(_every_combination(size, seed))
    return found


def _every_combination(size: Size, seed: int, rate: float = 0.01) -> Point:
    """An MHA with a head for every combination and an MLP on the query; this decay is the one with which it fits best."""
    recipe = replace(size.recipes["conflict"], weight_decay=rate)
    pairs = size.features * (size.features - 1)
    return point(size, "conflict", "mha", seed, heads=pairs, first=True, recipe=recipe)


def _first(size: Size) -> dict[str, Any]:
    """With an MLP on the query before attention."""
    return {"heads": 2 * size.heads, "first": True}


def kinds(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Every kind, on the level conflict with an MLP on the query; MHA with a head for every combination at three decays."""
    found = []
    for seed in seeds:
        for label in ("mha", MATCHED, *(kind for kind in KINDS if kind != "mha")):
            found += [point(size, "binding", label, seed), point(size, "conflict", label, seed, **_first(size))]
        found += [_every_combination(size, seed, rate) for rate in (0.001, 0.01, 0.1)]
    return found


def heads(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Accuracy against the number of heads; on the level conflict with an MLP on the query."""
    found = []
    for seed in seeds:
        for times in (0.5, 1, 2, 4):
            found += [point(size, "binding", label, seed, heads=int(times * size.heads)) for label in MAIN]
        found += [point(size, "binding", label, seed, heads=8 * size.heads) for label in ("mha", "static")]
        for times in (0.5, 1, 1.5, 2, 4):
            count = int(times * size.heads)
            found += [
                point(size, "conflict", label, seed, heads=count, first=True) for label in ("static", "low_rank", "dcmha")
            ]
    return found


def sizes(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Accuracy against features, records, the size of a head and the share held out, on the level binding, three seeds."""
    changed: dict[str, Sequence[Any]] = {
        "n_features": (max(3, size.features // 2), size.features, 3 * size.features // 2),
        "n_records": (2, size.records // 2, size.records, size.values),
        "head_dim": (size.d_head // 2, size.d_head, 2 * size.d_head, 4 * size.d_head),
        "held_out": (0.1, 0.3, 0.5, 0.7),
    }
    recipe = replace(size.recipes["binding"], batch=size.recipes["binding"].batch // 2)
    return [
        point(size, "binding", label, seed, recipe=recipe, **{name: value})
        for name, values in changed.items()
        for value in values
        for seed in list(seeds)[:3]
        for label in ("mha", "static", "dcmha")
    ]


def shared(size: Size, seeds: Iterable[int]) -> list[Point]:
    """One vocabulary of answers for all features, so that nothing is won by carrying the whole record."""
    return [
        point(size, level, label, seed, shared_values=True, **(_first(size) if level == "conflict" else {}))
        for level in LEVELS
        for seed in seeds
        for label in ("mha", "static", "low_rank", "dcmha")
    ]


def layers(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Two layers, or an MLP behind attention; three seeds."""
    return [
        point(size, "binding", label, seed, **change)
        for change in ({"num_hidden_layers": 2}, {"mlp": True})
        for seed in list(seeds)[:3]
        for label in ("mha", "dcmha")
    ]


def recipes(size: Size, seeds: Iterable[int]) -> list[Point]:
    """What dynamic maps learn on the level conflict, how to combine or every pair by heart: decay, schedule, heads, rank."""
    usual = size.recipes["conflict"]
    longer = replace(usual, steps=8 * usual.steps // 5)
    one_cycle = replace(longer, warm=0.3, hold=0.0)
    changes: list[dict[str, Any]] = [{"recipe": replace(usual, weight_decay=rate)} for rate in (0.01, 0.1, 0.3, 0.5, 0.7)]
    changes += [{"recipe": longer}, {"recipe": one_cycle}, {"recipe": one_cycle, "rank": 4}]
    found = [{"heads": 2 * size.heads} | change for change in changes] + [{"recipe": usual}, {"recipe": one_cycle}]
    return [
        point(size, "conflict", label, seed, **change)
        for change in found
        for seed in seeds
        for label in ("low_rank", "dcmha")
    ]


def control(size: Size, seeds: Iterable[int]) -> list[Point]:
    """Nothing held out: the same task is no problem for plain attention."""
    return [
        point(size, "binding", label, seed, heads=times * size.heads, held_out=0.0)
        for times in (1, 2, 4)
        for seed in seeds
        for label in ("mha", "dcmha")
    ]


STUDIES: Mapping[str, Callable[[Size, Iterable[int]], list[Point]]] = {
    study.__name__: study for study in (main, kinds, heads, sizes, shared, layers, recipes, control)
}


# --- running them


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResults(Result):
    """What probes reached. `rows` has one dict per point of a study, with its sizes, accuracies and map against truth."""

    kind = "probes"
    rows: tuple[dict[str, Any], ...]
    record: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One line per point and seed. Accuracies are shares: `seen` on trained combinations, `test` on unseen ones.

        `mapped_seen` and `mapped_test` are shares of queries at which the map leads from the feature looked up to the one
        reported (see `truth.Truth`), NaN where there is no map to read.
        """
        import pandas as pd

        return pd.DataFrame([{name: value for name, value in row.items() if name != "history"} for row in self.rows])

    def of(self, study: str) -> ProbeResults:
        """The points of one study.

        Raises:
            HeadlabError: it is not among them.
        """
        rows = tuple(row for row in self.rows if row["study"] == study)
        if not rows:
            there = ", ".join(sorted({row["study"] for row in self.rows}))
            raise HeadlabError(f"there is no study {study!r} in these results; there is {there or 'none'}")
        return ProbeResults(rows, self.record)

    def summary(self) -> pd.DataFrame:
        """One line per setting: parameters, and over the seeds the mean, lowest and highest accuracies."""
        frame = self.to_frame()
        settings = [name for name in frame.columns if name not in (*_MEASURED, "seed", "run")]
        grouped = frame.groupby(settings, sort=False, dropna=False)
        found = grouped[["seen", "test"]].agg(["mean", "min", "max"])
        found.columns = ["_".join(names) for names in found.columns]
        return found.join(grouped[["mapped_seen", "mapped_test"]].mean()).join(grouped.size().rename("seeds")).reset_index()

    def __repr__(self) -> str:
        return f"ProbeResults({len(self.rows)} points)"

    def _body(self) -> dict[str, Any]:
        return {"rows": list(self.rows)}

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        return cls(tuple(dict(row) for row in body["rows"]), record)


_MEASURED = ("seen", "test", "mapped_seen", "mapped_test")


def study(
    names: Sequence[str] = tuple(STUDIES),
    size: str = "full",
    *,
    seeds: int = 5,
    device: str | torch.device = "cpu",
    log: str | Path | None = None,
    beside: int = 8,
) -> ProbeResults:
    """Train the probes of some studies and say what they reached.

    Args:
        names: of `STUDIES`.
        size: `full` (for a GPU) or `small` (two CPU cores).
        seeds: how many, from 0 on; a seed draws the combinations held out, the data and the first weights.
        log: file to go on from if the run is killed: what is done is not trained again.
        beside: stacks trained side by side on a GPU.

    Raises:
        HeadlabError: no such study or size, no seeds, or the log was begun for something else.
    """
    if unknown := [name for name in names if name not in STUDIES] or not names:
        raise HeadlabError(f"no study is called {unknown}; the studies are {', '.join(STUDIES)}")
    if size not in SIZES:
        raise HeadlabError(f"the size is {' or '.join(map(repr, SIZES))}, not {size!r}")
    if seeds < 1:
        raise HeadlabError(f"{seeds} seeds: at least one")
    from headlab import __version__

    points = {name: STUDIES[name](SIZES[size], range(seeds)) for name in names}
    wanted = {identity(point.run): point.run for found in points.values() for point in found}
    rows = RowLog(log, {"what": "probes", "version": __version__, "torch": torch.__version__, "device": str(device)})
    done = {row["run"]: row for row in rows.rows}
    todo = [run for key, run in wanted.items() if key not in done]
    for outcome in train(todo, device, beside=beside, checks=20):
        row = measured(outcome)
        rows.append(row)
        done[row["run"]] = row
    found = tuple(
        {"study": name} | described(point) | done[identity(point.run)] for name, among in points.items() for point in among
    )
    record = {"studies": list(names), "size": size, "seeds": seeds, "device": _device(device), "torch": torch.__version__}
    return ProbeResults(found, record)


def identity(run: Run) -> str:
    """What tells a run from all others."""
    return repr((asdict(run.task), run.kind, sorted(run.sizes.items()), asdict(run.recipe)))


def measured(outcome: Outcome) -> dict[str, Any]:
    """A row of the log."""
    run = outcome.run
    row: dict[str, Any] = {
        "run": identity(run),
        "parameters": outcome.parameters,
        "seen": outcome.seen,
        "test": outcome.test,
    }
    readable = run.kind != COMPOSITIONAL and run.sizes.get("num_hidden_layers", 1) == 1
    for split in ("seen", "test"):
        there = readable and (split == "seen" or run.task.n_held_out)
        row[f"mapped_{split}"] = compare(outcome.probe, run.task, split).share if there else None
    return row | {"history": outcome.history}


def described(point: Point) -> dict[str, Any]:
    """What a row says of a point."""
    task, sizes, recipe = point.run.task, point.run.sizes, point.run.recipe
    return {
        "level": task.level,
        "kind": point.label,
        "heads": point.heads,
        "own_heads": sizes["num_attention_heads"],
        "d_head": sizes["head_dim"],
        "d_model": sizes["hidden_size"],
        "features": task.n_features,
        "values": task.n_values,
        "records": task.n_records,
        "held_out": task.held_out,
        "shared_values": task.shared_values,
        "mlp": bool(sizes.get("mlp")),
        "first": bool(sizes.get("first")),
        "layers": sizes.get("num_hidden_layers", 1),
        "rank": sizes.get("rank", 2),
        "steps": recipe.steps,
        "hold": recipe.hold,
        "weight_decay": recipe.weight_decay,
        "seed": task.seed,
        "chance": task.chance,
    }


def _device(device: str | torch.device) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
