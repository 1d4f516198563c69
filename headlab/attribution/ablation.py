"""Exact scores: how much the loss changes when one head is removed, or when all others of its layer are.

A layer's heads share everything below that layer, so that part of the model runs once per batch; and several heads go
through one pass, as copies of the batch with different gates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..choices import check
from ..data.batches import Batch, Batches, count_examples, describe_data, prepare
from ..data.losses import Loss, check_losses, loss_name, own_loss
from ..errors import HeadlabError
from ..hooks.fills import Fill, StandIn, check_fill
from ..hooks.masking import by_slot, gated, masked
from ..hooks.sites import Pass, at_sites, first_broken, replaying
from ..models.access import bare_model, describe, evaluating, head_rows, rows
from ..models.attention_modules import Attention, submodule
from ..results import StepLog
from ..scores import HeadScores

Order = Literal["value", "size"]
AT_ONCE, AT_ONCE_ON_GPU = 2_048, 16_384  # tokens of all copies: more would not be faster, and needs memory
ALPHA = 0.01  # the significance level of Michel et al. 2019, tables 1 to 3


@dataclass(frozen=True, eq=False, repr=False)
class AblationScores(HeadScores):
    """Exact scores. `columns`: `change` of the mean loss, its standard error `se`, and `p` of a paired t-test."""

    kind = "ablation"

    def _told(self, row: int, i: int) -> dict[str, Any]:
        shown = super()._told(row, i)
        return shown | {"significant": "*" if shown["p"] < ALPHA else ""} if "p" in shown else shown


def ablation(
    model: nn.Module,
    batches: Batches,
    *,
    loss: Loss | None = None,
    keep_one: bool = False,
    order: Order = "value",
    fill: Fill | None = None,
    site: str = "output",
    log: str | Path | None = None,
    heads_per_pass: int | None = None,
) -> AblationScores:
    """The exact change of the loss with each head removed, with standard errors over examples and a paired t-test.

    Args:
        model: a plain model or a bridge, left as it was. Heads removed by `hl.masked` around the call stay removed.
        batches: as for `importance`.
        loss: `loss(model, batch)` -> `[batch]`; by default the model's own.
        keep_one: remove every other head of the layer instead (Michel et al. 2019, section 3.3, "all but one").
        order: score by the change's `value` (removing the head makes it worse: keep it) or its `size` (changes anything:
            keep it). With `keep_one` the scores are minus the change: the head that serves best alone ranks highest.
        fill: what stands in for removed heads; by default zero.
        site: where heads are removed (see `masked`).
        log: a file to which every layer of every batch is written as soon as it is done; a killed run goes on from there.
        heads_per_pass: how many heads' copies of a batch go through the model at once; by default what fits about 2,048
            tokens on a CPU and 16,384 on a GPU.

    Returns:
        Scores with the columns `change` (mean over examples; positive: the loss rises), `se` and `p`. The last two need
        at least two examples.

    Raises:
        HeadlabError: bad batches or options; a loss that is NaN or infinite; a log of another computation.
    """
    check_fill(model, fill, site)
    check("order", order, Order)
    data = prepare(model, batches)
    record = {
        "method": "ablation",
        "model": describe(model),
        "data": describe_data(data),
        "loss": loss_name(loss),
        "keep_one": keep_one,
        "fill": None if fill is None else fill.record,
        "site": site,
    }
    steps = StepLog(log, record)
    changes = _changes(model, data, loss or own_loss, keep_one, fill, site, steps, heads_per_pass)
    columns = _statistics(changes)
    values = columns["change"]
    if order == "size":
        values = tuple(np.abs(row) for row in values)
    if keep_one:
        values = tuple(-row for row in values)
    return AblationScores(values, head_rows(model, site), record | {"order": order}, columns)


def _statistics(changes: list[np.ndarray]) -> dict[str, tuple[np.ndarray, ...]]:
    """Mean, standard error and p value over examples, from [example, head] per row."""
    from scipy.stats import ttest_1samp

    columns = {"change": tuple(row.mean(0) for row in changes)}
    if len(changes[0]) > 1:
        errors = [row.std(0, ddof=1) / np.sqrt(len(row)) for row in changes]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of examples that all changed by the same amount
            tests = [ttest_1samp(row, 0.0).pvalue if row.size else np.zeros(0) for row in changes]
        # examples that all changed by the same amount leave nothing to test: p is 1 if they did not change at all, else 0
        exact = [np.where(mean == 0, 1.0, 0.0) for mean in columns["change"]]
        columns["se"] = tuple(errors)
        columns["p"] = tuple(np.where(se == 0, sure, p) for se, sure, p in zip(errors, exact, tests, strict=True))
    return columns


def _changes(
    model: nn.Module,
    data: list[dict[str, Tensor]],
    loss: Loss,
    keep_one: bool,
    fill: Fill | None,
    site: str,
    steps: StepLog,
    heads_per_pass: int | None,
) -> list[np.ndarray]:
    """Loss with the head removed minus loss with it, per row: [example, head]."""
    found = [row for row in rows(model, site) if row.slots]
    done = {(step["batch"], step["row"]): step["change"] for step in steps.done}
    total = sum(len(row.heads) for row in found) * len(data)
    finished = sum(len(change[0]) for change in done.values())
    bar = tqdm(total=total, initial=finished, desc="ablation", unit="head", disable=None)
    with bar, evaluating(model), torch.inference_mode():
        for number, batch in enumerate(data):
            todo = [row for row in found if (number, row.row) not in done]
            if not todo:
                continue
            clean = _Clean(model, batch, loss, number, site)
            k = heads_per_pass or _copies(batch)
            for row in todo:
                gates = torch.eye(len(row.heads)) if keep_one else 1 - torch.eye(len(row.heads))  # [head, head]
                parts = [clean.losses_with(row, part, fill) - clean.losses for part in gates.split(k)]
                change = torch.cat(parts).T.tolist()  # [example, head]
                steps.append({"batch": number, "row": row.row, "change": change})
                done[number, row.row] = change
                bar.update(len(row.heads))
    empty = [np.zeros((count_examples([batch]), 0)) for batch in data]
    return [
        np.concatenate([np.array(done[n, row.row]) if row.slots else empty[n] for n in range(len(data))])
        for row in rows(model, site)
    ]


def _copies(batch: Batch) -> int:
    main = batch.get("input_ids", batch.get("inputs_embeds"))
    assert main is not None
    tokens = main.shape[0] * main.shape[1]
    return max(1, (AT_ONCE_ON_GPU if main.is_cuda else AT_ONCE) // tokens)


class _Clean:
    """A batch run once with all heads, and what was computed on the way: the residual stream after every block, and
    every attention's output. From there a layer's heads are removed without running the blocks below."""

    def __init__(self, model: nn.Module, batch: Batch, loss: Loss, number: int, site: str) -> None:
        self.model, self.batch, self.loss, self.number, self.site = model, batch, loss, number, site
        self.found = rows(model, site)
        root = bare_model(model)
        self.blocks = {row.row: _block(row.path) for row in self.found}
        self.order = list(dict.fromkeys(self.blocks.values()))  # as they run: encoder, then decoder
        self.modules = {path: submodule(root, path) for path in self.order if path}
        self.outputs: dict[nn.Module, list[Any]] = {}
        self.z: dict[int, Tensor] = {}
        self.passes: dict[int, Pass] = {}

        def remember(row: Attention, z: Tensor, run: Pass) -> None:
            self.z[row.row], self.passes[row.row] = z, run

        with ExitStack() as hooks:
            for module in (*self.modules.values(), *(row.core for row in self.found)):
                self.outputs[module] = []
                hooks.callback(module.register_forward_hook(lambda m, _, out: self.outputs[m].append(out)).remove)
            hooks.enter_context(at_sites(model, remember, self.found))
            self.losses = self._checked(batch, clean=True)  # [batch]
        # a loss that runs the model several times, or a block that stands outside a list, cannot be replayed
        self.shared = "" not in self.order and all(len(outputs) == 1 for outputs in self.outputs.values())

    def losses_with(self, row: Attention, gates: Tensor, fill: Fill | None) -> Tensor:
        """The loss of every example under every row of gates `[copy, head]`: [copy, batch]."""
        copies = len(gates)
        batch = {name: value.repeat(copies, *[1] * (value.ndim - 1)) for name, value in self.batch.items()}
        by_example = gates.repeat_interleave(len(self.losses), 0).to(self.losses.device)  # [copy * batch, head]
        if not self.shared:
            all_gates = [by_example if r.row == row.row else torch.ones(len(r.heads)) for r in self.found]
            with masked(self.model, all_gates, fill, self.site):
                losses = self._checked(batch)
        else:
            with self._replayed(row, copies, by_example, fill):
                losses = self._checked(batch)
        return losses.view(copies, -1)

    def _checked(self, batch: Batch, clean: bool = False) -> Tensor:
        losses = check_losses(self.loss(self.model, batch), batch).double()
        if not bool(losses.isfinite().all()):
            where = first_broken(self.model, lambda: self.loss(self.model, batch)) if clean else "with heads removed"
            raise HeadlabError(f"the loss of batch {self.number} is NaN or infinite; {where}")
        return losses

    @contextmanager
    def _replayed(self, row: Attention, copies: int, gates: Tensor, fill: Fill | None) -> Iterator[None]:
        """The model with the blocks below `row` skipped and its attention replaced by the gated remembered one."""
        here = self.order.index(self.blocks[row.row])
        with ExitStack() as patches:
            for i, path in enumerate(self.order[:here]):
                module = self.modules[path]
                output = self.outputs[module][0]
                last = i == here - 1 or _list_of(self.order[i + 1]) != _list_of(path)
                replay = _constant(_copied(output, copies)) if last else _passing(output)
                patches.enter_context(_patched(module, replay))
            for other in self.found:  # self-attention before cross-attention in the same block ran on clean input
                if other.row != row.row and self.blocks[other.row] == self.blocks[row.row] and other.row < row.row:
                    replay = _constant(_copied(self.outputs[other.core][0], copies))
                    patches.enter_context(_patched(other.core, replay))
            if self.site != "output":  # within the attention: that is computed again, with gates
                gate = lambda _, ones, __: ones * gates.to(ones)[:, None, :, None]  # noqa: E731
                patches.enter_context(at_sites(self.model, gate, [row]))
                yield
                return
            output = self.outputs[row.core][0]
            z = self._gated(row, copies, gates, fill).flatten(2)
            patches.enter_context(replaying(row.path))
            if not row.family.core:
                z = submodule(row.module, row.family.o)(z)
            patches.enter_context(_patched(row.core, _constant(_first(output, z))))
            yield

    def _gated(self, row: Attention, copies: int, gates: Tensor, fill: Fill | None) -> Tensor:
        z, run = self.z[row.row], self.passes[row.row]
        by_copy = by_slot(row, gates, z).unflatten(0, (copies, -1))  # [copy, batch, 1, slot, 1]
        return gated(z, by_copy, None if fill is None else StandIn(fill)(row, z, run)).flatten(0, 1)


def _block(path: str) -> str:
    """The path of the block around an attention module: the first member of a list on the way to it; else empty."""
    names = path.split(".")
    at = next((i for i, name in enumerate(names) if name.isdigit()), None)
    return "" if at is None else ".".join(names[: at + 1])


def _list_of(block: str) -> str:
    """The path of the list that a block is a member of: that of the encoder's or of the decoder's."""
    return block.rpartition(".")[0]


@contextmanager
def _patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else inside the block."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def _passing(output: Any) -> Callable[..., Any]:
    """Hand the residual stream on as it came, in the form of `output`."""
    return lambda *args, **kwargs: _first(output, args[0] if args else kwargs["hidden_states"])


def _first(output: Any, value: Tensor) -> Any:
    """`output` (a tensor, or a tuple that begins with one) with `value` in its place."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


def _copied(output: Any, copies: int) -> Any:
    """Every tensor in `output` that has a batch, `copies` times."""
    if not isinstance(output, tuple):
        return output.repeat(copies, *[1] * (output.ndim - 1))
    batch = len(output[0])
    return tuple(_copied(part, copies) if isinstance(part, Tensor) and len(part) == batch else part for part in output)
