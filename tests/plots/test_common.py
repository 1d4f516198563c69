from __future__ import annotations

import socket
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
import pytest

import headlab as hl
from headlab import plots


def test_drawing_needs_no_network_and_changes_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plotly.io.renderers.default, plotly.io.templates.default

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a figure asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    figure = plots.heads(hl.HeadScores([[1.0, 2.0]]))
    assert isinstance(figure, go.Figure)
    page = plots.save_html(figure, tmp_path / "heads.html").read_text(encoding="utf-8")
    assert "<script src=" not in page
    assert before == (plotly.io.renderers.default, plotly.io.templates.default)
