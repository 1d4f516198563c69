"""What the commands share: a model and texts in, results in and out of one folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HeadlabError
from .options import Dtype, FillKind, Order

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ..data.batches import Batch
    from ..hooks.fills import Fill
    from ..scores import HeadScores


def open_model(name: str, dtype: Dtype, device: str) -> Any:
    import torch

    from ..loading import load

    quieten()
    check_device(device)
    return load(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=device)


def check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise HeadlabError(f"there is no device {device!r} here ({str(error).splitlines()[0]}): try cpu or cuda") from None


def quieten() -> None:
    """Leave stderr to headlab's own progress bars and errors."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def needed(text: Path | None) -> Path:
    if text is None:
        raise HeadlabError("this method needs a text: --text FILE")
    return text


def batches(model: nn.Module, text: Path, examples: int, length: int, batch_size: int, seed: int) -> list[Batch]:
    from ..data.batches import prepare
    from ..data.texts import read_batches

    found = read_batches(model, text, examples=examples, length=length, batch_size=batch_size, seed=seed)
    return list(prepare(model, found))


def prompts(model: nn.Module, prompts: list[str]) -> Any:
    """Prompts as the model takes them: texts for its tokenizer, or numbers."""
    from ..models.access import tokenizer

    if tokenizer(model) is not None:
        return prompts
    try:
        numbers = [[int(word) for word in prompt.replace(",", " ").split()] for prompt in prompts]
    except ValueError:
        raise HeadlabError("no tokenizer lies beside the model: give the prompt as token numbers, as in '5 7 11'") from None
    import torch

    from ..models.access import bare_model

    known = bare_model(model).config.get_text_config().vocab_size
    if unknown := [token for tokens in numbers for token in tokens if not 0 <= token < known]:
        raise HeadlabError(f"the prompt has the token {unknown[0]}, but the model has {known}, from 0 to {known - 1}")
    return [{"input_ids": torch.tensor([tokens])} for tokens in numbers]


def fill(model: nn.Module, data: list[Batch], kind: FillKind, out: Path) -> Fill | None:
    """The means of the folder, measured now if they are not there yet."""
    from ..hooks.fills import Fill, fill

    if kind == "zero":
        return None
    path = out / "fill-mean.safetensors"
    if path.exists():
        found = Fill.load(path)
        found.check(model)
        return found
    found = fill(model, data)
    found.save(path)
    return found


def named(name: str, site: str) -> str:
    """The name of a result, with the site if that is not the usual one."""
    return name if site == "output" else f"{name}-{site}"


def ordered(model: nn.Module, order: Order, site: str, seed: int, out: Path) -> HeadScores:
    """The scores that say what goes first."""
    from ..attribution.gradients import importance

    if order in ("random", "magnitude"):
        return importance(model, method=order, seed=seed, site=site)
    return read_scores(out / f"{named(f'scores-{order}', site)}.json")


def read_scores(path: Path) -> HeadScores:
    from ..scores import HeadScores

    if not path.exists():
        command = "ablate" if "ablation" in path.name else "score"
        raise HeadlabError(f"there is no {path}: run headlab {command} with the same --out first")
    return HeadScores.load(path)


def store(result: Any, path: Path) -> Any:
    """Write a result, unless the same is there already; another one is never replaced."""
    if path.exists():
        found = type(result).load(path)
        if found.record != _as_saved(result.record):
            raise HeadlabError(f"{path} holds another result (of another model, text or option): choose another --out")
        return found
    result.save(path)
    return result


def once(kind: type[Any], path: Path, model: nn.Module, make: Callable[[], Any], **options: Any) -> Any:
    """The result at `path`, made now if it is not there yet: a command that is run again goes on after what it has.

    Raises:
        HeadlabError: what is there is of another model, or was made with other options (those of its record).
    """
    from ..models.access import fingerprint

    if not path.exists():
        result = make()
        result.save(path)
        return result
    found = kind.load(path)
    told = {"model": found.record.get("model", {}).get("fingerprint")} | {name: found.record.get(name) for name in options}
    asked = _as_saved({"model": fingerprint(model)} | options)
    if differ := [name for name in asked if asked[name] != told[name]]:
        raise HeadlabError(f"{path} holds another result (it differs in: {', '.join(differ)}): choose another --out")
    return found


def _as_saved(record: dict[str, Any]) -> Any:
    import json

    return json.loads(json.dumps(record))


def write_csv(result: Any, path: Path) -> None:
    from ..results import write

    write(path, lambda file: result.to_frame().to_csv(file, index=False))
