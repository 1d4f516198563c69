"""The score profile over the checkpoints of a training run."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import headlab as hl
from headlab.models.access import describe
from headlab.pruning.curves import Curve
from headlab.studies import checkpoints
from headlab.studies.checkpoints import Profile, checkpoint_folders, profile
from tests.helpers import words, zoo

TENTHS = (0.3, 0.6, 1.0)


def score(model: nn.Module, batches: list[dict[str, Any]]) -> float:
    return 10 - float(hl.own_loss(model, batches[0]).detach().mean())


def pairs(name: str = "gpt2", n: int = 3) -> list[tuple[str, nn.Module]]:
    return [(f"step-{10 * i}", zoo.build(name, seed=i)) for i in range(n)]


def made(values: list[list[float]], metric: str | None = "bleu") -> Profile:
    removed = [["L0H0"] * i for i in range(len(values[0]))]
    curves = [Curve(removed, np.array(row), np.zeros(0), len(row) - 1) for row in values]
    names = [f"step-{i}" for i in range(len(values))]
    return Profile(names, [hl.HeadScores([[1.0]])] * len(values), curves, {"metric": metric})


@pytest.mark.parametrize("name", ["gpt2", *zoo.MHA_GQA_MQA, "dcformer-gqa", "bert-classifier", "t5"])
def test_every_checkpoint_is_scored_and_pruned_by_its_own_scores(name: str) -> None:
    data, other = [zoo.batch_for(name)], [zoo.batch_for(name, seed=1)]
    found = profile(pairs(name, 2), data, scoring=other, fractions=TENTHS)
    assert found.names == ["step-0", "step-10"]
    for (_, model), scores, curve in zip(pairs(name, 2), found.scores, found.curves, strict=True):
        expected = hl.importance(model, other)
        np.testing.assert_allclose(scores.flat, expected.flat, rtol=1e-6)
        alone = hl.pruning_curve(model, expected, data, TENTHS)
        assert curve.removed == alone.removed
        np.testing.assert_allclose(curve.values, alone.values, rtol=1e-6)
    np.testing.assert_allclose(found.relative, found.values - found.values[:, :1])
    assert found.record["data"] != found.record["scored on"]


def test_exact_scores_a_metric_and_a_loss() -> None:
    data = [zoo.batch_for("gpt2")]
    double = lambda m, b: 2 * hl.own_loss(m, b)  # noqa: E731
    found = profile(pairs(n=1), data, method="ablation", metric=score, loss=double, fractions=TENTHS)
    assert isinstance(found.scores[0], hl.AblationScores)
    np.testing.assert_allclose(found.scores[0].flat, 2 * hl.ablation(zoo.build("gpt2"), data).flat, atol=1e-6)
    assert found.values[0, 0] == pytest.approx(score(zoo.build("gpt2"), data))
    np.testing.assert_allclose(found.relative, found.values / found.values[:, :1])
    layered = profile(pairs(n=1), data, normalize="layer", fractions=TENTHS)
    assert [np.linalg.norm(row) for row in layered.scores[0].rows] == pytest.approx([1.0] * 3)


def test_a_ragged_model() -> None:
    model = zoo.build("llama-gqa")
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L0H0", "L0H1", "L1H3", "L2H5"]))
    found = profile([("small", small)], [zoo.batch_for("llama-gqa")], fractions=TENTHS)
    assert [len(row) for row in found.scores[0].rows] == [4, 5, 5]
    assert found.fractions[-1] == 1


# --- what it says


def test_what_can_be_removed() -> None:
    found = made([[50, 46, 44, 45.5, 0], [50, 40, 50, 50, 50], [0, 0, 0, 0, 0], [20, 21, 20, 19, 18]])
    np.testing.assert_allclose(found.removable(0.1), [0.25, 0.0, np.nan, 1.0])
    np.testing.assert_allclose(found.removable(0.05), [0.0, 0.0, np.nan, 0.75])
    np.testing.assert_allclose(found.relative[0], [1, 0.92, 0.88, 0.91, 0])
    assert np.isnan(found.relative[2]).all()
    assert found.top(2) == [("step-3", 1.0), ("step-0", 0.25)]
    frame = found.to_frame()
    assert len(frame) == 20
    assert frame.loc[1, ["checkpoint", "step", "fraction", "removed", "value"]].tolist() == ["step-0", 0, 0.25, 1, 46.0]
    losses = made([[2.0, 2.05, 2.2, 1.0]], metric=None)
    np.testing.assert_allclose(losses.relative, [[0, 0.05, 0.2, -1]])
    np.testing.assert_allclose(losses.removable(0.1), [1 / 3])
    with pytest.raises(hl.HeadlabError, match=r"0 or more, not -0\.1"):
        losses.removable(-0.1)


def test_saved_and_read_back(tmp_path: Path) -> None:
    data = [zoo.batch_for("t5")]
    for method in ("taylor", "ablation"):
        found = profile(pairs("t5", 2), data, method=method, fractions=TENTHS)  # type: ignore[arg-type]
        again = Profile.load(found.save(tmp_path / f"{method}.json"))
        assert again.names == found.names
        np.testing.assert_array_equal(again.values, found.values)
        np.testing.assert_array_equal(again.scores[1].flat, found.scores[1].flat)
        assert again.scores[1].heads == found.scores[1].heads
        assert type(again.scores[1]) is type(found.scores[1])
        assert again.to_frame().equals(found.to_frame())
        assert repr(again) == "Profile(2 checkpoints, step-0 to step-10, 4 steps)"


# --- folders


def test_folders_are_sorted_by_their_step(tmp_path: Path) -> None:
    for name in ("step-100", "step-20", "final", "step-3", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "step-7").mkdir()  # nothing in it
    (tmp_path / "log.txt").write_text("")
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-3", "step-20", "step-100", "best", "final"]
    with pytest.raises(hl.HeadlabError, match=r"holds a model \(a config\.json\)"):
        checkpoint_folders(tmp_path / "step-7")
    with pytest.raises(hl.HeadlabError, match="is one model, not a training run: give the folder above it"):
        checkpoint_folders(tmp_path / "final")
    for name in ("nothing", "log.txt"):
        with pytest.raises(hl.HeadlabError, match="there is no folder"):
            checkpoint_folders(tmp_path / name)


def test_a_training_run_and_its_folders_one_by_one(tmp_path: Path) -> None:
    for name, model in pairs(n=3)[::-1]:
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
    data = [zoo.batch_for("gpt2")]
    whole = profile(tmp_path, data, fractions=TENTHS)
    assert whole.names == ["step-0", "step-10", "step-20"]
    np.testing.assert_allclose(whole.values, profile(pairs(), data, fractions=TENTHS).values, rtol=1e-6)
    some = profile([tmp_path / "step-10", str(tmp_path / "step-0")], iter(data), fractions=TENTHS)
    np.testing.assert_array_equal(some.values, whole.values[[1, 0]])


def test_texts_need_the_same_tokens_everywhere(tmp_path: Path) -> None:
    for name, model in pairs(n=2):
        words.save_with_tokenizer(model, tmp_path / name)  # type: ignore[arg-type]
    found = profile(tmp_path, ["w1 w2 w3", "w4 w5 w6 w7"], fractions=(0.5,))
    assert found.record["data"]["tokens"] == 7
    text = (tmp_path / "step-10" / "tokenizer.json").read_text()
    (tmp_path / "step-10" / "tokenizer.json").write_text(text.replace('"w1"', '"q1"'))
    with pytest.raises(hl.HeadlabError, match="step-10 turns the texts into other tokens"):
        profile(tmp_path, ["w1 w2 w3", "w4 w5 w6 w7"], fractions=(0.5,))


def test_one_model_is_held_at_a_time() -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def opened() -> Iterator[tuple[str, nn.Module]]:
        for i in range(3):
            gc.collect()
            assert not any(ref() is not None for ref in alive), "the model before is still there"
            model = zoo.build("gpt2", seed=i)
            alive.append(weakref.ref(model))
            yield str(i), model
            del model

    assert profile(opened(), [zoo.batch_for("gpt2")], fractions=(1.0,)).names == ["0", "1", "2"]


# --- going on after a kill


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [zoo.batch_for("gpt2")]
    whole = profile(pairs(), data, fractions=TENTHS, metric=score, log=tmp_path / "whole.jsonl")
    real, calls = checkpoints.importance, []

    def dying(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoints, "importance", dying)
    with pytest.raises(KeyboardInterrupt):
        profile(pairs(), data, fractions=TENTHS, metric=score, log=tmp_path / "part.jsonl")
    again = profile(pairs(), data, fractions=TENTHS, metric=score, log=tmp_path / "part.jsonl")
    assert len(calls) == 4  # two before the kill, one killed, one after
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    np.testing.assert_array_equal(again.values, whole.values)
    assert again.record == whole.record
    marks = {name: describe(model)["fingerprint"] for name, model in pairs()}
    assert whole.record["checkpoints"] == marks
    assert whole.record["model"]["fingerprint"] == marks["step-20"]
    assert len((tmp_path / "whole.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "whole.jsonl").read_text().splitlines()[1])["name"] == "step-0"


def test_a_log_of_something_else(tmp_path: Path) -> None:
    data, log = [zoo.batch_for("gpt2")], tmp_path / "log.jsonl"
    profile(pairs(), data, fractions=TENTHS, log=log)
    with pytest.raises(hl.HeadlabError, match="another computation"):
        profile(pairs(), data, fractions=(0.5,), log=log)
    with pytest.raises(hl.HeadlabError, match=r"step-0 .* but checkpoint number 0 is step-10"):
        profile(pairs()[::-1][1:], data, fractions=TENTHS, log=log)
    with pytest.raises(hl.HeadlabError, match="but checkpoint number 1 is step-10"):  # other weights
        profile([pairs()[0], ("step-10", zoo.build("gpt2", seed=9))], data, fractions=TENTHS, log=log)
    with pytest.raises(hl.HeadlabError, match="holds 3 checkpoints, but 2 were given"):
        profile(pairs(n=2), data, fractions=TENTHS, log=log)


# --- bad input


def test_bad_checkpoints_and_options() -> None:
    data, model = [zoo.batch_for("gpt2")], zoo.build("gpt2")
    with pytest.raises(hl.HeadlabError, match="there are no checkpoints"):
        profile([], data)
    with pytest.raises(hl.HeadlabError, match="two checkpoints are called 'a'"):
        profile([("a", model), ("a", model)], data, fractions=(1.0,))
    with pytest.raises(hl.HeadlabError, match="a checkpoint is a folder"):
        profile([model], data)  # type: ignore[list-item]
    with pytest.raises(hl.HeadlabError, match="method is"):
        profile([("a", model)], data, method="random")  # type: ignore[arg-type]
    with pytest.raises(hl.HeadlabError, match="normalize"):
        profile([("a", model)], data, method="ablation", normalize="layer")
    small = hl.prune(model, hl.HeadMask.without(hl.heads(model), ["L0H0"]))
    with pytest.raises(hl.HeadlabError, match="b has other heads than the first one"):
        profile([("a", model), ("b", small)], data, fractions=(1.0,))
