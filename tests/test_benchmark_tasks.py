"""The page on the tasks, from made-up logs."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import tasks
from synthetic_tasks import Evaluation
from synthetic_tasks.probes.benchmark import identity
from synthetic_tasks.probes.studies import FULL, STUDIES


@pytest.fixture
def evaluation() -> Evaluation:
    rows = [
        {
            "context": context, "task": f"t{context % 2}", "difficulty": context % 3, "place": 0, "answer": "x", "tokens": 1,
            "factors": {"relation": "city", "looked_up": "item", "reported": "item", "negation": "is", "order": "plain"},
            "chance": 0.25, "logprob": -1.0, "all": context < 3, "first": context < 5, "choice": True,
        }
        for context in range(7)
    ]  # fmt: skip
    return Evaluation(tuple(rows))


def log(path: Path, device: str, studies: tuple[str, ...], test: float) -> Path:
    found = {identity(point.run): point.run for name in studies for point in STUDIES[name](FULL, range(5))}
    rows = [
        {"run": key, "parameters": 1000, "seen": 0.999, "test": test if run.task.n_held_out else None}
        | {"mapped_seen": 0.5, "mapped_test": None}
        for key, run in found.items()
    ]
    header = {"what": "probes", "version": "0", "torch": "2.0", "device": device}
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]), encoding="utf-8")
    return path


def test_the_page_shows_what_the_logs_hold_and_nothing_else(
    tmp_path: Path, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(tasks, "picture", lambda figure, docs, name, caption: drawn.append(name) or f"[{caption}]")
    (tmp_path / "data").mkdir()
    for name in tasks.EVALUATIONS:
        tasks.by_factors(evaluation).to_csv(tmp_path / "data" / f"smollm2-{name}.csv", index=False)
    logs = [
        log(tmp_path / "a.jsonl", "one GPU", ("control",), 0.1),
        log(tmp_path / "b.jsonl", "another", ("records",), 0.345),
    ]
    tasks.report(logs, tmp_path)
    page = (tmp_path / "tasks.md").read_text(encoding="utf-8")
    assert "30 probes on one GPU, torch 2.0; 36 probes on another, torch 2.0" in page
    assert drawn == ["probes-records", "probes-control"]
    assert "## Number of features" not in page  # of which the other studies hold a few points
    assert "34.5, 34.5, 34.5" in page.split("## Number of records")[1].split("## ")[0]
    assert "unseen, every seed" not in page.split("## Nothing held out")[1].split("## A language")[0]
    assert "points were measured" not in page


def test_the_page_says_what_is_missing(tmp_path: Path, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "picture", lambda figure, docs, name, caption: f"[{caption}]")
    (tmp_path / "data").mkdir()
    for name in tasks.EVALUATIONS:
        tasks.by_factors(evaluation).to_csv(tmp_path / "data" / f"smollm2-{name}.csv", index=False)
    path = log(tmp_path / "a.jsonl", "one GPU", ("records",), 0.5)
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:-3]) + "\n", encoding="utf-8")
    tasks.report([path], tmp_path)
    assert "33 of 36 points were measured." in (tmp_path / "tasks.md").read_text(encoding="utf-8")


def test_the_factors_of_an_evaluation_become_lines(evaluation: Evaluation) -> None:
    lines = tasks.by_factors(evaluation)
    assert list(lines["factor"].unique()) == ["all", *tasks.FACTORS]
    assert lines.loc[0, "answers"] == 7
    assert lines.loc[0, "whole answer"].startswith("42.9 (")
    assert lines.loc[0, "chance of choice"] == "25.0"


def test_markdown_and_per_cent() -> None:
    assert tasks.markdown(pd.DataFrame({"a": [1], "b": ["x"]})) == "| a | b |\n| --- | --- |\n| 1 | x |"
    assert [tasks.percent(share) for share in (0.12345, 1, float("nan"))] == ["12.3", "100.0", "-"]
