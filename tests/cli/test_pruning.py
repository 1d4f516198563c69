from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

import headlab as hl
from headlab.studies.stacks import stack_curves
from tests.conftest import Failing, Run
from tests.helpers import zoo
from tests.helpers.words import WORDS, save_with_tokenizer

SMALL = ["--examples", "5", "--length", "7", "--batch-size", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(zoo.build("llama-gqa"), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(WORDS[(i * i) % len(WORDS)] for i in range(47)), encoding="utf-8")
    return file


def test_the_whole_path(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    common = ["--text", text, "--out", out, *SMALL]
    assert run("score", model, *common)[0] == 0
    assert run("ablate", model, *common)[0] == 0
    for order in ("taylor", "ablation", "random"):
        assert run("curve", model, *common, "--order", order, "--steps", 3)[0] == 0
    assert run("curve", model, *common, "--reestimate", "--unit", "group", "--steps", 3)[0] == 0
    status, said, _ = run("prune", model, "--out", out, "--keep", 0.5, "--order", "ablation")
    assert status == 0
    assert "9 of 18 heads removed" in said
    assert run("time", model, "--out", out, "--sizes", "1x3,2x5", "--repeats", 2)[0] == 0

    loaded = hl.load(model)
    batches = hl.read_batches(loaded, text, examples=5, length=7, batch_size=3)
    scores = hl.importance(loaded, batches)
    for mine, written in zip(scores.values, hl.HeadScores.load(out / "scores-taylor.json").values, strict=True):
        assert mine.tolist() == written.tolist()
    exact = hl.ablation(loaded, batches)
    curve = hl.pruning_curve(loaded, exact, batches, (1 / 3, 2 / 3, 1.0))
    assert curve.values.tolist() == hl.Curve.load(out / "curve-ablation.json").values.tolist()
    small = hl.load(out / "pruned")
    mask = hl.HeadMask.load(out / "pruned-mask.json")
    assert [str(h) for h in hl.heads(small)] == [str(h) for h in exact.keep(0.5).kept] == [str(h) for h in mask.kept]
    with torch.inference_mode(), hl.masked(loaded, mask):
        expected = loaded(**batches[0]).logits
    assert torch.allclose(small(**batches[0]).logits, expected, atol=1e-5)
    assert hf.AutoTokenizer.from_pretrained(out / "pruned")("w3")["input_ids"] == [8]
    pages = {file.stem for file in out.glob("*.html")}
    assert pages == {"scores-taylor", "scores-ablation", "taylor-against-ablation", "curves", "timing"}
    assert (out / "curve-reestimated-group.csv").read_text().count("\n") == 5


def test_means_are_measured_once_and_fold_into_the_pruned_model(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert run("score", model, "-t", text, "-o", out, *SMALL, "--fill", "mean")[0] == 0
    measured = (out / "fill-mean.safetensors").read_bytes()
    assert run("curve", model, "-t", text, "-o", out, *SMALL, "--fill", "mean", "--steps", 2)[0] == 0
    assert (out / "fill-mean.safetensors").read_bytes() == measured
    assert run("prune", model, "-o", out, "--keep", 0.4, "--fill", "mean", "--gqa", "ungroup")[0] == 0
    loaded, small = hl.load(model), hl.load(out / "pruned")
    mask, fill = hl.HeadMask.load(out / "pruned-mask.json"), hl.Fill.load(out / "fill-mean.safetensors")
    ids = torch.arange(3, 10)[None]
    with torch.inference_mode(), hl.masked(loaded, mask, fill):
        expected = loaded(ids).logits
    assert torch.allclose(small(ids).logits, expected, atol=1e-5)


def test_the_same_command_again_changes_nothing(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    for _ in range(2):
        assert run("ablate", model, "-t", text, "-o", out, *SMALL)[0] == 0
        assert run("curve", model, "-t", text, "-o", out, *SMALL, "--order", "random", "--steps", 2)[0] == 0
    before = {file.name: file.read_bytes() for file in out.glob("*.json*")}
    assert run("ablate", model, "-t", text, "-o", out, *SMALL)[0] == 0
    assert {file.name: file.read_bytes() for file in out.glob("*.json*")} == before


def test_a_killed_run_goes_on_to_the_same_file(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    command = ["curve", model, "-t", text, *SMALL, "--order", "random", "--steps", 4]
    assert run(*command, "-o", tmp_path / "whole")[0] == 0
    log = (tmp_path / "whole" / "curve-random.log.jsonl").read_bytes()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "curve-random.log.jsonl").write_bytes(log[: len(log) * 2 // 3])
    assert run(*command, "-o", tmp_path / "killed")[0] == 0
    for name in ("curve-random.log.jsonl", "curve-random.json", "curve-random.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_curves_of_an_encoder_decoder_by_stack(run: Run, failing: Failing, model: Path, tmp_path: Path) -> None:
    translator, out = save_with_tokenizer(zoo.build("t5"), tmp_path / "t5"), tmp_path / "results"
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(f'{{"text": "w{i} w3 w4", "target": "w5 w{i}"}}' for i in range(5)))
    command = ["curve", translator, "-t", lines, "-o", out, *SMALL, "--order", "random", "--steps", 2, "--by-stack"]
    status, said, _ = run(*command)
    assert status == 0
    names = [f"curve-random-{stack}" for stack in ("enc", "dec", "cross")]
    assert {f"{name}{end}" for name in names for end in (".json", ".csv", ".log.jsonl")} | {"curves.html"} == {
        file.name for file in out.iterdir()
    }
    loaded = hl.load(translator)
    batches = hl.read_batches(loaded, lines, examples=5, length=7, batch_size=3)
    expected = stack_curves(loaded, hl.importance(loaded, method="random"), batches, (0.5, 1.0))
    for name, curve in zip(names, expected.values(), strict=True):
        assert hl.Curve.load(out / f"{name}.json").values.tolist() == curve.values.tolist()
        assert f"{name}.json" in said
    before = {file.name: file.read_bytes() for file in out.glob("*.json*")}
    assert run(*command)[0] == 0
    assert {file.name: file.read_bytes() for file in out.glob("*.json*")} == before
    assert "--by-stack is for the output" in failing(*command, "--site", "scores")
    assert "has one stack of heads" in failing("curve", model, *command[2:], *["-t", __file__])


def test_other_results_are_never_replaced(run: Run, failing: Failing, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert run("score", model, "-t", text, "-o", out, *SMALL)[0] == 0
    assert run("ablate", model, "-t", text, "-o", out, *SMALL)[0] == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    other = ["-t", text, "-o", out, "--examples", 3, "--length", 7]
    assert "holds another result" in failing("score", model, *other)
    assert "begun for another computation (it differs in: data)" in failing("ablate", model, *other)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (out / "pruned").mkdir()
    (out / "pruned" / "mine.txt").write_text("precious")
    assert "already holds something" in failing("prune", model, "-o", out)
    assert (out / "pruned" / "mine.txt").read_text() == "precious"


def test_every_mistake_is_one_line(failing: Failing, model: Path, text: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "results"]
    assert "cannot open the model" in failing("score", tmp_path / "nothing", "-t", text, *out)
    assert "cannot read the text file" in failing("score", model, "-t", tmp_path / "nothing.txt", *out)
    assert "this method needs a text" in failing("score", model, *out)
    assert "run headlab score with the same --out first" in failing("prune", model, *out)
    assert "run headlab ablate" in failing("curve", model, "-t", text, *out, *SMALL, "--order", "ablation")
    long = tmp_path / "long.txt"
    long.write_text(text.read_text() + " " + text.read_text(), encoding="utf-8")
    assert "the model's context is 61" in failing("score", model, "-t", long, *out, "--length", 67)
    assert "fewer than one example of 999" in failing("score", model, "-t", text, *out, "--length", 999)
    assert "fractions are between 0 and 1" in failing(
        "curve", model, "-t", text, *out, *SMALL, "--order", "random", "--until", 1.5
    )
    assert "the share to keep is between 0 and 1" in failing("prune", model, *out, "--order", "random", "--keep", 1.5)
    assert "sizes are examples x tokens" in failing("time", model, *out, "--sizes", "1x2x3")
    assert "Invalid value for '--dtype'" in failing("score", model, "-t", text, *out, "--dtype", "int")
    assert "Missing argument" in failing("score")
    assert "No such command" in failing("frobnicate")
    assert "Invalid value" in failing("score", model, "-t", text, *out, "--reduction", "median")
    if not torch.cuda.is_available():
        assert "there is no device 'cuda'" in failing("score", model, "-t", text, *out, "--device", "cuda")
    assert "there is no device 'gpu'" in failing("score", model, "-t", text, *out, "--device", "gpu")


def test_scores_of_another_model_are_refused(run: Run, failing: Failing, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    other = save_with_tokenizer(zoo.build("llama-gqa", seed=1), tmp_path / "other")
    assert run("score", model, "-t", text, "-o", out, *SMALL)[0] == 0
    assert "made for another model" in failing("prune", other, "-o", out)
    assert "made for another model" in failing("curve", other, "-t", text, "-o", out, *SMALL)


def test_a_full_disk_is_one_line(
    failing: Failing, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in failing("ablate", model, "-t", text, "-o", tmp_path / "results", *SMALL)


def test_ctrl_c_says_how_to_go_on(
    run: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("headlab.attribution.ablation.ablation", stop)
    status, _, err = run("ablate", model, "-t", text, "-o", tmp_path / "results", *SMALL)
    assert status == 130
    assert err == "headlab: stopped; run the same command again to go on\n"


def test_demo_in_its_quick_form(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headlab.cli.demo.STEPS", {True: 2})
    out = tmp_path / "demo"
    status, said, _ = run("demo", "--quick", "--seed", 1, "--out", out)
    assert status == 0
    assert "A model that really is smaller" in said
    assert f"begin with {out / 'summary.md'} and {out / 'probes.html'}" in said
    assert json.loads((out / "mask.json").read_text())["kind"] == "mask"
    assert {row["seed"] for row in json.loads((out / "probes.json").read_text())["rows"]} == {1}


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys; sys.argv = ['headlab', '--help']\n"
        "from headlab.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'plotly', 'pandas', 'scipy', 'numpy'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Commands" in said
    assert "heavy: []" in said


def test_what_nobody_expected_is_one_line_too(
    run: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the sky\nfell")

    monkeypatch.setattr("headlab.attribution.ablation.ablation", fail)
    status, _, said = run("ablate", model, "-t", text, "-o", tmp_path / "results", *SMALL)
    assert status == 1
    assert said == "headlab: unexpected RuntimeError: the sky fell (HEADLAB_DEBUG=1 shows where)\n"


def test_a_timing_is_not_replaced(run: Run, failing: Failing, model: Path, tmp_path: Path) -> None:
    assert run("prune", model, "-o", tmp_path, "--order", "random")[0] == 0
    assert run("time", model, "-o", tmp_path, "--sizes", "1x3", "--repeats", 1)[0] == 0
    assert "is there already" in failing("time", model, "-o", tmp_path, "--sizes", "1x3")


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(zoo.build("dcformer-gqa"), tmp_path_factory.mktemp("model") / "dcformer")


@pytest.mark.parametrize("site", ["scores", "head", "post_key"])
def test_composed_heads_at_a_site(run: Run, composed: Path, text: Path, tmp_path: Path, site: str) -> None:
    out = tmp_path / "results"
    common = ["--text", text, "--out", out, "--site", site, *SMALL]
    for command in (["score", composed], ["ablate", composed], ["curve", composed, "--steps", 2]):
        assert run(*command, *common)[0] == 0
    status, said, _ = run("prune", composed, "--out", out, "--keep", 0.5, "--site", site)
    assert status == 0
    assert "9 of 18 heads removed" in said
    difference = float(said.split("masked model ")[1].split(";")[0])
    assert difference < 1e-5
    names = {file.name for file in out.iterdir()}
    kinds = ("scores-taylor", "scores-ablation", "curve-taylor")
    assert {f"{kind}-{site}.json" for kind in kinds} | {f"pruned-{site}", f"pruned-{site}-mask.json"} <= names
    assert hl.HeadScores.load(out / f"scores-taylor-{site}.json").record["site"] == site
    assert hl.Curve.load(out / f"curve-taylor-{site}.json").record["site"] == site
    timed = run("time", composed, "--out", out, "--pruned", out / f"pruned-{site}", "--sizes", "1x7", "--repeats", 1)
    assert timed[0] == 0
    assert "masked" in timed[1]


def test_plain_attention_has_one_site(failing: Failing, model: Path, composed: Path, text: Path, tmp_path: Path) -> None:
    common = ["--text", text, "--out", tmp_path, *SMALL, "--site"]
    assert "has one site, 'output', not 'scores'" in failing("score", model, *common, "scores")
    assert "composed heads have the sites output, head, scores" in failing("ablate", composed, *common, "nonsense")
    assert "there is no" in failing("prune", composed, "--out", tmp_path, "--site", "scores")


def test_maps(run: Run, failing: Failing, composed: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    prompt = " ".join(WORDS[:5])
    status, said, _ = run("maps", composed, "--prompt", prompt, "--out", out, "--layer", 2)
    assert status == 0
    assert "strongest links" in said
    assert {file.name for file in out.iterdir()} == {
        "maps.csv", "maps-mean.csv", "maps.html", "maps-layer2.html", "maps.safetensors",
    }  # fmt: skip
    maps = hl.CompositionMaps.load(out / "maps.safetensors")
    lines = (out / "maps-mean.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 * 6 * 6
    assert float(lines[1 + 36 + 6 * 2 + 5].split(",")[-1]) == pytest.approx(float(maps.mean(0, "post")[2, 5]))
    assert run("maps", composed, "--prompt", prompt, "--out", out)[0] == 0
    assert "holds another result" in failing("maps", composed, "--prompt", WORDS[7], "--out", out)
    assert "no composable heads" in failing("maps", model, "--prompt", prompt, "--out", tmp_path / "other")
    assert "no composition maps of layer 7" in failing("maps", composed, "-p", prompt, "-l", 7, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_maps_without_a_tokenizer(run: Run, failing: Failing, tmp_path: Path) -> None:
    zoo.build("dcpythia").save_pretrained(tmp_path / "model")
    numbers = run("maps", tmp_path / "model", "--prompt", "5 7, 11", "--out", tmp_path / "maps")
    assert numbers[0] == 0
    assert "3 tokens" in numbers[1]
    assert "give the prompt as token numbers" in failing("maps", tmp_path / "model", "--prompt", "five", "--out", tmp_path)
