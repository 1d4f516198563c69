"""The stacks of an encoder-decoder, pruned one at a time (Michel, Levy & Neubig 2019, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..choices import Unit
from ..data.batches import Batches
from ..data.losses import Loss, Metric
from ..errors import HeadlabError
from ..hooks.fills import Fill
from ..models.access import head_rows
from ..pruning.curves import TENTHS, Curve, pruning_curve
from ..scores import HeadScores


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
