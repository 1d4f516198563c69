"""Results of models that do not exist, to show on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from headlab.attention.prompts import Pattern
from headlab.attention.similarity import Similarity
from headlab.attribution.ablation import AblationScores
from headlab.circuits.composition import CompositionScores
from headlab.pruning.curves import Curve
from headlab.pruning.timing import Timing
from headlab.scores import HeadScores
from headlab.studies.correlation import correlate
from headlab.tables import Head

EVIL = "</script><script>window.harm = 1</script><img src=x onerror='window.harm = 2'>&amp;\u2028"
EVIL_FILE = "<a href=x>%{x}<b>$y$&amp;"  # the same, as it can stand in the name of a file
WORDS = [" the", " cat", " sat", "\n", " on", " a", " mat", "."]


def model(name: str = "tiny", fingerprint: str = "f00") -> dict[str, Any]:
    return {"class": "LlamaForCausalLM", "name": name, "fingerprint": fingerprint, "dtype": "float32", "weights": "raw"}


def rows_of(*shape: tuple[str, int, list[int]]) -> tuple[tuple[Head, ...], ...]:
    """Heads of (stack, layer, which heads)."""
    return tuple(
        tuple(Head(row, layer, index, stack, group=index // 3, d_head=5) for index in indices)
        for row, (stack, layer, indices) in enumerate(shape)
    )


def square(layers: int, heads: int) -> tuple[tuple[Head, ...], ...]:
    return rows_of(*(("", layer, list(range(heads))) for layer in range(layers)))


RAGGED = rows_of(("", 0, [0, 2, 4]), ("", 1, []), ("", 2, [1, 3]), ("", 3, [0, 1, 2, 3, 4]))
BOTH_SIDES = rows_of(*((stack, layer, [0, 1, 2]) for stack in ("enc", "dec", "cross") for layer in range(2)))


def numbers(heads: Any, seed: int, low: float = 0.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(low + rng.gamma(0.7, 0.1, len(row)) for row in heads)


def taylor(heads: Any, about: dict[str, Any], seed: int = 0) -> HeadScores:
    data = {"examples": 16, "tokens": 1024, "fingerprint": "d0"}
    return HeadScores(numbers(heads, seed), heads, {"method": "taylor", "model": about, "data": data, "site": "output"})


def removal(heads: Any, about: dict[str, Any], seed: int = 1) -> AblationScores:
    change = numbers(heads, seed, -0.02)
    columns = {"change": change, "se": numbers(heads, seed + 1), "p": tuple(np.full(len(row), 0.03) for row in heads)}
    record = taylor(heads, about).record | {"method": "ablation", "keep_one": False}
    return AblationScores(change, heads, record, columns)


def curve(heads: Any, about: dict[str, Any]) -> Curve:
    names = [head for head, _ in taylor(heads, about).top(10**6)[::-1]]
    removed = [[str(head) for head in names[: len(names) * step // 10]] for step in range(11)]
    losses = 3 + np.linspace(0, 2, 11)[:, None] ** 2 + np.random.default_rng(0).normal(0, 0.1, (11, 16))
    return Curve(removed, losses.mean(1), losses, len(names), {"method": "taylor", "model": about, "metric": None})


def pattern(heads: Any, about: dict[str, Any], tokens: int, seed: int = 0, words: list[str] | None = None) -> Pattern:
    """Causal where there is one stack; some weights are large, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    flat = [head for row in heads for head in row]
    stacks = sorted({head.stack for head in flat} - {"cross"})
    lengths = {stack: tokens + place for place, stack in enumerate(stacks)}
    values = {}
    for head in flat:
        n, m = (lengths["dec"], lengths["enc"]) if head.stack == "cross" else (lengths[head.stack],) * 2
        scores = 3 * torch.randn(n, m, generator=generator)
        if head.stack in ("", "dec"):
            scores = scores.masked_fill(~torch.ones(n, m).tril().bool(), -torch.inf)
        values[head] = scores.softmax(-1).half()
    named = {stack: tuple((words or WORDS)[i % len(words or WORDS)] for i in range(n)) for stack, n in lengths.items()}
    return Pattern(tuple(flat), values, {}, named, {"model": about, "data": {"examples": 1, "tokens": tokens}})


def composition(heads: Any, about: dict[str, Any], what: str = "Q") -> CompositionScores:
    flat = tuple(head for row in heads for head in row if head.stack in ("", "dec"))
    values = torch.rand(len(flat), len(flat), generator=torch.Generator().manual_seed(3)) * 0.2
    layers = torch.tensor([head.layer for head in flat])
    values[layers[:, None] >= layers] = torch.nan
    return CompositionScores(what, flat, flat, values, 64, {"model": about, "norm": "fold"})


def likeness(heads: Any, about: dict[str, Any]) -> Similarity:
    flat = tuple(head for row in heads for head in row)
    rng = np.random.default_rng(5)
    places = rng.normal(size=(len(flat), 2))
    distances = np.minimum(np.linalg.norm(places[:, None] - places, axis=-1) / 6, 0.69)
    return Similarity(flat, distances, tuple(rng.integers(4, size=len(flat)).tolist()), places, {"model": about})


def timing(about: dict[str, Any]) -> Timing:
    line = {"batch": 1, "pos": 64, "low": 9.0, "high": 12.0, "attention_ms": 3.0, "parameters": 1000, "bytes": 4000}
    lines = [line | {"model": name, "ms": ms} for name, ms in (("dense", 10.0), ("masked", 11.0), ("pruned", 9.5))]
    return Timing(lines, {"method": "timing", "model": about, "device": "cpu"})


def folder(path: Path, heads: Any, *, tokens: int = 7, prompts: int = 2, name: str = "tiny", all_kinds: bool = True) -> Path:
    """A folder with results of one model; hostile text wherever text can be."""
    about = model(name)
    scores = taylor(heads, about)
    scores.save(path / "scores-taylor.json")
    removal(heads, about).save(path / "scores-ablation.json")
    scores.keep(0.5).save(path / "pruned-mask.json")
    curve(heads, about).save(path / f"curve-{EVIL_FILE}.json")
    timing(about).save(path / "timing.json")
    for number in range(prompts):
        words = [EVIL, *WORDS] if number == 0 else None
        pattern(heads, about, tokens, number, words).save(path / f"attention-{number}.safetensors")
    if all_kinds:
        composition(heads, about).save(path / "composition-Q.json")
        likeness(heads, about).save(path / "similarity.json")
        taylor(heads, about, 7).save(path / f"scores-{EVIL_FILE}.json")
        both = ("<b>news</b>", f"<a href=x>{EVIL}</a>")
        correlate(scores, taylor(heads, about, 8), both).save(path / "correlation.json")
    return path
