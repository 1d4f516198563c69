"""Circuits from token to token, through embedding and unembedding: never a matrix of vocabulary by vocabulary.

With norm="fold" the gain of the final norm is part of what a head writes. Embeddings are taken as they are stored: a
constant that a model multiplies them with (Gemma, Granite) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..choices import Circuit, Norm, check
from ..errors import HeadlabError
from ..models.access import bare_model, describe, tokenizer
from ..models.attention_modules import Attention, bare
from ..models.norms import Gain, approximate, circuits_of, final_norm, gain
from ..models.positions import learned_positions
from ..models.projections import wide
from ..results import Result
from ..tables import Head
from .matrices import factored, find_row, ov_factors, qk_factors

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 2**23  # numbers held at once: 32 MiB in float32


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """How an attention module's stream is read from tokens and written to them.

    Attributes:
        embed, unembed: [token, d_model], as stored; None where the stream has none, and `why` says so.
        final: the norm before the unembedding, if its gain is to be folded in.
    """

    embed: Float[Tensor, "token d_model"] | None
    unembed: Float[Tensor, "token d_model"] | None
    final: Gain | None
    why: tuple[str, ...]

    def read(self, weight: Float[Tensor, "d_model n"]) -> Float[Tensor, "token n"]:
        """Tokens, embedded, times `weight`."""
        if self.embed is None:
            raise HeadlabError(f"no circuit from tokens here: {'; '.join(self.why)}")
        return _rows_times(self.embed, weight)

    def write(self, weight: Float[Tensor, "n d_model"]) -> Float[Tensor, "token n"]:
        """What rows of `weight`, written to the stream, add to the logits of tokens."""
        if self.unembed is None:
            raise HeadlabError(f"no circuit to tokens here: {'; '.join(self.why)}")
        return _rows_times(self.unembed, self.through(weight).T)

    def through(self, weight: Float[Tensor, "*block n d_model"]) -> Float[Tensor, "*block n d_model"]:
        """Rows of `weight` as they leave the final norm."""
        return weight if self.final is None else self.final.after(weight)

    def around(self) -> Float[Tensor, "d_model d_model"] | None:
        """W_U W_E: from what is written to the stream, over all tokens, to what they are embedded as; in float64."""
        if self.embed is None or self.unembed is None or len(self.embed) != len(self.unembed):
            return None
        step = max(1, _BLOCK // self.embed.shape[1])
        found = self.embed.new_zeros(self.embed.shape[1], self.embed.shape[1], dtype=torch.float64)
        for out, into in zip(self.unembed.split(step), self.embed.split(step), strict=True):
            found += wide(out).T @ wide(into)
        return found


def _rows_times(tokens: Tensor, weight: Tensor) -> Tensor:
    step = max(1, _BLOCK // tokens.shape[1])
    return torch.cat([(block := wide(part)) @ weight.to(block.dtype) for part in tokens.split(step)])


def vocabulary_of(model: nn.Module, row: Attention, norm: Norm) -> Vocabulary:
    """The embedding and unembedding that an attention module's stream begins and ends with, where it has them."""
    why = []
    d_model = bare_model(model).config.get_text_config().hidden_size
    embed, unembed = (_table(bare_model(model), side, d_model) for side in ("input", "output"))
    if embed is None:
        why.append("the stream does not begin with an embedding of tokens")
    if row.stack == "enc" and unembed is not None:
        unembed = None
        why.append("heads of the encoder do not write to the unembedding")
    elif unembed is None:
        why.append("the stream does not end in an unembedding")
    last = final_norm(model, row)
    if last is None and unembed is not None:
        why.append("layers of the language-model head before the unembedding are left out")
    if embed is not None and unembed is not None and len(embed) != len(unembed):
        why.append(f"{len(embed)} tokens are embedded, but {len(unembed)} unembedded")
    return Vocabulary(embed, unembed, gain(last) if last is not None and norm == "fold" else None, tuple(why))


def _table(root: Any, side: str, d_model: int) -> Tensor | None:
    try:
        module = getattr(root, f"get_{side}_embeddings")()
    except NotImplementedError:
        return None
    weight = None if module is None else getattr(bare(module), "weight", None)
    return weight.detach() if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == d_model else None


def _sides(
    model: nn.Module, layer: int, head: int, circuit: Circuit, norm: Norm, distance: int | None, stack: str
) -> tuple[Attention, Vocabulary, Tensor, Tensor]:
    """A head's circuit between tokens as two factors: the row, the vocabulary, [d_model, d_head] and [d_head, d_model]."""
    check("circuit", circuit, Circuit)
    if circuit == "ov" and distance is not None:
        raise HeadlabError("an OV circuit is the same at every distance: leave distance out")
    row = find_row(model, layer, stack)
    found = circuits_of(model, row, norm)
    left, right = qk_factors(model, row, found, head, distance) if circuit == "qk" else ov_factors(row, found, head)
    return row, vocabulary_of(model, row, norm), left, right


