"""`headlab tasks`, run in this process, on a small model with a tokenizer that knows every byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import headlab as hl
from synthetic_tasks import Evaluation, InContextTasks, evaluate, published_tasks
from synthetic_tasks.evaluation.attention import attention_on
from synthetic_tasks.probes import benchmark
from synthetic_tasks.probes.studies import SIZES, STUDIES, Size
from synthetic_tasks.probes.training import Outcome, Recipe, train
from synthetic_tasks.probes.training import Run as Training
from tests.conftest import Run

WORDS = ["--relation", "use", "--relation", "time", "--reported", "person", "--negation", "is", "--order", "plain"]
SMALL = [*WORDS, "--contexts", 2, "--shots", 1, "--scored", 2]
FILE = [
    ("task0", "Ruth has a car. Ann has a pea. Ann has the [ pea ]\nRuth has a pea. Bob has a car. Bob has the [ car ]"),
    ("task1", "The car is Ruth's. The pea is Ann's. Ann has the [ pea ]"),
    ("task0", "Ruth has a car. Ann has a pea. Ruth has the [ car ]"),
    ("task16", "Ruth is in Rome. Ann is in Oslo. Ann is in [ Oslo ]"),
]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: run("tasks", *words)


@pytest.fixture
def failing(run: Run) -> Callable[..., str]:
    """Run a command that must fail, with one line on stderr and no traceback."""

    def call(*words: object) -> str:
        status, _, err = run(*words)
        assert status != 0
        lines = [line for line in err.splitlines() if "%|" not in line and line.strip()]
        assert len(lines) == 1
        assert lines[0].startswith("headlab: ")
        assert "Traceback" not in err
        return lines[0]

    return call


def sample() -> list:
    return InContextTasks(["use", "time"], None, "person", "is", "plain", shots=1, scored=2).sample(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=397, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False)
    words.train_from_iterator([context.text for context in sample()], trainer)
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=397, hidden_size=20, intermediate_size=31, num_hidden_layers=2, num_attention_heads=5,
            num_key_value_heads=5, head_dim=4, max_position_embeddings=1024,
        )
    )  # fmt: skip
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("model") / "llama"
    made.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", pad_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    file = tmp_path / "published.jsonl"
    lines = [json.dumps({"task_id": task, "texts": texts}) + "\n" for task, texts in FILE]
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def mask(model: Path, tmp_path: Path) -> Path:
    return hl.HeadMask.without(hl.heads(hl.load(model)), ["L0H1", "L1H4", "L1H0"]).save(tmp_path / "three.json")


def drawn(page: Path) -> str:
    """What an HTML file says after the library it carries."""
    text = page.read_text(encoding="utf-8")
    return text[text.rindex("Plotly.newPlot(") :]


def test_sentences(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    status, said, _ = run("evaluate", model, *SMALL, "--out", out)
    assert status == 0
    expected = evaluate(hl.load(model), sample())
    saved = Evaluation.load(out / "tasks-sentences.json")
    assert saved.lines == expected.lines
    assert {row["factors"]["relation"] for row in saved.lines} == {"use", "time"}
    assert len(saved.lines) == 2 * 2 * len({row["task"] for row in saved.lines})
    assert (out / "tasks-sentences.csv").read_text().count("\n") == len(saved.lines) + 1
    for factor in ("relation", "looked_up", "difficulty"):
        for line in saved.by(factor).to_dict("records"):
            shown = next(text for text in said.splitlines() if text.split()[:2] == [factor, f"{line[factor]}"])
            assert shown.split()[2:4] == [str(line["n"]), str(line["contexts"])]
            for measure in ("all", "first", "choice"):
                share, low, high = (100 * line[measure + end] for end in ("", "_low", "_high"))
                assert f" {share:.1f} ({low:.1f} to {high:.1f})" in shown
    assert f"{100 * saved.accuracy('choice'):.1f}" in said.splitlines()[1]
    assert repr(saved) in said
    assert {file.name for file in out.iterdir()} == {
        "tasks-sentences.json", "tasks-sentences.csv", "tasks-sentences.html", "tasks-sentences-by-task.html",
        "tasks-sentences.log.jsonl",
    }  # fmt: skip
    for word in ("looked up", "difficulty", "among the choices", "first token"):
        assert word in drawn(out / "tasks-sentences.html")
    assert sample()[-1].task.split("/")[1].replace(">", "\\u003e") in drawn(out / "tasks-sentences-by-task.html")


def test_the_published_file(run: Run, failing: Callable[..., str], model: Path, published: Path, tmp_path: Path) -> None:
    assert run("evaluate", model, "--published", published, "-o", tmp_path / "all")[0] == 0
    saved = Evaluation.load(tmp_path / "all" / "tasks-published.json")
    assert saved.lines == evaluate(hl.load(model), published_tasks(published)).lines
    assert run("evaluate", model, "--published", published.as_uri(), "-o", tmp_path / "address")[0] == 0
    assert Evaluation.load(tmp_path / "address" / "tasks-published.json").lines == saved.lines

    some = ["--published", published, "--relation", "possession", "--contexts", 1, "-o", tmp_path / "some"]
    assert run("evaluate", model, *some)[0] == 0
    rows = Evaluation.load(tmp_path / "some" / "tasks-published.json").lines
    assert [row["task"] for row in rows] == ["task0", "task0", "task1"]
    swapped = ["--published", published, "--order", "swapped", "-o", tmp_path / "swapped"]
    assert run("evaluate", model, *swapped)[0] == 0
    assert [r["task"] for r in Evaluation.load(tmp_path / "swapped" / "tasks-published.json").lines] == ["task1"]

    said = failing("evaluate", model, "--published", published, "--relation", "river")
    assert "no task has the relation 'river'; possible here: possession, city" in said
    said = failing("evaluate", model, "--published", published, "--shots", 2, "--seed", 0, "--sentences")
    assert "--sentences, --shots, --seed and --published do not go together" in said
    assert "do not say where the matched is" in failing(
        "evaluate", model, "--published", published, "--attention", "matched", "-o", tmp_path / "no"
    )
    assert not (tmp_path / "no").exists()


def test_under_a_mask_beside_the_whole_model(run: Run, model: Path, mask: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert run("evaluate", model, *SMALL, "--out", out)[0] == 0
    whole = (out / "tasks-sentences.json").read_bytes()
    assert run("evaluate", model, *SMALL, "--out", out, "--mask", mask)[0] == 0
    assert (out / "tasks-sentences.json").read_bytes() == whole
    loaded = hl.load(model)
    expected = evaluate(loaded, sample(), mask=hl.HeadMask.load(mask))
    saved = Evaluation.load(out / "tasks-sentences-three.json")
    assert saved.lines == expected.lines
    assert saved.lines != Evaluation.load(out / "tasks-sentences.json").lines
    assert "whole model, whole answer" in drawn(out / "tasks-sentences.html")
    assert "three, among the choices" in drawn(out / "tasks-sentences.html")


@pytest.mark.parametrize("part", ["record", "matched"])
def test_attention(run: Run, model: Path, mask: Path, tmp_path: Path, part: str) -> None:
    status, said, _ = run("evaluate", model, *SMALL, "-o", tmp_path, "--attention", part)
    assert status == 0
    loaded = hl.load(model)
    whole = attention_on(loaded, sample(), part=part)
    saved = hl.HeadScores.load(tmp_path / f"attention-{part}-sentences.json")
    np.testing.assert_array_equal(saved.flat, whole.flat)
    best, share = whole.top(1)[0]
    assert f"most attention on the {part}: {best} {100 * share:.1f} %" in said
    assert f"Attention on the {part}" in drawn(tmp_path / f"attention-{part}-sentences.html")

    assert run("evaluate", model, *SMALL, "-o", tmp_path, "--attention", part, "--mask", mask)[0] == 0
    with hl.masked(loaded, hl.HeadMask.load(mask)):
        masked = attention_on(loaded, sample(), part=part)
    saved = hl.HeadScores.load(tmp_path / f"attention-{part}-sentences-three.json")
    np.testing.assert_array_equal(saved.flat, masked.flat)
    assert not np.allclose(masked.flat, whole.flat)
    assert saved.record["mask"] == [row.tolist() for row in hl.HeadMask.load(mask).rows]


def test_a_killed_run_goes_on(run: Run, model: Path, tmp_path: Path) -> None:
    command = ["evaluate", model, *SMALL, "--batch-size", 3, "--attention", "record", "--out"]
    assert run(*command, tmp_path / "whole")[0] == 0
    assert run(*command, tmp_path / "killed")[0] == 0
    log = tmp_path / "killed" / "tasks-sentences.log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2]) + lines[2][:9])  # cut in the middle of a line
    (tmp_path / "killed" / "tasks-sentences.json").unlink()
    assert run(*command, tmp_path / "killed")[0] == 0
    for file in (tmp_path / "whole").glob("*.[jc]s*"):
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()
    before = {file.name: file.read_bytes() for file in (tmp_path / "whole").glob("*.[jc]s*")}
    assert run(*command, tmp_path / "whole")[0] == 0  # the same command again changes nothing
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "whole").glob("*.[jc]s*")}
    assert len(before) == 4


def test_other_results_are_never_replaced(
    run: Run, failing: Callable[..., str], model: Path, mask: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    assert run("evaluate", model, *SMALL, "--out", out, "--mask", mask)[0] == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for other in (["--seed", 1], ["--shots", 2], ["--batch-size", 3]):
        said = failing("evaluate", model, *SMALL, *other, "--out", out, "--mask", mask)
        assert "was begun for another computation" in said
    hl.HeadMask.without(hl.heads(hl.load(model)), ["L0H0"]).save(mask)  # another mask of the same name
    assert "it differs in: mask" in failing("evaluate", model, *SMALL, "--out", out, "--mask", mask)
    (out / "tasks-sentences-three.log.jsonl").unlink()
    said = failing("evaluate", model, *SMALL, "--out", out, "--mask", mask)
    assert "holds another result" in said
    del before["tasks-sentences-three.log.jsonl"]
    assert before == {file.name: file.read_bytes() for file in out.iterdir() if file.name in before}


def test_written_sentences(run: Run, failing: Callable[..., str], tmp_path: Path) -> None:
    to = tmp_path / "deep" / "sentences.jsonl"
    status, said, _ = run("write", "--to", to, *SMALL, "--seed", 7, "--records", 4)
    assert status == 0
    made = InContextTasks(["use", "time"], None, "person", "is", "plain", shots=1, scored=2, records=4, seed=7).sample(2)
    lines = [json.loads(line) for line in to.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(made)
    for line, context in zip(lines, made, strict=True):
        assert (line["task"], line["text"], line["difficulty"]) == (context.task, context.text, context.difficulty)
        assert line["factors"] == dict(context.factors)
        for row, answer in zip(line["answers"], context.answers, strict=True):
            assert line["text"][slice(*row["span"])] == row["text"] == answer.text
            assert row["choices"] == list(answer.choices)
            for part in ("query", "record", "matched", "reported"):
                assert row[part] == list(getattr(answer, part))
    assert f"{len(made)} contexts of {len({c.task for c in made})} tasks, with {2 * len(made)} scored answers" in said
    before = to.read_bytes()
    assert f"{to} is there already" in failing("write", "--to", to, *SMALL)
    assert to.read_bytes() == before
    assert [file.name for file in to.parent.iterdir()] == [to.name]


def test_without_a_number_there_are_four_contexts_of_every_task(run: Run, tmp_path: Path) -> None:
    few = ["--relation", "use", "--looked-up", "person", "--order", "swapped", "--to", tmp_path / "a.jsonl"]
    assert run("write", *few)[0] == 0
    made = InContextTasks("use", "person", order="swapped")
    tasks = [json.loads(line)["task"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert tasks == [name for name in made.names for _ in range(4)]


def test_your_own_words(run: Run, failing: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "words.toml"
    file.write_text("people = 3\n")
    assert "people" in failing("write", "--to", tmp_path / "a.jsonl", "--lexicon", file)
    assert not (tmp_path / "a.jsonl").exists()


def test_every_mistake_is_one_line(failing: Callable[..., str], run: Run, model: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "no"]
    assert "no task has the relation 'river'" in failing("evaluate", model, "--relation", "river", *out)
    assert "no file" in failing("evaluate", model, *SMALL, *out, "--mask", tmp_path / "nothing.json")
    assert "cannot read the task file" in failing("evaluate", model, "--published", tmp_path / "nothing.jsonl", *out)
    assert "contexts" in failing("evaluate", model, "--contexts", 0, *out)
    assert "attention" in failing("evaluate", model, "--attention", "query", *out)
    assert "1024 at most" in failing("evaluate", model, *WORDS, "--contexts", 1, "--shots", 60, *out)
    assert "no device 'nonsense'" in failing("evaluate", model, *SMALL, *out, "--device", "nonsense")
    other = hl.HeadMask([[1, 0]]).save(tmp_path / "other.json")
    assert "1 x 2 heads, but the model has 2 x 5" in failing("evaluate", model, *SMALL, *out, "--mask", other)
    assert "--to" in failing("write", *SMALL)
    status, said, _ = run()
    assert status == 0
    assert "evaluate" in said
    assert not (tmp_path / "no").exists()


# --- probes

TINY = Size(
    features=4, values=5, records=4, d_model=11, heads=3, d_head=2,
    recipes={level: Recipe(steps=2, batch=8) for level in ("binding", "conflict")},
)  # fmt: skip
TWO = ["--study", "d_head", "--study", "control", "--size", "small", "--seeds", 1]


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    """Probes of two steps; returns those that were trained. Where `None` is appended, the next one is never done."""
    runs: list[Any] = []

    def watched(todo: Sequence[Training], *args: Any, **options: Any) -> Iterator[Outcome]:
        for outcome in train(todo, *args, **options | {"checks": 2, "n_test": 50}):
            if None in runs:
                raise KeyboardInterrupt
            yield outcome
            runs.append(outcome.run)

    monkeypatch.setattr(benchmark, "train", watched)
    monkeypatch.setitem(SIZES, "small", TINY)  # type: ignore[misc]
    return runs


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def results_of(folder: Path, name: str) -> benchmark.ProbeResults:
    return benchmark.ProbeResults.load(folder / f"probes-{name}.json")


def test_probes_of_two_studies(run: Run, probed: list[Training], tmp_path: Path) -> None:
    status, said, _ = run("probe", *TWO, "--study", "control", "--out", tmp_path)
    assert status == 0
    names = {f"probes-{name}.{end}" for name in ("d_head", "control") for end in ("json", "csv", "html")}
    assert set(files(tmp_path)) == names | {"probes-small.log.jsonl"}
    total = 0
    for name, title in (("d_head", "d head"), ("control", "accuracy (%), a dot per seed")):
        saved = results_of(tmp_path, name)
        points = STUDIES[name](TINY, [0])
        assert [row["run"] for row in saved.lines] == [benchmark.identity(at.run) for at in points]
        assert saved.record["studies"] == [name]
        assert (tmp_path / f"probes-{name}.csv").read_text().count("\n") == len(points) + 1
        assert title in drawn(tmp_path / f"probes-{name}.html")
        table = said[said.index(f"{name}\n") :].splitlines()[1 : 2 + len(points)]
        for column in ("level", "kind", "heads", "parameters", "seen_mean", "test_min", "mapped_test"):
            assert column in table[0].split()
        assert ("d_head" in table[0].split()) == (name == "d_head")  # only what differs
        for line, (_, row) in zip(table[1:], saved.summary().iterrows(), strict=True):
            assert line.split()[:3] == [row["level"], row["kind"], str(row["heads"])]
            assert str(row["parameters"]) in line.split()
            assert f"{row['seen_mean']:.3g}" in line.split()
        total += len(points)
    assert len(probed) == total
    assert f"{total} probes; written to" in said


def test_probes_go_on_and_stay(run: Run, probed: list[Any], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run("probe", *TWO, "--out", whole)[0] == 0
    count = len(probed)
    probed.clear()
    probed.append(None)
    assert run("probe", *TWO, "--out", killed)[0] != 0
    assert list(files(killed)) == ["probes-small.log.jsonl"]
    probed.clear()
    assert run("probe", *TWO[:2], *TWO[4:], "--out", killed)[0] == 0  # one study first
    assert run("probe", *TWO, "--out", killed)[0] == 0  # then both
    assert len(probed) == count
    for name in ("d_head", "control"):
        assert results_of(killed, name).lines == results_of(whole, name).lines
        assert (killed / f"probes-{name}.csv").read_bytes() == (whole / f"probes-{name}.csv").read_bytes()
    before = files(killed)
    del before["probes-d_head.html"], before["probes-control.html"]  # figures have an identifier of their own
    assert run("probe", *TWO, "--out", killed)[0] == 0
    assert len(probed) == count
    assert before.items() <= files(killed).items()


def test_other_probes_are_never_replaced(
    run: Run, failing: Callable[..., str], probed: list[Training], tmp_path: Path
) -> None:
    few = ["--study", "control", "--seeds", 1, "--out", tmp_path]
    assert run("probe", *few)[0] == 0  # on the cpu the small size
    before, trained = files(tmp_path), len(probed)
    assert "probes-small.log.jsonl" in before
    more = ["--study", "control", "--seeds", 2, "--out", tmp_path]
    assert "of size small and 1 seeds, not small and 2" in failing("probe", *more)
    assert len(probed) == trained > 0  # refused before any training
    assert files(tmp_path) == before


def test_probes_bad_input(failing: Callable[..., str], probed: list[Training], tmp_path: Path) -> None:
    out = ["--out", tmp_path / "no"]
    assert "no study is called 'river'; the studies are main, kinds" in failing("probe", "--study", "river", *out)
    assert "the size is 'full' or 'small', not 'huge'" in failing("probe", "--size", "huge", *out)
    assert "--seeds" in failing("probe", "--seeds", 0, *out)
    assert "there is no device 'mars' here" in failing("probe", "--device", "mars", *out)
    assert not (tmp_path / "no").exists()
    assert not probed


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys; from headlab.cli.main import app; app(['tasks', 'evaluate', '--help'], standalone_mode=False); "
        "heavy = {'torch', 'transformers', 'plotly', 'pandas', 'scipy', 'numpy'}; assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
