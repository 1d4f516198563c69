from __future__ import annotations

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from headlab.errors import HeadlabError
from headlab.pruning.curves import Curve
from headlab.report_page import build, sections
from headlab.report_page.build import _safe_json, quantised, report
from headlab.report_page.gather import gather
from headlab.report_page.sections import SECTIONS
from headlab.results import KINDS
from headlab.scores import HeadScores
from tests.helpers import made_up
from tests.helpers.made_up import BOTH_SIDES, EVIL, RAGGED, model, square


class Scripts(HTMLParser):
    """A page's script elements, by id, as a browser would find them; and every element that is there."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.tags: list[str] = []
        self._inside: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self._inside = dict(attrs).get("id", "code") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.found[self._inside] = self.found.get(self._inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._inside = None


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    scripts = Scripts(path.read_text(encoding="utf-8"))
    return json.loads(scripts.found["data"]), scripts.found


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def weights(data: dict[str, Any], found: dict[str, str], prompt: int, head: str) -> np.ndarray:
    """What the page shows of a pattern, computed from its bytes as the page does."""
    [row] = [row for row in data["prompts"][prompt]["rows"] if head in row["heads"]]
    at, scale, signed = row["heads"][head]
    n, m = row["shape"]
    levels = np.frombuffer(unpacked(found[row["blob"]]), np.uint8).reshape(-1, n, m)[at].astype(float)
    roots = (levels - 128) / 127 if signed else levels / 255
    return np.sign(roots) * roots**2 * scale


@pytest.mark.parametrize("heads", [square(3, 5), RAGGED, BOTH_SIDES], ids=["square", "ragged", "encoder-decoder"])
def test_every_head_is_on_the_page_with_all_its_numbers(tmp_path: Path, heads: Any) -> None:
    made_up.folder(tmp_path, heads)
    path = report(tmp_path)
    assert path == tmp_path / "report.html"
    data, found = read(path)
    names = [str(head) for row in heads for head in row]
    assert sorted(data["heads"]) == sorted(names)
    shown = [[(data["heads"][head], index) for head, index in row["heads"]] for row in data["rows"]]
    assert shown == [[(str(head), head.index) for head in row] for row in heads]
    assert data["problems"] == []
    taylor = made_up.taylor(heads, model())
    expected = {str(h): v for row, values in zip(heads, taylor.rows, strict=True) for h, v in zip(row, values, strict=True)}
    [column] = [column for column in data["columns"] if column["label"] == "scores-taylor"]
    assert dict(zip(data["heads"], column["values"], strict=True)) == pytest.approx(expected, rel=1e-5)
    pattern = made_up.pattern(heads, model(), 7, 1)
    for head in pattern.heads:
        np.testing.assert_allclose(weights(data, found, 1, str(head)), pattern.of(head), atol=0.005)


def test_the_stacks_of_an_encoder_decoder_ask_and_look_at_their_own_tokens(tmp_path: Path) -> None:
    made_up.pattern(BOTH_SIDES, model(), 5).save(tmp_path / "attention.safetensors")
    data, _ = read(report(tmp_path))
    [prompt] = data["prompts"]
    sides = {row["blob"][-1]: (row["queries"], row["keys"], row["shape"]) for row in prompt["rows"]}
    lengths = {stack: len(words) for stack, words in prompt["tokens"].items()}
    assert [row["name"] for row in data["rows"]] == ["enc 0", "enc 1", "dec 0", "dec 1", "cross 0", "cross 1"]
    assert sides["0"] == ("enc", "enc", [lengths["enc"]] * 2)
    assert sides["2"] == ("dec", "dec", [lengths["dec"]] * 2)
    assert sides["4"] == ("dec", "enc", [lengths["dec"], lengths["enc"]])


def test_what_removal_costs_and_the_partners_are_in_the_panel(tmp_path: Path) -> None:
    heads = square(3, 5)
    made_up.folder(tmp_path, heads)
    data, _ = read(report(tmp_path))
    panels = {(panel["title"], panel["label"]): panel["lines"] for panel in data["panels"]}
    exact = made_up.removal(heads, model())
    change, se = (exact.columns[name][1][2] for name in ("change", "se"))
    [[told, head, value]] = panels["What removal costs", "scores-ablation"]["L1H2"]
    assert f"{change:+.4g} ± {se:.2g} (standard error), p = 0.03, over 16 examples" in told
    assert (head, value) == (None, None)
    scores = made_up.composition(heads, model()).to_frame()
    [label] = [label for title, label in panels if label.endswith("is fed by")]
    best = scores[scores["reader"] == "L2H3"].nlargest(5, "score")
    lines = panels["Partners", label]["L2H3"]
    assert [line[1] for line in lines] == best["source"].tolist()
    assert [line[2] for line in lines] == pytest.approx(best["score"].tolist(), rel=1e-5)
    near = made_up.likeness(heads, model()).nearest("L0H4")
    [label] = [label for _, label in panels if label.startswith("Attends most like")]
    lines = panels["Partners", label]["L0H4"]
    assert [line[1] for line in lines] == [str(head) for head, _ in near]
    assert [line[2] for line in lines] == pytest.approx([distance for _, distance in near], abs=1e-5)


def test_text_that_looks_like_markup_stays_text(tmp_path: Path) -> None:
    about = model(EVIL)
    made_up.taylor(square(2, 3), about).save(tmp_path / "scores-<img src=x>.json")
    made_up.pattern(square(2, 3), about, 9, words=[EVIL, "<!--", "]]>", "\ud800"]).save(tmp_path / "a.safetensors")
    path = report(tmp_path)
    plain = tmp_path / "plain"
    made_up.taylor(square(2, 3), model()).save(plain / "scores.json")
    made_up.pattern(square(2, 3), model(), 9).save(plain / "a.safetensors")
    page = path.read_text(encoding="utf-8")
    assert Scripts(page).tags == Scripts(report(plain).read_text(encoding="utf-8")).tags
    data, found = read(path)
    assert data["model"]["name"] == EVIL
    assert data["prompts"][0]["tokens"][""][0] == EVIL
    assert not re.search("[<>&\u2028\u2029]", found["data"])


@given(st.text() | st.dictionaries(st.text(), st.text()))
def test_data_survives_as_it_is(data: Any) -> None:
    text = _safe_json(data)
    assert json.loads(text) == data
    assert not set("<>&\u2028\u2029") & set(text)


@given(arrays(np.float64, (3, 5), elements=st.floats(-2, 2) | st.floats(0, 1e-3)), st.booleans())
def test_a_pattern_as_bytes_is_close(pattern: np.ndarray, signed: bool) -> None:
    pattern = pattern if signed else abs(pattern)
    levels, scale, negative = quantised(pattern)
    roots = (levels.astype(float) - 128) / 127 if negative else levels / 255.0
    assert negative == (pattern < 0).any()
    assert scale == pytest.approx(abs(pattern).max() or 1.0, rel=1e-5)
    assert abs(np.sign(roots) * roots**2 * scale - pattern).max() <= scale * (0.008 if negative else 0.004)


def test_weights_that_are_not_numbers_are_counted(tmp_path: Path) -> None:
    pattern = made_up.pattern(square(1, 2), model(), 5)
    pattern.values[pattern.heads[0]][2, 1] = float("nan")
    pattern.save(tmp_path / "a.safetensors")
    data, found = read(report(tmp_path))
    assert data["prompts"][0]["holes"] == 1
    assert weights(data, found, 0, "L0H0")[2, 1] == 0


def test_a_head_without_a_number_has_a_hole(tmp_path: Path) -> None:
    made_up.folder(tmp_path, square(3, 5))
    data, _ = read(report(tmp_path))
    [column] = [c for c in data["columns"] if c["label"] == "composition-Q: strongest that it feeds"]
    values = dict(zip(data["heads"], column["values"], strict=True))
    assert [name for name, value in values.items() if value is None] == [f"L2H{i}" for i in range(5)]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    made_up.taylor(square(2, 3), model()).save(tmp_path / "scores-taylor.json")
    found = gather(tmp_path)
    missing = {one["what"]: one["command"] for one in found.missing}
    assert missing["roles"] == "headlab roles MODEL --out FOLDER"
    assert "importance scores" not in missing
    assert "composition maps" not in missing  # of heads that are not composed there are none
    # what a command reads from the folder is made before it
    assert missing["sizes and speed"] == "headlab prune MODEL --out FOLDER && headlab time MODEL --out FOLDER"
    made_up.curve(square(2, 3), model()).save(tmp_path / "only" / "curve.json")
    assert {one["what"]: one["command"] for one in gather(tmp_path / "only").missing}["sizes and speed"] == (
        "headlab score MODEL --text FILE --out FOLDER && " + missing["sizes and speed"]
    )
    made_up.taylor(square(2, 3), model() | {"class": "DCFormerForCausalLM"}).save(tmp_path / "scores-taylor.json")
    assert "composition maps" in {one["what"] for one in gather(tmp_path).missing}


def test_only_commands_that_work_are_offered(tmp_path: Path) -> None:
    made_up.taylor(BOTH_SIDES, model()).save(tmp_path / "scores-taylor.json")
    missing = {one["what"] for one in gather(tmp_path).missing}
    assert {"roles", "circuits", "similar heads"} <= missing
    assert not {"composition scores", "attention patterns on prompts"} & missing


def test_one_bad_file_does_not_cost_the_page(tmp_path: Path) -> None:
    made_up.folder(tmp_path, square(2, 3))
    text = (tmp_path / "scores-taylor.json").read_text()
    bad = {
        "cut.json": text[: len(text) // 2],
        "empty.json": "",
        "list.json": "[1, 2]",
        "later.json": text.replace('"headlab": 1', '"headlab": 99'),
        "hole.json": re.sub(r"0\.\d+", "NaN", text, count=1),
        "strange.json": json.dumps({"headlab": 1, "kind": "strange", "record": {}}),
        "norecord.json": json.dumps(json.loads(text) | {"record": 3}),
        "less.json": json.dumps({"headlab": 1, "kind": "curve", "record": {}, "removed": 3}),
        "shape.json": json.dumps(json.loads(text) | {"rows": [[1.0]]}),
        "cut.safetensors": "12345678 nonsense",
    }
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "scores-keep-one.log.jsonl").write_text("{}\n")
    data, _ = read(report(tmp_path))
    reasons = {one["file"]: one["reason"] for one in data["problems"]}
    assert {*bad, "scores-keep-one.log.jsonl"} <= set(reasons)
    assert all(reasons[name] for name in bad)
    assert "damaged" in reasons["hole.json"]
    assert "unfinished" in reasons["scores-keep-one.log.jsonl"]
    assert len(data["heads"]) == 6
    assert str(tmp_path) not in json.dumps(reasons)


def test_a_figure_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headlab import plots

    made_up.taylor(square(2, 3), model()).save(tmp_path / "scores-taylor.json")
    monkeypatch.setattr(plots, "heads", lambda *_: 1 / 0)
    data, _ = read(report(tmp_path))
    assert data["figures"] == []
    [problem] = data["problems"]
    assert problem["file"] == "scores-taylor.json"
    assert "ZeroDivisionError" in problem["reason"]


def test_results_of_another_model_are_kept_apart(tmp_path: Path) -> None:
    made_up.folder(tmp_path, square(2, 3))
    other = model("other", "beef")
    made_up.taylor(square(5, 7), other).save(tmp_path / "scores-other.json")
    data, _ = read(report(tmp_path))
    assert len(data["heads"]) == 6
    [problem] = [one for one in data["problems"] if one["file"] == "scores-other.json"]
    assert "another model (other, beef)" in problem["reason"]
    assert [file["file"] for file in data["files"] if file["other"]] == ["scores-other.json"]
    assert "scores-other (another model)" in [figure["title"] for figure in data["figures"]]
    assert not any("scores-other" in column["label"] for column in data["columns"])


def test_where_a_model_lay_is_not_told(tmp_path: Path) -> None:
    made_up.folder(tmp_path, square(2, 3), name="/home/someone/secret/tiny")
    both = {"first": {"model": model("/home/someone/secret/tiny")}, "text": "/data"}
    other = made_up.taylor(square(2, 3), model("../secret/other", "beef"))
    HeadScores(other.rows, other.heads, other.record | both).save(tmp_path / "scores-other.json")
    data, found = read(report(tmp_path))
    assert "secret" not in found["data"]
    assert data["model"]["name"] == "tiny"
    [file] = [one for one in data["files"] if one["other"]]
    assert file["record"]["model"]["name"] == "other"
    assert file["record"]["first"]["model"] == model("tiny")


@pytest.mark.parametrize("name", ["L0H2000000", "L300000H0", "constructor.L0H0", "__proto__.L1H1", "L0H" + 5000 * "9"])
def test_a_strange_head_costs_its_file_only(tmp_path: Path, name: str) -> None:
    made_up.taylor(square(2, 3), model()).save(tmp_path / "scores.json")
    there = made_up.curve(square(2, 3), model())
    there.removed[5].append(name)
    there.save(tmp_path / "curve-a.json")
    data, _ = read(report(tmp_path))
    assert len(data["heads"]) == 6
    [problem] = data["problems"]
    assert problem["file"] == "curve-a.json"
    assert f"{name} is no name of a head" in problem["reason"]
    assert not any("curve-a" in column["label"] for column in data["columns"])


def test_curves_of_stacks_are_told_apart(tmp_path: Path) -> None:
    whole = made_up.curve(BOTH_SIDES, model())
    whole.save(tmp_path / "curve-taylor.json")
    for stack in ("enc", "cross"):
        names = [[name for name in gone if name.startswith(stack)] for gone in whole.removed]
        Curve(names, whole.values, whole.losses, 6, whole.record | {"stack": stack}).save(tmp_path / f"curve-{stack}.json")
    data, found = read(report(tmp_path))
    labels = {column["label"] for column in data["columns"]}
    assert labels == {
        "curve-taylor: share of heads removed when it goes",
        "curve-enc: share of the enc heads removed when it goes",
        "curve-cross: share of the cross heads removed when it goes",
    }
    told = {panel["label"]: panel["lines"] for panel in data["panels"]}
    assert all("% of the cross heads removed" in line[0][0] for line in told["curve-cross"].values())
    figures = {figure["title"]: json.loads(unpacked(found[figure["blob"]])) for figure in data["figures"]}
    assert set(figures) == {"Pruning curves (loss)", "Pruning curves by stack (loss)"}
    drawn = figures["Pruning curves by stack (loss)"]
    assert {trace["name"].split()[0] for trace in drawn["data"] if "name" in trace} == {"enc", "cross"}
    assert "of the stack" in drawn["layout"]["xaxis"]["title"]["text"]


def test_what_is_too_large_for_the_page_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up.folder(tmp_path, square(2, 3))
    monkeypatch.setattr(sections, "_MATRIX", 5)
    data, _ = read(report(tmp_path))
    reasons = {one["file"]: one["reason"] for one in data["problems"]}
    assert set(reasons) == {"composition-Q.json", "similarity.json"}
    assert "no figure of all pairs of 6 heads" in reasons["similarity.json"]
    assert "headlab.plots.composition_matrix draws it" in reasons["composition-Q.json"]
    assert not any("pairs" in figure["title"] for figure in data["figures"])


def test_figures_are_whole_plotly_figures(tmp_path: Path) -> None:
    made_up.folder(tmp_path, square(2, 3), all_kinds=False)
    data, found = read(report(tmp_path))
    titles = [figure["title"] for figure in data["figures"]]
    assert titles[:2] == ["Pruning curves (loss)", "scores-taylor against scores-ablation"]
    for figure in data["figures"]:
        drawn = json.loads(unpacked(found[figure["blob"]]))
        assert drawn["data"]
        assert drawn["layout"]["title"]["text"]
    assert unpacked(found["plotly"]).startswith(b"/**\n* plotly.js v")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda path: path / "none", "does not exist: give the folder"),
        (lambda path: Path(__file__), "is a file: give the folder"),
        (lambda path: path, "there are no results in"),
        (lambda path: (path / "config.json").write_text("{}") and path, "holds a model, not results"),
    ],
    ids=["no folder", "a file", "an empty folder", "a model"],
)
def test_no_results(tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(HeadlabError, match=said):
        report(given(tmp_path))
    assert not (tmp_path / "report.html").exists()


def test_the_page_goes_where_it_is_told(tmp_path: Path) -> None:
    made_up.taylor(square(2, 3), model()).save(tmp_path / "in" / "scores.json")
    assert report(tmp_path / "in", tmp_path / "pages" / "mine.html").exists()
    with pytest.raises(HeadlabError, match="is a folder: give the name"):
        report(tmp_path / "in", tmp_path / "pages")


def test_a_page_replaces_pages_only(tmp_path: Path) -> None:
    made_up.taylor(square(2, 3), model()).save(tmp_path / "scores.json")
    first = report(tmp_path).read_bytes()
    assert report(tmp_path).read_bytes() == first
    (mine := tmp_path / "mine.html").write_text("<p>precious</p>")
    with pytest.raises(HeadlabError, match=r"mine\.html is there and is no page of headlab's"):
        report(tmp_path, mine)
    assert mine.read_text() == "<p>precious</p>"


def test_a_page_never_replaces_a_result(tmp_path: Path) -> None:
    path = made_up.taylor(square(2, 3), model()).save(tmp_path / "scores.json")
    before = path.read_bytes()
    with pytest.raises(HeadlabError, match=r"scores\.json is no name of a page: give one that ends in \.html or \.htm"):
        report(tmp_path, path)
    assert path.read_bytes() == before
    assert report(tmp_path, tmp_path / "page.HTM").read_bytes() == report(tmp_path).read_bytes()


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    made_up.folder(tmp_path, square(2, 3))
    page = report(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "@import" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize(("tokens", "step"), [(64, 1), (256, 2)])
def test_a_12_by_12_report_is_small(tmp_path: Path, tokens: int, step: int) -> None:
    made_up.folder(tmp_path, square(12, 12), tokens=tokens, prompts=4)
    path = report(tmp_path)
    assert path.stat().st_size < 15e6
    data, _ = read(path)
    assert [prompt["step"] for prompt in data["prompts"]] == [step] * 4


def test_a_long_prompt_is_shown_by_the_largest_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = square(1, 2)
    pattern = made_up.pattern(heads, model(), 11)
    pattern.values[heads[0][1]][10, 4] = -1.5
    pattern.save(tmp_path / "a.safetensors")
    monkeypatch.setattr(build, "_CELLS", 2 * 4 * 4)  # of two heads
    data, found = read(report(tmp_path))
    assert data["prompts"][0]["step"] == 3
    for head in heads[0]:
        whole = pattern.of(head).double().numpy()
        expected = np.zeros((4, 4))
        for query, key in np.ndindex(whole.shape):
            if abs(whole[query, key]) > abs(expected[query // 3, key // 3]):
                expected[query // 3, key // 3] = whole[query, key]
        np.testing.assert_allclose(weights(data, found, 0, str(head)), expected, atol=0.012)


def test_every_kind_of_the_page_is_one_that_is_saved() -> None:
    saved = {home.name for home in entry_points(group=KINDS)}
    assert set(SECTIONS) | {"patterns"} == saved  # patterns are a table of heads and nothing else


@pytest.fixture(scope="module")
def of_a_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as commands write it: everything that is measured of a model, not made up."""
    import torch

    import headlab as hl
    from headlab.attention.prompts import attention_patterns
    from headlab.attention.roles import roles
    from headlab.attention.similarity import similarity
    from headlab.circuits.composition import composition_scores
    from headlab.circuits.summary import circuit_table
    from tests.helpers.zoo import VOCAB, ZOO

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    llama = ZOO["llama-gqa"]().eval()
    batch = {"input_ids": torch.randint(3, VOCAB, (2, 11))}
    hl.importance(llama, [batch]).save(folder / "scores-taylor.json")
    circuit_table(llama).save(folder / "circuits.json")
    composition_scores(llama, "Q").save(folder / "composition-Q.json")
    similarity(llama, [batch]).save(folder / "similarity.json")
    found = roles(llama, [batch], sequences=4, length=20)
    found.thresholds["first"] = 0.0  # a role that every head plays
    found.save(folder / "roles.json")
    attention_patterns(llama, batch["input_ids"][:1]).save(folder / "attention-0.safetensors")
    return folder


