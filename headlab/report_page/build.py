"""Write the page: one HTML file with the data, the figures, the patterns and plotly.js in it.

What is large (patterns, figures, plotly.js) is deflated and in base64, and unpacked in the browser when it is looked at, so
that the page opens at once. Everything else is one JSON text, in which no character can end a script element.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import zlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HeadlabError
from ..results import write
from ..version import __version__
from .gather import Found, called, gather
from .parts import Prompt

_GENERATOR = b'<meta name="generator" content="headlab">'
_LEVELS = 255
_FACTS = ("class", "dtype", "weights", "fingerprint", "versions")  # of the model
_CELLS = 4 * 12 * 12 * 128**2  # of all patterns together: four prompts of 128 tokens for 12 x 12 heads


def report(folder: str | Path, to: str | Path | None = None) -> Path:
    """Make one self-contained HTML page of a folder of results. It opens anywhere, without a network.

    Args:
        folder: what headlab's commands wrote into (their `--out`).
        to: the file to write, which ends in .html or .htm; by default `report.html` in the folder. An earlier page is
            replaced, anything else is not.

    Returns:
        The path of the page.

    Raises:
        HeadlabError: no such folder, no results in it, or the page cannot be written there. A file that cannot be read is
            no error: the page names it and the reason.

    >>> report("results")  # doctest: +SKIP
    PosixPath('results/report.html')
    """
    return written(folder, to)[0]


def written(folder: str | Path, to: str | Path | None = None) -> tuple[Path, Found]:
    """As `report`; also what was found in the folder, and what not."""
    path = Path(folder) / "report.html" if to is None else Path(to)
    if path.is_dir():
        raise HeadlabError(f"{path} is a folder: give the name of the HTML file to write")
    if path.suffix.lower() not in (".html", ".htm"):  # it would replace what is there, which may be a result
        raise HeadlabError(f"{path} is no name of a page: give one that ends in .html or .htm")
    if path.is_file() and _GENERATOR not in path.read_bytes()[:4096]:
        raise HeadlabError(f"{path} is there and is no page of headlab's: give another name")
    found = gather(folder)
    page = _page(found)
    return write(path, lambda temporary: temporary.write_text(page, encoding="utf-8")), found


def _page(found: Found) -> str:
    blobs: dict[str, str] = {}
    data = _data(found, blobs)
    blobs["plotly"] = _packed(_asset("plotly", "package_data/plotly.min.js").encode())
    parts = {
        "title": html.escape(f"{data['model']['name']}: headlab report"),
        "css": _asset(__package__, "report.css"),
        "js": _asset(__package__, "report.js"),
        "data": _safe_json(data),
        "blobs": "\n".join(f'<script type="text/plain" id="{name}">{text}</script>' for name, text in blobs.items()),
    }
    template = _asset(__package__, "report.html")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _asset(package: str | None, name: str) -> str:
    assert package is not None
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _safe_json(data: Any) -> str:
    """JSON that a browser reads as text wherever it stands in a page."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()  # half of a surrogate pair, from a token cut in the middle


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def _data(found: Found, blobs: dict[str, str]) -> dict[str, Any]:
    """What the page's script reads. What is large goes to `blobs`, by the id of its element."""
    order = [head["name"] for row in found.rows for head in row["heads"]]
    model = found.model
    room = _CELLS // max(1, sum(len(prompt.patterns) for prompt in found.prompts))
    return {
        "model": {
            "name": called(str(model.get("name") or model.get("class") or found.folder)),
            "facts": {key: _finite(model[key]) for key in _FACTS if key in model},
        },
        "folder": found.folder,
        "version": __version__,
        "rows": [row | {"heads": [[order.index(h["name"]), h["index"]] for h in row["heads"]]} for row in found.rows],
        "heads": order,
        "groups": [found.groups.get(name) for name in order],
        "columns": [
            {"label": c.label, "source": c.source, "values": [_finite(c.values.get(name)) for name in order]}
            for c in found.columns
        ],
        "panels": [
            {
                "title": panel.title,
                "label": panel.label,
                "source": panel.source,
                "lines": {name: [_line(line) for line in lines] for name, lines in panel.lines.items()},
            }
            for panel in found.panels
        ],
        "prompts": [_prompt(number, prompt, found, blobs, room) for number, prompt in enumerate(found.prompts)],
        "figures": _figures(found, blobs),
        "files": _finite(found.files),
        "problems": found.problems,
        "missing": found.missing,
    }