def top_pairs(
    model: nn.Module,
    layer: int,
    head: int,
    circuit: Circuit = "ov",
    k: int = 20,
    *,
    norm: Norm = "fold",
    distance: int | None = None,
    stack: str = "",
) -> pd.DataFrame:
    """The k largest entries of a head's full circuit, with the tokens they stand for.

    For `ov`, W_E W_V W_O W_U: attending to `source` raises the logit of `target` by `value`. For `qk`,
    W_E W_Q (W_E W_K)^T: the score of the query `source` for the key `target`. The matrix passes by in blocks of rows.

    Returns:
        Columns `source`, `target` (text, where the model has a tokenizer), `source_id`, `target_id`, `value`.

    Raises:
        HeadlabError: there is no such head, or no embedding or unembedding to go through; k below 1.
    """
    if k < 1:
        raise HeadlabError(f"k must be at least 1, not {k}")
    _, vocabulary, left, right = _sides(model, layer, head, circuit, norm, distance, stack)
    sources = vocabulary.read(left)  # [token, d_head]
    targets = vocabulary.read(right.T) if circuit == "qk" else vocabulary.write(right)  # [token, d_head]
    values, pairs = _largest(sources, targets, k)
    ids = [divmod(pair, len(targets)) for pair in pairs.tolist()]
    told = _texts(model)
    import pandas as pd

    lines = [(told(a), told(b), a, b, value) for (a, b), value in zip(ids, values.tolist(), strict=True)]
    return pd.DataFrame(lines, columns=["source", "target", "source_id", "target_id", "value"])


