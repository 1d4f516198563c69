"""Studies from the first step to their table, with probes of a few steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headlab import plots
from headlab.errors import HeadlabError
from headlab.results import Result
from synthetic_tasks.probes import benchmark, studies
from synthetic_tasks.probes.benchmark import ProbeResults, collected, described, identity, measured, study
from synthetic_tasks.probes.ground_truth import compare
from synthetic_tasks.probes.studies import SIZES, STUDIES, Point, Size
from synthetic_tasks.probes.training import Outcome, Recipe, Run, train

TINY = Size(
    features=4, values=5, records=4, d_model=11, heads=3, d_head=2,
    recipes={
        "binding": Recipe(steps=2, batch=8),
        "conflict": Recipe(steps=3, batch=8, weight_decay=0.5),
        "first": Recipe(steps=3, batch=8, weight_decay=0.5, average=0.5),
        "pairs": Recipe(steps=4, batch=8),
    },
)  # fmt: skip
Trained = list[Run]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Tiny sizes and few test sequences; returns the runs that were trained, in order."""
    runs: Trained = []

    def watched(todo: Sequence[Run], *args: Any, **options: Any) -> Iterator[Outcome]:
        for outcome in train(todo, *args, **options | {"checks": 2, "n_test": 50}):
            runs.append(outcome.run)
            yield outcome

    monkeypatch.setattr(benchmark, "train", watched)
    monkeypatch.setattr(benchmark, "compare", lambda probe, task, split: compare(probe, task, split, 64))
    for name in SIZES:
        monkeypatch.setitem(SIZES, name, TINY)  # type: ignore[misc]
    return runs


def points_of(*names: str, seeds: int) -> list[tuple[str, Point]]:
    return [(name, at) for name in names for at in STUDIES[name](TINY, range(seeds))]


def test_what_studies_share_is_trained_once(trained: Trained) -> None:
    found = study(["d_head", "held_out"], "small", seeds=2)
    expected = points_of("d_head", "held_out", seeds=2)
    assert len(found.lines) == len(expected)
    distinct = {identity(at.run) for _, at in expected}
    assert sorted(map(identity, trained)) == sorted(distinct)
    assert len(distinct) == len(expected) - 3 * 2
    for row, (name, at) in zip(found.lines, expected, strict=True):
        assert row["study"] == name
        assert row["run"] == identity(at.run)
        assert {key: row[key] for key in described(at)} == described(at)
    assert found.record["studies"] == ["d_head", "held_out"]
    assert (found.record["size"], found.record["seeds"], found.record["device"]) == ("small", 2, "cpu")
    one = {row["run"]: row["seen"] for row in found.of("d_head").lines}
    assert all(one[row["run"]] == row["seen"] for row in found.of("held_out").lines if row["run"] in one)


def test_a_row_says_what_the_probe_is_and_reached(trained: Trained) -> None:
    usual = [at for at in studies.main(TINY, [0]) if at.heads <= 6]
    outcomes = list(train([at.run for at in usual], checks=2, n_test=50))
    for outcome in outcomes:
        (at,) = (at for at in usual if at.run is outcome.run)
        row = measured(outcome)
        assert row["run"] == identity(at.run)
        assert row["parameters"] == sum(p.numel() for p in outcome.probe.parameters())
        assert (row["seen"], row["test"], row["history"]) == (outcome.seen, outcome.test, outcome.history)
        for split in ("seen", "test"):
            assert row[f"mapped_{split}"] == compare(outcome.probe, at.run.task, split, 64).share
        told = described(at)
        config = outcome.probe.config
        assert told["own_heads"] == config.num_attention_heads
        assert (told["d_head"], told["d_model"], told["layers"]) == (config.head_dim, config.hidden_size, 1)
        assert (told["mlp"], told["first"], told["rank"]) == (config.mlp, config.first, config.rank)
        assert told["steps"] == at.run.recipe.steps == outcome.history[-1]["step"]
        assert told["chance"] == 1 / 4
    assert not trained


