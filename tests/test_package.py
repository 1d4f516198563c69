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

FOLDER = Path(hl.__file__).parent
TASKS = Path(st.__file__).parent
FILES = sorted(path for folder in (FOLDER, TASKS) for path in folder.rglob("*.py") if path.name != "__init__.py")
INSIDE = {path.name for path in FOLDER.iterdir() if (path / "__init__.py").is_file()}
DRAWING = ("cli.pruning", "cli.analysis", "cli.tasks", "cli.demo", "report_page.sections")
HEAVY = {"torch", "transformers", "transformer_lens", "plotly", "pandas", "scipy", "sklearn"}


def name_of(path: Path) -> str:
    """`gates`, `dcmha.compose`, or `tasks.words` for a module of synthetic_tasks."""
    if path.is_relative_to(TASKS):
        return f"tasks.{path.stem}"
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, with whether this happens when the file itself is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_for_types(node)
        for inside in ast.walk(node)
    }
    packages = {"headlab", "synthetic_tasks", *(f"headlab.{name}" for name in INSIDE)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(FOLDER.parent).parent.parts
            parents = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            found = [f"{module}.{alias.name}" for alias in node.names] if module in packages else [module]
        else:
            continue
        yield from ((name, id(node) not in later) for name in found)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def own(path: Path) -> set[str]:
    return {module for name, _ in imports(path) if (module := within(name))}


def within(name: str) -> str:
    """Which of our modules an imported name is or is from: `headlab.dcmha.compose.Compose` -> `dcmha.compose`."""
    package, *parts = name.split(".")
    if package == "synthetic_tasks":
        return ".".join(["tasks", *parts[:1]])
    if package != "headlab" or parts == ["__version__"]:
        return ""
    longer = ".".join(parts[:2])
    return longer if FOLDER.joinpath(*parts[:2]).with_suffix(".py").is_file() else ".".join(parts[:1])


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
    [block] = [node for node in tree.body if _is_for_types(node)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == homes
    assert set(typed) == set(package.__all__)


def test_no_module_hides_something_public() -> None:
    modules = {
        package: {path.stem for path in Path(str(package.__file__)).parent.iterdir()} for package in (hl, st, hl.plots)
    }
    assert modules[hl] & set(hl.__all__) == {"plots"}
    assert modules[st] & set(st.__all__) == set()
    assert modules[hl.plots] & set(hl.plots.__all__) == set()
    assert Path(hl.plots.__file__) == FOLDER / "plots" / "__init__.py"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_who_may_import_what(path: Path) -> None:
    packages = {name.split(".")[0] for name, _ in imports(path)}
    if path.parent != FOLDER / "plots":
        assert "plotly" not in packages
        drawing = {name for name in own(path) if name.split(".")[0] == "plots"}
        assert drawing <= ({"plots"} if name_of(path) in DRAWING else set())
    if name_of(path) not in ("loading", "dcmha.bridge", "dcmha.bridge_components"):
        assert not any(name.startswith("transformer_lens.model_bridge") for name, _ in imports(path))


def test_only_the_command_line_of_headlab_knows_synthetic_tasks() -> None:
    found = {
        (name_of(path), module, now)
        for path in FOLDER.rglob("*.py")
        for name, now in imports(path)
        if (module := within(name)).split(".")[0] == "tasks"
    }
    assert {name.split(".")[0] for name, _, _ in found} == {"cli"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_imported_late(path: Path) -> None:
    early = {name.split(".")[0] for name, now in imports(path) if now}
    if name_of(path) not in ("dcmha.bridge", "dcmha.bridge_components"):  # imported by TransformerLens, or when used
        assert not early & {"transformer_lens", "pandas", "scipy", "sklearn"}
    late = {module for name, now in imports(path) if not now and (module := within(name))}
    if path.stem == "loading":
        assert late == {"dcmha.bridge"}  # which needs TransformerLens
    elif name_of(path) == "circuits.matrices":
        assert late == {"dcmha.maps"}  # a type
    elif path.parent.name not in ("cli", "plots"):  # figures know results by their types
        assert late == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_pickled_or_unpickled(path: Path) -> None:
    packages = {name.split(".")[0] for name, _ in imports(path)}
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
