"""The notebooks: what is in git, and every cell run in a kernel of this Python."""

from __future__ import annotations

import os
import re
from ast import literal_eval
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import headlab as hl
from benchmarks.real import smollm2
from tests.helpers import words
from tests.helpers.zoo import build

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = [
    "01_heads_and_circuits",
    "02_composition_maps",
    "03_importance_and_pruning",
    "04_where_mha_fails",
    "05_pruning_a_real_model",
]
MOST_CELLS = 15
PLOTLY = "application/vnd.plotly.v1+json"  # what JupyterLab draws without a network, by plotly's own extension
# How many figures a notebook shows. A figure that stops being a cell's value would go unnoticed otherwise.
FIGURES = dict(zip(NAMES, (5, 4, 4, 3, 3), strict=True))
MACHINE = re.compile(r"/(home|root|tmp|work|Users|mnt|opt)/|[A-Z]:\\|localhost|127\.0\.0\.1")
ENGLISH = [
    "the",
    "a",
    "of",
    "to",
    "is",
    "in",
    "and",
    "for",
    "with",
    "input",
    "output",
    "tensor",
    "shape",
    "module",
    "layer",
    "default",
    "if",
    "this",
    "be",
    "as",
]
DRAWN = {"x", "y", "z", "values"}


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def executed(
    name: str,
    folder: Path,
    changed: Mapping[str, str] = MappingProxyType({}),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """The notebook after all its cells have run in a kernel of this Python, in a folder.

    Args:
        changed: the source of cells to run in place of what is there, by the cells' ids.
        environment: variables that the kernel has besides this process' own.
    """
    notebook = read(name)
    for cell in notebook.cells:
        cell.source = changed.get(cell.id, cell.source)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    repository = str(Path(__file__).parents[1])  # as `pip install -e .` would have it
    found = os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH")]))
    client.execute(env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": found, **environment})
    return notebook


def figures(notebook: Any) -> dict[str, dict[str, Any]]:
    """The plotly figure of every cell that shows one, by the cell's id."""
    outputs = ((cell.id, output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    return {name: output.data[PLOTLY] for name, output in outputs if PLOTLY in output.get("data", {})}


def said(notebook: Any, name: str) -> str:
    """The value of a cell, as text."""
    cell = next(cell for cell in notebook.cells if cell.id == name)
    values = [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
    assert len(values) == 1
    return str(values[0])


def check_figure(figure: dict[str, Any]) -> None:
    """Something is to be seen in it, under a title, and no axis is without a name."""
    assert figure["layout"]["title"]["text"]
    assert figure["data"]
    for trace in figure["data"]:
        held = [trace[key] for key in DRAWN & trace.keys()]
        assert held, trace["type"]
        for values in held:  # a list, or numpy's bytes as plotly writes them
            assert values["bdata"] if isinstance(values, dict) else len(values)


def check_run(notebook: Any, name: str) -> None:
    """Every cell ran, nothing was written to stderr (no warning), and the figures are there."""
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        assert cell.execution_count == number
        for output in cell.outputs:
            assert output.output_type in ("display_data", "execute_result", "stream"), output
            assert output.get("name") != "stderr", output.text
    found = figures(notebook)
    assert len(found) == FIGURES[name]
    for figure in found.values():
        check_figure(figure)


def test_there_are_no_others() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_git(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert len(notebook.cells) <= MOST_CELLS
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z0-9-]+", cell.id), "an id is a few words, so that it stays when the notebook is saved"
        assert cell.source == cell.source.strip() != ""
        assert not MACHINE.search(cell.source)
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert ".show(" not in cell.source
            assert "renderers" not in cell.source


@pytest.mark.parametrize("name", NAMES)
def test_links_of_the_prose_lead_somewhere(name: str) -> None:
    for cell in read(name).cells:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", cell.source):
            assert (FOLDER / target).exists(), target


@pytest.mark.parametrize("name", [*NAMES[:3], pytest.param(NAMES[3], marks=pytest.mark.slow)])
def test_runs_from_start_to_end(name: str, tmp_path: Path) -> None:
    notebook = executed(name, tmp_path)
    check_run(notebook, name)
    # what a notebook writes goes to a temporary folder of its own, but for the model that its reader is to keep
    assert [path.name for path in tmp_path.iterdir()] == (["pruned-model"] if name == "03_importance_and_pruning" else [])
    if name == "01_heads_and_circuits":
        pattern = figures(notebook)["patterns-figure"]["data"][0]
        assert all(re.fullmatch(rf"[a-p] \({place}\)", label) for place, label in enumerate(pattern["x"]))
        assert len(pattern["x"]) == 24
    if name == "02_composition_maps":
        [bars] = figures(notebook)["without-branches"]["data"]
        assert len(bars["x"]) == 8
        assert 0.0 not in bars["y"]  # every branch shown is one that the model has


@pytest.mark.slow
def test_the_real_model_is_pruned(tmp_path: Path) -> None:
    folder = smollm2()
    settings = {"HEADLAB_CACHE": str(folder.parent)}
    notebook = executed("05_pruning_a_real_model", tmp_path, environment=settings)
    check_run(notebook, "05_pruning_a_real_model")
    assert "270 heads" in said(notebook, "load")
    assert literal_eval(said(notebook, "saved"))["largest difference from masked"] < 1e-3


FILES = {  # what a line of a text of these kinds looks like; a decoder reads what the notebook finds by itself
    "bert-mlm": "{}",
    "bert-classifier": '{{"text": "{}", "label": 1}}',
    "t5": '{{"text": "{0}", "target": "{0}"}}',
}


def settings(folder: Path, text: Path | None) -> str:
    """The first cell of 03 as a reader might write it for a model with a short context."""
    name = None if text is None else str(text)
    return "\n".join(
        [f"MODEL = {str(folder)!r}", f"TEXT = OTHER_TEXT = {name!r}", "KEEP = 0.5", "LENGTH = 12", 'DEVICE = "cpu"',
         'SAVE_TO = "small/"']
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["llama-gqa", *FILES])
def test_another_model_is_pruned_by_changing_one_cell(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that it wants is taken, as in a second run: that one stays as it is."""
    monkeypatch.setattr(words, "WORDS", ENGLISH)
    folder = words.save_with_tokenizer(build(kind), tmp_path / "mine")
    text = None
    if kind in FILES:
        text = tmp_path / "text.txt"
        text.write_text("\n".join([FILES[kind].format(" ".join(ENGLISH))] * 40), encoding="utf-8")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "kept").touch()
    notebook = executed("03_importance_and_pruning", tmp_path, {"settings": settings(folder, text)})
    check_run(notebook, "03_importance_and_pruning")
    assert type(build(kind)).__name__ in said(notebook, "load")
    assert said(notebook, "saved").strip("'").endswith(f" is saved in {tmp_path / 'small-2'}")
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["kept"]
    small = hl.load(tmp_path / "small-2")
    n = len(hl.heads(build(kind)))
    assert len(hl.heads(small)) == n - round(0.5 * n)


def test_a_classifier_without_texts_is_told_what_it_needs(tmp_path: Path) -> None:
    folder = words.save_with_tokenizer(build("bert-classifier"), tmp_path / "mine")
    wanted = (
        r'HeadlabError.*: this model needs TEXT and OTHER_TEXT: two files of JSON lines, \{"text": \.\.\., "label": \.\.\.\}'
    )
    with pytest.raises(CellExecutionError, match=wanted):
        executed("03_importance_and_pruning", tmp_path, {"settings": settings(folder, None)})
