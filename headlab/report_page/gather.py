"""What lies in a folder of results, as plain data for the page.

Files are known by what they hold, not by their names. What cannot be read, drawn or told apart is named with the reason:
one bad file never costs the page.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HeadlabError
from ..results import Result, kind_of
from .parts import Column, Item, Panel, Plot, Prompt
from .sections import SECTIONS, TABLE, together

_NAME = re.compile(r"(?:(enc|dec|cross)\.)?L([0-9]{1,4})H([0-9]{1,4})")  # a page of more rows would not open
_STACKS = ("", "enc", "dec", "cross")


@dataclass
class Found:
    """Everything that the page shows."""

    folder: str
    model: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)  # name and heads, each with its name and index
    columns: list[Column] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    figures: list[tuple[str, str, Plot]] = field(default_factory=list)  # title, source, and what makes it
    groups: dict[str, int] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)  # file, kind, record, whether it is of another model
    problems: list[dict[str, str]] = field(default_factory=list)  # file and reason
    missing: list[dict[str, str]] = field(default_factory=list)  # what, and the command that makes it


def gather(folder: str | Path) -> Found:
    """Read a folder of results.

    Raises:
        HeadlabError: there is no such folder, or nothing in it that could be a result.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise HeadlabError(f"{folder} {what}: give the folder that headlab's commands wrote into (their --out)")
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors") and path.is_file())
        logs = sorted(path for path in folder.glob("*.log.jsonl"))
    except OSError as error:
        raise HeadlabError(f"could not read {folder}: {error.strerror or error}") from error
    if not paths and not logs:
        raise HeadlabError(f"there are no results in {folder}: run headlab score MODEL --text FILE --out {folder} first")
    items, problems = _read(paths)
    if not items and not logs and (folder / "config.json").exists():
        raise HeadlabError(
            f"{folder} holds a model, not results: give the folder that headlab's commands wrote into (--out)"
        )
    main = _main_model(items)
    found = Found(folder.resolve().name, main, problems=problems)
    for log in logs:
        name = log.name.removesuffix(".log.jsonl")
        if not (folder / f"{name}.json").exists() and not name.startswith("probes-"):
            found.problems.append(
                {"file": log.name, "reason": "unfinished: run the same command again, it goes on from here"}
            )
    for item in sorted(items, key=_rank):
        _add(found, item, other=_is_other(item, main))
    mine = [item for item in items if not _is_other(item, main)]
    found.figures = [*together(mine), *found.figures]
    there = {item.kind for item in mine}
    stacks, composed = any(row["stack"] for row in found.rows), bool(re.match("DC|Composed", str(main.get("class", ""))))
    found.missing = _missing(there, stacks, composed)
    return found


def _missing(there: set[str], stacks: bool, composed: bool) -> list[dict[str, str]]:
    """What the page could show and does not, with the commands that make it, those that they need first."""
    found = []
    for kind, section in SECTIONS.items():
        not_of_this = (section.one_stack and stacks) or (section.composed and not composed)
        if section.what and kind not in there and not not_of_this:
            steps = [SECTIONS[one].command for one in (*section.needs, kind) if one not in there]
            found.append({"what": section.what, "command": " && ".join(steps)})
    return found


def _read(paths: Iterable[Path]) -> tuple[list[Item], list[dict[str, str]]]:
    items, problems = [], []
    for path in paths:
        try:
            item = _open(path)
            if not isinstance(item.record, dict):
                raise HeadlabError("it is damaged: it does not say how it was made")
        except HeadlabError as error:
            problems.append({"file": path.name, "reason": str(error).replace(str(path), "it", 1)})
        except Exception as error:  # whatever a damaged file makes of a reader, the rest is still worth a page
            problems.append({"file": path.name, "reason": f"it is damaged ({type(error).__name__}: {error})"})
        else:
            items.append(item)
    return items, problems


