from __future__ import annotations

import errno
import json
import os
import resource
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from headlab import results
from headlab.errors import HeadlabError
from headlab.results import Result, StepLog, building, write
from headlab.scores import HeadScores

HEADER = {"method": "ablation", "seed": 3, "fractions": (0.1, 0.2), "model": {"name": "größer"}}
ROWS = [{"head": f"L0H{i}", "loss": 1 / (i + 3), "by_example": [i / 7, -0.0, 1e-300]} for i in range(3)]


@contextmanager
def disk_with(free: int) -> Iterator[None]:
    """The system itself refuses to make any file longer than this, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_a_file_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "result.json"
    assert write(path, lambda temporary: temporary.write_text("old")) == path

    def look_then_write(temporary: Path) -> None:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent

    write(str(path), look_then_write)
    assert path.read_text() == "new"
    assert names(path.parent) == ["result.json"]


def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    path = write(tmp_path / "result", lambda temporary: temporary.write_text("x"))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = write(tmp_path / "result", lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = HeadScores(([1.0],)).save(tmp_path / "scores.json")
    before = path.read_bytes()
    with disk_with(200), pytest.raises(HeadlabError, match=r"could not write .*scores.json: File too large"):
        HeadScores(([1.5] * 999,)).save(path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["scores.json"]


def test_a_full_disk_under_safetensors_too(tmp_path: Path) -> None:
    with disk_with(200), pytest.raises(HeadlabError, match=r"could not write .*x.safetensors: .*File too large"):
        write(tmp_path / "x.safetensors", lambda temporary: save_file({"x": torch.zeros(999)}, temporary))
    assert names(tmp_path) == []


def test_a_disk_that_fills_when_the_file_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "result", lambda temporary: temporary.write_text("old"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(results.os, call, full)
            with pytest.raises(HeadlabError, match=r"could not write .*result: No space left on device$"):
                write(path, lambda temporary: temporary.write_text("new"))
        assert path.read_text() == "old"
        assert names(tmp_path) == ["result"]


def test_a_place_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HeadlabError, match="could not write"):
        write(tmp_path / "file" / "result", lambda temporary: temporary.write_text("x"))
    with pytest.raises(HeadlabError, match="could not write"), building(tmp_path / "file" / "folder"):
        pass


def test_building_makes_a_whole_folder_or_none(tmp_path: Path) -> None:
    target = tmp_path / "deeper" / "model"
    with building(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["model"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_building_takes_an_empty_folder_but_no_other(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with building(tmp_path / "empty") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(HeadlabError, match="already holds something"), building(tmp_path / "empty"):
        pytest.fail("nothing may be computed for a folder that cannot be written")
    with pytest.raises(HeadlabError, match="already holds something"), building(tmp_path / "empty" / "a"):
        pytest.fail("nothing may be computed for a folder that cannot be written")
    assert (tmp_path / "empty" / "a").read_text() == "1"


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_building_leaves_nothing_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    expected = HeadlabError if error is OSError else error

    def fail(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise error

    with pytest.raises(expected), building(tmp_path / "model") as folder:
        fail(folder)
    assert names(tmp_path) == []


@pytest.fixture
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results.os, "fsync", lambda _: None)


def finish(path: Path | None, header: dict = HEADER) -> StepLog:
    log = StepLog(path, header)
    for row in ROWS[len(log.done) :]:
        log.append(row)
    return log


@pytest.mark.usefixtures("_no_waiting_for_the_disk")
def test_a_log_killed_at_any_byte_ends_as_if_never_killed(tmp_path: Path) -> None:
    whole = finish(tmp_path / "whole.jsonl").path.read_bytes()
    assert whole.count(b"\n") == 1 + len(ROWS)
    path = tmp_path / "killed.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        begun = StepLog(path, HEADER)
        assert len(begun.done) == max(0, whole[:size].count(b"\n") - 1)
        assert finish(path).done == ROWS
        assert path.read_bytes() == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.usefixtures("_no_waiting_for_the_disk")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), min_size=1, max_size=4), st.floats(0, 1))
def test_a_log_gives_back_any_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[dict], cut: float) -> None:
    path = tmp_path_factory.mktemp("log") / "rows.jsonl"
    header, *rows = rows
    for log in (StepLog(path, header), StepLog(None, header)):
        for row in rows:
            log.append(row)
        assert log.done == rows
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    log = StepLog(path, header)
    for row in rows[len(log.done) :]:
        log.append(row)
    assert path.read_bytes() == whole


def test_a_log_of_another_computation_is_left_alone(tmp_path: Path) -> None:
    path = finish(tmp_path / "log.jsonl").path
    before = path.read_bytes()
    other = HEADER | {"seed": 4, "model": {"name": "other"}, "new": 1}
    with pytest.raises(HeadlabError, match=r"differs in: model, new, seed\)"):
        StepLog(path, other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b"\xff\xfe\n", b"[1, 2]\n", b"3\n", b'{"a": 1}'])
def test_a_file_that_is_no_log_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(HeadlabError, match="is not a log of headlab"):
        StepLog(path, HEADER)
    assert path.read_bytes() == content


def test_a_log_on_a_full_disk_goes_on_from_its_last_row(tmp_path: Path) -> None:
    whole = finish(tmp_path / "whole.jsonl").path.read_bytes()
    path = tmp_path / "log.jsonl"
    with disk_with(len(whole) - 9), pytest.raises(HeadlabError, match=r"could not write .*run again"):
        finish(path)
    assert whole.startswith(path.read_bytes())
    finish(path)
    assert path.read_bytes() == whole


def test_a_log_without_a_path_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert finish(None).done == ROWS
    assert names(tmp_path) == []
    with pytest.raises(HeadlabError, match="could not read"):
        StepLog(tmp_path, HEADER)


GOOD = {"headlab": 1, "kind": "scores", "record": {}, "heads": None, "rows": [[1.0]], "columns": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "neither JSON nor"),
        (b"\xff\xfe\x00", "neither JSON nor"),
        ("[1, 2]", "is not a headlab result"),
        ("{}", "not a result that this version"),
        (GOOD | {"headlab": 99}, "not a result that this version"),
        (GOOD | {"kind": "weather"}, "not a result that this version"),
        (GOOD | {"kind": ["scores"]}, "not a result that this version"),
        (GOOD | {"kind": "mask"}, "holds a mask, but a scores was expected"),
        ({key: value for key, value in GOOD.items() if key != "record"}, "damaged"),
        ({key: value for key, value in GOOD.items() if key != "rows"}, "damaged"),
        (GOOD | {"heads": [[{"no": "head"}]]}, "damaged"),
        (GOOD | {"rows": [["x"]]}, "damaged"),
        (GOOD | {"rows": 3}, "damaged"),
        (GOOD | {"rows": [[None]]}, "damaged: a row holds NaN or infinity"),
    ],
)
def test_files_that_are_no_scores(tmp_path: Path, content: str | bytes | dict, message: str) -> None:
    path = tmp_path / "scores.json"
    text = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(HeadlabError, match=message) as caught:
        HeadScores.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(HeadlabError, match=r"there is no file .*none\.json"):
        Result.load(tmp_path / "none.json")
    with pytest.raises(HeadlabError, match="could not read"):
        Result.load(tmp_path)


def test_a_kind_in_the_other_format_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "maps.json").write_text(json.dumps({"headlab": 1, "kind": "maps", "record": {}}))
    save_file({"x": torch.ones(3)}, tmp_path / "scores", metadata={"headlab": "1", "kind": "scores", "record": "{}"})
    for name in ("maps.json", "scores"):
        with pytest.raises(HeadlabError, match=f"{name} is damaged"):
            Result.load(tmp_path / name)


def test_every_kind_is_found_by_its_name() -> None:
    """The entry points that are installed are those of pyproject.toml; if not: install again (pip install -e .)."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {home.name: home for home in entry_points(group=results.KINDS)}
    assert {name: home.value for name, home in installed.items()} == project["entry-points"][results.KINDS]
    assert all(home.load().kind == name for name, home in installed.items())
    assert set(installed) == set(results._kinds)
