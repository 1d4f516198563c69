"""The structure of the code, from its own imports: the picture in CONTRIBUTING.md.

python docs/structure.py            draws the picture anew
python docs/structure.py --check    says whether it is up to date
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
PACKAGES = ("headlab", "synthetic_tasks")
BEGIN, END = "<!-- drawn by docs/structure.py -->\n", "<!-- up to here -->\n"
WORDS = ("errors", "version", "choices", "results", "tables", "scores")  # modules that everyone uses
FACES = ("headlab", "synthetic_tasks", "surgery")  # that name what is inside, and hold nothing themselves


class Import(NamedTuple):
    """That one module takes something from another one of ours."""

    module: str  # headlab.hooks.masking
    target: str  # headlab.models.access
    late: bool  # in a function, when it is called
    for_types: bool  # under TYPE_CHECKING


def modules() -> dict[str, Path]:
    """Our modules by their dotted names; those of packages have the names of these."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports() -> Iterator[Import]:
    """Every import of one of our modules by another; that of a package by what is in it is none."""
    known = modules()
    for module, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        inside = {
            kind: {id(below) for node in ast.walk(tree) if is_kind(node) for below in ast.walk(node)}
            for kind, is_kind in (("late", _is_function), ("types", is_for_types))
        }
        for node in ast.walk(tree):
            for target in _targets(node, package, known):
                if target != module and not package.startswith(target):
                    yield Import(module, target, id(node) in inside["late"], id(node) in inside["types"])


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def is_for_types(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _targets(node: ast.AST, package: str, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a statement imports from."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        base = ".".join(
            [*parents[: len(parents) + 1 - node.level], *filter(None, [node.module])] if node.level else [node.module]
        )
        names = [f"{base}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        while name and name not in known:
            name = name.rpartition(".")[0]
        if name:
            yield name


def room(module: str) -> str:
    """What the rule and the picture speak of: a package, or a module that stands alone; the face of headlab is `headlab`."""
    package, *parts = module.split(".")
    if package == "headlab":
        return parts[0] if parts else package
    return ".".join([package, *parts[:1]])


def arrows() -> dict[str, set[str]]:
    """By room, the rooms that it needs when it runs."""
    found: dict[str, set[str]] = {room(module): set() for module in modules()}
    for one in imports():
        if not one.for_types and room(one.module) != room(one.target):
            found[room(one.module)].add(room(one.target))
    return found


def mermaid() -> str:
    """The packages as a Mermaid graph, an arrow from each to what it needs when it runs.

    Left out are the words that everyone uses, the lazy faces, and every arrow that a path of others makes good.
    """
    needs = {one: found - {*WORDS, *FACES, one} for one, found in arrows().items() if one not in {*WORDS, *FACES}}
    lines = ["graph TB"]
    for package in PACKAGES:
        members = sorted(one for one in needs if one.startswith("synthetic_tasks.") == (package == "synthetic_tasks"))
        lines += [f"  subgraph {package}_[{package}]"]
        lines += [f"    {_id(one)}[{one.rpartition('.')[2]}]" for one in members] + ["  end"]
    for one in sorted(needs):
        beyond = set().union(*(_reached(needs, other) for other in needs[one]), set())
        lines += [f"  {_id(one)} --> {_id(other)}" for other in sorted(needs[one] - beyond)]
    return "\n".join(lines) + "\n"


def _id(one: str) -> str:
    return one.replace(".", "_")


def _reached(needs: dict[str, set[str]], one: str) -> set[str]:
    """What can be reached from a package, itself left out."""
    return needs[one].union(*(_reached(needs, other) for other in needs[one]))


def drawn(page: str) -> str:
    """The page with the picture as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{PAGE.name} has no place for the picture: expected the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}```mermaid\n{mermaid()}```\n{END}{after}"


def main() -> None:
    """Draw the picture, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the picture is up to date")
    page = PAGE.read_text(encoding="utf-8")
    new = drawn(page)
    if not parser.parse_args().check:
        PAGE.write_text(new, encoding="utf-8")
    elif new != page:
        sys.exit(f"the picture in {PAGE.name} is out of date: python docs/structure.py draws it anew")


if __name__ == "__main__":
    main()
