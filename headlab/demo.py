"""The main job on a model made on the spot: an attention-only transformer learns induction, is taken apart, and shrinks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from . import plots
from .batches import IGNORED, own_loss
from .curves import Curve, pruning_curve
from .errors import HeadlabError
from .exact import ablation
from .gates import masked
from .models import load
from .results import building, write
from .scores import HeadMask, HeadScores
from .speed import timing
from .surgery import kept, prune, save_pruned
from .taylor import importance

VOCABULARY = 64
TOLERATED = 0.05  # nats: the pruned model may lose this much


@dataclass(frozen=True)
class Size:
    """How large a demo is."""

    layers: int
    heads: int
    d_model: int
    half: int  # tokens before the repetition
    steps: int


FULL = Size(layers=4, heads=8, d_model=128, half=24, steps=500)
QUICK = Size(layers=2, heads=8, d_model=64, half=12, steps=300)


def repeated(n: int, half: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Sequences of random tokens, said twice; only what is said for the second time can be predicted.

    One example with half = 3:   tokens  7 1 9 7 1 9   labels  - - - - 1 9
    """
    once = torch.randint(VOCABULARY, (n, half), generator=generator)
    ids = torch.cat([once, once], 1)
    labels = ids.clone()
    labels[:, : half + 1] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train(size: Size, seed: int = 0) -> LlamaForCausalLM:
    """A small attention-only Llama that has learned induction: look for the last time, copy what came next.

    Its MLPs are one unit wide, write nothing and are not trained.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.d_model,
        intermediate_size=1,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4 * size.half,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # positions are few
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.requires_grad_(False)
        layer.mlp.down_proj.weight.zero_()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=size.steps)
    for _ in trange(size.steps, desc="training", unit="step", disable=None):
        batch = repeated(32, size.half, generator)
        logits = model(batch["input_ids"], use_cache=False).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval().requires_grad_(True)


def run(folder: Path, quick: bool = False, seed: int = 0) -> str:
    """Train, score, draw curves, prune, check; everything into `folder`. Returns the summary.

    Raises:
        HeadlabError: the folder holds something already; the pruned model does not compute what the masked one does.
    """
    size = QUICK if quick else FULL
    with building(folder) as out:
        model: PreTrainedModel = train(size, seed)
        model.save_pretrained(out / "model")
        model = load(out / "model")
        model.config._name_or_path = str(folder / "model")  # where it will be when this is done
        generator = torch.Generator().manual_seed(seed + 1)
        scoring, testing = ([repeated(32, size.half, generator) for _ in range(2)] for _ in range(2))

        taylor = importance(model, scoring)
        exact = ablation(model, scoring)
        orders = {"Taylor": taylor, "exact ablation": exact, "random": importance(model, method="random", seed=seed)}
        steps = [i / 16 for i in range(17)]
        curves = {name: pruning_curve(model, scores, testing, steps) for name, scores in orders.items()}

        mask = cheapest_mask(curves["Taylor"], taylor)
        small = prune(model, mask)
        save_pruned(small, out / "pruned")
        small = load(out / "pruned")
        with torch.inference_mode(), masked(model, mask):
            expected = model(**testing[0]).logits
        with torch.inference_mode():
            difference = (small(**testing[0]).logits - expected).abs().max().item()
            losses = [own_loss(m, testing[0]).mean().item() for m in (model, small)]
        if difference > 1e-4:
            raise HeadlabError(f"the pruned model differs from the masked one by {difference:.2g}: this is a bug in headlab")
        speed = timing({"dense": model, "masked": (model, mask), "pruned": small}, testing[:1], repeats=5)

        for name, result in {"scores-taylor": taylor, "scores-ablation": exact, "mask": mask, "timing": speed}.items():
            result.save(out / f"{name}.json")
        for name, curve in curves.items():
            curve.save(out / f"curve-{name.lower().replace(' ', '-')}.json")
        figures = {
            "heads": plots.heads(exact, "What removing each head costs"),
            "taylor-against-ablation": plots.against(taylor, exact),
            "curves": plots.curves(curves),
            "timing": plots.timing(speed),
        }
        for name, figure in figures.items():
            plots.save_html(figure, out / f"{name}.html")
        lines = speed.to_frame().set_index("model")
        left = kept(small)
        summary = _SUMMARY.format(
            layers=size.layers, heads=size.heads, half=size.half, chance=float(torch.tensor(VOCABULARY).log()),
            dense_loss=losses[0], pruned_loss=losses[1], top=", ".join(f"{h} ({s:.2g})" for h, s in exact.top(4)),
            rho=taylor.rank_correlation(exact), removed=len(mask.removed), all=len(mask), difference=difference,
            areas=", ".join(f"{name} {curve.area:.2f}" for name, curve in curves.items()),
            rows="\n".join(f"| {row.layer} | {row.heads} of {row.heads_before} |" for row in left.itertuples()),
            dense=int(lines.loc["dense", "parameters"]), pruned=int(lines.loc["pruned", "parameters"]),
            speedup=lines.loc["pruned", "speedup"], attention=lines.loc["pruned", "attention_speedup"],
            folder=folder, tolerated=TOLERATED,
        )  # fmt: skip
        write(out / "summary.md", lambda file: file.write_text(summary, encoding="utf-8"))
    return summary


def cheapest_mask(curve: Curve, scores: HeadScores) -> HeadMask:
    """The last mask of a curve, from the whole model on, that costs no more than is tolerated."""
    within = 0
    while within + 1 < len(curve.rises) and curve.rises[within + 1] <= TOLERATED:
        within += 1
    return HeadMask.without([h for row in scores.labels for h in row], curve.removed[within])


_SUMMARY = """\
# headlab demo

An attention-only transformer of {layers} layers x {heads} heads learned to repeat {half} random tokens that it has seen
once. Its loss on the repetition is {dense_loss:.3f} nats (guessing: {chance:.2f}).

**Which heads matter.** Removing one head at a time costs most for {top}, in nats. One backward pass ranks all
heads at once; the rank correlation of its Taylor scores with exact ablation is {rho:.2f}.

**How many can go.** Mean rise of the loss over the whole pruning curve, by order of removal (less is better): {areas}.
{removed} of {all} heads go without the loss rising by more than {tolerated}.

| layer | heads kept |
|---|---|
{rows}

**A model that really is smaller.** {dense:,} parameters became {pruned:,}; the loss is {pruned_loss:.3f}. It computes what
the masked model computes (largest difference of a logit: {difference:.1e}), reopens with `headlab.load("{folder}/pruned")`,
and one forward pass is {speedup:.2f} times as fast, its attention {attention:.2f} times.

Open `curves.html`, `heads.html`, `taylor-against-ablation.html` and `timing.html` in a browser.
"""
