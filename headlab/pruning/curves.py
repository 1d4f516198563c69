"""Pruning curves: a loss or metric against the heads removed, in the order of some scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..choices import Unit
from ..data.batches import Batch, Batches, describe_data, prepare
from ..data.losses import Loss, Metric, check_losses, loss_name, own_loss
from ..errors import HeadlabError
from ..hooks.fills import Fill, check_fill
from ..hooks.masking import masked
from ..models.access import describe, evaluating, fingerprint, head_rows, heads
from ..results import Result, StepLog
from ..scores import HeadMask, HeadScores
from ..tables import Head

if TYPE_CHECKING:
    import pandas as pd

TENTHS = tuple(round(0.1 * i, 1) for i in range(11))
RESAMPLES, CONFIDENCE = 1_000, 0.95  # of the bootstrap over examples


@dataclass(frozen=True, eq=False)
class Curve(Result):
    """A pruning curve.

    Attributes:
        removed: the names of the heads removed at every step, from none on.
        values: mean loss, or the metric, at every step, `[step]`.
        losses: loss of every example at every step, `[step, example]`; empty for a corpus metric.
        n_heads: of the whole model.
    """

    kind = "curve"
    removed: list[list[str]]
    values: np.ndarray
    losses: np.ndarray
    n_heads: int
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def fractions(self) -> np.ndarray:
        """The share of the model's heads removed at every step, `[step]`."""
        return np.array([len(names) for names in self.removed]) / self.n_heads

    @property
    def rises(self) -> np.ndarray:
        """The change from the whole model, `[step]`."""
        return self.values - self.values[0]

    @property
    def area(self) -> float:
        """Area between the curve and its start, over the fractions covered (trapezoids): the mean change."""
        width = self.fractions[-1] - self.fractions[0]
        return float(np.trapezoid(self.rises, self.fractions) / width) if width else 0.0

    def intervals(self) -> np.ndarray | None:
        """95 % bootstrap intervals of the change from the whole model, over examples: `[step, 2]`.

        Examples are drawn together for the step and the whole model (a paired bootstrap, percentiles of 1,000 draws with
        a fixed seed). None for a corpus metric, or for fewer than two examples.
        """
        if self.losses.ndim != 2 or self.losses.shape[1] < 2:
            return None
        n = self.losses.shape[1]
        draws = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
        means = (self.losses - self.losses[0])[:, draws].mean(-1)  # [step, resample]
        tail = 100 * (1 - CONFIDENCE) / 2
        return np.percentile(means, [tail, 100 - tail], axis=1).T

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per step."""
        import pandas as pd

        frame = pd.DataFrame(
            {
                "fraction": self.fractions,
                "removed": [len(names) for names in self.removed],
                "value": self.values,
                "change": self.rises,
            }
        )
        if (bounds := self.intervals()) is not None:
            frame["low"], frame["high"] = bounds.T
        return frame

    def top(self, k: int = 10) -> list[tuple[float, float]]:
        """The k steps that cost least: (fraction removed, change)."""
        steps = zip(self.fractions.tolist(), self.rises.tolist(), strict=True)
        return sorted(steps, key=lambda step: step[1], reverse=self.record.get("metric") is not None)[:k]

    def _body(self) -> dict[str, Any]:
        arrays = {"values": self.values.tolist(), "losses": self.losses.tolist()}
        return {"removed": self.removed, "n_heads": self.n_heads} | arrays

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        arrays: dict[str, Any] = {name: np.array(body.pop(name)) for name in ("values", "losses")}
        return cls(**body, **arrays, record=record)


def pruning_curve(
    model: nn.Module,
    scores: HeadScores | Callable[[nn.Module], HeadScores],
    batches: Batches,
    fractions: Sequence[float] = TENTHS,
    *,
    loss: Loss | None = None,
    metric: Metric | None = None,
    fill: Fill | None = None,
    unit: Unit = "head",
    site: str = "output",
    log: str | Path | None = None,
) -> Curve:
    """Remove heads in the order of some scores, the least important first, and measure at every step.

    Args:
        model: a plain model or a bridge, left as it was.
        scores: computed once; or a function of the model, called again before every step with the heads removed so far
            masked: `lambda m: hl.importance(m, train)`.
        batches: what is measured on.
        fractions: shares of the units to remove; the whole model (0) always comes first.
        loss: `loss(model, batch)` -> `[batch]`, by default the model's own.
        metric: `metric(model, batches)` -> float, in place of a loss.
        fill: what stands in for removed heads.
        unit: remove single heads, or whole key-value `group`s.
        site: where heads are removed (see `masked`).
        log: a file that gets one row a step; a killed run goes on after the last and ends with the same file.

    Raises:
        HeadlabError: a fraction outside [0, 1]; scores for another model; both loss and metric; a log of another
            computation; a measurement that is NaN or infinite.
    """
    check_fill(model, fill, site)
    if loss is not None and metric is not None:
        raise HeadlabError("give a loss or a metric, not both")
    if bad := [f for f in fractions if not 0 <= f <= 1]:
        raise HeadlabError(f"fractions are between 0 and 1, not {', '.join(map(str, bad))}")
    steps = sorted({0.0, *map(float, fractions)})
    data = prepare(model, batches)
    estimate = None if isinstance(scores, HeadScores) else scores
    first = _fitted(scores if isinstance(scores, HeadScores) else scores(model), model, site)
    names = {str(head): head for head in heads(model, site)}
    record = {
        "method": "pruning curve",
        "model": describe(model),
        "data": describe_data(data),
        "order": first.record,
        "ranking": _ranking(first, unit) if estimate is None else None,
        "reestimated": estimate is not None,
        "fractions": steps,
        "loss": None if metric is not None else loss_name(loss),
        "metric": None if metric is None else loss_name(metric),
        "unit": unit,
        "fill": None if fill is None else fill.record,
        "site": site,
    }
    n_units = len(first.units(unit))
    step_log = StepLog(log, record)
    removed = [names[name] for name in step_log.done[-1]["removed"]] if step_log.done else []
    bar = tqdm(total=len(steps), initial=len(step_log.done), desc="pruning curve", unit="step", disable=None)
    with bar, evaluating(model):
        for fraction in steps[len(step_log.done) :]:
            order = first
            if estimate is not None and removed:
                with masked(model, HeadMask.without(names.values(), removed), fill, site):
                    order = _fitted(estimate(model), model, site)
            removed = _remove(order, removed, round(fraction * n_units), unit)
            with masked(model, HeadMask.without(names.values(), removed), fill, site), torch.inference_mode():
                measured = _measure(model, data, loss or own_loss, metric)
            step_log.append({"fraction": fraction, "removed": [str(head) for head in removed]} | measured)
            bar.update()
    done = step_log.done
    losses = np.array([step["losses"] for step in done]) if metric is None else np.zeros(0)
    values = losses.mean(1) if metric is None else np.array([step["value"] for step in done])
    return Curve([step["removed"] for step in done], values, losses, len(names), record)


def _fitted(scores: HeadScores, model: nn.Module, site: str) -> HeadScores:
    """The scores, checked to be of this model and labelled with its heads (bare rows do not know their groups)."""
    scores.check(head_rows(model, site), fingerprint(model))
    return HeadScores(scores.rows, head_rows(model, site), scores.record)


def _ranking(scores: HeadScores, unit: Unit) -> str:
    """Twelve hex digits that tell orders apart, for scores made by hand have no record."""
    names = [str(head) for members, _ in scores.units(unit) for head in members]
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]


def _remove(order: HeadScores, removed: Sequence[Head], n: int, unit: Unit) -> list[Head]:
    """The heads removed so far and the least important units of the others, up to n units in all."""
    gone = set(removed)
    units = [members for members, _ in order.units(unit)]
    n_gone = sum(members[0] in gone for members in units)
    nexts = [members for members in units if members[0] not in gone][: max(0, n - n_gone)]
    return [*removed, *(head for members in nexts for head in members)]


def _measure(model: nn.Module, data: list[Batch], loss: Loss, metric: Metric | None) -> dict[str, Any]:
    if metric is not None:
        numbers = [float(metric(model, data))]
        measured: dict[str, Any] = {"value": numbers[0]}
    else:
        numbers = [x for batch in data for x in check_losses(loss(model, batch), batch).double().tolist()]
        measured = {"losses": numbers}
    if not np.isfinite(numbers).all():
        raise HeadlabError("the loss or metric is NaN or infinite at this step of the curve")
    return measured
