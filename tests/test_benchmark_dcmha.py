"""The DCMHA study in small: its corpus, every variant, speed, memory, and the page made of the results."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks import corpus, dcmha, dcmha_report, dcmha_train
from benchmarks.corpus import Corpus
from headlab.dcmha import backends

TINY = dcmha_train.Size(d_model=24, n_layers=1, n_heads=4, seq=19, batch=7, steps=30, lr=2e-2)
SMALL = {
    "SIZES": {"main": replace(TINY, n_layers=2), "small": TINY},
    "PROMPT": 11,
    "ANSWER": 3,
    "LENGTHS": (256, 512),
    "MEMORY_DTYPES": ("float32",),
    "MEMORY_HEADS": 4,
    "MEMORY_D_HEAD": 8,
}
Rows = list[dict[str, Any]]


def page(number: int, sentences: int = 40) -> str:
    """A page of HTML; its sentences say where something is."""
    draw = random.Random(number)
    things, places = ("lamp", "book", "stone", "chair"), ("the house", "a garden", "the boat")
    text = "</p>\n<p class='x'>".join(
        f"In {number}.{i} the {draw.choice(things)} of the\n king is in {draw.choice(places)} and that is it &amp; all."
        for i in range(sentences)
    )
    head = "<html><head><title>no</title></head><body><nav>a menu</nav><!-- not <p> this --><h1>The same head</h1>"
    return f"{head}<p>{text}</p><pre>one\n  <b>two</b>\n\n{number} &lt;</pre><script>of(the)</script></body></html>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    pages = ((f"package/page{i}.html", page(i)) for i in range(160))
    corpus.write(path, corpus.texts(pages), {"packages": ["package_1"]}, vocabulary=300)
    return path


def study(*arguments: object, **changes: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (SMALL | changes).items():
            patch.setattr(dcmha, name, value)
        patch.setattr(backends, "BLOCK", 32)
        patch.setattr(dcmha_train, "EVALUATED", 400)
        dcmha.main([str(argument) for argument in (*arguments, "--device", "cpu")])


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, once."""
    out = tmp_path_factory.mktemp("results") / "results.jsonl"
    study("all", "--data", folder, "--out", out)
    return out


def rows_of(path: Path, kind: str) -> Rows:
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [row for row in rows if row["job"]["kind"] == kind]


# --- the corpus


def test_paragraphs_of_a_page() -> None:
    found = [paragraph for paragraph in corpus.paragraphs(page(5, sentences=1)) if paragraph]
    assert found[0] == "The same head"
    assert found[1].startswith("In 5.0 the ")
    assert found[1].endswith("and that is it & all.")
    assert found[2] == "one\n  two\n5 <"
    assert len(found) == 3  # no menu, title, comment or script


def test_texts_are_english_prose_and_no_paragraph_comes_twice() -> None:
    code = "<p>" + "x = compute(first, second, third)</p><p>".join(str(i) for i in range(99)) + "</p>"
    german = "".join(
        f"<p>Der {i}. Satz steht nur hier, weil er nicht englisch ist und trotzdem lang genug.</p>" for i in range(40)
    )
    pages = [
        ("a", page(1)),
        ("short", page(2, sentences=3)),
        ("code", code),
        ("german", german),
        ("b", page(1)),
        ("c", page(3)),
    ]
    found = dict(corpus.texts(pages))
    assert list(found) == ["a", "c"]
    assert found["a"].count("The same head") == 1
    assert "The same head" not in found["c"]
    assert len(found["c"].split("\n\n")) == 41  # the sentences and the preformatted text


def test_a_page_is_on_one_side_whatever_else_there_is() -> None:
    pages = [(f"p{i}", f"text {i}") for i in range(1000)]
    train, valid = corpus.split(pages)
    assert sorted(train + valid) == sorted(text for _, text in pages)
    assert 8 <= len(valid) <= 40
    again = corpus.split(pages[::-1][:700])
    assert set(again[1]) == set(valid) & {text for _, text in pages[::-1][:700]}
    assert train != [text for _, text in pages if text in train]  # in another order
    long = [(name, text * corpus.LONGEST_HELD) for name, text in pages[:200]]
    assert corpus.split(long)[1] == []


