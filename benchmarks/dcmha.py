"""DCFormer next to plain multi-head attention, measured: loss, the variants of the published ablation table, speed, memory.

    python -m benchmarks.corpus --out CORPUS                                        once, with a network
    python -m benchmarks.dcmha all --data CORPUS --out RESULTS.jsonl                [--only main,speed] [--minutes 9]
    python -m benchmarks.dcmha train --variant dynamic --seed 0 --size small --data CORPUS --out RESULTS.jsonl
    python -m benchmarks.dcmha speed | memory --out RESULTS.jsonl
    python -m benchmarks.dcmha report RESULTS.jsonl --docs docs                     makes docs/dcmha.md and its figures

Every run adds one line to RESULTS.jsonl when it is done, and a run that is there already is not made again: after a kill,
the same command goes on. `--minutes` starts no run that would probably not end in time. Training lasts so many tokens, not
so many seconds, and a seed names the order of the data: the curves of all variants can be compared.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from headlab.dcmha import Compose, backends
from headlab.results import StepLog

from . import real
from .corpus import Corpus
from .cost import seconds, spread
from .dcmha_train import VARIANTS, Size, Trainer, build, parameters, train

PAIR = ("dynamic", "mha-wide")  # of the main comparison
BACKENDS = {"dynamic": ("eager", "chunked"), "mha-wide": ("eager", "chunked", "sdpa")}  # of the speed table
PROMPT, ANSWER = 1024, 128  # tokens in and out
LENGTHS, MEMORY_DTYPES = (1024, 2048, 4096), ("bfloat16", "float32")  # of the memory table
MEMORY_HEADS, MEMORY_D_HEAD = 16, 64
SIZES = {  # 16,384 tokens a step; `main` sees 26 million tokens, each once, the variants 8 million
    "main": Size(d_model=512, n_layers=8, n_heads=8, seq=512, batch=32, steps=1600, lr=1e-3),
    "small": Size(d_model=256, n_layers=6, n_heads=8, seq=256, batch=64, steps=500, lr=2e-3),
}
SEEDS = {"main": (0,), "small": (0, 1)}
Job = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.command == "report":
        from .dcmha_report import write_report  # plotly need not be where the study runs

        print(write_report(options.results, options.docs))
        return
    log = StepLog(options.out, {"study": "dcmha"})
    jobs = {"all": plan, "train": one_training, "speed": speeds, "memory": memories}[options.command](options)
    work(jobs, log, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, required=True, help="results, one JSON line a run")
    shared.add_argument("--data", type=Path, default=real.cache_root() / "debian-docs", help="made by benchmarks.corpus")
    shared.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    shared.add_argument("--dtype", choices=["bfloat16", "float32"], help="bfloat16 (training: autocast) where there is CUDA")
    shared.add_argument("--backend", choices=list(backends.BACKENDS), default="eager", help="in training")
    shared.add_argument("--compile", action="store_true", help="the attention of a block of queries, by torch.compile")
    shared.add_argument("--minutes", type=float, default=math.inf, help="start no run that would probably end later")
    shared.add_argument("--steps", type=int, help="of training, if not as many as the size says")
    whole = commands.add_parser("all", parents=[shared])
    whole.add_argument("--only", default="main,memory,speed,small", help="parts, in this order")
    train = commands.add_parser("train", parents=[shared])
    train.add_argument("--variant", choices=list(VARIANTS), required=True)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--size", choices=list(SIZES), default="small")
    for name in ("speed", "memory"):
        commands.add_parser(name, parents=[shared])
    report = commands.add_parser("report")
    report.add_argument("results", type=Path, nargs="+")
    report.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    if options.command != "report" and options.dtype is None:
        options.dtype = "bfloat16" if options.device.startswith("cuda") else "float32"
    return options


# --- what there is to do


def training(variant: str, seed: int, size: str, options: argparse.Namespace) -> Job:
    shape = asdict(SIZES[size]) | ({"steps": options.steps} if options.steps else {})
    how = {"backend": options.backend, "compile": options.compile, "dtype": options.dtype}
    return {"kind": "train", "variant": variant, "seed": seed, "size": size, "shape": shape} | how


def one_training(options: argparse.Namespace) -> list[Job]:
    return [training(options.variant, options.seed, options.size, options)]


def speeds(options: argparse.Namespace) -> list[Job]:
    cases = [(variant, backend, False) for variant in PAIR for backend in BACKENDS[variant]]
    cases += [(variant, "eager", True) for variant in PAIR if options.compile]
    return [
        {
            "kind": "speed", "variant": variant, "backend": backend, "compile": compile_it, "dtype": options.dtype,
            "shape": asdict(SIZES["main"]),
        }
        for variant, backend, compile_it in cases
    ]  # fmt: skip


def memories(options: argparse.Namespace) -> list[Job]:
    shape = {"heads": MEMORY_HEADS, "d_head": MEMORY_D_HEAD}
    cases = [("dynamic", "chunked"), ("dynamic", "eager"), ("mha", "eager")]
    return [
        {"kind": "memory", "variant": variant, "backend": backend, "dtype": dtype, "length": length, "shape": shape}
        for dtype in MEMORY_DTYPES for length in LENGTHS for variant, backend in cases
    ]  # fmt: skip


def plan(options: argparse.Namespace) -> list[Job]:
    """Everything: seed by seed, so that a study that is cut short still compares all variants."""
    parts = {
        "main": lambda: [training(variant, seed, "main", options) for seed in SEEDS["main"] for variant in PAIR],
        "small": lambda: [training(variant, seed, "small", options) for seed in SEEDS["small"] for variant in VARIANTS],
        "speed": lambda: speeds(options),
        "memory": lambda: memories(options),
    }
    return [job for part in options.only.split(",") for job in parts[part]()]


def work(jobs: list[Job], log: StepLog, options: argparse.Namespace) -> None:
    """Do what is not done yet, and write each result as soon as it is there."""
    end = time.monotonic() + 60 * options.minutes
    done = [row["job"] for row in log.done]
    left = [job for job in jobs if job not in done]
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are in {options.out}", flush=True)
    corpus = Corpus.load(options.data) if any(job["kind"] == "train" for job in left) else None
    skipped = 0
    for number, job in enumerate(left):
        print(f"[{number + 1}/{len(left)}] {name_of(job)}", flush=True)
        start = time.monotonic()
        result = None
        if start + expected(job, log.done) < end:
            result = do(job, corpus, options.device, end)
        if result is None:
            skipped += 1
            print("  skipped: it would not end in time", flush=True)
            continue
        where = machine(options.device) | {"seconds": time.monotonic() - start}
        log.append({"job": job, "where": where, "result": result})
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    print(f"{skipped} runs are left for another time" if skipped else "all done", flush=True)


def do(job: Job, corpus: Corpus | None, device: str, end: float) -> dict[str, Any] | None:
    if job["kind"] == "train":
        assert corpus is not None
        with compiled(job["compile"]):
            return train(job, corpus, device, end)
    return {"speed": speed, "memory": memory}[job["kind"]](job, device)


def expected(job: Job, rows: list[dict[str, Any]]) -> float:
    """Seconds that a job will take: as the same with another seed, or else as the longest of its kind and shape."""
    alike = [row for row in rows if (row["job"]["kind"], row["job"]["shape"]) == (job["kind"], job["shape"])]
    twins = [row for row in alike if row["job"].get("variant") == job.get("variant")]
    return 1.1 * max((row["where"]["seconds"] for row in twins or alike), default=0.0)


def name_of(job: Job) -> str:
    names = ("kind", "size", "variant", "seed", "backend", "length", "dtype")
    return ", ".join(f"{name} {job[name]}" for name in names if name in job) + (", compiled" if job.get("compile") else "")


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    return {"machine": name, "threads": torch.get_num_threads()} | versions


@contextmanager
def compiled(on: bool) -> Iterator[None]:
    """Within the block, both backends compute a block of queries by compiled code."""
    before = backends._block
    if on:
        torch.compiler.reset()  # it stops compiling a function that it has compiled for too many other models
        backends._block = torch.compile(before)
    try:
        yield
    finally:
        backends._block = before


# --- speed


def speed(job: Job, device: str, repeats: int = 10) -> dict[str, Any]:
    """A training step, and (not compiled) in inference the prompt and every token after it, for one text and for eight."""
    size, vocabulary = Size(**job["shape"]), 8192
    torch.manual_seed(0)
    model = build(job["variant"], size, job["backend"], vocabulary, max(size.seq, PROMPT + ANSWER)).to(device)
    trainer = Trainer(model, size, job["dtype"], device)
    batch = torch.randint(vocabulary, (size.batch, size.seq + 1), device=device)
    with compiled(job["compile"]):
        times = [seconds(lambda: trainer.step(batch)) for _ in range(repeats + 3)]
    result = {"parameters": parameters(model), "step s": spread(times[3:]), "repeats": repeats}
    if job["compile"]:
        return result
    del trainer
    model = model.to(getattr(torch, job["dtype"])).eval()
    for texts in (1, 8):
        prompt = torch.randint(vocabulary, (texts, PROMPT), device=device)
        turns = [generate(model, prompt) for _ in range(4)][1:]
        result[f"prefill s, {texts}"] = spread([turn[0] for turn in turns])
        result[f"decode s, {texts}"] = spread([turn[1] for turn in turns])  # of one token for each text
    return result


@torch.inference_mode()
def generate(model: nn.Module, prompt: Tensor) -> tuple[float, float]:
    """Seconds for the prompt, and for a token after it, greedily."""
    state: dict[str, Any] = {}

    def feed(tokens: Tensor) -> None:
        output = model(tokens, past_key_values=state.get("past"), use_cache=True, logits_to_keep=1)
        state["past"], state["next"] = output.past_key_values, output.logits[:, -1:].argmax(-1)

    def answer() -> None:
        for _ in range(ANSWER):
            feed(state["next"])

    return seconds(lambda: feed(prompt)), seconds(answer) / ANSWER


# --- memory


def memory(job: Job, device: str, repeats: int = 3) -> dict[str, Any]:
    """The peak above the inputs (q, k, v, the layer's input and its weights) of attention, forward and backward."""
    heads, d_head, length = job["shape"]["heads"], job["shape"]["d_head"], job["length"]
    dtype = getattr(torch, job["dtype"])
    torch.manual_seed(0)
    options = {"stages": ()} if (given := VARIANTS[job["variant"]]) is None else given
    compose = Compose(heads * d_head, heads, **options).to(device, dtype)
    q, k, v = (torch.randn(1, heads, length, d_head, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    x = torch.randn(1, length, heads * d_head, device=device, dtype=dtype, requires_grad=True)

    def run() -> None:
        for leaf in (q, k, v, x, *compose.parameters()):
            leaf.grad = None
        sides = compose(x)
        problem = backends.Problem(q, k, v, compose, sides, sides, {}, backends.Visible(), d_head**-0.5)
        backends.attend(problem, job["backend"])[0].sum().backward()

    try:
        run()  # libraries take their workspaces
        for leaf in (q, k, v, x, *compose.parameters()):
            leaf.grad = None
        return {"peak bytes": peak(run, device), "s": spread([seconds(run) for _ in range(repeats)])}
    except torch.cuda.OutOfMemoryError:
        return {"peak bytes": None, "s": None}


def peak(run: Callable[[], object], device: str) -> int:
    """The most bytes that a run had allocated at a time, above those before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


if __name__ == "__main__":
    main()
