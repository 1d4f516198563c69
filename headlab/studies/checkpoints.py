"""Head scores and pruning curves over the checkpoints of a training run: when do heads become redundant?

Michel, Levy & Neubig 2019, section 6.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from ..attribution.ablation import AblationScores, ablation
from ..attribution.gradients import importance
from ..choices import Normalize, check
from ..data.batches import Batches, describe_data, prepare
from ..data.losses import Loss, Metric, loss_name
from ..errors import HeadlabError
from ..loading import load
from ..models.access import describe
from ..pruning.curves import TENTHS, Curve, pruning_curve
from ..results import Result, StepLog
from ..scores import HeadScores

if TYPE_CHECKING:
    import pandas as pd

Scores = Literal["taylor", "ablation"]
Checkpoint = str | Path | tuple[str, nn.Module]
"""A folder that `hl.load` opens, or a name and a model."""


@dataclass(frozen=True, eq=False)
class Profile(Result):
    """Scores and a pruning curve of every checkpoint, in the order of training.

    Attributes:
        names: of the checkpoints.
        scores: of all heads, one `HeadScores` per checkpoint.
        curves: one `Curve` per checkpoint; all have the same steps.
    """

    kind = "profile"
    names: list[str]
    scores: list[HeadScores]
    curves: list[Curve]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def fractions(self) -> np.ndarray:
        """The share of heads removed at every step of the curves, `[step]`."""
        return self.curves[0].fractions

    @property
    def values(self) -> np.ndarray:
        """Mean loss, or the metric, `[checkpoint, step]`."""
        return np.stack([curve.values for curve in self.curves])

    @property
    def relative(self) -> np.ndarray:
        """Against the same checkpoint with all heads, `[checkpoint, step]`: a metric's share of its own unpruned value (NaN
        where that is not above zero), a loss's rise above it in nats."""
        values = self.values
        if self.record.get("metric") is None:
            return values - values[:, :1]
        whole = values[:, :1]
        return np.where(whole > 0, values / np.where(whole > 0, whole, 1), np.nan)

    def removable(self, within: float = 0.1) -> np.ndarray:
        """The largest share of heads that each checkpoint can lose, `[checkpoint]`, at the steps measured.

        Args:
            within: what the loss of heads may cost up to there: a share of the checkpoint's own metric, or nats of loss.
                NaN where the metric of the whole checkpoint is not above zero.

        Raises:
            HeadlabError: `within` is negative.
        """
        if within < 0:
            raise HeadlabError(f"within is what the loss of heads may cost, 0 or more, not {within}")
        relative = self.relative
        cost = relative if self.record.get("metric") is None else 1 - relative
        good = np.logical_and.accumulate(~(cost > within + 1e-9), axis=1)  # [checkpoint, step]; step 0 costs nothing
        return np.where(np.isnan(relative[:, 0]), np.nan, self.fractions[good.sum(1) - 1])

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per checkpoint and step."""
        import pandas as pd

        relative = self.relative
        return pd.DataFrame(
            {
                "checkpoint": name,
                "step": step_of(name),
                "fraction": curve.fractions[i],
                "removed": len(curve.removed[i]),
                "value": curve.values[i],
                "relative": relative[number, i],
            }
            for number, (name, curve) in enumerate(zip(self.names, self.curves, strict=True))
            for i in range(len(curve.values))
        )

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k checkpoints that can lose most heads within a tenth (see `removable`): name and share."""
        found = zip(self.names, np.nan_to_num(self.removable()).tolist(), strict=True)
        return sorted(found, key=lambda item: -item[1])[:k]

    def _body(self) -> dict[str, Any]:
        parts = zip(self.names, self.scores, self.curves, strict=True)
        return {"checkpoints": [_saved(name, scores, curve) for name, scores, curve in parts]}

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        return cls(*_read(body["checkpoints"]), record)

    def __repr__(self) -> str:
        return f"Profile({len(self.names)} checkpoints, {self.names[0]} to {self.names[-1]}, {len(self.fractions)} steps)"


