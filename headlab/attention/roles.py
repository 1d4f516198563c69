"""What heads attend to, and which roles they play. Patterns are reduced while the model runs; none is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..data.batches import Batches, describe_data, prepare
from ..data.tokens import tokens_of
from ..errors import HeadlabError
from ..models.access import describe, rows
from ..tables import Head, HeadColumns, Rows
from .collecting import holes, measured
from .induction import Copying, repeated

if TYPE_CHECKING:
    pass

REPEATED = ("duplicate", "induction")  # roles that are measured on repeated random tokens in any case


ROLES = {  # how much it takes; a head's main role is the first of these that it plays, for the first ones say most
    "induction": 0.3,
    "duplicate": 0.3,
    "previous": 0.4,
    "next": 0.4,
    "delimiter": 0.4,
    "rare": 0.3,
    "self": 0.4,
    "positional": 0.4,
    "first": 0.5,
}


@dataclass(frozen=True, eq=False, repr=False)
class PatternStats(HeadColumns):
    """Statistics of attention patterns, as made by `patterns`, where every number is explained."""

    kind = "patterns"

    def __repr__(self) -> str:
        return f"PatternStats({sum(map(len, self.heads))} heads: {', '.join(self.columns)})"


@dataclass(frozen=True, eq=False, repr=False)
class Roles(HeadColumns):
    """Which head plays which roles, and the numbers that decided, as made by `roles`.

    Attributes:
        thresholds: what a head's number has to reach, by role. For induction its `copying` has to be positive, too, by two
            standard errors.
    """

    kind = "roles"
    thresholds: dict[str, float] = field(default_factory=lambda: dict(ROLES))

    def playing(self, row: int, i: int) -> list[str]:
        """The roles of a head, its main one first; none for most heads. The head is `heads[row][i]`."""
        found = []
        for role in ROLES:
            enough = role in self.columns and self.columns[role][row][i] >= self.thresholds[role]
            if role == "induction" and enough:
                copying, error = (found["copying"][row][i] for found in (self.columns, self.errors))
                enough = not copying <= 2 * np.nan_to_num(error)  # unknown copying is no objection
            if enough:
                found.append(role)
        return found

    def of(self, role: str) -> list[Head]:
        """All heads that play a role, the clearest first.

        Raises:
            HeadlabError: there is no such role.
        """
        if role not in ROLES:
            raise HeadlabError(f"a role is one of {', '.join(ROLES)}, not {role!r}")
        labels = [(row, i, head) for row, heads in enumerate(self.heads) for i, head in enumerate(heads)]
        mine = {head for row, i, head in labels if role in self.playing(row, i)}
        return [head for head, _ in self.top(len(labels), role) if head in mine] if mine else []

    def _told(self, row: int, i: int) -> dict[str, Any]:
        playing = self.playing(row, i)
        return {"role": playing[0] if playing else "", "roles": ", ".join(playing)} | super()._told(row, i)

    def _body(self) -> dict[str, Any]:
        return super()._body() | {"thresholds": self.thresholds}

    def __repr__(self) -> str:
        found = ((role, self.of(role)) for role in ROLES)
        told = "; ".join(f"{role} {', '.join(map(str, heads[:3]))}" for role, heads in found if heads)
        return f"Roles({sum(map(len, self.heads))} heads; {told or 'none plays a known role'})"


def patterns(model: nn.Module, batches: Batches) -> PatternStats:
    """What every head attends to: means over the real query tokens of all examples, with standard errors over examples.

    A query that sees one key only is not counted, nor is one that sees no key of the wanted kind. By name:

    - `entropy` of the weights in nats, and `relative_entropy`: divided by that of uniform weights on the visible keys.
      Ghader and Monz 2017 (arXiv:1710.03348), section 5; Clark et al. 2019 (arXiv:1906.04341), section 3.3.
    - `confidence`: the largest weight, that on the symbol that ends a text left out (Voita et al. 2019,
      arXiv:1905.09418, section 4).
    - `distance`: the mean number of tokens between query and key, weighted.
    - `first`, `previous`, `self`, `next`: the weight on the first token, the one before, the query's own, the one after.
      Clark et al. 2019, section 3.1; on the first token, Xiao et al. 2023 (arXiv:2309.17453).
    - `duplicate`: on earlier copies of the query's token (Wang et al. 2022, arXiv:2211.00593, section 3).
    - `induction`: on tokens that followed an earlier copy of the query's token: the prefix matching score of Olsson et al.
      2022 (arXiv:2209.11895). They measure it on repeated random tokens, as `roles` does.
    - `delimiter`: on . , ; : ! ? line breaks and special tokens, the first token apart (Clark et al. 2019, section 3.2).
    - `rare`: on the rarest token in sight, the first token apart, after the "rare words" heads of Voita et al. 2019,
      section 5.3, who ask how often it has the largest weight. Rare means: seldom in this data; of two equally seldom,
      the one with the higher number, for vocabularies are sorted by frequency.
    - `positional`: the share of a pattern's variance, over all visible pairs, that lies between distances (eta squared).
      Voita et al. 2019, section 5.1, ask how often one distance has the largest weight. No standard error: it is one number
      for all examples.

    Cross-attention has entropies, confidence, `first`, `delimiter` and `rare`, of the encoder's tokens; the others are NaN.
    Of composed heads (DCMHA) these are of the raw pattern, the softmax itself. What the values are multiplied with is the
    composed pattern, whose rows need not sum to 1 (`composed_sum`) and may be negative: the weights on kinds of keys are
    there again as `composed_first` and so on, and so is `composed_positional`; entropies would mean nothing.

    Never more than one layer's pattern is alive, beside a few copies that are made to measure it.

    Args:
        model: a plain model or a bridge, left as it was.
        batches: as for `importance`.

    Raises:
        HeadlabError: bad batches, or a model whose attention has no eager implementation.
    """
    data = prepare(model, batches)
    heads, columns, errors = measured(model, rows(model), tokens_of(model), data, "patterns")
    record = {"model": describe(model), "data": describe_data(data), "notes": holes(columns)}
    return PatternStats(heads, columns, errors, record)


def roles(
    model: nn.Module, batches: Batches | None = None, *, sequences: int = 64, length: int = 256, seed: int = 0
) -> Roles:
    """Which head plays which role: induction, duplicate token, previous token and so on (`ROLES` has the thresholds).

    Numbers are those of `patterns`, where their sources are. `duplicate` and `induction` are measured on random tokens that
    come twice (Olsson et al. 2022), so that only a head that looks for copies can find them; so is `copying`: how far a
    head's output raises the logit of the token that follows, by the direct path through its output projection, the final
    norm's gain and the unembedding, in standard deviations of what it does to the logits of all tokens. An induction head
    has to match prefixes, and to copy at all (by two standard errors): some do it through later layers, and directly
    little. `copying` is NaN for heads whose output no unembedding reads (encoders, classifiers) or reads through another
    norm and layer (BERT); then prefix matching decides.

    The other roles are measured on `batches`; without them on the random tokens too, where no token is a delimiter or rare.
    Composed heads (DCMHA) are judged by their composed patterns; the numbers of the raw ones are `raw_induction` and so on.

    Args:
        model: a plain model or a bridge, left as it was.
        batches: texts, as for `importance`.
        sequences: how many random sequences.
        length: their length in tokens: half of it random, then the same again. A shorter context of the model cuts it.
        seed: of the random tokens, which are none of the model's special ones, and differ within a sequence if there are
            enough.

    Raises:
        HeadlabError: bad batches or options; a vocabulary or a context too small for repeated tokens.
    """
    texts = None if batches is None else prepare(model, batches)
    attentions, tokens = rows(model), tokens_of(model)
    random, notes = repeated(tokens, sequences, length, seed)
    data = prepare(model, random)
    copying = Copying(model, attentions, period=data[0]["input_ids"].shape[1] // 2)
    heads, columns, errors = measured(model, attentions, tokens, data, "roles: repeated tokens", copying)
    record: dict[str, Any] = {"model": describe(model)}
    if texts is None:
        notes.append("without texts, roles were measured on random tokens, which have no delimiters and no rare ones")
        for name in [name for name in columns if name.endswith(("delimiter", "rare"))]:
            columns[name] = tuple(np.full_like(row, np.nan) for row in columns[name])
    else:
        record["data"] = describe_data(texts)
        _, *in_texts = measured(model, attentions, tokens, texts, "roles: texts")
        for own, found in zip((columns, errors), in_texts, strict=True):
            own.update({name: numbers for name, numbers in found.items() if not name.endswith(REPEATED)})
    chosen: dict[str, Rows] = {}
    chosen_errors: dict[str, Rows] = {}
    names = [*ROLES, "copying", "entropy", "relative_entropy", "confidence", "distance"]
    for name in names:
        for own, found in ((chosen, columns), (chosen_errors, errors)):
            if f"composed_{name}" in found:
                own[name], own[f"raw_{name}"] = _either(found[f"composed_{name}"], found[name]), found[name]
            elif name in found:
                own[name] = found[name]
    record |= {"asked": {"sequences": sequences, "length": length, "seed": seed}, "length": 2 * copying.period}
    record["notes"] = notes + holes(chosen)
    return Roles(heads, chosen, chosen_errors, record)


def _either(composed: Rows, raw: Rows) -> Rows:
    """Of modules whose heads are composed the first, of others, all NaN there, the second."""
    return tuple(b if np.isnan(a).all() else a for a, b in zip(composed, raw, strict=True))
