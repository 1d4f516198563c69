"""Two models that the project trains itself, for the studies in `benchmarks/sixteen.py`: a translator and a classifier.

    python -m benchmarks.sequence translator --out MODELS/translator [--steps 2000] [--device cuda]
    python -m benchmarks.sequence classifier --out MODELS/classifier

Both live on a small made-up language (`benchmarks/language.py`). The translator (T5, 6 layers of 8 heads in each of three
stacks) turns it into another one. The classifier (BERT, 6 layers of 8 heads) says whether a second sentence follows from a
first one, contradicts it, or neither; like BERT it first learns to guess masked words, of many sentences without answers,
and then from few answers: without that it never gets beyond counting negations. No example of the training set is in the
other sets.

Checkpoints are saved at fixed shares of the training, like the epochs of Michel, Levy & Neubig 2019, figure 5.
"""

from __future__ import annotations

import argparse
import math
import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from headlab.data.batches import IGNORED, Batch
from headlab.results import building
from synthetic_tasks.probes.training import faster_products

from .dcmha_train import warm_cosine
from .language import BETWEEN, DOMAINS, END, LABELS, MASK, START, Language

BASE = "bert-base"  # a shape that is timed beside the models trained here
SHARES = (1 / 20, 2 / 20, 3 / 20, 5 / 20, 10 / 20, 15 / 20, 1.0)  # of training, at which a checkpoint is saved
LONGEST = 48  # tokens of a sentence, in either language, with its end


@dataclass(frozen=True)
class Size:
    """Of a model and its training."""

    d_model: int = 256
    d_ff: int = 1024
    layers: int = 6
    heads: int = 8
    batch: int = 512
    lr: float = 1e-3
    pool: int = 50_000  # training examples, shown over and over
    masked: int = 0  # steps of guessing masked words before training, of the classifier
    texts: int = 200_000  # sentences for that


# Of 10,000 sentences the translator learns nearly all of the language (BLEU 99.97, measured once), and then not one of its
# 144 heads made a significant difference to 512 sentences; of 3,000 it becomes as good as published ones.
SIZES = {"translator": Size(pool=3_000), "classifier": Size(lr=3e-4, pool=50_000, masked=1500)}


# --- examples as tensors


def examples(task: str, part: str, n: int, seed: int = 0, domain: str | None = None) -> Batch:
    """n different examples of a task, the same for the same seed, from one domain or both in turn.

    Args:
        part: `train`, `choose` or `test`, which have no example in common.
    """
    language, rng = Language(), random.Random(seed)
    seen: set[tuple[int, ...]] = set()
    found: list[tuple[list[int], Any]] = []
    while len(found) < n:
        of = domain or DOMAINS[len(found) % len(DOMAINS)]
        sentence = language.draw(rng, of)
        words, length = language.say(sentence), 0
        answer: list[int] | int
        if task == "translator":
            answer = [language.number[word] for word in [*language.translate(sentence), END]]
            length = len(answer)
        else:
            claim, answer = language.claim(rng, sentence, of)
            words = [START, *words, BETWEEN, *claim]
        ids = [language.number[word] for word in [*words, END]]
        key = tuple(ids)
        if max(len(ids), length) <= LONGEST and key not in seen and _part(" ".join(words)) == part:
            seen.add(key)
            found.append((ids, answer))
    batch = {"input_ids": _padded([ids for ids, _ in found], 0)}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    answers = [answer for _, answer in found]
    return batch | {"labels": _padded(answers, IGNORED) if task == "translator" else torch.tensor(answers)}


def _part(text: str) -> str:
    """Where an example belongs: eight tenths are for training."""
    return ("test", "choose")[tenth] if (tenth := zlib.crc32(text.encode()) % 10) < 2 else "train"


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def cut(batch: Batch, size: int) -> list[Batch]:
    """Batches of so many examples, each without the columns that are padding in all of them."""
    return [
        trimmed({name: value[i : i + size] for name, value in batch.items()}) for i in range(0, len(batch["labels"]), size)
    ]


def trimmed(batch: Batch) -> Batch:
    width = int(batch["attention_mask"].sum(-1).max())
    inputs = {name: batch[name][:, :width].contiguous() for name in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    if labels.ndim == 2:  # contiguous, for T5's loss takes a view in some versions of transformers
        labels = labels[:, : int((labels != IGNORED).sum(-1).max())].contiguous()
    return inputs | {"labels": labels}


# --- what is measured


def wrong(model: nn.Module, batch: Batch) -> Tensor:
    """Per cent of the answer's tokens (told all those before) that a translator gets wrong; of answers, a classifier."""
    right = model(**batch).logits.argmax(-1) == batch["labels"]
    if batch["labels"].ndim == 1:
        return 100 * (~right).float()
    real = batch["labels"] != IGNORED
    return 100 * (~right & real).sum(-1) / real.sum(-1)


def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """Per cent of tokens or answers, mean over examples."""
    return 100 - float(torch.cat([wrong(model, batch) for batch in batches]).mean())


def bleu(model: nn.Module, batches: list[Batch]) -> float:
    """Corpus BLEU (4-grams, no smoothing, Papineni et al. 2002) of greedy translations, 0 to 100."""
    said, meant = [], []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False, num_beams=1)  # type: ignore[operator]
        said += [_sentence(row) for row in output[:, 1:].tolist()]
        meant += [_sentence(row) for row in batch["labels"].clamp(min=0).tolist()]
    return corpus_bleu(said, meant)


