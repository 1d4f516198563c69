"""Training many probes as one: runs that differ in seed, decay or combinations held out are one bundle of weights.

Every tensor of a bundle has the run as its first axis, and one pass trains all of them (`torch.func.vmap` over the probe's
own code). On a GPU a step is recorded once as a graph of kernels and replayed, and bundles of other shapes run beside it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from tqdm.auto import tqdm

from headlab.errors import HeadlabError

from ..symbolic import CrossComposition, Split
from .cuda_graphs import Replayed
from .models import ProbeForSequenceClassification, probe_config

PARTS = {"base": "compose.base", "gates": "compose.dd", "low_rank": ("compose.dw1", "compose.qkw"), "mlp": ("mlp", "first")}
"""Parts of a probe that may decay at a rate of their own, by what their parameters' names contain."""


@dataclass(frozen=True)
class Recipe:
    """How a probe is trained: AdamW, its learning rate up and down in cosines.

    Args:
        steps, batch: how many steps, of how many sequences each.
        lr: the highest learning rate. It rises over the share `warm` of the steps, stays for the share `hold`, then falls.
        weight_decay: of all parameters; `decay` says otherwise for some (`PARTS`).
        average: the trained probe has the mean of the weights over this share of the steps, the last ones (stochastic weight
            averaging, Izmailov et al. 2018). At a high rate what a probe makes of a combination that it never meets comes
            and goes from step to step; the mean does not.
        clip: longest gradient of a run.
    """

    steps: int = 4000
    batch: int = 1024
    lr: float = 2e-3
    warm: float = 0.3
    hold: float = 0.0
    weight_decay: float = 0.01
    decay: Mapping[str, float] = field(default_factory=dict)
    average: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if unknown := set(self.decay) - set(PARTS):
            raise HeadlabError(
                f"no part of a probe is called {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}"
            )
        if not (self.warm > 0 and self.hold >= 0 and self.warm + self.hold < 1):
            raise HeadlabError(
                f"warm ({self.warm}) and hold ({self.hold}) are shares of the steps that leave some to fall in"
            )
        if not 0 <= self.average <= 1:
            raise HeadlabError(f"average ({self.average}) is a share of the steps, from 0 to 1")
        if self.steps < 1 or self.batch < 1:
            raise HeadlabError(f"{self.steps} steps of {self.batch} sequences: at least one of both")

    def decay_of(self, name: str) -> float:
        """The decay of a parameter."""
        for part, marks in PARTS.items():
            if part in self.decay and any(mark in name for mark in ((marks,) if isinstance(marks, str) else marks)):
                return self.decay[part]
        return self.weight_decay


@dataclass(frozen=True)
class Run:
    """One probe to train: on what, of what kind and size (`ProbeConfig`), and how. The task's seed is the run's seed."""

    task: CrossComposition
    kind: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def shape(self) -> str:
        """What runs of one bundle have in common."""
        recipe = replace(self.recipe, weight_decay=0, decay={})
        return repr((replace(self.task, seed=0), self.kind, sorted(self.sizes.items()), recipe))


@dataclass(frozen=True, eq=False)
class Outcome:
    """A trained probe and how well it answers, as shares of fresh sequences."""

    run: Run
    probe: ProbeForSequenceClassification
    seen: float
    test: float | None
    history: list[dict[str, float]]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.probe.parameters())


