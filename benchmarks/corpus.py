"""A corpus to train small language models on: the English prose of Debian's documentation packages, as tokens.

    python -m benchmarks.corpus [--out FOLDER]      (default: in the cache folder, $HEADLAB_CACHE or ~/.cache/headlab)

Fetches the packages by `apt-get download` (Debian 12; nothing is installed), takes the text out of their HTML pages, drops
paragraphs that were there before (menus, headers, copied chapters) and pages that are not English prose, keeps one page in
fifty for validation, trains a byte-level BPE tokenizer on the others, and writes `train.npy` and `valid.npy` (uint16 tokens,
pages in random order, each followed by the token 0), `tokenizer.json` and `corpus.json`, which says what is in them. The
study that reads this folder (`benchmarks/dcmha.py`) needs nothing else, so it can run on a machine without a network.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from . import real

PACKAGES = (
    "apache2-doc", "autoconf-doc", "cmake-doc", "debian-policy", "debian-reference-en", "developers-reference", "erlang-doc",
    "exim4-doc-html", "git-doc", "haproxy-doc", "libreoffice-help-en-us", "libvirt-doc", "linux-doc-6.1", "llvm-14-doc",
    "mame-doc", "maxima-doc", "nodejs-doc", "octave-doc", "postgresql-doc-15", "python-django-doc", "python-sqlalchemy-doc",
    "python3.11-doc", "r-doc-html", "shorewall-doc", "sqlite3-doc", "vim-doc", "wireshark-doc", "zsh-doc",
)  # fmt: skip
VOCABULARY = 8192
END = "<|end|>"  # of a page; token 0
VALIDATION = 50  # one page in so many
LONGEST_HELD = 100_000  # characters; a longer page is for training, or it would be half of the validation text
SHORTEST = 1_000  # characters of a page that is worth keeping
COMMON = frozenset(["the", "of", "and", "to", "in", "is", "a", "for", "that", "be", "this", "with", "are", "as", "it"])
PROSE = 0.18  # at least this share of an English page's words is among the common ones; lists and code have fewer

_GONE = re.compile(r"<!--.*?-->|<(script|style|nav|head|svg|footer|form|math)\b.*?</\1\s*>", re.S | re.I)
_PRE = re.compile(r"<pre\b[^>]*>(.*?)</pre\s*>", re.S | re.I)
_BREAK = re.compile(
    r"</?(?:p|div|li|ul|ol|dl|dt|dd|h[1-6]|tr|table|section|article|main|body|blockquote|figure|hr|br)\b[^>]*>", re.I
)
_TAG = re.compile(r"<[^>]*>")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Corpus:
    """Tokens for training and validation, and the record of where they come from."""

    train: np.ndarray
    valid: np.ndarray
    record: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Corpus:
        """Read a folder that this module has written.

        Raises:
            FileNotFoundError: there is no corpus in it.
        """
        folder = Path(folder)
        if not (folder / "corpus.json").is_file():
            raise FileNotFoundError(f"no corpus in {folder}: make one by python -m benchmarks.corpus --out {folder}")
        record = json.loads((folder / "corpus.json").read_text("utf-8"))
        return cls(np.load(folder / "train.npy"), np.load(folder / "valid.npy"), record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    folder = build(parser.parse_args().out)
    print(json.dumps(Corpus.load(folder).record, indent=1))
    print(f"in {folder}")


def build(folder: str | Path | None = None) -> Path:
    """The folder with the corpus, made unless it is there. About 110 MB are fetched; five minutes on two cores."""

    def make(fresh: Path, scratch: Path) -> None:
        scratch.mkdir()
        files = [fetch(package, scratch) for package in PACKAGES]
        pages = ((f"{file.name.split('_')[0]}/{name}", page) for file in files for name, page in html_pages(file))
        write(fresh, texts(pages), {"packages": [file.name.removesuffix(".deb") for file in files]})

    return real._once(Path(folder) if folder else real.cache_root() / "debian-docs", "corpus.json", make)


def fetch(package: str, folder: Path) -> Path:
    """The package's file, downloaded into a folder and not installed."""
    (folder / package).mkdir()
    result = subprocess.run(
        ["apt-get", "download", package], cwd=folder / package, capture_output=True, text=True, check=False
    )
    found = list((folder / package).glob("*.deb"))
    if result.returncode != 0 or not found:
        said = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        reason = said[-1].removeprefix("E: ") if said else f"exit status {result.returncode}"
        raise RuntimeError(f"apt-get could not download {package} ({reason}): run apt-get update; the names are Debian 12's")
    return found[0]


def html_pages(package: Path) -> Iterator[tuple[str, str]]:
    """Name and source of every HTML page in a package's file."""
    unpacker = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith((".html", ".htm")):
                file = archive.extractfile(member)
                assert file is not None  # it is an ordinary file
                yield member.name, file.read().decode("utf-8", "replace")
    if unpacker.wait() != 0:
        raise RuntimeError(f"dpkg-deb could not unpack {package}")


def paragraphs(page: str) -> Iterator[str]:
    """The paragraphs of an HTML page, white space collapsed; preformatted text keeps its lines."""
    for i, part in enumerate(_PRE.split(_GONE.sub(" ", page))):
        if i % 2:
            lines = (line.rstrip() for line in html.unescape(_TAG.sub("", part)).splitlines())
            yield "\n".join(line for line in lines if line)
        else:
            yield from (" ".join(html.unescape(_TAG.sub("", text)).split()) for text in _BREAK.split(part))


def texts(pages: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Name and text of the pages that are English prose, without paragraphs that an earlier page had."""
    seen: set[bytes] = set()
    for name, page in pages:
        new = []
        for paragraph in paragraphs(page):
            mark = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
            if len(paragraph) > 1 and mark not in seen:
                seen.add(mark)
                new.append(paragraph)
        text = "\n\n".join(new)
        words = _WORD.findall(text.lower())
        if len(text) >= SHORTEST and sum(word in COMMON for word in words) >= PROSE * len(words):
            yield name, text


def split(pages: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Texts for training and for validation, by a hash of the name: the same page is always on the same side."""
    held: list[tuple[str, str]] = []
    kept: list[tuple[str, str]] = []
    for name, text in pages:
        mark = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        (held if int(mark, 16) % VALIDATION == 0 and len(text) <= LONGEST_HELD else kept).append((mark, text))
    return [text for _, text in sorted(kept)], [text for _, text in sorted(held)]


def train_tokenizer(training: list[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE tokenizer; every text can be encoded, and token 0 ends a page."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(training, trainer)
    return tokenizer


def write(folder: Path, pages: Iterable[tuple[str, str]], record: dict[str, Any], vocabulary: int = VOCABULARY) -> None:
    """Split, tokenize and write a corpus; `record` says where it comes from."""
    parts = dict(zip(("train", "valid"), split(pages), strict=True))
    tokenizer = train_tokenizer(parts["train"], vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    record = record | {"vocabulary": tokenizer.get_vocab_size()}
    for part, pages_of in parts.items():
        encoded = (tokenizer.encode(text).ids for text in pages_of)
        tokens = np.concatenate([np.array([*ids, 0], dtype=np.uint16) for ids in encoded])
        np.save(folder / f"{part}.npy", tokens)
        size = sum(len(text.encode()) for text in pages_of)
        record[part] = {"pages": len(pages_of), "bytes": size, "tokens": len(tokens), "bytes per token": size / len(tokens)}
    (folder / "corpus.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
