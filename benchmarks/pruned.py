"""How much faster a model gets without half of its heads: dense, masked and pruned, by head and by group, in turns.

    python -m benchmarks.pruned [--random] [--device cuda] [--dtype bfloat16]

Prints a table. With `--random` the weights and the order of removal are random, in SmolLM2's shape.
"""

from __future__ import annotations

import argparse

import torch

import headlab as hl
from headlab.pruning.timing import shapes

from .cost import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sizes", default="1x64,4x64,16x64,16x256")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = load(options.random, getattr(torch, options.dtype), options.device)
    if options.random:
        scores = hl.importance(model, method="random")
    else:
        from headlab.models.access import tokenizer

        from .real import licence_texts

        scores = hl.importance(model, hl.text_batches(tokenizer(model), licence_texts()["Apache-2.0"]))
    masks = {unit: scores.keep(0.5, unit=unit) for unit in ("head", "group")}
    models = {"dense": model, "masked by group": (model, masks["group"])} | {
        f"pruned by {unit}": hl.prune(model, mask) for unit, mask in masks.items()
    }
    sizes = [tuple(int(n) for n in part.split("x")) for part in options.sizes.split(",")]
    result = hl.timing(models, shapes(model, sizes), repeats=options.repeats)
    print(result.record["device"], result.record["threads"], "threads, torch", result.record["torch"])
    print(result.to_frame().round(3).to_string(index=False))


if __name__ == "__main__":
    main()