def _line(line: Any) -> list[Any]:
    return [line.text, line.head, _finite(line.value)]


def _finite(value: Any) -> Any:
    """The value without NaN and infinity, which JSON does not have, and with numbers short enough to read."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _figures(found: Found, blobs: dict[str, str]) -> list[dict[str, Any]]:
    """Draw all figures; one that fails is named among the problems."""
    figures: list[dict[str, Any]] = []
    for title, source, plot in found.figures:
        try:
            figure = plot()
            text = figure.to_json()
        except Exception as error:  # one figure that fails is no reason to lose the page
            reason = f"the figure {title!r} could not be drawn ({type(error).__name__}: {error})"
            found.problems.append({"file": source, "reason": reason})
            continue
        blob = f"figure-{len(figures)}"
        blobs[blob] = _packed(text.encode())
        figures.append({"title": title, "source": source, "blob": blob, "height": figure.layout.height})
    return figures


def _prompt(number: int, prompt: Prompt, found: Found, blobs: dict[str, str], room: int) -> dict[str, Any]:
    """A prompt with one blob per row of heads: bytes, [head, query, key]; coarser, if it has more than `room` cells."""
    rows, holes = [], 0
    step = math.ceil(math.sqrt(max((one.size for one in prompt.patterns.values()), default=0) / room)) or 1
    for row, about in enumerate(found.rows):
        names = [head["name"] for head in about["heads"] if head["name"] in prompt.patterns]
        if not names:
            continue
        weights = [prompt.patterns[name] for name in names]
        holes += sum(int((~np.isfinite(one)).sum()) for one in weights)
        coarse = [coarser(one, step) for one in weights]
        packed = [quantised(one) for one in coarse]
        blobs[blob := f"pattern-{number}-{row}"] = _packed(b"".join(levels.tobytes() for levels, _, _ in packed))
        heads = {name: [i, scale, signed] for i, (name, (_, scale, signed)) in enumerate(zip(names, packed, strict=True))}
        queries, keys = prompt.sides[names[0]]
        rows.append({"blob": blob, "shape": list(coarse[0].shape), "heads": heads, "queries": queries, "keys": keys})
    about_prompt = {"name": prompt.name, "source": prompt.source, "tokens": dict(prompt.tokens)}
    return about_prompt | {"rows": rows, "holes": holes, "step": step}


def coarser(pattern: np.ndarray, step: int) -> np.ndarray:
    """A pattern with a cell for `step` x `step` tokens, the largest of their weights (of negative ones the furthest from 0).

    What is not a number counts as zero.
    """
    weights = np.nan_to_num(np.asarray(pattern, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    n, m = (math.ceil(size / step) for size in weights.shape)
    whole = np.zeros((n * step, m * step))
    whole[: weights.shape[0], : weights.shape[1]] = weights
    blocks = whole.reshape(n, step, m, step)
    high, low = blocks.max((1, 3)), blocks.min((1, 3))
    return np.where(high >= -low, high, low)


def quantised(pattern: np.ndarray) -> tuple[np.ndarray, float, bool]:
    """A pattern as bytes, with the largest weight, and whether there are negative ones (composed heads).

    Levels are even in the square root of the weight, so that small weights keep their differences: the error is below
    0.4 % of the largest weight, and below 0.002 % of it next to zero. Signed: 128 is zero, there are half as many levels on
    either side, and the error is below 0.8 % and, next to zero, 0.005 %.
    """
    scale = float(np.abs(pattern).max(initial=0.0)) or 1.0
    signed = bool((pattern < 0).any())
    roots = np.sign(pattern) * np.sqrt(np.abs(pattern) / scale)
    levels = 128 + np.round(127 * roots) if signed else np.round(_LEVELS * roots)
    return levels.astype(np.uint8), float(f"{scale:.6g}"), signed
