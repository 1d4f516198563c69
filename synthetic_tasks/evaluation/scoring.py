"""Scoring a language model on contexts: is every token of an answer what it would say?"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from headlab.data.losses import forward
from headlab.errors import HeadlabError
from headlab.hooks.fills import Fill
from headlab.hooks.masking import Gates, masked
from headlab.hooks.sites import first_broken
from headlab.models.access import bare_model, describe, evaluating
from headlab.results import Result, StepLog
from headlab.scores import HeadMask

from ..language.contexts import Context
from .encoding import Encoded, EncodedAnswer, check_size, describe_contexts, inputs, plan, prepare

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("all", "first", "choice")
_OWN = ("context", "task", "difficulty", "place", "answer", "tokens", "chance", "logprob", *MEASURES)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Result):
    """How a model did, answer by answer.

    Attributes:
        lines: one dict per scored answer, in the order of the contexts: `context` (its number), `task`, `difficulty`,
            `factors`, `place` (which answer of its context), `answer`, `tokens` (how many it has), the measures

            * `all`: every token of the answer is the most likely one, given the text and answer before it: greedy decoding
              gives the answer.
            * `first`: the answer's first token is (and tokens of white space before it, where there are such).
            * `choice`: so is every token among those that go on with some choice: greedy decoding that may say choices only
              gives the answer. (Where one choice begins another, nobody asks whether to stop there.)

            `chance` (one over the number of choices) and `logprob` (of the whole answer, in nats).
    """

    kind = "evaluation"
    lines: tuple[dict[str, Any], ...]
    record: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per answer; every factor is a column."""
        import pandas as pd

        flat = [{name: value for name, value in line.items() if name != "factors"} | line["factors"] for line in self.lines]
        return pd.DataFrame(flat)

    def accuracy(self, measure: str = "all") -> float:
        """The share of answers that are right, by one of the measures `all`, `first` and `choice`."""
        if measure not in MEASURES:
            raise HeadlabError(f"measure is one of {', '.join(MEASURES)}, not {measure!r}")
        return float(np.mean([line[measure] for line in self.lines]))

    def by(self, *names: str) -> pd.DataFrame:
        """Accuracy with 95 % intervals (`wilson`) for every value of a factor, or combination of values of several.

        Args:
            names: `task`, `difficulty`, `place`, `context`, or factors; none for everything in one line.

        Returns:
            A line per value, in the order of the contexts: `n` answers, `contexts`, for every measure the accuracy and the
            ends of its interval (`all`, `all_low`, `all_high` ...), and the means of `chance` and `logprob`. The interval is
            for these tasks with other words; contexts that are left out together, or share facts, are not accounted for.

        >>> evaluation.by("relation", "negation")  # doctest: +SKIP
        """
        import pandas as pd

        frame = self.to_frame()
        known = [name for name in frame if name not in ("answer", "tokens", "chance", "logprob", *MEASURES)]
        if unknown := [name for name in names if name not in known]:
            raise HeadlabError(f"there is no factor {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
        groups = frame.groupby(list(names), sort=False, dropna=False) if names else [((), frame)]
        lines = []
        for values, group in groups:
            line = dict(zip(names, values, strict=True)) | {"n": len(group), "contexts": group["context"].nunique()}
            for measure in MEASURES:
                low, high = wilson(group[measure].to_numpy(float), group["context"].to_numpy())
                line |= {measure: group[measure].mean(), f"{measure}_low": low, f"{measure}_high": high}
            lines.append(line | {name: group[name].mean() for name in ("chance", "logprob")})
        return pd.DataFrame(lines)

    def _body(self) -> dict[str, Any]:
        return {"rows": list(self.lines)}  # as version 0.1.0 called them

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        return cls(tuple(dict(line) for line in body["rows"]), record)

    def __repr__(self) -> str:
        contexts, tasks = ({line[name] for line in self.lines} for name in ("context", "task"))
        shares = ", ".join(f"{measure} {self.accuracy(measure):.1%}" for measure in MEASURES)
        return f"Evaluation({len(self.lines)} answers in {len(contexts)} contexts of {len(tasks)} tasks: {shares})"


def wilson(right: np.ndarray, clusters: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share, where answers of one cluster are not independent.

    The number of answers n is divided by the design effect: the variance of the share as estimated from k clusters,
    k / (k - 1) sum_c (right_c - n_c share)^2 / n^2, over that of n independent answers; at least 1 (Korn and Graubard 1998,
    who also take the quantile of Student's t with k - 1 degrees of freedom, as here). Where nothing can be estimated,
    because all answers are right or all wrong or there is one cluster, every cluster counts as a single answer.

    Args:
        right: 0 or 1 for every answer, [answer].
        clusters: what each belongs to, [answer].
    """
    from scipy.stats import norm, t

    n, share = len(right), float(right.mean())
    _, members = np.unique(clusters, return_inverse=True)
    counts = np.bincount(members)
    k = len(counts)
    simple = share * (1 - share) / n
    if k > 1 and simple > 0:
        residuals = np.bincount(members, right) - counts * share
        effective = n / max(1.0, k / (k - 1) * float((residuals**2).sum()) / n**2 / simple)
    else:
        effective = float(k)
    z = float(t.ppf(0.5 + level / 2, k - 1) if k > 1 else norm.ppf(0.5 + level / 2))
    middle = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * (share * (1 - share) / effective + z**2 / (4 * effective**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    model: nn.Module,
    contexts: Iterable[Context],
    tokenizer: Any = None,
    *,
    mask: Gates | None = None,
    fill: Fill | None = None,
    site: str = "output",
    batch_size: int = 8,
    log: str | Path | None = None,
) -> Evaluation:
    """Judge every scored answer of every context, with the right answers before it in the text (one pass per context).

    Args:
        model: a causal language model of transformers or a bridge, left as it was. Heads removed by `hl.masked` around the
            call stay removed.
        contexts: from `InContextTasks`, `published_tasks`, or your own.
        tokenizer: a fast one; by default the one that lies beside the model.
        mask, fill, site: heads removed meanwhile, as for `hl.masked`; one gate per head.
        batch_size: contexts in one pass; no result depends on it.
        log: a file to which every batch is written as soon as it is done; a killed run goes on from there.

    Raises:
        HeadlabError: no contexts, or one without answers; no tokenizer, or one that cannot tell answers apart from what is
            beside them (see `encoding.encode`); no causal language model; a text that is longer than the model's context; a
            mask or fill that does not fit; logits that are NaN or infinite; a log of another computation.
    """
    check_size(batch_size)
    if mask is None and fill is not None:
        raise HeadlabError("a fill stands in for removed heads, but there is no mask: give mask=, or leave the fill out")
    given = list(contexts)
    encoded, padding = prepare(model, given, tokenizer)
    for context in given:
        if taken := sorted(set(context.factors) & {*_OWN, "factors", "n", "contexts"}):
            raise HeadlabError(f"a factor cannot be named {', '.join(taken)}: a column of the result has that name")
    record = {
        "method": "evaluate",
        "model": describe(model),
        "data": describe_contexts(encoded),
        "mask": None if mask is None else _as_lists(mask),
        "fill": None if fill is None else fill.record,
        "site": site,
        "batch_size": batch_size,
    }
    groups = plan(encoded, batch_size)
    bar = tqdm(total=len(encoded), desc="evaluate", unit="context", disable=None)
    gated = nullcontext() if mask is None else masked(model, mask, fill, site)
    with bar, evaluating(model), torch.inference_mode(), gated:  # a mask that does not fit is an error before a log is begun
        steps = StepLog(log, record)
        done = {step["batch"]: step["answers"] for step in steps.done}
        for number, members in enumerate(groups):
            if number not in done:
                done[number] = _judge(model, [encoded[i] for i in members], padding)
                steps.append({"batch": number, "answers": done[number]})
            bar.update(len(members))
    judged = {i: done[number][at] for number, members in enumerate(groups) for at, i in enumerate(members)}
    return Evaluation(tuple(_rows(given, encoded, judged)), record)


def _as_lists(mask: Gates) -> list[Any]:
    """Gates as plain numbers, for the record."""
    parts: Any = mask.rows if isinstance(mask, HeadMask) else [mask] if isinstance(mask, Tensor) else mask
    arrays = [np.asarray(row.detach().cpu() if isinstance(row, Tensor) else row, dtype=np.float64) for row in parts]
    if any(row.ndim != 1 for row in arrays):
        raise HeadlabError(f"gates are one per head, [head], not of the shapes {[row.shape for row in arrays]}")
    return [row.tolist() for row in arrays]


def _judge(model: nn.Module, batch: Sequence[Encoded], padding: int) -> list[list[list[Any]]]:
    """For every context, for every answer: all, first, choice, logprob."""
    logits = _answer_logits(model, batch, padding)  # [token, vocab]
    tokens = [(context, answer, said) for context in batch for answer in context.answers for said in range(answer.length)]
    gold = torch.tensor([context.ids[answer.span[0] + said] for context, answer, said in tokens], device=logits.device)
    allowed = [_continuations(context, answer, said) for context, answer, said in tokens]
    widest = max(map(len, allowed))
    table = torch.tensor([ids + ids[:1] * (widest - len(ids)) for ids in allowed], device=logits.device)  # [token, choice]
    best = logits.argmax(-1) == gold
    chosen = table.gather(1, logits.gather(1, table).argmax(1, keepdim=True)).squeeze(1) == gold
    logprob = logits.gather(1, gold[:, None]).squeeze(1).double() - logits.logsumexp(-1).double()
    if not bool(logprob.isfinite().all()):
        where = first_broken(model, lambda: forward(model, inputs(model, batch, padding)))
        raise HeadlabError(f"the logits that predict an answer are NaN or infinite; {where}")
    judged = list(zip(best.tolist(), chosen.tolist(), logprob.tolist(), strict=True))
    found, at = [], 0
    for context in batch:
        of_context: list[list[Any]] = []
        for answer in context.answers:
            parts = judged[at : at + answer.length]
            at += len(parts)
            every, choice, nats = zip(*parts, strict=True)
            of_context.append([all(every), all(every[: answer.lead + 1]), all(choice), sum(nats)])
        found.append(of_context)
    return found


def _answer_logits(model: nn.Module, batch: Sequence[Encoded], padding: int) -> Tensor:
    """What predicts every token of every answer, [token, vocab], in float32 or more.

    A model that can leaves out the other logits; which it did can be told from how many there are.
    """
    given = inputs(model, batch, padding)
    n_pos = given["input_ids"].shape[1]
    wanted = [
        (row, position - 1)
        for row, context in enumerate(batch)
        for answer in context.answers
        for position in range(*answer.span)
    ]
    kept = sorted({position for _, position in wanted})
    if "logits_to_keep" in inspect.signature(bare_model(model).forward).parameters:
        given["logits_to_keep"] = torch.tensor(kept, device=given["input_ids"].device)
    logits: Tensor = forward(model, given).logits  # [batch, pos or kept, vocab]
    at = {position: i for i, position in enumerate(kept)} if logits.shape[1] != n_pos else range(n_pos)
    picked = logits[[row for row, _ in wanted], [at[position] for _, position in wanted]]
    return picked.to(torch.promote_types(picked.dtype, torch.float32))


def _continuations(context: Encoded, answer: EncodedAnswer, n: int) -> list[int]:
    """The tokens that go on with some choice, after the first `n` tokens of the answer."""
    said = context.ids[answer.span[0] : answer.span[0] + n]
    return sorted({tokens[n] for tokens in answer.choices if len(tokens) > n and tokens[:n] == said})


def _rows(contexts: Sequence[Context], encoded: Sequence[Encoded], judged: dict[int, Any]) -> Iterator[dict[str, Any]]:
    for number, (context, tokens) in enumerate(zip(contexts, encoded, strict=True)):
        for i, (answer, found) in enumerate(zip(context.answers, judged[number], strict=True)):
            yield {
                "context": number,
                "task": context.task,
                "difficulty": context.difficulty,
                "factors": dict(context.factors),
                "place": i,
                "answer": answer.text,
                "tokens": tokens.answers[i].length,
                **dict(zip((*MEASURES, "logprob"), found, strict=True)),
                "chance": 1 / len(answer.choices),
            }
