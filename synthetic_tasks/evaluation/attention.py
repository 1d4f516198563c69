"""Where the heads of a language model look while it answers: at the true part of the text, or elsewhere?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from headlab.choices import check
from headlab.data.losses import forward
from headlab.errors import HeadlabError
from headlab.models.access import bare_model, describe, evaluating, head_rows, is_bridge, rows
from headlab.models.attention_modules import Attention
from headlab.scores import HeadScores

from ..language.contexts import Context, Part, Span
from .encoding import check_size, describe_contexts, inputs, plan, prepare


def attention_on(
    model: nn.Module,
    contexts: Iterable[Context],
    tokenizer: Any = None,
    part: Part = "record",
    batch_size: int = 8,
) -> HeadScores:
    """How much attention of every head falls on the true part of the text, where the answer's first token is predicted.

    The pattern is summed over the part's tokens and averaged over all answers that have the part. Composed heads (DCMHA)
    have composed patterns, whose rows need not sum to 1 and may be negative. The model computes its patterns openly (eager)
    inside the call, and is left as it was.

    Args:
        model, contexts, tokenizer, batch_size: as for `evaluate`.
        part: `record`, the fact asked about; `matched`, what QK has to find; `reported`, what OV has to carry; or `query`.

    Raises:
        HeadlabError: as for `evaluate`; no answer has such a part; a module gives no pattern away.
    """
    check_size(batch_size)
    check("part", part, Part)
    encoded, padding = prepare(model, list(contexts), tokenizer)
    parts: list[list[tuple[int, Span]]] = [  # of every context: where the first token is predicted, and the part
        [(answer.span[0] - 1, span) for answer in context.answers if (span := getattr(answer, part)) is not None]
        for context in encoded
    ]
    n_answers = sum(map(len, parts))
    if n_answers == 0:
        raise HeadlabError(f"no answer of these contexts says where its {part} is, so attention to it cannot be measured")
    found = rows(model)
    totals = [torch.zeros(len(row.slots), dtype=torch.float64) for row in found]
    wanted: list[tuple[int, int, Span]] = []  # of the batch under way: its row, the query, the keys

    def add(row: Attention, pattern: Tensor) -> None:  # [batch, slot, query, key]
        key = torch.arange(pattern.shape[-1])
        spans = torch.tensor([span for _, _, span in wanted])  # [answer, 2]
        true = (spans[:, :1] <= key) & (key < spans[:, 1:])  # [answer, key]
        falls = pattern[[i for i, _, _ in wanted], :, [query for _, query, _ in wanted]]  # [answer, slot, key]
        totals[row.row] += (falls.double() * true[:, None].to(falls.device)).sum((0, 2)).cpu()

    bar = tqdm(total=len(encoded), desc="attention", unit="context", disable=None)
    with bar, evaluating(model), torch.inference_mode(), _patterns(model, found, add) as check_all_seen:
        for members in plan(encoded, batch_size):
            if wanted := [(at, *pair) for at, i in enumerate(members) for pair in parts[i]]:
                forward(model, inputs(model, [encoded[i] for i in members], padding))
                check_all_seen()
            bar.update(len(members))
    values = tuple((total[row.head_slots] / n_answers).numpy() for row, total in zip(found, totals, strict=True))
    record = {"method": "attention_on", "part": part, "model": describe(model), "data": describe_contexts(encoded)}
    return HeadScores(values, head_rows(model), record | {"averaged": n_answers})


@contextmanager
def _patterns(
    model: nn.Module, found: Sequence[Attention], see: Callable[[Attention, Tensor], None]
) -> Iterator[Callable[[], None]]:
    """Let `see(row, pattern)` have every pattern; yields what raises unless it had all of them in the last pass."""
    seen: set[str] = set()
    root: Any = bare_model(model)

    def hook(row: Attention, own: bool) -> Callable[..., None]:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            pattern = output if own else output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(pattern, Tensor) and pattern.ndim == 4 and pattern.shape[1] == len(row.slots):
                seen.add(row.path)
                see(row, pattern)

        return look

    def check() -> None:
        if missing := [row.path for row in found if row.slots and row.path not in seen]:
            raise HeadlabError(f"{', '.join(missing)} did not give its attention pattern away, so it cannot be measured")
        seen.clear()

    with ExitStack() as hooks:
        plain = [row for row in found if row.compose is None]
        if plain and not is_bridge(model) and (before := root.config._attn_implementation) != "eager":
            root.set_attn_implementation("eager")  # the others never make a pattern
            hooks.callback(root.set_attn_implementation, before)
        for row in (row for row in found if row.slots):
            if row.compose is not None:  # listening there makes it eager
                point, own = row.compose.taps["pattern"], True
            elif is_bridge(model):
                point, own = row.module.hook_pattern, True
            else:
                point, own = row.core, False
            hooks.callback(point.register_forward_hook(hook(row, own)).remove)
        yield check
