"""Where plain attention fails and what composition does about it: the probes of studies, trained and compared.

Points that studies share are trained once, runs of one shape as one bundle (`training.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from headlab.errors import HeadlabError
from headlab.results import Result, StepLog
from headlab.version import __version__

from .ground_truth import compare
from .models import COMPOSITIONAL
from .studies import SIZES, STUDIES, Point
from .training import Outcome, Run, train

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResults(Result):
    """What probes reached. `lines` has one dict per point of a study, with its sizes, accuracies and map against truth."""

    kind = "probes"
    lines: tuple[dict[str, Any], ...]
    record: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One line per point and seed. Accuracies are shares: `seen` on trained combinations, `test` on unseen ones.

        `mapped_seen` and `mapped_test` are shares of queries at which the map leads from the feature looked up to the one
        reported (see `ground_truth.Truth`), NaN where there is no map to read.
        """
        import pandas as pd

        frame = pd.DataFrame([{name: value for name, value in line.items() if name != "history"} for line in self.lines])
        return frame.astype({name: float for name in _MEASURED if name in frame})  # where all are None, too

    def of(self, study: str) -> ProbeResults:
        """The points of one study.

        Raises:
            HeadlabError: it is not among them.
        """
        lines = tuple(line for line in self.lines if line["study"] == study)
        if not lines:
            there = ", ".join(sorted({line["study"] for line in self.lines}))
            raise HeadlabError(f"there is no study {study!r} in these results; there is {there or 'none'}")
        return ProbeResults(lines, self.record | {"studies": [study]})

    def summary(self) -> pd.DataFrame:
        """One line per setting: parameters, and over the seeds the mean, lowest and highest accuracies."""
        frame = self.to_frame()
        settings = [name for name in frame.columns if name not in (*_MEASURED, "seed", "run")]
        grouped = frame.groupby(settings, sort=False, dropna=False)
        found = grouped[["seen", "test"]].agg(["mean", "min", "max"])
        found.columns = ["_".join(names) for names in found.columns]
        return found.join(grouped[["mapped_seen", "mapped_test"]].mean()).join(grouped.size().rename("seeds")).reset_index()

    def __repr__(self) -> str:
        return f"ProbeResults({len(self.lines)} points)"

    def _body(self) -> dict[str, Any]:
        return {"rows": list(self.lines)}  # as version 0.1.0 called them

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        return cls(tuple(dict(line) for line in body["rows"]), record)


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
        beside: bundles trained side by side on a GPU.

    Raises:
        HeadlabError: no such study or size, no seeds, or the log was begun for something else.
    """
    unknown = [name for name in names if name not in STUDIES]
    if unknown or not names:
        said = f"no study is called {unknown[0]!r}" if unknown else "no study was named"
        raise HeadlabError(f"{said}; the studies are {', '.join(STUDIES)}")
    names = list(dict.fromkeys(names))
    if size not in SIZES:
        raise HeadlabError(f"the size is {' or '.join(map(repr, SIZES))}, not {size!r}")
    if seeds < 1:
        raise HeadlabError(f"{seeds} seeds: at least one")
    machine = {"torch": torch.__version__, "device": _device(device)}
    steps = StepLog(log, {"what": "probes", "version": __version__} | machine)
    done = {step["run"] for step in steps.done}
    points = (point for name in names for point in STUDIES[name](SIZES[size], range(seeds)))
    todo = {key: point.run for point in points if (key := identity(point.run)) not in done}
    for outcome in train(list(todo.values()), device, beside=beside, checks=5):
        steps.append(measured(outcome))
    found = collected(names, size, seeds, steps.done)
    return ProbeResults(found, {"studies": list(names), "size": size, "seeds": seeds} | machine)


def collected(names: Sequence[str], size: str, seeds: int, steps: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The points of studies that steps of logs are there for."""
    by_run = {step["run"]: step for step in steps}
    return tuple(
        {"study": name, **described(point), **by_run[key]}
        for name in names
        for point in STUDIES[name](SIZES[size], range(seeds))
        if (key := identity(point.run)) in by_run
    )


def identity(run: Run) -> str:
    """What tells a run from all others."""
    return repr((asdict(run.task), run.kind, sorted(run.sizes.items()), asdict(run.recipe)))


def measured(outcome: Outcome) -> dict[str, Any]:
    """A step of the log."""
    run = outcome.run
    step: dict[str, Any] = {
        "run": identity(run),
        "parameters": outcome.parameters,
        "seen": outcome.seen,
        "test": outcome.test,
    }
    readable = run.kind != COMPOSITIONAL and run.sizes.get("num_hidden_layers", 1) == 1
    for split in ("seen", "test"):
        there = readable and (split == "seen" or run.task.n_held_out)
        step[f"mapped_{split}"] = compare(outcome.probe, run.task, split).share if there else None
    return step | {"history": outcome.history}


def described(point: Point) -> dict[str, Any]:
    """What a line says of a point."""
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
        "lr": recipe.lr,
        "hold": recipe.hold,
        "weight_decay": recipe.weight_decay,
        "average": recipe.average,
        "seed": task.seed,
        "chance": task.chance,
    }


def _device(device: str | torch.device) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