def _sentence(ids: list[int]) -> list[int]:
    """Up to the end, without padding."""
    return [token for token in ids[: ids.index(1) if 1 in ids else None] if token]


def corpus_bleu(said: Sequence[list[int]], meant: Sequence[list[int]], longest: int = 4) -> float:
    logs = 0.0
    for n in range(1, longest + 1):
        hits = total = 0
        for one, other in zip(said, meant, strict=True):
            grams = [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (one, other)]
            hits += (grams[0] & grams[1]).total()
            total += grams[0].total()
        if hits == 0:
            return 0.0
        logs += math.log(hits / total) / longest
    lengths = [sum(map(len, part)) for part in (said, meant)]
    return 100 * math.exp(logs + min(0.0, 1 - lengths[1] / lengths[0]))


# --- training


def build(task: str, size: Size) -> PreTrainedModel:
    words = len(Language().words)
    if task == "translator":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=words, d_model=size.d_model, d_kv=size.d_model // size.heads, d_ff=size.d_ff, dropout_rate=0.1,
                num_layers=size.layers, num_decoder_layers=size.layers, num_heads=size.heads, pad_token_id=0,
                eos_token_id=1, decoder_start_token_id=0, relative_attention_num_buckets=32,
                relative_attention_max_distance=LONGEST,
            )
        )  # fmt: skip
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=words, hidden_size=size.d_model, num_hidden_layers=size.layers, num_attention_heads=size.heads,
            intermediate_size=size.d_ff, max_position_embeddings=2 * LONGEST, pad_token_id=0, num_labels=len(LABELS),
            hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, type_vocab_size=1,
        )
    )  # fmt: skip


def train(task: str, out: Path, steps: int, size: Size | None = None, device: str = "cpu", seed: int = 0) -> PreTrainedModel:
    """Train a model and save it at every one of the `SHARES` of the way, as `out/step-00100` and so on.

    The folder is there when all of it is.
    """
    torch.manual_seed(seed)
    size = size or SIZES[task]
    model = build(task, size).to(device).train()
    if task == "classifier" and size.masked:
        guesses = BertForMaskedLM(model.config).to(device).train()
        texts = examples(task, "train", size.texts, seed)
        fit(guesses, texts, size.masked, size, masked_loss, "guessing masked words", seed)
        model.bert.load_state_dict(model.bert.state_dict() | guesses.bert.state_dict())  # it has all but the pooler
    saved = {max(1, round(share * steps)) for share in SHARES}

    pool = examples(task, "train", size.pool, seed)
    with building(out) as folder:

        def save(step: int) -> None:
            if step in saved:
                model.save_pretrained(folder / f"step-{step:05d}")

        fit(model, pool, steps, size, lambda model, batch: model(**batch).loss, f"training the {task}", seed, save)
    return model.eval()


def masked_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Of guessing a seventh of the words (Devlin et al. 2019, without their unmasked guesses)."""
    words = Language().number
    ids = batch["input_ids"]
    chosen = (torch.rand(ids.shape, device=ids.device) < 1 / 7) & (ids > words[MASK])
    labels = ids.masked_fill(~chosen, IGNORED)
    return model(ids.masked_fill(chosen, words[MASK]), attention_mask=batch["attention_mask"], labels=labels).loss  # type: ignore[no-any-return]


def fit(
    model: PreTrainedModel,
    pool: Batch,
    steps: int,
    size: Size,
    loss_of: Callable[[nn.Module, Batch], Tensor],
    desc: str,
    seed: int = 0,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with `warm_cosine`; bfloat16 autocast on a GPU."""
    device = model.device
    on_gpu = device.type == "cuda"
    pool = {name: value.to(device) for name, value in pool.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, weight_decay=0.01, fused=on_gpu)
    schedule = warm_cosine(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    bar = tqdm(range(1, steps + 1), desc=desc, unit="step", disable=None)
    for step in bar:
        rows = torch.randint(len(pool["labels"]), (size.batch,), generator=draw).to(device)
        batch = {name: value[rows] for name, value in pool.items()}
        with faster_products(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = loss_of(model, batch)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 50) == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
        after(step)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    for name, default in vars(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help="instead of the task's own")


def given_size(task: str, options: argparse.Namespace) -> Size:
    """The task's own size, but for what the options say."""
    told = {name: getattr(options, name) for name in vars(Size()) if getattr(options, name) is not None}
    return replace(SIZES[task], **told)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["translator", "classifier"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    add_sizes(parser)
    options = parser.parse_args(arguments)
    size = given_size(options.task, options)
    model = train(options.task, options.out, options.steps, size, options.device, options.seed)
    held = cut({name: value.to(model.device) for name, value in examples(options.task, "test", 512).items()}, 128)
    with torch.inference_mode():
        print(f"{accuracy(model, held):.2f} % right on 512 new examples")
        if options.task == "translator":
            print(f"BLEU {bleu(model, held):.2f}")


if __name__ == "__main__":
    main()