class Bundle:
    """Probes of one shape that are trained together."""

    def __init__(self, runs: Sequence[Run], device: str | torch.device = "cpu") -> None:
        self.runs, self.device, self.task, self.recipe = runs, torch.device(device), runs[0].task, runs[0].recipe
        self.config = probe_config(self.task, runs[0].kind, **runs[0].sizes)
        probes = []
        with torch.random.fork_rng(devices=[]):
            for run in runs:
                torch.manual_seed(run.task.seed)
                probes.append(ProbeForSequenceClassification(self.config))
        state, _ = stack_module_state(probes)  # type: ignore[arg-type]
        self.probe = probes[0].to(self.device)  # type: ignore[arg-type]  # transformers' decorator loses self
        self.weights = {name: x.detach().to(self.device).requires_grad_() for name, x in state.items()}
        self.pairs = torch.stack([run.task.pairs("train") for run in runs]).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(_seed(*(run.task.seed for run in runs)))
        decays = [[run.recipe.decay_of(name) for run in runs] for name in self.weights]
        self.decays = torch.tensor(decays, device=self.device)  # [weight, run]
        self.means = {name: torch.zeros_like(x) for name, x in self.weights.items()} if self.recipe.average else {}
        self.shares = shares_of_mean(self.recipe).to(self.device)
        self.step_number = torch.zeros(1, dtype=torch.long, device=self.device)
        self.lr = torch.zeros((), device=self.device)
        self.schedule = learning_rates(self.recipe).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=self.lr, betas=(0.9, 0.98), weight_decay=0, fused=True,
            capturable=self.device.type == "cuda",
        )  # fmt: skip

    def logits(self, weights: Mapping[str, Tensor], ids: Tensor) -> Float[Tensor, "run n class"]:
        """The answers of every run to its own sequences, [run, n, pos, slot]."""

        def one(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
            return functional_call(self.probe, weights, (ids,), {"last": True}).logits

        return vmap(one)(dict(weights), ids)

    def step(self) -> None:
        """One step of training of every run."""
        sample = self.task.draw(self.pairs, self.recipe.batch, self.generator)
        logits = self.logits(self.weights, sample.ids)
        # a sum over runs: none of them changes another's gradient
        F.cross_entropy(logits.flatten(0, 1), sample.answer.flatten(), reduction="sum").div(self.recipe.batch).backward()
        with torch.no_grad():
            weights = list(self.weights.values())
            norms = [torch.linalg.vector_norm(p.grad.flatten(1), dim=1) for p in weights]  # type: ignore[union-attr]
            scale = (self.recipe.clip / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)).clamp(max=1)
            self.lr.copy_(self.schedule[self.step_number][0])
            for p, kept in zip(weights, 1 - self.lr * self.decays, strict=True):
                p.grad.mul_(scale.view(_per_run(p)))  # type: ignore[union-attr]
                p.mul_(kept.view(_per_run(p)))  # AdamW's decay, at each run's own rate
            self.optimizer.step()
            for name, mean in self.means.items():
                mean.lerp_(self.weights[name], self.shares[self.step_number][0])
            self.step_number += 1
        self.optimizer.zero_grad()

    def wait(self) -> None:
        """Until all steps are done: at once, where they are not recorded and replayed."""

    def finish(self) -> None:
        """After the last step: take the mean of the weights, where the recipe says so."""
        self.weights |= self.means

    @torch.no_grad()
    def accuracy(self, split: Split, n: int) -> list[float]:
        """The share of right answers of every run, on n sequences of a split."""
        pairs = torch.stack([run.task.pairs(split) for run in self.runs]).to(self.device)
        generator = torch.Generator(self.device).manual_seed(_seed(split, *(run.task.seed for run in self.runs)))
        right = torch.zeros(len(self.runs), dtype=torch.long, device=self.device)
        for start in range(0, n, 4096):
            sample = self.task.draw(pairs, min(4096, n - start), generator)
            right += (self.logits(self.weights, sample.ids).argmax(-1) == sample.answer).sum(1)
        return [count / n for count in right.tolist()]

    def trained(self, run: int) -> ProbeForSequenceClassification:
        """One of the probes."""
        probe = deepcopy(self.probe)
        with torch.no_grad():
            for name, p in probe.named_parameters():
                p.copy_(self.weights[name][run])
        return probe.eval()


def _per_run(x: Tensor) -> list[int]:
    """The shape in which one number for every run meets a stacked tensor."""
    return [-1] + [1] * (x.ndim - 1)