def test_the_tokens_are_the_texts(folder: Path) -> None:
    found, tokenizer = Corpus.load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = dict(corpus.texts((f"package/page{i}.html", page(i)) for i in range(160)))
    expected = corpus.split(texts.items())
    for tokens, texts_of, name in zip((found.train, found.valid), expected, ("train", "valid"), strict=True):
        assert tokens.dtype == np.uint16
        ends = np.flatnonzero(tokens == 0)
        pages = [tokenizer.decode(part[part != 0].tolist()) for part in np.split(tokens, ends + 1)[:-1]]
        assert pages == texts_of
        said = found.record[name]
        assert said["pages"] == len(texts_of) == len(ends)
        assert said["tokens"] == len(tokens)
        assert said["bytes per token"] == sum(len(text.encode()) for text in texts_of) / len(tokens)
    assert found.record["vocabulary"] == tokenizer.get_vocab_size() == 300
    assert found.train.max() < 300


def test_no_corpus_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.corpus"):
        study("train", "--variant", "mha", "--data", tmp_path, "--out", tmp_path / "results.jsonl")


# --- models and their training


def test_every_text_of_an_epoch_comes_once_and_the_seed_names_the_order() -> None:
    size = replace(TINY, steps=10, batch=4, seq=7)  # 40 texts of 14 pieces
    starts = dcmha_train.shuffled(100, size, seed=3)
    assert starts.shape == (40,)
    for epoch in (starts[:14], starts[14:28]):
        assert sorted(epoch.tolist()) == [7 * i for i in range(14)]
    assert torch.equal(starts, dcmha_train.shuffled(100, size, seed=3))
    assert not torch.equal(starts, dcmha_train.shuffled(100, size, seed=4))
    rows = dcmha_train.windows(torch.arange(100), starts[:2], 7)
    assert rows.tolist() == [list(range(s, s + 8)) for s in starts[:2].tolist()]


def test_sdpa_is_the_same_network_as_mha() -> None:
    torch.manual_seed(0)
    plain, fused = (dcmha_train.build("mha-wide", TINY, backend, 97, 31) for backend in ("eager", "sdpa"))
    fused.load_state_dict(plain.state_dict())
    tokens = torch.randint(97, (3, 29))
    torch.testing.assert_close(plain(tokens).logits, fused(tokens).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size", ["main", "small"])
def test_the_sizes_of_the_study(size: str) -> None:
    with torch.device("meta"):
        shape = dcmha.SIZES[size]
        models = {variant: dcmha_train.build(variant, shape, "eager", 8192, shape.seq) for variant in dcmha_train.VARIANTS}
    counts = {variant: dcmha_train.parameters(model) for variant, model in models.items()}
    assert counts["mha"]["maps"] == counts["mha-wide"]["maps"] == 0
    assert counts["dynamic"]["all"] - counts["mha"]["all"] == counts["dynamic"]["maps"]
    assert abs(counts["mha-wide"]["all"] / counts["dynamic"]["all"] - 1) < 3e-3
    assert counts["rank-1"]["maps"] < counts["dynamic"]["maps"] < counts["rank-4"]["maps"]
    assert counts["low-rank"]["maps"] + counts["gates"]["maps"] == counts["dynamic"]["maps"]
    assert counts["query"]["maps"] == counts["key"]["maps"] == counts["pre"]["maps"] == counts["dynamic"]["maps"] // 2


def test_validation_is_the_mean_over_all_its_texts() -> None:
    torch.manual_seed(0)
    trainer = dcmha_train.Trainer(dcmha_train.build("dynamic", TINY, "eager", 97, TINY.seq), TINY, "float32", "cpu")
    held = torch.randint(97, (19 * 16 + 1,))
    each = [float(trainer.loss(held[None, 19 * i : 19 * (i + 1) + 1]).detach()) for i in range(16)]  # 16 is no multiple of 7
    assert dcmha_train.validate(trainer, held, TINY) == pytest.approx(np.mean(each), rel=1e-5)


def test_a_loss_that_is_no_number_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"variant": "mha", "seed": 0, "shape": asdict(TINY), "backend": "eager", "dtype": "float32"}
    step = dcmha_train.Trainer.step
    calls = iter(range(100))
    monkeypatch.setattr(dcmha_train.Trainer, "step", lambda *a: step(*a) * (float("nan") if next(calls) >= 11 else 1))
    result = dcmha_train.train(job, Corpus.load(folder), "cpu")
    assert result is not None
    assert (result["diverged"], result["loss"][-1][0], result["valid"][-1][0], result["tokens"]) == (12, 11, 9, 12 * 7 * 19)
    assert dcmha_report.told_loss(result).endswith("(diverged at step 12)")