def test_there_is_no_map_to_read_of_two_layers_and_no_test_with_nothing_held_out(trained: Trained) -> None:
    found = study(["layers", "control"], "small", seeds=1)
    frame = found.to_frame()
    two, control = frame["layers"] == 2, frame["study"] == "control"
    assert frame["mapped_seen"].isna().tolist() == two.tolist()
    assert frame["mapped_test"].isna().tolist() == (two | control).tolist()
    assert frame["test"].isna().tolist() == control.tolist()
    for name in ("test", "mapped_test"):
        assert frame[name].dtype == found.of("control").to_frame()[name].dtype == np.float64  # also where all are NaN
    assert found.of("control").summary()["test_mean"].isna().all()
    json.dumps(found.lines, allow_nan=False)
    assert trained


def test_the_frame_is_what_the_figures_need(trained: Trained) -> None:
    found = study(["main", "d_head"], "full", seeds=2)
    frame = found.to_frame()
    needed = {"level", "kind", "heads", "own_heads", "d_head", "d_model", "features", "values", "records", "held_out"}
    needed |= {"shared_values", "mlp", "first", "layers", "steps", "hold", "rank", "weight_decay", "seed", "parameters"}
    assert needed | {"study", "run", "chance", "seen", "test", "mapped_seen", "mapped_test"} <= set(frame.columns)
    assert "history" not in frame
    assert len(frame) == len(found.lines)
    assert plots.probe_kinds(found.of("main")).data
    assert plots.probes(found.of("d_head"), "d_head").data
    assert trained


def test_the_summary_is_over_seeds(trained: Trained) -> None:
    found = study(["main"], "small", seeds=3)
    summary = found.summary()
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found.lines:
        key = tuple(row[name] for name in ("level", "kind", "heads", "own_heads", "first", "weight_decay", "parameters"))
        groups.setdefault(key, []).append(row)
    assert len(summary) == len(groups) == 9
    for line, (key, rows) in zip(summary.to_dict("records"), groups.items(), strict=True):
        names = ("level", "kind", "heads", "own_heads", "first", "weight_decay", "parameters")
        assert tuple(line[name] for name in names) == key
        assert line["seeds"] == len(rows) == 3
        for split in ("seen", "test"):
            values = [row[split] for row in rows]
            assert line[f"{split}_mean"] == pytest.approx(sum(values) / 3)
            assert (line[f"{split}_min"], line[f"{split}_max"]) == (min(values), max(values))
            assert line[f"mapped_{split}"] == pytest.approx(sum(row[f"mapped_{split}"] for row in rows) / 3)
    assert len(trained) == 27


def test_results_come_back_from_a_file(trained: Trained, tmp_path: Path) -> None:
    found = study(["control"], "small", seeds=1)
    found.save(tmp_path / "probes.json")
    for back in (ProbeResults.load(tmp_path / "probes.json"), Result.load(tmp_path / "probes.json")):
        assert isinstance(back, ProbeResults)
        assert back.lines == found.lines
        assert {name: back.record[name] for name in found.record} == found.record
        assert back.to_frame().equals(found.to_frame())
    assert repr(found) == f"ProbeResults({len(trained)} points)"


def test_one_study_does_not_know_of_the_others(trained: Trained) -> None:
    both = study(["d_head", "control"], "small", seeds=1)
    control = both.of("control")
    assert {row["study"] for row in control.lines} == {"control"}
    assert control.record == study(["control"], "small", seeds=1).record
    assert both.record["studies"] == ["d_head", "control"]
    with pytest.raises(HeadlabError, match="there is no study 'main' in these results; there is control, d_head"):
        both.of("main")
    with pytest.raises(HeadlabError, match="there is none"):
        ProbeResults(()).of("main")
    assert trained


# --- killed runs


