"""Who may import whom: one table of packages, for what runs and for what is only a type."""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import headlab as hl
import synthetic_tasks as st
from docs import structure
from headlab import dcmha

WORDS = "errors version choices results tables scores"  # that everyone uses
MAY_IMPORT = {  # each what stands to its left; the four between dcmha and loading never one another
    "errors": "",
    "version": "",
    "choices": "errors",
    "results": "errors",
    "tables": "errors results",
    "scores": "errors choices results tables",
    "models": WORDS,
    "data": f"{WORDS} models",
    "hooks": f"{WORDS} models data",
    "dcmha": f"{WORDS} models data",
    "circuits": f"{WORDS} models",
    "attention": f"{WORDS} models data hooks",
    "attribution": f"{WORDS} models data hooks",
    "pruning": f"{WORDS} models data hooks",
    "loading": f"{WORDS} models dcmha pruning",
    "surgery": "loading",
    "studies": f"{WORDS} models data hooks attribution pruning loading",
    "plots": f"{WORDS} circuits attention pruning studies",  # results, to draw
    "report_page": f"{WORDS} plots",
    "headlab": "version",  # the lazy face names everything, and imports nothing before it is asked for
    "synthetic_tasks": "",  # likewise
    "synthetic_tasks.symbolic": f"{WORDS} data",
    "synthetic_tasks.language": WORDS,
    "synthetic_tasks.evaluation": f"{WORDS} models data hooks synthetic_tasks.language",
    "synthetic_tasks.probes": f"{WORDS} models dcmha synthetic_tasks.symbolic",
    "cli": f"{WORDS} models data hooks dcmha circuits attention attribution pruning loading studies plots report_page "
    "synthetic_tasks synthetic_tasks.symbolic synthetic_tasks.language synthetic_tasks.evaluation synthetic_tasks.probes",
}
TYPES = {"circuits": "dcmha", "plots": "dcmha"}  # whose types they may name beside that
LATE = {  # what is imported only when it is needed, and why
    ("loading", "dcmha"),  # its bridge needs TransformerLens
    ("plots", "attention"),  # figures know most results by their types
}
ALL = list(structure.imports())
RUNNING = [one for one in ALL if not one.for_types]


def test_every_package_has_its_line() -> None:
    assert {structure.room(module) for module in structure.modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_package_imports_what_it_may(room: str) -> None:
    may = {*MAY_IMPORT[room].split(), room}
    mine = [one for one in ALL if structure.room(one.module) == room and one.module not in ("headlab", "synthetic_tasks")]
    assert [one for one in mine if not one.for_types and structure.room(one.target) not in may] == []
    may |= set(TYPES.get(room, "").split())
    assert [one for one in mine if structure.room(one.target) not in may] == []


def test_no_circle_between_packages() -> None:
    list(TopologicalSorter({room: MAY_IMPORT[room].split() for room in MAY_IMPORT}).static_order())


def test_no_circle_between_modules() -> None:
    needs: dict[str, set[str]] = {}
    for one in RUNNING:
        needs.setdefault(one.module, set()).add(one.target)
    list(TopologicalSorter(needs).static_order())


def test_what_is_imported_late() -> None:
    """A library imports at the top; only the command line, which has to start fast, waits."""
    late = {(structure.room(one.module), structure.room(one.target)) for one in RUNNING if one.late}
    assert {pair for pair in late if pair[0] != "cli"} <= LATE


def test_packages_hold_no_code() -> None:
    inits = {path for path in structure.modules().values() if path.name == "__init__.py"}
    with_names = {Path(str(package.__file__)) for package in (hl, hl.plots, dcmha, st)}  # the public ones
    for path in inits - with_names:
        [docstring] = structure.ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(docstring, structure.ast.Expr)


def test_no_module_hides_something_public() -> None:
    for package, and_yet in ((hl, {"plots"}), (dcmha, set()), (hl.plots, set()), (st, set())):
        modules = {path.stem for path in Path(str(package.__file__)).parent.iterdir()}
        assert modules & set(package.__all__) == and_yet
