"""The attention patterns of one prompt, kept to be drawn and read: small, rounded, with the prompt's tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float, Float16
from torch import Tensor, nn

from ..data.batches import Batch, count_examples, describe_data, prepare, real_tokens
from ..data.losses import forward
from ..errors import HeadlabError
from ..hooks.patterns import Look, at_patterns
from ..models.access import bare_model, describe, rows, tokenizer
from ..models.attention_modules import Attention
from ..results import TensorResult
from ..tables import Head, read_heads, write_heads

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Pattern(TensorResult):
    """Where heads look in one prompt, in float16 (three digits); padding is left out.

    Attributes:
        heads: the heads, in order.
        values: by head, [query, key]: the probabilities after the softmax, or, where heads are composed (DCMHA), what
            multiplies the values, after the post maps; its rows need not sum to 1.
        raw: where heads are composed, the softmax before the post maps, [query, key], of the heads that have one.
        tokens: the prompt's tokens as text, by stack: under "" or, in an encoder-decoder, under `enc` and `dec`.
    """

    kind = "pattern"
    heads: tuple[Head, ...]
    values: Mapping[Head, Float16[Tensor, "query key"]]
    raw: Mapping[Head, Float16[Tensor, "query key"]]
    tokens: Mapping[str, tuple[str, ...]]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def composed(self) -> bool:
        """Whether heads are composed, so that there are raw patterns beside the composed ones."""
        return bool(self.raw)

    def pick(self, heads: Iterable[Head | str] | None = None, raw: bool = False) -> list[Head]:
        """The heads of these names (by default all) that have a pattern, or a raw one, in the order given.

        Raises:
            HeadlabError: a head has none here.
        """
        held = self.raw if raw else self.values
        if raw and not self.composed:
            raise HeadlabError("there are no raw patterns: the heads of this model are not composed")
        known = {str(head): head for head in self.heads if head in held}
        names = list(known) if heads is None else [str(head) for head in ([heads] if isinstance(heads, str) else heads)]
        if unknown := [name for name in names if name not in known]:
            raise HeadlabError(f"there is no{' raw' if raw else ''} pattern of {', '.join(unknown)} in {self!r}")
        return [known[name] for name in names]

    def of(self, head: Head | str, raw: bool = False) -> Float[Tensor, "query key"]:
        """The pattern of one head, or its raw one, in float32."""
        [found] = self.pick([head], raw)
        return (self.raw if raw else self.values)[found].float()

    def sides(self, head: Head | str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tokens that ask (queries) and those that are looked at (keys)."""
        [found] = self.pick([head])
        queries, keys = ("dec", "enc") if found.stack == "cross" else (found.stack, found.stack)
        return self.tokens[queries], self.tokens[keys]

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per head and pair of tokens; pairs whose weight is zero are left out."""
        import pandas as pd

        lines = []
        for head in self.heads:
            (queries, keys), weights = self.sides(head), self.of(head)
            for query, key in weights.nonzero().tolist():
                pair = {"query_token": queries[query], "key_token": keys[key], "weight": float(weights[query, key])}
                lines.append({"head": str(head), "query": query, "key": key} | pair)
        return pd.DataFrame(lines, columns=["head", "query", "key", "query_token", "key_token", "weight"])

    def top(self, k: int = 10) -> list[tuple[Head, int, int, float]]:
        """The k pairs of highest weight: head, query, key, weight."""
        pairs = []
        for head in self.heads:
            weights = self.of(head)
            best = weights.nan_to_num(-torch.inf).flatten().topk(min(k, weights.numel()))
            where = (divmod(at, weights.shape[1]) for at in best.indices.tolist())
            pairs += [(head, *at, value) for at, value in zip(where, best.values.tolist(), strict=True)]
        return sorted(pairs, key=lambda pair: -pair[3])[:k]

    def _parts(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        tensors = {str(i): self.values[head] for i, head in enumerate(self.heads)}
        tensors |= {f"{i}.raw": self.raw[head] for i, head in enumerate(self.heads) if head in self.raw}
        return {"heads": json.dumps(write_heads(self.heads)), "tokens": json.dumps(self.tokens)}, tensors

    @classmethod
    def _from_parts(cls, texts: dict[str, str], tensors: dict[str, Tensor], record: dict[str, Any]) -> Self:
        heads = read_heads(json.loads(texts["heads"]))
        values = {head: tensors[str(i)] for i, head in enumerate(heads)}
        raw = {head: tensors[f"{i}.raw"] for i, head in enumerate(heads) if f"{i}.raw" in tensors}
        tokens = {stack: tuple(words) for stack, words in json.loads(texts["tokens"]).items()}
        return cls(heads, values, raw, tokens, record)

    def __repr__(self) -> str:
        lengths = " and ".join(f"{len(words)} {stack}".strip() for stack, words in self.tokens.items())
        return f"Pattern({len(self.heads)} heads, {lengths} tokens)"


def attention_patterns(model: nn.Module, prompt: str | Batch | Tensor, heads: Iterable[Head | str] | None = None) -> Pattern:
    """Where heads look in one prompt, by one forward pass.

    Args:
        model: a plain model or a bridge, with plain or composed heads.
        prompt: a text, for the model's tokenizer; or token numbers, [1, pos]; or a batch of one example, which an
            encoder-decoder needs: `input_ids` and `labels` or `decoder_input_ids`.
        heads: which heads, also by name ("L3H5"); by default all. A pattern has 2 bytes per head, query and key.

    Raises:
        HeadlabError: there is no such head, the prompt is not one example, or its patterns cannot be seen.

    >>> found = attention_patterns(model, "The cat sat on the mat because the cat", heads=["L3H5"])  # doctest: +SKIP
    >>> plots.pattern(found)  # doctest: +SKIP
    """
    given: Any = {"input_ids": prompt} if isinstance(prompt, Tensor) else prompt
    [batch] = data = prepare(model, [given])
    if (n := count_examples(data)) != 1:
        raise HeadlabError(f"a prompt is one example, but there are {n}: take the patterns of one after the other")
    if bare_model(model).config.is_encoder_decoder and not ({"labels", "decoder_input_ids"} & batch.keys()):
        raise HeadlabError("an encoder-decoder needs both sides: a dict with input_ids and decoder_input_ids (or labels)")
    found = [row for row in rows(model) if row.slots]
    known = {str(head): head for row in found for head in row.heads}
    names = list(known) if heads is None else [str(head) for head in ([heads] if isinstance(heads, str) else heads)]
    if unknown := [name for name in names if name not in known]:
        raise HeadlabError(f"the model has no heads named {', '.join(unknown)}; hl.heads(model) lists them")
    wanted = {known[name] for name in names}
    values: dict[Head, Tensor] = {}
    raw: dict[Head, Tensor] = {}
    tokens = {}
    words = tokenizer(model)

    def see(row: Attention, look: Look) -> None:
        queries, keys = ("dec", "enc") if row.stack == "cross" else (row.stack, row.stack)
        real = [real_tokens(batch, stack)[0] for stack in (queries, keys)]
        for head, pattern in zip(row.heads, look.pattern[0], strict=True):
            if head in wanted:
                values[head] = pattern[real[0]][:, real[1]].to("cpu", torch.float16)
        if row.compose is not None:
            for head, pattern in zip(row.at("probabilities").heads, look.raw[0], strict=True):
                if head in wanted:
                    raw[head] = pattern[real[0]][:, real[1]].to("cpu", torch.float16)
        read = batch.get("input_ids") if row.stack == "cross" else look.run.tokens
        for stack, numbers, here in ((queries, look.run.tokens, real[0]), (keys, read, real[1])):
            tokens[stack] = _as_text(words, numbers, here)

    with torch.no_grad(), at_patterns(model, see, [row for row in found if wanted & set(row.heads)]):
        forward(model, batch)
    record = {"model": describe(model), "data": describe_data(data)}
    return Pattern(tuple(sorted(wanted)), values, raw, tokens, record)


def _as_text(words: Any, numbers: Tensor | None, real: Tensor) -> tuple[str, ...]:
    """Tokens as text, each for itself; as numbers without a tokenizer; as positions where a model was given no tokens."""
    if numbers is None:
        return tuple(str(position) for position in range(int(real.sum())))
    ids = numbers[0][real].tolist()
    if words is None:
        return tuple(map(str, ids))
    texts = [words.decode([number]) for number in ids]
    pieces = words.convert_ids_to_tokens(ids)  # where a token is only a part of a letter, or nothing to see
    return tuple(text if text and "\ufffd" not in text else str(piece) for text, piece in zip(texts, pieces, strict=True))
