"""What holds for the packages as a whole: what they import and when, and who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import headlab as hl
import synthetic_tasks as st
from docs.structure import is_for_types

FOLDER = Path(hl.__file__).parent
TASKS = Path(st.__file__).parent
FILES = sorted(path for folder in (FOLDER, TASKS) for path in folder.rglob("*.py") if path.name != "__init__.py")
HEAVY = {"torch", "transformers", "transformer_lens", "plotly", "pandas", "scipy", "sklearn"}
LENS = {"loading", "dcmha.bridge", "dcmha.bridge_components"}  # that know TransformerLens from inside


def name_of(path: Path) -> str:
    """`hooks.masking`, or `synthetic_tasks.language.words`."""
    parts = path.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts).removeprefix("headlab.")


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports from elsewhere, with whether this happens when the file itself is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_for_types(node)
        for inside in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module), id(node) not in later


def loaded_by(statement: str) -> set[str]:
    """The heavy packages that a fresh interpreter has in memory after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FOLDER.parent)
    return HEAVY & set(output.stdout.split())


def test_importing_is_light() -> None:
    assert loaded_by("import headlab; dir(headlab); headlab.__version__") == set()
    assert loaded_by("import synthetic_tasks; dir(synthetic_tasks)") == set()


def test_scores_and_masks_need_no_model() -> None:
    assert loaded_by("import headlab; headlab.HeadScores([[1, 2]]).keep(1); headlab.HeadlabError; headlab.Result") == set()


def test_the_command_line_starts_light() -> None:
    assert loaded_by("import headlab.cli.main") == set()


def test_transformer_lens_and_plotly_load_only_when_used() -> None:
    loaded = loaded_by("import headlab; headlab.heads; headlab.masked; headlab.prune; headlab.timing")
    assert not loaded & {"transformer_lens", "plotly", "pandas"}
    assert loaded >= {"torch", "transformers"}


@pytest.mark.parametrize("package", [hl, st, hl.plots], ids=lambda package: package.__name__)
def test_every_public_name_is_there(package: ModuleType) -> None:
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        (hl, {name: module for module, names in hl._HOME.items() for name in names} | {"plots": None}),
        (st, st._HOME),
    ],
    ids=["headlab", "synthetic_tasks"],
)
def test_types_see_the_same_names(package: ModuleType, homes: dict[str, str | None]) -> None:
    tree = ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if is_for_types(node)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == homes
    assert set(typed) == set(package.__all__)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_imported_where_and_when(path: Path) -> None:
    every = {name for name, _ in imported(path)}
    early = {name.split(".")[0] for name, now in imported(path) if now}
    if path.parent != FOLDER / "plots":
        assert "plotly" not in {name.split(".")[0] for name in every}
    if name_of(path) not in LENS:
        assert not any(name.startswith("transformer_lens.model_bridge") for name in every)
    if name_of(path) not in LENS - {"loading"}:  # imported by TransformerLens, or when used
        assert not early & {"transformer_lens", "pandas", "scipy", "sklearn"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_pickled_or_unpickled(path: Path) -> None:
    packages = {name.split(".")[0] for name, _ in imported(path)}
    assert not packages & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called not in ("torch.save", "np.save", "eval", "exec")
            assert called != "torch.load" or options.get("weights_only") == "True"
            assert options.get("allow_pickle", "False") == "False"
            assert options.get("trust_remote_code", "False") == "False"


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == hl.__version__
    assert project["scripts"] == {"headlab": "headlab.cli.main:main"}
    assert all((folder / "py.typed").is_file() for folder in (FOLDER, TASKS))
