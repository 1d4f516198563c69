"""The models of the DCMHA study and their training (`benchmarks/dcmha.py` has the commands)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from headlab.dcmha import Compose, DCFormerConfig, DCFormerForCausalLM

from .corpus import Corpus
from .cost import spread

VARIANTS: dict[str, dict[str, Any] | None] = {  # the arguments of Compose; None: plain multi-head attention
    "mha": None,
    "mha-wide": None,  # with an MLP so much wider that it has the parameters of `dynamic`
    "dynamic": {},  # as published: query, query_gate, key, key_gate, before and after the softmax, rank 2
    "static": {"branches": ["base"]},
    "low-rank": {"branches": ["query", "key"]},
    "gates": {"branches": ["query_gate", "key_gate"]},
    "query": {"branches": ["query", "query_gate"]},
    "key": {"branches": ["key", "key_gate"]},
    "pre": {"stages": ["pre"]},
    "post": {"stages": ["post"]},
    "rank-1": {"rank": 1},
    "rank-4": {"rank": 4},
}
EVALUATED = 131_072  # tokens of the fixed validation set, at most
SAY = 20.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Size:
    """A model and how it is trained: `steps` steps of `batch` texts of `seq` tokens."""

    d_model: int
    n_layers: int
    n_heads: int
    seq: int
    batch: int
    steps: int
    lr: float


def config_of(variant: str, size: Size, backend: str, vocabulary: int, context: int) -> DCFormerConfig:
    """Norms of queries and keys and no local windows, for all variants alike."""
    width = -(-8 * size.d_model // 3 // 256) * 256
    if variant == "mha-wide":
        with torch.device("meta"):
            extra = sum(p.numel() for p in Compose(size.d_model, size.n_heads).parameters())
        width += 8 * round(extra / (3 * size.d_model) / 8)  # GPUs like multiples of 8
    compose = VARIANTS[variant]
    return DCFormerConfig(
        vocab_size=vocabulary, hidden_size=size.d_model, intermediate_size=width, num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads, max_position_embeddings=context, use_qk_norm=True, norm_eps=1e-6,
        window_size=None, initializer_range=0.02, compose=None if compose is None else dict(compose), backend=backend,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip


def build(variant: str, size: Size, backend: str, vocabulary: int, context: int) -> nn.Module:
    """A fresh model. `sdpa` is the same network as `mha` with PyTorch's fused attention: Qwen3, which transformers has."""
    if backend != "sdpa":
        return DCFormerForCausalLM(config_of(variant, size, backend, vocabulary, context))
    config = config_of(variant, size, "eager", vocabulary, context)
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "max_position_embeddings", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    return Qwen3ForCausalLM(
        Qwen3Config(
            **{name: getattr(config, name) for name in same},
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="sdpa",
        )
    )


