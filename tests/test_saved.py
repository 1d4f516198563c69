"""What earlier versions saved: results, logs and pruned models that version 0.1.0 wrote, before its modules had packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import headlab as hl

SAVED = Path(__file__).parent / "saved"
TABLES = sorted(path.stem for path in SAVED.glob("*.csv"))
RESULTS = sorted(
    path.name for path in SAVED.iterdir() if path.suffix in (".json", ".safetensors") and path.stem != "expected"
)
MODELS = sorted(path.name for path in SAVED.glob("pruned-*"))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_they_were(name: str) -> None:
    [path] = (path for path in SAVED.glob(f"{name}.*") if path.suffix in (".json", ".safetensors"))
    before, now = pd.read_csv(SAVED / f"{name}.csv", dtype=str, keep_default_na=False), hl.Result.load(path).to_frame()
    assert list(now.columns) == list(before.columns)
    for column in before:
        if now[column].dtype.kind in "if":
            numbers = before[column].replace("", "nan").astype(float)
            np.testing.assert_allclose(now[column].astype(float), numbers, rtol=1e-9, equal_nan=True)
        else:
            assert ["" if value is None else str(value) for value in now[column]] == before[column].tolist()


@pytest.mark.slow  # a process of its own for every file
@pytest.mark.parametrize("name", RESULTS)
def test_every_kind_opens_by_itself(name: str) -> None:
    code = f"import headlab as hl; print(hl.Result.load({str(SAVED / name)!r}).kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f'"kind":"{done.stdout.strip()}"'.encode() in (SAVED / name).read_bytes().replace(b'": "', b'":"')


@pytest.mark.parametrize("name", MODELS)
def test_pruned_models_compute_what_they_did(name: str) -> None:
    expected = load_file(SAVED / "expected.safetensors")
    batch = {"input_ids": expected["ids"][:2, :7]}
    if name == "pruned-t5":
        batch["decoder_input_ids"] = expected["ids"][:2, :3]
    with torch.no_grad():
        found = hl.load(SAVED / name)(**batch)[0]
    torch.testing.assert_close(found, expected[name.removeprefix("pruned-")], rtol=0, atol=1e-5)


def test_transformers_opens_them() -> None:
    code = (
        "import headlab.surgery; from transformers import AutoModel; "
        f"print(*(type(AutoModel.from_pretrained(folder)).__name__ for folder in {[str(SAVED / name) for name in MODELS]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    made = dict(zip(MODELS, done.stdout.split(), strict=True))
    assert made["pruned-composed"] == "PrunedComposedLlamaModel"
    assert made["pruned-dcformer"] == "PrunedDCFormerModel"
    assert all(name.startswith("Pruned") for name in made.values())


@pytest.mark.parametrize("name", ["scores-ablation", "curve"])
def test_logs_go_on(tmp_path: Path, name: str) -> None:
    """A log that is complete leaves nothing to do: the result is the saved one, and the file stays as it was."""
    log = tmp_path / f"{name}.log.jsonl"
    shutil.copy(SAVED / log.name, log)
    model = hl.load(SAVED / "llama")
    model.config._name_or_path = ""  # it was in memory when the log was written
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in _ids().split(3)]
    before = log.read_bytes()
    scores = hl.HeadScores.load(SAVED / "scores-taylor.json")
    made = hl.ablation(model, batches, log=log) if name != "curve" else hl.pruning_curve(
        model, scores, batches, [0, 0.25, 0.5], fill=hl.Fill.load(SAVED / "fill.safetensors"), log=log
    )  # fmt: skip
    assert log.read_bytes() == before
    pd.testing.assert_frame_equal(made.to_frame(), hl.Result.load(SAVED / f"{name}.json").to_frame())


def _ids() -> torch.Tensor:
    return load_file(SAVED / "expected.safetensors")["ids"]
