"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Order = Literal["taylor", "ablation", "magnitude", "random"]
FillKind = Literal["zero", "mean"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Model = Annotated[str, typer.Argument(help="A hub name, or a folder.", metavar="MODEL")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of results, read and written.")]
TextFile = Annotated[Path, typer.Option("--text", "-t", help="Text file; for classifiers and encoder-decoders JSON lines.")]
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
