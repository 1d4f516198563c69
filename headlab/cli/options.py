"""The options that commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Reduction(StrEnum):
    token = "token"
    example = "example"
    batch = "batch"
    signed = "signed"


class Method(StrEnum):
    taylor = "taylor"
    magnitude = "magnitude"
    random = "random"


class Order(StrEnum):
    taylor = "taylor"
    ablation = "ablation"
    magnitude = "magnitude"
    random = "random"


class FillKind(StrEnum):
    zero = "zero"
    mean = "mean"


class Unit(StrEnum):
    head = "head"
    group = "group"


class Gqa(StrEnum):
    pad = "pad"
    ungroup = "ungroup"
    strict = "strict"


class Norm(StrEnum):
    fold = "fold"
    raw = "raw"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(help="A hub name, or a folder.", metavar="MODEL")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of results, read and written.")]
Text = Annotated[Path, typer.Option("--text", "-t", help="Text file; for classifiers and encoder-decoders JSON lines.")]
Examples = Annotated[int, typer.Option(min=1, help="How many examples are taken from the text.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens per example.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per batch.")]
Filled = Annotated[
    FillKind,
    typer.Option(help="What stands in for a removed head: zero, or its mean (on the text, measured once per folder)."),
]
Precision = Annotated[Dtype, typer.Option(help="Of the weights; auto is as they were saved.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Site = Annotated[
    str,
    typer.Option(
        help="Where heads are removed: output; where heads are composed (DCMHA) also head, scores, probabilities, or what "
        "a branch adds: pre_query, post_key_gate ..."
    ),
]
