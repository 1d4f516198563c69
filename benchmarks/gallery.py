"""docs/gallery.md: every kind of figure that headlab draws, as PNG, with what it shows.

    python -m benchmarks.gallery --docs docs [--results FOLDER] [--only NAME ...]

Five models: SmolLM2 (30 layers of 9 heads, grouped by 3), the same without half of its heads (ragged), one of GPT-2 small's
shape with random weights (12 x 12), a DCFormer with random weights (12 x 12, composed heads), and a small one trained here.
Results are kept in `--results`; a run that was stopped goes on from there. It needs kaleido with a
browser, and pillow.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import headlab as hl
from headlab import plots
from headlab.circuits.summary import circuit_table
from headlab.dcmha import DCFormerConfig, DCFormerForCausalLM
from headlab.results import Result, write

from . import real
from .sixteen import kept
from .study import FRACTIONS

WIDTH = 1000  # pixels of a PNG
LARGE = 140_000  # bytes
PROMPT = "The old captain told Marie that the harbour was closed. The young captain told Marie that the"
DATA = ("the Apache licence", "the GPL and PSF licences")
STEPS = (0, 40, 60, 80, 150, 400)  # of the small model's training, at which it is looked at
TRAINED = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6}
REPEATED = 24  # random tokens, then the same again


class Subject:
    """A model, texts for it, and results about it, made when they are asked for and kept in files."""

    def __init__(self, name: str, make: Callable[[], nn.Module], data: Callable[[], Any], folder: Path) -> None:
        self.name, self.make, self._data, self.folder = name, make, data, folder

    @cached_property
    def model(self) -> nn.Module:
        return self.make().eval()

    @cached_property
    def data(self) -> Any:
        return self._data()

    def result(self, name: str, make: Callable[[], Result]) -> Any:
        return kept(self.folder / f"{self.name}-{name}.json", make)

    def importance(self) -> Any:
        return self.result("taylor", lambda: hl.importance(self.model, self.data[0]))

    def ablation(self) -> Any:
        log = self.folder / f"{self.name}-ablation.log.jsonl"
        return self.result("ablation", lambda: hl.ablation(self.model, self.data[0], log=log))

    def curves(self) -> dict[str, Any]:
        orders: dict[str, Callable[[], Any]] = {
            "exact ablation": self.ablation,
            "importance (Taylor)": self.importance,
            "magnitude": lambda: hl.importance(self.model, method="magnitude"),
            "random": lambda: hl.importance(self.model, method="random"),
        }
        return {
            name: self.result(
                f"curve-{name.split()[0]}",
                lambda order=order: hl.pruning_curve(self.model, order(), self.data[1], FRACTIONS),  # type: ignore[misc]
            )
            for name, order in orders.items()
        }

    def composition(self, kind: str) -> Any:
        if kind == "M":
            return self.result("composition-M", lambda: hl.map_composition(self.model, "fold"))
        return self.result(f"composition-{kind}", lambda: hl.composition_scores(self.model, kind, "fold"))  # type: ignore[arg-type]

    def circuits(self) -> Any:
        return self.result("circuits", lambda: circuit_table(self.model))

    def roles(self) -> Any:
        return self.result("roles", lambda: hl.roles(self.model, self.data[0], sequences=16, length=128))

    def similarity(self) -> Any:
        return self.result("similarity", lambda: hl.similarity(self.model, self.data[0], queries=128))

    def correlation(self) -> Any:
        return self.result(
            "correlation", lambda: hl.correlate(self.importance(), hl.importance(self.model, self.data[1]), DATA)
        )

    def pattern(self, heads: Sequence[str] | None = None) -> go.Figure:
        prompt = torch.arange(5, 25)[None] if "random" in self.name else PROMPT
        return plots.pattern(hl.attention_patterns(self.model, prompt, heads))

    def maps(self) -> hl.CompositionMaps:
        return hl.composition_maps(self.model, torch.arange(5, 37)[None])


def subjects(folder: Path) -> dict[str, Subject]:
    def smollm2() -> nn.Module:
        return hl.load(real.smollm2())

    def texts() -> Any:
        tokenizer, found = AutoTokenizer.from_pretrained(real.smollm2()), real.licence_texts()
        first, *others = (hl.text_batches(tokenizer, found[name]) for name in ("Apache-2.0", "GPL-3.0", "PSF-2.0"))
        return [first, [batch for batches in others for batch in batches]]

    whole = Subject("smollm2", smollm2, texts, folder)
    found = [
        whole,
        Subject("smollm2-half", lambda: hl.prune(whole.model, whole.importance().keep(0.5)), texts, folder),
        Subject("gpt2-random", gpt2, numbers, folder),
        Subject("dcformer-random", dcformer, numbers, folder),
        Subject("trained", trained, lambda: [repeated(8, seed) for seed in (1, 2)], folder),
    ]
    return {subject.name: subject for subject in found}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.05))  # 0.02 would leave attention almost uniform


def dcformer() -> nn.Module:
    torch.manual_seed(0)
    config = DCFormerConfig(
        vocab_size=101, hidden_size=192, intermediate_size=256, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    model = DCFormerForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "compose" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def numbers() -> list[list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    return [[{"input_ids": torch.randint(5, 100, (4, 32), generator=generator)}] for _ in range(2)]


def repeated(n: int, seed: int) -> list[dict[str, Tensor]]:
    """Random tokens that come twice; the loss is that of the second time."""
    ids = torch.randint(TRAINED["vocab_size"], (n, REPEATED), generator=torch.Generator().manual_seed(seed)).repeat(1, 2)
    labels = ids.clone()
    labels[:, :REPEATED] = -100
    return [{"input_ids": ids, "labels": labels}]


def training() -> Iterator[tuple[str, nn.Module]]:
    """A small model that learns to copy, as it is after some steps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TRAINED, max_position_embeddings=64))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            yield f"step-{step}", model.eval()
        model.train()
        model(**repeated(32, 1000 + step)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained() -> nn.Module:
    *_, (_, model) = training()
    return model


def profile(subject: Subject) -> go.Figure:
    data = repeated(32, 2)
    found = subject.result("profile", lambda: hl.profile(training(), data, scoring=repeated(32, 1)))
    return plots.profile(found)


def directions(subject: Subject, layer: int, head: int, circuit: Literal["qk", "ov"]) -> go.Figure:
    return plots.tokens_of(
        subject.result(f"directions-{circuit}", lambda: hl.directions(subject.model, layer, head, circuit))
    )


TEXT = "16 x 64 tokens of the Apache licence"
SMOL = "SmolLM2"
HALF = "SmolLM2 without the half of its heads that matters least by Taylor importance, really removed"
GPT2 = "Random weights in the shape of GPT-2 small (12 x 12)"
DC = "A DCFormer of 12 x 12 composed heads with random weights"


class Shown(NamedTuple):
    """A figure: the name of its file, the model, what the figure shows, and how it is drawn."""

    name: str
    subject: str
    caption: str
    draw: Callable[[Subject], go.Figure]


FIGURES = {
    "Which heads matter": [
        Shown(
            "heads-smollm2",
            "smollm2",
            f"`plots.heads`: what the removal of each head costs, measured exactly. {SMOL}, {TEXT}.",
            lambda s: plots.heads(s.ablation()),
        ),
        Shown(
            "heads-pruned",
            "smollm2-half",
            f"`plots.heads`: Taylor importance of the heads that are left. {HALF}; {TEXT}.",
            lambda s: plots.heads(s.importance()),
        ),
        Shown(
            "heads-random",
            "gpt2-random",
            f"`plots.heads`: Taylor importance on random tokens. {GPT2}.",
            lambda s: plots.heads(s.importance()),
        ),
        Shown(
            "curves",
            "smollm2",
            "`plots.curves`: loss against the share of heads removed, in four orders; bands are 95 % intervals over "
            f"examples. {SMOL}; ordered on {TEXT}, measured on 32 x 64 tokens of the GPL and the PSF licence.",
            lambda s: plots.curves(s.curves()),
        ),
        Shown(
            "against",
            "smollm2",
            f"`plots.against`: Taylor importance against exact ablation, a point per head. {SMOL}, {TEXT}.",
            lambda s: plots.against(s.importance(), s.ablation()),
        ),
        Shown(
            "correlation",
            "smollm2",
            f"`plots.correlation`: Taylor importance on one set of texts against another. {SMOL}.",
            lambda s: plots.correlation(s.correlation()),
        ),
        Shown(
            "profile",
            "trained",
            "`plots.profile`: a pruning curve per checkpoint. A model of 4 layers of 6 heads, trained by this script on "
            "random tokens that come twice; the loss is that of the second time.",
            profile,
        ),
    ],
    "How heads feed each other": [
        Shown(
            "graph-smollm2",
            "smollm2",
            f"`plots.composition_graph`: the 50 strongest pairs of K-composition, from the weights alone. {SMOL}.",
            lambda s: plots.composition_graph(s.composition("K")),
        ),
        Shown(
            "graph-pruned",
            "smollm2-half",
            f"`plots.composition_graph`: V-composition. {HALF}.",
            lambda s: plots.composition_graph(s.composition("V")),
        ),
        Shown(
            "graph-maps",
            "dcformer-random",
            "`plots.composition_graph`: M-composition, what the composition maps read of earlier heads; squares are "
            f"branches of maps. {DC}: all pairs score about what chance gives.",
            lambda s: plots.composition_graph(s.composition("M"), above=1.0, k=16),
        ),
        Shown(
            "matrix-smollm2",
            "smollm2",
            f"`plots.composition_matrix`: K-composition of all pairs of heads. {SMOL}.",
            lambda s: plots.composition_matrix(s.composition("K")),
        ),
        Shown(
            "matrix-random",
            "gpt2-random",
            f"`plots.composition_matrix`: Q-composition. {GPT2}: all pairs score what chance gives.",
            lambda s: plots.composition_matrix(s.composition("Q")),
        ),
    ],
    "Composition maps": [
        Shown(
            "maps",
            "dcformer-random",
            f"`plots.maps`: how far each layer's maps are from the identity, and by which branches. {DC}, on 32 tokens.",
            lambda s: plots.maps(s.maps()),
        ),
        Shown(
            "maps-layer",
            "dcformer-random",
            "`plots.maps`: the mean maps of one layer, less the identity, before and after the softmax. "
            f"{DC}, on 32 tokens.",
            lambda s: plots.maps(s.maps(), 5),
        ),
        Shown(
            "maps-grid",
            "dcformer-random",
            f"`plots.map_grid`: the maps themselves at pairs of tokens, queries down and keys to the right. {DC}.",
            lambda s: plots.map_grid(s.maps(), 5),
        ),
        Shown(
            "maps-branches",
            "dcformer-random",
            f"`plots.map_branches`: the mean of what every branch adds. {DC}, on 32 tokens.",
            lambda s: plots.map_branches(s.maps(), 5),
        ),
    ],
    "Where heads look": [
        Shown(
            "pattern-smollm2",
            "smollm2",
            f"`plots.pattern`: two previous-token heads and three induction heads on a prompt. {SMOL}.",
            lambda s: s.pattern(["L11H1", "L16H0", "L17H3", "L17H4", "L18H6"]),
        ),
        Shown(
            "pattern-random",
            "gpt2-random",
            f"`plots.pattern`: the first heads on 20 tokens (numbers, for there is no tokenizer). {GPT2}.",
            lambda s: s.pattern(),
        ),
        Shown(
            "roles-smollm2",
            "smollm2",
            f"`plots.roles`: the main role of every head, on 16 x 128 random tokens that come twice and on {TEXT}. {SMOL}.",
            lambda s: plots.roles(s.roles()),
        ),
        Shown(
            "roles-pruned",
            "smollm2-half",
            f"`plots.roles`: the same; blank heads are not there. {HALF}.",
            lambda s: plots.roles(s.roles()),
        ),
        Shown(
            "similarity",
            "smollm2",
            "`plots.similarity`: heads that attend alike stand close (Jensen-Shannon divergence of their patterns, 8 "
            f"clusters). {SMOL}, 128 queries of {TEXT}.",
            lambda s: plots.similarity(s.similarity()),
        ),
        Shown(
            "similarity-matrix",
            "smollm2",
            f"`plots.similarity_matrix`: the same divergences, head by head. {SMOL}.",
            lambda s: plots.similarity_matrix(s.similarity()),
        ),
    ],
    "Circuits": [
        Shown(
            "spectra",
            "smollm2",
            f"`plots.spectra`: the singular values of every head's OV circuit. {SMOL}.",
            lambda s: plots.spectra(s.circuits(), "ov"),
        ),
        Shown(
            "spectra-pruned",
            "smollm2-half",
            f"`plots.spectra`: the same of QK circuits. {HALF}.",
            lambda s: plots.spectra(s.circuits(), "qk"),
        ),
        Shown(
            "content",
            "smollm2",
            f"`plots.content`: the share of content in QK circuits by distance; the rest is position (rotary). {SMOL}.",
            lambda s: plots.content(s.circuits()),
        ),
        Shown(
            "directions",
            "smollm2",
            f"`plots.tokens_of`: the singular directions of the OV circuit of an induction head, as tokens. {SMOL}.",
            lambda s: directions(s, 18, 6, "ov"),
        ),
    ],
}
ELSEWHERE = (
    "Probe accuracy and the results of synthetic tasks by factor (`plots.probes`, `plots.tasks` and others) are in "
    "[tasks.md](tasks.md), two domains and the course of training (`plots.correlation`, `plots.profile`) in "
    "[sixteen.md](sixteen.md)."
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--results", type=Path, help="where results are kept; by default in the cache")
    parser.add_argument("--only", nargs="*", help="draw only these figures")
    options = parser.parse_args(arguments)
    found = subjects(options.results or real.cache_root() / "gallery")
    parts = [
        "# Gallery",
        "Every kind of figure, made by `python -m benchmarks.gallery`. They are plain plotly figures: on a page or in a "
        "notebook, pointing at a mark names the head and its numbers. Where a caption says random, the weights are random "
        "and the figure shows nothing but how it is drawn.",
    ]
    for section, figures in FIGURES.items():
        parts.append(f"## {section}")
        for name, subject, caption, draw in figures:
            if not options.only or name in options.only:
                print(name, flush=True)
                save(draw(found[subject]), options.docs / "figures" / f"gallery-{name}.png")
            parts.append(f"{caption}\n\n![{name}](figures/gallery-{name}.png)")
    parts.append(ELSEWHERE)
    write(options.docs / "gallery.md", lambda file: file.write_text("\n\n".join(parts) + "\n", encoding="utf-8"))


def save(figure: go.Figure, path: Path) -> None:
    """As a PNG; one that would be large gets 256 colours, which makes it a third of its size."""
    from PIL import Image

    width, height = figure.layout.width or 900, figure.layout.height or 500
    data = figure.to_image("png", width=width, height=height, scale=WIDTH / width)
    if len(data) > LARGE:
        with Image.open(BytesIO(data)) as drawn:
            drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small := BytesIO(), "PNG", optimize=True)
        data = small.getvalue()
    write(path, lambda file: file.write_bytes(data))


if __name__ == "__main__":
    main()
