"""Trainable tasks over records: look a record up by one feature, report another.

Looking up by p is what a QK circuit does, reporting a is what an OV circuit does. `CrossComposition` holds some of the
combinations (p, a) out of training, every p and every a being trained in others: a head of plain attention, whose QK and
OV are tied together, has to have met a combination, heads that are composed anew at every query do not.
`Induction` is a control that plain attention does solve.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headlab.data.batches import IGNORED
from headlab.errors import HeadlabError

LEVELS = ("binding", "conflict")
LAYOUTS = ("bag", "tokens")
SPLITS = ("train", "seen", "test")
DRAWS = 2**20  # samples that a split has
Split = Literal["train", "seen", "test"]


class Sample(NamedTuple):
    """Sequences of `CrossComposition`, their answers, and what makes the answers true.

    Attributes:
        ids: what a model reads. In the layout `bag` every position is a bag of tokens, padded with `task.pad`; the last
            position is the query. In the layout `tokens` the last token is the one that the answer follows.
        answer: the class that is right: the value of the feature asked for.
        looked_up, reported: p and a, the features whose QK and whose OV the example needs.
        record: the record that matches, from 0.
        values: what every record is.
    """

    ids: Int[Tensor, "*runs n pos slot"] | Int[Tensor, "*runs n pos"]
    answer: Int[Tensor, "*runs n"]
    looked_up: Int[Tensor, "*runs n"]
    reported: Int[Tensor, "*runs n"]
    record: Int[Tensor, "*runs n"]
    values: Int[Tensor, "*runs n record feature"]


@dataclass(frozen=True)
class CrossComposition:
    """Records with features, and one query: find the record whose feature p has a value, report its feature a (p != a).

    Within a sequence all values of a feature differ, so that a value names one record. On the level `binding` the query
    names p with its value, and a. On the level `conflict` it names a value for every feature, each of another record as
    far as there are records, and only the selector p says which of them counts.

    Args:
        n_features, n_values, n_records: sizes; no more records than values.
        level: `binding` or `conflict`.
        held_out: share of the combinations (p, a) that are for the test only.
        layout: `bag`, a record is one position, or `tokens`, a record is a run of tokens for any causal language model.
        shared_values: one vocabulary of answers for all features. With a vocabulary each, a model may copy the whole
            record and let the query choose the vocabulary.
        seed: of the combinations held out, and of the sequences.

    Raises:
        HeadlabError: sizes that cannot be, or so many combinations held out that a feature would not be trained.

    >>> task = CrossComposition(n_features=3, n_values=5, n_records=2)
    >>> task.held_out_pairs.tolist(), task.trained_pairs.tolist()
    ([[1, 0], [2, 1]], [[0, 1], [0, 2], [1, 2], [2, 0]])
    >>> one = task.sample(1)
    >>> one.values.tolist(), one.looked_up.tolist(), one.reported.tolist(), one.record.tolist(), one.answer.tolist()
    ([[[2, 3, 2], [3, 1, 3]]], [0], [1], [0], [8])
    """

    n_features: int = 8
    n_values: int = 16
    n_records: int = 12
    level: Literal["binding", "conflict"] = "binding"
    held_out: float = 0.3
    layout: Literal["bag", "tokens"] = "bag"
    shared_values: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        features, records = self.n_features, self.n_records
        if features < 2:
            raise HeadlabError(f"a query needs two features, one to look up and one to report; n_features is {features}")
        if not 1 <= records <= self.n_values:
            raise HeadlabError(
                f"n_records is {records}, but the {self.n_values} values of a feature (n_values) name at most "
                f"{self.n_values} records, and there must be one"
            )
        if self.level not in LEVELS:
            raise HeadlabError(f"the level is {' or '.join(map(repr, LEVELS))}, not {self.level!r}")
        if self.layout not in LAYOUTS:
            raise HeadlabError(f"the layout is {' or '.join(map(repr, LAYOUTS))}, not {self.layout!r}")
        if not 0 <= self.held_out < 1:
            raise HeadlabError(f"held_out is a share of the combinations, from 0 to below 1, not {self.held_out}")
        if self.n_held_out > self.n_pairs - features:
            raise HeadlabError(
                f"held_out={self.held_out} takes {self.n_held_out} of {self.n_pairs} combinations away, but {features} "
                f"have to stay for each of the {features} features to be looked up and reported in training: at most "
                f"{1 - features / self.n_pairs:.4g}"
            )

    @property
    def n_pairs(self) -> int:
        """Combinations (p, a)."""
        return self.n_features * (self.n_features - 1)

    @property
    def n_held_out(self) -> int:
        return round(self.held_out * self.n_pairs)

    @property
    def n_classes(self) -> int:
        """Possible answers."""
        return self.n_values if self.shared_values else self.n_features * self.n_values

    @property
    def chance(self) -> float:
        """Accuracy of naming the asked feature of any record."""
        return 1 / self.n_records

    @cached_property
    def _split_pairs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        around = torch.randperm(self.n_features, generator=generator)  # p -> the next one around: each is in two of them
        kept = set(zip(around.tolist(), around.roll(-1).tolist(), strict=True))
        pairs = [(p, a) for p in range(self.n_features) for a in range(self.n_features) if p != a]
        free = [pair for pair in pairs if pair not in kept]
        chosen = torch.randperm(len(free), generator=generator)[: self.n_held_out].tolist()
        out = {free[i] for i in chosen}
        return tuple(
            torch.tensor([pair for pair in pairs if (pair in out) is which], dtype=torch.long).view(-1, 2)
            for which in (False, True)
        )  # type: ignore[return-value]

    @property
    def trained_pairs(self) -> Int[Tensor, "pair 2"]:
        """The combinations (p, a) of the splits `train` and `seen`."""
        return self._split_pairs[0]

    @property
    def held_out_pairs(self) -> Int[Tensor, "pair 2"]:
        """The combinations (p, a) of the split `test`."""
        return self._split_pairs[1]

    def pairs(self, split: Split) -> Int[Tensor, "pair 2"]:
        """The combinations (p, a) of a split."""
        if split not in SPLITS:
            raise HeadlabError(f"the split is {', '.join(map(repr, SPLITS))}, not {split!r}")
        if split == "test" and not self.n_held_out:
            raise HeadlabError(
                f"held_out={self.held_out} takes none of {self.n_pairs} combinations away, so there is no test: take the "
                "split 'seen'"
            )
        return self.held_out_pairs if split == "test" else self.trained_pairs

    def sample(self, n: int, split: Split = "train", device: str | torch.device = "cpu", draw: int = 0) -> Sample:
        """Sequences with their answers, the same for the same arguments on the same kind of device.

        Args:
            n: how many.
            split: `train`; `seen`, other sequences with trained combinations; `test`, combinations that were held out.
            device: where they are made.
            draw: another number, other sequences.

        Raises:
            HeadlabError: no such split or draw, nothing was held out for the test, or n below 1.
        """
        pairs = self.pairs(split)[None].to(device)
        sample = self.draw(pairs, n, _generator(self.seed, n, split, device, draw))
        return Sample(*(part[0] for part in sample))

    def draw(self, pairs: Int[Tensor, "run pair 2"], n: int, generator: torch.Generator) -> Sample:
        """Sequences for several runs at once, each with combinations of its own. All tensors begin with [run, n]."""
        runs, device = len(pairs), pairs.device
        features, records = self.n_features, self.n_records
        keys = torch.rand(runs, n, features, self.n_values, generator=generator, device=device)
        values = keys.argsort(-1)[..., :records].transpose(-1, -2)  # [run, n, record, feature]: all differ in a feature
        which = torch.randint(pairs.shape[1], (runs, n), generator=generator, device=device)
        asked = pairs.gather(1, which[..., None].expand(-1, -1, 2))
        looked_up, reported = asked.unbind(-1)  # [run, n]
        named = self._named((runs, n), generator)  # [run, n, feature]: the record that the query names by this feature
        record = named.gather(-1, looked_up[..., None])[..., 0]
        whole = values.gather(2, record[..., None, None].expand(-1, -1, 1, features))[:, :, 0]  # [run, n, feature]
        answer = whole.gather(-1, reported[..., None])[..., 0]
        if not self.shared_values:
            answer = answer + reported * self.n_values
        shown = values.gather(2, named[:, :, None])[:, :, 0]  # [run, n, feature]: the value that the query names
        write = self._bags if self.layout == "bag" else self._tokens
        return Sample(write(values, shown, looked_up, reported), answer, looked_up, reported, record, values)

    def _named(self, shape: tuple[int, int], generator: torch.Generator) -> Int[Tensor, "run n feature"]:
        """For every feature a record: one for all of them, or no two the same while there are records."""
        features, records, device = self.n_features, self.n_records, generator.device
        if self.level == "binding":
            return torch.randint(records, (*shape, 1), generator=generator, device=device).expand(-1, -1, features)
        rounds = -(-features // records)
        order = torch.rand(*shape, rounds, records, generator=generator, device=device).argsort(-1)
        return order.flatten(-2)[..., :features]

    # --- the vocabulary and how sequences are written

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary that `ids` are from, padding and separators included."""
        pairs = self.n_features * self.n_values
        if self.layout == "bag":
            return 2 * pairs + 2 * self.n_features + 1
        return self.n_classes + self.n_features + 3

    @property
    def pad(self) -> int:
        """The token that stands where a bag has no more tokens."""
        return self.n_tokens - 1

    @property
    def n_slots(self) -> int:
        """Tokens in a bag."""
        return self.n_features + 2 if self.level == "conflict" else max(self.n_features, 2)

    def _bags(self, values: Tensor, shown: Tensor, looked_up: Tensor, reported: Tensor) -> Tensor:
        """Vocabulary: (feature, value) in records, (feature, value) in queries, the selectors, the reports, padding."""
        features, pairs = self.n_features, self.n_features * self.n_values
        own = torch.arange(features, device=values.device) * self.n_values
        records = values + own
        named = shown + own + pairs
        select, report = looked_up[..., None] + 2 * pairs, reported[..., None] + 2 * pairs + features
        if self.level == "binding":
            query = torch.cat([named.gather(-1, looked_up[..., None]), report], -1)
        else:
            query = torch.cat([named, select, report], -1)
        wide = [_pad(part, self.n_slots, self.pad) for part in (records, query[..., None, :])]
        return torch.cat(wide, -2)

    def _tokens(self, values: Tensor, shown: Tensor, looked_up: Tensor, reported: Tensor) -> Tensor:
        """Vocabulary: answers, the features, `record`, `query`, `report`.

        record f1 v1 f2 v2 ... record ... query p v report a            (binding)
        record f1 v1 f2 v2 ... record ... query f1 v1 f2 v2 ... p report a     (conflict)
        """
        features = torch.arange(self.n_features, device=values.device)
        own = features * (0 if self.shared_values else self.n_values)
        names = features + self.n_classes
        new_record, query, report = (self.n_classes + self.n_features + i for i in range(3))

        def said(value: Tensor) -> Tensor:  # [..., feature] -> [..., 2 * feature]: f1 v1 f2 v2
            return torch.stack([names.expand_as(value), value + own], -1).flatten(-2)

        def one(token: int, like: Tensor) -> Tensor:
            return torch.full((*like.shape[:-1], 1), token, device=like.device)

        records = said(values)  # [run, n, record, 2 * feature]
        p, a = (x[..., None] for x in (looked_up, reported))
        if self.level == "binding":
            value = (shown + own).gather(-1, p)
            asked = [p + self.n_classes, value]
        else:
            asked = [said(shown), p + self.n_classes]
        written = torch.cat([one(new_record, records), records], -1).flatten(-2)
        return torch.cat([written, one(query, written), *asked, one(report, written), a + self.n_classes], -1)

    def batch(self, sample: Sample) -> dict[str, Tensor]:
        """A sample in the layout `tokens` as a causal model trains on it: with its answer behind it, and labels.

        `{"input_ids", "attention_mask", "labels"}`, each `[n, pos]`; every label but the answer's is ignored.
        """
        if self.layout != "tokens":
            raise HeadlabError("bags are for probes; a causal language model reads the layout 'tokens'")
        ids = torch.cat([sample.ids, sample.answer[..., None]], -1)
        return causal_batch(ids, torch.arange(ids.shape[-1], device=ids.device) == ids.shape[-1] - 1)


