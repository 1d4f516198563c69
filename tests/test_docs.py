"""The pages for contributors say what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import headlab as hl
from docs import structure

ROOT = Path(__file__).parents[1]
PLACES = ("", "headlab", "headlab/cli", "synthetic_tasks", "tests/helpers")  # where a path on the page may begin


def test_the_picture_is_up_to_date() -> None:
    page = structure.PAGE.read_text(encoding="utf-8")
    assert structure.drawn(page) == page, "python docs/structure.py draws it anew"
    assert "cli --> report_page" in page
    assert "headlab --> " not in page


def test_a_page_without_a_place_for_the_picture() -> None:
    with pytest.raises(SystemExit, match="has no place for the picture"):
        structure.drawn("# Contributing")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_paths_exist(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    paths = {path for path in re.findall(r"`([\w./]+)`", text) if re.search(r"\w/|\.(py|md|toml)$", path)}
    assert len(paths) >= (30 if page == "CONTRIBUTING.md" else 2)
    assert {path for path in paths if not any((ROOT / place / path).exists() for place in PLACES)} <= MADE_BY_COMMANDS


MADE_BY_COMMANDS = {"demo/"}  # where the README's first command writes


def test_the_version_is_cited() -> None:
    assert f"\nversion: {hl.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{hl.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
