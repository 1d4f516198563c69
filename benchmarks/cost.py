"""What scores cost: importance against a training step, and exact ablation against a loop of whole passes, in one run.

    python -m benchmarks.cost                                      SmolLM2 on this CPU, 16 x 64 tokens
    python -m benchmarks.cost --random --device cuda --dtype bfloat16 --batch 8 --pos 128

Prints one JSON object. `--random` takes SmolLM2's shape with random weights, so that nothing has to be fetched.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headlab as hl
from headlab.data.losses import own_loss

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pos", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="of importance and training step")
    parser.add_argument("--rounds", type=int, default=1, help="of ablation and loop")
    parser.add_argument("--every", type=int, default=9, help="the loop of whole passes measures every n-th head")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = load(options.random, dtype, options.device)
    ids = torch.randint(model.config.vocab_size, (options.batch, options.pos), device=options.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    found = importance_cost(model, batch, options.repeats) | ablation_cost(model, batch, options.rounds, options.every)
    machine = torch.cuda.get_device_name() if ids.is_cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    where = {"machine": machine, "torch": torch.__version__, "dtype": options.dtype, "shape": list(ids.shape)}
    print(json.dumps(where | found, indent=1))


def load(random: bool, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    if random:
        return LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(device, dtype).eval()
    from .real import smollm2

    return hl.load(smollm2(), dtype=dtype, device=device)


def seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def importance_cost(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    """Seconds of `hl.importance` and of a training step (forward, backward with parameter gradients), in turns."""

    def step() -> None:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        model.zero_grad()

    steps, scores = [], []
    for turn in range(repeats + 1):
        times = seconds(step), seconds(lambda: hl.importance(model, [batch]))
        if turn:
            steps.append(times[0])
            scores.append(times[1])
    ratio = [score / step for score, step in zip(scores, steps, strict=True)]
    return {
        "training step s": spread(steps),
        "importance s": spread(scores),
        "importance / training step": spread(ratio),
    }


def ablation_cost(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], rounds: int, every: int) -> dict[str, Any]:
    """Seconds of `hl.ablation` and of a loop of whole passes under `hl.masked`, and the limit of sharing on a CPU."""
    heads = hl.heads(model)
    sampled = heads[::every]

    def loop() -> list[float]:
        with torch.inference_mode():
            clean = own_loss(model, batch).double().mean()
            changes = []
            for head in sampled:
                with hl.masked(model, hl.HeadMask.without(heads, [head])):
                    changes.append(float(own_loss(model, batch).double().mean() - clean))
        return changes

    def body() -> None:
        with torch.inference_mode():
            model.model(**batch, use_cache=False)

    def whole() -> None:
        with torch.inference_mode():
            own_loss(model, batch)

    bodies, wholes, loops, shared, gains = [], [], [], [], []
    loop()  # warm-up
    for _ in range(rounds):
        changes: list[float] = []
        loop_time = seconds(lambda: changes.extend(loop())) * (len(heads) + 1) / (len(sampled) + 1)
        scores: list[hl.AblationScores] = []
        shared_time = seconds(lambda: scores.append(hl.ablation(model, [batch])))
        bodies.append(seconds(body))
        wholes.append(seconds(whole))
        loops.append(loop_time)
        shared.append(shared_time)
        gains.append(loop_time / shared_time)
    exact = {str(head): scores[0].columns["change"][head.row][head.index] for head in heads}
    difference = max(abs(exact[str(head)] - change) for head, change in zip(sampled, changes, strict=True))
    b, w = statistics.median(bodies), statistics.median(wholes)
    return {
        "body s": spread(bodies), "whole pass s": spread(wholes), "loop of whole passes s": spread(loops),
        "ablation s": spread(shared), "gain": spread(gains), "limit of sharing": w / (b / 2 + (w - b)),
        "largest difference": float(difference), "heads in the loop": len(sampled),
    }  # fmt: skip


if __name__ == "__main__":
    main()