def _pad(bag: Tensor, size: int, token: int) -> Tensor:
    return torch.nn.functional.pad(bag, (0, size - bag.shape[-1]), value=token)


def causal_batch(ids: Int[Tensor, "n pos"], asked: Bool[Tensor, "*n pos"]) -> dict[str, Tensor]:
    """A batch for a causal model, with a label where something is asked."""
    labels = torch.where(asked, ids, IGNORED)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@dataclass(frozen=True)
class Induction:
    """Random tokens, said twice: only what is said for the second time can be predicted.

    One sequence with length 3:   tokens  7 1 9 7 1 9   labels  - - - - 1 9

    Raises:
        HeadlabError: fewer than two tokens, or tokens to choose from.
    """

    n_tokens: int = 64
    length: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n_tokens, self.length) < 2:
            raise HeadlabError(f"{self.length} of {self.n_tokens} tokens: there must be at least two of both")

    def sample(self, n: int, split: Split = "train", device: str | torch.device = "cpu", draw: int = 0) -> dict[str, Tensor]:
        """A batch for a causal model."""
        generator = _generator(self.seed, n, split, device, draw)
        ids = torch.randint(self.n_tokens, (n, self.length), generator=generator, device=device).repeat(1, 2)
        return causal_batch(ids, torch.arange(2 * self.length, device=ids.device) > self.length)


def _generator(seed: int, n: int, split: Split, device: str | torch.device, draw: int) -> torch.Generator:
    """Random numbers for n sequences of a split; `draw` tells one sample of it from another."""
    if n < 1:
        raise HeadlabError(f"{n} sequences were asked for: at least one")
    if split not in SPLITS:
        raise HeadlabError(f"the split is {', '.join(map(repr, SPLITS))}, not {split!r}")
    if not 0 <= draw < DRAWS:
        raise HeadlabError(f"a draw has a number from 0 to {DRAWS - 1}, not {draw}")  # others are another split's
    return torch.Generator(device).manual_seed((seed * len(SPLITS) + SPLITS.index(split)) * DRAWS + draw)