def test_what_is_measured_of_a_model_is_on_its_page(of_a_model: Path) -> None:
    data, _ = read(report(of_a_model))
    assert data["problems"] == []
    assert {file["kind"] for file in data["files"]} >= {"circuits", "composition", "similarity", "roles", "pattern"}
    assert data["groups"][:6] == [0, 0, 1, 1, 2, 2]
    labels = [column["label"] for column in data["columns"]]
    assert {"roles: role", "roles: induction", "circuits: ov rank", "circuits: content 1"} <= set(labels)
    assert not any(label.endswith(("s1", ": why", ": exact", ": roles")) for label in labels)
    panels = {(panel["title"], panel["label"]): panel["lines"] for panel in data["panels"]}
    assert any(line[0].startswith("first (from 0 on)") for line in panels["Role", "roles"]["L0H0"])
    assert panels["Circuits", "circuits"]["L2H5"][0][0].startswith("QK singular values: ")
    assert len(data["prompts"][0]["tokens"][""]) == 11
    assert "circuits: copying" in [figure["title"] for figure in data["figures"]]


def test_directions_are_read_from_end_to_end(tmp_path: Path) -> None:
    from headlab.circuits.tokens import Directions

    lines = [
        {
            "direction": 0,
            "singular_value": 2.5,
            "side": side,
            "end": end,
            "rank": n,
            "id": 7,
            "token": f" {side}{end}{n}",
            "value": 1.0,
        }
        for side in ("in", "out")
        for end in "+-"
        for n in (1, 0)
    ]
    head = square(1, 2)[0][1]
    Directions(head, "ov", lines, {"model": model()}).save(tmp_path / "directions-L0H1-ov.json")
    data, _ = read(report(tmp_path))
    assert data["problems"] == []
    assert [figure["title"] for figure in data["figures"]] == ["directions-L0H1-ov"]
    [panel] = data["panels"]
    assert panel["lines"]["L0H1"] == [
        ["+ reads \u00b7in+0 \u00b7in+1 \u2192 writes \u00b7out+0 \u00b7out+1", None, 2.5],
        ["- reads \u00b7in-0 \u00b7in-1 \u2192 writes \u00b7out-0 \u00b7out-1", None, 2.5],
    ]