def test_all_variants_run_and_learn(results: Path, folder: Path) -> None:
    rows, found = rows_of(results, "train"), Corpus.load(folder)
    ran = {(row["job"]["size"], row["job"]["variant"], row["job"]["seed"]) for row in rows}
    variants = dcmha_train.VARIANTS
    assert ran == {("small", v, seed) for v in variants for seed in (0, 1)} | {("main", v, 0) for v in dcmha.PAIR}
    assert len(rows) == len(ran)
    frequency = np.bincount(found.train, minlength=300) / len(found.train)
    unigram = -sum(p * np.log(p) for p in frequency if p > 0)
    for row in rows:
        result = row["result"]
        steps, valid = zip(*result["valid"], strict=True)
        assert (steps[0], steps[-1], len(steps)) == (0, 30, 11)
        assert [step for step, _ in result["loss"]] == list(range(1, 31))
        assert valid[0] == pytest.approx(np.log(300), abs=0.3)
        assert valid[-1] < unigram - 0.5  # it uses the context
        assert result["loss"][-1][1] < result["loss"][0][1] - 2
        assert result["tokens"] == 30 * 7 * 19
        assert result["diverged"] is None
        assert result["step s"]["min"] <= result["step s"]["median"] <= result["step s"]["max"] < 10
        assert (result["parameters"]["maps"] > 0) == (dcmha_train.VARIANTS[row["job"]["variant"]] is not None)
        assert {"machine", "torch", "transformers", "seconds"} <= set(row["where"])
        assert row["job"]["shape"] == asdict(SMALL["SIZES"][row["job"]["size"]])
    ends = {(row["job"]["variant"], row["job"]["seed"]): row["result"]["valid"][-1][1] for row in rows}
    assert len(set(ends.values())) == len(ends)  # no two variants are the same by mistake


