"""Head importance from gradients: one forward and one backward pass for all heads together.

I_h = E_x |dL(x)/dxi_h|, xi_h the gate of head h at 1 (Michel, Levy & Neubig 2019, eq. 2). A higher score means keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..choices import Denominator, Method, Normalize, Reduction, check
from ..data.batches import Batch, Batches, count_examples, describe_data, prepare, real_tokens
from ..data.losses import Loss, check_losses, loss_name, own_loss
from ..errors import HeadlabError
from ..hooks.fills import Fill, StandIn, check_fill
from ..hooks.sites import Pass, at_sites, first_broken
from ..models.access import describe, evaluating, head_rows, rows
from ..models.attention_modules import Attention
from ..scores import HeadScores
from .baselines import magnitudes


def importance(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    method: Method = "taylor",
    loss: Loss | None = None,
    reduction: Reduction = "example",
    denominator: Denominator = "examples",
    normalize: Normalize | None = None,
    fill: Fill | None = None,
    site: str = "output",
    seed: int = 0,
) -> HeadScores:
    """Score every head of a model; a higher score always means keep.

    Args:
        model: a plain model or a bridge, left as it was.
        batches: dicts with `input_ids` (`attention_mask`, `labels` ...), or strings. Padding never counts.
        method: `taylor`, the gradient of the loss to every gate; `random`, a baseline drawn by `seed`; `magnitude`, the
            l2 norm of the head's weights in q, k, v and output projection (shared keys and values count for each head).
        loss: `loss(model, batch)` -> `[batch]`; by default the model's own, a mean over the example's real tokens.
        reduction: where the absolute value stands: per `token` (what Michel et al.'s BERT code does), per `example` (their
            eq. 2), per `batch` (what HF's run_bertology does), or nowhere: `signed` is the mean of -dL/dxi, the first-order
            prediction of how much the loss rises on removal.
        denominator: what the sum is divided by: `examples`; real `tokens` of the stack (their translation code); or
            `published`, tokens but for the last layer of a stack, which is divided by examples (their BERT code).
        normalize: `layer` divides a layer's scores by their l2 norm (their section 4.1); `minmax` maps all scores to
            [0, 1] (HF's run_bertology).
        fill: score the step from the head to what would stand in for it, rather than to zero.
        site: where heads would be removed (see `masked`); `magnitude` knows `output`, and in DCMHA `scores` and `head`.
        seed: of `random`.

    Raises:
        HeadlabError: bad batches or options; NaN or infinity (naming the first head and batch where it appeared); a layer
            whose float16 gradients are all exactly zero.
    """
    check("method", method, Method)
    labels = head_rows(model, site)
    record: dict[str, Any] = {"method": method, "model": describe(model), "site": site}
    if method == "random":
        rng = np.random.default_rng(seed)
        values = [rng.random(len(row)) for row in labels]
        return HeadScores(tuple(values), labels, record | {"seed": seed})
    if method == "magnitude":
        return HeadScores(tuple(magnitudes(model, site)), labels, record)
    check("reduction", reduction, Reduction)
    check("denominator", denominator, Denominator)
    if normalize is not None:
        check("normalize", normalize, Normalize)
    if batches is None:
        raise HeadlabError("method 'taylor' needs batches to take gradients on")
    check_fill(model, fill, site)
    data = prepare(model, batches)
    values = _taylor(model, rows(model, site), data, loss or own_loss, reduction, denominator, fill)
    if normalize == "layer":
        values = [row / (np.linalg.norm(row) + 1e-20) for row in values]
    elif normalize == "minmax":
        low, high = (f(np.concatenate(values)) for f in (np.min, np.max))
        values = [(row - low) / (high - low) if high > low else np.zeros_like(row) for row in values]
    record |= {
        "data": describe_data(data),
        "loss": loss_name(loss),
        "reduction": reduction,
        "denominator": denominator,
        "normalize": normalize,
        "fill": None if fill is None else fill.record,
    }
    return HeadScores(tuple(values), labels, record)


class _Gate(torch.autograd.Function):
    """z * xi + stand_in * (1 - xi) at xi = 1, where it is z itself; the gradient to xi accumulates in float32 or more."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, xi: Tensor, stand_in: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, stand_in)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, stand_in = ctx.saved_tensors
        precise = torch.promote_types(z.dtype, torch.float32)
        step = z.to(precise) if stand_in is None else z.to(precise) - stand_in.to(precise)
        return grad, (step * grad.to(precise)).sum(-1), None


def _taylor(
    model: nn.Module,
    found: Sequence[Attention],
    data: list[dict[str, Tensor]],
    loss: Loss,
    reduction: Reduction,
    denominator: Denominator,
    fill: Fill | None,
) -> list[np.ndarray]:
    stacks = {stack: [row for row in found if row.stack == stack] for stack in dict.fromkeys(row.stack for row in found)}
    totals: dict[str, Tensor] = {}  # per stack, [head]
    alive: dict[str, Tensor] = {}  # whether any gradient of the head was not exactly zero
    carrying: set[int] = set()
    with evaluating(model):
        for number, batch in enumerate(tqdm(data, desc="importance", unit="batch", disable=None)):
            for stack, gradient in _gradients(model, stacks, batch, loss, fill, number, carrying).items():
                total, moved = _reduce(gradient.double(), reduction), (gradient != 0).flatten(0, 1).any(0)
                totals[stack] = totals[stack] + total if stack in totals else total
                alive[stack] = alive[stack] | moved if stack in alive else moved
    values: list[np.ndarray] = []
    for stack, members in stacks.items():
        lengths = [len(row.heads) for row in members]
        for row, total, moved in zip(
            members, totals[stack].cpu().split(lengths), alive[stack].cpu().split(lengths), strict=True
        ):
            if row.row in carrying and not moved.any():
                raise HeadlabError(
                    f"every float16 gradient in {row.path} is exactly zero: they are too small for float16; use bfloat16 "
                    "(hl.load(..., dtype=torch.bfloat16)), or scale the loss up (loss=lambda m, b: 1024 * ...)"
                )
            by_tokens = denominator == "tokens" or (denominator == "published" and row is not members[-1])
            n = sum(int(real_tokens(b, stack).sum()) for b in data) if by_tokens else count_examples(data)
            values.append(total.numpy() / n)
    return values


def _reduce(gradient: Tensor, reduction: Reduction) -> Tensor:
    """From [batch, pos, head] to [head], a sum over examples."""
    match reduction:
        case "token":
            return gradient.abs().sum((0, 1))
        case "example":
            return gradient.sum(1).abs().sum(0)
        case "batch":
            return gradient.sum((0, 1)).abs()
        case "signed":
            return -gradient.sum((0, 1))


def _gradients(
    model: nn.Module,
    stacks: Mapping[str, Sequence[Attention]],
    batch: Batch,
    loss: Loss,
    fill: Fill | None,
    number: int,
    carrying: set[int],
) -> dict[str, Tensor]:
    """dL/dxi of every example, position and head of a stack, [batch, pos, head], zero at padding.

    Where the loss runs the model several times, the passes follow one another along `pos`. `carrying` gets the float16
    rows whose heads carry anything: where all are masked, a gradient of zero is no underflow.
    """
    found = [row for members in stacks.values() for row in members]
    passes: list[list[tuple[Tensor, Tensor]]] = [[] for _ in found]  # gates, and which positions are real
    stand_in = None if fill is None else StandIn(fill)

    def gate(row: Attention, z: Tensor, run: Pass) -> Tensor:
        precise = torch.promote_types(z.dtype, torch.float32)
        xi = torch.ones(z.shape[:3], dtype=precise, device=z.device, requires_grad=True)
        passes[row.row].append((xi, run.real))
        other = None if stand_in is None else stand_in(row, z, run)
        if z.dtype == torch.float16 and bool((z if other is None else z - other).any()):
            carrying.add(row.row)
        return _Gate.apply(z, xi, other)

    with torch.enable_grad(), at_sites(model, gate, found):
        losses = check_losses(loss(model, batch), batch)
        if not bool(losses.isfinite().all()):
            raise HeadlabError(
                f"the loss of batch {number} is NaN or infinite; {first_broken(model, lambda: loss(model, batch))}"
            )
        leaves = [xi for of_row in passes for xi, _ in of_row]
        if leaves and not losses.requires_grad:
            raise HeadlabError("the loss has no gradient: it must follow from the model's output, not detached from it")
        made = iter(torch.autograd.grad(losses.sum(), leaves, materialize_grads=True) if leaves else ())
    of_rows = [[(next(made).to(losses.device), real.to(losses.device)) for _, real in of_row] for of_row in passes]
    gradients = {stack: _joined(members, [of_rows[row.row] for row in members]) for stack, members in stacks.items()}
    if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
        for row in reversed(found):  # as the backward pass went
            gradient = _joined([row], [of_rows[row.row]])
            if not bool(gradient.isfinite().all()):
                head = row.heads[int((~gradient.isfinite()).any(0).any(0).nonzero()[0])]
                raise HeadlabError(f"NaN or infinity in batch {number}: the gradient at head {head} was the first to be so")
    return gradients


def _joined(members: Sequence[Attention], of_rows: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
    """Gradients of rows of one stack, each [batch, pos, slot] with its real positions, as one [batch, pos, head]."""
    filled = [i for i, of_row in enumerate(of_rows) if of_row]
    if not filled:
        return torch.zeros(1, 1, 0)  # no heads are left in the whole stack
    parts = []
    for turns in zip(*(of_rows[i] for i in filled), strict=True):  # one pass of the model each
        gradient, real = torch.cat([gradient for gradient, _ in turns], -1), turns[0][1]
        parts.append(gradient.masked_fill(~real[..., None], 0))
    if len(sizes := {len(part) for part in parts}) > 1:
        raise HeadlabError(f"the loss runs the model on batches of different sizes, {sorted(sizes)}: make them one")
    slots, offset = [], 0
    for i in filled:
        slots += [offset + slot for slot in members[i].head_slots]
        offset += len(members[i].slots)
    joined = torch.cat(parts, 1)
    return joined if slots == list(range(offset)) else joined[..., slots]
