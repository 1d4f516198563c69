"""Composition scores against TransformerLens' and against the bare matrix product, in one run.

    python -m benchmarks.composing                 GPT-2 small's shape, and 24 layers x 16 heads x 1024 for ours alone
    python -m benchmarks.composing --repeats 1 --kinds Q

Prints one JSON object. Weights are random. The seconds of the three are measured in turns, in one process; the peak of
extra memory of each in a process of its own. TransformerLens wants 8 GiB for the small shape, and 77 GB for the large one.
The bare product is, for every source layer, one product of what its heads write with what all later layers read with:
what every pair's score is made of, without what leads to it or from it to the score.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import headlab as hl
from headlab.circuits.composition import composition_scores

from .cost import seconds, spread

SHAPES = {"small": (12, 12, 768), "large": (24, 16, 1024)}  # layers, heads, d_model
RUNS = ("headlab", "bare", "lens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="QKV")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", choices=RUNS, help="only the peak of extra memory of one of them, in MiB")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="for --peak")
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.shape, options.kinds[0]))
        return
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    found: dict[str, object] = {"machine": machine, "torch": torch.__version__}
    for shape, others in (("small", RUNS), ("large", RUNS[:2])):
        found[shape] = times(shape, options.kinds, options.repeats, others)
        found[f"{shape}, peak extra MiB"] = {name: peak_apart(name, shape, options.kinds[0]) for name in others}
    print(json.dumps(found, indent=1))


def model(shape: str) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    layers, heads, d_model = SHAPES[shape]
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=d_model, vocab_size=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def ready(name: str, shape: str, kind: str) -> Callable[[], object]:
    """One of the three, ready to run."""
    if name == "headlab":
        plain = model(shape)
        return lambda: composition_scores(plain, kind)
    if name == "lens":
        bridge = hl.bridge(model(shape))
        return lambda: bridge.all_composition_scores(kind)
    layers, _, d_model = SHAPES[shape]
    writes, reads = (torch.randn(layers, d_model, d_model) for _ in range(2))  # heads x d_head = d_model here

    def bare() -> None:
        for layer in range(layers - 1):
            writes[layer] @ reads[layer + 1 :].flatten(0, 1).T

    return bare


def times(shape: str, kinds: str, repeats: int, names: tuple[str, ...]) -> dict[str, object]:
    found: dict[str, object] = {}
    for kind in kinds:
        runs = {name: ready(name, shape, kind) for name in names}
        for name in names[:2]:
            runs[name]()  # warm-up; TransformerLens' run is long enough without
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            for name, run in runs.items():
                taken[name].append(seconds(run))
        found[kind] = {f"{name} s": spread(values) for name, values in taken.items()}
        found[kind] |= {"headlab / bare": spread([a / b for a, b in zip(taken["headlab"], taken["bare"], strict=True)])}
        if "lens" in names:
            ratio = [a / b for a, b in zip(taken["lens"], taken["headlab"], strict=True)]
            ours, theirs = runs["headlab"](), runs["lens"]()
            differ = (ours.scores - theirs.scores).abs().max() / theirs.scores[theirs.scores > 0].min()
            found[kind] |= {"lens / headlab": spread(ratio), "largest relative difference": float(differ.detach())}
    return found


def peak(name: str, shape: str, kind: str) -> float:
    run = ready(name, shape, kind)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over, from what is held now (Linux only)
    before = most_held()
    run()
    return most_held() - before


def most_held() -> float:
    """Peak resident memory in MiB. Not `getrusage`, which counts what the parent held at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_apart(name: str, shape: str, kind: str) -> float | str:
    command = [sys.executable, "-m", "benchmarks.composing", "--peak", name, "--shape", shape, "--kinds", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else f"failed ({done.returncode})"


if __name__ == "__main__":
    main()