def _seed(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def learning_rates(recipe: Recipe) -> Float[Tensor, " step"]:
    """Up along a cosine from lr / 25, level, then down along a cosine to lr / 250,000."""
    steps = torch.arange(recipe.steps) + 0.5
    up = recipe.warm * recipe.steps
    level = up + recipe.hold * recipe.steps
    rise, fall = ((part.clamp(0, 1) * torch.pi).cos() for part in (steps / up, (steps - level) / (recipe.steps - level)))
    low = torch.where(steps < up, 1 / 25, 1 / 250_000)
    return recipe.lr * (low + (1 - low) * torch.where(steps < up, 1 - rise, 1 + fall) / 2)


def shares_of_mean(recipe: Recipe) -> Float[Tensor, " step"]:
    """How far the mean of the weights moves to those after every step, so that the last steps count alike."""
    counted = torch.arange(recipe.steps) - (recipe.steps - max(1, round(recipe.average * recipe.steps)))
    return torch.where(counted >= 0, 1 / (counted + 1).clamp(min=1), 0.0)


def train(
    runs: Sequence[Run], device: str | torch.device = "cpu", *, beside: int = 8, checks: int = 0, n_test: int = 10_000
) -> Iterator[Outcome]:
    """Train every run; outcomes come as their bundles are done.

    The runs of a bundle draw their sequences from one generator, so that a run repeats exactly among the same runs only.

    Args:
        beside: how many bundles are trained side by side on a GPU.
        checks: how often accuracies are looked at on the way (`Outcome.history`).
        n_test: sequences that the accuracies at the end are of.

    Raises:
        HeadlabError: fewer than one bundle at a time.
    """
    if beside < 1:
        raise HeadlabError(f"{beside} bundles side by side: at least one")
    bundles: dict[str, list[Run]] = {}
    for run in runs:
        bundles.setdefault(run.shape, []).append(run)
    waiting = list(bundles.values())
    with tqdm(total=sum(run.recipe.steps for run in runs), unit="step", desc="training", disable=None) as bar:
        for start in range(0, len(waiting), beside):
            group = [Bundle(found, device) for found in waiting[start : start + beside]]
            with faster_products(), _current(group[0].device):
                histories = _train_beside(group, checks, bar)
                ends = [_accuracies(bundle, n_test) for bundle in group]
            for bundle, history, end in zip(group, histories, ends, strict=True):
                yield from _outcomes(bundle, history, end)


def _train_beside(bundles: Sequence[Bundle], checks: int, bar: Any) -> list[list[dict[str, Any]]]:
    """Train bundles in turns, one step each; returns what the checks found."""
    cuda = bundles[0].device.type == "cuda"
    steppers = [Replayed(bundle) if cuda else bundle for bundle in bundles]
    looks = [_looks(bundle.recipe.steps, checks) for bundle in bundles]
    histories: list[list[dict[str, Any]]] = [[] for _ in bundles]
    for step in range(1, max(bundle.recipe.steps for bundle in bundles) + 1):
        for bundle, stepper, at, history in zip(bundles, steppers, looks, histories, strict=True):
            if step > bundle.recipe.steps:
                continue
            stepper.step()
            bar.update(len(bundle.runs))
            if step in at:
                stepper.wait()
                history.append({"step": step} | _accuracies(bundle, 2048))
    for bundle, stepper in zip(bundles, steppers, strict=True):
        stepper.wait()
        bundle.finish()
    return histories


def _looks(steps: int, checks: int) -> set[int]:
    """After which steps to look, evenly to the last one."""
    return {round(steps * (i + 1) / checks) for i in range(checks)}


def _outcomes(bundle: Bundle, history: Sequence[Mapping[str, Any]], end: Mapping[str, list[float]]) -> Iterator[Outcome]:
    for i, run in enumerate(bundle.runs):
        own = [{name: value if name == "step" else value[i] for name, value in row.items()} for row in history]
        yield Outcome(run, bundle.trained(i), end["seen"][i], end["test"][i] if "test" in end else None, own)


def _accuracies(bundle: Bundle, n: int) -> dict[str, list[float]]:
    splits: tuple[Split, ...] = ("seen", "test") if bundle.task.n_held_out else ("seen",)
    return {split: bundle.accuracy(split, n) for split in splits}


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """A GPU that need not be the first is the current one inside the block: graphs are recorded on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def faster_products() -> Iterator[None]:
    """Products of float32 matrices in TF32, where a GPU can, inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
