"""The commands circuits, roles, correlate, profile and report on saved models; `maps` is in test_pruning.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import headlab as hl
from headlab.attention.prompts import Pattern
from headlab.attention.roles import Roles
from headlab.circuits.composition import CompositionScores
from headlab.circuits.summary import CircuitTable, circuit_table
from headlab.studies.checkpoints import Profile
from headlab.studies.correlation import Correlation
from tests.conftest import Failing, Run
from tests.helpers import zoo
from tests.helpers.words import WORDS, save_with_tokenizer

SMALL = ["--examples", 5, "--length", 7, "--batch-size", 3]
RANDOM = ["--sequences", 3, "--tokens", 12]
PROMPT = " ".join(WORDS[:5])


def half(model: nn.Module, **options: Any) -> Any:
    return hl.prune(model, hl.importance(model, method="random", seed=3, **options).keep(0.5), **options)


MODELS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: zoo.build(name) for name in ("llama-gqa", "gpt2", "t5", "bert-mlm", "dcformer-gqa")},
    "pruned": lambda: half(zoo.build("llama-gqa")),
    "pruned-dc": lambda: half(zoo.build("dcformer-gqa"), site="output"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model, saved when it is first asked for."""
    root, found = tmp_path_factory.mktemp("models"), {}

    def folder(name: str) -> Path:
        if name not in found:
            model = MODELS[name]()
            if name.startswith("pruned"):
                hl.save_pruned(model, root / name)
                save_with_tokenizer(zoo.build("gpt2"), root / "words")
                for file in (root / "words").glob("token*"):
                    (root / name / file.name).write_bytes(file.read_bytes())
            else:
                save_with_tokenizer(model, root / name)
            found[name] = root / name
        return found[name]

    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(WORDS[(i * i) % len(WORDS)] for i in range(47)), encoding="utf-8")
    return file


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, but only their names are written: a page has 5 MB."""
    monkeypatch.setattr("plotly.graph_objects.Figure.write_html", lambda self, path, **_: Path(path).write_text("figure"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stop(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """These functions may not be called any more."""

    def called(*_: object, **__: object) -> None:
        raise AssertionError("this was computed already")

    for name in names:
        monkeypatch.setattr(f"headlab.{name}", called)


# --- circuits


def composition(*kinds: str) -> set[str]:
    return {f"composition-{kind}{end}" for kind in kinds for end in (".json", ".html", "-graph.html")}


TABLE = {"circuits.json", "circuits.csv", "circuits-qk.html", "circuits-ov.html"}
WRITTEN = {
    "llama-gqa": TABLE | {"circuits-copying.html"} | composition(*"QKV"),
    "gpt2": TABLE | {"circuits-copying.html"} | composition(*"QKV"),
    "t5": TABLE,  # copying of encoder heads means nothing, nor does composition between stacks
    "bert-mlm": TABLE | {"circuits-copying.html"} | composition(*"QKV"),
    "dcformer-gqa": TABLE | {"circuits-copying.html"} | composition(*"QKVM"),
    "pruned": TABLE | {"circuits-copying.html"} | composition(*"QKV"),
    "pruned-dc": TABLE | composition(*"QKVM"),  # some heads have scores only
}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", MODELS)
def test_circuits(
    run: Run, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, out = saved(name), tmp_path / "results"
    status, said, err = run("circuits", model, "--out", out)
    assert (status, err) == (0, "")
    assert {file.name for file in out.iterdir()} == WRITTEN[name]
    loaded = hl.load(model)
    assert said.endswith(f"{len(hl.heads(loaded))} heads; written to {out / 'circuits.json'}\n")
    table, expected = CircuitTable.load(out / "circuits.json"), circuit_table(loaded)
    pd.testing.assert_frame_equal(table.to_frame(), expected.to_frame())
    assert (out / "circuits.csv").read_text().count("\n") == 1 + len(expected.to_frame())
    if "composition-K.json" in WRITTEN[name]:
        found, own = CompositionScores.load(out / "composition-K.json"), hl.composition_scores(loaded, "K", "fold")
        assert torch.equal(found.values.nan_to_num(-1), own.values.nan_to_num(-1))
        assert found.record["norm"] == "fold"
        assert f"K-composition: {own.top(1)[0]}" in said
    before = contents(out)
    stop(
        monkeypatch,
        "circuits.summary.circuit_table",
        "circuits.composition.composition_scores",
        "circuits.composition.map_composition",
    )
    assert run("circuits", model, "--out", out)[:2] == (0, said)
    assert contents(out) == before


@pytest.mark.usefixtures("no_figures")
def test_circuits_go_on_after_what_is_there(
    run: Run, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    assert run("circuits", saved("llama-gqa"), "--out", out)[0] == 0
    before = contents(out)
    (out / "composition-V.json").unlink()
    stop(monkeypatch, "circuits.summary.circuit_table")
    assert run("circuits", saved("llama-gqa"), "--out", out)[0] == 0
    assert contents(out) == before


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("name", "head"), [("llama-gqa", "L1H5"), ("pruned", ""), ("gpt2", "L0H4")])
def test_directions_of_heads(run: Run, saved: Callable[[str], Path], tmp_path: Path, name: str, head: str) -> None:
    head = head or str(hl.heads(hl.load(saved(name)))[-1])
    for _ in range(2):
        assert run("circuits", saved(name), "--out", tmp_path / "results", "--head", head)[0] == 0
    files = {f"directions-{head}-{circuit}{end}" for circuit in ("qk", "ov") for end in (".json", ".html")}
    assert {file.name for file in (tmp_path / "results").iterdir()} == WRITTEN[name] | files


@pytest.mark.usefixtures("no_figures")
def test_circuits_never_replace_others(run: Run, failing: Failing, saved: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert run("circuits", saved("llama-gqa"), "--out", out)[0] == 0
    before = contents(out)
    assert "it differs in: norm): choose another --out" in failing(
        "circuits", saved("llama-gqa"), "--out", out, "--norm", "raw"
    )
    assert "it differs in: model): choose" in failing("circuits", saved("gpt2"), "--out", out)
    assert "it differs in: model): choose" in failing("circuits", saved("pruned"), "--out", out)
    assert contents(out) == before


@pytest.mark.usefixtures("no_figures")
def test_mistakes_with_circuits(failing: Failing, saved: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "results"
    told = failing("circuits", saved("llama-gqa"), "--out", out, "--head", "L9H9")
    assert told == "headlab: the model has no head L9H9; its heads are L0H0 to L2H5\n"
    assert "no head L0" in failing("circuits", saved("llama-gqa"), "--out", out, "--head", "L0")
    assert "no head L0H0; its heads are enc.L0H0 to" in failing("circuits", saved("t5"), "--out", out, "--head", "L0H0")
    assert "cannot open the model" in failing("circuits", tmp_path / "nothing", "--out", out)
    assert "Invalid value for '--norm'" in failing("circuits", saved("gpt2"), "--out", out, "--norm", "sideways")
    assert not out.exists()
    out.write_text("a file")
    assert "could not write" in failing("circuits", saved("llama-gqa"), "--out", out)
    assert out.read_text() == "a file"


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    "content", ["{", '{"headlab": 1, "kind": "circuits", "record": {}}', '{"headlab": 1, "kind": "mask"}', "[]"]
)
def test_damaged_circuits_stay(failing: Failing, saved: Callable[[str], Path], tmp_path: Path, content: str) -> None:
    (tmp_path / "circuits.json").write_text(content)
    assert str(tmp_path / "circuits.json") in failing("circuits", saved("gpt2"), "--out", tmp_path)
    assert {name: text.decode() for name, text in contents(tmp_path).items()} == {"circuits.json": content}


@pytest.mark.usefixtures("no_figures")
def test_results_without_a_model_in_their_record(failing: Failing, saved: Callable[[str], Path], tmp_path: Path) -> None:
    table = circuit_table(hl.load(saved("gpt2")))
    replace(table, record={}).save(tmp_path / "circuits.json")
    assert "differs in: model, norm" in failing("circuits", saved("gpt2"), "--out", tmp_path)


# --- roles

ROLES = {"roles.json", "roles.csv", "roles.html"}
OF_TEXT = {f"patterns.{end}" for end in ("json", "csv")} | {f"similarity{end}" for end in (".json", ".html", "-matrix.html")}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert-mlm", "dcformer-gqa", "pruned", "pruned-dc"])
def test_roles(
    run: Run, saved: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, out = saved(name), tmp_path / "results"
    command = ["roles", model, "--text", text, "--out", out, *SMALL, *RANDOM, "-p", PROMPT, "-p", WORDS[9] + " " + WORDS[9]]
    status, said, err = run(*command)
    assert (status, err) == (0, "")
    assert f"written to {out / 'roles.json'}" in said
    drawn = {f"attention-{number}{end}" for number in (1, 2) for end in (".safetensors", ".html")}
    assert {file.name for file in out.iterdir()} == ROLES | OF_TEXT | drawn
    loaded = hl.load(model)
    batches = hl.read_batches(loaded, text, examples=5, length=7, batch_size=3)
    expected = hl.roles(loaded, batches, sequences=3, length=12)
    assert Roles.load(out / "roles.json").to_frame().equals(expected.to_frame())
    assert Pattern.load(out / "attention-2.safetensors").tokens == {"": (WORDS[9], WORDS[9])}
    before = contents(out)
    stop(monkeypatch, "attention.roles.roles", "attention.roles.patterns", "attention.similarity.similarity")
    assert run(*command)[:2] == (0, said)
    assert contents(out) == before


@pytest.mark.usefixtures("no_figures")
def test_roles_of_an_encoder_decoder(run: Run, failing: Failing, saved: Callable[[str], Path], tmp_path: Path) -> None:
    assert run("roles", saved("t5"), "--out", tmp_path / "results", *RANDOM)[0] == 0
    assert {file.name for file in (tmp_path / "results").iterdir()} == ROLES
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(f'{{"text": "w{i} w3 w4", "target": "w5 w{i}"}}' for i in range(5)))
    assert run("roles", saved("t5"), "--text", lines, "--out", tmp_path / "more", *SMALL, *RANDOM)[0] == 0
    assert {file.name for file in (tmp_path / "more").iterdir()} == ROLES | OF_TEXT
    assert "an encoder-decoder needs both sides" in failing("roles", saved("t5"), "-p", PROMPT, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("tokens", [61, 62, 256, 13])
def test_roles_on_a_short_context_go_on_too(
    run: Run, failing: Failing, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """The model takes 61 tokens, and what is repeated has an even number."""
    out, command = tmp_path / "results", ["roles", saved("gpt2"), "--sequences", 3]
    assert run(*command, "--out", out, "--tokens", tokens)[0] == 0
    before = contents(out)
    stop(monkeypatch, "attention.roles.roles")
    assert run(*command, "--out", out, "--tokens", tokens)[0] == 0
    assert "differs in: asked" in failing(*command, "--out", out, "--tokens", 12)
    assert "differs in: asked" in failing(*command, "--out", out, "--tokens", tokens, "--seed", 1)
    assert contents(out) == before


@pytest.mark.usefixtures("no_figures")
def test_roles_never_replace_others(
    run: Run, failing: Failing, saved: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model, out, bare = saved("llama-gqa"), tmp_path / "results", tmp_path / "bare"
    with_text = ["--text", text, *SMALL]
    assert run("roles", model, *with_text, "--out", out, *RANDOM, "-p", PROMPT)[0] == 0
    assert run("roles", model, "--out", bare, *RANDOM)[0] == 0
    before = contents(out), contents(bare)
    assert "differs in: data" in failing("roles", model, "--out", out, *RANDOM)
    assert "differs in: data" in failing("roles", model, *with_text, "--out", bare, *RANDOM)
    assert "differs in: data" in failing("roles", model, *with_text, "--examples", 4, "--out", out, *RANDOM)
    assert "differs in: asked" in failing("roles", model, *with_text, "--out", out)
    assert "differs in: model" in failing("roles", saved("pruned"), *with_text, "--out", out, *RANDOM)
    told = failing("roles", model, *with_text, "--out", out, *RANDOM, "-p", WORDS[7])
    assert "attention-1.safetensors holds another result" in told
    assert (contents(out), contents(bare)) == before


@pytest.mark.usefixtures("no_figures")
def test_mistakes_with_roles(run: Run, failing: Failing, saved: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    command = ["roles", saved("llama-gqa"), "--out", out]
    assert "length of at least 6, not 5" in failing(*command, "--tokens", 5)
    assert "Invalid value for '--sequences'" in failing(*command, "--sequences", 0)
    assert "cannot read the text file" in failing(*command, "--text", tmp_path / "nothing.txt")
    assert "fewer than one example of 999" in failing(*command, "--text", text, "--length", 999)
    assert "the model's context is 61" in failing(*command, "-p", " ".join(WORDS[:62]))
    assert failing(*command, "-p", "")
    assert not out.exists()
    assert run(*command, *RANDOM, "-p", WORDS[3])[0] == 0  # one token looks at itself
    assert Pattern.load(out / "attention-1.safetensors").of("L0H0").tolist() == [[1.0]]
    for name in ("roles.json", "attention-1.safetensors"):
        (out / name).write_text("{}")
        assert name in failing(*command, *RANDOM, "-p", WORDS[3])
        assert (out / name).read_text() == "{}"
        (out / name).unlink()


@pytest.mark.usefixtures("no_figures")
def test_roles_without_a_tokenizer(run: Run, failing: Failing, tmp_path: Path) -> None:
    zoo.build("llama-mqa").save_pretrained(tmp_path / "model")
    command = ["roles", tmp_path / "model", "--out", tmp_path / "results", *RANDOM]
    assert "give the prompt as token numbers" in failing(*command, "-p", "five")
    assert "the token 999, but the model has 101" in failing(*command, "-p", "5 999")
    assert "the token -1, but the model has 101" in failing(*command, "--prompt=-1 5")
    assert run(*command, "-p", "5, 7")[0] == 0
    assert Pattern.load(tmp_path / "results" / "attention-1.safetensors").tokens == {"": ("5", "7")}


# --- maps: more of them in test_pruning.py


@pytest.mark.usefixtures("no_figures")
def test_maps_of_a_pruned_model_and_of_one_token(run: Run, saved: Callable[[str], Path], tmp_path: Path) -> None:
    for name, prompt in (("pruned-dc", PROMPT), ("dcformer-gqa", WORDS[5])):
        assert run("maps", saved(name), "--prompt", prompt, "--out", tmp_path / name, "--layer", 1)[0] == 0
        assert hl.CompositionMaps.load(tmp_path / name / "maps.safetensors").layers


# --- correlate


@pytest.fixture
def scores(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str, int], Path]:
    def made(name: str, seed: int) -> Path:
        found = hl.importance(hl.load(saved(name)), [zoo.batch_for(name, seed)])
        return found.save(tmp_path / f"scores-{name}-{seed}.json")

    return made


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", ["llama-gqa", "t5"])
def test_correlate(run: Run, failing: Failing, scores: Callable[[str, int], Path], tmp_path: Path, name: str) -> None:
    out, (one, other) = tmp_path / "results", (scores(name, seed) for seed in (0, 1))
    command = ["correlate", one, other, "--out", out, "--names", "news, tales"]
    status, said, err = run(*command)
    assert (status, err) == (0, "")
    assert {file.name for file in out.iterdir()} == {f"correlation.{end}" for end in ("json", "csv", "html")}
    found = Correlation.load(out / "correlation.json")
    assert found.names == ("news", "tales")
    assert found.r == hl.correlate(hl.HeadScores.load(one), hl.HeadScores.load(other)).r
    before = contents(out)
    assert run(*command)[:2] == (0, said)
    assert "holds another result" in failing("correlate", other, one, "--out", out, "--names", "news,tales")
    assert "calls the data news and tales" in failing("correlate", one, other, "--out", out)
    assert contents(out) == before


@pytest.mark.usefixtures("no_figures")
def test_mistakes_with_correlate(failing: Failing, scores: Callable[[str, int], Path], tmp_path: Path) -> None:
    out, one, other = tmp_path / "results", scores("llama-gqa", 0), scores("gpt2", 0)
    for names in ("news", "news,", "a,b,c", ","):
        assert "names are two, with a comma between them" in failing("correlate", one, one, "--out", out, "--names", names)
    assert "of different heads: one has [6, 6, 6] in its layers, the other [5, 5, 5]" in failing(
        "correlate", one, other, "--out", out
    )
    found = hl.HeadScores.load(one)
    alike = hl.HeadScores(found.rows, found.heads, found.record | {"model": {"fingerprint": "f00"}}).save(
        tmp_path / "alike.json"
    )
    assert "of different models" in failing("correlate", one, alike, "--out", out)
    assert "both data sets are called" in failing("correlate", one, one, "--out", out, "--names", "a, a")
    assert "there is no file" in failing("correlate", one, tmp_path / "nothing.json", "--out", out)
    torn = tmp_path / "torn.json"
    torn.write_bytes(one.read_bytes()[:300])
    assert "neither JSON nor" in failing("correlate", one, torn, "--out", out)
    damaged = tmp_path / "damaged.json"
    damaged.write_text(one.read_text().replace('"heads"', '"hats"'))
    assert "damaged" in failing("correlate", damaged, one, "--out", out)
    mask = hl.HeadScores.load(one).keep(0.5).save(tmp_path / "mask.json")
    assert "holds a mask, but a scores was expected" in failing("correlate", one, mask, "--out", out)
    assert not out.exists()


@pytest.mark.usefixtures("no_figures")
def test_what_a_correlation_cannot_tell_is_said(run: Run, scores: Callable[[str, int], Path], tmp_path: Path) -> None:
    one = scores("llama-gqa", 0)
    assert "both scores are of the same data" in run("correlate", one, one, "--out", tmp_path / "same")[1]
    assert "same data" not in run("correlate", one, scores("llama-gqa", 1), "--out", tmp_path / "other")[1]
    flat = hl.HeadScores.load(one)
    flat = hl.HeadScores([0 * row for row in flat.rows], flat.heads, flat.record)
    said = run("correlate", one, flat.save(tmp_path / "flat.json"), "--out", tmp_path / "flat")[1]
    assert "not defined over all heads: there are fewer than three, or all have the same score" in said


# --- profile


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    for step in (10, 9, 200):
        save_with_tokenizer(zoo.build("llama-gqa", seed=step), root / f"checkpoint-{step}")
    return root


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("exact", [[], ["--exact"]])
def test_profile(
    run: Run, checkpoints: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: list[str]
) -> None:
    out = tmp_path / "results"
    command = ["profile", checkpoints, "--text", text, "--out", out, *SMALL, *exact]
    status, said, err = run(*command)
    assert (status, err) == (0, "")
    assert said.endswith(f"3 checkpoints; written to {out / 'profile.json'}\n")
    files = {f"profile.{end}" for end in ("json", "csv", "html", "log.jsonl")}
    assert {file.name for file in out.iterdir()} == files
    found = Profile.load(out / "profile.json")
    assert found.names == ["checkpoint-9", "checkpoint-10", "checkpoint-200"]
    last = hl.load(checkpoints / "checkpoint-200")
    batches = hl.read_batches(last, text, examples=5, length=7, batch_size=3)
    own = hl.ablation(last, batches) if exact else hl.importance(last, batches)
    assert found.scores[2].flat == pytest.approx(own.flat, abs=1e-7)
    before = contents(out)
    log = before["profile.log.jsonl"]
    (out / "profile.json").unlink()
    (out / "profile.log.jsonl").write_bytes(log[: log.rfind(b"\n", 0, -1) + 40])  # killed in the middle of the last one
    assert run(*command)[:2] == (0, said)
    assert contents(out) == before
    stop(monkeypatch, "studies.checkpoints.importance", "studies.checkpoints.ablation", "studies.checkpoints.pruning_curve")
    assert run(*command)[:2] == (0, said)
    assert contents(out) == before


@pytest.mark.usefixtures("no_figures")
def test_mistakes_with_profile(
    run: Run, failing: Failing, checkpoints: Path, saved: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    command = ["--text", text, "--out", out, *SMALL]
    assert "checkpoints of a training run" in failing("profile", tmp_path, *command)
    assert "there is no folder" in failing("profile", tmp_path / "nothing", *command)
    assert "cannot read the text file" in failing("profile", checkpoints, "--text", tmp_path / "nothing", "--out", out)
    assert not out.exists()
    assert run("profile", checkpoints, *command)[0] == 0
    (other := tmp_path / "other.txt").write_text(" ".join(WORDS[::-1] * 3), encoding="utf-8")
    apart = tmp_path / "apart"
    assert run("profile", checkpoints, "--scoring", other, "--text", text, "--out", apart, *SMALL)[0] == 0
    records = [Profile.load(folder / "profile.json").record for folder in (out, apart)]
    assert records[0]["data"] == records[0]["scored on"] == records[1]["data"] != records[1]["scored on"]
    before = contents(out)
    assert "differs in: scores" in failing("profile", checkpoints, *command, "--exact")
    assert "differs in: data" in failing("profile", checkpoints, *command, "--length", 6)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "step-1").symlink_to(checkpoints / "checkpoint-9")
    (mixed / "step-2").symlink_to(saved("gpt2"))
    assert "choose another file" in failing("profile", mixed, *command)
    assert contents(out) == before
    assert "other heads than the first one" in failing("profile", mixed, "--text", text, *SMALL, "--out", tmp_path / "other")


# --- report


def test_report(run: Run, failing: Failing, saved: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    common = ["--text", text, "--out", out, *SMALL]
    for command in (["circuits", saved("pruned"), "--out", out], ["roles", saved("pruned"), *common, *RANDOM, "-p", PROMPT]):
        assert run(*command)[0] == 0
    before = contents(out)
    for _ in range(2):
        status, said, _ = run("report", out)
        assert status == 0
        lines = ["not in the folder yet: what the removal of each head costs", f"written to {out / 'report.html'}"]
        assert [line[: len(start)] for line, start in zip(said.splitlines(), lines, strict=True)] == lines
    assert contents(out).keys() == before.keys() | {"report.html"}
    page = (out / "report.html").read_text()
    assert "headlab ablate MODEL" in page  # what is missing, and how it is made
    (out / "circuits.json").write_text("{")
    status, said, _ = run("report", out, "--to", tmp_path / "page.html")
    assert (status, said.splitlines()[-1]) == (0, f"written to {tmp_path / 'page.html'}")
    assert said.startswith("could not be shown whole: circuits.json (the page says more)\nnot in the folder yet: ")
    assert "circuits.json" in (tmp_path / "page.html").read_text()
    assert (out / "report.html").read_text() == page
    assert (out / "circuits.json").read_text() == "{"
    assert "is a folder" in failing("report", out, "--to", tmp_path)


def test_mistakes_with_report(failing: Failing, tmp_path: Path) -> None:
    assert "does not exist" in failing("report", tmp_path / "nothing")
    assert "there are no results" in failing("report", tmp_path)
    (tmp_path / "file").write_text("text")
    assert "is a file" in failing("report", tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
