from __future__ import annotations

import os
import sys
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a hub
os.environ["TQDM_DISABLE"] = "1"  # stderr is for errors, which tests read
# a worker of pytest-xdist has one core to itself: with a thread per core, workers would wait for each other's
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # also where something imported torch before the lines above
settings.register_profile("headlab", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("headlab")

Run = Callable[..., tuple[int, str, str]]
Failing = Callable[..., str]


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit status, stdout, stderr without progress bars."""
    from headlab.cli import main  # not above: shapes are checked in what is imported after this file

    monkeypatch.setenv("TERM", "dumb")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headlab", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def failing(run: Run) -> Failing:
    """Run a command that must fail, with one line on stderr and no traceback."""

    def call(*words: object) -> str:
        status, _, err = run(*words)
        assert status != 0
        assert err.startswith("headlab: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert "unexpected" not in err
        return err

    return call