def _open(path: Path) -> Item:
    if SECTIONS.get(kind := kind_of(path), TABLE).part is None:
        return Item(path, kind, None, {})
    result = Result.load(path)
    return Item(path, result.kind, result, result.record)


def _model(item: Item) -> dict[str, Any]:
    model = item.record.get("model")
    return model if isinstance(model, dict) else {}


def _rank(item: Item) -> int:
    """What comes first on the page: the kinds that it looks out for, in their order, then all others."""
    expected = [kind for kind, section in SECTIONS.items() if section.what]
    return expected.index(item.kind) if item.kind in expected else len(expected)


def _main_model(items: Iterable[Item]) -> dict[str, Any]:
    """The model that most results are of; of equals the one whose file comes first."""
    models = [model for item in items if (model := _model(item)).get("fingerprint")]
    if not models:
        return {}
    [(most, _)] = Counter(str(model["fingerprint"]) for model in models).most_common(1)
    return next(model for model in models if str(model["fingerprint"]) == most)


def _is_other(item: Item, main: dict[str, Any]) -> bool:
    return _model(item).get("fingerprint") not in (None, main.get("fingerprint"))


def _add(found: Found, item: Item, other: bool) -> None:
    """Add what a result has to say. Of another model that is its figures only: its heads are not these heads."""
    found.files.append({"file": item.path.name, "kind": item.kind, "record": unplaced(item.record), "other": other})
    section = SECTIONS.get(item.kind, TABLE)
    if section.part is None:
        return
    try:
        part = section.part(item)
    except Exception as error:  # see `_read`
        found.problems.append({"file": item.path.name, "reason": f"it could not be shown ({type(error).__name__}: {error})"})
        return
    names = part.heads.union(*(prompt.patterns for prompt in part.prompts))
    if strange := [name for name in sorted(names) if not _NAME.fullmatch(name)]:
        reason = (
            f"it is not shown: {strange[0]} is no name of a head, which is like L3H5 or dec.L3H5, each number up to 9999"
        )
        found.problems.append({"file": item.path.name, "reason": reason})
        return
    found.figures += [(f"{title} (another model)" if other else title, item.path.name, plot) for title, plot in part.figures]
    if other:
        name = called(str(_model(item).get("name") or _model(item).get("class") or "without a name"))
        reason = f"of another model ({name}, {_model(item)['fingerprint']}): its figures are here, its heads are not"
        found.problems.append({"file": item.path.name, "reason": reason})
        return
    found.columns += [column for column in part.columns if column.values]
    found.panels += part.panels
    found.prompts += part.prompts
    found.problems += [{"file": item.path.name, "reason": reason} for reason in part.left_out]
    found.groups.update(part.groups)
    _place(found, names)


def _place(found: Found, new: Iterable[str]) -> None:
    """Give heads their places in the rows: a row per stack and layer, also where a layer has no heads left."""
    names = {head["name"] for row in found.rows for head in row["heads"]} | set(new)
    at: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            at.setdefault((match[1] or "", int(match[2])), {})[int(match[3])] = name
    stacks = sorted({stack for stack, _ in at}, key=_STACKS.index)
    found.rows = [
        {
            "name": f"{stack} {layer}".strip(),
            "stack": stack,
            "heads": [{"name": name, "index": index} for index, name in sorted(at.get((stack, layer), {}).items())],
        }
        for stack in stacks
        for layer in range(max(number for name, number in at if name == stack) + 1)
    ]


def called(name: str) -> str:
    """A model's name; of a folder the last part, for where it lay says nothing to whom the page is sent."""
    return Path(name).name if Path(name).is_absolute() or name.startswith(".") else name


def unplaced(record: Any, of_model: bool = False) -> Any:
    """A record in which models have their names, without where they lay."""
    if isinstance(record, Mapping):
        return {
            key: called(value) if of_model and key == "name" and isinstance(value, str) else unplaced(value, key == "model")
            for key, value in record.items()
        }
    return [unplaced(one, of_model) for one in record] if isinstance(record, (list, tuple)) else record