def profile(
    models: str | Path | Iterable[Checkpoint],
    batches: Batches,
    *,
    method: Scores = "taylor",
    scoring: Batches | None = None,
    fractions: Sequence[float] = TENTHS,
    loss: Loss | None = None,
    metric: Metric | None = None,
    normalize: Normalize | None = None,
    log: str | Path | None = None,
    device: str | None = None,
) -> Profile:
    """Score all heads of every checkpoint, and prune it in the order of its own scores.

    Args:
        models: the folder of a training run, whose checkpoints are found and sorted (see `checkpoint_folders`); or
            checkpoints in order: folders, or pairs of a name and a model. One model is held at a time, so pairs may come
            from a generator that opens them.
        batches: what the curves are measured on.
        method: how heads are scored: `hl.importance` or the exact `hl.ablation`.
        scoring: what they are scored on; by default the same batches.
        fractions: shares of the heads to remove; the whole model (0) always comes first.
        loss: `loss(model, batch)` -> `[batch]`, for the scores and, without a metric, the curves.
        metric: `metric(model, batches)` -> float, for the curves.
        normalize: of `taylor`, as for `hl.importance`.
        log: a file that gets one step a checkpoint; a killed run goes on after the last.
        device: where folders are opened.

    Raises:
        HeadlabError: there are no checkpoints; two have one name, or differ in their heads; a log of another computation;
            and what `hl.importance`, `hl.ablation` and `hl.pruning_curve` raise.

    >>> profile("runs/translator", test, metric=bleu, log="profile.jsonl").removable(0.1)  # doctest: +SKIP
    array([0. , 0. , 0.1, 0.2, 0.4, 0.4])
    """
    check("method", method, Scores)
    if method == "ablation" and normalize is not None:
        raise HeadlabError("normalize is an option of method 'taylor'")
    if isinstance(models, (str, Path)):
        models = checkpoint_folders(models)
    testing: Any = list(batches)  # they are gone through once a checkpoint
    options = {
        "method": "profile", "scores": method, "fractions": sorted({0.0, *map(float, fractions)}), "normalize": normalize,
        "loss": loss_name(loss), "metric": None if metric is None else loss_name(metric),
    }  # fmt: skip
    scored_on: Any = testing if scoring is None else list(scoring)
    record: dict[str, Any] = {}
    steps: list[dict[str, Any]] = []
    total = len(models) if isinstance(models, Sequence) else None
    left = iter(models)
    with tqdm(total=total, desc="profile", unit="checkpoint", disable=None) as bar:
        while (given := next(left, None)) is not None:
            name, model = _opened(given, device)
            del given
            data, other = prepare(model, testing), prepare(model, scored_on)
            of_data = {"data": describe_data(data), "scored on": describe_data(other)}
            if not record:
                record = options | of_data
                step_log = StepLog(log, record)
                done = list(step_log.done)
            if {key: record[key] for key in of_data} != of_data:
                raise HeadlabError(f"the checkpoint {name} turns the texts into other tokens than the first one did")
            if name in (step["name"] for step in steps):
                raise HeadlabError(f"two checkpoints are called {name!r}: give pairs (name, model) to tell them apart")
            if len(steps) < len(done):
                step = done[len(steps)]
                _check_same(step, name, model, len(steps), log)
            else:
                scores: HeadScores
                if method == "taylor":
                    scores = importance(model, other, loss=loss, normalize=normalize)
                else:
                    scores = ablation(model, other, loss=loss)
                _check_heads(name, scores, steps)
                curve = pruning_curve(model, scores, data, fractions, loss=None if metric else loss, metric=metric)
                step = _saved(name, scores, curve)
                step_log.append(step)
            steps.append(step)
            bar.update()
            del model  # before the next one is opened
    if not steps:
        raise HeadlabError("there are no checkpoints: expected folders, or pairs of a name and a model")
    if len(steps) < len(done):
        raise HeadlabError(f"{log} holds {len(done)} checkpoints, but {len(steps)} were given: choose another file")
    known = {step["name"]: step["fingerprint"] for step in steps}
    return Profile(*_read(steps), record | {"checkpoints": known, "model": steps[-1]["scores"]["record"]["model"]})


def checkpoint_folders(folder: str | Path) -> list[Path]:
    """The checkpoints in the folder of a training run, by the step in their names (`checkpoint-500`, `step-00500`).

    Folders without a number come last (`final`), in alphabetical order.

    Raises:
        HeadlabError: there are none.
    """
    found = [path.parent for path in Path(folder).glob("*/config.json")]
    if not Path(folder).is_dir():
        raise HeadlabError(f"there is no folder {folder}: expected that of a training run, with a checkpoint in each folder")
    if not found and (Path(folder) / "config.json").exists():
        raise HeadlabError(f"{folder} is one model, not a training run: give the folder above it")
    if not found:
        raise HeadlabError(f"no folder in {folder} holds a model (a config.json): expected checkpoints of a training run")
    return sorted(found, key=lambda path: ((step := step_of(path.name)) is None, step or 0, path.name))


def step_of(name: str) -> int | None:
    """The last number in a checkpoint's name."""
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None


def _opened(given: Checkpoint, device: str | None) -> tuple[str, nn.Module]:
    if isinstance(given, (str, Path)):
        return Path(given).name, load(str(given), device=device)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], nn.Module):
        return str(given[0]), given[1]
    raise HeadlabError(f"a checkpoint is a folder, or a pair of a name and a model, not a {type(given).__name__}")


def _check_same(step: dict[str, Any], name: str, model: nn.Module, number: int, log: Any) -> None:
    """Whether a step of the log is of this checkpoint."""
    fingerprint = describe(model)["fingerprint"]
    if (step["name"], step["fingerprint"]) != (name, fingerprint):
        raise HeadlabError(
            f"{log} goes on with the checkpoint {step['name']} ({step['fingerprint']}), but checkpoint number {number} is "
            f"{name} ({fingerprint}): choose another file, or remove it"
        )


def _check_heads(name: str, scores: HeadScores, steps: Sequence[dict[str, Any]]) -> None:
    """Whether a checkpoint has as many heads in every layer as the first one."""
    before = [len(part) for part in steps[0]["scores"]["rows"]] if steps else None
    if before is not None and [len(part) for part in scores.rows] != before:
        raise HeadlabError(f"the checkpoint {name} has other heads than the first one, which has {before} in its layers")


def _saved(name: str, scores: HeadScores, curve: Curve) -> dict[str, Any]:
    about = {"name": name, "fingerprint": scores.record["model"]["fingerprint"], "kind": scores.kind}
    return about | {"scores": scores.to_plain(), "curve": curve.to_plain()}


def _read(steps: Iterable[dict[str, Any]]) -> tuple[list[str], list[HeadScores], list[Curve]]:
    names, scores, curves = [], [], []
    for step in steps:
        kind = AblationScores if step["kind"] == "ablation" else HeadScores
        names.append(step["name"])
        scores.append(kind.from_plain(step["scores"]))
        curves.append(Curve.from_plain(step["curve"]))
    return names, scores, curves
