"""Size and latency of models beside each other: dense, masked, pruned."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.batches import Batches, prepare
from ..data.losses import forward
from ..errors import HeadlabError
from ..hooks.masking import masked
from ..models.access import bare_model, describe, evaluating, is_bridge, probe_batch, rows
from ..results import Result
from ..scores import HeadMask

if TYPE_CHECKING:
    import pandas as pd

Timed = nn.Module | tuple[nn.Module, HeadMask] | tuple[nn.Module, HeadMask, str]
"""A model, or a model and the mask it runs under."""


@dataclass(frozen=True, eq=False)
class Timing(Result):
    """Size and latency, one line per model and batch: milliseconds are medians, `low` and `high` quartiles."""

    kind = "timing"
    lines: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """A table with one line per model and batch; `speedup` is against the first model on the same batch."""
        import pandas as pd

        frame = pd.DataFrame(self.lines)
        n = frame["model"].nunique()  # the lines of a batch stand together, the first model's first
        for name, column in (("speedup", "ms"), ("attention_speedup", "attention_ms")):
            times = frame[column].to_numpy()
            frame[name] = times[::n].repeat(n) / times
        return frame

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k fastest lines: (model and batch, milliseconds)."""
        named = [(f"{line['model']} {line['batch']} x {line['pos']}", line["ms"]) for line in self.lines]
        return sorted(named, key=lambda item: item[1])[:k]

    def _body(self) -> dict[str, Any]:
        return {"lines": self.lines}

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        return cls(body["lines"], record)


def shapes(model: nn.Module, sizes: list[tuple[int, int]], seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of random tokens of these (examples, tokens) sizes, for timing."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = bare_model(model).config.get_text_config().vocab_size
    made = []
    for examples, tokens in sizes:
        ids = torch.randint(vocabulary, (examples, tokens), generator=generator)
        extra = {"decoder_input_ids": ids} if "decoder_input_ids" in probe_batch(model) else {}
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)} | extra)
    return made


def timing(models: Mapping[str, Timed], batches: Batches, *, repeats: int = 10, warmup: int = 2) -> Timing:
    """Parameters, bytes on disk and latency of one forward pass (no cache), of the whole model and of its attention.

    The models take turns, so that a machine that drifts slows all of them alike. Latency in attention is the time spent
    in the attention modules, taken in passes of its own.

    Args:
        models: by name; the first is what the others are compared with. A model and a mask (and a site) run under
            `hl.masked`.
        batches: what is timed: one line per model and batch.
        repeats: timed passes per line; the median is reported.
        warmup: passes before them.

    Raises:
        HeadlabError: no models, bad batches, fewer than one repeat.
    """
    if not models:
        raise HeadlabError("there are no models to time: expected {name: model}")
    if repeats < 1:
        raise HeadlabError(f"repeats must be at least 1, not {repeats}")
    runs: dict[str, Any] = {name: given if isinstance(given, tuple) else (given,) for name, given in models.items()}
    size_of = {id(model): _size(model) for model in {id(model): model for model, *_ in runs.values()}.values()}
    sizes = {name: size_of[id(model)] for name, (model, *_) in runs.items()}
    first = next(iter(runs.values()))[0]
    data = prepare(first, batches)
    lines = []
    bar = tqdm(total=len(data) * len(runs) * (repeats + warmup) * 2, desc="timing", unit="pass", disable=None)
    with bar, ExitStack() as frozen, torch.inference_mode():
        for model, *_ in runs.values():
            frozen.enter_context(evaluating(model))
        for batch in data:
            whole: dict[str, list[float]] = {name: [] for name in runs}
            attention: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(repeats + warmup):
                for name, (model, *removed) in runs.items():
                    device = bare_model(model).device
                    once = partial(forward, model, {key: value.to(device) for key, value in batch.items()})
                    with ExitStack() as masking:
                        if removed:
                            mask, *site = removed
                            masking.enter_context(masked(model, mask, None, *site))
                            once()  # the gates are made in the first pass
                        times = _seconds(once, device), _in_attention(model, once)
                    if turn >= warmup:
                        whole[name].append(times[0])
                        attention[name].append(times[1])
                    bar.update(2)
            for name in runs:
                low, middle, high = _quartiles(whole[name])
                shape = {"batch": len(batch["input_ids"]), "pos": batch["input_ids"].shape[1]}
                milliseconds = {"ms": middle, "low": low, "high": high, "attention_ms": _quartiles(attention[name])[1]}
                lines.append({"model": name} | shape | milliseconds | sizes[name])
    record = {"method": "timing", "model": describe(first), "repeats": repeats, "warmup": warmup} | _machine(first)
    return Timing(lines, record)


def _seconds(once: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    once()
    _wait(device)
    return time.perf_counter() - start


def _in_attention(model: nn.Module, once: Callable[[], object]) -> float:
    """Seconds in the attention modules of one pass; on a GPU between events on its stream."""
    device, spans = bare_model(model).device, []

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))  # of the model's device, which need not be the current one
        return event

    with ExitStack() as hooks:
        for row in rows(model):
            hooks.callback(row.module.register_forward_pre_hook(lambda *_: spans.append([mark()])).remove)
            hooks.callback(row.module.register_forward_hook(lambda *_: spans[-1].append(mark())).remove)
        once()
    _wait(device)
    if device.type == "cuda":
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3
    return sum(end - start for start, end in spans)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, in milliseconds."""
    milliseconds = [1e3 * s for s in seconds]
    if len(milliseconds) == 1:
        return milliseconds[0], milliseconds[0], milliseconds[0]
    low, middle, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return low, middle, high


def _size(model: nn.Module) -> dict[str, int]:
    """Parameters, and the bytes that `save_pretrained` writes as weights."""
    root = bare_model(model)
    parameters = sum(p.numel() for p in root.parameters())
    if is_bridge(model):  # which cannot be saved; its model's weights are its parameters
        return {"parameters": parameters, "bytes": sum(p.numel() * p.element_size() for p in root.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        root.save_pretrained(folder)
        written = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return {"parameters": parameters, "bytes": written}


def _machine(model: nn.Module) -> dict[str, Any]:
    device = bare_model(model).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