def _largest(a: Float[Tensor, "source n"], b: Float[Tensor, "target n"], k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of a b^T, from the largest down, and where they lie in it, counted row by row."""
    step, width = max(1, _BLOCK // len(b)), len(b)
    best, pairs = a.new_zeros(0), torch.zeros(0, dtype=torch.long, device=a.device)
    for start in tqdm(range(0, len(a), step), desc="pairs", unit="block", disable=None if len(a) > step else True):
        block = a[start : start + step] @ b.T  # [row, target]
        tops = block.amax(1)
        if len(best) == k:  # few rows have anything as large: only these are looked through
            rows = (tops > best[-1]).nonzero()[:, 0]
        else:
            rows = tops.topk(min(k, len(tops))).indices
        if not len(rows):
            continue
        found = block[rows].topk(min(k, width), dim=1)  # [row, k]
        at = ((rows + start)[:, None] * width + found.indices).flatten()
        both, where = torch.cat([best, found.values.flatten()]), torch.cat([pairs, at])
        order = both.argsort(descending=True, stable=True)[:k]
        best, pairs = both[order], where[order]
    return best, pairs


def _texts(model: nn.Module) -> Any:
    """The text of a token number, or the number as text without a tokenizer."""
    words = tokenizer(model)
    return str if words is None else lambda number: words.decode([number])


@dataclass(frozen=True, eq=False)
class Directions(Result):
    """Singular directions of a head's circuit, read as tokens.

    Attributes:
        head: whose circuit it is.
        circuit: `qk` or `ov`.
        lines: a line for every direction, side (`in`: query or attended token; `out`: key or predicted token), end (`+`
            or `-`) and rank: the singular value, the token and its value along the direction. A direction and its
            opposite are one: what is `+` going in goes with what is `+` coming out.
    """

    kind = "directions"
    head: Head
    circuit: str
    lines: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per direction, side, end and rank."""
        import pandas as pd

        return pd.DataFrame(self.lines)

    def top(self, k: int = 10) -> list[tuple[str, str, float]]:
        """For the k largest directions: the first token going in, the first coming out, and the singular value."""
        firsts = [line for line in self.lines if line["rank"] == 0 and line["end"] == "+"]
        pairs = zip(firsts[::2], firsts[1::2], strict=True)
        return [(a["token"], b["token"], a["singular_value"]) for a, b in pairs][:k]

    def _body(self) -> dict[str, Any]:
        return {"head": vars(self.head), "circuit": self.circuit, "lines": self.lines}

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Directions:
        return cls(Head(**body["head"]), body["circuit"], body["lines"], record)

    def __repr__(self) -> str:
        first = ", ".join(f"{a!r} -> {b!r} {value:.3g}" for a, b, value in self.top(3))
        return f"Directions({self.head} {self.circuit.upper()}: {first})"


def directions(
    model: nn.Module,
    layer: int,
    head: int,
    circuit: Circuit = "ov",
    k: int = 5,
    tokens: int = 10,
    *,
    norm: Norm = "fold",
    distance: int | None = None,
    stack: str = "",
) -> Directions:
    """The k largest singular directions of a head's circuit, each side as the tokens furthest along it.

    The circuit is that of the residual stream, W_V W_O or W_Q W_K^T; a direction is read by embedding the tokens, and what
    an OV circuit writes by unembedding it. Signs are such that, of the tokens coming out, the one with the largest value
    in size is on the `+` end.

    TransformerLens' SVDInterpreter reads one side, of a bridge; this reads both, of any model.

    Raises:
        HeadlabError: there is no such head, or no embedding or unembedding to read with; k or tokens below 1.
    """
    if k < 1 or tokens < 1:
        raise HeadlabError(f"k and tokens must be at least 1, not {k} and {tokens}")
    row, vocabulary, left, right = _sides(model, layer, head, circuit, norm, distance, stack)
    u, s, v = factored(left, right).svd()  # [d_model, d_head], [d_head], [d_model, d_head]
    u, s, v = u[:, :k], s[:k], v[:, :k]
    going_in = vocabulary.read(u)  # [token, n]
    coming_out = vocabulary.read(v) if circuit == "qk" else vocabulary.write(v.T)
    sign = coming_out.gather(0, coming_out.abs().argmax(0, keepdim=True))[0].sign()  # [n]
    told, lines = _texts(model), []
    for i, value in enumerate(s.tolist()):
        for side, along in (("in", going_in[:, i] * sign[i]), ("out", coming_out[:, i] * sign[i])):
            for end, largest in (("+", True), ("-", False)):
                found = along.topk(min(tokens, len(along)), largest=largest)
                for rank, (number, at) in enumerate(zip(found.indices.tolist(), found.values.tolist(), strict=True)):
                    line = {"direction": i, "singular_value": value, "side": side, "end": end, "rank": rank}
                    lines.append(line | {"token": told(number), "id": number, "value": at})
    why = approximate(model, row)
    record = {"method": "directions", "model": describe(model), "norm": norm, "distance": distance}
    label = next((h for h in row.heads if h.index == head), Head(row.row, layer, head, row.stack, d_head=row.d_head))
    return Directions(label, circuit, lines, record | {"exact": not why, "why": "; ".join(why)})


def score_parts(model: nn.Module, layer: int, head: int, *, norm: Norm = "fold", stack: str = "") -> pd.DataFrame:
    """What a head's scores come from in a model with learned positions: token or position, of query and of key.

    With embeddings e of tokens and p of positions, (e_i + p_i) QK (e_j + p_j)^T has four parts. For each, `std` is how much
    it varies with the key (only that moves attention): the root of its variance over keys, averaged over queries; all
    tokens and positions count the same. `share` is the part's variance over the sum of the four.

    Returns:
        Columns `query`, `key` (`token` or `position`), `std`, `share`.

    Raises:
        HeadlabError: there is no such head, or the model has no learned positions.
    """
    row, vocabulary, left, right = _sides(model, layer, head, "qk", norm, None, stack)
    moments = moments_of(model, row, vocabulary)
    if moments is None:
        raise HeadlabError(f"{row.path} has no learned positions beside its tokens; qk(distance=...) is for rotary models")
    import pandas as pd

    frame = pd.DataFrame(parts(moments, left, right.T).items(), columns=["name", "std"])
    frame[["query", "key"]] = frame["name"].str.split("_", expand=True)
    variances = frame["std"] ** 2
    return frame[["query", "key", "std"]].assign(share=variances / variances.sum())


Moments = dict[str, tuple[Tensor, Tensor]]
"""Of the embeddings of tokens and of positions: E[x x^T] and their covariance, [d_model, d_model] in float64."""


def moments_of(model: nn.Module, row: Attention, vocabulary: Vocabulary) -> Moments | None:
    """The moments of what a stream with learned positions begins with; None where there are none."""
    positions = learned_positions(model)
    if positions is None or vocabulary.embed is None or row.stack == "cross":
        return None
    return {"token": _moments(vocabulary.embed), "position": _moments(positions)}


def _moments(x: Float[Tensor, "row d"]) -> tuple[Tensor, Tensor]:
    mean, spread = x.double().mean(0), x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for block in x.split(max(1, _BLOCK // x.shape[1])):
        block = wide(block)
        away = block - mean.to(block.dtype)
        spread += away.T @ away
    spread /= len(x)
    return spread + mean[:, None] * mean, spread


def parts(moments: Moments, q: Float[Tensor, "d_model d_head"], k: Float[Tensor, "d_model d_head"]) -> dict[str, float]:
    """`std` of the four parts of `score_parts`: E_i Var_j of q_i k_j^T is the trace of E[q^T q] Cov[k]."""
    found = {}
    for a, (second, _) in moments.items():
        for b, (_, spread) in moments.items():
            of_queries, of_keys = q.T.double() @ second @ q.double(), k.T.double() @ spread @ k.double()  # [d_head, d_head]
            found[f"{a}_{b}"] = float((of_queries * of_keys).sum().clamp(min=0).sqrt())
    return found
