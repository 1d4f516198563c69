from __future__ import annotations

import numpy as np
import pytest

import headlab as hl
from headlab.circuits.summary import CircuitTable, circuit_table
from headlab.circuits.tokens import directions
from headlab.plots.circuits import content, spectra, tokens_of
from tests.helpers import surgical, zoo


@pytest.fixture(scope="module")
def table() -> CircuitTable:
    return circuit_table(zoo.build("llama-gqa"))


@pytest.mark.parametrize("circuit", ["qk", "ov"])
def test_spectra_have_a_line_per_head(table: CircuitTable, circuit: str) -> None:
    figure = spectra(table, circuit)  # type: ignore[arg-type]
    frame = table.to_frame()
    *traces, scale = figure.data
    assert [trace.name for trace in traces] == ["layer 0", "layer 1", "layer 2"]
    values = np.array(traces[1].y).reshape(6, 9)  # [head, singular value and a gap]
    expected = frame.loc[frame["layer"] == 1, [f"{circuit}_s{i}" for i in range(1, 9)]].to_numpy()
    np.testing.assert_allclose(values[:, :8], expected / expected[:, :1])
    assert np.isnan(values[:, 8]).all()
    assert traces[1].text[9 * 4 + 2].startswith(f"<b>L1H4</b><br>singular value 3 of {circuit.upper()}: ")
    assert f"{frame.loc[10, f'{circuit}_frobenius']:.4g}" in traces[1].text[9 * 4 + 2]
    assert scale.marker.colorbar.title.text == "layer"
    assert figure.layout.title.text == f"Singular spectra of {circuit.upper()} circuits"


def test_content_is_drawn_against_distance(table: CircuitTable) -> None:
    figure = content(table)
    frame = table.to_frame()
    values = np.array(figure.data[2].y).reshape(6, 9)
    np.testing.assert_allclose(values[3, :8], frame.loc[15, [f"content_{2**i}" for i in range(8)]].to_numpy(dtype=float))
    assert list(figure.data[2].x[:8]) == [2**i for i in range(8)]
    assert figure.layout.xaxis.type == "log"
    assert figure.data[2].text[9 * 3 + 2].startswith("<b>L2H3</b><br>content at distance 4: ")
    with pytest.raises(hl.HeadlabError, match="only rotary models"):
        content(circuit_table(zoo.build("gpt2")))


def test_ragged_tables_and_holes_are_drawn_and_named() -> None:
    model = zoo.build("dcformer-gqa")
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L1H2", "L2H0"]))
    figure = spectra(circuit_table(small), "ov")
    assert figure.layout.title.text == "Singular spectra of OV circuits (2 of 18 heads have none)"
    ragged = hl.prune(zoo.build("t5"), surgical.without_rows(zoo.build("t5"), 1))
    figure = spectra(circuit_table(ragged), "qk")
    names = [trace.name for trace in figure.data[:-1]]
    assert names == ["enc layer 0", "enc layer 2", "dec layer 0", "dec layer 1", "cross layer 0", "cross layer 1"]
    assert figure.data[-1].marker.colorbar.title.text == "row"
    with pytest.raises(hl.HeadlabError, match="circuit is 'qk' or 'ov'"):
        spectra(circuit_table(ragged), "vo")  # type: ignore[arg-type]


def test_tokens_of_directions_stand_from_one_end_to_the_other() -> None:
    found = directions(zoo.build("llama-gqa"), 1, 2, "ov", 2, 3)
    found.lines[0]["token"] = " <b>\n and much more"
    figure = tokens_of(found)
    heatmap = figure.data[0]
    frame = found.to_frame()
    assert heatmap.z.shape == (6, 4)
    column = frame.query("direction == 1 and side == 'out'")
    plus, minus = (column[column["end"] == end]["token"].tolist() for end in "+-")
    assert list(heatmap.text[:, 3]) == plus + minus[::-1]
    assert np.abs(heatmap.z).max(0) == pytest.approx(np.ones(4))
    assert heatmap.text[0, 0] == "·&lt;b&gt;\\n·and·mu…"
    assert "reads ·&lt;b&gt;\\n·and·much·more" in heatmap.customdata[0, 0]
    assert "<b>L1H2</b> OV direction 2" in heatmap.customdata[0, 3]
    assert figure.layout.xaxis.ticktext[0].endswith("<br>reads")
    assert tokens_of(directions(zoo.build("llama-gqa"), 1, 2, "qk", 1, 2)).layout.xaxis.ticktext[1].endswith("<br>key")