def parameters(model: nn.Module) -> dict[str, int]:
    """How many there are, how many of them make the maps, and how many are not embeddings."""
    counts = {name: p.numel() for name, p in model.named_parameters()}
    outside = sum(n for name, n in counts.items() if "embed_tokens" in name or "lm_head" in name)
    maps = sum(n for name, n in counts.items() if ".compose." in name)
    return {"all": sum(counts.values()), "without embeddings": sum(counts.values()) - outside, "maps": maps}


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A warm-up over the first twentieth of the steps, then a cosine down to a tenth."""
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        along = min(1.0, (step - warm) / max(1, steps - warm))
        return (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * along))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


class Trainer:
    """AdamW with `warm_cosine`; gradients clipped at 1."""

    def __init__(self, model: nn.Module, size: Size, dtype: str, device: str) -> None:
        self.model, self.device, self.dtype = model, device, getattr(torch, dtype)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=size.lr, betas=(0.9, 0.95), fused=device.startswith("cuda"))
        self.schedule = warm_cosine(self.optimizer, size.steps)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean over all tokens but the first of [batch, seq + 1], in nats."""
        kind = self.device.split(":")[0]
        with torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(tokens[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def step(self, tokens: Tensor) -> Tensor:
        loss = self.loss(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach()


def train(job: dict[str, Any], corpus: Corpus, device: str, end: float = math.inf) -> dict[str, Any] | None:
    """Train a variant; its loss in training (means over 2 % of the steps) and on the validation set (every tenth).

    None: it would last beyond `end` (of `time.monotonic`). Training ends early where the loss is no number any more.
    """
    size = Size(**job["shape"])
    torch.manual_seed(job["seed"])
    model = build(job["variant"], size, job["backend"], corpus.record["vocabulary"], size.seq).to(device)
    trainer = Trainer(model, size, job["dtype"], device)
    tokens, held = (torch.from_numpy(part.astype("int32")).to(device) for part in (corpus.train, corpus.valid))
    starts = shuffled(len(tokens), size, job["seed"]).to(device)
    watch, every = Watch(device), max(1, size.steps // 50)
    curve: list[list[float]] = []
    valid = [[0, validate(trainer, held, size)]]
    total = torch.zeros((), device=device)
    watch.start()
    for step in range(1, size.steps + 1):
        total += trainer.step(windows(tokens, starts[(step - 1) * size.batch : step * size.batch], size.seq))
        if step % every == 0 or step == size.steps:
            n = step - (int(curve[-1][0]) if curve else 0)
            mean = float(total) / n
            if not math.isfinite(mean):
                print(f"  diverged at step {step}", flush=True)
                break
            curve.append([step, mean])
            watch.lap(n)
            if watch.ends(size.steps - step) > end:
                return None
            total.zero_()
            if step // max(1, size.steps // 10) > valid[-1][0] // max(1, size.steps // 10) or step == size.steps:
                valid.append([step, validate(trainer, held, size)])
                watch.start()
            watch.say(f"step {step} of {size.steps}: loss {curve[-1][1]:.3f}, valid {valid[-1][1]:.3f}")
    print(f"  valid {valid[-1][1]:.4f}, {1000 * spread(watch.times())['median']:.1f} ms a step", flush=True)
    return {
        "parameters": parameters(model), "tokens": step * size.batch * size.seq, "loss": curve, "valid": valid,
        "diverged": step if step < size.steps else None, "step s": spread(watch.times()), "peak bytes": watch.peak(),
        "corpus": corpus.record,
    }  # fmt: skip


def shuffled(n_tokens: int, size: Size, seed: int) -> Tensor:
    """Where every text of every step starts: the corpus in pieces, in random order, over again when it ends."""
    generator = torch.Generator().manual_seed(seed)
    pieces = (n_tokens - 1) // size.seq
    wanted = size.steps * size.batch
    order = [torch.randperm(pieces, generator=generator) for _ in range(-(-wanted // pieces))]
    return torch.cat(order)[:wanted] * size.seq


def windows(tokens: Tensor, starts: Tensor, seq: int) -> Tensor:
    """[text, seq + 1]"""
    return tokens[starts[:, None] + torch.arange(seq + 1, device=starts.device)].long()


def validate(trainer: Trainer, held: Tensor, size: Size) -> float:
    """Mean loss over the same texts, evenly spread over the validation set, every time.

    Not under `no_grad`, for which compiled code would have to be compiled once more.
    """
    pieces = (len(held) - 1) // size.seq
    n = min(pieces, max(1, EVALUATED // size.seq))
    starts = torch.linspace(0, pieces - 1, n, device=held.device).long() * size.seq
    parts = [windows(held, part, size.seq) for part in starts.split(size.batch)]
    return float(sum(trainer.loss(part).detach() * len(part) for part in parts) / n)


class Watch:
    """Seconds a step, and a line of progress now and then."""

    def __init__(self, device: str) -> None:
        self.cuda, self.laps, self.mark, self.said = device.startswith("cuda"), list[float](), 0.0, time.monotonic()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.mark = time.monotonic()

    def lap(self, steps: int) -> None:
        before = self.mark
        self.start()
        self.laps.append((self.mark - before) / steps)

    def times(self) -> list[float]:
        """A step's seconds in every lap but the first, which warms up."""
        return self.laps[1:] or self.laps

    def ends(self, steps: int) -> float:
        """When so many more steps will be done; nobody knows before the third lap."""
        return self.mark + 1.02 * steps * spread(self.laps)["median"] if len(self.laps) > 2 else -math.inf

    def say(self, text: str) -> None:
        if time.monotonic() - self.said > SAY:
            self.said = time.monotonic()
            print(f"  {text}", flush=True)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.cuda else None