def test_nothing_is_run_twice_and_a_cut_line_is_run_again(results: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    whole = results.read_text()
    out.write_text(whole)
    study("all", "--data", folder, "--out", out)
    assert out.read_text() == whole
    out.write_text(whole[:-10])
    study("all", "--only", "small", "--data", folder, "--out", out)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    first = [json.loads(line) for line in whole.splitlines()]
    assert again[:-1] == first[:-1]
    assert again[-1]["job"] == first[-1]["job"]
    for name in ("loss", "valid", "parameters"):  # the same numbers, bit for bit
        assert again[-1]["result"][name] == first[-1]["result"][name]


def test_no_run_starts_that_would_not_end_in_time(results: Path, folder: Path, tmp_path: Path) -> None:
    slow = json.loads(results.read_text().splitlines()[-1])
    assert slow["job"]["variant"] == "rank-4"
    slow["where"]["seconds"] = 100.0
    out = tmp_path / "results.jsonl"
    out.write_text(f"{results.read_text().splitlines()[0]}\n{json.dumps(slow)}\n")
    study("all", "--only", "small", "--minutes", 1, "--data", folder, "--out", out)
    assert len(rows_of(out, "train")) == 1
    study("train", "--variant", "rank-4", "--seed", 2, "--minutes", 2, "--data", folder, "--out", out)
    assert len(rows_of(out, "train")) == 2
    fresh = tmp_path / "fresh.jsonl"  # where nothing is known yet, the first laps tell
    study("train", "--variant", "mha", "--steps", 3000, "--minutes", 0.001, "--data", folder, "--out", fresh)
    assert rows_of(fresh, "train") == []


def test_runs_of_different_lengths_are_not_compared(results: Path, tmp_path: Path) -> None:
    row = rows_of(results, "train")[-1]
    other = json.loads(json.dumps(row))
    other["job"]["seed"], other["job"]["shape"]["steps"] = 5, 31
    (tmp_path / "both.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n")
    with pytest.raises(ValueError, match="different sizes"):
        dcmha_report.write_report([tmp_path / "both.jsonl"], tmp_path)


# --- speed and memory


def test_speed_is_measured_for_both_and_every_backend(results: Path) -> None:
    rows = rows_of(results, "speed")
    ran = {(row["job"]["variant"], row["job"]["backend"]) for row in rows}
    assert ran == {(v, b) for v, backends in dcmha.BACKENDS.items() for b in backends}
    for row in rows:
        for name in ("step s", "prefill s, 1", "prefill s, 8", "decode s, 1", "decode s, 8"):
            assert 0 < row["result"][name]["min"] <= row["result"][name]["median"] <= row["result"][name]["max"]


def test_chunked_needs_less_than_a_quarter_and_grows_with_the_length(results: Path) -> None:
    rows = [row for row in rows_of(results, "memory") if row["job"]["variant"] == "dynamic"]
    sizes = {(row["job"]["backend"], row["job"]["length"]): row["result"]["peak bytes"] for row in rows}
    assert set(sizes) == {(backend, length) for backend in ("eager", "chunked") for length in (256, 512)}
    assert sizes["chunked", 512] < sizes["eager", 512] / 4
    assert sizes["chunked", 512] < 2.2 * sizes["chunked", 256]
    assert sizes["eager", 512] > 3.5 * sizes["eager", 256]
    assert sizes["eager", 512] > 4 * 4 * 512**2 * 4  # some tensors [head, query, key] in float32


def test_peak_counts_what_is_there_at_a_time() -> None:
    def run() -> None:
        a = torch.zeros(1000)
        b = a + 1
        del a
        (b + 1).sum()

    assert dcmha.peak(run, "cpu") == pytest.approx(8000, abs=200)  # never three of them


# --- the page


def test_the_page_tells_what_was_measured(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise ValueError("no kaleido here")

    monkeypatch.setattr(dcmha_report.go.Figure, "to_image", refuse)
    text = dcmha_report.write_report([results], tmp_path).read_text()
    ends = {}
    for row in rows_of(results, "train"):
        ends[row["job"]["size"], row["job"]["variant"], row["job"]["seed"]] = row["result"]["valid"][-1][1]
    part = text.split("## The variants")[1].split("\n## ")[0]
    lines = {line.split("|")[1].strip(): line for line in part.splitlines() if "|" in line}
    changes = []
    for variant in dcmha_train.VARIANTS:
        first, second = (ends["small", variant, seed] for seed in (0, 1))
        cells = [cell.strip() for cell in lines[f"`{variant}`"].split("|")]
        assert cells[5:8] == [f"{first:.4f}", f"{second:.4f}", f"{(first + second) / 2:.4f}"]
        gap = (first + second - ends["small", "mha-wide", 0] - ends["small", "mha-wide", 1]) / 2
        assert cells[8] == f"{gap:+.4f}"
        changes.append(abs(first - ends["small", "mha-wide", 0] - second + ends["small", "mha-wide", 1]))
    assert f"changes by up to {max(changes):.4f}" in text
    difference = ends["main", "dynamic", 0] - ends["main", "mha-wide", 0]
    assert f"`mha-wide`: {difference:+.4f}" in text
    assert (tmp_path / "figures" / "dcmha-loss.html").stat().st_size > 1_000_000  # with plotly in it: needs no network
    assert "(figures/dcmha-variants.html)" in text
    sizes = {
        tuple(row["job"][n] for n in ("length", "variant", "backend")): row["result"]["peak bytes"]
        for row in rows_of(results, "memory")
    }
    eager, chunked, half = (
        sizes[512, "dynamic", "eager"],
        sizes[512, "dynamic", "chunked"],
        sizes[256, "dynamic", "chunked"],
    )
    said = f"| float32 | 512 | {eager / 1e6:,.1f} | {chunked / 1e6:,.1f} | {chunked / eager:.3f} | {chunked / half:.3f} |"
    assert said in text


def test_a_later_run_replaces_an_earlier_one_and_parts_may_be_missing(results: Path, tmp_path: Path) -> None:
    rows = [row for row in rows_of(results, "memory") if row["job"]["length"] == 256]
    changed = json.loads(json.dumps(rows[0]))
    changed["result"]["peak bytes"] = 123_000_000
    paths = []
    for name, part in (("a", rows), ("b", [changed])):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(json.dumps(row) for row in ({"study": "dcmha"}, *part)) + "\n")
    text = dcmha_report.write_report(paths, tmp_path / "docs").read_text()
    assert "123.0" in text
    assert "## Training" not in text
    assert "## Speed" not in text
    shutil.rmtree(tmp_path / "docs")


def test_every_variant_has_a_meaning() -> None:
    assert list(dcmha_report.MEANING) == list(dcmha_train.VARIANTS)


def test_compiled_blocks_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = backends._block
    monkeypatch.setattr(torch, "compile", lambda function: lambda *args: function(*args))
    with dcmha.compiled(True):
        assert backends._block is not before
    assert backends._block is before
    with dcmha.compiled(False):
        assert backends._block is before