@pytest.fixture
def killed(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a study that dies when so many probes are done."""

    def run(after: int, **options: Any) -> None:
        whole = benchmark.train

        def dying(*args: Any, **kwargs: Any) -> Iterator[Outcome]:
            for number, outcome in enumerate(whole(*args, **kwargs)):
                if number == after:
                    raise KeyboardInterrupt
                yield outcome

        with monkeypatch.context() as patch:
            patch.setattr(benchmark, "train", dying)
            with pytest.raises(KeyboardInterrupt):
                study(**options)

    return run


@pytest.mark.parametrize("after", [0, 2, 6])
def test_a_study_goes_on_between_stacks_as_if_never_killed(
    after: int, trained: Trained, killed: Callable[..., None], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"names": ["control"], "size": "small", "seeds": 2, "beside": 2}
    whole = study(**options, log=tmp_path / "whole.jsonl")
    killed(after, **options, log=tmp_path / "killed.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes().count(b"\n") == 1 + after
    trained.clear()
    again = study(**options, log=tmp_path / "killed.jsonl")
    assert len(trained) == 12 - after
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (again.lines, again.record) == (whole.lines, whole.record)
    trained.clear()
    assert study(**options, log=tmp_path / "killed.jsonl").lines == whole.lines
    assert not trained


def test_a_study_goes_on_within_a_stack_too(trained: Trained, killed: Callable[..., None], tmp_path: Path) -> None:
    options: dict[str, Any] = {"names": ["control"], "size": "small", "seeds": 2, "log": tmp_path / "log.jsonl"}
    killed(5, **options)
    log = tmp_path / "log.jsonl"
    done = log.read_bytes()
    log.write_bytes(done + done.splitlines()[-1][:20])  # cut in the middle of a line
    trained.clear()
    found = study(**options)
    assert len(trained) == 12 - 5
    assert log.read_bytes().startswith(done)
    logged = {row["run"]: row for row in map(json.loads, log.read_text(encoding="utf-8").splitlines()[1:])}
    assert len(logged) == 12
    for row, (name, at) in zip(found.lines, points_of("control", seeds=2), strict=True):
        assert row == {"study": name} | described(at) | logged[identity(at.run)]


def test_more_seeds_and_studies_go_on_from_the_same_log(trained: Trained, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    first = study(["d_head"], "small", seeds=1, log=log)
    trained.clear()
    more = study(["held_out", "d_head"], "small", seeds=2, log=log)
    assert not {identity(run) for run in trained} & {row["run"] for row in first.lines}
    kept = [row for row in more.of("d_head").lines if row["seed"] == 0]
    assert kept == list(first.lines)
    logged = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()[1:]]
    assert collected(["d_head"], "small", 1, logged) == first.lines
    assert collected(["d_head"], "small", 1, logged[:4]) == tuple(
        row for row in first.lines if row["run"] in {line["run"] for line in logged[:4]}
    )


def test_runs_that_differ_in_anything_are_told_apart() -> None:
    run = studies.point(TINY, "binding", "dcmha", 0).run
    others = [
        replace(run, kind="mha"),
        replace(run, task=replace(run.task, seed=1)),
        replace(run, task=replace(run.task, held_out=0.5)),
        replace(run, sizes={**run.sizes, "rank": 1}),
        replace(run, recipe=replace(run.recipe, weight_decay=0.2)),
        replace(run, recipe=replace(run.recipe, decay={"base": 0.2})),
    ]
    assert len({identity(one) for one in [run, *others]}) == 7
    assert identity(replace(run, sizes=dict(reversed(run.sizes.items())))) == identity(run)


# --- bad input


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["main", "nonsense"], {}, "no study is called 'nonsense'; the studies are main, kinds, heads"),
        ([], {}, "no study was named; the studies are main"),
        (["main"], {"size": "huge"}, "the size is 'full' or 'small', not 'huge'"),
        (["main"], {"seeds": 0}, "0 seeds: at least one"),
        (["main"], {"beside": 0}, "0 bundles side by side: at least one"),
    ],
)
def test_bad_input(names: list[str], options: dict[str, Any], message: str, trained: Trained) -> None:
    with pytest.raises(HeadlabError, match=message):
        study(names, **{"size": "small", "seeds": 1} | options)
    assert not trained


def test_a_log_of_something_else(trained: Trained, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"what": "ablation"}) + "\n")
    with pytest.raises(HeadlabError, match="was begun for another computation"):
        study(["control"], "small", seeds=1, log=log)
    log.write_text("to do\n")
    with pytest.raises(HeadlabError, match="is not a log of headlab"):
        study(["control"], "small", seeds=1, log=log)
    assert log.read_text() == "to do\n"
    assert not trained
